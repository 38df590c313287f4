"""The settings of ``ditlit evaluate`` and of what goes with it: sweep, scaling and loss."""

import itertools
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ditlit.errors import InputError, check_positive
from ditlit.settings.groups import Classes, Drawing, Execution, Judging, Reading
from ditlit.settings.sampling import Sampling, interval_of

FEATURES = "~/.cache/ditlit/features"  # where they are kept


@dataclass(frozen=True, kw_only=True)
class EvaluateSettings:
    """Compute FID, sFID, Inception Score, precision, recall and KID as the ADM evaluator does.

    Example: ditlit evaluate --generated samples --reference VIRTUAL_imagenet256_labeled.npz

    Each side is a folder of images, an npz file of images (arr_0) or of ADM's statistics, a statistics file of ours, or
    a latent store. Beside the numbers a report is written that says how they were made; --compare A.json,B.json tells
    what differs between two.

    Args:
        generated: the generated images; of a ditlit sample folder, everything that it was asked for is put on record.
        reference: what they are compared with.
        out: file of the report, or a folder for report.json; by default in the folder of the generated images, beside
            their file, or in the working folder where they are at a URL.
        generated_size: cut and resize the images of the generated folder to this side, as encode does. Published
            numbers do not.
        vae: folder or hub name of the VAE that decodes a latent store, instead of the one that the store names.
        sample_sizes: also give the distance of so many generated images, separated by commas, or auto, and extrapolate
            to infinitely many.
        bootstrap: resamples for an interval around each metric; 0 for none.
        save_stats: write the reference's statistics to this file, to be a reference later; does without generated.
        compare: instead of evaluating, say what differs between two reports, separated by a comma.
        batch_size: images in the extractor at once on each device.
        num_workers: processes on each device that read images; by default one for each CPU core but one.
        cache: folder in which features are kept, to be found again by their images' content; without a folder that can
            be written, they are made anew each time.

    Raises:
        InputError: for settings that make no sense.
    """

    generated: str | None = None
    reference: str | None = None
    out: str | None = None
    generated_size: int | None = None
    vae: str | None = None
    sample_sizes: str | None = None
    bootstrap: int = 0
    save_stats: str | None = None
    compare: str | None = None
    batch_size: int = 64
    num_workers: int | None = None
    cache: str = FEATURES
    judging: Judging = Judging()
    execution: Execution = Execution()

    def __post_init__(self):
        if self.compare is not None:
            if len(self.reports) != 2:
                raise InputError(f"--compare takes two reports separated by a comma, got {self.compare!r}")
            return
        if self.reference is None or (self.generated is None and self.save_stats is None):
            raise InputError("evaluate needs --generated and --reference, or --reference and --save_stats; see --help")
        check_positive(batch_size=self.batch_size, generated_size=self.generated_size)
        if self.bootstrap < 0 or self.bootstrap == 1:
            raise InputError(f"--bootstrap needs at least 2 resamples, got {self.bootstrap}")

    @property
    def reports(self) -> list[str]:
        """The two that are compared."""
        return words(self.compare or "")


@dataclass(frozen=True, kw_only=True)
class SweepSettings:
    """Sample and evaluate every combination of the given settings.

    Example: ditlit evaluate sweep --ckpt runs/xl2/checkpoints/last.ckpt --reference VIRTUAL_imagenet256_labeled.npz
    --guidance_scale 1,1.25,1.5,2,4 --num_steps 25,50,100,250 --out sweep

    Each point is a ditlit sample and a ditlit evaluate in a folder of its own, with its report; a sweep that was
    stopped goes on where it was. The results are table.csv, table.md, and plots over guidance scale, steps and seconds.

    Args:
        ckpt: as for ditlit sample.
        reference: as for ditlit evaluate.
        out: folder of the sweep.
        guidance_scale: scales, separated by commas.
        num_steps: numbers of steps, separated by commas.
        sampler: samplers, separated by commas.
        interval: guidance intervals, separated by commas, each as LOWEST-HIGHEST timestep, or all for no interval.
        guidance_channels: guide only the first so many channels.
        num_samples: images of each point. The published numbers are of 50,000.
        keep_images: keep the images of each point after its evaluation.

    Raises:
        InputError: for settings that make no sense, in any of the points.
    """

    ckpt: str
    reference: str
    out: str
    guidance_scale: str = "1,1.25,1.5,2,4"
    num_steps: str = "250"
    sampler: str = "ddpm"
    interval: str = "all"
    guidance_channels: int | None = None
    num_samples: int = 10_000
    keep_images: bool = False
    drawing: Drawing = Drawing(precision="32")
    judging: Judging = Judging()
    execution: Execution = Execution()
    reading: Reading = Reading()

    def __post_init__(self):
        check_alone("evaluate sweep")
        check_positive(num_samples=self.num_samples)
        _ = self.points  # refuses one that is none

    @property
    def points(self) -> list[Sampling]:
        """All combinations."""
        values = itertools.product(
            words(self.sampler),
            parsed(self.num_steps, int, "num_steps"),
            parsed(self.guidance_scale, float, "guidance_scale"),
            parsed(self.interval, interval_between, "interval"),
        )
        return [
            Sampling(
                sampler, steps, guidance_scale=scale, guidance_channels=self.guidance_channels,
                guidance_interval=interval,
            )
            for sampler, steps, scale, interval in values
        ]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ScalingSettings:
    """Compare trained models by what they cost and how good they are.

    Example: ditlit evaluate scaling --runs runs/scaling --reference data/tiny-imagenet-latents --out scaling

    For every run: parameters, multiply-adds, held-out loss, metrics of samples, training compute and hours. The results
    are table.csv, table.md and scaling.png, the paper's picture of quality against compute. Samples are drawn without
    guidance, as there. A comparison that was stopped goes on where it was.

    Args:
        runs: folder of the runs' folders, as fit leaves them.
        reference: as for ditlit evaluate.
        out: folder of the comparison.
        num_samples: images of each model.

    Raises:
        InputError: for settings that make no sense.
    """

    runs: str
    reference: str
    out: str
    num_samples: int = 1000
    sampling: Sampling = Sampling("dpm++", 20, guidance_scale=1.0)
    drawing: Drawing = Drawing(batch_size=100, precision="32")
    judging: Judging = Judging(metrics="fid")
    execution: Execution = Execution()

    def __post_init__(self):
        check_alone("evaluate scaling")
        check_positive(num_samples=self.num_samples)


@dataclass(frozen=True, kw_only=True)
class LossSettings:
    """Give the loss by timestep on held-out latents, and say plainly what is off.

    Example: ditlit evaluate loss --ckpt runs/digits/checkpoints/last.ckpt --store data/digits/val

    The error is that of the predicted noise, for fixed noise and timesteps spread evenly over the samples, so that it
    compares between checkpoints. Beside it stand the error given the null label, and the curve of the recipe where we
    have run it.

    Args:
        ckpt: a checkpoint of any kind.
        store: latent store of samples that were not trained on.
        out: also write the curve to this JSON file.
        num_samples: at most so many samples of the store, evenly spaced.
        draws: timesteps and noises for each sample.
        bins: of timesteps.
        batch_size: samples at once.
        seed: of the noise.
        accelerator: cpu, gpu, or auto.
        store_classes: the class of the checkpoint that each class of the store is, by number or name; only needed
            where their names do not tell. Classes that the checkpoint lacks are left out.

    Raises:
        InputError: for settings that make no sense.
    """

    ckpt: str
    store: str
    out: str | None = None
    num_samples: int = 2000
    draws: int = 4
    bins: int = 10
    batch_size: int = 64
    seed: int = 0
    accelerator: str = "auto"
    store_classes: Classes | None = None
    reading: Reading = Reading()

    def __post_init__(self):
        check_positive(draws=self.draws, bins=self.bins, batch_size=self.batch_size)
        if self.num_samples < 2:
            raise InputError(f"a spread needs num_samples 2 at least, got {self.num_samples}")


def check_alone(command: str) -> None:
    """Refuse torchrun for a command whose parts are commands on all devices."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        raise InputError(f"{command} starts its own processes: run it without torchrun, with --devices")


def words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def parsed(text: str, kind: Callable[[str], Any], name: str) -> list:
    try:
        return [kind(word) for word in words(text)]
    except ValueError:
        raise InputError(f"--{name} takes values separated by commas, got {text!r}") from None


def interval_between(word: str) -> tuple[float, float] | None:
    return None if word == "all" else interval_of(word.split("-"))
