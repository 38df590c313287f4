"""Numbers of the released code, recorded for a tiny random DiT, hold here."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from ditlit.checkpoints import from_released
from ditlit.diffusion import ClassifierFreeGuidance, GaussianDiffusion, ddim, ddpm, samplers
from ditlit.models import DiT

GOLDEN = Path(os.environ.get("DITLIT_GOLDEN") or Path(__file__).parent / "dit_reference.safetensors")


@pytest.fixture(scope="module")
def golden():
    with safe_open(GOLDEN, "pt") as file:
        names = file.keys()
        return {name: file.get_tensor(name) for name in names}, file.metadata()


@pytest.fixture(scope="module")
def numbers(golden):
    return golden[0]


@pytest.fixture(scope="module")
def metadata(golden):
    return golden[1]


@pytest.fixture(scope="module")
def model(numbers, metadata):
    config = json.loads(metadata["config"])
    model = DiT(**config).eval()
    weights = {k.removeprefix("weights."): v for k, v in numbers.items() if k.startswith("weights.")}
    assert_close(model.pos_embed, weights["pos_embed"][0])
    model.load_state_dict(from_released(weights))
    return model


@pytest.fixture(scope="module")
def process():
    return GaussianDiffusion()


def assert_close(actual, expected, rtol=1e-5):
    """Equal to ``rtol``, relative to the largest expected value: single values may cancel to nearly zero."""
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=rtol * expected.abs().max().item())


def guided(model, metadata):
    return ClassifierFreeGuidance(
        model, float(metadata["guidance_scale"]), model.num_classes, int(metadata["guide_channels"])
    )


def test_model_output(model, numbers):
    with torch.no_grad():
        out = model(numbers["model.x"], numbers["model.t"], numbers["model.y"])
    assert_close(out, numbers["model.out"])


@pytest.mark.parametrize("channels", [None, "recorded"])
def test_guidance(model, numbers, metadata, channels):
    scale = float(metadata["guidance_scale"])
    n = None if channels is None else int(metadata["guide_channels"])
    x, t, y = numbers["cfg.x"], numbers["cfg.t"], numbers["cfg.y"]
    with torch.no_grad():
        out = ClassifierFreeGuidance(model, scale, model.num_classes, n)(x, t, y)
    if channels is None:
        assert_close(out[:, : x.shape[1]], numbers["cfgall.eps"])
    else:
        assert_close(out, numbers["cfg3.out"][: len(x)])


def test_schedule_tables(process, numbers):
    T = process.num_timesteps
    t = torch.arange(T)
    alphas_cumprod = numbers["schedule.alphas_cumprod"]
    assert_close(process.alphas_cumprod, alphas_cumprod)
    before = torch.cat([torch.ones(1, dtype=torch.float64), process.alphas_cumprod[:-1]])
    assert_close(1 - process.alphas_cumprod / before, numbers["schedule.betas"])
    one, zero = torch.ones(T, 1, 1, 1), torch.zeros(T, 1, 1, 1)
    coefficient1 = process.posterior_mean(one, zero, t, t - 1)
    coefficient2 = process.posterior_mean(zero, one, t, t - 1)
    log_variance = process.posterior_log_variance(t, t - 1)
    assert_close(coefficient1.flatten().double(), numbers["schedule.posterior_mean_coef1"])
    assert_close(coefficient2.flatten().double(), numbers["schedule.posterior_mean_coef2"])
    assert_close(log_variance.flatten().double(), numbers["schedule.posterior_log_variance_clipped"])
    variance = numbers["schedule.posterior_variance"][1:]
    torch.testing.assert_close(log_variance.flatten()[1:].exp().double(), variance, rtol=1e-5, atol=0)


def test_respacing(process, numbers):
    spacings = {key.split(".")[1] for key in numbers if key.startswith("respace.")}
    assert spacings
    for name in spacings:
        spacing = "ddim" if name.startswith("ddim") else "even"
        timesteps = process.timesteps(int(name.removeprefix("ddim")), spacing).flip(0)
        assert timesteps.tolist() == numbers[f"respace.{name}.timesteps"].tolist()
        alphas_cumprod = torch.cat([torch.ones(1, dtype=torch.float64), process.alphas_cumprod[timesteps]])
        torch.testing.assert_close(
            1 - alphas_cumprod[1:] / alphas_cumprod[:-1], numbers[f"respace.{name}.betas"], rtol=1e-5, atol=0
        )


def test_losses(model, process, numbers):
    with torch.no_grad():
        terms = process.loss(
            model, numbers["loss.x0"], numbers["loss.y"], t=numbers["loss.t"], noise=numbers["loss.noise"]
        )
    assert_close(process.noised(numbers["loss.x0"], numbers["loss.t"], numbers["loss.noise"]), numbers["loss.x_t"])
    torch.testing.assert_close(terms["mse"], numbers["loss.mse"], rtol=1e-5, atol=0)
    for ours, theirs in (("vlb", "vb"), ("loss", "loss")):
        expected = numbers[f"loss.{theirs}"]
        # At t = 0 the reference takes the likelihood from float32 differences of a distribution function.
        rtol = torch.where(numbers["loss.t"] == 0, 1e-3, 1e-5)
        assert ((terms[ours] - expected).abs() <= rtol * expected.abs()).all()


def test_ddpm(model, process, numbers, metadata, monkeypatch):
    recorded = iter(numbers["ddpm.noise"])
    monkeypatch.setattr(samplers, "randn_like", lambda x, generator: next(recorded))
    sample = ddpm(
        process,
        ClassifierFreeGuidance(
            model, float(metadata["guidance_scale"]), model.num_classes, int(metadata["guide_channels"])
        ),
        numbers["ddpm.z"],
        numbers["ddpm.y"],
        process.timesteps(int(metadata["ddpm_steps"])),
    )
    assert_close(sample, numbers["ddpm.sample"], rtol=1e-4)


def test_ddim(model, process, numbers, metadata):
    sample = ddim(
        process,
        ClassifierFreeGuidance(
            model, float(metadata["guidance_scale"]), model.num_classes, int(metadata["guide_channels"])
        ),
        numbers["ddim.z"],
        numbers["ddim.y"],
        process.timesteps(int(metadata["ddim_steps"]), "ddim"),
    )
    assert_close(sample, numbers["ddim.sample"], rtol=1e-4)
