"""DDP: every device holds the whole model."""

import inspect

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from ditlit.errors import InputError
from ditlit.models import DiT

# What says whether DDP sends buffers around in every step; newer versions have another word for it.
SYNC_BUFFERS = next(
    name
    for name in ("forward_sync_buffers", "broadcast_buffers")
    if name in inspect.signature(DistributedDataParallel).parameters
)

StrategyRegistry.register(
    "ddp_bf16", DDPStrategy, description="DDP whose gradients travel in bfloat16", ddp_comm_hook=bf16_compress_hook
)


def prepare_ddp(trainer: Trainer, module: LightningModule) -> None:
    """Settings of DDP that suit a DiT, where the user has left them open.

    Gradients lie in the buckets that are reduced, which saves their second copy, and the position table is not sent
    around in every step. The graph is declared static where it is: a DiT computes the same in every step. Not while
    batches are accumulated, where torch would fail, and not with compiled blocks, for which torch has not promised it.
    Those stay whole: torch would cut them along the buckets, so that gradients travel early, but from block to block
    they do so anyway.

    Raises:
        InputError: where the user asks for both a static graph and accumulated batches.
    """
    strategy = trainer.strategy
    if not isinstance(strategy, DDPStrategy):
        return
    accumulates = trainer.accumulate_grad_batches > 1
    if strategy._ddp_kwargs.get("static_graph") and accumulates:
        raise InputError("DDP cannot accumulate batches with static_graph: remove it, or accumulate_grad_batches")
    strategy._ddp_kwargs.setdefault("gradient_as_bucket_view", True)
    if module.compile_blocks:
        torch._dynamo.config.optimize_ddp = False
    if isinstance(module.denoiser, DiT):
        strategy._ddp_kwargs.setdefault(SYNC_BUFFERS, False)
        if not module.compile_blocks and not accumulates:
            strategy._ddp_kwargs.setdefault("static_graph", True)
