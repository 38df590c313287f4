"""A GPU that is not there: on any machine, code meets a device ``cuda:0`` that refuses what CUDA refuses.

Inside :func:`pretended_gpu` every tensor lies in the memory of the CPU, and CPU kernels compute it. A tensor is on the
GPU where its storage bears a mark. So views, gradients, ``parameter.data = ...`` and optimizers need no care, and
modules keep their parameters. Three things make the pretence:

- a function mode, :class:`Answers`: what Python asks of a tensor (``.device``), and what brings tensors to a device or
  makes them there (``.to("cuda")``, ``device="cuda"``), is answered by the mark and sets it;
- a dispatch mode, :class:`Refuses`: every operator below, those of backward passes and optimizers too, must find its
  tensors on one device. As with CUDA, pointwise operators take a CPU scalar (a tensor without dimensions) along,
  indices may stay on the CPU, and ``copy_`` crosses. What an operator makes lies where its inputs do;
- patches of ``torch.cuda`` (one H100, events and counters that say little), of ``torch.Generator``, which belongs to a
  device too, and of ``torch.autocast``, which rounds as on the CPU.

What it does not show: kernels, speed, streams that forget to wait, memory. Threads other than the first see plain CPU
tensors.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

NAME = "NVIDIA H100 80GB HBM3"
GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
MARK = "on_the_pretended_gpu"

# Beside pointwise ones: operators that take CPU scalars along.
TAKE_SCALARS = ("masked_fill", "fill_", "index_put", "_index_put_impl", "_foreach_", "_fused_adam", "_amp_")
TAKE_INDICES = ("index.", "index_put", "_index_put_impl", "_unsafe_index")
CROSS = ("copy_.", "_foreach_copy_.", "_has_compatible_shallow_copy_type.")


def on_gpu(tensor: Tensor) -> bool:
    with torch._C.DisableTorchFunction():
        return tensor.device.type != "meta" and getattr(tensor.untyped_storage(), MARK, False)


def put(result: Any, gpu: bool) -> Any:
    """Mark the tensors of a result as on the GPU, or not."""
    for tensor in tensors_of(result):
        with torch._C.DisableTorchFunction():
            setattr(tensor.untyped_storage(), MARK, gpu)
    return result


def tensors_of(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def device_of(tensor: Tensor) -> torch.device:
    with torch._C.DisableTorchFunction():
        return GPU if on_gpu(tensor) else tensor.device


class Refuses(TorchDispatchMode):
    """Refuses operators on tensors of both devices; what they make lies where their inputs do."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = tensors_of((args, kwargs))
        marks = [on_gpu(tensor) for tensor in tensors]
        name = func.name().removeprefix("aten::") + ("" if "." in func.name() else ".")
        if True not in marks or name.startswith(CROSS):
            return func(*args, **kwargs)
        if False in marks:
            self.check(func, name, args, kwargs)
        return put(func(*args, **kwargs), True)

    def check(self, func, name, args, kwargs) -> None:
        takes_scalars = torch.Tag.pointwise in func.tags or name.startswith(TAKE_SCALARS)
        for i, argument in enumerate(func._schema.arguments):
            value = args[i] if i < len(args) else kwargs.get(argument.name)
            written = argument.alias_info is not None and argument.alias_info.is_write
            for tensor in tensors_of(value):
                if on_gpu(tensor) or tensor.device.type == "meta":
                    continue
                if takes_scalars and tensor.ndim == 0 and not written:
                    continue
                if name.startswith(TAKE_INDICES) and argument.name == "indices":
                    continue
                raise RuntimeError(
                    f"Expected all tensors to be on the same device, but {name.rstrip('.')} found at least two "
                    f"devices, cuda:0 and cpu: its argument {argument.name} {tuple(tensor.shape)} is on the CPU"
                )


class Answers(TorchFunctionMode):
    """Answers for the device of tensors, and makes and moves them as they are marked."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False  # which takes a driver
        if func in ASKED:
            return ASKED[func](device_of(args[0]))
        if func in MOVES:
            return moved(args[0], **MOVES[func](func, args, kwargs))
        if func in NEED_CPU and on_gpu(args[0]):
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")
        device = kwargs.get("device")
        if device is None and func in LIKE_FIRST and isinstance(args[0], Tensor):
            device = device_of(args[0])
        elif device is None:
            device = next((device_of(each) for each in tensors_of(args)), CPU)
            check_generator(func, kwargs.get("generator"), device)
            return func(*args, **kwargs)
        device = as_device(device)
        check_generator(func, kwargs.get("generator"), device)
        if device.type == "meta":
            return func(*args, **kwargs)
        result = func(*args, **(kwargs | ({"device": CPU} if "device" in kwargs else {})))
        if not isinstance(result, Tensor):
            return result
        if result.untyped_storage()._cdata in {each.untyped_storage()._cdata for each in tensors_of(args)}:
            return moved(result, device=device)  # as_tensor of a tensor
        return put(result, device == GPU)


def moved(tensor: Tensor, device: torch.device | None = None, copy: bool = False, **rest: Any) -> Tensor:
    """``tensor.to``."""
    if device is None or as_device(device) == device_of(tensor):
        return tensor.to(copy=copy, **rest) if rest or copy else tensor
    device = as_device(device)
    if "meta" in (device.type, tensor.device.type):
        return tensor.to(device=device, **rest)
    return put(tensor.to(**({"dtype": tensor.dtype} | rest), copy=True), device == GPU)


def arguments_of_to(func, args, kwargs) -> dict[str, Any]:
    copy = kwargs.pop("copy", False)
    other = kwargs.pop("other", args[1] if len(args) > 1 else None)
    if isinstance(other, Tensor):
        return {"device": device_of(other), "dtype": other.dtype, "copy": copy}
    if isinstance(kwargs.get("device"), int):
        kwargs["device"] = as_device(kwargs["device"])
    device, dtype, _, memory_format = torch._C._nn._parse_to(*args[1:], **kwargs)
    found = {"device": device, "dtype": dtype, "memory_format": memory_format, "copy": copy}
    return {name: value for name, value in found.items() if value is not None}


def as_device(device: Any) -> torch.device:
    device = GPU if isinstance(device, int) else torch.device(device)
    return GPU if device.type == "cuda" else device


def check_generator(func, generator: Any, device: torch.device) -> None:
    if generator is not None and device.type != "meta" and generator.device.type != device.type:
        raise RuntimeError(
            f"Expected a '{device.type}' device type for generator but found '{generator.device.type}' "
            f"({getattr(func, '__name__', func)})"
        )


ASKED = {
    Tensor.device.__get__: lambda device: device,
    Tensor.is_cuda.__get__: lambda device: device.type == "cuda",
    Tensor.is_cpu.__get__: lambda device: device.type == "cpu",
    Tensor.get_device: lambda device: 0 if device == GPU else -1,
}
MOVES = {
    Tensor.to: arguments_of_to,
    Tensor.cuda: lambda func, args, kwargs: {"device": GPU},
    Tensor.cpu: lambda func, args, kwargs: {"device": CPU},
}
NEED_CPU = (Tensor.numpy, Tensor.__array__)
LIKE_FIRST = (Tensor.new_tensor, Tensor.__deepcopy__, torch.tensor)  # torch makes these without an operator


class Generator(torch.Generator):
    """A generator that knows its device."""

    def __new__(cls, device: Any = "cpu"):
        generator = super().__new__(cls)
        generator._device = as_device(device)
        return generator

    @property
    def device(self) -> torch.device:
        return self._device


class Event:
    """A moment; the work of a CPU is always done."""

    def __init__(self, enable_timing: bool = False):
        self.time = 0.0

    def record(self, stream: Any = None) -> None:
        self.time = time.perf_counter()

    def elapsed_time(self, end: "Event") -> float:
        return 1000 * (end.time - self.time)

    def query(self) -> bool:
        return True

    def synchronize(self) -> None: ...


class Autocast(torch.autocast):
    def __init__(self, device_type: str, *args: Any, **kwargs: Any):
        super().__init__("cpu" if device_type == "cuda" else device_type, *args, **kwargs)


def always(value: Any = None):
    return lambda *args, **kwargs: value


PROPERTIES = SimpleNamespace(name=NAME, total_memory=80 * 2**30, major=9, minor=0, multi_processor_count=132)
CUDA = dict(
    is_available=always(True), is_initialized=always(False), is_bf16_supported=always(True), device_count=always(1),
    current_device=always(0), set_device=always(), get_device_name=always(NAME),
    get_device_capability=always((9, 0)), get_device_properties=always(PROPERTIES), synchronize=always(),
    current_stream=always(SimpleNamespace(synchronize=always())), empty_cache=always(), memory_allocated=always(0),
    max_memory_allocated=always(2**20), max_memory_reserved=always(2**20), reset_peak_memory_stats=always(),
    memory_stats=always({}), mem_get_info=always((2**36, 2**36)), manual_seed=always(), manual_seed_all=always(),
    get_rng_state_all=always([]), set_rng_state_all=always(), is_current_stream_capturing=always(False), Event=Event,
)  # fmt: skip
# torch's own generic question finds none: nothing is pinned, and optimizers do not look for streams.
ACCELERATOR = dict(is_available=always(False), current_accelerator=always())


@contextmanager
def pretended_gpu() -> Iterator[None]:
    """Inside, there is one GPU; see above."""
    with (
        patch.multiple(torch.cuda, **CUDA),
        patch.multiple(torch.accelerator, **ACCELERATOR),
        patch.multiple(torch, Generator=Generator, autocast=Autocast),
        patch.object(torch.amp, "autocast", Autocast),
        Answers(),
        Refuses(),
    ):
        yield
