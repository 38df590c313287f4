"""What a run shows before its first step: its model, and in loggers a layout of the curves, its settings and store."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch.utils.tensorboard.summary import hparams

from ditlit.callbacks.loggers import log_text
from ditlit.checkpoints.contents import class_of, variant_name
from ditlit.data.manifest import Manifest
from ditlit.models import DiT, macs, num_parameters

# Curves that belong in one picture, by the tab's sections. Tags are regular expressions.
LAYOUT = {
    "loss": {
        "loss": ["Multiline", ["train/loss", "val/loss"]],
        "squared error": ["Multiline", ["train/mse", "val/mse"]],
        "variational term": ["Multiline", ["train/vlb", "val/vlb"]],
        "by timestep": ["Multiline", ["loss_by_timestep/.*"]],
    },
    "health": {
        "gradient norm": ["Multiline", ["train/grad_norm"]],
        "distance of the moving average": ["Multiline", ["train/ema_distance"]],
        "decay of the moving average": ["Multiline", ["train/ema_decay"]],
        "learning rate": ["Multiline", ["train/learning_rate"]],
        "skipped steps": ["Multiline", ["train/skipped_steps"]],
        "activations": ["Multiline", ["activations/.*"]],
        "attention logits": ["Multiline", ["attention_logits/.*"]],
    },
    "throughput": {
        "images per second": ["Multiline", ["throughput/images_per_second"]],
        "TFLOP/s a device": ["Multiline", ["throughput/tflops"]],
        "seconds a step, and waiting for data": ["Multiline", ["throughput/step_seconds", "throughput/data_wait"]],
        "share of the device's peak": ["Multiline", ["throughput/mfu"]],
        "memory in GB": ["Multiline", ["throughput/memory_gb"]],
    },
    "metrics of samples": {"metrics": ["Multiline", ["eval/.*", "digits/.*"]]},
}
RESULTS = ("val/loss", "val/mse", "train/loss", "throughput/images_per_second")


class ModelLine(Callback):
    """Says in one line what is trained, in place of Lightning's table of layers."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        facts = model_facts(pl_module.denoiser)
        work = f", multiply-adds {facts['multiply-adds']}" if "multiply-adds" in facts else ""
        rank_zero_info(f"Training a {facts['class']}: trained parameters {facts['trained parameters']}{work}")


def write_overview(trainer: Trainer, pl_module: LightningModule) -> None:
    """Show the hyper-parameters and the texts ``model`` and ``store``; in TensorBoard, lay out the custom scalars."""
    settings = hyperparameters(trainer, pl_module)
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            write_layout(logger, settings, trainer)
        else:
            logger.log_hyperparams(settings)
    log_text(trainer.loggers, "model", table(model_facts(pl_module.denoiser)))
    manifest = getattr(trainer.datamodule, "manifest", None)
    if manifest is not None:
        log_text(trainer.loggers, "store", table(store_facts(trainer.datamodule.store, manifest)))
    for logger in trainer.loggers:
        logger.save()


def write_layout(logger: TensorBoardLogger, settings: dict[str, bool | str | float | int], trainer: Trainer) -> None:
    writer = logger.experiment
    writer.add_custom_scalars(LAYOUT)
    # The HParams tab reads these curves of the run: callbacks that judge samples name theirs as ``result_tags``.
    tags = [*RESULTS, *(tag for callback in trainer.callbacks for tag in getattr(callback, "result_tags", ()))]
    for summary in hparams(settings, dict.fromkeys(tags, 0.0))[:2]:
        writer.file_writer.add_summary(summary)


def hyperparameters(trainer: Trainer, pl_module: LightningModule) -> dict[str, bool | str | float | int]:
    """What distinguishes one run from another, by the names of the configuration."""
    optimizer = trainer.optimizers[0]
    group = optimizer.param_groups[0]
    batch_size = getattr(trainer.datamodule, "global_batch_size", None)
    found = {f"denoiser.{name}": value for name, value in named_sizes(pl_module.denoiser).items()}
    found |= {f"process.{name}": value for name, value in getattr(pl_module.process, "config", {}).items()}
    found |= {
        "optimizer": type(optimizer).__name__,
        "optimizer.lr": group.get("initial_lr", group["lr"]),
        "optimizer.weight_decay": group.get("weight_decay"),
        "ema.decay": None if pl_module.ema is None else pl_module.ema.decay,
        "class_dropout_prob": pl_module.class_dropout_prob,
        "global_batch_size": batch_size,
        "gradient_clip_val": trainer.gradient_clip_val,
        "precision": str(trainer.precision),
        "max_steps": trainer.max_steps,
        "seed": pl_module.seed,
        "store": str(getattr(trainer.datamodule, "store", None)),
    }
    plain = (bool, str, float, int)
    return {name: value if isinstance(value, plain) else str(value) for name, value in found.items()}


def model_facts(denoiser: Any) -> dict[str, str]:
    trained = sum(p.numel() for p in denoiser.parameters() if p.requires_grad)
    facts = {"class": class_of(denoiser).__name__, "trained parameters": f"{trained:,}"}
    if isinstance(denoiser, DiT):
        facts["parameters"] = f"{num_parameters(denoiser):,} (with the position table)"
        facts["multiply-adds"] = f"{macs(denoiser) / 1e9:.4g} G a sample and forward pass"
        facts["tokens"] = f"{denoiser.grid[0]} x {denoiser.grid[1]}"
    return facts | {name: str(value) for name, value in named_sizes(denoiser).items()}


def named_sizes(denoiser: Any) -> dict[str, Any]:
    """A denoiser's settings, with the paper's name for its sizes only where they are those."""
    config = getattr(denoiser, "config", {})
    return config | {"variant": variant_name(config)} if "variant" in config else config


def store_facts(location: Any, manifest: Manifest) -> dict[str, str]:
    """Which latents these are: enough to tell whether two runs have seen the same."""
    return {
        "location": str(location),
        "kind": manifest.kind,
        "shape": " x ".join(map(str, manifest.shape)),
        "samples": f"{manifest.num_samples:,}",
        "classes": str(manifest.num_classes),
        "shift and scale": f"{list(manifest.shift)}, {list(manifest.scale)}",
        "image size": str(manifest.image_size),
        "preprocessing": str(manifest.preprocessing),
        "VAE": ", ".join(f"{name} {value}" for name, value in (manifest.vae or {}).items()),
        "sha256 of the labels": str(manifest.labels.sha256) if manifest.labels is not None else "",
    }


def table(rows: dict[str, str]) -> str:
    """Markdown, which TensorBoard renders."""
    return "| | |\n|---|---|\n" + "".join(f"| {name} | {value} |\n" for name, value in rows.items())
