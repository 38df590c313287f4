"""How large activations and attention logits grow while training: what overflows or saturates shows here first."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from ditlit.errors import check_positive
from ditlit.models.probes import blocks_of, largest_logit, watch_attention, watch_blocks
from ditlit.parallel.shards import reshard


class ActivationMaxima(Callback):
    """Logs the largest values inside every block: ``activations/block_00``, the largest absolute value of the tokens
    after it, and ``attention_logits/block_00``, the largest q.k / sqrt(d) of its self-attention.

    Every so many steps the step's own batch, noise and timesteps pass through the denoiser once more, without gradients
    and uncompiled, so that the run learns the same to the bit as without this callback. That costs a third of a step,
    each time. Maxima are over all samples, devices and the looks since the last entry; they stay on the device until
    ``trainer.log_every_n_steps`` calls for an entry.

    Args:
        every_n_steps: look at every so many optimizer steps; by default at those that are logged.

    Raises:
        InputError: for a denoiser without blocks, before training starts.
    """

    def __init__(self, every_n_steps: int | None = None):
        check_positive(every_n_steps=every_n_steps)
        self.every_n_steps = every_n_steps
        self._maxima: Tensor | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        blocks_of(pl_module.denoiser)
        self._maxima = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if (trainer.global_step + 1) % (self.every_n_steps or trainer.log_every_n_steps):
            return
        denoiser = pl_module.denoiser
        found = torch.full((2, len(blocks_of(denoiser))), -torch.inf, device=pl_module.device)  # activations, logits

        def see_block(number: int, _: Tensor, after: Tensor) -> None:
            found[0, number] = after.abs().max()

        def see_attention(number: int, q: Tensor, k: Tensor, v: Tensor) -> None:
            found[1, number] = largest_logit(q, k).max()

        with (
            torch.no_grad(),
            trainer.precision_plugin.forward_context(),
            watch_blocks(denoiser, see_block),
            watch_attention(denoiser, see_attention),
        ):
            pl_module.training_terms(batch, batch_idx, trainer.global_step)
        reshard(denoiser)
        self._maxima = found if self._maxima is None else torch.maximum(self._maxima, found)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        at_step = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if self._maxima is None or not at_step or trainer.global_step % trainer.log_every_n_steps:
            return
        activations, logits = trainer.strategy.reduce(self._maxima, reduce_op="max").tolist()
        self._maxima = None
        metrics = {f"activations/block_{i:02d}": value for i, value in enumerate(activations)}
        metrics |= {f"attention_logits/block_{i:02d}": value for i, value in enumerate(logits)}
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.global_step)
