"""Pictures from a run: a fixed grid of samples during training, single files in prediction."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from ditlit.callbacks.loggers import log_picture
from ditlit.data.classes import parse_classes
from ditlit.errors import check_positive
from ditlit.images.vae import Decoder, load_decoder
from ditlit.pictures import check_decoded, grid_of, save_png, to_uint8, with_captions
from ditlit.resilience.run_folder import run_folder
from ditlit.settings import Classes


class SampleGrid(Callback):
    """Draws the same grid again and again as training goes on: fixed noise, fixed classes, the averaged weights.

    The grid goes to ``samples/`` in the run's folder as PNG, and to every logger that takes pictures; so do, once,
    training images of the same classes, from stores on a disk, as ``real.png``. Ranks share the work. In prediction
    every sample becomes a PNG in ``predictions/``. How samples are drawn is ``model.sampling``.

    Args:
        every_n_steps: draw every so many optimizer steps; by default at every validation.
        classes: numbers or names, one row each; by default up to ten, spread over all classes.
        per_class: samples in a row.
        seed: of the noise.
        batch_size: samples drawn at once on each device.
        vae: folder or name of the VAE that decodes; by default the one named in the store.
        min_side: enlarge smaller pictures to this many pixels a side, so that they can be looked at.
    """

    def __init__(
        self,
        every_n_steps: int | None = None,
        classes: Classes | None = None,
        per_class: int = 8,
        seed: int = 0,
        batch_size: int = 32,
        vae: str | None = None,
        min_side: int = 64,
    ):
        check_positive(every_n_steps=every_n_steps, per_class=per_class, batch_size=batch_size)
        self.every_n_steps = every_n_steps
        self.classes = classes
        self.per_class = per_class
        self.seed = seed
        self.batch_size = batch_size
        self.vae = vae
        self.min_side = min_side
        self._rows: list[int] = []  # the classes by number; known after setup
        self._decode: Decoder | None = None
        self._captions: list[str] = []  # of the rows
        self._real_shown = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._folder = run_folder(trainer)
        num_classes = pl_module.denoiser.num_classes
        names = getattr(getattr(trainer.datamodule, "manifest", None), "class_names", None)
        if self.classes is None:
            rows = min(10, num_classes)
            self._rows = [i * num_classes // rows for i in range(rows)]
        else:
            self._rows = parse_classes(self.classes, num_classes, names)
        self._captions = [caption(c, names) for c in self._rows]
        self._real_shown = False
        if stage in ("fit", "validate", "predict") and self._decode is None:
            # Loaded now, so that a VAE that cannot be had stops the run before it starts.
            manifest = trainer.datamodule.manifest
            self._decode = load_decoder(manifest.vae, self.vae, trainer.strategy.root_device, manifest.shape[0])

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.every_n_steps is None and not (trainer.enable_validation and trainer.datamodule.val_dataloader()):
            rank_zero_info(
                "SampleGrid draws at every validation, and there is none: it will draw nothing. Hold samples out with "
                "--data.val_size, or set its every_n_steps"
            )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        at_step = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if self.every_n_steps and at_step and trainer.global_step % self.every_n_steps == 0:
            self.draw(trainer, pl_module)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.every_n_steps is None and not trainer.sanity_checking:
            self.draw(trainer, pl_module)

    def draw(self, trainer: Trainer, pl_module: LightningModule) -> Path | None:
        """Draw the grid now; returns its path on rank 0."""
        labels = torch.tensor(self._rows).repeat_interleave(self.per_class)  # (n,)
        images = draw_images(trainer, pl_module, labels, self._decode, self.seed, self.batch_size)
        if not trainer.is_global_zero:
            return None
        path = self._folder / "samples" / f"step-{trainer.global_step:08d}.png"
        self._show(trainer, "samples", images, path)
        if not self._real_shown:
            self._real_shown = True
            self._show_real(trainer)
        return path

    def _show(self, trainer: Trainer, name: str, images: Tensor, path: Path) -> None:
        grid = with_captions(grid_of(images, self.per_class, self.min_side), self._captions)
        save_png(grid, path)
        log_picture(trainer.loggers, name, grid, trainer.global_step)

    def _show_real(self, trainer: Trainer) -> None:
        """Show training images of the same classes: what the samples should look like."""
        examples = getattr(trainer.datamodule, "examples", None)
        rows = [] if examples is None else [examples(c, self.per_class) for c in self._rows]
        if not any(row is not None for row in rows):
            return
        latents = torch.cat([row for row in rows if row is not None]).to(trainer.strategy.root_device)
        images = torch.cat([to_uint8(self._decode(part)).cpu() for part in latents.split(self.batch_size)])
        sheet = torch.full((len(rows) * self.per_class, *images.shape[1:]), 255, dtype=torch.uint8)
        filled = [i * self.per_class + j for i, row in enumerate(rows) if row is not None for j in range(len(row))]
        sheet[filled] = images
        self._show(trainer, "real", sheet, self._folder / "real.png")

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: dict[str, Tensor],
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        valid = outputs["valid"]
        decoded = self._decode(outputs["latents"][valid])
        check_decoded(decoded, outputs["index"][valid])
        images = to_uint8(decoded).cpu()
        for index, label, image in zip(outputs["index"][valid], outputs["labels"][valid], images, strict=True):
            save_png(image, self._folder / "predictions" / f"{index:06d}-class-{label}.png")

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            drawn = trainer.datamodule.predict_samples
            print(f"{drawn} PNG files, one a sample, are in {self._folder / 'predictions'}")


def caption(number: int, names: Sequence[str] | None) -> str:
    """A class's number, and its name where that is known and in letters that the font has."""
    name = "" if names is None else names[number].split(",")[0].strip()
    known = name.isascii() and name.isprintable() and name not in ("", str(number))
    return f"{number} {name}" if known else str(number)


def draw_images(
    trainer: Trainer, pl_module: LightningModule, labels: Tensor, decode: Decoder, seed: int, batch_size: int
) -> Tensor:
    """Draw one image for each of ``labels`` (n,) with the averaged weights: bytes (n, 3 or 1, H, W), on the CPU.

    Every rank draws each world_size-th sample, and all ranks return all of them.
    """
    ranks, rank = trainer.world_size, trainer.global_rank
    per_rank = -(-len(labels) // ranks)
    # Ranks with nothing left repeat sample 0, so that all gather the same shapes.
    mine = torch.arange(rank, per_rank * ranks, ranks)
    mine = torch.where(mine < len(labels), mine, 0)
    was_training = pl_module.training
    pl_module.eval()
    images = []
    try:
        with pl_module.averaged(), torch.no_grad(), trainer.precision_plugin.forward_context():
            for part in mine.split(batch_size):
                latents = pl_module.sample(labels[part].to(pl_module.device), part.tolist(), seed)
                images.append(to_uint8(decode(latents)))
    finally:
        pl_module.train(was_training)
    gathered = trainer.strategy.all_gather(torch.cat(images))  # (ranks, per_rank, C, H, W), or without ranks for one
    gathered = gathered.reshape(ranks, per_rank, *gathered.shape[-3:])
    return gathered.transpose(0, 1).flatten(0, 1)[: len(labels)].cpu()  # sample i was drawn on rank i % ranks
