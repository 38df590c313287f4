"""Whole tensors and the shards of them that a device holds."""

from typing import Any

import torch.distributed as dist
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this rank holds, in the same memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shard_like(whole: Tensor, like: Tensor) -> Tensor:
    """This rank's part of a tensor that every rank holds whole, on the device and in the shards of ``like``."""
    if isinstance(whole, DTensor):
        return whole
    if isinstance(like, DTensor):
        return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)
    return whole.to(like.device)


def has_shape(value: Any, like: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == like.shape


def whole(tensor: Tensor) -> Tensor:
    """A tensor, whole on every rank; all ranks must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gathered(tree: Any) -> Any:
    """A tree of plain values and tensors with sharded tensors whole on rank 0's CPU; None in their places on others.

    All ranks must call this.
    """

    def on_rank_0(shard: DTensor) -> Tensor | None:
        tensor = shard.full_tensor()
        return tensor.cpu() if dist.get_rank() == 0 else None

    return apply_to_collection(tree, DTensor, on_rank_0)


def is_sharded(module: nn.Module) -> bool:
    return isinstance(module, FSDPModule)


def reshard(module: nn.Module) -> None:
    """Free what forward passes have left gathered, so that the parameters of ``module`` are the shards."""
    for part in module.modules() if is_sharded(module) else ():
        if isinstance(part, FSDPModule):
            part.reshard()
