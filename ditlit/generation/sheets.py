"""Sheets to look at: one class a row, and along it the guidance scale, the noise, or the way to another class."""

import itertools
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from ditlit.diffusion.noise import normal, sample_generators
from ditlit.errors import InputError
from ditlit.generation.pipeline import SamplingPipeline
from ditlit.pictures import grid_of, with_header


def guidance_sheet(
    pipeline: SamplingPipeline, classes: Sequence[int], scales: Sequence[float], batch_size: int
) -> Tensor:
    """A row for each class, a column for each guidance scale; the noise stays the same along a row."""
    columns = []
    for scale in scales:
        sampling = replace(pipeline.sampling, guidance_scale=scale)
        columns.append(cells(pipeline, torch.tensor(classes), list(range(len(classes))), batch_size, sampling=sampling))
    images = torch.stack(columns, 1).flatten(0, 1)  # (rows * columns, C, H, W)
    return with_header(grid_of(images, len(scales)), [f"guidance {scale:g}" for scale in scales])


def noise_sheet(pipeline: SamplingPipeline, classes: Sequence[int], columns: int, batch_size: int) -> Tensor:
    """A row for each class, from the noise of one sample to that of another along the great circle between them."""
    rows = len(classes)
    a, b = normal(pipeline.shape, sample_generators(pipeline.seed, range(2 * rows))).chunk(2)
    positions = torch.linspace(0, 1, columns)
    noise = torch.stack([slerp(a, b, p) for p in positions.tolist()], 1).flatten(0, 1)
    y = torch.tensor(classes).repeat_interleave(columns)
    # The same number along a row, so that samplers which draw noise in every step draw the same.
    indices = [row for row in range(rows) for _ in range(columns)]
    images = cells(pipeline, y, indices, batch_size, noise)
    return with_header(grid_of(images, columns), [f"{p:.2f}" for p in positions.tolist()])


def class_sheet(pipeline: SamplingPipeline, classes: Sequence[int], columns: int, batch_size: int) -> Tensor:
    """A row for each two neighbouring classes, along the straight line between their embeddings.

    Raises:
        InputError: for fewer than two classes, or a denoiser without a table of them.
    """
    if not isinstance(getattr(pipeline.denoiser, "label_embed", None), nn.Embedding):
        raise InputError("a sheet between classes needs a denoiser with an embedding of labels, label_embed")
    if len(classes) < 2:
        raise InputError("a sheet between classes needs at least two of them; give more with --classes")
    positions = torch.linspace(0, 1, columns)
    table = pipeline.denoiser.label_embed.weight  # (K + 1, D)
    pairs = list(itertools.pairwise(classes))
    between = torch.stack([torch.lerp(table[a], table[b], p) for a, b in pairs for p in positions.tolist()])
    y = len(table) + torch.arange(len(between))  # new labels after the null class
    indices = [row for row in range(len(pairs)) for _ in range(columns)]
    whole = pipeline.denoiser.label_embed
    pipeline.denoiser.label_embed = nn.Embedding.from_pretrained(torch.cat([table.detach(), between]))
    try:
        images = cells(pipeline, y, indices, batch_size)
    finally:
        pipeline.denoiser.label_embed = whole
    return with_header(grid_of(images, columns), [f"{p:.2f}" for p in positions.tolist()])


def cells(
    pipeline: SamplingPipeline,
    y: Tensor,
    indices: Sequence[int],
    batch_size: int,
    noise: Tensor | None = None,
    sampling=None,
) -> Tensor:
    """Bytes (n, C, H, W) for labels y (n,), drawn batch by batch."""
    images = []
    for start in range(0, len(y), batch_size):
        part = slice(start, start + batch_size)
        some = None if noise is None else noise[part].to(pipeline.device)
        latents = pipeline.draw(indices[part], y[part], sampling, noise=some)
        images.append(pipeline.images(latents, indices[part]))
    return torch.cat(images)


def slerp(a: Tensor, b: Tensor, p: float) -> Tensor:
    """From a (N, ...) at p = 0 to b at p = 1 on the great circle, which keeps the length that noise has."""
    angle = torch.acos(nn.functional.cosine_similarity(a.flatten(1), b.flatten(1)))
    angle = angle.reshape(-1, *[1] * (a.ndim - 1))
    return (torch.sin((1 - p) * angle) * a + torch.sin(p * angle) * b) / torch.sin(angle)
