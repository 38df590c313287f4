"""One model on many devices."""

from ditlit.parallel.ddp import prepare_ddp
from ditlit.parallel.fsdp2 import FSDP2

__all__ = ["FSDP2", "prepare_ddp"]
