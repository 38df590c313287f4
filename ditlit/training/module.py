"""The LightningModule: a denoiser, a diffusion process, and the moving average of the denoiser's weights."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from jsonargparse import lazy_instance
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from ditlit import checkpoints
from ditlit.checkpoints import describe
from ditlit.checkpoints.contents import class_of
from ditlit.checkpoints.sizes import HEADS
from ditlit.checkpoints.torch_files import plain_data
from ditlit.data.manifest import Manifest
from ditlit.data.store import per_channel
from ditlit.diffusion import GaussianDiffusion, Sampling, draw_samples
from ditlit.diffusion.noise import mix, normal, sample_generators
from ditlit.diffusion.process import Process, StepCallback
from ditlit.diffusion.sampling import check_finite
from ditlit.errors import InputError, check_positive, counted
from ditlit.models.compiling import compile_blocks
from ditlit.parallel.fsdp2 import split
from ditlit.parallel.shards import whole
from ditlit.resilience.nonfinite import SkipNonFinite
from ditlit.resilience.resuming import (
    begin_at_whole_step,
    check_same_classes,
    check_same_vae,
    count_as_saved,
    forget_absent_callbacks,
    optimizer_settings,
    take_settings,
)
from ditlit.settings import renamed
from ditlit.training.ema import EMA
from ditlit.training.randomness import StepRandomness

GOLDEN_RATIO = 0.6180339887498949
VALIDATION_SEED = 0  # of the validation noise; the same in every run, so that curves compare


class DiTModule(LightningModule):
    """Trains a denoiser on latents and draws samples with it.

    Args:
        denoiser: the network; DiT or any module with its call, ``in_channels``, ``input_size``, ``num_classes`` and
            ``config``.
        process: the diffusion process.
        optimizer: from parameters to an optimizer. The paper: AdamW, learning rate 1e-4, no weight decay.
        lr_scheduler: from an optimizer to a schedule over optimizer steps; constant by default.
        ema: the moving average of the weights that validation and sampling use; null for none.
        class_dropout_prob: probability of replacing a label by the null class, for classifier-free guidance.
        sampling: how samples are drawn.
        seed: of everything random in training; follows seed_everything in the command line.
        init_from: weights to start training from, in any format that ``checkpoints.load`` takes; another number of
            classes or another resolution is allowed. A run that is continued reads them too, but then takes its
            checkpoint's; it can do without this setting.
        max_bad_steps: steps in a row whose gradients are infinite or undefined, after which training goes back to the
            weights of the last checkpoint, and the second time stops. Each such step is skipped.
        compile: compile the denoiser's blocks (torch.compile) for training. The first step of each batch size takes
            seconds longer, the others less time; checkpoints are the same.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        process: Process = lazy_instance(GaussianDiffusion),
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=1e-4, weight_decay=0.0),
        lr_scheduler: LRSchedulerCallable | None = None,
        ema: EMA | None = lazy_instance(EMA),
        class_dropout_prob: float = 0.1,
        sampling: Sampling = Sampling(),
        seed: int = 0,
        init_from: str | None = None,
        max_bad_steps: int = 20,
        compile: bool = False,
    ):
        super().__init__()
        if not 0 <= class_dropout_prob < 1:
            raise InputError(f"class_dropout_prob is a probability below 1, got {class_dropout_prob}")
        check_positive(max_bad_steps=max_bad_steps)
        process, ema = own(process), own(ema)
        check_denoiser(denoiser)
        sampling.check(process, denoiser.in_channels)
        describe(process)  # or a checkpoint could not say how to rebuild it
        self.denoiser = denoiser
        self.process = process
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.ema = ema
        self.class_dropout_prob = class_dropout_prob
        self.sampling = sampling
        self.seed = seed
        self.init_from = init_from
        self.compile_blocks = compile
        self.skip_non_finite = SkipNonFinite(max_bad_steps)
        self.grad_norm: Tensor | None = None  # of the latest optimizer step, before clipping
        self._resumed: dict[str, Any] | None = None  # the checkpoint, until its optimizer is about to be loaded
        self._optimizer_settings: dict[str, Any] = {}  # of this fit
        # x0 = (latent - shift) * scale, from the store. No buffers, which 16-bit training would round: see _apply.
        self.latent_shift = torch.zeros(denoiser.in_channels, 1, 1, dtype=torch.float32)
        self.latent_scale = torch.ones(denoiser.in_channels, 1, 1, dtype=torch.float32)

    # Setting up --------------------------------------------------------------------------------------------------

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "DiTModule":
        """Let shift and scale follow the module to every device; they stay float32 whatever its weights become."""
        super()._apply(fn, recurse)
        device = fn(self.latent_shift).device
        self.latent_shift, self.latent_scale = self.latent_shift.to(device), self.latent_scale.to(device)
        return self

    def configure_callbacks(self) -> Sequence[Callback]:
        if self._trainer is not None:  # which may have trained another module before
            self.trainer.callbacks = [c for c in self.trainer.callbacks if not isinstance(c, EMA)]
        return [self.skip_non_finite] if self.ema is None else [self.ema, self.skip_non_finite]

    def setup(self, stage: str) -> None:
        if self.ema is not None:
            # First in line, so that the other callbacks of a step find the average up to date.
            callbacks = self.trainer.callbacks
            callbacks.insert(0, callbacks.pop(callbacks.index(self.ema)))
        manifest = getattr(self.trainer.datamodule, "manifest", None)
        if manifest is not None:
            self.fit_to(manifest)
        if stage == "fit" and self.compile_blocks:
            compile_blocks(self.denoiser, self.trainer.strategy.root_device)
            getattr(self.process, "compile", lambda: None)()  # a process of the user's may have none
        if stage == "fit" and self.init_from is not None:
            self.initialize(self.init_from, manifest)

    def configure_model(self) -> None:
        if self._trainer is not None:  # load_from_checkpoint has none
            split(self.denoiser, self.trainer.strategy)

    def fit_to(self, manifest: Manifest) -> None:
        """Check that the denoiser is built for a store's latents, and take their shift and scale."""
        built_for = (self.denoiser.in_channels, *self.denoiser.input_size)
        if manifest.shape != built_for:
            c, h, w = manifest.shape
            raise InputError(
                f"the store {self.trainer.datamodule.store} holds latents of shape {manifest.shape}, but the denoiser "
                f"is built for {built_for}; set --model.denoiser.in_channels {c} and --model.denoiser.input_size "
                + (f"{h}" if h == w else f"[{h},{w}]")
            )
        if manifest.num_classes != self.denoiser.num_classes:
            raise InputError(
                f"the store {self.trainer.datamodule.store} has {counted(manifest.num_classes, 'class')}, but the "
                f"denoiser is built for {self.denoiser.num_classes}; set --model.denoiser.num_classes "
                f"{manifest.num_classes}"
            )
        self._take_latents(manifest.shift, manifest.scale)

    def _take_latents(self, shift: Sequence[float], scale: Sequence[float]) -> None:
        """Take a shift and scale, of one value or one for each channel, to where those of before are."""
        self.latent_shift, self.latent_scale = (
            per_channel(values, self.denoiser.in_channels).to(self.latent_shift.device) for values in (shift, scale)
        )

    def initialize(self, source: str, manifest: Manifest | None) -> None:
        """Take the weights of ``source``, before training; the moving average starts from them."""
        # What the shapes of bare weights and the class path in a checkpoint leave open, the configuration has said.
        config, classes = self.denoiser.config, [describe(part)["class_path"] for part in (self.denoiser, self.process)]
        heads = None if config.get("hidden_size") in HEADS else config.get("num_heads")
        contents = checkpoints.read(source, num_heads=heads, trust=classes)
        if manifest is not None:
            check_same_vae(contents.latents, manifest, source, self.trainer.datamodule.store)
        names = getattr(manifest, "class_names", None)
        for line in checkpoints.initialize(self.denoiser, contents, names, source, self.process):
            rank_zero_info(line)
        self.init_from = None  # a second fit of this module continues
        if self.ema is not None:
            self.ema.setup(self.trainer, self, "fit")  # again: it has copied the weights of before

    def configure_optimizers(self) -> Any:
        try:
            optimizer = self.optimizer([p for p in self.denoiser.parameters() if p.requires_grad])
        except (TypeError, ValueError) as error:  # Muon takes matrices only, others want names with the parameters
            raise InputError(f"model.optimizer does not take the denoiser's parameters: {error}") from error
        prefer_fused(optimizer)
        if self.lr_scheduler is None:
            return optimizer
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self.lr_scheduler(optimizer), "interval": "step"},
        }

    # Training ----------------------------------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        self._optimizer_settings = optimizer_settings(self.trainer)
        if self._resumed is not None:
            take_settings(self.trainer, self._resumed, self._optimizer_settings)
        self._resumed = None

    def on_train_start(self) -> None:
        count_as_saved(self.trainer)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Any]:
        terms, t = self.training_terms(batch, batch_idx, self.trainer.global_step)
        return {"loss": terms["loss"].mean(), "terms": {k: v.detach() for k, v in terms.items()}, "t": t}

    def training_terms(self, batch: dict[str, Tensor], batch_idx: int, step: int) -> tuple[dict[str, Tensor], Tensor]:
        """Terms of the loss (N,) for a micro-batch of optimizer step ``step``, and the timesteps (N,) drawn for it."""
        y = batch["labels"]  # (N,)
        draws = self.step_randomness(len(y), batch_idx, step)
        t = draws.timesteps(self.process.sample_timesteps)  # (N,)
        noise = draws.normal(*self.latent_shape)  # (N, C, H, W)
        y = torch.where(draws.uniform() < self.class_dropout_prob, self.denoiser.num_classes, y)  # (N,)
        x0 = self.scaled(batch, draws.normal)  # (N, C, H, W)
        return self.process.loss(self.denoiser, x0, y, t=t, noise=noise), t

    def step_randomness(self, n: int, batch_idx: int, step: int) -> StepRandomness:
        """The random numbers of a step for the n rows of this process, as laid out by ``TrainOrder``."""
        trainer = self.trainer
        part = batch_idx % trainer.accumulate_grad_batches * trainer.world_size + trainer.global_rank
        torch.manual_seed(mix(self.seed, step, part))  # dropout inside the network draws from the global generators
        total = n * trainer.world_size * trainer.accumulate_grad_batches
        return StepRandomness(self.seed, step, total, slice(part * n, (part + 1) * n), self.device)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        return (self.denoiser.in_channels, *self.denoiser.input_size)

    def scaled(self, batch: dict[str, Tensor], normal: Any) -> Tensor:
        """x0 (N, C, H, W) of a batch: raw latents, or a draw from their posterior, shifted and scaled.

        ``normal`` gives the (N, C, H, W) standard normal numbers of the draw.
        """
        if "moments" in batch:
            mean, std = batch["moments"].float().chunk(2, dim=1)
            raw = mean + std * normal(*self.latent_shape)
        else:
            raw = batch["latents"].float()
        return (raw - self.latent_shift) * self.latent_scale

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Compute the gradient norm once, for clipping, for the log and to skip the step where it is not finite."""
        if gradient_clip_algorithm not in (None, "norm"):
            raise InputError("gradients are clipped by norm: remove trainer.gradient_clip_algorithm")
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        self.grad_norm = whole(get_total_norm([p.grad for p in parameters]))
        scaled = getattr(self.trainer.precision_plugin, "scaler", None) is not None
        self.skip_non_finite.check(optimizer, self.grad_norm, scaled)
        if gradient_clip_val:
            clip_grads_with_norm_(parameters, gradient_clip_val, self.grad_norm)

    # Validation --------------------------------------------------------------------------------------------------

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.held_out_loss(batch, "val")

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.held_out_loss(batch, "test")

    def held_out_loss(self, batch: dict[str, Tensor], split: str) -> None:
        """Log the loss with one fixed timestep and noise for each sample, so that it compares across steps and runs.

        Timesteps follow the golden-ratio sequence over the samples' numbers, which spreads them evenly.
        """
        index = batch["index"].tolist()
        generators = sample_generators(VALIDATION_SEED, index)

        def draw(*shape: int) -> Tensor:
            return normal(shape, generators).to(self.device)

        fractions = torch.tensor([i * GOLDEN_RATIO % 1 for i in index], dtype=torch.float64)
        noise = draw(*self.latent_shape)  # (N, C, H, W)
        x0 = self.scaled(batch, draw)  # (N, C, H, W)
        t = self.process.timesteps_at(fractions).to(self.device)  # (N,)
        terms = self.process.loss(self.denoiser, x0, batch["labels"], t=t, noise=noise)
        valid = batch["valid"].float()  # (N,), 0 for the rows that only fill up a batch
        count = valid.sum()
        for name, values in terms.items():
            mean = (values * valid).sum() / count.clamp(min=1)
            # A count of float32 is weighed exactly; Lightning would round the mean of whole ones over processes.
            self.log(
                f"{split}/{name}", mean, on_step=False, on_epoch=True, prog_bar=name == "loss", sync_dist=True,
                batch_size=count,
            )  # fmt: skip

    # Sampling ----------------------------------------------------------------------------------------------------

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        y, indices = batch["labels"], batch["index"].tolist()
        x0 = draw_samples(*self.drawn_from(y, indices, self.seed))
        check_finite(x0, *self.drawn_from(y, indices, self.seed))
        return batch | {"latents": self.raw(x0)}

    def sample(
        self, y: Tensor, indices: Sequence[int], seed: int | None = None, callback: StepCallback | None = None
    ) -> Tensor:
        """Draw raw latents (N, C, H, W) for labels y (N,), with the weights that the denoiser holds now.

        A sample depends on the seed (the run's by default), its global index and its label alone.
        """
        seed = self.seed if seed is None else seed
        return self.raw(draw_samples(*self.drawn_from(y, indices, seed), callback))

    def drawn_from(self, y: Tensor, indices: Sequence[int], seed: int) -> tuple[Any, ...]:
        """The arguments of ``draw_samples`` for these samples."""
        return (
            self.sampling,
            self.process,
            self.denoiser,
            self.latent_shape,
            y,
            self.denoiser.num_classes,
            indices,
            seed,
        )

    def raw(self, x0: Tensor) -> Tensor:
        """Latents as the VAE knows them, from what the denoiser knows."""
        return x0 / self.latent_scale + self.latent_shift

    def averaged(self) -> AbstractContextManager[None]:
        """Inside, the denoiser holds the moving average of its weights."""
        return nullcontext() if self.ema is None else self.ema.averaged(self)

    # Checkpoints -------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # Plain data that rebuild the model: by ``ditlit.checkpoints.load`` and Lightning's ``load_from_checkpoint``.
        checkpoint["hyper_parameters"] = {
            "_instantiator": "lightning.pytorch.cli.instantiate_module",
            "denoiser": describe(self.denoiser),
            "process": describe(self.process),
            "class_dropout_prob": self.class_dropout_prob,
            "seed": self.seed,
        }
        checkpoint["accumulate_grad_batches"] = self.trainer.accumulate_grad_batches
        if self._optimizer_settings:
            checkpoint["optimizer_settings"] = self._optimizer_settings
        checkpoint["latents"] = self._latents()
        manifest = getattr(self.trainer.datamodule, "manifest", None)
        if manifest is not None:
            names = ("kind", "image_size", "preprocessing", "vae", "class_names")
            checkpoint["latents"] |= {name: getattr(manifest, name) for name in names}

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> "DiTModule":
        """Lightning's, for checkpoints too whose settings have names from before."""
        if isinstance(checkpoint_path, (str, Path)) and Path(checkpoint_path).is_file():
            checkpoint = plain_data(checkpoint_path)
            settings = {"model": checkpoint.get("hyper_parameters")}
            if (new := renamed.in_settings(settings)) != settings:
                torch.save(checkpoint | {"hyper_parameters": new["model"]}, checkpoint_path := BytesIO())
                checkpoint_path.seek(0)
        return super().load_from_checkpoint(checkpoint_path, *args, **kwargs)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self._trainer is not None and "loops" in checkpoint:
            begin_at_whole_step(checkpoint, self.trainer.accumulate_grad_batches)
            forget_absent_callbacks(self.trainer, checkpoint)
            if self.trainer.state.fn == "fit" and "optimizer_states" in checkpoint:
                self._resumed = checkpoint
        trained_on = {name: checkpoint["latents"][name] for name in ("shift", "scale")}
        if self._trainer is None or getattr(self.trainer.datamodule, "manifest", None) is None:
            self._take_latents(**trained_on)
        elif trained_on != self._latents():
            raise InputError(
                f"the checkpoint was trained on latents with {trained_on}, but the store "
                f"{self.trainer.datamodule.store} has {self._latents()}; use latents of the same VAE and normalisation"
            )
        else:
            data, where = self.trainer.datamodule, f"the checkpoint {self.trainer.ckpt_path}"
            check_same_vae(checkpoint["latents"], data.manifest, where, data.store)
            check_same_classes(checkpoint["latents"], data.manifest, where, data.store)

    def _latents(self) -> dict[str, list[float]]:
        return {"shift": self.latent_shift.flatten().tolist(), "scale": self.latent_scale.flatten().tolist()}


def own(value: Any) -> Any:
    """A new object in the place of a default of the signature, which all callers would share; others as they are.

    The defaults are jsonargparse's lazy instances, so that the command line can show them.
    """
    if not hasattr(value, "lazy_get_init_args"):
        return value
    return class_of(value)(**value.lazy_get_init_args().as_dict())


def check_denoiser(denoiser: nn.Module) -> None:
    """Raise InputError for a denoiser that could be trained, but neither saved nor sampled."""
    lacking = [name for name in ("in_channels", "input_size", "num_classes", "config") if not hasattr(denoiser, name)]
    if lacking:
        raise InputError(f"the denoiser {type(denoiser).__name__} needs an attribute {', '.join(lacking)}")
    describe(denoiser)


def prefer_fused(optimizer: torch.optim.Optimizer) -> None:
    """Let Adam and AdamW run as one fused kernel where the configuration leaves the choice open."""
    if isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW)):
        for group in optimizer.param_groups:
            if group["fused"] is None and not group["foreach"]:
                group["fused"] = all(p.is_floating_point() and p.device.type in FUSED_DEVICES for p in group["params"])
    # A fused optimizer would divide fp16 gradients by the loss scale itself, after clipping; the scaler must do it
    # first, so that the clipped and logged norm is the true one.
    optimizer._step_supports_amp_scaling = False


FUSED_DEVICES = ("cpu", "cuda", "mps", "xpu")
