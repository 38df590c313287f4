"""Latents on disk or in object stores, the order they are read in, and what they mean."""

from ditlit.data.cache import ShardCache
from ditlit.data.datamodule import LatentDataModule
from ditlit.data.digits import DigitsDataModule
from ditlit.data.manifest import Manifest
from ditlit.data.store import LatentStore, write_store

__all__ = ["DigitsDataModule", "LatentDataModule", "LatentStore", "Manifest", "ShardCache", "write_store"]
