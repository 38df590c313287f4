"""What the notebooks are told: each function against values known beforehand."""

import copy

import numpy as np
import pytest
import torch
import yaml
from diffusers import AutoencoderKL
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from weights import scrambled

from ditlit import analysis
from ditlit.data import write_store
from ditlit.data.digits import DigitJudge, load_digits
from ditlit.diffusion import GaussianDiffusion, Sampling
from ditlit.diffusion.noise import sample_generators
from ditlit.errors import InputError
from ditlit.images.vae import Autoencoder
from ditlit.models import DiT, probes
from ditlit.models.conditioning import DESIGNS
from ditlit.pictures import to_uint8

SIZES = dict(input_size=8, in_channels=4, num_classes=7, hidden_size=48, num_heads=4, depth=3, patch_size=2)
T, Y = torch.tensor([0, 500, 999]), torch.tensor([1, 7, 3])


def noisy(n=3, seed=0):
    return torch.randn(n, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


# Attention and activations --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("conditioning", DESIGNS)
@pytest.mark.parametrize("block", [0, -1])
def test_attention_maps_times_values_are_what_attention_gives(block, conditioning):
    model = scrambled(depth=3, conditioning=conditioning)
    maps = analysis.attention_maps(model, noisy(), T, Y, block)
    tokens = 18 if conditioning == "in_context" else 16
    assert maps.shape == (3, 4, tokens, tokens)
    torch.testing.assert_close(maps.sum(-1), torch.ones(3, 4, tokens), rtol=1e-6, atol=1e-6)
    values, given = {}, {}
    with (
        torch.no_grad(),
        probes.watch_attention(model, lambda i, q, k, v: values.update({i: v})),
        probes.watch(model, [b.attn.out for b in model.blocks], lambda i, x, _: given.update({i: x})),
    ):
        model(noisy(), T, Y)
    expected = (maps @ values[block % 3]).transpose(1, 2).flatten(2)
    torch.testing.assert_close(expected, given[block % 3], rtol=1e-5, atol=1e-5)


def test_there_are_maps_of_the_blocks_that_there_are():
    with pytest.raises(InputError, match="there is no block 3: this denoiser has blocks 0 to 2"):
        analysis.attention_maps(scrambled(depth=3), noisy(), T, Y, 3)


def test_attended_distance_of_heads_that_look_at_known_places():
    at_itself, left_to_right = torch.eye(6), torch.zeros(6, 6)
    left_to_right[torch.arange(6), [2, 1, 0, 5, 4, 3]] = 1  # in a grid of 2 x 3, the columns mirrored
    corner = torch.zeros(6, 6)
    corner[:, 0] = 1
    distances = analysis.attended_distance(torch.stack([at_itself, left_to_right, corner])[None], (2, 3))
    to_corner = (0 + 1 + 2 + 1 + 2**0.5 + 5**0.5) / 6
    torch.testing.assert_close(distances[0], torch.tensor([0, 8 / 6, to_corner]), rtol=1e-5, atol=1e-5)
    with_others = torch.zeros(8, 8)
    with_others[:6, :6], with_others[:6, 6:] = 0.5 * corner, 0.25
    torch.testing.assert_close(analysis.attended_distance(with_others[None, None], (2, 3))[0, 0], distances[0, 2])
    with pytest.raises(InputError, match="maps of 6 tokens are not those of a picture of 3x3 patches"):
        analysis.attended_distance(at_itself[None, None], (3, 3))


def test_sizes_are_those_of_the_tokens_and_logits():
    model = scrambled()
    found = analysis.sizes(model, noisy(), T, Y)
    tokens, logits = [], []
    with (
        torch.no_grad(),
        probes.watch_blocks(model, lambda i, before, after: tokens.append(after)),
        probes.watch_attention(model, lambda i, q, k, v: logits.append(q @ k.mT / 12**0.5)),
    ):
        model(noisy(), T, Y)
    tokens, logits = torch.stack(tokens), torch.stack(logits)  # (depth, N, T, D), (depth, N, heads, T, T)
    torch.testing.assert_close(found.largest, tokens.abs().amax((2, 3)))
    torch.testing.assert_close(found.norm, tokens.square().mean(-1).sqrt().mean(-1))
    torch.testing.assert_close(found.logit, logits.amax((2, 3, 4)))


# Gates ----------------------------------------------------------------------------------------------------------------


def test_a_fresh_model_has_closed_gates_and_blocks_that_are_the_identity():
    model = DiT(**SIZES)
    gates = analysis.gate_values(model, T, Y)
    assert gates.shape == (3, 2, 3, 48) and not gates.any()
    assert not analysis.block_changes(model, noisy(), T, Y).any()


def test_gates_are_those_that_the_modulation_gives():
    model = scrambled()
    c = nn.functional.silu(model.time_embed(T) + model.label_embed(Y))
    rows = {0: slice(2 * 48, 3 * 48), 1: slice(5 * 48, None)}  # shift, scale, gate of each branch
    gates = analysis.gate_values(model, T, Y)
    for number, block in enumerate(model.blocks):
        for branch, part in rows.items():
            expected = c @ block.modulation.weight[part].T + block.modulation.bias[part]
            torch.testing.assert_close(gates[number, branch], expected, rtol=1e-5, atol=1e-5)


def test_a_block_with_one_open_gate_changes_the_tokens_by_its_branch():
    """With everything but a bias at zero the MLP adds gate * bias to each token."""
    model = DiT(**SIZES)
    nn.init.constant_(model.blocks[1].mlp.fc_out.bias, 0.5)
    model.blocks[1].modulation.bias.data[5 * 48 :] = 0.25
    nn.init.zeros_(model.blocks[1].mlp.fc_out.weight)
    changes = analysis.block_changes(model, noisy(), T, Y)
    before = []
    with torch.no_grad(), probes.watch_blocks(model, lambda i, x, _: before.append(x)):
        model(noisy(), T, Y)
    expected = 0.5 * 0.25 * (16 * 48) ** 0.5 / before[1].flatten(1).norm(dim=1)
    torch.testing.assert_close(changes[1], expected, rtol=1e-4, atol=1e-6)
    assert not changes[0].any() and not changes[2].any()


@pytest.mark.parametrize("design", ["in_context", "cross_attention", "adaln"])
def test_a_design_without_gates_is_told_so_and_its_blocks_are_not_the_identity(design):
    model = DiT(**SIZES, conditioning=design)
    block = type(model.blocks[0]).__name__
    with pytest.raises(InputError, match=f"gates belong to adaLN-Zero, and this denoiser's {block} has none"):
        analysis.gate_values(model, T, Y)
    assert (analysis.block_changes(model, noisy(), T, Y) > 0.1).all()


# Weights and labels ---------------------------------------------------------------------------------------------------


def test_weight_distances_of_known_weights():
    raw = scrambled(depth=3)
    average = copy.deepcopy(raw)
    average.blocks[1].attn.qkv.weight.data *= 1.5
    average.blocks[1].attn.qkv.bias.data *= 1.5
    average.blocks[2].mlp.fc_in.weight.data *= 0
    average.blocks[2].mlp.fc_in.bias.data *= 0
    for model in (raw, average):
        model.final.linear.weight.data *= 0
        model.final.linear.bias.data *= 0
    raw.time_embed.mlp[0].weight.data *= 0
    raw.time_embed.mlp[0].bias.data *= 0
    found = analysis.weight_distances(average, raw)
    expected = {"blocks.1.attn.qkv": 0.5, "blocks.2.mlp.fc_in": 1.0, "time_embed.mlp.0": float("inf")}
    assert found == pytest.approx({name: expected.get(name, 0.0) for name in found})
    kinds, others = analysis.by_block(found)
    assert kinds["attn.qkv"] == pytest.approx([0, 0.5, 0]) and kinds["mlp.fc_in"] == pytest.approx([0, 0, 1])
    assert set(kinds) == {"attn.qkv", "attn.out", "mlp.fc_in", "mlp.fc_out", "modulation"}
    assert len(others) + 5 * 3 == len(found) and "label_embed" in others


def test_weight_distances_are_within_one_model():
    with pytest.raises(InputError, match="these are two models"):
        analysis.weight_distances(scrambled(depth=2), scrambled(depth=3))


def test_neighbours_of_constructed_embeddings():
    """Classes on a circle far from the origin: neighbours are those beside, and the null class is none of them."""
    model = DiT(**(SIZES | dict(num_classes=8)))
    angle = torch.arange(8) * torch.pi / 4
    table = torch.full((9, 48), 100.0)
    table[:8, 0] += angle.cos()
    table[:8, 1] += angle.sin()
    model.label_embed.weight.data = table
    similarities = analysis.class_similarities(model)
    torch.testing.assert_close(similarities, (angle[:, None] - angle).cos().double(), rtol=1e-4, atol=1e-4)
    numbers, cosines = analysis.neighbours(similarities, 2)
    assert [set(row) for row in numbers.tolist()] == [{(i - 1) % 8, (i + 1) % 8} for i in range(8)]
    torch.testing.assert_close(cosines, torch.full((8, 2), 0.5**0.5).double(), rtol=1e-4, atol=1e-4)
    with pytest.raises(InputError, match="7 neighbours at most"):
        analysis.neighbours(similarities, 8)


# Guidance and scaling, on denoisers that are formulas -----------------------------------------------------------------


class Constant:
    """Says the same noise everywhere, another one for each label; the null label is 2."""

    num_classes = 2

    def __call__(self, x_t, t, y):
        return torch.tensor([3.0, -1.0, 0.5])[y][:, None, None, None].expand_as(x_t)


class Oracle:
    """Knows the clean latents."""

    def __init__(self, process, x0):
        self.process, self.x0 = process, x0

    def __call__(self, x_t, t, y):
        alpha, sigma = self.process.scales(t)
        return (x_t - alpha * self.x0) / sigma


def test_the_label_effect_is_the_distance_of_the_two_predictions():
    process, times = GaussianDiffusion(), torch.tensor([10, 500])
    effect = analysis.label_effect(Constant(), process, noisy(2), torch.tensor([0, 1]), times, noisy(2, 1))
    torch.testing.assert_close(effect.noise, torch.tensor([[2.5, 1.5], [2.5, 1.5]]))
    alpha, sigma = process.scales(times)
    torch.testing.assert_close(effect.x0, effect.noise * (sigma / alpha).flatten()[:, None])


def test_the_loss_at_a_wrong_scale_is_the_one_in_closed_form():
    process, x0, noise, times = GaussianDiffusion(), noisy(), noisy(seed=1), torch.tensor([100, 600])
    oracle, factors = Oracle(process, x0), (0.18215, 1, 5.49)
    found = analysis.losses_at_scales(oracle, process, x0, torch.zeros(3).long(), factors, times, noise)
    alpha, sigma = process.scales(times)
    for row, factor in zip(found, factors, strict=True):
        expected = (alpha * (factor - 1) / sigma).square().flatten() * x0.square().mean()
        torch.testing.assert_close(row, expected, rtol=1e-3, atol=1e-9)
    shown = analysis.predictions_at_scales(oracle, process, x0, torch.zeros(3).long(), factors, 600, noise)
    torch.testing.assert_close(shown, torch.stack([x0 / f for f in factors]), rtol=1e-3, atol=1e-3)


# Latents --------------------------------------------------------------------------------------------------------------


def test_channel_statistics_are_numpys():
    latents = noisy(5) * torch.tensor([1.0, 2, 3, 4])[:, None, None] + 7
    found = analysis.channel_statistics(latents)
    values = latents.double().numpy()
    for name, function in dict(mean=np.mean, std=np.std, lowest=np.min, highest=np.max).items():
        np.testing.assert_allclose(getattr(found, name), function(values, axis=(0, 2, 3)), rtol=1e-12)


def test_pixels_survive_round_trips_and_mirror_as_their_pictures_do():
    images = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    pictures, psnr = analysis.round_trips(Autoencoder("pixels"), images, passes=3)
    assert all(torch.equal(part, to_uint8(images)) for part in pictures) and len(psnr) == 3 and min(psnr) > 60
    ours, theirs, value = analysis.mirrored(Autoencoder("pixels"), images)
    assert torch.equal(ours, theirs) and torch.equal(theirs, to_uint8(images).flip(-1)) and value > 60


def test_a_vae_mirrors_otherwise_than_its_pictures_and_loses_something_in_every_pass(tmp_path):
    torch.manual_seed(0)
    kinds = dict(down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2)
    vae = AutoencoderKL(**kinds, block_out_channels=[8, 8], norm_num_groups=4, latent_channels=4)
    vae.save_pretrained(tmp_path)
    autoencoder = Autoencoder(str(tmp_path))
    pictures, psnr = analysis.round_trips(autoencoder, noisy(2), passes=2)
    first = to_uint8(autoencoder.decode(noisy(2)))
    again = to_uint8(autoencoder.decode(autoencoder.encode(first).chunk(2, dim=1)[0]))
    assert torch.equal(pictures[0], first) and torch.equal(pictures[1], again)
    error = (first.double() - again.double()).square().flatten(1).mean(1)
    assert psnr[0] == pytest.approx((10 * torch.log10(255**2 / error)).mean().item())
    ours, theirs, value = analysis.mirrored(autoencoder, noisy(2))
    assert torch.equal(theirs, first.flip(-1)) and not torch.equal(ours, theirs) and value < 60


# Quality --------------------------------------------------------------------------------------------------------------


def test_the_real_pictures_are_perfect_and_noise_is_not():
    images, labels = load_digits()
    real = to_uint8(images[:300])
    quality = analysis.Quality(real, judge=DigitJudge())
    name = "Frechet distance (pixels)"
    perfect = quality(real, labels[:300])
    assert perfect[name] == pytest.approx(0, abs=1e-6) and perfect["precision"] == perfect["recall"] == 1
    assert perfect["read as their label"] > 0.97  # the validation split, which the judge has not seen
    noise = torch.randint(256, real.shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    worse = quality(noise, labels[:300])
    assert worse[name] > 20 and worse["precision"] == 0 and worse["read as their label"] < 0.3


def test_pixels_are_features_of_their_values_and_need_no_judge():
    quality = analysis.Quality(torch.tensor([0, 255, 51]).to(torch.uint8).reshape(3, 1, 1, 1))
    torch.testing.assert_close(quality.real, torch.tensor([[-1.0], [1.0], [-0.6]]).expand(3, 3))
    assert set(quality(torch.zeros(4, 1, 1, 1, dtype=torch.uint8), torch.zeros(4))) == {
        "Frechet distance (pixels)", "precision", "recall",
    }  # fmt: skip


# A run ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(make_module, make_trainer, datamodule, store, tmp_path):
    """The folder of a run of four steps as the command line leaves it."""
    module = make_module(process=GaussianDiffusion(clip_x0=True))
    trainer = make_trainer()
    trainer.fit(module, datamodule)
    trainer.save_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump({"data": {"store": store}}))
    return module, tmp_path / "run" / "checkpoints" / "last.ckpt"


def test_a_checkpoint_opens_with_both_sets_of_weights_and_its_latents(run, store):
    module, path = run
    opened = analysis.open_checkpoint(path, device="cpu")
    assert opened.store.location == store and opened.class_names == list("01234")
    average, raw = dict(opened.ema.denoiser.named_parameters()), dict(opened.raw.denoiser.named_parameters())
    for name, value in module.denoiser.named_parameters():  # after training it holds the average
        assert torch.equal(average[name], value.detach())
    assert not torch.equal(raw["final.linear.weight"], average["final.linear.weight"])
    rows = opened.rows(7)
    assert rows[0] == 0 and rows[-1] == 39 and len(rows.unique()) == 7
    x0, y = opened.samples(rows)
    mean = opened.store.gather(rows)["moments"].float().chunk(2, dim=1)[0]
    scale = torch.tensor([0.3, 0.4, 0.5])[:, None, None]
    torch.testing.assert_close(x0, (mean - 0.5) * scale)
    assert torch.equal(y, rows % 5)
    assert torch.equal(opened.images(x0), to_uint8(mean))


def test_samples_of_an_opened_checkpoint_are_those_of_the_module_and_leave_its_model_alone(run):
    module, path = run
    opened = analysis.open_checkpoint(path, device="cpu")
    y = torch.tensor([1, 3])
    drawn = opened.pipeline(module.sampling, seed=5).draw([0, 1], y)
    with torch.no_grad():
        torch.testing.assert_close(drawn, module.eval().sample(y, [0, 1], seed=5), rtol=1e-4, atol=1e-4)
    assert type(opened.ema.denoiser.blocks[0].attn.qkv) is nn.Linear
    assert not torch.equal(opened.pipeline(module.sampling, "raw", seed=5).draw([0, 1], y), drawn)
    opened.raw = None
    with pytest.raises(InputError, match="one set of weights only"):
        opened.pipeline(module.sampling, "raw")


def test_snapshots_lead_from_the_noise_to_the_sample(run):
    _, path = run
    opened = analysis.open_checkpoint(path, device="cpu")
    pipeline = opened.pipeline(Sampling("ddpm", num_steps=5), seed=2)
    y = torch.tensor([1, 3])
    found = analysis.snapshots(pipeline, y, 3)
    assert found.timesteps == [999, 500, 0]
    kept = []
    latents = pipeline.draw([0, 1], y, callback=lambda step, t, x, x0: kept.append((x, x0)))
    expected = [
        (pipeline.images(pipeline.raw(kept[s - 1][0])), pipeline.images(pipeline.raw(kept[s][1]))) for s in (2, 4)
    ]
    for i, (x_t, x0) in enumerate(expected, 1):
        assert torch.equal(found.noisy[i], x_t) and torch.equal(found.clean[i], x0)
    assert torch.equal(found.clean[-1], pipeline.images(latents))
    noise = torch.stack([torch.randn(3, 8, 8, generator=g) for g in sample_generators(2, range(2))])
    assert torch.equal(found.noisy[0], pipeline.images(pipeline.raw(noise)))
    with pytest.raises(InputError, match="columns must lie between 2 and the number of steps, 5; got 6"):
        analysis.snapshots(pipeline, y, 6)


def test_the_store_of_a_run_is_found_from_other_folders_and_held_out_samples_first(tmp_path):
    run = tmp_path / "runs" / "one"
    run.mkdir(parents=True)
    ckpt = run / "checkpoints" / "last.ckpt"
    with pytest.raises(InputError, match=r"does not lie in the folder of a run with a config.yaml"):
        analysis.find_store(ckpt)
    (run / "config.yaml").write_text("data:\n  class_path: a\n  init_args:\n    store: data/digits\n")
    with pytest.raises(InputError, match=r"the stores that .* names \(data/digits\) are not there"):
        analysis.find_store(ckpt)
    write_store(tmp_path / "data" / "digits" / "train", torch.zeros(2, 1, 4, 4), torch.arange(2), 2)
    assert analysis.find_store(ckpt) == tmp_path / "data" / "digits" / "train"
    write_store(tmp_path / "data" / "digits" / "val", torch.zeros(2, 1, 4, 4), torch.arange(2), 2)
    assert analysis.find_store(ckpt) == tmp_path / "data" / "digits" / "val"
    write_store(tmp_path / "other", torch.zeros(2, 1, 4, 4), torch.arange(2), 2)
    (run / "config.yaml").write_text("data:\n  store: {data/digits/train: 1.0}\n  val_store: other\n")
    assert analysis.find_store(ckpt) == tmp_path / "other"


def test_a_store_of_other_latents_is_refused(run, tmp_path):
    write_store(tmp_path / "wide", torch.zeros(5, 3, 8, 16), torch.arange(5), 5)
    with pytest.raises(InputError, match=r"wide holds latents of shape \(3, 8, 16\) in 5 classes, .*name another"):
        analysis.open_checkpoint(run[1], tmp_path / "wide")


def test_curves_come_back_as_they_were_logged_and_of_two_files_the_later_counts(tmp_path):
    values = np.random.default_rng(0).normal(size=12_000).astype(np.float32)  # more than TensorBoard samples
    with SummaryWriter(tmp_path) as writer:
        for step, value in enumerate(values):
            writer.add_scalar("train/loss", value, step, walltime=step)
    with SummaryWriter(tmp_path, filename_suffix=".2") as writer:
        for step in (11_000, 12_500):
            writer.add_scalar("train/loss", -step, step, walltime=20_000 + step)
    curve = analysis.read_curves(tmp_path)["train/loss"]
    expected = dict(enumerate(values)) | {11_000: -11_000, 12_500: -12_500}
    assert list(curve.steps) == sorted(expected) and list(curve.values) == [expected[s] for s in sorted(expected)]
    with pytest.raises(InputError, match="event files"):
        analysis.read_curves(tmp_path / "elsewhere")
