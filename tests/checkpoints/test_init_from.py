"""Training that starts from other weights: what is taken over, what is fitted, what is refused."""

import pytest
import torch
from weights import assert_same, contents_of, parameters, scrambled

from ditlit import checkpoints
from ditlit.checkpoints.safetensors_files import write_safetensors
from ditlit.errors import InputError
from ditlit.models.embeddings import sincos_positions


def averages(module):
    average = module.ema._average_model
    return dict(zip(average.names, average.values, strict=True))


@pytest.fixture
def starting(make_module, tmp_path):
    """Saves weights with a configuration, and makes a module that starts from them."""

    def make(model, class_names=None, **changes):
        contents = contents_of(model, class_names)
        contents.step = 7
        write_safetensors(contents, tmp_path / "start.safetensors")
        torch.manual_seed(1)
        return make_module(init_from=str(tmp_path / "start.safetensors"), **changes)

    return make


SMALL = dict(input_size=8, in_channels=3, num_classes=5, patch_size=4, hidden_size=16, depth=2, num_heads=2)


def test_training_starts_from_given_weights_and_so_does_the_average(
    starting, make_trainer, datamodule, tmp_path, monkeypatch
):
    model, said = scrambled(**SMALL), []
    module = starting(model)
    monkeypatch.setattr("ditlit.training.module.rank_zero_info", said.append)
    make_trainer(max_steps=0).fit(module, datamodule)
    assert_same(parameters(module.denoiser), parameters(model))
    assert_same(averages(module), parameters(model))
    assert said == [
        f"Starting from the ema weights of {tmp_path}/start.safetensors (ditlit safetensors, step 7)",
        "Labels: 5 classes, copied by number, as neither names them",
    ]


def test_a_second_fit_and_a_resumed_run_do_not_start_over(starting, make_trainer, datamodule, tmp_path):
    model = scrambled(**SMALL)
    module = starting(model)
    trainer = make_trainer(max_steps=3)
    trainer.fit(module, datamodule)
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    raw, average = (checkpoints.load(tmp_path / "run.ckpt", which).denoiser for which in ("raw", "ema"))
    assert not torch.equal(raw.final.linear.weight, model.final.linear.weight)
    make_trainer(max_steps=0).fit(module, datamodule)
    assert_same(parameters(module.denoiser), parameters(raw))
    resumed = starting(scrambled(seed=9, **SMALL))
    make_trainer(max_steps=3).fit(resumed, datamodule, ckpt_path=tmp_path / "run.ckpt")
    assert_same(parameters(resumed.denoiser), parameters(raw))
    assert_same(averages(resumed), parameters(average))


def test_other_classes_keep_the_null_row_and_what_is_known_by_name(make_module):
    model, names = scrambled(**SMALL), ["cat", "dog", "owl", "cow", "crane"]
    contents = contents_of(model, names)
    for ours, rows in (
        (None, {}),
        (["dog", "bee", "cat"], {0: 1, 2: 0}),
        (["crane", "crane", "owl"], {2: 2}),  # two classes of one name are not told apart
    ):
        target = scrambled(seed=3, **SMALL | dict(num_classes=3))
        before = target.label_embed.weight.detach().clone()
        report = checkpoints.initialize(target, contents, ours, "x")
        table = target.label_embed.weight
        assert torch.equal(table[-1], model.label_embed.weight[-1])
        for row in range(3):
            expected = model.label_embed.weight[rows[row]] if row in rows else before[row]
            assert torch.equal(table[row], expected)
        assert (
            report[-1] == f"Labels: 5 to 3 classes, {len(rows)} copied by name, {3 - len(rows)} new, and the null class"
        )
        assert torch.equal(target.blocks[1].attn.qkv.weight, model.blocks[1].attn.qkv.weight)


def test_the_same_classes_in_another_order_are_reordered():
    names = ["cat", "dog", "owl", "cow", "bee"]
    model, target = scrambled(**SMALL), scrambled(seed=3, **SMALL)
    report = checkpoints.initialize(target, contents_of(model, names), names[::-1], "x")
    assert torch.equal(target.label_embed.weight[:5], model.label_embed.weight[:5].flip(0)) and len(report) == 2
    report = checkpoints.initialize(target, contents_of(model, names), list(names), "x")
    assert torch.equal(target.label_embed.weight, model.label_embed.weight) and len(report) == 1


def test_as_many_other_classes_are_matched_by_name_or_said_to_be_copied_by_number():
    names = ["cat", "dog", "owl", "cow", "bee"]
    model, target = scrambled(**SMALL), scrambled(seed=3, **SMALL)
    new = target.label_embed.weight[[0, 1, 2]].detach().clone()
    report = checkpoints.initialize(target, contents_of(model, names), ["a", "b", "c", "owl", "cat"], "x")
    assert report[1:] == ["Labels: 5 to 5 classes, 2 copied by name, 3 new, and the null class"]
    assert torch.equal(target.label_embed.weight, torch.cat([new, model.label_embed.weight[[2, 0, 5]]]))
    for ours, theirs, silent in ((None, names, "the store"), (names, None, "the checkpoint"), (None, None, "neither")):
        target = scrambled(seed=3, **SMALL)
        report = checkpoints.initialize(target, contents_of(model, theirs), ours, "x")
        assert torch.equal(target.label_embed.weight, model.label_embed.weight)
        assert len(report) == 2 and f"Labels: 5 classes, copied by number, as {silent}" in report[1]


def test_another_resolution_computes_fixed_positions_and_resizes_learned_ones():
    fixed = scrambled(**SMALL)
    target = scrambled(seed=3, **SMALL | dict(input_size=16))
    report = checkpoints.initialize(target, contents_of(fixed), None, "x")
    assert report[1] == "Positions: 2x2 to 4x4, computed"
    assert torch.equal(target.pos_embed, sincos_positions(16, (4, 4)))
    assert_same(parameters(target), parameters(fixed))

    learned = scrambled(**SMALL | dict(positions="learned", input_size=16))
    rows, columns = torch.arange(4.0).repeat_interleave(4), torch.arange(4.0).repeat(4)
    learned.pos_embed.data = torch.stack([rows, columns], 1).repeat(1, 8)  # linear in the place
    target = scrambled(seed=3, **SMALL | dict(positions="learned", input_size=(16, 32)))
    report = checkpoints.initialize(target, contents_of(learned), None, "x")
    assert report[1] == "Positions: 4x4 to 4x8, the learned table resized"
    table = target.pos_embed.unflatten(0, (4, 8))
    torch.testing.assert_close(table[:, :, 0], torch.arange(4.0)[:, None].expand(4, 8))
    # Half a step between the centres of the new columns, as nearly as torch's bicubic kernel keeps a line.
    torch.testing.assert_close(table[0, 2:6, 1], torch.tensor([0.75, 1.25, 1.75, 2.25]), rtol=0, atol=0.1)
    torch.testing.assert_close(table[0, :, 1] + table[0, :, 1].flip(0), torch.full((8,), 3.0))

    target = scrambled(seed=3, **SMALL | dict(positions="learned"))
    checkpoints.initialize(target, contents_of(fixed), None, "x")
    assert torch.equal(target.pos_embed, sincos_positions(16, (2, 2)))


def test_weights_to_start_from_that_do_not_fit_are_refused(starting, make_trainer, datamodule):
    for change, message in (
        (dict(depth=3), r"'blocks.2.attn.*, which this model does not hold"),
        (dict(patch_size=2), r"'patch_embed.weight' with shape \(16, 12\), this model needs \(16, 48\)"),
        (dict(learn_sigma=False), r"'final.linear.weight' with shape \(48, 16\), this model needs \(96, 16\)"),
        (dict(hidden_size=32), r"'patch_embed.weight' with shape \(32, 48\), this model needs \(16, 48\)"),
        (dict(num_heads=4), "has 4 attention heads, the denoiser has 2"),
        (dict(positions="learned"), r"'pos_embed' with shape \(4, 16\), which this model does not hold"),
    ):
        with pytest.raises(InputError, match=message):
            make_trainer(max_steps=1).fit(starting(scrambled(**SMALL | change)), datamodule)
