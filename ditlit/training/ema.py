"""The exponential moving average of the denoiser's weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from ditlit.errors import InputError
from ditlit.parallel.shards import gathered, is_sharded, local, reshard, shard_like, whole

PREFIX = "denoiser."


class AveragedParameters:
    """Float32 averages of a module's trainable parameters; buffers and frozen parameters are left alone."""

    def __init__(self, module: nn.Module, decay: float, warmup: bool):
        self.decay = decay
        self.warmup = warmup
        self.num_updates = 0
        self.names = [name for name, p in module.named_parameters() if p.requires_grad]
        self.values = [p.detach().float().clone() for p in self.parameters(module)]

    @property
    def decay_in_force(self) -> float:
        """Of the next update."""
        k = self.num_updates
        return min(self.decay, (1 + k) / (10 + k)) if self.warmup else self.decay

    def parameters(self, module: nn.Module) -> list[Tensor]:
        """Those that are averaged; where they are sharded, the shards."""
        reshard(module)
        return [module.get_parameter(name).detach() for name in self.names]

    def update_parameters(self, pl_module: LightningModule) -> None:
        """average <- decay * average + (1 - decay) * parameters, in a few multi-tensor kernels."""
        decay = self.decay_in_force
        current = [local(p).float() for p in self.parameters(pl_module.denoiser)]
        torch._foreach_lerp_([local(value) for value in self.values], current, 1 - decay)
        self.num_updates += 1

    def move_to(self, module: nn.Module) -> None:
        """Move to the devices of the parameters, and into their shards."""
        self.values = [shard_like(v, p) for v, p in zip(self.values, self.parameters(module), strict=True)]

    def named(self) -> dict[str, Tensor]:
        """The averages under the keys that they have in the LightningModule's state dict."""
        return self.keyed(self.values)

    def keyed(self, values: list[Tensor]) -> dict[str, Tensor]:
        return {PREFIX + name: value for name, value in zip(self.names, values, strict=True)}


def copy(source: list[Tensor], target: list[Tensor]) -> None:
    """Copy this rank's parts of tensors."""
    torch._foreach_copy_([local(t) for t in target], [local(s) for s in source])


class EMA(WeightAveraging):
    """Keeps the moving average and puts it in the denoiser's place in validation, in sampling and when training ends.

    Unlike its parent it averages the denoiser only, in float32 whatever the training precision, on the device of the
    weights, with a few kernels an optimizer step and no host synchronisation; where the weights are sharded, so is the
    average. The raw weights are kept aside while the average stands in for them, so that a checkpoint written or an
    exception raised meanwhile finds both as they are, and another fit of the module goes on from them.
    In checkpoints ``state_dict`` holds the average and ``current_model_state`` the raw weights.

    Args:
        decay: of the average, per optimizer step. The paper: 0.9999.
        warmup: start with a lower decay, (1 + k) / (10 + k) after k steps, so that short runs forget their
            initialisation.
    """

    def __init__(self, decay: float = 0.9999, warmup: bool = False):
        if not 0 <= decay < 1:
            raise InputError(f"the decay of the EMA lies in [0, 1), got {decay}")
        super().__init__(use_buffers=False)
        self.decay = decay
        self.warmup = warmup
        self._average_model: AveragedParameters | None = None
        self._raw: list[Tensor] | None = None  # the weights set aside while the average is in their place
        self._training = False  # rather than validating, testing or predicting

    @contextmanager
    def averaged(self, pl_module: LightningModule) -> Iterator[None]:
        """The denoiser holds the average inside; outside of training it does already."""
        if self._average_model is None or self._raw is not None:
            yield
            return
        self._swap_in(pl_module)
        try:
            yield
        finally:
            self._swap_out(pl_module)

    def distance(self, pl_module: LightningModule) -> Tensor:
        """Norm of average - weights over that of the weights, (), while training."""
        weights = [p.float() for p in self._average_model.parameters(pl_module.denoiser)]
        difference = torch._foreach_sub(self._average_model.values, weights)
        return whole(get_total_norm(difference)) / whole(get_total_norm(weights))

    @property
    def decay_in_force(self) -> float:
        """Of the next step, while training: ``decay``, or less in the warm-up."""
        return self._average_model.decay_in_force

    def _swap_in(self, pl_module: LightningModule) -> None:
        if self._average_model is None or self._raw is not None:
            return
        parameters = self._average_model.parameters(pl_module.denoiser)
        self._raw = [p.clone() for p in parameters]
        copy(self._average_model.values, parameters)

    def _swap_out(self, pl_module: LightningModule) -> None:
        if self._raw is None:
            return
        copy(self._raw, self._average_model.parameters(pl_module.denoiser))
        self._raw = None

    def _left_in_place(self, trainer: Trainer, pl_module: LightningModule) -> bool:
        """Whether the denoiser holds the average that an earlier fit has left there: it is the same module's, and no
        other weights were loaded since."""
        if self._raw is None:
            return False
        reshard(pl_module.denoiser)
        held = {name: local(p.detach()) for name, p in pl_module.denoiser.named_parameters()}
        average = zip(self._average_model.names, map(local, self._average_model.values), strict=True)
        same = all(name in held and torch.equal(value.to(held[name]), held[name]) for name, value in average)
        return trainer.strategy.reduce_boolean_decision(same, all=True)

    def _forget(self) -> None:
        self._average_model = self._raw = None

    # Hooks ---------------------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        in_place = self._left_in_place(trainer, pl_module)
        self._training = stage == "fit"
        if in_place and self._training:
            self._swap_out(pl_module)  # and train on
        if self._training or not in_place:
            self._forget()
        if not self._training:
            return
        for callback in trainer.callbacks:
            if isinstance(callback, ModelCheckpoint) and callback.save_weights_only:
                raise InputError(
                    "ModelCheckpoint(save_weights_only=True) would save no moving average; remove the setting"
                )
        self._latest_update_step = 0
        self._average_model = AveragedParameters(pl_module.denoiser, self.decay, self.warmup)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._average_model.move_to(pl_module.denoiser)  # only now are the weights where they stay

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._training:
            self._swap_in(pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._training:
            self._swap_out(pl_module)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Nothing: the parent's swap is between on_validation_start and on_validation_end here."""

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Nothing: see on_validation_epoch_start."""

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self._training:
            self._swap_out(pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # The average stays in the model for what comes after training; the raw weights stay for late checkpoints.
        self._swap_in(pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self._average_model is not None and not is_sharded(pl_module.denoiser):  # shards stay on their devices
            self._average_model.values = [value.cpu() for value in self._average_model.values]
            self._raw = None if self._raw is None else [value.cpu() for value in self._raw]

    # Checkpoints ---------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        average = self._average_model
        if average is None:
            return  # not training: the model holds whatever was loaded
        raw = checkpoint["state_dict"]
        if self._raw is not None:
            raw = raw | gathered(average.keyed(self._raw))
        checkpoint["current_model_state"] = raw
        checkpoint["state_dict"] = raw | gathered(average.named())
        checkpoint["averaging_state"] = {"num_updates": average.num_updates}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if not self._training:  # validation, test and prediction use the average, which is what state_dict holds
            self._forget()
            return
        average = self._average_model
        if "current_model_state" in checkpoint:
            average.num_updates = checkpoint["averaging_state"]["num_updates"]
            trainer.strategy.load_model_state_dict({"state_dict": checkpoint["current_model_state"]})
        else:
            rank_zero_warn("The checkpoint has no moving average: it starts from the checkpoint's weights.")
        state = checkpoint["state_dict"]
        places = average.parameters(pl_module.denoiser)
        names = zip(average.names, places, strict=True)
        average.values = [shard_like(state[PREFIX + name].float().clone(), place) for name, place in names]
