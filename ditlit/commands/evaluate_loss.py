"""``ditlit evaluate loss``: is my loss normal?"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from ditlit import __version__, checkpoints
from ditlit.analysis.opening import other_weights
from ditlit.checkpoints import Loaded, describe
from ditlit.checkpoints.contents import class_of
from ditlit.commands.processes import launch
from ditlit.data.classes import ClassSet, match_classes
from ditlit.data.collection import StoreCollection
from ditlit.data.folders import SHOWN, check_output, write_atomically, writing
from ditlit.data.store import LatentStore, per_channel
from ditlit.diffusion.noise import normal, sample_generators
from ditlit.errors import InputError
from ditlit.evaluation.losses import AverageDistance, Latents, Losses, by_timestep, findings, reference_for
from ditlit.evaluation.sources import spread
from ditlit.images.vae import weights_hash
from ditlit.settings import Execution
from ditlit.settings.evaluate import LossSettings

GOLDEN_RATIO = 0.6180339887498949


def evaluate_loss(settings: LossSettings) -> None:
    """See :class:`LossSettings`."""
    ckpt, store, out, seed = settings.ckpt, settings.store, settings.out, settings.seed
    reading = asdict(settings.reading)
    if out is not None:
        check_output(Path(out), "--out")
    loaded = checkpoints.load(ckpt, **reading)
    latents = StoreCollection([LatentStore(store)])
    num_classes = loaded.denoiser.num_classes
    built_for = (loaded.denoiser.in_channels, *loaded.denoiser.input_size)
    if latents.manifest.shape != built_for:
        raise InputError(f"{store} holds latents of shape {latents.manifest.shape}, {ckpt} is built for {built_for}")
    names = loaded.latents.get("class_names")
    numbers = match_classes(
        latents.class_set, ClassSet(num_classes, names, ckpt), "--store_classes", settings.store_classes
    )
    latents.number_anew(numbers, num_classes, names)
    device = launch(Execution(settings.accelerator, "1"))[0].device
    raw = other_weights(ckpt, loaded, **reading)
    average = None if raw is None else compare_weights(loaded, raw)
    rows = spread(latents.rows, settings.num_samples).repeat(settings.draws)
    losses, known = compute(loaded, raw, latents, rows, settings.batch_size, seed, device)
    reference = reference_for(describe(loaded.denoiser), describe(loaded.process))
    edges = np.linspace(0, loaded.process.duration, settings.bins + 1)
    print(curve(losses, edges, reference))
    found = findings(losses, known, average, reference, loaded.step)
    print("\n".join(["", "What is off:", *(f"- {text}" for text in found)]) if found else "\nNothing is off.")
    if losses.wrong is None:
        print("Whether labels matter cannot be told: the model knows one class.")
    if out is not None:
        content = json.dumps(record(loaded, losses, edges, found, store, seed), indent=1).encode()
        with writing(Path(out), SHOWN):
            write_atomically(Path(out), content)


def compare_weights(loaded: Loaded, raw: Loaded) -> AverageDistance:
    ours, theirs = dict(loaded.denoiser.named_parameters()), dict(raw.denoiser.named_parameters())
    fresh = class_of(loaded.denoiser)(**loaded.denoiser.config)
    zero = [name for name, p in fresh.named_parameters() if p.requires_grad and not p.any()]
    names = [name for name, p in ours.items() if p.requires_grad]
    learned = norm(theirs[name] for name in zero)
    return AverageDistance(
        loaded.step,
        norm(ours[name] - theirs[name] for name in names) / norm(theirs[name] for name in names),
        norm(ours[name] for name in zero) / learned if learned else None,
    )


def norm(tensors: Any) -> float:
    return float(sum(tensor.detach().double().square().sum() for tensor in tensors) ** 0.5)


@torch.inference_mode()
def compute(
    loaded: Loaded,
    raw: Loaded | None,
    store: StoreCollection | LatentStore,
    rows: Tensor,
    batch_size: int,
    seed: int,
    device: torch.device,
) -> tuple[Losses, Latents]:
    """Errors for the samples at ``rows`` (n,), and what is known of their latents."""
    process, denoiser = loaded.process, loaded.denoiser.to(device)
    other: nn.Module | None = None if raw is None else raw.denoiser.to(device)
    shift, scale = (per_channel(loaded.latents[k], denoiser.in_channels).to(device) for k in ("shift", "scale"))
    # Timesteps follow the golden-ratio sequence, which spreads any number of them evenly.
    t = process.timesteps_at(torch.arange(len(rows), dtype=torch.float64) * GOLDEN_RATIO % 1)
    wrong = wrong_labels(store.labels[rows], seed, denoiser.num_classes)
    kept: dict[str, list[Tensor]] = {"right": [], "null": [], "wrong": [], "raw": []}
    sums = torch.zeros(4, dtype=torch.float64)  # of the raw latents and x0, and of their squares
    for numbers in tqdm(torch.arange(len(rows)).split(batch_size), "loss", unit=" batches"):
        generators = sample_generators(seed, numbers.tolist())
        shape = (denoiser.in_channels, *denoiser.input_size)
        noise, draw = (normal(shape, generators).to(device) for _ in range(2))
        batch = store.gather(rows[numbers])
        values = batch[store.manifest.kind].to(device).float()
        if store.manifest.kind == "moments":
            mean, std = values.chunk(2, dim=1)
            values = mean + std * draw
        x0 = (values - shift) * scale  # (N, C, H, W)
        parts = [values.mean(), x0.mean(), values.square().mean(), x0.square().mean()]
        sums += torch.stack(parts).double().cpu() * len(numbers)
        given = {"right": batch["labels"]} | ({} if wrong is None else {"wrong": wrong[numbers]})
        given["null"] = torch.full_like(batch["labels"], denoiser.num_classes)
        for name, y in given.items():
            kept[name].append(process.loss(denoiser, x0, y.to(device), t=t[numbers].to(device), noise=noise)["mse"])
        if other is not None:
            y = batch["labels"].to(device)
            kept["raw"].append(process.loss(other, x0, y, t=t[numbers].to(device), noise=noise)["mse"])
    first, second = (sums / len(rows)).chunk(2)
    raw_std, std = (second - first**2).clamp(min=0).sqrt().tolist()
    arrays = {name: torch.cat(parts).double().cpu().numpy() for name, parts in kept.items() if parts}
    names = ("shift", "scale")
    trained_on, stored = (
        {name: per_channel(about[name], denoiser.in_channels).flatten().tolist() for name in names}
        for about in (loaded.latents, vars(store.manifest))
    )
    return Losses(t.numpy(), **arrays, untrained=process.untrained_mse), Latents(std, raw_std, trained_on, stored)


def wrong_labels(labels: Tensor, seed: int, num_classes: int) -> Tensor | None:
    """Another class for each of labels (n,), drawn from those that occur, or from all ``num_classes`` if only one does.

    None where there is no other class.
    """
    classes = labels.unique()
    if len(classes) < 2:
        classes = torch.arange(num_classes)
    if len(classes) < 2:
        return None
    generator = torch.Generator().manual_seed(seed)
    place = torch.searchsorted(classes, labels)
    step = torch.randint(1, len(classes), labels.shape, generator=generator)
    return classes[(place + step) % len(classes)]


def curve(losses: Losses, edges: np.ndarray, reference: dict[str, Any] | None) -> str:
    means, errors = by_timestep(losses.t, losses.right, edges)
    null, _ = by_timestep(losses.t, losses.null, edges)
    lines = ["timesteps        error   +-       null label" + ("   recipe" if reference else "")]
    known = None
    if reference:
        centers, theirs = (np.array(reference["edges"][:-1]) + reference["edges"][1:]) / 2, reference["mse"]
        known = np.interp((edges[:-1] + edges[1:]) / 2, centers, theirs)
    digits = 0 if edges[-1] > 1 else 2
    for i, (mean, error) in enumerate(zip(means, errors, strict=True)):
        line = f"{edges[i]:5.{digits}f} to {edges[i + 1]:5.{digits}f}  {mean:.4f}  {error:.4f}   {null[i]:.4f}"
        lines.append(line + ("" if known is None else f"       {known[i]:.4f}"))
    lines.append(f"all             {losses.right.mean():.4f}           {losses.null.mean():.4f}")
    if losses.raw is not None:
        lines.append(f"raw weights     {losses.raw.mean():.4f}")
    if reference:
        lines.append(f"recipe: {reference['recipe']} after {reference['step']:,} steps")
    return "\n".join(lines)


def record(
    loaded: Loaded, losses: Losses, edges: np.ndarray, found: list[str], store: str, seed: int
) -> dict[str, Any]:
    """The curve with what it depends on; with a recipe's name it is a reference curve."""
    means, errors = by_timestep(losses.t, losses.right, edges)
    return {
        "step": loaded.step,
        "denoiser": describe(loaded.denoiser),
        "process": describe(loaded.process),
        "checkpoint": weights_hash(loaded.denoiser),
        "weights": loaded.weights,
        "store": store,
        "seed": seed,
        "edges": edges.tolist(),
        "mse": means.tolist(),
        "standard error": errors.tolist(),
        "null label": by_timestep(losses.t, losses.null, edges)[0].tolist(),
        "what is off": found,
        "versions": {"ditlit": __version__, "torch": torch.__version__},
    }
