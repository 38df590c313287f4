"""Models with random weights, and the forms in which tests of checkpoints want them."""

import torch

from ditlit import checkpoints
from ditlit.checkpoints.names import to_released
from ditlit.diffusion import GaussianDiffusion
from ditlit.models import DiT

LATENTS = {
    "shift": [0.0] * 4,
    "scale": torch.full((4,), 0.18215).tolist(),
    "kind": "moments",
    "image_size": 16,
    "preprocessing": None,
    "vae": {"class": "AutoencoderKL", "source": "a folder"},
    "class_names": ["cat", "dog, the other one", "owl", "cow", "bee", "ant", "elk"],
}
PIXELS = LATENTS | {"shift": [0.0], "scale": [1.0], "kind": "latents", "vae": None, "class_names": None}


def scrambled(seed=0, **config):
    """A DiT with random weights, gates and outputs too."""
    sizes = dict(input_size=8, in_channels=4, num_classes=7, hidden_size=48, num_heads=4, depth=2, patch_size=2)
    model = DiT(**(sizes | config))
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=generator) * 0.1
    return model.eval()


def released(model):
    return to_released(dict(model.named_parameters()), model.patch_size, model.pos_embed.data)


def parameters(module):
    return dict(module.named_parameters())


def assert_same(a, b):
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def contents_of(model, class_names=None, latents=LATENTS):
    return checkpoints.CheckpointContents(
        state=dict(model.state_dict()),
        denoiser=checkpoints.describe(model),
        process=checkpoints.describe(GaussianDiffusion()),
        latents=latents | {"class_names": class_names},
        step=0,
        weights="ema",
        format="test",
    )
