"""A denoiser and a process as a user would write them, in a module that checkpoints may not choose to import."""

import os
import signal

from torch import nn

from ditlit.diffusion import GaussianDiffusion


class OwnDenoiser(nn.Module):
    """Two convolutions that know their class; no transformer."""

    def __init__(self, channels: int = 3, side: int = 8, num_classes: int = 5):
        super().__init__()
        self.config = dict(channels=channels, side=side, num_classes=num_classes)
        self.in_channels, self.input_size, self.num_classes = channels, (side, side), num_classes
        self.enter = nn.Conv2d(channels, 8, 3, padding=1)
        self.labels = nn.Embedding(num_classes + 1, 8)
        self.leave = nn.Conv2d(8, channels, 3, padding=1)

    def forward(self, x_t, t, y):
        return self.leave((self.enter(x_t) + self.labels(y)[:, :, None, None]).relu())


class Mortal(OwnDenoiser):
    """Ends one of several ranks in its first step: by an error, or as the kernel does where memory runs out."""

    def __init__(self, rank: int, killed: bool):
        super().__init__()
        self.config = dict(rank=rank, killed=killed)

    def forward(self, x_t, t, y):
        if os.environ.get("RANK") == str(self.config["rank"]):
            if self.config["killed"]:
                os.kill(os.getpid(), signal.SIGKILL)
            raise RuntimeError("this rank cannot go on")
        return super().forward(x_t, t, y)


class OwnProcess(GaussianDiffusion):
    """Adds a term to the loss; its name is none that a module would have guessed, nor an attribute could bear."""

    def __init__(self, weight: float = 0.5, num_timesteps: int = 1000):
        super().__init__(num_timesteps)
        self.config = dict(weight=weight, num_timesteps=num_timesteps)
        self.weight = weight

    def loss(self, model, x0, y, generator=None, t=None, noise=None):
        terms = super().loss(model, x0, y, generator, t, noise)
        size = x0.abs().flatten(1).mean(1)  # (N,)
        return {"loss": terms["loss"] + self.weight * size, "mse": terms["mse"], "size.of": size}


class Forgetful(OwnProcess):
    """Its config does not say everything that it was built with."""

    def __init__(self, power: float = 2.0, **settings):
        super().__init__(**settings)
        self.power = power
