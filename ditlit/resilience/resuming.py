"""Continuing a run: at a whole optimizer step, with the optimizer settings of now, on the latents of before."""

import warnings
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau

from ditlit.data.manifest import Manifest
from ditlit.errors import InputError

# Where in an epoch ---------------------------------------------------------------------------------------------------


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


def forget_absent_callbacks(trainer: Trainer, checkpoint: dict[str, Any]) -> None:
    """Drop what a ModelCheckpoint has noted that this run has no more, or with another period: Lightning would warn."""
    present = {callback.state_key for callback in trainer.callbacks}
    notes = checkpoint.get("callbacks", {})
    for key in [key for key in notes if str(key).startswith("ModelCheckpoint") and key not in present]:
        del notes[key]


# Settings of the optimizer -------------------------------------------------------------------------------------------

# How an optimizer computes, and what a schedule notes in it.
NO_SETTINGS = ("params", "fused", "foreach", "capturable", "differentiable", "initial_lr")
# What follows from the learning rate, and what a schedule counts.
NO_SCHEDULE = ("base_lrs", "_last_lr", "last_epoch", "_step_count", "_is_initial", "_get_lr_called_within_step")
COUNTERS = ("T_cur", "T_i", "best", "num_bad_epochs", "cooldown_counter")
UNKNOWN = "unknown"  # the class of a schedule
# Settings that came to optimizers of torch later than others.
LATER = {"maximize", "amsgrad", "decoupled_weight_decay", "max_lr", "min_lr", "base_momentum", "max_momentum"}


def optimizer_settings(trainer: Trainer) -> dict[str, Any]:
    """All that the optimizer and its schedule are configured with, as plain values by name, before the first step."""
    optimizer = trainer.optimizers[0]
    schedules = [config.scheduler for config in trainer.lr_scheduler_configs]
    return {
        "optimizer": type(optimizer).__name__,
        **group_settings(optimizer.param_groups),
        "lr_scheduler": type(schedules[0]).__name__ if schedules else None,
        **(flat("lr_scheduler", schedules[0].state_dict(), NO_SCHEDULE) if schedules else {}),
    }


def settings_in(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """The same of the run that wrote a checkpoint; without the classes' names where it is older than this entry."""
    if "optimizer_settings" in checkpoint:
        return checkpoint["optimizer_settings"]
    schedules = checkpoint["lr_schedulers"]
    return {
        **group_settings(checkpoint["optimizer_states"][0]["param_groups"]),
        "lr_scheduler": UNKNOWN if schedules else None,
        **(flat("lr_scheduler", schedules[0], NO_SCHEDULE + COUNTERS) if schedules else {}),
    }


def group_settings(groups: list[dict[str, Any]]) -> dict[str, Any]:
    found = {}
    for i, group in enumerate(groups):
        where = f" of group {i}" if len(groups) > 1 else ""
        group = group | {"lr": group.get("initial_lr", group["lr"])}
        found |= {name + where: plain(value) for name, value in group.items() if name not in NO_SETTINGS}
    return found


def flat(name: str, state: dict[str, Any], without: tuple[str, ...]) -> dict[str, Any]:
    """Settings of a schedule, and of schedules within it, by dotted names."""
    found = {}
    for key, value in state.items():
        if key in without:
            continue
        if isinstance(value, list) and all(isinstance(part, dict) for part in value):
            for i, part in enumerate(value):
                found |= flat(f"{name}.{key}.{i}", part, without)
        else:
            found[f"{name}.{key}"] = plain(value)
    return found


def plain(value: Any) -> Any:
    """A setting as a checkpoint can hold it and print it."""
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return {str(key): plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(part) for part in value]
    return value if isinstance(value, (bool, int, float, str, type(None))) else type(value).__name__


def take_settings(trainer: Trainer, checkpoint: dict[str, Any], settings: dict[str, Any]) -> None:
    """Let changed settings of the optimizer and its schedule take effect from the next step on; say what has changed.

    Lightning would load those of the checkpoint over them. A changed schedule is taken as if it had run from the start.

    Args:
        trainer: with optimizers and schedules as they are configured now.
        checkpoint: whose states they are about to load; changed in place.
        settings: :func:`optimizer_settings` of now.

    Raises:
        InputError: for another class of optimizer or other groups of parameters, and where a schedule is over.
    """
    before = settings_in(checkpoint)
    check_same_optimizer(trainer, checkpoint, before, settings)
    if before["lr_scheduler"] == UNKNOWN and settings["lr_scheduler"] is not None:
        before = before | {"lr_scheduler": settings["lr_scheduler"]}
    changed = [name for name in settings if name in before and settings[name] != before[name]]
    if not changed:
        return
    step = checkpoint["global_step"]
    for config in trainer.lr_scheduler_configs:
        advance(config.scheduler, step)
    checkpoint["lr_schedulers"] = [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs]
    keep_settings(trainer, checkpoint)
    said = ", ".join(f"{name} {before[name]} -> {settings[name]}" for name in changed)
    rank_zero_info(f"Other settings of the optimizer from step {step + 1} on: {said}.")


def check_same_optimizer(
    trainer: Trainer, checkpoint: dict[str, Any], before: dict[str, Any], settings: dict[str, Any]
) -> None:
    """Raise InputError where the state of the checkpoint's optimizer is of no use to this one."""
    remedy = "set it back, or start anew from the weights in another folder with --model.init_from"
    name = settings["optimizer"]
    if before.get("optimizer", name) != name:
        raise InputError(
            f"the checkpoint was trained with the optimizer {before['optimizer']} and cannot continue with {name}: "
            + remedy
        )
    theirs, ours = checkpoint["optimizer_states"][0]["param_groups"], trainer.optimizers[0].param_groups
    if [len(group["params"]) for group in theirs] != [len(group["params"]) for group in ours]:
        raise InputError(f"the checkpoint's optimizer has other groups of parameters than this run's: {remedy}")
    foreign = sorted((theirs[0].keys() ^ ours[0].keys()) - {*NO_SETTINGS, *LATER})
    if "optimizer" not in before and foreign:
        raise InputError(
            f"the checkpoint was trained with another optimizer than {name} (they differ in having "
            f"{', '.join(foreign)}) and cannot continue with it: {remedy}"
        )


def keep_settings(trainer: Trainer, checkpoint: dict[str, Any]) -> None:
    """Put the settings that the optimizers have now into the states of a checkpoint that they are about to load."""
    for optimizer, state in zip(trainer.optimizers, checkpoint["optimizer_states"], strict=True):
        state["param_groups"] = [
            group | {"params": saved["params"]}
            for group, saved in zip(optimizer.param_groups, state["param_groups"], strict=True)
        ]


def advance(schedule: Any, steps: int) -> None:
    """Bring a fresh schedule, and the learning rate with it, to where it stands after so many optimizer steps."""
    if isinstance(schedule, ReduceLROnPlateau):
        return  # it depends on what was measured
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the optimizer has not stepped
            for _ in range(steps):
                schedule.step()
    except ValueError as error:
        raise InputError(f"the new lr_scheduler cannot continue at step {steps}: {error}") from None


# Latents -------------------------------------------------------------------------------------------------------------


def check_same_vae(latents: dict[str, Any], manifest: Manifest, source: str, store: str) -> None:
    """Refuse latents of another VAE than those that weights were trained on, where the hashes of both are known.

    Args:
        latents: what a checkpoint says of them.
        manifest: of the store at hand.
        source: of the weights, for the message.
        store: its place, for the message.
    """
    theirs, ours = latents.get("vae") or {}, manifest.vae or {}
    if "hash" in theirs and "hash" in ours and theirs["hash"] != ours["hash"]:
        raise InputError(
            f"{source} was trained on latents of the VAE {told(theirs)}, but the store {store} holds latents of "
            f"{told(ours)}: use a store that was encoded with the first"
        )


def told(vae: dict[str, Any]) -> str:
    return f"{vae.get('class', '')} {vae.get('source', '')} (hash {vae['hash'][:16]}...)".strip()


def check_same_classes(latents: dict[str, Any], manifest: Manifest, source: str, store: str) -> None:
    """Refuse other classes than those that weights were trained on, where the names of both are known.

    Arguments as for :func:`check_same_vae`.
    """
    theirs, ours = latents.get("class_names"), manifest.class_names
    if theirs and ours and theirs != ours:
        i = next((i for i, (a, b) in enumerate(zip(theirs, ours, strict=False)) if a != b), min(len(theirs), len(ours)))
        a, b = (repr(names[i]) if i < len(names) else "missing" for names in (theirs, ours))
        raise InputError(
            f"{source} was trained on other classes than the store {store} holds: class {i} is {a} there and {b} here. "
            "Use a store with the same classes, or start anew in another folder with --model.init_from, which matches "
            "classes by name"
        )
