"""The paper's four designs of conditioning, and blocks that are recomputed: sizes, starts, gradients, files."""

import pytest
import torch
from jsonargparse import ArgumentParser
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ditlit import checkpoints
from ditlit.checkpoints.contents import CheckpointContents, describe, variant_name
from ditlit.checkpoints.diffusers_folders import write_transformer
from ditlit.checkpoints.safetensors_files import write_safetensors
from ditlit.checkpoints.torch_files import write_released, write_training
from ditlit.diffusion import GaussianDiffusion
from ditlit.errors import InputError
from ditlit.generation.onednn import fuse
from ditlit.models import DiT, macs, num_parameters
from ditlit.models.conditioning import DESIGNS

# Peebles & Xie 2023, table 4: G multiply-adds and M parameters of DiT-XL/2.
PAPER = {
    "in_context": (119.37, 449), "cross_attention": (137.62, 598), "adaln": (118.56, 600), "adaln_zero": (118.64, 675),
}  # fmt: skip
# By hand: weights, biases and what the design adds in each of 28 blocks of width D; then what is around the blocks.
D = 1152
AROUND = (256 * D + D) + (D * D + D) + 1001 * D + (16 * D + D) + (32 * D + 32)  # timestep, label, patches, output
EXACT = {
    "in_context": 28 * (12 * D * D + 9 * D + 4 * D) + AROUND + 2 * D,
    "cross_attention": 28 * (16 * D * D + 13 * D + 4 * D) + AROUND + 2 * D,
    "adaln": 28 * (16 * D * D + 13 * D) + AROUND + 2 * D * D + 2 * D,
    "adaln_zero": 28 * (18 * D * D + 15 * D) + AROUND + 2 * D * D + 2 * D,
}
# The other ablations, and one design with both, to see that they go together.
CHANGES = {
    "learned positions": dict(positions="learned"), "patches of 4": dict(patch_size=4),
    "patches of 1": dict(patch_size=1), "noise only": dict(learn_sigma=False),
    "all": dict(conditioning="cross_attention", positions="learned", learn_sigma=False),
}  # fmt: skip
ABLATIONS = {design: dict(conditioning=design) for design in DESIGNS} | CHANGES
ablations = pytest.mark.parametrize("changes", ABLATIONS.values(), ids=ABLATIONS)
OTHERS = [design for design in DESIGNS if design != "adaln_zero"]


def tiny(conditioning="adaln_zero", seed=0, **changes) -> DiT:
    torch.manual_seed(seed)
    sizes = dict(input_size=4, in_channels=2, num_classes=3, patch_size=2, hidden_size=16, depth=2, num_heads=2)
    return DiT(**(sizes | changes), conditioning=conditioning)


def awake(model: DiT) -> DiT:
    """With the layers that start at zero randomised."""
    torch.manual_seed(1)
    for p in model.parameters():
        if p.dim() > 1:
            nn.init.normal_(p, std=0.2)
    return model


def inputs(n=4):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, 2, 4, 4, generator=generator), torch.tensor([0, 10, 500, 999])[:n], torch.tensor([0, 1, 2, 3])


def contents_of(model: DiT) -> CheckpointContents:
    latents = {"shift": [0.0] * 2, "scale": [1.0] * 2}
    about = (describe(model), describe(GaussianDiffusion()), latents)
    return CheckpointContents(dict(model.state_dict()), *about, step=7, weights="ema", format="")


@pytest.mark.parametrize("design", DESIGNS)
def test_sizes_are_the_papers(design):
    """Parameters as the paper rounds them, without the frozen position table; multiply-adds to two decimals."""
    with torch.device("meta"):
        model = DiT("DiT-XL/2", conditioning=design)
    g_macs, m_parameters = PAPER[design]
    parameters = sum(p.numel() for p in model.parameters())
    assert parameters == EXACT[design] and round(parameters / 1e6) == m_parameters
    assert num_parameters(model) == parameters + 256 * D
    assert f"{macs(model) / 1e9:.2f}" == str(g_macs)


@pytest.mark.parametrize("design", DESIGNS)
def test_macs_agree_with_counting_products_in_a_real_pass(design):
    model = tiny(design)
    x, t, y = inputs(1)
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        model(x, t, y[:1])
    norms = sum(
        16 * (6 if design == "in_context" and name.startswith("blocks") else 4)
        for name, layer in model.named_modules()
        if isinstance(layer, nn.LayerNorm)
    )
    assert counter.get_total_flops() == 2 * (macs(model) - norms)


@pytest.mark.parametrize("design", DESIGNS)
def test_no_block_is_fed_numbers_of_another_precision_under_autocast(design):
    """The embedding of the class is a table and stays in float32, that of the timestep comes out of 16 bits."""
    model = awake(tiny(design))
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(*inputs())
    expected = model(*inputs())
    assert (mixed - expected).norm() < 0.05 * expected.norm()
    halved = model.to(torch.bfloat16)(*inputs())
    assert (halved - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("design", DESIGNS)
def test_starts_at_zero_and_only_adaln_zero_as_the_identity(design):
    model = tiny(design)
    x, t, y = inputs()
    assert torch.equal(model(x, t, y), torch.zeros(4, 4, 4, 4))
    seen = []
    handle = model.blocks[0].register_forward_hook(lambda block, args, out: seen.append((args[0], out)))
    model(x, t, y)
    handle.remove()
    before, after = seen[0]
    assert torch.equal(before, after) == (design == "adaln_zero")
    assert after.std() < 5 * before.std()  # no design starts by blowing up


@ablations
def test_time_and_class_matter_and_every_parameter_has_a_gradient(changes):
    model = awake(tiny(**changes))
    x, t, y = inputs()
    out = model(x, t, y)
    assert (model(x, t + 1, y) - out).abs().amax((1, 2, 3)).min() > 1e-5
    assert (model(x, t, (y + 1) % 4) - out).abs().amax((1, 2, 3)).min() > 1e-4
    out.square().sum().backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    # A key's bias adds the same to all logits of a query, which the softmax does not see; rounding may.
    assert not [name for name in silent if not name.endswith(("qkv.bias", "kv.bias"))]


def test_in_context_tokens_are_two_and_leave_before_the_output():
    model = awake(tiny("in_context"))
    seen = []
    model.blocks[-1].register_forward_hook(lambda block, args, out: seen.append(out.shape[1]))
    model.final.register_forward_hook(lambda layer, args, out: seen.append(args[0].shape[1]))
    model(*inputs())
    assert seen == [6, 4]


def test_cross_attention_sees_time_and_class_alone():
    """Exchanging the two embeddings changes nothing: they are a set, told apart by what they hold."""
    block = awake(tiny("cross_attention")).blocks[0]
    x, c = torch.randn(2, 4, 16), torch.randn(2, 2, 16)
    torch.testing.assert_close(block(x, c), block(x, c.flip(1)), rtol=1e-5, atol=1e-6)
    q, k, v = block.cross.q(x), *block.cross.kv(c).chunk(2, -1)
    heads = [part.unflatten(-1, (2, 8)).transpose(1, 2) for part in (q, k, v)]
    weights = (heads[0] @ heads[1].transpose(2, 3) / 8**0.5).softmax(-1)
    expected = block.cross.out((weights @ heads[2]).transpose(1, 2).flatten(2))
    torch.testing.assert_close(block.cross(x, c), expected, rtol=1e-5, atol=1e-6)


@ablations
def test_overfits_one_batch(changes):
    model = tiny(**changes, hidden_size=64)
    process = GaussianDiffusion()
    x0, t, y = inputs()
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(3))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(250):
        loss = process.loss(model, x0, y, t=t, noise=noise)["mse"].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(noise.square().mean().item(), rel=1e-5)
    assert losses[-1] < 0.02


@ablations
def test_our_formats_keep_every_ablation(changes, tmp_path):
    model = awake(tiny(**changes))
    contents = contents_of(model)
    write_training(contents, tmp_path / "x.ckpt")
    write_safetensors(contents, tmp_path / "x.safetensors")
    torch.save(contents.state, tmp_path / "bare.pt")
    for name in ("x.ckpt", "x.safetensors", "bare.pt"):
        sizes = dict(num_heads=2, input_size=4, in_channels=2) if name == "bare.pt" else {}
        loaded = checkpoints.load(str(tmp_path / name), **sizes).denoiser
        assert {name: loaded.config[name] for name in changes} == changes
        assert torch.equal(loaded(*inputs()), model(*inputs()))


@pytest.mark.parametrize("design", OTHERS)
def test_formats_of_others_refuse_them(design, tmp_path):
    formats = {"the released format": write_released, "diffusers' DiTTransformer2DModel": write_transformer}
    for name, write in formats.items():
        message = f"{name} knows adaLN-Zero only, and this DiT's conditioning is {design}; write safetensors or a ckpt"
        with pytest.raises(InputError, match=f"^{message}$"):
            write(contents_of(tiny(design)), tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_names_tell_the_design_where_it_is_not_the_paper_s_choice():
    with torch.device("meta"):
        names = [variant_name(DiT("DiT-S/2", conditioning=design).config) for design in ("adaln", "adaln_zero")]
    assert names == ["DiT-S/2, conditioning adaln", "DiT-S/2"]
    sizes = "depth 2, hidden_size 16, num_heads 2, patch_size 2"
    assert variant_name(tiny("in_context").config) == f"{sizes}, conditioning in_context"
    assert variant_name(dict(depth=3)) == "depth 3"


def test_starting_from_another_design_is_refused():
    with pytest.raises(InputError, match=r"has the conditioning adaln, the denoiser adaln_zero.*conditioning adaln$"):
        checkpoints.initialize(tiny(), contents_of(tiny("adaln")), None, "x.ckpt")


def test_checkpoints_of_before_are_adaln_zero():
    contents = contents_of(tiny())
    del contents.denoiser["init_args"]["conditioning"]
    assert checkpoints.initialize(tiny(seed=1), contents, None, "x.ckpt")
    with pytest.raises(InputError, match="unknown conditioning 'film'; choose one of in_context, "):
        tiny("film")


@pytest.mark.parametrize("design", DESIGNS)
def test_faster_layers_compute_the_same(design):
    model, fused = (awake(tiny(design)).eval() for _ in range(2))
    fuse(fused)
    with torch.inference_mode():
        torch.testing.assert_close(fused(*inputs()), model(*inputs()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize(("gradient_checkpointing", "expected"), [(True, 4), (False, 0), (2, 2), (0, 0), (4, 4)])
def test_recomputed_blocks_change_no_gradient(design, gradient_checkpointing, expected):
    def gradients(gradient_checkpointing):
        model = awake(tiny(design, depth=4, gradient_checkpointing=gradient_checkpointing))
        calls = []
        for number, block in enumerate(model.blocks):
            block.norm1.register_forward_hook(lambda *_, number=number: calls.append(number))
        model(*inputs()).square().sum().backward()
        return calls, torch.cat([p.grad.flatten() for p in model.parameters()])

    calls, found = gradients(gradient_checkpointing)
    assert len(calls) == 4 + expected
    assert torch.equal(found, gradients(False)[1])
    if gradient_checkpointing == 2:
        assert sorted(calls[4:]) == [1, 3]  # spread over the depth


@pytest.mark.parametrize(("given", "expected"), [("true", True), ("false", False), ("1", 1), ("3", 3)])
def test_the_command_line_tells_all_blocks_from_one(given, expected):
    parser = ArgumentParser()
    parser.add_class_arguments(DiT, "denoiser")
    found = parser.parse_args([f"--denoiser.gradient_checkpointing={given}"]).denoiser.gradient_checkpointing
    assert found is expected
    assert len(tiny(depth=4, gradient_checkpointing=found).recomputed) == (4 if expected is True else int(expected))


def test_only_so_many_blocks_can_be_recomputed():
    with pytest.raises(InputError, match="between 0 and all 2 blocks, got 3"):
        tiny(gradient_checkpointing=3)
