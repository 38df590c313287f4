"""Metrics of generated images while training goes on, and the full protocol from a checkpoint in ``test``."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from ditlit.callbacks.pictures import draw_images
from ditlit.data.folders import check_writable, is_remote
from ditlit.diffusion.noise import mix
from ditlit.errors import InputError, check_positive
from ditlit.evaluation.cache import FeatureCache
from ditlit.evaluation.extraction import extract, shared_features
from ditlit.evaluation.extractors import Extractor, describe, load_extractor
from ditlit.evaluation.protocol import Results, check_side, chosen_metrics, layers_of, measure, title
from ditlit.evaluation.provenance import provenance, write_report
from ditlit.evaluation.sources import Source, content_hash, open_source
from ditlit.images.vae import Autoencoder, load_autoencoder, state_hash
from ditlit.parallel.shards import gathered
from ditlit.resilience.run_folder import run_folder
from ditlit.settings import Judging
from ditlit.settings.evaluate import FEATURES

CHUNK = 512  # images held at once; fixed, so that the same are drawn on any number of devices


class SampleMetrics(Callback):
    """Draws samples with the averaged weights, as ``model.sampling`` says, and compares them with a reference.

    Metrics are logged as ``eval/FID`` and so on, where a ``ModelCheckpoint`` can monitor them, and each evaluation
    leaves a report in ``evaluations/`` in the run's folder. Other extractors' distances are logged under their name,
    as in ``eval/Frechet_distance_DINOv2``. Few samples give high distances: compare them within a run only.

    What cannot be written costs a warning that gives the numbers, and the run goes on.

    The extractor belongs to this callback: none of it enters checkpoints or the moving average.

    Args:
        reference: folder of images, npz file, statistics file or latent store, as in ``ditlit evaluate``.
        every_n_steps: evaluate every so many optimizer steps; by default at every validation.
        num_samples: images drawn each time; the classes take turns.
        num_test_samples: the same in ``test``. Published numbers are of 50,000.
        metrics: separated by commas: fid, sfid, is, precision, recall, kid.
        seed: of the noise.
        batch_size: samples drawn at once on each device.
        vae: folder or name of the VAE that decodes; by default the one named in the store.
        num_workers: processes that read the reference.
        cache: folder in which the reference's features are kept.
        judging: ``extractor``, ``inception_weights`` and ``reference_size``, as in ``ditlit evaluate``.
    """

    def __init__(
        self,
        reference: str,
        every_n_steps: int | None = None,
        num_samples: int = 2000,
        num_test_samples: int = 50_000,
        metrics: str = "fid",
        seed: int = 0,
        batch_size: int = 32,
        vae: str | None = None,
        num_workers: int = 4,
        cache: str = FEATURES,
        **judging: Any,
    ):
        check_positive(every_n_steps=every_n_steps, batch_size=batch_size)
        if min(num_samples, num_test_samples) < 4:
            raise InputError(f"metrics need at least 4 samples, got {min(num_samples, num_test_samples)}")
        self.reference = reference
        self.every_n_steps = every_n_steps
        self.num_samples = num_samples
        self.num_test_samples = num_test_samples
        self.judging = Judging(metrics, **judging)
        self.seed = seed
        self.batch_size = batch_size
        self.vae = vae
        self.num_workers = num_workers
        self.cache = cache
        self._network: Extractor | None = None
        self._real: Source | None = None
        self._real_hash = ""
        self._autoencoder: Autoencoder | None = None
        self._chosen: list[str] = []
        self._loaded_step = 0  # of the checkpoint that is tested

    @property
    def result_tags(self) -> list[str]:
        """Names of the curves that are logged; known after ``setup``."""
        return [f"eval/{as_key(title(metric, self._network))}" for metric in self._chosen]

    # Before the first step --------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # Loaded now, so that what cannot be had stops the run before it starts.
        self._reports = run_folder(trainer) / "evaluations"
        if stage not in ("fit", "validate", "test") or self._network is not None:
            return
        if not trainer.fast_dev_run and not is_remote(trainer.default_root_dir):
            check_writable(self._reports, "--trainer.default_root_dir")
        device = trainer.strategy.root_device
        manifest = trainer.datamodule.manifest
        self._autoencoder = load_autoencoder(manifest.vae, self.vae, manifest.shape[0]).to(device)
        self._network = load_extractor(self.judging.extractor, self.judging.inception_weights).to(device)
        self._chosen = chosen_metrics(self.judging.metrics, self._network)
        self._real = open_source(self.reference, self._network, self.judging.reference_size, device=device)
        check_side(self._chosen, self._real, generated=False)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._loaded_step = checkpoint["global_step"]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._read_reference(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._read_reference(trainer)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._read_reference(trainer)

    def _read_reference(self, trainer: Trainer) -> None:
        """Extract the reference's features, once."""
        images = self._real.images
        layers = layers_of(self._chosen, self._real, generated=False) if images is not None else []
        if self._real_hash or not (layers or trainer.is_global_zero):
            return
        self._real_hash = content_hash(self._real) if trainer.is_global_zero else "on the first process"
        if not layers:
            return

        def make(missing: Sequence[str], folder: Path) -> None:
            extract(
                images, self._network, missing, folder, 64, self.num_workers, trainer.strategy.root_device,
            )  # fmt: skip

        content = images.digest() if trainer.is_global_zero else ""
        found, _ = FeatureCache(self.cache).get({"images": content, **describe(self._network)}, layers, make)
        self._real.features |= found

    # When it is time --------------------------------------------------------------------------------------------------

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        at_step = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if self.every_n_steps and at_step and trainer.global_step % self.every_n_steps == 0:
            self.log_metrics(trainer, pl_module, self.num_samples)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.every_n_steps is None and not trainer.sanity_checking:
            self.log_metrics(trainer, pl_module, self.num_samples)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.log_metrics(trainer, pl_module, self.num_test_samples)

    def log_metrics(self, trainer: Trainer, pl_module: LightningModule, num_samples: int) -> dict[str, float]:
        """Draw, compare and log now; returns what was logged, on every process."""
        generated = self.draw(trainer, pl_module, num_samples)
        checkpoint = hash_of_average(trainer, pl_module)
        values: dict[str, float] = {}
        if trainer.is_global_zero:
            device = trainer.strategy.root_device
            at = device if device.type == "cuda" else torch.device("cpu")
            results = measure(self._chosen, generated, self._real, self._network, device=at)
            self._report(trainer, pl_module, results, generated, checkpoint)
            values = {f"eval/{as_key(name)}": value for name, value in results.metrics.items()}
        values = trainer.strategy.broadcast(values)
        training = trainer.training  # logged at this very step, whatever log_every_n_steps says
        for name, value in values.items():
            pl_module.log(name, value, logger=not training, prog_bar=True, on_step=training, on_epoch=not training)
        if training:
            for logger in trainer.loggers:
                logger.log_metrics(values, trainer.global_step)
        return values

    def draw(self, trainer: Trainer, pl_module: LightningModule, num_samples: int) -> Source:
        """Features of so many samples; the classes take turns."""
        labels = torch.arange(num_samples) % pl_module.denoiser.num_classes  # (n,)
        layers = layers_of(self._chosen, Source({}), generated=True)
        kept: dict[str, list[Tensor]] = {layer: [] for layer in layers}
        for number, part in enumerate(labels.split(CHUNK)):
            seed = mix(self.seed, number)
            images = draw_images(trainer, pl_module, part, self._autoencoder.decode, seed, self.batch_size)
            images = images.expand(-1, 3, -1, -1)
            device = trainer.strategy.root_device
            found = shared_features(images, self._network, layers, self.batch_size, device)
            if trainer.is_global_zero:
                for layer, features in found.items():
                    kept[layer].append(features)
        about = {"kind": "drawn by SampleMetrics", "n": num_samples, "resize": "none"}
        about["size"] = "x".join(map(str, images.shape[2:]))
        features = {layer: torch.cat(parts) for layer, parts in kept.items()} if trainer.is_global_zero else {}
        return Source(about, features=features)

    def _report(
        self, trainer: Trainer, pl_module: LightningModule, results: Results, generated: Source, checkpoint: str
    ) -> None:
        fitting = trainer.state.fn == TrainerFn.FITTING
        step = self._loaded_step if trainer.ckpt_path and not fitting else trainer.global_step
        generated.about["job"] = {
            "checkpoint": checkpoint,
            "ckpt_path": str(trainer.ckpt_path) if trainer.ckpt_path else None,
            "step": step,
            "weights": "raw" if pl_module.ema is None else "ema",
            "sampling": asdict(pl_module.sampling),
            "seed": self.seed,
            "labels": "balanced",
            "num_samples": generated.about["n"],
            "precision": str(trainer.precision),
            "vae": (self._autoencoder.entry or {}).get("hash"),
            "quantisation": "floor(127.5 x + 128), clamped to 0..255",
        }
        device = trainer.strategy.root_device
        report = provenance(results, generated, self._real, self._network, device, ("not kept", self._real_hash))
        kind = "test" if trainer.testing else "step"
        path = self._reports / f"{kind}-{step:08d}.json"
        try:
            write_report(report, path)
        except OSError as error:
            numbers = ", ".join(f"{name} {value:.5g}" for name, value in results.metrics.items())
            rank_zero_warn(f"cannot write {path} ({error.strerror or error}). At step {step}: {numbers}")


def hash_of_average(trainer: Trainer, pl_module: LightningModule) -> str:
    """Hash of the averaged weights, known to rank 0; where they are sharded, all ranks gather them."""
    with pl_module.averaged():
        state = gathered(pl_module.denoiser.state_dict())
        return state_hash(state) if trainer.is_global_zero else ""


def as_key(name: str) -> str:
    """A metric's name as a key that needs no quotes on a command line."""
    return name.replace("(", "").replace(")", "").replace(" ", "_")
