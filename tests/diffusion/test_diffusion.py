"""Diffusion mathematics against closed forms: schedules, loss, samplers on a Gaussian, guidance."""

import math

import pytest
import torch

from ditlit.diffusion import ClassifierFreeGuidance, GaussianDiffusion, Sampling, ddim, ddpm, draw_samples
from ditlit.diffusion.gaussian import discretized_gaussian_log_likelihood, gaussian_kl
from ditlit.errors import InputError

MEAN, STD = 1.5, 0.6


def exact_denoiser(process: GaussianDiffusion):
    """E[eps | x_t] for data distributed as N(MEAN, STD^2)."""

    def model(x_t, t, y):
        alpha, sigma = process.scales(t)
        return sigma * (x_t - alpha * MEAN) / (alpha**2 * STD**2 + sigma**2)

    return model


def sampled(sampler, num_steps, process=None, spacing="even", **kwargs):
    """Mean and standard deviation of 200,000 samples drawn with the exact denoiser."""
    process = process or GaussianDiffusion()
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(200_000, 1, 1, 1, generator=generator)
    y = torch.zeros(len(noise), dtype=torch.long)
    timesteps = process.timesteps(num_steps, spacing)
    x = sampler(process, exact_denoiser(process), noise, y, timesteps, generator, **kwargs)
    return x.mean().item(), x.std().item()


@pytest.mark.parametrize(
    ("sampler", "kwargs"),
    [(ddpm, {}), (ddim, dict(eta=0.0)), (ddim, dict(eta=0.5)), (ddim, dict(eta=1.0))],
    ids=["ddpm", "ddim", "ddim-eta0.5", "ddim-eta1"],
)
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_samplers_recover_a_gaussian(sampler, kwargs, schedule):
    process = GaussianDiffusion(schedule=schedule)
    results = [sampled(sampler, num_steps, process, **kwargs) for num_steps in (10, 50, 250)]
    # The mean is right at any number of steps, up to what is left of it in the noise at T (0.009).
    assert all(abs(mean - MEAN) < 0.01 for mean, _ in results)
    # The deviation converges at first order.
    few, some, many = (abs(std - STD) for _, std in results)
    assert few > 3 * some > 9 * many
    assert many < 0.016


def test_fixed_variances_bracket_the_gaussian():
    """The two fixed choices are the upper and lower bounds of the true reverse variance (Ho et al. 2020, 3.2)."""
    _, large = sampled(ddpm, 20, GaussianDiffusion(fixed_variance="large"))
    _, small = sampled(ddpm, 20, GaussianDiffusion(fixed_variance="small"))
    assert small < STD < large


def test_one_step_starts_from_noise():
    process = GaussianDiffusion()
    assert process.timesteps(1).tolist() == [999]
    x = torch.randn(3, 1, 2, 2)
    expected = process.predict(exact_denoiser(process), x, torch.full((3,), 999), None).x0
    for sampler in (ddpm, ddim):
        torch.testing.assert_close(
            sampler(process, exact_denoiser(process), x, torch.zeros(3), process.timesteps(1)), expected
        )


def test_even_timesteps_cover_both_ends():
    process = GaussianDiffusion()
    for n in (2, 7, 60, 250, 999, 1000):
        t = process.timesteps(n)
        assert t[0] == 999 and t[-1] == 0 and len(t) == n and (t.diff() < 0).all()


def test_ddim_spacing():
    process = GaussianDiffusion()
    assert process.timesteps(50, "ddim").tolist() == list(range(980, -1, -20))
    with pytest.raises(InputError, match=r"gives 60 steps .* nearest that do are 53, 56, 59, 63"):
        process.timesteps(60, "ddim")


@pytest.mark.parametrize("n", [0, 1001])
def test_impossible_step_counts_are_refused(n):
    with pytest.raises(InputError, match="between 1 and 1000"):
        GaussianDiffusion().timesteps(n)


def test_schedules():
    linear, cosine = GaussianDiffusion(), GaussianDiffusion(schedule="cosine")
    assert linear.alphas_cumprod[0] == pytest.approx(1 - 1e-4, rel=1e-12)
    assert linear.alphas_cumprod[-1] / linear.alphas_cumprod[-2] == pytest.approx(1 - 2e-2, rel=1e-12)
    f = [math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2 for u in (0, 0.4)]
    assert cosine.alphas_cumprod[399].item() == pytest.approx(f[1] / f[0], rel=1e-9)
    with pytest.raises(InputError, match="unknown schedule 'sigmoid'"):
        GaussianDiffusion(schedule="sigmoid")


@pytest.mark.parametrize("s", [0, 300, 698])
def test_posterior_and_forward_process_agree(s):
    """Sampling x_t given x0 and then x_s from the posterior gives the marginal of x_s: mean and variance, exactly."""
    process = GaussianDiffusion()
    t, s = torch.tensor([699]), torch.tensor([s])
    one, zero = torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)
    of_x0, of_x_t = process.posterior_mean(one, zero, t, s), process.posterior_mean(zero, one, t, s)
    log_variance = process.posterior_log_variance(t, s)
    (alpha_t, sigma_t), (alpha_s, sigma_s) = process.scales(t), process.scales(s)
    torch.testing.assert_close(of_x0 + of_x_t * alpha_t, alpha_s, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(of_x_t**2 * sigma_t**2 + log_variance.exp(), sigma_s**2, rtol=1e-5, atol=1e-7)


def test_learned_variance_interpolates_between_its_bounds():
    process = GaussianDiffusion()
    t, s = torch.tensor([500]), torch.tensor([499])
    beta = 1 - process.alphas_cumprod[500] / process.alphas_cumprod[499]
    small = beta * (1 - process.alphas_cumprod[499]) / (1 - process.alphas_cumprod[500])
    for v, expected in ((-1.0, small), (1.0, beta), (0.0, (small * beta).sqrt())):
        got = process.log_variance(torch.full((1, 1, 1, 1), v), t, s).exp().item()
        assert got == pytest.approx(expected.item(), rel=1e-5)


def test_vlb_is_zero_for_the_true_posterior_and_grows_with_the_error():
    process = GaussianDiffusion()
    x0 = torch.randn(64, 2, 4, 4)
    noise = torch.randn(64, 2, 4, 4)
    t = torch.randint(1, 1000, (64,))
    perfect = process.loss(lambda *_: torch.cat([noise, -torch.ones_like(noise)], 1), x0, None, t=t, noise=noise)
    assert perfect["vlb"].abs().max() < 1e-4 and perfect["mse"].max() == 0
    wrong = process.loss(lambda *_: torch.cat([noise + 1, -torch.ones_like(noise)], 1), x0, None, t=t, noise=noise)
    # KL of two Gaussians whose means differ by beta / sqrt(1 - beta) / sigma and whose variance is the posterior's.
    alphas_cumprod, previous = process.alphas_cumprod[t], process.alphas_cumprod[t - 1]
    beta = 1 - alphas_cumprod / previous
    shift = beta / (1 - beta).sqrt() / (1 - alphas_cumprod).sqrt()
    expected = 0.5 * shift**2 / (beta * (1 - previous) / (1 - alphas_cumprod)) / math.log(2)
    torch.testing.assert_close(wrong["vlb"], expected.float(), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(wrong["loss"], wrong["mse"] + wrong["vlb"])


def test_no_gradient_of_the_vlb_reaches_the_mean():
    process = GaussianDiffusion()
    out = torch.randn(8, 4, 4, 4, requires_grad=True)
    x0, noise = torch.randn(8, 2, 4, 4), torch.randn(8, 2, 4, 4)
    terms = process.loss(lambda *_: out, x0, None, t=torch.arange(0, 800, 100), noise=noise)
    (gradient,) = torch.autograd.grad(terms["vlb"].sum(), out)
    assert not gradient[:, :2].any() and gradient[:, 2:].any((1, 2, 3)).all()


def test_mse_only():
    out = torch.randn(8, 4, 4, 4)
    x0 = torch.randn(8, 2, 4, 4)
    terms = GaussianDiffusion(vlb_weight=0).loss(lambda *_: out, x0, None, torch.Generator())
    assert set(terms) == {"loss", "mse"} and torch.equal(terms["loss"], terms["mse"])
    terms = GaussianDiffusion().loss(lambda *_: out[:, :2], x0, None, torch.Generator())
    assert set(terms) == {"loss", "mse"}


def test_kl_of_gaussians():
    p = torch.distributions.Normal(torch.tensor(0.3), torch.tensor(0.7))
    q = torch.distributions.Normal(torch.tensor(-0.5), torch.tensor(1.9))
    got = gaussian_kl(p.mean, p.variance.log(), q.mean, q.variance.log())
    torch.testing.assert_close(got, torch.distributions.kl_divergence(p, q))


def test_discretised_likelihood_is_a_distribution_over_bytes():
    values = torch.arange(256) / 127.5 - 1
    log_likelihood = discretized_gaussian_log_likelihood(values, torch.tensor(0.2), torch.tensor(-1.5))
    assert log_likelihood.exp().sum().item() == pytest.approx(1, abs=1e-5)
    exact = torch.distributions.Normal(0.2, math.exp(-1.5))
    middle = values[100:180]
    probability = exact.cdf(middle + 1 / 255) - exact.cdf(middle - 1 / 255)
    torch.testing.assert_close(log_likelihood[100:180].exp(), probability, rtol=0.02, atol=1e-5)


def test_clipping_bounds_x0_and_keeps_x_t():
    process = GaussianDiffusion(clip_x0=True)
    x_t, t = torch.randn(16, 1, 4, 4) * 3, torch.full((16,), 700)
    prediction = process.predict(exact_denoiser(process), x_t, t, None)
    assert prediction.x0.max() == 1
    torch.testing.assert_close(process.noised(prediction.x0, t, prediction.eps), x_t, rtol=1e-5, atol=1e-5)


# Guidance ----------------------------------------------------------------------------------------------------------

NULL = 9


def labelled_model(x_t, t, y):
    """Noise = label + t / 1000, variance = 100 + label; counts the samples it computes."""
    labelled_model.samples += len(y)
    eps = (y + t / 1000)[:, None, None, None].expand_as(x_t)
    return torch.cat([eps, 100.0 + y[:, None, None, None].expand_as(x_t)], 1)


@pytest.fixture
def model():
    labelled_model.samples = 0
    return labelled_model


X, T, Y = torch.zeros(2, 3, 2, 2), torch.tensor([100, 600]), torch.tensor([1, 4])


@pytest.mark.parametrize("scale", [0.0, 0.5, 2.5])
def test_guidance_extrapolates(model, scale):
    out = ClassifierFreeGuidance(model, scale, NULL)(X, T, Y)
    expected = NULL + T / 1000 + scale * (Y - NULL)
    torch.testing.assert_close(out[:, 0, 0, 0], expected)
    assert torch.equal(out[:, :3].amax(1), out[:, :3].amin(1))
    assert torch.equal(out[:, 3:], model(X, T, Y)[:, 3:])  # variances are the conditional model's


def test_guidance_of_the_first_channels(model):
    out = ClassifierFreeGuidance(model, 3.0, NULL, channels=2)(X, T, Y)
    torch.testing.assert_close(out[:, :2], ClassifierFreeGuidance(model, 3.0, NULL)(X, T, Y)[:, :2])
    assert torch.equal(out[:, 2:], model(X, T, Y)[:, 2:])


def test_scale_one_computes_no_unconditional_half(model):
    assert torch.equal(ClassifierFreeGuidance(model, 1.0, NULL)(X, T, Y), model(X, T, Y))
    assert model.samples == 4


def test_guidance_interval(model):
    guided = ClassifierFreeGuidance(model, 3.0, NULL, interval=(500, 1000))
    out = guided(X, T, Y)
    assert torch.equal(out[0], model(X, T, Y)[0])
    assert torch.equal(out[1], ClassifierFreeGuidance(model, 3.0, NULL)(X, T, Y)[1])


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm++"])
def test_samplers_compute_the_unconditional_half_within_the_interval_only(model, sampler):
    settings = dict(sampler=sampler, num_steps=5, guidance_scale=3.0)
    timesteps: list[int] = []
    drawn_from = (GaussianDiffusion(), model, tuple(X.shape[1:]), Y, NULL, range(2))
    draw_samples(Sampling(**settings), *drawn_from, callback=lambda step, t, x, x0: timesteps.append(t))
    inside = timesteps[1:3]
    model.samples = 0
    draw_samples(Sampling(**settings, guidance_interval=(inside[1], inside[0])), *drawn_from)
    assert model.samples == 2 * (5 + 2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [(dict(channels=0), "at least one channel"), (dict(interval=(5, 4)), "lowest timestep above its highest")],
)
def test_bad_guidance_is_refused(model, settings, message):
    with pytest.raises(InputError, match=message):
        ClassifierFreeGuidance(model, 2.0, NULL, **settings)


def test_too_many_guided_channels_are_refused(model):
    with pytest.raises(InputError, match="cannot guide 4 channels of latents that have 3"):
        ClassifierFreeGuidance(model, 2.0, NULL, channels=4)(X, T, Y)


# Sampling keyed by index --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [dict(sampler="ddpm"), dict(sampler="ddim"), dict(sampler="ddim", eta=1.0)])
def test_a_sample_depends_on_its_index_not_on_its_batch(settings):
    process = GaussianDiffusion()
    sampling = Sampling(num_steps=5, guidance_scale=1.0, **settings)
    y = torch.zeros(6, dtype=torch.long)

    def draw(indices):
        return draw_samples(
            sampling, process, exact_denoiser(process), (2, 4, 4), y[: len(indices)], NULL, indices, seed=3
        )

    together = draw([0, 1, 2, 3, 4, 5])
    assert torch.equal(torch.cat([draw([4, 2]), draw([0])]), together[[4, 2, 0]])
    assert len({tuple(x.flatten().tolist()) for x in together}) == 6


def test_callback_sees_every_step():
    seen = []
    process = GaussianDiffusion()
    sampling = Sampling(num_steps=4, guidance_scale=1.0)
    x = draw_samples(
        sampling, process, exact_denoiser(process), (1, 2, 2), torch.zeros(1), NULL, [0],
        callback=lambda step, t, x, x0: seen.append((step, t, x, x0)),
    )  # fmt: skip
    assert [(step, t) for step, t, _, _ in seen] == list(enumerate(process.timesteps(4).tolist()))
    assert torch.equal(seen[-1][2], x) and torch.equal(seen[-1][3], x)


def test_eta_belongs_to_ddim():
    with pytest.raises(InputError, match="eta belongs to the ddim sampler"):
        Sampling(sampler="ddpm", eta=0.5)
