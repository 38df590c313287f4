"""What a checkpoint says, whatever its format."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from inspect import signature
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ditlit.diffusion import GaussianDiffusion, Process
from ditlit.errors import InputError
from ditlit.models import VARIANTS, DiT

Which = Literal["ema", "raw", "unknown"]


@dataclass
class CheckpointContents:
    """Weights under our names and all that is needed to use them.

    Args:
        state: the denoiser's weights, in the precision in which they are stored.
        denoiser: its class path and constructor keywords.
        process: those of its diffusion process.
        latents: ``shift`` and ``scale`` of each channel and, where known, what a store's manifest says of its latents:
            ``kind``, ``image_size``, ``preprocessing``, ``vae`` and ``class_names``.
        step: number of optimizer steps taken; 0 where unknown.
        weights: the moving average, the weights that the optimizer held, or unknown.
        format: of the source, in words.
    """

    state: dict[str, Tensor]
    denoiser: dict[str, Any]
    process: dict[str, Any]
    latents: dict[str, Any]
    step: int
    weights: Which
    format: str

    @property
    def config(self) -> dict[str, Any]:
        """The denoiser's constructor keywords."""
        return self.denoiser["init_args"]

    @property
    def grid_size(self) -> tuple[int, int]:
        """Height and width of the latents."""
        size = self.config["input_size"]
        return (size, size) if isinstance(size, int) else tuple(size)

    def about(self) -> dict[str, Any]:
        """All but the weights, as plain data for a file's metadata."""
        names = ("denoiser", "process", "latents", "step", "weights")
        return {name: getattr(self, name) for name in names}


def describe(instance: Any) -> dict[str, Any]:
    """Class path and constructor keywords of a denoiser or process, as in a configuration file.

    Raises:
        InputError: where a class does not keep its keywords as ``config``.
    """
    cls = class_of(instance)
    if not isinstance(getattr(instance, "config", None), dict):
        raise InputError(
            f"{cls.__qualname__} needs an attribute config, the dict of keywords that its class is built with, by "
            "which checkpoints describe it"
        )
    untold = [
        name
        for name, parameter in signature(cls).parameters.items()
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY) and name not in instance.config
    ]
    if untold:
        raise InputError(
            f"{cls.__qualname__} takes {', '.join(untold)}, which its config does not hold: what is rebuilt from a "
            "checkpoint would not be the same"
        )
    return {"class_path": f"{cls.__module__}.{cls.__qualname__}", "init_args": instance.config}


def class_of(instance: Any) -> type:
    """The class as it was written: of a default argument jsonargparse makes an instance of a subclass of its own, of a
    sharded module torch does."""
    return next(
        cls
        for cls in type(instance).__mro__
        if not cls.__module__.startswith(("jsonargparse", "torch.distributed"))
        and not cls.__name__.startswith("LazyInstance_")
    )


def build(description: dict[str, Any], trust: str | Sequence[str] | None = None) -> Any:
    """The inverse of :func:`describe`, for classes of this package: a checkpoint must not choose what code to run.

    Args:
        description: class path and constructor keywords.
        trust: packages, modules or classes whose classes may be built too, separated by commas or as a list.

    Raises:
        InputError: for any other class, and where a trusted one cannot be had or refuses its keywords.
    """
    path = description["class_path"]
    module, _, name = path.rpartition(".")
    trusted = [word.strip() for word in trust.split(",")] if isinstance(trust, str) else list(trust or ())
    if not any(path == word or path.startswith(f"{word}.") for word in ("ditlit", *trusted)):
        package = module.split(".")[0]
        raise InputError(
            f"the checkpoint names {path}, which is no class of ditlit; where it is your own code, or code that you "
            f"trust, say so with --trust {package} (in Python: trust={package!r})"
        )
    try:
        cls = getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise InputError(
            f"the checkpoint names {path}, which cannot be imported ({error}); install its package, or set PYTHONPATH "
            "to the folder that holds it"
        ) from error
    try:
        return cls(**description["init_args"])
    except TypeError as error:  # a keyword that it no longer takes
        raise InputError(f"{path} does not take the keywords that the checkpoint has for it: {error}") from error


def skeleton(denoiser: dict[str, Any], trust: str | Sequence[str] | None = None) -> nn.Module:
    """The described denoiser without memory for its weights."""
    with torch.device("meta"):
        return build(denoiser, trust)


def check(contents: CheckpointContents, where: Any, trust: str | Sequence[str] | None = None) -> None:
    """Check that the weights are those of the denoiser that contents describe.

    Raises:
        InputError: names the first key that is missing, foreign, or of another shape, with both shapes.
    """
    check_shapes(contents.state, skeleton(contents.denoiser, trust).state_dict(), where)


def check_shapes(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], where: Any) -> None:
    """See :func:`check`."""
    for key, value in expected.items():
        shape = tuple(value.shape)
        if key not in found:
            raise InputError(f"{where} has no {key!r}, which this model holds with shape {shape}")
        if tuple(found[key].shape) != shape:
            raise InputError(f"{where} has {key!r} with shape {tuple(found[key].shape)}, this model needs {shape}")
    for key, value in found.items():
        if key not in expected:
            raise InputError(f"{where} has {key!r} with shape {tuple(value.shape)}, which this model does not hold")


def as_dit(contents: CheckpointContents, format: str, process: type[Process] = GaussianDiffusion) -> DiT:
    """The denoiser without memory for its weights, where it is a DiT that another project's format can hold.

    Raises:
        InputError: for another denoiser, process or conditioning.
    """
    for what, cls in ((contents.denoiser, DiT), (contents.process, process)):
        if what["class_path"] != f"{cls.__module__}.{cls.__qualname__}":
            raise InputError(f"{format} holds a {cls.__name__} only, not a {what['class_path']}")
    denoiser = skeleton(contents.denoiser)
    if denoiser.conditioning != "adaln_zero":
        raise InputError(
            f"{format} knows adaLN-Zero only, and this DiT's conditioning is {denoiser.conditioning}; "
            "write safetensors or a ckpt"
        )
    return denoiser


def variant_name(config: dict[str, Any]) -> str:
    """The paper's name for a denoiser's sizes, or the sizes; and its conditioning, unless that is adaLN-Zero."""
    names = ("depth", "hidden_size", "num_heads", "patch_size")
    told = [f"{name} {config[name]}" for name in names if name in config]
    for name, sizes in VARIANTS.items():
        if all(config.get(key) == value for key, value in sizes.items()):
            told = [name]
    design = config.get("conditioning", "adaln_zero")
    return ", ".join(told + ([f"conditioning {design}"] if design != "adaln_zero" else []))


@functools.cache
def announce(line: str) -> None:
    """Say something once, however often a file is read."""
    print(line, flush=True)
