"""The settings of ``ditlit sample``."""

from dataclasses import dataclass, replace
from typing import Literal

from ditlit.errors import InputError, check_positive
from ditlit.settings.groups import Classes, Drawing, Execution, Reading
from ditlit.settings.sampling import Sampling

PRODUCTS = ("npz", "latents")


@dataclass(frozen=True, kw_only=True)
class SampleSettings:
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
        save: what to keep beside the PNG files, by which a job continues, separated by commas: npz, as ADM's evaluator
            reads it, and latents.
        save_steps: also draw the denoising of the first images as denoising.webp, a frame every so many steps.
        sheet: draw a sheet instead of images, a row for each class: along the guidance scale, from one noise to
            another, or from one class to the next.
        sheet_scales: guidance scales of a guidance sheet, separated by commas.
        sheet_columns: steps of the other sheets.

    Raises:
        InputError: for settings that make no sense.
    """

    ckpt: str
    out: str
    classes: Classes | None = None
    per_class: int = 8
    num_samples: int | None = None
    save: str | None = None
    save_steps: int | None = None
    sheet: Literal["guidance", "noise", "classes"] | None = None
    sheet_scales: str = "1,1.5,2,4,8"
    sheet_columns: int = 8
    sampling: Sampling = Sampling("ddpm", 250)
    drawing: Drawing = Drawing()
    execution: Execution = Execution()
    reading: Reading = Reading()

    def __post_init__(self):
        check_positive(per_class=self.per_class, num_samples=self.num_samples, save_steps=self.save_steps)
        if not self.products <= set(PRODUCTS):
            raise InputError(f"--save takes {', '.join(PRODUCTS)}, got {self.save!r}")
        if self.sheet_columns < 2:
            raise InputError(f"a sheet has two columns at least, sheet_columns is {self.sheet_columns}")
        for scale in self.scales:
            replace(self.sampling, guidance_scale=scale)  # refuses one that is none

    @property
    def products(self) -> set[str]:
        """What is kept beside the PNG files."""
        return {word.strip() for word in (self.save or "").split(",")} - {""}

    @property
    def scales(self) -> list[float]:
        """Guidance scales of the columns of a guidance sheet."""
        try:
            return [float(word) for word in self.sheet_scales.split(",")]
        except ValueError:
            raise InputError(f"--sheet_scales takes numbers separated by commas, got {self.sheet_scales!r}") from None
