"""Steps with infinite gradients change nothing, are explained, and end in going back; healthy runs do not notice."""

import json
import math
import warnings

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from ditlit.data import LatentDataModule
from ditlit.data.store import LatentStore
from ditlit.resilience import CheckpointFiles
from ditlit.resilience.nonfinite import Diverged, SkipNonFinite

OPTIMIZERS = {
    "fused AdamW": lambda params: torch.optim.AdamW(params, lr=1e-2),
    "foreach AdamW": lambda params: torch.optim.AdamW(params, lr=1e-2, foreach=True),
    "SGD with momentum": lambda params: torch.optim.SGD(params, lr=1e-2, momentum=0.9),
}


class Poison(Callback):
    """Makes one row of the batches from step ``first`` (counted from 0) up to ``last`` infinite."""

    def __init__(self, first, last=math.inf, row=1):
        self.steps, self.row = (first, last), row

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        first, last = self.steps
        self.clean = batch["moments"].clone()
        if first <= trainer.global_step < last and (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            batch["moments"][self.row] = torch.inf


class Break(Callback):
    """Makes the output of a layer infinite in steps ``steps``, for the samples with the given timesteps and above."""

    def __init__(self, layer, steps):
        self.layer, self.steps = layer, steps

    def on_train_start(self, trainer, pl_module):
        def hook(module, args, output):
            computed = trainer.global_step if self.step is None else self.step
            return output * torch.inf if computed in self.steps else output

        self.step = None
        pl_module.denoiser.get_submodule(self.layer).register_forward_hook(hook)
        terms = pl_module.training_terms

        def training_terms(batch, batch_idx, step):
            self.step = step
            return terms(batch, batch_idx, step)

        pl_module.training_terms = training_terms


@pytest.fixture
def fit(make_module, make_trainer, store, tmp_path):
    def run(*callbacks, steps=4, optimizer=OPTIMIZERS["fused AdamW"], max_bad_steps=20, accumulate=2, **changes):
        trainer = make_trainer(
            max_steps=steps, max_epochs=-1, accumulate_grad_batches=accumulate, gradient_clip_val=0.5,
            callbacks=list(callbacks), plugins=[CheckpointFiles()], **changes,
        )  # fmt: skip
        module = make_module(optimizer=optimizer, max_bad_steps=max_bad_steps)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                trainer.fit(module, LatentDataModule(store, global_batch_size=8))
            finally:
                module.said = [str(w.message) for w in caught if "not finite" in str(w.message)]
                run.module = module
        return module

    return run


def raw(module):
    """The weights that the optimizer held at the end, and its state."""
    average = module.ema._average_model
    optimizer = module.trainer.optimizers[0].state_dict()["state"]
    return dict(zip(average.names, module.ema._raw, strict=True)), optimizer


def assert_equal(a, b):
    assert len(a[0]) == len(b[0]) and all(torch.equal(a[0][name], b[0][name]) for name in a[0])
    for i, state in a[1].items():
        for name, value in state.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(b[1][i][name])), name


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_healthy_runs_are_the_same_to_the_bit(fit, optimizer, monkeypatch):
    guarded = raw(fit(optimizer=optimizer))
    monkeypatch.setattr(SkipNonFinite, "check", lambda self, *args: None)
    monkeypatch.setattr(SkipNonFinite, "on_train_batch_end", lambda self, *args: None)
    assert_equal(guarded, raw(fit(optimizer=optimizer)))


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_a_skipped_step_changes_neither_weights_nor_optimizer(fit, optimizer):
    before = fit(steps=2, optimizer=optimizer)
    after = fit(Poison(2), steps=4, optimizer=optimizer)
    assert_equal(raw(before), raw(after))
    assert after.skip_non_finite.skipped == 2 and before.skip_non_finite.skipped == 0
    assert all(torch.isfinite(value).all() for value in after.ema._average_model.values)


def test_the_report_names_samples_timesteps_and_poisoned_latents(fit, tmp_path, store):
    class Remember(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if (trainer.global_step, batch_idx % 2) == (3, 1):
                self.t, self.clean = outputs["t"], poison.clean

    poison, remember = Poison(2, 3), Remember()
    module = fit(poison, remember)
    (report,) = json.loads((tmp_path / "nonfinite.json").read_text())
    assert report["step"] == 3 and report["first"] == "the latents themselves"
    assert report["timesteps"] == [remember.t[1].item()]
    stored = LatentStore(store).gather(torch.tensor(report["samples"]))["moments"]
    assert stored.shape[0] == 1
    assert torch.equal(stored[0], remember.clean[1]) or torch.equal(stored[0], remember.clean[1].flip(-1))
    (said,) = module.said
    t = report["timesteps"][0]
    assert said == (
        "step 3 is skipped: its gradients are not finite. "
        f"First: the latents themselves, timesteps {t} to {t}"
    )  # fmt: skip


@pytest.mark.parametrize("layer", ["blocks.1.mlp.0", "time_embed", "final.linear"])
def test_the_first_layer_is_named(fit, layer, tmp_path, make_module):
    known = dict(make_module().denoiser.named_modules())
    layer = layer if layer in known else next(name for name in known if name.startswith("blocks.1."))
    fit(Break(layer, {1}))
    (report,) = json.loads((tmp_path / "nonfinite.json").read_text())
    assert report["first"] == f"the output of {layer}" and len(report["samples"]) == 8


def test_infinite_gradients_of_finite_losses_are_traced_backwards(fit, tmp_path):
    class BreakGradient(Callback):
        def on_train_start(self, trainer, pl_module):
            pl_module.denoiser.blocks[1].register_forward_hook(self.hook)

        def hook(self, module, args, output):
            output.register_hook(lambda grad: grad * torch.inf)

    fit(BreakGradient(), steps=2)
    reports = json.loads((tmp_path / "nonfinite.json").read_text())
    # The blocks start with their gates at zero, so nothing of block 1 but its modulation sees a gradient.
    assert reports[0]["first"].startswith("the gradient of blocks.1.") and len(reports[0]["samples"]) == 8


def test_going_back_then_stopping(fit, tmp_path):
    class Watch(Callback):
        def __init__(self):
            self.weights = {}

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            self.weights[trainer.global_step] = pl_module.denoiser.final.linear.weight.detach().clone()

    save = ModelCheckpoint(
        dirpath=tmp_path / "checkpoints", filename="last", every_n_train_steps=3, enable_version_counter=False
    )
    watch = Watch()
    # Steps 6 to 8 are bad, known in step 9: back to step 3. Step 10 and later are bad again.
    poison, again = Poison(5, 8), Poison(9, row=2)
    with pytest.raises(Diverged, match="3 steps in a row, up to step 12, had gradients that are not finite, again"):
        fit(poison, again, watch, save, steps=30, max_bad_steps=3, accumulate=1, enable_checkpointing=True)
    module = fit.module
    assert torch.equal(watch.weights[8], watch.weights[5]) and not torch.equal(watch.weights[9], watch.weights[8])
    (line,) = [line for line in module.said if "went back" in line]
    assert "3 steps in a row, up to step 8" in line and "went back to the weights of" in line
    assert "last-previous.ckpt" in line  # last.ckpt was written amid the bad steps
    reports = json.loads((tmp_path / "nonfinite.json").read_text())
    assert [report["step"] for report in reports] == [6, 7, 8, 10, 11, 12]
    checkpoint = torch.load(tmp_path / "checkpoints/last.ckpt")
    assert all(torch.isfinite(value).all() for value in checkpoint["current_model_state"].values())


def test_without_a_checkpoint_there_is_nothing_to_go_back_to(fit):
    with pytest.raises(Diverged, match=r"step 3, .* and there is no checkpoint to go back to. First: the latents"):
        fit(Poison(0), max_bad_steps=3, steps=9)
