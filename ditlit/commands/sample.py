"""``ditlit sample``: images from a checkpoint."""

import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Literal, Unpack

import torch
from lightning.fabric import Fabric
from torch import Tensor

from ditlit import __version__, checkpoints
from ditlit.checkpoints import Loaded, Reading
from ditlit.commands.processes import Progress, ending_together, launch, share
from ditlit.data.classes import Classes, parse_classes
from ditlit.data.folders import check_writable
from ditlit.diffusion import Sampling
from ditlit.errors import InputError, check_positive, counted
from ditlit.generation.classes import plan_labels
from ditlit.generation.drawing import Drawer
from ditlit.generation.folder import SampleFolder
from ditlit.generation.sheets import class_sheet, guidance_sheet, noise_sheet
from ditlit.images.vae import load_autoencoder, weights_hash
from ditlit.pictures import grid_of, save_animation, save_png

DEFAULT_CLASSES = 10
PRODUCTS = ("npz", "latents")
ANIMATED = 16  # most images in the animation


@ending_together
def sample(
    ckpt: str,
    out: str,
    classes: Classes | None = None,
    per_class: int = 8,
    num_samples: int | None = None,
    labels: Literal["balanced", "random"] = "balanced",
    weights: Literal["ema", "raw"] = "ema",
    sampler: Literal["ddpm", "ddim", "dpm++", "unipc", "deis"] = "ddpm",
    num_steps: int = 250,
    spacing: Literal["even", "ddim"] = "even",
    eta: float = 0.0,
    guidance_scale: float = 4.0,
    guidance_channels: int | None = None,
    guidance_interval: tuple[int, int] | str | None = None,
    seed: int = 0,
    batch_size: int = 32,
    precision: Literal["32", "tf32", "bf16", "fp16"] | None = None,
    compile: bool = False,
    vae: str | None = None,
    decode_batch_size: int = 16,
    vae_tiling: bool = False,
    save: str | None = None,
    save_steps: int | None = None,
    sheet: Literal["guidance", "noise", "classes"] | None = None,
    sheet_scales: str = "1,1.5,2,4,8",
    sheet_columns: int = 8,
    accelerator: str = "auto",
    devices: str = "auto",
    num_nodes: int = 1,
    **reading: Unpack[Reading],
) -> None:
    """Draw images from a checkpoint of any kind.

    Example: ditlit sample --ckpt runs/xl2/checkpoints/last.ckpt --classes 207,360,387,974 --out samples

    Architecture, classes, scaling of the latents and VAE come from the checkpoint. An image depends on the seed, its
    number, its class and these settings only, not on devices or restarts; a job that was killed makes what is missing.

    The default is the paper's 250 steps of DDPM; pictures while training, and from Python, take 50 of DDIM.

    Args:
        ckpt: a checkpoint of ours, the folder of a run (its last checkpoint), the released DiT weights (.pt), a
            diffusers folder, a safetensors file, or a name on the hub.
        out: folder for the images.
        classes: numbers or names, separated by commas or as a list; by default ten spread over all of them, or all of
            them with num_samples. What is the name of a class is taken for the name.
        per_class: images of each class.
        num_samples: so many images in all, instead of per_class.
        labels: with num_samples, whether the classes take turns or are drawn at random.
        weights: the moving average, or those that the optimizer holds.
        sampler: ddpm or ddim, or one of the fast solvers of diffusers: dpm++, unipc, deis.
        num_steps: number of denoising steps.
        spacing: how they are spread over the schedule: even, or ddim for the released code's "ddimN".
        eta: noise of DDIM's steps, from 0 (none) to 1.
        guidance_scale: strength of classifier-free guidance; 1 is none, 4 makes pictures like the paper's.
        guidance_channels: guide only the first so many channels; the paper's numbers guide 3.
        guidance_interval: guide only at timesteps between these two: LOWEST,HIGHEST.
        seed: of all noise.
        batch_size: images drawn at once on each device.
        precision: of the denoiser; by default tf32 on GPUs and 32 on CPUs. tf32 is float32 with fast matrix products,
            in the VAE too, which is float32 otherwise.
        compile: compile the denoiser, which pays for many images.
        vae: folder or hub name of the VAE, instead of the one that the checkpoint names.
        decode_batch_size: images decoded at once.
        vae_tiling: decode in tiles, where memory is short; seams may show.
        save: what to keep beside the PNG files, by which a job continues, separated by commas: npz, as ADM's evaluator
            reads it, and latents.
        save_steps: also draw the denoising of the first images as denoising.webp, a frame every so many steps.
        sheet: draw a sheet instead of images, a row for each class: along the guidance scale, from one noise to
            another, or from one class to the next.
        sheet_scales: guidance scales of a guidance sheet, separated by commas.
        sheet_columns: steps of the other sheets.
        accelerator: cpu, gpu, or auto.
        devices: number of devices of this machine, or auto: all GPUs, or one process on the CPU.
        num_nodes: number of machines.
        reading: how the checkpoint is read, as for ``ditlit.checkpoints.load``.
    """
    products = {word.strip() for word in (save or "").split(",")} - {""}
    if not products <= set(PRODUCTS):
        raise InputError(f"--save takes {', '.join(PRODUCTS)}, got {save!r}")
    check_positive(
        per_class=per_class, num_samples=num_samples, batch_size=batch_size, save_steps=save_steps,
        decode_batch_size=decode_batch_size,
    )  # fmt: skip
    if sheet_columns < 2:
        raise InputError(f"a sheet has two columns at least, sheet_columns is {sheet_columns}")
    sampling = Sampling(
        sampler, num_steps, spacing, eta, guidance_scale, guidance_channels, guidance_interval
    )  # fmt: skip
    scales = numbers(sheet_scales)
    for scale in scales:
        replace(sampling, guidance_scale=scale)  # refuses one that is none
    precision = precision or ("tf32" if accelerator != "cpu" and torch.cuda.is_available() else "32")
    loaded = checkpoints.load(ckpt, weights, **reading)
    sampling.check(loaded.process, loaded.denoiser.in_channels)
    num_classes = loaded.denoiser.num_classes
    if classes is not None:
        chosen = parse_classes(classes, num_classes, loaded.latents.get("class_names"))
    elif num_samples is not None:
        chosen = list(range(num_classes))
    else:
        rows = min(DEFAULT_CLASSES, num_classes)
        chosen = [i * num_classes // rows for i in range(rows)]
    y = plan_labels(chosen, num_samples, per_class, labels, seed)
    autoencoder = load_autoencoder(loaded.latents.get("vae"), vae, loaded.denoiser.in_channels)
    if vae_tiling:
        autoencoder.tile()
    job = {
        "checkpoint": weights_hash(loaded.denoiser),
        "weights": loaded.weights,
        "step": loaded.step,
        "sampling": asdict(sampling),
        "seed": seed,
        "classes": chosen,
        "num_samples": len(y),
        "labels": labels if num_samples is not None else "class by class",
        "precision": precision,
        "batch_size": batch_size,
        "vae": (autoencoder.entry or {}).get("hash"),
        "vae_tiling": vae_tiling,
        "quantisation": "floor(127.5 x + 128), clamped to 0..255",
        "latents": "latents" in products,
        "made_by": {
            "checkpoint": str(ckpt),
            "ditlit": __version__,
            "torch": torch.__version__,
            "diffusers": version("diffusers"),
        },
    }

    folder = SampleFolder(out, y, "latents" in products)
    if sheet is None:
        folder.check(job)
    check_writable(folder.path, "--out")
    fabric, _ = launch(accelerator, devices, num_nodes)
    drawer = Drawer(
        loaded.denoiser,
        loaded.process,
        loaded.latents,
        sampling,
        seed,
        fabric.device,
        precision,
        autoencoder.to(fabric.device).decode,
        decode_batch_size,
        compile,
    )
    if fabric.global_rank == 0:
        print(in_words(loaded, sampling, precision, fabric.device))
    if sheet is not None:
        if fabric.global_rank == 0:
            path = Path(out) / f"sheet-{sheet}.png"
            save_png(draw_sheet(drawer, sheet, chosen, scales, sheet_columns, batch_size), path)
            print(f"Look at {path}")
        return
    if fabric.global_rank == 0:
        folder.begin(job)
    fabric.barrier()
    folder.look()
    draw_missing(drawer, folder, y, batch_size, save_steps, fabric)
    fabric.barrier()
    if fabric.global_rank == 0:
        folder.finish(per_class if num_samples is None else 8, "npz" in products)
        print(f"{counted(len(y), 'image')} in {folder.path / 'images'}\nLook at {folder.path / 'grid.png'}")


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


def numbers(text: str) -> list[float]:
    try:
        return [float(word) for word in text.split(",")]
    except ValueError:
        raise InputError(f"--sheet_scales takes numbers separated by commas, got {text!r}") from None


def draw_sheet(
    drawer: Drawer, kind: str, classes: list[int], scales: list[float], columns: int, batch_size: int
) -> Tensor:
    if kind == "guidance":
        return guidance_sheet(drawer, classes, scales, batch_size)
    return {"noise": noise_sheet, "classes": class_sheet}[kind](drawer, classes, columns, batch_size)


def draw_missing(
    drawer: Drawer, folder: SampleFolder, y: Tensor, batch_size: int, save_steps: int | None, fabric: Fabric
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
            frames = Frames(drawer, save_steps) if save_steps and batch[0] == 0 else None
            latents = drawer.draw(batch, y[batch], callback=frames)
            images = drawer.images(latents, batch)
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

    def __init__(self, drawer: Drawer, every: int):
        self.drawer = drawer
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
        return [grid_of(self.drawer.images(self.drawer.raw(x0)), per_row) for x0 in kept]
