"""The DiT: sizes, initialisation, shapes, and the paper's tables."""

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from ditlit.diffusion import GaussianDiffusion
from ditlit.errors import InputError
from ditlit.models import VARIANTS, DiT, macs, num_parameters
from ditlit.models.embeddings import patchify, sincos_positions, unpatchify

# Peebles & Xie 2023, table 4: G multiply-adds and M parameters.
PAPER = {
    "DiT-S/8": (0.36, 33), "DiT-S/4": (1.41, 33), "DiT-S/2": (6.06, 33),
    "DiT-B/8": (1.42, 131), "DiT-B/4": (5.56, 130), "DiT-B/2": (23.01, 130),
    "DiT-L/8": (5.01, 459), "DiT-L/4": (19.70, 458), "DiT-L/2": (80.71, 458),
    "DiT-XL/8": (7.39, 676), "DiT-XL/4": (29.05, 675), "DiT-XL/2": (118.64, 675),
}  # fmt: skip
EXACT = {"DiT-S/2": 32_963_360, "DiT-B/2": 130_512_416, "DiT-L/2": 458_102_816, "DiT-XL/2": 675_129_632}


def tiny(**changes) -> DiT:
    sizes = dict(input_size=8, in_channels=3, num_classes=5, patch_size=2, hidden_size=32, depth=2, num_heads=2)
    return DiT(**(sizes | changes))


def awake(model: DiT) -> DiT:
    """With the zero-initialised layers randomised, so that every part of the network matters."""
    torch.manual_seed(1)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return model


def inputs(model: DiT, n: int = 4):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, model.in_channels, *model.input_size, generator=generator)
    return x, torch.tensor([0, 10, 500, 999])[:n], torch.tensor([0, 1, 4, 5])[:n]


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_has_the_papers_size(variant):
    with torch.device("meta"):
        model = DiT(variant)
    g_macs, m_parameters = PAPER[variant]
    # B/4 is 5.566 by every consistent count, and the paper prints 5.56.
    assert abs(macs(model) / 1e9 - g_macs) < (0.007 if variant == "DiT-B/4" else 0.005)
    assert abs(num_parameters(model) / 1e6 - m_parameters) < 0.6  # the paper rounds 130.5 down
    if variant in EXACT:
        assert num_parameters(model) == EXACT[variant]


def test_macs_agree_with_counting_products_in_a_real_pass():
    from torch.utils.flop_counter import FlopCounterMode

    model = tiny()
    x, t, y = inputs(model, 1)
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        model(x, t, y)
    norms = sum(16 * 32 for m in model.modules() if isinstance(m, torch.nn.LayerNorm))
    assert counter.get_total_flops() / 2 == macs(model) - norms


def test_at_initialisation_blocks_are_the_identity_and_the_output_is_zero():
    model = tiny()
    tokens, c = torch.randn(4, 16, 32), torch.randn(4, 32)
    for block in model.blocks:
        assert torch.equal(block(tokens, c), tokens)
    assert torch.equal(model(*inputs(model)), torch.zeros(4, 6, 8, 8))


def test_the_first_mse_is_one():
    model = tiny()
    x0 = torch.randn(256, 3, 8, 8)
    terms = GaussianDiffusion().loss(model, x0, torch.zeros(256, dtype=torch.long), torch.Generator().manual_seed(0))
    assert abs(terms["mse"].mean().item() - 1) < 0.02  # 256 * 192 squared normals: 0.0064 standard error


def test_initial_distributions():
    model = tiny(hidden_size=256, num_classes=1000)
    linear = model.blocks[0].attn.qkv.weight
    bound = (6 / (linear.shape[0] + linear.shape[1])) ** 0.5  # Xavier-uniform
    assert linear.abs().max() <= bound
    assert abs(linear.std().item() - bound / 3**0.5) < 0.02 * bound
    assert abs(model.label_embed.weight.std().item() - 0.02) < 2e-4
    assert abs(model.time_embed.mlp[0].weight.std().item() - 0.02) < 4e-4
    assert not any(m.bias.any() for m in model.modules() if isinstance(m, torch.nn.Linear))


def test_patches_come_apart_and_together():
    x = torch.randn(2, 3, 4, 6)
    tokens = patchify(x, 2)
    assert torch.equal(tokens[1, 4], x[1, :, 2:4, 2:4].flatten())  # second row, second column of a 2x3 grid
    channels_last = tokens.unflatten(2, (3, 2, 2)).permute(0, 1, 3, 4, 2).flatten(2)
    assert torch.equal(unpatchify(channels_last, 2, (2, 3)), x)


def test_position_table_is_the_width_axis_first():
    table = sincos_positions(8, (2, 3))  # 2 rows, 3 columns
    column, row = 2.0, 1.0
    angles = torch.tensor([column, column / 100])
    other = torch.tensor([row, row / 100])
    expected = torch.cat([angles.sin(), angles.cos(), other.sin(), other.cos()])
    torch.testing.assert_close(table[5], expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    "changes",
    [dict(input_size=(4, 12)), dict(in_channels=1), dict(in_channels=32), dict(learn_sigma=False), dict(patch_size=4)],
)
def test_any_shape(changes):
    model = awake(tiny(**changes))
    x, t, y = inputs(model)
    out = model(x, t, y)
    assert out.shape == (4, model.in_channels * (2 if model.config["learn_sigma"] else 1), *model.input_size)
    # Nothing leaks between samples of a batch.
    torch.testing.assert_close(model(x[2:3], t[2:3], y[2:3]), out[2:3], rtol=1e-5, atol=1e-6)


def test_non_square_grids_keep_rows_and_columns_apart():
    model = awake(tiny(input_size=(4, 8)))
    x, t, y = inputs(model)
    changed = x.clone()
    changed[:, :, 2:4, 6:8] += 1  # the last patch
    with torch.no_grad():
        model.blocks = torch.nn.ModuleList()  # without attention a patch sees itself alone
        difference = (model(changed, t, y) - model(x, t, y)).abs().amax((0, 1)) > 0
    assert difference[2:4, 6:8].all() and difference.sum() == 4


@pytest.mark.parametrize("positions", ["sincos", "learned"])
def test_every_parameter_learns(positions):
    model = awake(tiny(positions=positions))
    model(*inputs(model)).square().mean().backward()
    labels_without_gradient = {2, 3}  # not in the batch
    for name, p in model.named_parameters():
        rows = p.grad.flatten(1).any(1) if name == "label_embed.weight" else p.grad.any()
        expected = torch.tensor([i not in labels_without_gradient for i in range(6)])
        assert torch.equal(rows, expected) if name == "label_embed.weight" else rows, name
    assert ("pos_embed" in dict(model.named_parameters())) == (positions == "learned")


def test_checkpointing_changes_no_gradient():
    gradients = []
    for gradient_checkpointing in (False, True):
        model = awake(tiny(gradient_checkpointing=gradient_checkpointing, dropout=0.1))
        torch.manual_seed(0)
        model(*inputs(model)).square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_dropout_acts_in_training_only():
    model = awake(tiny(dropout=0.5))
    x = inputs(model)
    assert not torch.equal(model(*x), model(*x))
    model.eval()
    assert torch.equal(model(*x), model(*x))
    assert torch.equal(model(*x), awake(tiny()).eval()(*x))


def test_attention_is_softmax_attention():
    model = awake(tiny())
    attention = model.blocks[0].attn
    x = torch.randn(2, 16, 32)
    q, k, v = F.linear(x, attention.qkv.weight, attention.qkv.bias).chunk(3, -1)
    heads = []
    for h in range(2):
        part = slice(16 * h, 16 * (h + 1))
        weights = (q[..., part] @ k[..., part].transpose(1, 2) / 4).softmax(-1)
        heads.append(weights @ v[..., part])
    expected = F.linear(torch.cat(heads, -1), attention.out.weight, attention.out.bias)
    torch.testing.assert_close(attention(x), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(variant="DiT-M/2"), "unknown DiT variant 'DiT-M/2'"),
        (dict(input_size=9), "9x9 cannot be cut into patches of 2"),
        (dict(num_heads=3), "hidden_size 32 is not divisible by num_heads 3, but by 2 and 4"),
        (dict(hidden_size=34), "divisible by 4"),
    ],
)
def test_impossible_sizes_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        tiny(**changes)


def test_wrong_latents_are_refused():
    model = tiny()
    with pytest.raises(InputError, match=r"built for latents of shape \(3, 8, 8\), got \(4, 8, 8\)"):
        model(torch.randn(1, 4, 8, 8), torch.tensor([0]), torch.tensor([0]))


def test_the_plain_model_of_the_benchmark_is_the_same_function(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    from plain_dit import PlainDiT

    torch.manual_seed(0)
    model = DiT(input_size=8, in_channels=3, num_classes=5, patch_size=2, hidden_size=32, depth=2, num_heads=4)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    x, t, y = torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 500, 999]), torch.tensor([0, 1, 4, 5])
    torch.testing.assert_close(PlainDiT(model)(x, t, y), model(x, t, y), rtol=1e-4, atol=1e-5)
