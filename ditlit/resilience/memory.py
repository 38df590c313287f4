"""What to do where a device's memory does not suffice in training."""

import traceback
from collections.abc import Iterable

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.memory import is_oom_error
from torch import Tensor

from ditlit.errors import counted
from ditlit.models import DiT
from ditlit.parallel.shards import is_sharded, local

# Where memory can run out beside the steps: the function that is at work there, and what to lower.
BESIDE = {
    "validation_step": "while validating: lower --data.val_batch_size",
    "draw_images": "while drawing samples: lower batch_size of the callback that draws",
}


def ran_out(error: BaseException) -> bool:
    """Whether an error says that a device's memory did not suffice."""
    return isinstance(error, torch.OutOfMemoryError) or (isinstance(error, RuntimeError) and is_oom_error(error))


def num_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def out_of_memory(trainer: Trainer, module: LightningModule, error: BaseException) -> str:
    """What was tried when memory ran out in training, and what each setting that saves some would make of it."""
    denoiser, device = module.denoiser, module.device
    at_work = {frame.name for frame in traceback.extract_tb(error.__traceback__)}
    for function, beside in BESIDE.items():
        if function in at_work:
            return f"the memory of {name_of(device)} does not suffice {beside}"
    samples = getattr(trainer.datamodule, "global_batch_size", None)
    ranks, accumulated = trainer.world_size, trainer.accumulate_grad_batches
    at_once = None if samples is None else samples // (ranks * accumulated)
    tried = "a batch" if at_once is None else counted(at_once, "sample")
    if samples is not None:
        tried += f" at once (global_batch_size {samples:,} over {counted(ranks, 'device')}"
        tried += f" and {accumulated} accumulated batches)" if accumulated > 1 else ")"
    states = bytes_of_states(trainer, module)
    lines = [
        f"the memory of {name_of(device)} does not suffice for a step of {tried} in precision {trainer.precision}. "
        f"Weights, gradients, optimizer and moving average take {gigabytes(states)} of it; the rest are activations. "
        "What would help:"
    ]
    if at_once is not None and at_once > 1:
        lines.append(
            f"--trainer.accumulate_grad_batches {2 * accumulated}: {counted(at_once // 2, 'sample')} at once, and half "
            "the activations, for the same result"
        )
    if isinstance(denoiser, DiT) and len(denoiser.recomputed) < len(denoiser.blocks) and at_once is not None:
        tokens, width = denoiser.grid[0] * denoiser.grid[1], denoiser.config["hidden_size"]
        kept = 4 * len(denoiser.blocks) * at_once * tokens * width
        lines.append(
            f"--model.denoiser.gradient_checkpointing true: activations of one block, and {gigabytes(kept)} of those "
            "between blocks, for about a third more work"
        )
    if ranks > 1 and not is_sharded(denoiser):
        lines.append(f"--trainer.strategy fsdp2: {gigabytes(states // ranks)} of the states on each device")
    lines.append("ditlit benchmark with the same settings and --find_batch_size true finds the most samples that fit")
    return "\n  ".join(lines)


def bytes_of_states(trainer: Trainer, module: LightningModule) -> int:
    """What this device keeps between steps, once all of it is there."""
    weights = [local(p) for p in module.denoiser.parameters()]
    trained = [local(p) for p in module.denoiser.parameters() if p.requires_grad]
    numbers = sum(p.numel() for p in trained)
    adam = any(isinstance(optimizer, torch.optim.Adam) for optimizer in trainer.optimizers)  # AdamW is one too
    average = 0 if module.ema is None else 4 * numbers
    return num_bytes(weights) + num_bytes(trained) * (3 if adam else 1) + average


def name_of(device: torch.device) -> str:
    if device.type != "cuda":
        return f"this machine ({device.type})"
    properties = torch.cuda.get_device_properties(device)
    return f"{properties.name} ({gigabytes(properties.total_memory)})"


def gigabytes(number: int) -> str:
    return f"{number / 1e9:,.1f} GB" if number >= 1e8 else f"{number / 1e6:,.1f} MB"
