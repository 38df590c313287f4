"""FSDP2: every device holds a part of the model."""

from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch
from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import (
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    Strategy,
    StrategyRegistry,
)
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from ditlit.errors import InputError
from ditlit.parallel.shards import gathered, has_shape, shard_like

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
