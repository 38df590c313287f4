"""The moving average: what is averaged, when it stands in for the weights, and that nothing corrupts it."""

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from ditlit.errors import InputError
from ditlit.models import DiT
from ditlit.training import EMA, DiTModule


def weights(module):
    return [p.detach().clone() for p in module.denoiser.parameters()]


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


class Spy(Callback):
    """Records the weights after every step, and those seen in validation."""

    def __init__(self):
        self.raw, self.seen = [], {}

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.raw.append(weights(pl_module))

    def on_validation_start(self, trainer, pl_module):
        self.seen["start"] = weights(pl_module)

    def on_validation_batch_end(self, trainer, pl_module, *args):
        self.seen["batch"] = weights(pl_module)

    def on_validation_epoch_end(self, trainer, pl_module):
        self.seen["epoch end"] = weights(pl_module)


def follow(initial, raw, decays):
    """The average by its definition, one parameter at a time."""
    average = [p.clone() for p in initial]
    for current, decay in zip(raw, decays, strict=True):
        average = [decay * a + (1 - decay) * p.float() for a, p in zip(average, current, strict=True)]
    return average


def assert_close(a, b, **tolerance):
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, **(tolerance or dict(rtol=1e-6, atol=1e-7)))


@pytest.mark.parametrize("warmup", [False, True])
def test_follows_its_definition(make_module, make_trainer, datamodule, warmup):
    module, spy = make_module(warmup=warmup), Spy()
    initial = weights(module)
    make_trainer(callbacks=[spy], max_steps=6).fit(module, datamodule)
    decays = [min(0.9, (1 + k) / (10 + k)) if warmup else 0.9 for k in range(6)]
    assert_close(module.ema._average_model.values, follow(initial, spy.raw, decays))


def test_one_update_an_optimizer_step_not_a_micro_batch(make_module, make_trainer, datamodule):
    module, spy = make_module(), Spy()
    initial = weights(module)
    make_trainer(callbacks=[spy], max_steps=3, accumulate_grad_batches=2).fit(module, datamodule)
    assert len(spy.raw) == 6 and module.ema._average_model.num_updates == 3
    assert_close(module.ema._average_model.values, follow(initial, spy.raw[1::2], [0.9] * 3))


def test_averages_the_denoiser_only_and_leaves_frozen_parts_alone(make_module, make_trainer, datamodule):
    module = make_module()
    module.denoiser.label_embed.weight.requires_grad_(False)
    make_trainer().fit(module, datamodule)
    expected = {n for n, p in module.denoiser.named_parameters() if p.requires_grad}
    assert set(module.ema._average_model.names) == expected
    assert "label_embed.weight" not in expected and "pos_embed" not in expected


def test_is_float32_and_moves_when_the_weights_are_bfloat16(make_module, make_trainer, datamodule):
    module, spy = make_module(decay=0.9999), Spy()
    make_trainer(precision="bf16-true", callbacks=[spy], max_steps=4).fit(module, datamodule)
    average = module.ema._average_model
    assert all(value.dtype == torch.float32 for value in average.values)
    assert spy.raw[0][0].dtype == torch.bfloat16
    assert_close(average.values, follow(weights(make_module()), spy.raw, [0.9999] * 4), rtol=1e-6, atol=1e-8)
    moved = average.values[0] - weights(make_module())[0]
    assert moved.any() and moved.abs().max() < 1e-3 * average.values[0].abs().max()  # less than bfloat16 can hold


def test_swapping_does_not_round_the_average(make_module, make_trainer, datamodule):
    module = make_module(decay=0.999)
    make_trainer(precision="bf16-true").fit(module, datamodule)
    average = module.ema
    average._swap_out(module)
    before = [v.clone() for v in average._average_model.values]
    with average.averaged(module):
        assert equal(weights(module), [v.bfloat16() for v in before])
    assert equal(average._average_model.values, before)


def test_validation_sees_the_average_and_training_goes_on_with_the_raw_weights(make_module, make_trainer, datamodule):
    module, spy = make_module(), Spy()
    initial = weights(module)
    make_trainer(callbacks=[spy], max_steps=3, val_check_interval=2).fit(module, datamodule)
    expected = follow(initial, spy.raw[:2], [0.9] * 2)
    for moment in ("batch", "epoch end"):
        assert_close(spy.seen[moment], expected)
    undisturbed, quiet = make_module(), Spy()
    make_trainer(callbacks=[quiet], max_steps=3).fit(undisturbed, datamodule)
    assert equal(spy.raw[2], quiet.raw[2])


def test_other_callbacks_find_the_average_up_to_date(make_module, make_trainer, datamodule):
    updates = []

    class Reader(Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            updates.append(pl_module.ema._average_model.num_updates)

    make_trainer(callbacks=[Reader()], max_steps=3).fit(make_module(), datamodule)
    assert updates == [1, 2, 3]


def test_its_distance_from_the_weights_is_relative(make_module, make_trainer, datamodule):
    class Measure(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            self.found = pl_module.ema.distance(pl_module)
            weights = torch.cat([p.detach().flatten() for p in pl_module.denoiser.parameters()])
            with pl_module.averaged():
                average = torch.cat([p.detach().flatten() for p in pl_module.denoiser.parameters()])
            self.expected = (average - weights).norm() / weights.norm()

    measure = Measure()
    make_trainer(max_steps=3, callbacks=[measure]).fit(make_module(), datamodule)
    assert measure.expected > 1e-3
    torch.testing.assert_close(measure.found, measure.expected, rtol=1e-5, atol=0)


def test_the_model_holds_the_average_after_training(make_module, make_trainer, datamodule):
    module = make_module()
    make_trainer().fit(module, datamodule)
    assert equal(weights(module), module.ema._average_model.values)


@pytest.mark.parametrize("when", ["step", "validation", "after"])
def test_a_checkpoint_holds_raw_and_average_whenever_it_is_written(
    make_module, make_trainer, datamodule, tmp_path, when
):
    class Saver(Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            if when == "step" and trainer.global_step == 4:
                trainer.save_checkpoint(tmp_path / "x.ckpt")

        def on_validation_batch_end(self, trainer, pl_module, *args):
            if when == "validation":
                trainer.save_checkpoint(tmp_path / "x.ckpt")

    module, spy = make_module(), Spy()
    initial = weights(module)
    trainer = make_trainer(callbacks=[spy, Saver()], max_steps=4, val_check_interval=4)
    trainer.fit(module, datamodule)
    if when == "after":
        trainer.save_checkpoint(tmp_path / "x.ckpt")
    checkpoint = torch.load(tmp_path / "x.ckpt", weights_only=True)
    names = [f"denoiser.{name}" for name, _ in module.denoiser.named_parameters()]
    assert equal([checkpoint["current_model_state"][n] for n in names], spy.raw[-1])
    assert_close([checkpoint["state_dict"][n] for n in names], follow(initial, spy.raw, [0.9] * 4))


def test_an_exception_in_validation_corrupts_nothing(make_module, make_trainer, datamodule, tmp_path):
    class Failing(Callback):
        def on_validation_batch_end(self, trainer, pl_module, *args):
            raise RuntimeError("disk on fire")

    module, spy = make_module(), Spy()
    checkpoint = ModelCheckpoint(tmp_path, filename="x", every_n_train_steps=100, save_on_exception=True)
    trainer = make_trainer(callbacks=[spy, Failing(), checkpoint], val_check_interval=3, enable_checkpointing=True)
    with pytest.raises(RuntimeError, match="disk on fire"):
        trainer.fit(module, datamodule)
    assert equal(weights(module), spy.raw[-1])
    (path,) = tmp_path.glob("*.ckpt")
    state = torch.load(path, weights_only=True)["current_model_state"]
    names = [f"denoiser.{name}" for name, _ in module.denoiser.named_parameters()]
    assert equal([state[n] for n in names], spy.raw[-1])


def test_validation_and_test_from_a_checkpoint_use_the_average(make_module, make_trainer, datamodule, tmp_path):
    trained = make_module()
    trainer = make_trainer()
    trainer.fit(trained, datamodule)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    for run in ("validate", "test"):
        # Also with a module that was trained before: nothing of its own average may get in.
        for module in (make_module(), trained):
            for p in module.denoiser.parameters():
                p.detach().zero_()
            getattr(make_trainer(), run)(module, datamodule, ckpt_path=tmp_path / "x.ckpt", verbose=False)
            state = torch.load(tmp_path / "x.ckpt", weights_only=True)["state_dict"]
            assert equal(weights(module), [state[f"denoiser.{n}"] for n, _ in module.denoiser.named_parameters()])


@pytest.mark.parametrize("ema", ["each its own", "one for all"])
def test_modules_of_one_process_know_nothing_of_each_other(make_trainer, datamodule, ema):
    settings = {} if ema == "each its own" else {"ema": EMA()}

    def fit(width):
        torch.manual_seed(1)
        sizes = dict(input_size=8, in_channels=3, num_classes=5, patch_size=4, hidden_size=width, depth=1, num_heads=2)
        module, spy = DiTModule(DiT(**sizes), **settings), Spy()
        make_trainer(callbacks=[spy], max_steps=2).fit(module, datamodule)
        return module, [*spy.raw, weights(module)]

    first, alone = fit(16)
    fit(32)
    second, after_others = fit(16)
    assert all(map(equal, alone, after_others))
    assert second.process is not first.process
    assert (second.ema is first.ema) == bool(settings)


def test_a_trainer_brings_no_average_to_a_module_without_one(make_module, make_trainer, datamodule):
    trainer = make_trainer(max_steps=1)
    trainer.fit(make_module(), datamodule)
    trainer.validate(make_module(ema=None), datamodule, verbose=False)
    assert not any(isinstance(callback, EMA) for callback in trainer.callbacks)


def test_after_a_fit_the_average_is_validated_and_another_fit_goes_on_from_the_raw_weights(
    make_module, make_trainer, datamodule
):
    module, spy, again = make_module(), Spy(), Spy()
    make_trainer(callbacks=[spy]).fit(module, datamodule)
    average = [value.clone() for value in module.ema._average_model.values]
    for run in ("validate", "test"):
        getattr(make_trainer(callbacks=[again]), run)(module, datamodule, verbose=False)
        assert equal(weights(module), average)
    assert equal(again.seen["batch"], average)
    make_trainer(max_steps=0).fit(module, datamodule)  # no step, so that what it starts from is seen
    assert equal(module.ema._average_model.values, spy.raw[-1])


def test_weights_loaded_after_a_fit_are_what_another_fit_starts_from(make_module, make_trainer, datamodule):
    module, other = make_module(), make_module()
    make_trainer().fit(module, datamodule)
    module.denoiser.load_state_dict(other.denoiser.state_dict())
    make_trainer(max_steps=0).fit(module, datamodule)
    assert equal(module.ema._average_model.values, weights(other))


def test_without_an_average_everything_still_works(make_module, make_trainer, datamodule, tmp_path):
    module, spy = make_module(ema=None), Spy()
    trainer = make_trainer(callbacks=[spy], val_check_interval=2)
    trainer.fit(module, datamodule)
    assert equal(weights(module), spy.raw[-1])
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    # Its checkpoint can be continued with an average, which starts from its weights.
    continued = make_module()
    make_trainer(max_steps=4).fit(continued, datamodule, ckpt_path=tmp_path / "x.ckpt")
    assert equal(continued.ema._average_model.values, spy.raw[-1])


def test_bad_settings_are_refused(make_module, make_trainer, datamodule, tmp_path):
    with pytest.raises(InputError, match=r"lies in \[0, 1\), got 1.5"):
        EMA(decay=1.5)
    trainer = make_trainer(callbacks=[ModelCheckpoint(tmp_path, save_weights_only=True)], enable_checkpointing=True)
    with pytest.raises(InputError, match="save_weights_only=True"):
        trainer.fit(make_module(), datamodule)
