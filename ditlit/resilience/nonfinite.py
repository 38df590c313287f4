"""Steps whose gradients are not finite: skipped, explained, and, should they go on, answered by going back."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from ditlit.data.sampler import TrainOrder
from ditlit.parallel.shards import is_sharded, local, reshard
from ditlit.resilience.checkpoint_files import CheckpointFiles, newest_complete
from ditlit.resilience.resuming import keep_settings
from ditlit.resilience.run_folder import run_folder

REPORT = "nonfinite.json"
MAX_REPORTED = 100  # steps explained in one run


class Diverged(RuntimeError):
    """Gradients stayed infinite or undefined; the message says where they began and what to try."""


@dataclass
class BadStep:
    """What is known of a skipped step.

    Args:
        step: number of the optimizer step, from 1.
        first: the layer whose output is the first that is not finite, or the last parameter whose gradient is not, or
            that the latents themselves are not.
        timesteps: of the samples whose loss is not finite; of the whole batch where all losses are finite.
        samples: numbers of these samples in the stores, as far as they are known.
    """

    step: int
    first: str
    timesteps: list[int] = field(default_factory=list)
    samples: list[int] = field(default_factory=list)

    def __str__(self) -> str:
        span = f", timesteps {min(self.timesteps)} to {max(self.timesteps)}" if self.timesteps else ""
        return f"{self.first}{span}"


class SkipNonFinite(Callback):
    """Skips optimizer steps whose gradient norm is infinite or not a number, without waiting for the device.

    Fused optimizers read a flag on the device; for others its value is fetched. The norm is that of the summed
    gradients, so all ranks skip the same steps. What was skipped becomes known on the CPU one step later; the step is
    then computed again to find the layer, the timesteps and the samples, which go to the log and to ``nonfinite.json``
    in the run's folder. Healthy runs are the same to the bit with and without it.

    After ``limit`` such steps in a row the weights, moving average and optimizer of the last checkpoint before them are
    taken up again, and training goes on with the batches that follow. The second time :class:`Diverged` ends the run.
    With fp16 some steps are skipped in search of a loss scale: these are explained only if ``limit`` is reached.

    Args:
        limit: steps in a row.
    """

    def __init__(self, limit: int):
        self.limit = limit
        self.skipped = 0
        self._in_a_row = 0
        self._went_back = False
        self._reports: list[BadStep] = []
        self._batches: list[tuple[Any, int]] = []  # of the step that is computed
        self._flag: Tensor | None = None
        self._latest: tuple[int, list[tuple[Any, int]], Tensor, torch.cuda.Event | None] | None = None

    def check(self, optimizer: torch.optim.Optimizer, norm: Tensor, scaled: bool) -> None:
        """Let the optimizer skip the coming step where the gradient norm () is not finite.

        ``scaled`` says that a loss scaler makes it skip already.
        """
        self._flag = ~torch.isfinite(norm)
        if scaled:
            return
        if all(group.get("fused") for group in optimizer.param_groups):
            optimizer.found_inf = self._flag.float()
        elif self._flag:
            for group in optimizer.param_groups:
                for p in group["params"]:
                    p.grad = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._in_a_row, self._batches, self._latest = 0, [], None
        self._went_back = False

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._batches.append((batch, batch_idx))
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        self._look(trainer, pl_module)
        self._latest = (trainer.global_step, self._batches, *fetched(self._flag))
        self._batches = []

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._look(trainer, pl_module)

    def _look(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read whether the step before was skipped, which is known by now."""
        if self._latest is None:
            return
        step, batches, flag, event = self._latest
        self._latest = None
        if event is not None:
            event.synchronize()
        if not flag:
            self._in_a_row = 0
            return
        self.skipped += 1
        self._in_a_row += 1
        scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        if (self._in_a_row == self.limit or not scaled) and len(self._reports) < MAX_REPORTED:
            self._explain(trainer, pl_module, step, batches)
        if self._in_a_row >= self.limit:
            self._go_back(trainer, pl_module, step)
            self._in_a_row = 0

    def _explain(self, trainer: Trainer, pl_module: LightningModule, step: int, batches: list) -> None:
        report = explain(trainer, pl_module, step, batches)
        self._reports.append(report)
        rank_zero_warn(f"step {step} is skipped: its gradients are not finite. First: {report}")
        folder = run_folder(trainer)
        if trainer.is_global_zero:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / REPORT).write_text(json.dumps([asdict(r) for r in self._reports], indent=1))
            for logger in trainer.loggers:
                logger.log_metrics({"train/skipped_steps": self.skipped}, step=trainer.global_step)

    def _go_back(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        first = self._reports[-1]
        file = run_folder(trainer) / REPORT
        problem = f"{self.limit} steps in a row, up to step {step}, had gradients that are not finite"
        path = None if self._went_back else trainer.strategy.broadcast(last_good(trainer, step - self.limit))
        if path is None:
            why = "again" if self._went_back else "and there is no checkpoint to go back to"
            raise Diverged(
                f"{problem}, {why}. First: {first}. The batches are in {file}. Look at these samples, or train with a "
                "lower learning rate, --trainer.gradient_clip_val 1.0 or --trainer.precision 32-true"
            )
        restore(trainer, pl_module, path)
        self._went_back = True
        rank_zero_warn(
            f"{problem}: went back to the weights of {path}, and goes on with the batches that follow. First: {first}. "
            f"The batches are in {file}"
        )


def fetched(flag: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """A flag on its way to the CPU, and the event at which it is there."""
    if flag.device.type != "cuda":
        return flag, None
    copy = torch.empty(flag.shape, dtype=flag.dtype, pin_memory=True).copy_(flag, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    return copy, event


# Going back --------------------------------------------------------------------------------------------------------


def last_good(trainer: Trainer, step: int) -> Path | None:
    """The newest whole checkpoint of at most ``step`` steps; looked for on rank 0 only."""
    folders = [getattr(callback, "dirpath", None) for callback in trainer.checkpoint_callbacks]
    folders = [Path(folder) for folder in folders if folder]
    if not trainer.is_global_zero:
        return None
    if isinstance(trainer.strategy.checkpoint_io, CheckpointFiles):
        trainer.strategy.checkpoint_io.finish()
    found = newest_complete(folders, at_most=step)
    return None if found is None or found[0].is_dir() else found[0]


def restore(trainer: Trainer, pl_module: LightningModule, path: Path) -> None:
    """Weights, moving average and optimizer of a checkpoint; step, order and schedule stay where they are."""
    checkpoint = trainer.strategy.load_checkpoint(path)
    if pl_module.ema is None:
        trainer.strategy.load_model_state_dict(checkpoint)
    else:
        pl_module.ema.on_load_checkpoint(trainer, pl_module, checkpoint)
    keep_settings(trainer, checkpoint)
    trainer.strategy.load_optimizer_state_dict(checkpoint)


# Finding the cause -------------------------------------------------------------------------------------------------


def explain(trainer: Trainer, pl_module: LightningModule, step: int, batches: list[tuple[Any, int]]) -> BadStep:
    """Compute a step again, on every rank its own batches, and say what was not finite first."""
    mine = BadStep(step, "")
    for batch, batch_idx in batches:
        mine = merged(mine, explain_batch(trainer, pl_module, step, batch, batch_idx))
    if trainer.world_size == 1:
        reports = [mine]
    else:
        reports = [None] * trainer.world_size
        dist.all_gather_object(reports, mine)
    for report in reports[1:]:
        reports[0] = merged(reports[0], report)
    found = reports[0]
    found.first = found.first or "not seen when the step is computed again"
    return found


def merged(a: BadStep, b: BadStep) -> BadStep:
    """Two parts of a step. Where one has infinite losses and the other only their echo, the first counts."""
    if bool(a.first) != bool(b.first):
        return a if a.first else b
    return BadStep(a.step, a.first, a.timesteps + b.timesteps, a.samples + b.samples)


def explain_batch(trainer: Trainer, pl_module: LightningModule, step: int, batch: Any, batch_idx: int) -> BadStep:
    order = samples_of(trainer, step - 1, batch_idx)
    with (
        trainer.precision_plugin.forward_context(),
        torch.compiler.set_stance("force_eager"),
        first_output(pl_module.denoiser) as where,
        torch.enable_grad(),
    ):
        terms, t = pl_module.training_terms(batch, batch_idx, step - 1)
    loss = terms["loss"]
    bad = ~torch.isfinite(loss.detach())
    first = f"the output of {where[0]}" if where else ""
    latents = batch["moments" if "moments" in batch else "latents"]
    if not torch.isfinite(latents).all():
        first = "the latents themselves"
        bad = ~torch.isfinite(latents.flatten(1)).all(1) | bad
    elif not first and bad.any():
        first = "the loss"
    if not any_rank(bool(first), trainer, pl_module.denoiser):
        names = bad_gradients(loss.mean(), pl_module.denoiser)
        first = f"the gradient of {names[-1]}" if names else ""
    chosen = bad if bad.any() else torch.ones_like(bad)
    rows = chosen.nonzero().flatten().tolist()
    return BadStep(step, first, t[chosen].tolist(), [order[row] for row in rows] if order else [])


def any_rank(known: bool, trainer: Trainer, denoiser: nn.Module) -> bool:
    """Whether the cause is known already; shards can only go backwards on all ranks together, so these agree on it."""
    return trainer.strategy.reduce_boolean_decision(known, all=False) if is_sharded(denoiser) else known


def bad_gradients(loss: Tensor, denoiser: nn.Module) -> list[str]:
    """Names of the parameters whose gradients are not finite; where they are sharded, of all ranks' losses together."""
    if not is_sharded(denoiser):
        parameters = {name: p for name, p in denoiser.named_parameters() if p.requires_grad}
        grads = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        bad = [grad is not None and not torch.isfinite(grad).all() for grad in grads]
        return [name for name, is_bad in zip(parameters, bad, strict=True) if is_bad]
    reshard(denoiser)  # names lead to the whole parameters after the forward pass, but shards have the gradients
    parameters = {name: p for name, p in denoiser.named_parameters() if p.requires_grad}
    denoiser.zero_grad()  # those of the step that was just taken
    loss.backward()
    bad = [p.grad is not None and not torch.isfinite(local(p.grad)).all() for p in parameters.values()]
    bad = torch.tensor(bad, dtype=torch.int32, device=loss.device)
    dist.all_reduce(bad, dist.ReduceOp.MAX)
    denoiser.zero_grad()
    return [name for name, is_bad in zip(parameters, bad.tolist(), strict=True) if is_bad]


@contextmanager
def first_output(module: nn.Module) -> Iterator[list[str]]:
    """Inside, the names of the innermost modules whose output is not finite are collected in the order of calls."""
    names: list[str] = []

    def watch(name: str) -> Callable:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.is_floating_point() and not torch.isfinite(output).all():
                names.append(name)

        return hook

    handles = [m.register_forward_hook(watch(name)) for name, m in module.named_modules() if name]
    try:
        yield names
    finally:
        for handle in handles:
            handle.remove()


def samples_of(trainer: Trainer, step: int, batch_idx: int) -> list[int]:
    """Numbers in the stores of this rank's samples in a micro-batch of optimizer step ``step``, counted from 0."""
    loader = trainer.train_dataloader
    order = getattr(loader, "sampler", None)
    if not isinstance(order, TrainOrder):
        return []
    epoch, k = divmod(step, order.steps_per_epoch)
    index, _ = order.permutation(epoch)
    part = batch_idx % order.accumulate * order.num_ranks + order.rank
    start = k * order.global_batch_size + part * order.batch_size
    return loader.dataset.rows(index[start : start + order.batch_size]).tolist()
