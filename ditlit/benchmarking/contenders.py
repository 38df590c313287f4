"""diffusers' DiT of equal depth and width, trained and sampled as ours is."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from ditlit.errors import InputError
from ditlit.models import DiT
from ditlit.training import DiTModule
from ditlit.training.module import prefer_fused


def check_comparable(denoiser: nn.Module) -> None:
    """Raise InputError where diffusers has no model of a denoiser's sizes."""
    if not isinstance(denoiser, DiT) or denoiser.input_size[0] != denoiser.input_size[1]:
        raise InputError("--compare diffusers needs a DiT on square latents: diffusers has no other")
    config = denoiser.config
    for name, value in {"mlp_ratio": 4, "conditioning": "adaln_zero"}.items():
        if config.get(name, value) != value:
            raise InputError(f"--compare diffusers needs {name} {value}, not {config[name]}: diffusers has no other")
    if not isinstance(config["gradient_checkpointing"], bool):
        raise InputError(
            "--compare diffusers needs gradient_checkpointing true or false: diffusers recomputes all blocks or none"
        )


class DiffusersDiT(nn.Module):
    """A DiTTransformer2DModel with the call of a denoiser.

    Args:
        denoiser: whose sizes it gets; see :func:`check_comparable`.
    """

    def __init__(self, denoiser: DiT):
        from diffusers import DiTTransformer2DModel  # takes seconds to import

        super().__init__()
        config = denoiser.config
        self.model = DiTTransformer2DModel(
            num_attention_heads=config["num_heads"],
            attention_head_dim=config["hidden_size"] // config["num_heads"],
            in_channels=denoiser.in_channels,
            out_channels=denoiser.out_channels,
            num_layers=config["depth"],
            dropout=config["dropout"],
            sample_size=denoiser.input_size[0],
            patch_size=denoiser.patch_size,
            num_embeds_ada_norm=denoiser.num_classes,
            norm_eps=1e-6,
        )
        self.in_channels, self.input_size = denoiser.in_channels, denoiser.input_size
        self.num_classes = denoiser.num_classes
        if config["gradient_checkpointing"]:
            self.model.enable_gradient_checkpointing()

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """x_t (N, C, H, W), t (N,), y (N,) -> (N, C or 2C, H, W)."""
        return self.model(x_t.to(self.model.dtype), t, y).sample


class DiffusersTraining:
    """A training step of :class:`DiffusersDiT` on given batches: loss, gradients, clipping, optimizer and average.

    Args:
        trainer: whose precision, clipping and device are used.
        module: whose loss, optimizer and average are used.
    """

    def __init__(self, trainer: Trainer, module: DiTModule):
        self.trainer, self.module = trainer, module
        dtype = next(module.denoiser.parameters()).dtype
        self.denoiser = DiffusersDiT(module.denoiser).to(module.device, dtype).train()
        if module.compile_blocks:
            for block in self.denoiser.model.transformer_blocks:
                block.compile(dynamic=False)
        self.parameters = [p for p in self.denoiser.parameters() if p.requires_grad]
        self.optimizer = module.optimizer(self.parameters)
        prefer_fused(self.optimizer)
        self.average = None
        if module.ema is not None:
            self.average = [p.detach().float().clone() for p in self.parameters]

    def __call__(self, batches: Sequence[dict[str, Any]]) -> None:
        for number, batch in enumerate(batches):
            with self.trainer.precision_plugin.forward_context():
                x0 = self.module.scaled(batch, self._normal(len(batch["labels"])))  # (N, C, H, W)
                loss = self.module.process.loss(self.denoiser, x0, batch["labels"])["loss"].mean() / len(batches)
            if number == 0:
                self.optimizer.zero_grad()  # where Lightning does it
            loss.backward()
        if self.trainer.gradient_clip_val:
            clip_grad_norm_(self.parameters, self.trainer.gradient_clip_val)
        self.optimizer.step()
        if self.average is not None:
            current = [p.detach().float() for p in self.parameters]
            torch._foreach_lerp_(self.average, current, 1 - self.module.ema.decay)

    def _normal(self, n: int) -> Callable[..., Tensor]:
        return lambda *shape: torch.randn(n, *shape, device=self.module.device)
