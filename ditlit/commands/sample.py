"""``ditlit sample``: images from a checkpoint."""

import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from torch import Tensor

from ditlit import __version__, checkpoints
from ditlit.checkpoints import Loaded
from ditlit.commands.processes import Progress, ending_together, launch, share
from ditlit.data.classes import parse_classes
from ditlit.data.folders import check_writable
from ditlit.diffusion import Sampling
from ditlit.errors import counted
from ditlit.generation.classes import plan_labels
from ditlit.generation.folder import SampleFolder
from ditlit.generation.pipeline import SamplingPipeline
from ditlit.generation.sheets import class_sheet, guidance_sheet, noise_sheet
from ditlit.images.vae import Autoencoder, load_autoencoder, weights_hash
from ditlit.pictures import grid_of, save_animation, save_png
from ditlit.settings.sample import SampleSettings

DEFAULT_CLASSES = 10
ANIMATED = 16  # most images in the animation


@ending_together
def sample(settings: SampleSettings) -> None:
    """See :class:`SampleSettings`."""
    drawing, sampling = settings.drawing, settings.sampling
    loaded = checkpoints.load(settings.ckpt, drawing.weights, **asdict(settings.reading))
    sampling.check(loaded.process, loaded.denoiser.in_channels)
    classes = chosen_classes(settings, loaded)
    y = plan_labels(classes, settings.num_samples, settings.per_class, drawing.labels, drawing.seed)
    vae = load_autoencoder(loaded.latents.get("vae"), drawing.vae, loaded.denoiser.in_channels)
    if drawing.vae_tiling:
        vae.tile()
    on_gpu = settings.execution.accelerator != "cpu" and torch.cuda.is_available()
    precision = drawing.precision or ("tf32" if on_gpu else "32")

    folder = SampleFolder(settings.out, y, "latents" in settings.products)
    job = description(settings, loaded, classes, len(y), precision, vae)
    if settings.sheet is None:
        folder.check(job)
    check_writable(folder.path, "--out")
    fabric, _ = launch(settings.execution)
    first = fabric.global_rank == 0
    pipeline = SamplingPipeline(
        loaded.denoiser,
        loaded.process,
        loaded.latents,
        sampling,
        drawing.seed,
        fabric.device,
        precision,
        vae.to(fabric.device).decode,
        drawing.decode_batch_size,
        drawing.compile,
    )
    if first:
        print(in_words(loaded, sampling, precision, fabric.device))
    if settings.sheet is not None:
        if first:
            path = Path(settings.out) / f"sheet-{settings.sheet}.png"
            save_png(draw_sheet(pipeline, settings, classes), path)
            print(f"Look at {path}")
        return
    if first:
        folder.begin(job)
    fabric.barrier()
    folder.look()
    draw_missing(pipeline, folder, y, drawing.batch_size, settings.save_steps, fabric)
    fabric.barrier()
    if first:
        folder.finish(settings.per_class if settings.num_samples is None else 8, "npz" in settings.products)
        print(f"{counted(len(y), 'image')} in {folder.path / 'images'}\nLook at {folder.path / 'grid.png'}")


def chosen_classes(settings: SampleSettings, loaded: Loaded) -> list[int]:
    num_classes = loaded.denoiser.num_classes
    if settings.classes is not None:
        return parse_classes(settings.classes, num_classes, loaded.latents.get("class_names"))
    if settings.num_samples is not None:
        return list(range(num_classes))
    rows = min(DEFAULT_CLASSES, num_classes)
    return [i * num_classes // rows for i in range(rows)]


def description(
    settings: SampleSettings, loaded: Loaded, classes: list[int], num_samples: int, precision: str, vae: Autoencoder
) -> dict[str, Any]:
    """What the images depend on, for job.json: a job continues with the same only."""
    drawing = settings.drawing
    return {
        "checkpoint": weights_hash(loaded.denoiser),
        "weights": loaded.weights,
        "step": loaded.step,
        # What came later is left out at its default, so that jobs from before go on.
        "sampling": {k: v for k, v in asdict(settings.sampling).items() if (k, v) != ("shift", 1.0)},
        "seed": drawing.seed,
        "classes": classes,
        "num_samples": num_samples,
        "labels": drawing.labels if settings.num_samples is not None else "class by class",
        "precision": precision,
        "batch_size": drawing.batch_size,
        "vae": (vae.entry or {}).get("hash"),
        "vae_tiling": drawing.vae_tiling,
        "quantisation": "floor(127.5 x + 128), clamped to 0..255",
        "latents": "latents" in settings.products,
        "made_by": {
            "checkpoint": str(settings.ckpt),
            "ditlit": __version__,
            "torch": torch.__version__,
            "diffusers": version("diffusers"),
        },
    }


def in_words(loaded: Loaded, sampling: Sampling, precision: str, device: torch.device) -> str:
    """What is drawn with, and how: the defaults too, which differ between programs."""
    which = "moving average of the weights" if loaded.weights == "ema" else "weights"
    step = f" of step {loaded.step:,}" if loaded.step else ""
    scale, interval = sampling.guidance_scale, sampling.guidance_interval
    guidance = "without guidance" if scale == 1 else f"guidance {scale:g}"
    guidance += f" on {sampling.guidance_channels} channels" if sampling.guidance_channels is not None else ""
    guidance += f" in timesteps {interval[0]} to {interval[1]}" if interval is not None else ""
    steps = counted(sampling.num_steps, "step")
    return f"Drawing with the {which}{step}: {sampling.sampler}, {steps}, {guidance}; precision {precision}, {device}"


def draw_sheet(pipeline: SamplingPipeline, settings: SampleSettings, classes: list[int]) -> Tensor:
    batch_size = settings.drawing.batch_size
    if settings.sheet == "guidance":
        return guidance_sheet(pipeline, classes, settings.scales, batch_size)
    draw = {"noise": noise_sheet, "classes": class_sheet}[settings.sheet]
    return draw(pipeline, classes, settings.sheet_columns, batch_size)


def draw_missing(
    pipeline: SamplingPipeline, folder: SampleFolder, y: Tensor, batch_size: int, save_steps: int | None, fabric: Fabric
) -> None:
    """Draw this process's part of the batches that are not complete."""
    batches = [list(range(i, min(i + batch_size, len(y)))) for i in range(0, len(y), batch_size)]
    animation = folder.path / "denoising.webp"
    todo = [b for b in batches if folder.lacks(b) or (save_steps and b[0] == 0 and not animation.exists())]
    fabric.barrier()  # all have looked before any writes
    mine = share(todo, fabric)
    count, my_count = sum(map(len, todo)), sum(map(len, mine))
    written: list[Future] = []
    start = time.perf_counter()
    with Progress("sampling", len(y), len(y) - count, my_count, fabric) as progress, ThreadPoolExecutor(4) as threads:
        for batch in mine:
            frames = Frames(pipeline, save_steps) if save_steps and batch[0] == 0 else None
            latents = pipeline.draw(batch, y[batch], callback=frames)
            images = pipeline.images(latents, batch)
            for file in written:  # of the batch before, while this one was drawn
                file.result()
            written = folder.write(batch, images, latents, threads)
            if frames is not None:
                save_animation(frames.pictures(), animation, seconds_a_frame=0.1)
            progress.advance(len(batch))
        for file in written:
            file.result()
    if mine and fabric.global_rank == 0:
        print(f"{count / (time.perf_counter() - start):,.2f} images/s")


class Frames:
    """A step callback that keeps what the denoiser takes the first images to be, every so many steps."""

    def __init__(self, pipeline: SamplingPipeline, every: int):
        self.pipeline = pipeline
        self.every = every
        self.kept: list[Tensor] = []
        self.last: Tensor | None = None

    def __call__(self, step: int, t: int, x: Tensor, x0: Tensor) -> None:
        self.last = x0[:ANIMATED]
        if step % self.every == 0:
            self.kept.append(self.last)
            self.last = None

    def pictures(self) -> list[Tensor]:
        kept = self.kept if self.last is None else [*self.kept, self.last]
        per_row = int(len(kept[0]) ** 0.5)
        return [grid_of(self.pipeline.images(self.pipeline.raw(x0)), per_row) for x0 in kept]
