"""Training on many devices: how many, and whether each holds the whole model (DDP) or a part of it (FSDP2)."""

import inspect
import os
import sys
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from jsonargparse import Namespace
from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    Strategy,
    StrategyRegistry,
)
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from ditlit.errors import InputError
from ditlit.models import DiT

T = TypeVar("T")


def launched(trainer: Namespace) -> dict[str, int]:
    """Nodes and devices for which torchrun or srun has started processes, where the user names no others.

    Args:
        trainer: the user's settings of the Trainer.
    """
    if TorchElasticEnvironment.detect():
        number = {"num_nodes": os.environ["GROUP_WORLD_SIZE"], "devices": os.environ["LOCAL_WORLD_SIZE"]}
    elif SLURMEnvironment.detect() and "SLURM_STEP_NUM_NODES" in os.environ:  # without srun nobody starts the others
        number = {"num_nodes": os.environ["SLURM_STEP_NUM_NODES"]}
    else:
        number = {}
    open_settings = [name for name, value in (("num_nodes", 1), ("devices", "auto")) if trainer[name] == value]
    return {name: int(value) for name, value in number.items() if name in open_settings}


def decided_by_rank_0(trainer: Trainer, decide: Callable[[], T]) -> T:
    """What ``decide`` gives on rank 0, told to all: what each looked up by itself might differ on a shared disk.

    Processes that Lightning is to start are started now, and meet. An error of rank 0 ends the others without a word.
    """
    strategy = trainer.strategy
    launcher = strategy.launcher  # None where the processes run already, and one that forks them has them inherit
    forks = launcher is not None and launcher.is_interactive_compatible
    if not isinstance(strategy, DDPStrategy | FSDP2) or trainer.world_size == 1 or forks:
        return decide()

    def together() -> T:
        strategy.setup_distributed()
        strategy.accelerator.setup_device(strategy.root_device)  # on which NCCL communicates
        decision, error = None, None
        if strategy.is_global_zero:
            try:
                decision = decide()
            except Exception as caught:
                error = caught
        decision, failed = strategy.broadcast((decision, error is not None))
        if error is not None:
            raise error
        if failed:
            sys.exit(2)
        return decision

    return together() if launcher is None else launcher.launch(together)


# What says whether DDP sends buffers around in every step; newer versions have another word for it.
SYNC_BUFFERS = next(
    name
    for name in ("forward_sync_buffers", "broadcast_buffers")
    if name in inspect.signature(DistributedDataParallel).parameters
)

# Whole models --------------------------------------------------------------------------------------------------------


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


# Shards --------------------------------------------------------------------------------------------------------------

MIXED = {"bf16-mixed": torch.bfloat16}
PRECISIONS = ("32-true", "bf16-mixed", "bf16-true")


class FSDP2(ModelParallelStrategy):
    """Fully sharded data parallelism: ``--trainer.strategy fsdp2``.

    Every rank keeps its part of weights, gradients, optimizer state and moving average, and meets the whole of one
    block at a time. The numbers are those of one process, to rounding. Master weights, gradients and averages are
    float32 with bf16-mixed; blocks travel in bfloat16 then, where autocast would round their weights anyway.

    Checkpoints are those of any other run: one file with whole tensors, gathered on rank 0, from which a run continues
    on any number of ranks, with or without this strategy.

    Args:
        reshard_after_forward: free each block between its forward and backward pass. False saves a third of the
            traffic and costs the memory of the whole weights during a step.
        process_group_backend: of torch.distributed; by default nccl on GPUs and gloo on CPUs.
        timeout: of collectives.
    """

    def __init__(
        self,
        reshard_after_forward: bool = True,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
    ):
        super().__init__(
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )
        self.reshard_after_forward = reshard_after_forward

    def setup_distributed(self) -> None:
        """Let the ranks meet, as DDPStrategy's method of this name does."""
        self._setup_distributed()

    def setup_environment(self) -> None:
        if self.precision_plugin.precision not in PRECISIONS:
            raise InputError(
                f"fsdp2 does not train with trainer.precision {self.precision_plugin.precision}; choose one of "
                f"{', '.join(PRECISIONS)}, or --trainer.strategy ddp"
            )
        self._data_parallel_size = self.world_size
        super().setup_environment()

    def setup(self, trainer: Trainer) -> None:
        # torch's shards count the versions of their tensors, which inference mode does not let them do. (Lightning does
        # without it where gloo communicates.)
        for loop in (trainer.validate_loop, trainer.test_loop, trainer.predict_loop):
            loop.inference_mode = False
        super().setup(trainer)

    def shard(self, denoiser: nn.Module) -> None:
        """Shard a denoiser in place, block by block (as one where it has no ``blocks``); once only."""
        if isinstance(denoiser, FSDPModule):
            return
        mesh = self.device_mesh["data_parallel"]
        for block in getattr(denoiser, "blocks", ()):
            policy = MixedPrecisionPolicy(
                param_dtype=self._dtype_of(block), reduce_dtype=torch.float32, cast_forward_inputs=False
            )
            fully_shard(block, mesh=mesh, reshard_after_forward=self.reshard_after_forward, mp_policy=policy)
        # What lies around the blocks is needed again as soon as the backward pass begins.
        policy = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
        fully_shard(denoiser, mesh=mesh, reshard_after_forward=False, mp_policy=policy)
        if self.root_device.type == "cpu":
            for part in (*getattr(denoiser, "blocks", ()), denoiser):
                part.set_force_sum_reduction_for_comms(True)  # gloo of torch 2.8 sums where it should average

    def _dtype_of(self, block: nn.Module) -> torch.dtype | None:
        """In which a block's weights are gathered: 16 bits where autocast would round all of them, else their own."""
        owners = [module for module in block.modules() if next(module.parameters(recurse=False), None) is not None]
        rounded = all(isinstance(module, nn.Linear | nn.Conv2d) for module in owners)
        return MIXED.get(self.precision_plugin.precision) if rounded else None

    # Checkpoints are whole on rank 0; the other ranks take part in gathering them and hold None in each place.

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        return False

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        return gathered(self.lightning_module.state_dict())

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        module = self.lightning_module
        places = module.state_dict()
        state = checkpoint["state_dict"]
        shards = {name: shard_like(value, places[name]) if name in places else value for name, value in state.items()}
        module.load_state_dict(shards, strict=strict)

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        return gathered(Strategy.optimizer_state(self, optimizer))

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        states = []
        for optimizer, whole in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            shards = {
                i: {k: shard_like(v, parameters[i]) if has_shape(v, parameters[i]) else v for k, v in values.items()}
                for i, values in whole["state"].items()
            }
            states.append(whole | {"state": shards})
        Strategy.load_optimizer_state_dict(self, {"optimizer_states": states})

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        Strategy.save_checkpoint(self, checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        return Strategy.load_checkpoint(self, checkpoint_path, weights_only)

    def teardown(self) -> None:
        super().teardown()
        self.checkpoint_io.teardown()


StrategyRegistry.register(
    "ddp_bf16", DDPStrategy, description="DDP whose gradients travel in bfloat16", ddp_comm_hook=bf16_compress_hook
)
StrategyRegistry.register("fsdp2", FSDP2, description="Fully sharded data parallelism with torch's fully_shard")


def split(denoiser: nn.Module, strategy: Strategy) -> None:
    """Shard a denoiser where the strategy is :class:`FSDP2`.

    Raises:
        InputError: for Lightning's other strategies that split a model: averages and checkpoints would be wrong.
    """
    if isinstance(strategy, FSDP2):
        strategy.shard(denoiser)
    elif isinstance(strategy, ModelParallelStrategy | FSDPStrategy | DeepSpeedStrategy):
        raise InputError(f"trainer.strategy {type(strategy).__name__} is not supported: use --trainer.strategy fsdp2")


# Whole tensors and their shards --------------------------------------------------------------------------------------


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
