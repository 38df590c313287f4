"""Continuing otherwise: other settings of the optimizer count from the next step on, other data are refused."""

from functools import partial

import pytest
import torch
from lightning.pytorch import Callback
from ranks import fit as fit_on_ranks
from runs import assert_same
from torch.optim import SGD, Adam, AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, MultiStepLR, OneCycleLR, SequentialLR
from weights import contents_of, scrambled

from ditlit.checkpoints.safetensors_files import write_safetensors
from ditlit.data import LatentDataModule, write_store
from ditlit.errors import InputError
from ditlit.resilience import CheckpointFiles


class Watch(Callback):
    """Remembers the settings with which each step is taken, and may change them before one."""

    def __init__(self, change_at=None, **change):
        self.change_at, self.change, self.seen = change_at, change, []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        (group,) = trainer.optimizers[0].param_groups
        if trainer.global_step == self.change_at:
            group.update(self.change)
        self.seen.append({name: group[name] for name in ("lr", "weight_decay", "betas", "eps") if name in group})

    @property
    def lr(self):
        return [step["lr"] for step in self.seen]


@pytest.fixture
def fit(make_module, make_trainer, datamodule, tmp_path, monkeypatch):
    """Trains to a step; returns the path of the checkpoint there, and what was said."""
    said = []
    monkeypatch.setattr("ditlit.resilience.resuming.rank_zero_info", said.append)

    def run(step, watch, ckpt_path=None, optimizer=partial(AdamW, lr=1e-2), **changes):
        said.clear()
        trainer = make_trainer(max_steps=step, max_epochs=-1, callbacks=[watch], plugins=[CheckpointFiles()])
        trainer.fit(make_module(optimizer=optimizer, **changes), datamodule, ckpt_path=ckpt_path)
        path = tmp_path / f"{step}.ckpt"
        trainer.save_checkpoint(path)
        return path, list(said)

    return run


def test_other_settings_of_the_optimizer_count_from_the_next_step_on(fit):
    """To the bit as if they had been changed while training."""
    changed = dict(lr=5e-3, weight_decay=0.3, betas=(0.8, 0.99), eps=1e-6)
    whole, _ = fit(6, Watch(3, **changed))
    whole = torch.load(whole)
    path, said = fit(3, Watch())
    assert not said
    watch = Watch()
    continued, said = fit(6, watch, path, optimizer=partial(AdamW, **changed))
    assert watch.seen == [changed] * 3
    for key in ("state_dict", "current_model_state", "optimizer_states"):
        assert_same(torch.load(continued)[key], whole[key], key)
    assert said == [
        "Other settings of the optimizer from step 4 on: lr 0.01 -> 0.005, betas [0.9, 0.999] -> [0.8, 0.99], "
        "eps 1e-08 -> 1e-06, weight_decay 0.01 -> 0.3."
    ]
    assert not fit(8, Watch(), continued, optimizer=partial(AdamW, **changed))[1]  # it is what was, by now


def warmup(optimizer, steps):
    schedules = [LinearLR(optimizer, 0.1, total_iters=2), CosineAnnealingLR(optimizer, steps)]
    return SequentialLR(optimizer, schedules, [2])


SCHEDULES = {
    "none": None,
    "linear": partial(LinearLR, total_iters=5),
    "longer": partial(LinearLR, total_iters=9),
    "cosine": partial(CosineAnnealingLR, T_max=8),
    "in the future": partial(MultiStepLR, milestones=[5]),
    "further": partial(MultiStepLR, milestones=[6]),
    "warmup": partial(warmup, steps=8),
    "longer warmup": partial(warmup, steps=12),
    "one cycle": partial(OneCycleLR, max_lr=0.1, total_steps=20),
}


@pytest.mark.parametrize("old", [False, True], ids=["", "an older checkpoint"])
@pytest.mark.parametrize(
    ("before", "after"),
    [("none", "linear"), ("linear", "none"), ("linear", "longer"), ("linear", "cosine"), ("in the future", "further"),
     ("warmup", "longer warmup"), ("cosine", "one cycle")],
)  # fmt: skip
def test_another_schedule_is_taken_up_where_the_run_stands(fit, before, after, old):
    path, _ = fit(4, Watch(), lr_scheduler=SCHEDULES[before])
    if old:
        content = torch.load(path)
        del content["optimizer_settings"]
        torch.save(content, path)
    assert not fit(4, Watch(), path, lr_scheduler=SCHEDULES[before])[1]
    whole, watch = Watch(), Watch()
    fit(7, whole, lr_scheduler=SCHEDULES[after])
    _, said = fit(7, watch, path, lr_scheduler=SCHEDULES[after])
    assert watch.lr == whole.lr[4:] and len(said) == 1


def test_a_learning_rate_is_changed_under_its_schedule(fit):
    path, _ = fit(4, Watch(), lr_scheduler=SCHEDULES["linear"])
    whole, watch = Watch(), Watch()
    other = dict(optimizer=partial(AdamW, lr=3e-3), lr_scheduler=SCHEDULES["linear"])
    fit(7, whole, **other)
    assert fit(7, watch, path, **other)[1] == ["Other settings of the optimizer from step 5 on: lr 0.01 -> 0.003."]
    assert watch.lr == whole.lr[4:]


@pytest.mark.parametrize(("other", "old"), [(Adam, False), (SGD, False), (SGD, True)])
def test_another_optimizer_is_refused_with_the_remedy(fit, other, old):
    path, _ = fit(2, Watch())
    if old:
        content = torch.load(path)
        del content["optimizer_settings"]
        torch.save(content, path)
    with pytest.raises(InputError, match=rf"trained with .* {other.__name__}.*start anew .* --model.init_from"):
        fit(3, Watch(), path, optimizer=partial(other, lr=1e-2))


def test_a_schedule_that_is_over_is_refused(fit):
    path, _ = fit(4, Watch())
    with pytest.raises(InputError, match=r"the new lr_scheduler cannot continue at step 4: .*total steps is 3"):
        fit(6, Watch(), path, lr_scheduler=partial(OneCycleLR, max_lr=0.1, total_steps=3))


def test_other_settings_count_in_shards_too(tmp_path, store):
    folders = [fit_on_ranks(tmp_path / "before", store, 1, "auto", max_steps=3)]
    path = str(folders[0] / "checkpoints" / "last.ckpt")
    for ranks, strategy in ((1, "auto"), (2, "fsdp2")):
        words = ("--ckpt_path", path, "--model.optimizer.lr", "0.003", "--model.optimizer.eps", "0.002")
        folders.append(fit_on_ranks(tmp_path / strategy, store, ranks, strategy, *words))
        assert (folders[-1] / "log.txt").read_text().count("lr 0.01 -> 0.003, eps 0.001 -> 0.002") == 1
    one, shards = (torch.load(folder / "checkpoints" / "last.ckpt") for folder in folders[1:])
    assert shards["optimizer_states"][0]["param_groups"][0]["lr"] == 0.003
    for name, value in one["current_model_state"].items():
        torch.testing.assert_close(shards["current_model_state"][name], value, rtol=1e-5, atol=2e-6)


# Other data ----------------------------------------------------------------------------------------------------------

VAE = {"class": "AutoencoderKL", "source": "here", "hash": "a" * 64}


@pytest.fixture
def data(tmp_path):
    def make(name, vae=VAE, class_names=tuple("abcde")):
        latents = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        names = None if class_names is None else list(class_names)
        write_store(tmp_path / name, latents, torch.arange(16) % 5, 5, vae=vae, class_names=names)
        return LatentDataModule(
            str(tmp_path / name), val_size=8, global_batch_size=8, val_batch_size=4, predict_samples=2
        )

    return make


OTHER = {
    "vae": (dict(vae=VAE | {"hash": "b" * 64, "source": "there"}),
            r"VAE AutoencoderKL here \(hash aaaaaaaaaaaaaaaa.*AutoencoderKL there \(hash bbbbbbbbbbbbbbbb"),
    "names": (dict(class_names="abxde"), "other classes than the store .*: class 2 is 'c' there and 'x' here"),
    "order": (dict(class_names="bacde"), "class 0 is 'a' there and 'b' here"),
}  # fmt: skip


@pytest.mark.parametrize("other", OTHER)
def test_latents_of_another_vae_and_other_classes_are_refused(make_module, make_trainer, data, tmp_path, other):
    trainer = make_trainer(max_steps=1)
    trainer.fit(make_module(), data("first"))
    path = tmp_path / "x.ckpt"
    trainer.save_checkpoint(path)
    changes, said = OTHER[other]
    other = data("other", **changes)
    for command in ("fit", "validate", "test", "predict"):
        with pytest.raises(InputError, match=rf"the checkpoint .*x\.ckpt was trained on .*{said}"):
            getattr(make_trainer(max_steps=2), command)(make_module(), datamodule=other, ckpt_path=path)


def test_what_is_not_known_of_latents_is_not_refused(make_module, make_trainer, data, tmp_path):
    trainer = make_trainer(max_steps=1)
    trainer.fit(make_module(), data("first"))
    path = tmp_path / "x.ckpt"
    trainer.save_checkpoint(path)
    unknown, moved = {"class": "AutoencoderKL", "source": "here"}, VAE | {"source": "moved"}
    for name, changes in (("a", dict(vae=unknown)), ("b", dict(vae=moved)), ("c", dict(class_names=None))):
        make_trainer(max_steps=2).validate(make_module(), datamodule=data(name, **changes), ckpt_path=path)


def test_weights_for_latents_of_another_vae_are_not_started_from(make_module, make_trainer, data, tmp_path):
    sizes = dict(input_size=8, in_channels=3, num_classes=5, patch_size=4, hidden_size=16, depth=2, num_heads=2)
    contents = contents_of(scrambled(**sizes))
    contents.latents = contents.latents | {"vae": VAE}
    write_safetensors(contents, tmp_path / "start.safetensors")
    start = str(tmp_path / "start.safetensors")
    make_trainer(max_steps=1).fit(make_module(init_from=start), data("same"))
    changes, said = OTHER["vae"]
    with pytest.raises(InputError, match=rf"start.safetensors was trained on latents of the {said}"):
        make_trainer(max_steps=1).fit(make_module(init_from=start), data("other", **changes))
