"""Where in an epoch a continued run begins: at a whole optimizer step, however its batches are accumulated."""

from typing import Any

from lightning.pytorch import Trainer


def begin_at_whole_step(checkpoint: dict[str, Any], accumulate: int) -> None:
    """Let the loops of a checkpoint stand behind its latest optimizer step, counted in batches of the run to come.

    A checkpoint may be written amid the accumulated batches of a step: their gradients are not in it, so that step
    begins anew. And the step may be accumulated from another number of batches than before, say on more devices.

    Args:
        checkpoint: of a run; changed in place.
        accumulate: batches that the run to come accumulates.
    """
    before = checkpoint.get("accumulate_grad_batches", accumulate)
    loop = checkpoint["loops"]["fit_loop"]
    progress = loop["epoch_loop.batch_progress"]
    if progress["current"]["ready"] % before:
        # Lightning adds one to it on the way, as where a checkpoint is written at the end of a step.
        loop["epoch_loop.state_dict"]["_batches_that_stepped"] -= 1
    for counts in (progress["total"], progress["current"]):
        unfinished = counts["ready"] - counts["completed"]  # 1 where it was written before the batch was counted
        batches = counts["ready"] // before * accumulate
        counts.update(ready=batches, started=batches, processed=batches, completed=batches - unfinished)


def count_as_saved(trainer: Trainer) -> None:
    """Let ModelCheckpoint not save the step that was loaded again, which it would do amid its accumulated batches."""
    for callback in trainer.checkpoint_callbacks:
        callback._last_global_step_saved = trainer.global_step
