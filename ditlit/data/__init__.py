"""Latents on disk, the order they are read in, and what they mean."""

from ditlit.data.datamodule import LatentDataModule
from ditlit.data.digits import DigitsDataModule
from ditlit.data.manifest import Manifest
from ditlit.data.store import LatentStore, write_store

__all__ = ["DigitsDataModule", "LatentDataModule", "LatentStore", "Manifest", "write_store"]
