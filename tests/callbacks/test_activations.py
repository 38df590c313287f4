"""Probes that change nothing, and the maxima that a run logs."""

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from torch import nn
from weights import scrambled

from ditlit.analysis import read_curves
from ditlit.callbacks import ActivationMaxima
from ditlit.cli import DitlitCLI
from ditlit.errors import InputError
from ditlit.models import DiT, probes

ARGUMENTS = dict(x_t=torch.randn(3, 4, 8, 8), t=torch.tensor([0, 500, 999]), y=torch.tensor([1, 7, 3]))


def hooks(module):
    return sum(len(part._forward_hooks) for part in module.modules())


class Expected(Callback):
    """The maxima of a step, from plain hooks in its own forward pass."""

    def __init__(self):
        self.steps = []

    def on_train_start(self, trainer, pl_module):
        for number, block in enumerate(pl_module.denoiser.blocks):
            block.register_forward_hook(self.see_block(number))
            block.attn.qkv.register_forward_hook(self.see_qkv(number, block.attn.num_heads))

    def see_block(self, number):
        return lambda module, args, out: self.keep("activations", number, out.abs().max().item())

    def see_qkv(self, number, heads):
        def hook(module, args, out):
            q, k, _ = out.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
            logits = torch.einsum("nhid,nhjd->nhij", q, k) / q.shape[-1] ** 0.5
            self.keep("attention_logits", number, logits.max().item())

        return hook

    def keep(self, kind, number, value):
        if torch.is_grad_enabled():  # not the callback's own look
            self.now.setdefault(f"{kind}/block_{number:02d}", []).append(value)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self.now = {}
            self.steps.append(self.now)


# Probes ---------------------------------------------------------------------------------------------------------------


def test_a_watched_pass_is_the_pass_and_no_hook_stays():
    model = scrambled()
    with torch.no_grad():
        expected = model(**ARGUMENTS)
        with probes.watch_blocks(model, lambda *_: None), probes.watch_attention(model, lambda *_: None):
            assert torch.equal(model(**ARGUMENTS), expected)
            assert hooks(model) == 4
    assert hooks(model) == 0

    def fail(*_):
        raise RuntimeError

    with pytest.raises(RuntimeError), probes.watch_blocks(model, fail):
        model(**ARGUMENTS)
    assert hooks(model) == 0


def test_blocks_are_seen_in_order_each_from_where_the_last_one_ended():
    model, seen = scrambled(depth=3), []
    with probes.watch_blocks(model, lambda number, before, after: seen.append((number, before, after))):
        model(**ARGUMENTS)
    assert [number for number, _, _ in seen] == [0, 1, 2]
    assert torch.equal(seen[0][2], seen[1][1]) and torch.equal(seen[1][2], seen[2][1])
    assert not any(x.requires_grad for _, *tokens in seen for x in tokens)


def test_compiled_blocks_are_seen_too():
    model, seen = scrambled(), []
    for block in model.blocks:
        block.compile(backend="eager")
    with torch.no_grad():
        model(**ARGUMENTS)
        with probes.watch_attention(model, lambda number, *_: seen.append(number)):
            model(**ARGUMENTS)
    assert seen == [0, 1]


def test_the_largest_logit_is_the_same_in_parts(monkeypatch):
    q, k = torch.randn(2, 5, 3, 7, 8, dtype=torch.float64)
    expected = (torch.einsum("nhid,nhjd->nhij", q, k) / 8**0.5).amax((1, 2, 3)).float()
    torch.testing.assert_close(probes.largest_logit(q, k), expected, rtol=1e-6, atol=1e-6)
    monkeypatch.setattr(probes, "MOST_LOGITS", 2 * 3 * 7 * 7)
    torch.testing.assert_close(probes.largest_logit(q, k), expected, rtol=1e-6, atol=1e-6)


def test_a_denoiser_without_blocks_is_refused():
    with pytest.raises(InputError, match="only transformers with blocks can be looked into, and Linear has none"):
        probes.blocks_of(nn.Linear(2, 2))


# The callback ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def fit(make_module, make_trainer, datamodule, tmp_path):
    def run(*callbacks, **settings):
        module = make_module()
        logger = TensorBoardLogger(tmp_path, name="", version="")
        trainer = make_trainer(callbacks=list(callbacks), logger=logger, log_every_n_steps=2, **settings)
        trainer.fit(module, datamodule)
        return module

    return run


def logged(folder):
    return {
        tag: c for tag, c in read_curves(folder).items() if tag.split("/")[0] in ("activations", "attention_logits")
    }


@pytest.mark.parametrize("every, looked_at", [(None, [[1], [3]]), (1, [[0, 1], [2, 3]]), (3, [[], [2]])])
def test_entries_are_the_maxima_over_the_steps_looked_at(fit, tmp_path, every, looked_at):
    expected = Expected()
    fit(expected, ActivationMaxima(every))
    found = logged(tmp_path)
    assert sorted(found) == [f"{kind}/block_0{i}" for kind in ("activations", "attention_logits") for i in (0, 1)]
    for tag, curve in found.items():
        entries = [(2 * i + 2, steps) for i, steps in enumerate(looked_at) if steps]
        assert list(curve.steps) == [step for step, _ in entries]
        maxima = [max(max(expected.steps[s][tag]) for s in steps) for _, steps in entries]
        assert list(curve.values) == pytest.approx(maxima, rel=1e-5)


def test_all_micro_batches_of_a_step_count(fit, tmp_path):
    expected = Expected()
    fit(expected, ActivationMaxima(), accumulate_grad_batches=2)
    for tag, curve in logged(tmp_path).items():
        assert len(expected.steps[1][tag]) == 2
        assert curve.values[0] == pytest.approx(max(expected.steps[1][tag]), rel=1e-5)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_the_run_learns_the_same_to_the_bit_with_and_without(make_module, make_trainer, datamodule, dropout):
    sizes = dict(input_size=8, in_channels=3, num_classes=5, patch_size=4, hidden_size=16, depth=2, num_heads=2)
    weights = []
    for callbacks in ([], [ActivationMaxima(1)]):
        torch.manual_seed(0)
        module = make_module(denoiser=DiT(**sizes, dropout=dropout))
        make_trainer(callbacks=callbacks).fit(module, datamodule)
        weights.append(torch.cat([p.detach().flatten() for p in module.denoiser.parameters()]))
    assert torch.equal(*weights)


def test_mistakes_stop_a_run_before_it_starts(make_module, make_trainer, datamodule):
    with pytest.raises(InputError, match="every_n_steps must be positive, got 0"):
        ActivationMaxima(0)
    module = make_module()
    del module.denoiser.blocks
    with pytest.raises(InputError, match="only transformers with blocks"):
        make_trainer(callbacks=[ActivationMaxima()]).fit(module, datamodule)


def test_a_configuration_may_name_it(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(DitlitCLI, "_run_subcommand", lambda self, subcommand: None)
    monkeypatch.setattr("sys.argv", ["ditlit"])
    (tmp_path / "more.yaml").write_text(
        "trainer:\n  callbacks+:\n  - class_path: ditlit.callbacks.ActivationMaxima\n    init_args:\n"
        "      every_n_steps: 10\n"
    )
    with torch.device("meta"):
        built = DitlitCLI(["fit", "--config", "digits.yaml", "--config", "more.yaml"])
    found = [callback for callback in built.trainer.callbacks if isinstance(callback, ActivationMaxima)]
    assert [callback.every_n_steps for callback in found] == [10]
