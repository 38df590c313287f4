"""Samplers against diffusers' schedulers, and diffusers' solvers on our processes."""

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from ditlit.diffusion import GaussianDiffusion, Sampling, ddim, ddpm, draw_samples
from ditlit.errors import InputError

SETTINGS = dict(num_train_timesteps=1000, beta_start=1e-4, beta_end=2e-2, beta_schedule="linear", clip_sample=False)


def denoiser(x, t, y):
    """Some smooth function of all its arguments, with a variance."""
    time = t[:, None, None, None].float() / 1000
    eps = torch.tanh(x + time + 0.1 * y[:, None, None, None])
    return torch.cat([eps, torch.sin(3 * x) * (1 - time)], 1)


def start():
    return torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2])


@pytest.mark.parametrize("num_steps", [10, 50, 250])
def test_ddpm_walks_the_path_of_diffusers(num_steps):
    x, y = start()
    process = GaussianDiffusion()
    ours = ddpm(process, denoiser, x, y, process.timesteps(num_steps), torch.Generator().manual_seed(1))
    scheduler = DDPMScheduler(**SETTINGS, variance_type="learned_range", timestep_spacing="linspace")
    scheduler.set_timesteps(num_steps)
    generator = torch.Generator().manual_seed(1)
    for t in scheduler.timesteps:
        x = scheduler.step(denoiser(x, t.expand(3), y), t, x, generator=generator).prev_sample
    torch.testing.assert_close(ours, x, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize(("num_steps", "eta"), [(10, 0.0), (50, 0.0), (50, 1.0)])
def test_ddim_walks_the_path_of_diffusers(num_steps, eta):
    x, y = start()
    process = GaussianDiffusion()
    timesteps = process.timesteps(num_steps, "ddim")
    ours = ddim(process, denoiser, x, y, timesteps, torch.Generator().manual_seed(1), eta=eta)
    scheduler = DDIMScheduler(**SETTINGS, timestep_spacing="leading", steps_offset=0, set_alpha_to_one=True)
    scheduler.set_timesteps(num_steps)
    generator = torch.Generator().manual_seed(1)
    for t in scheduler.timesteps:
        eps = denoiser(x, t.expand(3), y)[:, :2]
        x = scheduler.step(eps, t, x, eta=eta, generator=generator).prev_sample
    torch.testing.assert_close(ours, x, rtol=2e-4, atol=2e-4)


MEAN, STD = 0.7, 0.4


def exact(process):
    """The noise prediction of data that are N(MEAN, STD^2) at every position."""

    def model(x, t, y):
        alpha, sigma = process.scales(t)
        return sigma * (x - alpha * MEAN) / (alpha**2 * STD**2 + sigma**2)

    return model


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of diffusers about numpy
@pytest.mark.parametrize("sampler", ["dpm++", "unipc", "deis"])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_fast_solvers_recover_a_gaussian_at_second_order(sampler, schedule):
    process = GaussianDiffusion(schedule=schedule)
    y = torch.zeros(4, dtype=torch.long)
    noise = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    # The ordinary differential equation maps quantiles to quantiles: x0 = mean + std * (x_T standardised).
    alpha, sigma = process.scales(torch.tensor([process.num_timesteps - 1]))
    truth = MEAN + STD * (noise - alpha * MEAN) / (alpha**2 * STD**2 + sigma**2).sqrt()
    errors = []
    for num_steps in (10, 20, 40):
        settings = Sampling(sampler=sampler, num_steps=num_steps, guidance_scale=1.0)
        x = draw_samples(settings, process, exact(process), (1, 8, 8), y, 1, range(4), noise=noise)
        errors.append((x - truth).abs().max().item())
    first = ddim(process, exact(process), noise, y, process.timesteps(20))
    assert errors[0] > errors[1] > errors[2] and errors[2] < 0.035
    assert errors[1] < (first - truth).abs().max().item() / 2  # better than first order at the same cost


def test_fast_solvers_start_at_the_last_timestep_and_spread_evenly():
    process, visited = GaussianDiffusion(), []
    noise, y = torch.zeros(1, 1, 2, 2), torch.zeros(1, dtype=torch.long)
    settings = Sampling(sampler="dpm++", num_steps=9, guidance_scale=1.0)
    draw_samples(
        settings,
        process,
        exact(process),
        (1, 2, 2),
        y,
        1,
        [0],
        callback=lambda step, t, *_: visited.append(t),
        noise=noise,
    )
    assert visited == [999, 888, 777, 666, 555, 444, 333, 222, 111]


def test_settings_that_do_not_fit_are_refused():
    with pytest.raises(InputError, match="evenly spaced and has no eta: leave eta and spacing alone"):
        Sampling(sampler="dpm++", eta=0.5)
    process = GaussianDiffusion()
    with pytest.raises(InputError, match="num_steps must lie between 1 and 1000"):
        Sampling(num_steps=2000).check(process, 4)
    with pytest.raises(InputError, match="cannot guide 5 channels of latents that have 4"):
        Sampling(guidance_channels=5).check(process, 4)
