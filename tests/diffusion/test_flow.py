"""Rectified flow: the numbers of SiT's code, closed forms for its loss, and a Gaussian that every sampler recovers."""

import json
import os
from importlib import import_module
from pathlib import Path

import pytest
import torch
from calls import convert
from safetensors import safe_open

from ditlit import checkpoints
from ditlit.checkpoints import from_released
from ditlit.checkpoints.flows import turned, with_empty_variance, without_variance
from ditlit.diffusion import ClassifierFreeGuidance, GaussianDiffusion, RectifiedFlow, Sampling, draw_samples, samplers
from ditlit.errors import InputError
from ditlit.models import DiT
from ditlit.settings import SAMPLERS

GOLDEN = Path(os.environ.get("DITLIT_GOLDEN_SIT") or Path(__file__).parents[1] / "models" / "sit_reference.safetensors")
MEAN, STD = 1.5, 0.6


@pytest.fixture(scope="module")
def golden():
    with safe_open(GOLDEN, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()} | file.metadata()  # noqa: SIM118


@pytest.fixture(scope="module")
def released(golden):
    return from_released({k.removeprefix("weights."): v for k, v in golden.items() if k.startswith("weights.")})


@pytest.fixture(scope="module")
def model(golden, released):
    config = json.loads(golden["config"]) | {"learn_sigma": False}
    model = DiT(**config).eval()
    model.load_state_dict(turned(without_variance(released, config["in_channels"])))
    return model


@pytest.fixture(scope="module")
def flow():
    return RectifiedFlow(direction_weight=1.0)


def assert_close(actual, expected, rtol=1e-5):
    """Equal to ``rtol``, relative to the largest expected value: single values may cancel to nearly zero."""
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=rtol * expected.abs().max().item())


# SiT asks with tau = 1 - t and is answered -v.


def test_model_output(model, golden):
    assert_close(-model(golden["model.x"], 1 - golden["model.tau"], golden["model.y"]), golden["model.out"])


def test_loss(model, flow, golden):
    numbers = {name: golden[f"loss.{name}"] for name in ("x0", "noise", "tau", "y")}
    x0, noise, tau, y = numbers.values()
    t = 1 - tau
    assert_close(flow.noised(x0, t, noise), golden["loss.x_tau"])
    terms = flow.loss(model, x0, y, t=t, noise=noise)
    assert_close(terms["mse"], golden["loss.mse"])
    assert_close(terms["direction"], golden["loss.cosine"])
    assert_close(terms["loss"], golden["loss.mse"] + golden["loss.cosine"])
    assert flow.loss(model, x0, y, t=t, noise=noise).keys() - RectifiedFlow().loss(
        model, x0, y, t=t, noise=noise
    ).keys() == {"direction"}
    prediction = flow.predict(model, golden["loss.x_tau"], t, y)
    assert_close(prediction.x0, golden["loss.x0_pred"])
    assert_close(prediction.eps, golden["loss.eps"])
    assert_close(-prediction.eps / t[:, None, None, None], golden["loss.score"])


@pytest.mark.parametrize(("key", "channels"), [("cfgall", None), ("cfg3", 3)])
def test_guidance(model, golden, key, channels):
    guided = ClassifierFreeGuidance(model, float(golden["guidance_scale"]), model.num_classes, channels)
    assert_close(-guided(golden["cfg.x"], 1 - golden["cfg.tau"], golden["cfg.y"]), golden[f"{key}.velocity"])


@pytest.mark.parametrize("name", ["euler", "ddim", "heun", "sde"])
def test_samples(model, flow, golden, monkeypatch, name):
    kind = "euler" if name == "ddim" else name
    steps = int(golden["sde_steps" if kind == "sde" else "ode_steps"])
    noise = iter(golden["sde.noise"])
    monkeypatch.setattr(samplers, "randn_like", lambda x, generator: next(noise))
    guided = ClassifierFreeGuidance(model, float(golden["guidance_scale"]), model.num_classes)
    sampler = samplers.ddim if name in ("euler", "ddim") else getattr(samplers, name)
    x = sampler(flow, guided, golden["sample.z"], golden["sample.y"], flow.timesteps(steps))
    assert_close(x, golden[f"{kind}.sample"], rtol=1e-4)


def test_released_weights_go_back(released, golden):
    channels = json.loads(golden["config"])["in_channels"]
    ours = turned(without_variance(released, channels))
    back = with_empty_variance(turned(ours), channels)
    half = without_variance(released, channels)
    assert back.keys() == released.keys()
    for name, value in without_variance(back, channels).items():
        assert_close(value, half[name], rtol=1e-6)
    assert all(not back[name].unflatten(0, (-1, 2 * channels))[:, channels:].any() for name in ("final.linear.weight",))


@pytest.mark.parametrize("kind", ["sit", "repa"])
def test_released_files_are_read_and_written(golden, released, model, tmp_path, kind, capsys):
    """A file has DiT's keys, so that one says whose it is; REPA's projectors say it."""
    file = {k.removeprefix("weights."): v for k, v in golden.items() if k.startswith("weights.")}
    file |= {"projectors.0.0.weight": torch.ones(2, 2)} if kind == "repa" else {}
    torch.save(file, tmp_path / "released.pt")
    heads = json.loads(golden["config"])["num_heads"]
    said = {"process": "sit"} if kind == "sit" else {}
    loaded = checkpoints.load(tmp_path / "released.pt", num_heads=heads, **said)
    assert type(loaded.process) is RectifiedFlow
    assert loaded.format == f"released weights of {'SiT' if kind == 'sit' else 'REPA'}"
    assert "the second half of the outputs, which these models never train, is dropped" in capsys.readouterr().out
    x, tau, y = golden["model.x"], golden["model.tau"], golden["model.y"]
    t, sign = (1 - tau, -1) if kind == "sit" else (tau, 1)  # REPA asks with noise's time and is answered v
    assert_close(sign * loaded.denoiser(x, t, y), golden["model.out"])
    convert(str(tmp_path / "released.pt"), str(tmp_path / "ours.safetensors"), num_heads=heads, **said)
    convert(str(tmp_path / "ours.safetensors"), str(tmp_path / "back.pt"), to="sit")
    back = torch.load(tmp_path / "back.pt")
    half = json.loads(golden["config"])["in_channels"]
    if kind == "sit":
        ours, theirs = (without_variance(from_released(each), half) for each in (back, file))
        assert all(torch.allclose(ours[name], theirs[name], rtol=0, atol=1e-6) for name in theirs)
    again = checkpoints.load(tmp_path / "back.pt", num_heads=heads, process="sit")
    assert_close(again.denoiser(x, t, y), loaded.denoiser(x, t, y))


def test_what_sits_format_cannot_hold_is_refused(source, tmp_path):
    sizes = dict(input_size=8, in_channels=4, num_classes=5, patch_size=4, hidden_size=16, depth=1, num_heads=2)
    for name, model, process, said in (
        ("gaussian", DiT(**sizes), GaussianDiffusion(), "holds a RectifiedFlow only"),
        ("variance", DiT(**sizes), RectifiedFlow(), "predict a velocity and nothing else"),
        ("x0", DiT(**sizes, learn_sigma=False), RectifiedFlow("x0"), "predict a velocity and nothing else"),
    ):
        path = source(model, process, name=f"{name}.safetensors")
        with pytest.raises(InputError, match=said):
            convert(path, str(tmp_path / f"{name}.pt"), to="sit")
    with pytest.raises(InputError, match="the released format holds a GaussianDiffusion only"):
        convert(path, str(tmp_path / "x.pt"))


# Closed forms


def exact(flow, mean=MEAN, std=STD):
    """E[v | x_t], or E[x0 | x_t], for data distributed as N(mean, std^2)."""

    def model(x_t, t, y):
        alpha, sigma = flow.scales(t)
        variance = alpha**2 * std**2 + sigma**2
        x0 = mean + alpha * std**2 * (x_t - alpha * mean) / variance
        eps = sigma * (x_t - alpha * mean) / variance
        return x0 if flow.prediction == "x0" else eps - x0

    return model


def drawn(flow, sampler, num_steps, n=200_000, **settings):
    sampling = Sampling(sampler, num_steps, guidance_scale=1.0, **settings)
    sampling.check(flow, 1)
    y = torch.zeros(n, dtype=torch.long)
    module, _, name = SAMPLERS[sampler].path.rpartition(".")
    function = getattr(import_module(module), name)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(n, 1, 1, 1, generator=generator)
    extra = {"shift": sampling.shift} if sampler in ("dpm++", "unipc") else {}
    x = function(flow, exact(flow), noise, y, flow.timesteps(num_steps, shift=sampling.shift), generator, **extra)
    return x.mean().item(), x.std().item()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of diffusers about numpy
@pytest.mark.parametrize(("sampler", "order"), [("euler", 1), ("sde", 1), ("heun", 2), ("dpm++", 2), ("unipc", 2)])
def test_samplers_recover_a_gaussian(sampler, order):
    """Mean and deviation come nearer with the sampler's order in the number of steps."""
    results = [drawn(RectifiedFlow(), sampler, steps) for steps in (10, 40, 160)]
    few, some, many = (abs(mean - MEAN) + abs(std - STD) for mean, std in results)
    assert many < (0.02 if order == 1 else 0.006), results
    assert few > 2 * some or few < 0.006, results


@pytest.mark.parametrize("sampler", ["euler", "heun"])
def test_predictions_of_clean_data_are_the_same_flow(sampler):
    """As long as no step begins where their velocity is clamped, below 0.05. Heun's last step is Euler's there."""
    for steps in (5, 20):
        found, expected = (drawn(RectifiedFlow(kind), sampler, steps, n=20_000) for kind in ("x0", "velocity"))
        assert found == pytest.approx(expected, abs=1e-4 if sampler == "euler" else 0.05)


def test_ddim_is_euler_and_a_shift_moves_steps_to_the_noise():
    flow, shift = RectifiedFlow(), 3.0
    t = flow.timesteps(10, shift=shift)
    even = torch.arange(10, 0, -1) / 10
    assert_close(t, shift * even / (1 + (shift - 1) * even))
    x, y = torch.randn(4, 1, 2, 2), torch.zeros(4, dtype=torch.long)
    expected, model = x, exact(flow)
    for now, then in zip(t, [*t[1:], 0.0], strict=True):
        expected = expected + (then - now) * model(expected, torch.full((4,), now), y)
    assert_close(samplers.ddim(flow, model, x, y, t), expected)
    assert Sampling("euler", 10, shift=3.0).shift == 3


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_solvers_of_diffusers_take_the_shift_too():
    flow = RectifiedFlow()
    seen = []
    settings = dict(guidance_scale=1.0, shift=3.0)
    y = torch.zeros(2, dtype=torch.long)
    draw_samples(Sampling("dpm++", 5, **settings), flow, exact(flow), (1, 2, 2), y, 1, range(2), 0,
                 lambda step, t, x, x0: seen.append(t))  # fmt: skip
    even = torch.linspace(0.999, 0, 6)[:-1]
    assert_close(torch.tensor(seen), 3 * even / (1 + 2 * even), rtol=1e-3)


def test_the_sde_keeps_mean_and_variance_at_every_time():
    """Its marginals are those of the flow: N((1 - t) mean, (1 - t)^2 std^2 + t^2)."""
    flow, found = RectifiedFlow(), []
    n = 100_000
    generator = torch.Generator().manual_seed(0)
    noise, y = torch.randn(n, 1, 1, 1, generator=generator), torch.zeros(n, dtype=torch.long)
    t = flow.timesteps(200)
    samplers.sde(flow, exact(flow), noise, y, t, generator, lambda step, t, x, x0: found.append((x.mean(), x.std())))
    times = [1 - 0.96 * i / 199 for i in range(1, 200)] + [0.0]
    for (mean, std), time in list(zip(found, times, strict=True))[::20]:
        assert abs(mean - (1 - time) * MEAN) < 0.02
        assert abs(std - ((1 - time) ** 2 * STD**2 + time**2) ** 0.5) < 0.02


def test_x0_prediction_has_the_same_clamp_in_answer_and_target():
    """Near data the velocity is divided by 0.05, so that its error is that of x0 over 0.05, squared."""
    flow = RectifiedFlow("x0")
    x0, noise, t = torch.randn(3, 1, 2, 2), torch.randn(3, 1, 2, 2), torch.tensor([0.01, 0.05, 0.5])
    terms = flow.loss(lambda x, t, y: x0 + 0.1, x0, torch.zeros(3), t=t, noise=noise)
    assert_close(terms["mse"], (0.1 / torch.tensor([0.05, 0.05, 0.5])) ** 2)
    exactly = flow.loss(lambda x, t, y: x0, x0, torch.zeros(3), t=t, noise=noise)
    assert exactly["mse"].abs().max() < 1e-8


@pytest.mark.parametrize("settings", [{}, dict(distribution="logit_normal", mean=-0.4, std=0.7), dict(shift=3.0)])
def test_training_times_are_distributed_as_said(settings):
    flow = RectifiedFlow(**settings)
    t = flow.sample_timesteps(200_000, torch.Generator().manual_seed(0)).sort().values
    u = torch.linspace(0, 1, 201, dtype=torch.float64)[1:-1]
    if "distribution" in settings:
        quantiles = torch.sigmoid(-0.4 + 0.7 * torch.special.ndtri(u))
    else:
        s = settings.get("shift", 1.0)
        quantiles = s * u / (1 + (s - 1) * u)
    assert (torch.quantile(t.double(), u) - quantiles).abs().max() < 0.005


def test_samplers_that_do_not_fit_are_refused_with_those_that_do():
    with pytest.raises(InputError, match=r"^ddpm is no sampler for RectifiedFlow; choose euler, heun, sde, ddim"):
        Sampling("ddpm").check(RectifiedFlow(), 4)
    for name in ("euler", "heun", "sde"):
        with pytest.raises(InputError, match=rf"^{name} is no sampler for GaussianDiffusion; choose ddpm, ddim, dpm"):
            Sampling(name).check(GaussianDiffusion(), 4)
    with pytest.raises(InputError, match="shift belongs to flows"):
        Sampling("ddim", shift=2.0).check(GaussianDiffusion(), 4)
    with pytest.raises(InputError, match="no timesteps for spacing 'ddim'"):
        Sampling("ddim", spacing="ddim").check(RectifiedFlow(), 4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(prediction="eps"), "prediction is one of velocity, x0"),
        (dict(distribution="normal"), "distribution is one of uniform, logit_normal"),
        (dict(std=0.0), "std must be positive"),
        (dict(shift=-1.0), "shift must be positive"),
        (dict(direction_weight=-1.0), "direction_weight cannot be negative"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        RectifiedFlow(**settings)


def test_clipping_bounds_x0_and_keeps_x_t():
    flow = RectifiedFlow(clip_x0=True)
    x_t, t = 3 * torch.randn(5, 1, 4, 4), torch.tensor([0.1, 0.3, 0.5, 0.9, 1.0])
    prediction = flow.predict(lambda x, t, y: torch.randn_like(x), x_t, t, None)
    assert prediction.x0.abs().max() <= 1
    alpha, sigma = flow.scales(t)
    assert_close(alpha * prediction.x0 + sigma * prediction.eps, x_t)


@pytest.mark.parametrize("sampler", ["euler", "heun", "sde"])
def test_a_sample_depends_on_its_index_not_on_its_batch(sampler):
    flow = RectifiedFlow()
    sampling = Sampling(sampler, 4, guidance_scale=2.0, guidance_interval="0.2,0.8")

    def model(x_t, t, y):
        return (x_t * (1 + y[:, None, None, None])).tanh() - t[:, None, None, None]

    def draw(indices):
        y = torch.tensor(indices) % 3
        return draw_samples(sampling, flow, model, (2, 4, 4), y, 3, indices, seed=1)

    assert torch.equal(draw([0, 1, 2, 3])[[1, 3]], draw([1, 3]))
