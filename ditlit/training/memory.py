"""What training takes of a device's memory, and what to do where that does not suffice."""

import gc
import itertools
import traceback
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.memory import is_oom_error
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from ditlit.checkpoints.contents import variant_name
from ditlit.errors import counted
from ditlit.models import DiT
from ditlit.models.dit import recomputed
from ditlit.training.devices import is_sharded, local

ROOM = 0.95  # of the free memory that a plan may fill
STEP = {"training_step", "backward", "optimizer_step"}  # functions of which one is at work in a training step
# Of what runs out beside the steps: a function at work, and what to lower.
BESIDE = {
    "validation_step": "while validating: lower --data.val_batch_size",
    "draw_images": "while drawing samples: lower batch_size of the callback that draws",
}


def ran_out(error: BaseException) -> bool:
    """Whether an error says that a device's memory did not suffice."""
    return isinstance(error, torch.OutOfMemoryError) or (isinstance(error, RuntimeError) and is_oom_error(error))


def free() -> None:
    """Give back what is no longer in use."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def num_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@dataclass(frozen=True)
class States:
    """Bytes of what a run keeps between its steps on a device."""

    weights: int
    gradients: int
    optimizer: int
    average: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.average


def states_of(module: LightningModule, optimizer: torch.optim.Optimizer) -> States:
    """Of the weights, of all their gradients, of the optimizer's state and of the float32 average.

    Before the first step the optimizer has no state yet: it will be as large as that of a small matrix, in proportion.
    """
    parameters = [local(p) for p in module.denoiser.parameters()]
    trained = [local(p) for p in trained_of(module)]
    state = num_bytes(kept_by(optimizer))
    if state == 0:
        matrix = nn.Parameter(torch.zeros(64, 64))
        matrix.grad = torch.zeros_like(matrix)
        trial = module.optimizer([matrix])
        trial.step()
        state = num_bytes(kept_by(trial)) * num_bytes(trained) // num_bytes([matrix])
    average = 0 if module.ema is None else 4 * sum(p.numel() for p in trained)
    return States(num_bytes(parameters), num_bytes(trained), state, average)


def trained_of(module: LightningModule) -> list[nn.Parameter]:
    return [p for p in module.denoiser.parameters() if p.requires_grad]


def kept_by(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    kept = itertools.chain.from_iterable(state.values() for state in optimizer.state.values())
    return [local(value) for value in kept if isinstance(value, Tensor)]


@dataclass(frozen=True)
class Activations:
    """Bytes that a step keeps for its backward pass: some whatever the batch, and some for each sample."""

    fixed: int
    of_sample: int

    def of(self, n: int) -> int:
        return self.fixed + n * self.of_sample


def activations_of(trainer: Trainer, module: LightningModule) -> Activations:
    """Of a module as it is, not compiled: from the loss of one sample and of two, on the module's device."""
    one, two = (saved_bytes(trainer, module, n) for n in (1, 2))
    return Activations(2 * one - two, two - one)


def saved_bytes(trainer: Trainer, module: LightningModule, n: int) -> int:
    """Bytes that autograd keeps of a loss of n samples, beside the weights."""
    sizes: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    x0 = torch.zeros(n, *module.latent_shape, device=module.device)
    y = torch.zeros(n, dtype=torch.long, device=module.device)
    with (
        torch.enable_grad(),
        torch.compiler.set_stance("force_eager"),
        trainer.precision_plugin.forward_context(),
        saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        terms = module.process.loss(module.denoiser, x0, y)  # held until all is counted, or memory is used again
    known = {tensor.untyped_storage().data_ptr() for tensor in (*module.parameters(), *module.buffers())}
    del terms
    return sum(size for pointer, size in sizes.items() if pointer not in known)


# Running out ---------------------------------------------------------------------------------------------------------


def place_of(error: BaseException) -> str | None:
    """What was lacking memory beside the training steps and what to do about it, or None where a step was."""
    at_work = {frame.name for frame in traceback.extract_tb(error.__traceback__)}
    if at_work & STEP:
        return None
    return next((place for function, place in BESIDE.items() if function in at_work), "outside of the training steps")


def out_of_memory(trainer: Trainer, module: LightningModule, place: str | None) -> str:
    """What was tried when memory ran out in ``fit``, and what each setting that saves some would make of it.

    To be called when the error is gone, since it holds what the step had made.

    Args:
        place: see :func:`place_of`.
    """
    free()
    device = trainer.strategy.root_device
    states = states_of(module, trainer.optimizers[0] if trainer.optimizers else module.optimizer(trained_of(module)))
    room = room_on(device)
    if place is not None:
        return f"the memory of {described(device, room)} does not suffice beside {described_states(states)}, {place}"
    plain = small = None
    try:
        plain, small = planned(trainer, module, device)
    except Exception as error:
        if not ran_out(error):
            raise
    ranks, parts = trainer.world_size, trainer.accumulate_grad_batches
    size = getattr(trainer.datamodule, "global_batch_size", None)
    share = None if size is None else size // ranks

    def needs(n: int, activations: Activations | None) -> str:
        return "" if activations is None else f", about {gigabytes(states.total + activations.of(n))}"

    def fits(n: int) -> bool:
        return plain is None or room is None or states.total + plain.of(n) <= ROOM * room

    tried = f"this model ({denoiser_name(module.denoiser)})"
    if share is not None:
        tried += f" with {counted(share // parts, 'sample')} at once (global_batch_size {size:,} over "
        tried += f"{counted(ranks, 'device')}" + (f" and {parts} accumulated batches)" if parts > 1 else ")")
    need = "" if share is None else needs(share // parts, plain)
    each = "" if plain is None else f" and {gigabytes(plain.of_sample)} for each sample"
    lines = [
        f"the memory of {described(device, room)} does not suffice for a step of {tried} in precision "
        f"{trainer.precision}{need}: {described_states(states)}{each}. What would help:"
    ]
    if share is not None:
        more = [n for n in range(2 * parts, share + 1, parts) if share % n == 0]
        enough = next((n for n in more if fits(share // n)), None)
        if enough is not None:
            lines.append(
                f"--trainer.accumulate_grad_batches {enough}: {counted(share // enough, 'sample')} at once"
                f"{needs(share // enough, plain)}, for the same result"
            )
        if small is not None:
            lines.append(
                f"--model.denoiser.use_checkpoint true: {counted(share // parts, 'sample')} at once"
                f"{needs(share // parts, small)}, for about a third more work"
            )
    if ranks > 1 and not is_sharded(module.denoiser):
        part = gigabytes(states.total // ranks)
        lines.append(f"--trainer.strategy fsdp2: {part} in place of {described_states(states)}")
    lines.append("ditlit benchmark with the same settings and --find_batch_size true tells the most samples that fit")
    return "\n  ".join(lines)


def planned(
    trainer: Trainer, module: LightningModule, device: torch.device
) -> tuple[Activations | None, Activations | None]:
    """Activations of a module as it is, and with blocks that are recomputed; None where they cannot be told."""
    denoiser = module.denoiser
    if is_sharded(denoiser):  # whose forward pass needs the other ranks
        return None, None
    module.to(device)  # from where Lightning has put it when it ended
    plain = activations_of(trainer, module)
    if not isinstance(denoiser, DiT) or len(denoiser.recomputed) == len(denoiser.blocks):
        return plain, None
    now, depth = denoiser.recomputed, len(denoiser.blocks)
    denoiser.recomputed = recomputed(True, depth)
    try:
        small = activations_of(trainer, module)
    finally:
        denoiser.recomputed = now
    # A block's are there again while its backward pass runs.
    of_block = max(plain.of_sample - small.of_sample, 0) // max(depth - len(now), 1)
    return plain, Activations(small.fixed, small.of_sample + of_block)


def room_on(device: torch.device) -> int | None:
    """Bytes that a GPU has for this process, the rest being others'; None where memory is not the device's own."""
    if device.type != "cuda":
        return None
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_allocated(device)


def described(device: torch.device, room: int | None) -> str:
    if room is None:
        return f"this machine ({device.type})"
    properties = torch.cuda.get_device_properties(device)
    return f"{properties.name} ({gigabytes(properties.total_memory)}, of which {gigabytes(room)} are free for this run)"


def described_states(states: States) -> str:
    return f"{gigabytes(states.total)} for weights, gradients, optimizer and moving average"


def denoiser_name(denoiser: nn.Module) -> str:
    return variant_name(denoiser.config) if isinstance(denoiser, DiT) else type(denoiser).__name__


def gigabytes(number: int) -> str:
    return f"{number / 1e9:,.1f} GB" if number >= 1e8 else f"{number / 1e6:,.1f} MB"
