"""The training step, what it draws, what it logs, and the held-out loss."""

import csv
import logging
import re

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.profilers import Profiler
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ditlit.callbacks import TrainingMonitor
from ditlit.data import LatentDataModule, LatentStore, write_store
from ditlit.data.datasets import TrainDataset
from ditlit.diffusion import GaussianDiffusion
from ditlit.errors import InputError
from ditlit.models import DiT
from ditlit.training import DiTModule
from ditlit.training.module import prefer_fused
from ditlit.training.randomness import StepRandomness


class Terms(Callback):
    """Keeps what every training step returns."""

    def __init__(self):
        self.steps = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.steps.append(outputs | {"labels": batch["labels"]})


def test_draws_are_the_same_on_any_number_of_ranks():
    def draw(rows):
        draws = StepRandomness(1, 2, 12, rows, torch.device("cpu"))
        return [draws.timesteps(GaussianDiffusion().sample_timesteps), draws.normal(3, 2), draws.uniform()]

    whole = draw(slice(0, 12))
    parts = [draw(slice(start, start + 4)) for start in (0, 4, 8)]
    for i, expected in enumerate(whole):
        assert torch.equal(torch.cat([part[i] for part in parts]), expected)
    other_step = StepRandomness(1, 3, 12, slice(0, 12), torch.device("cpu")).normal(3, 2)
    assert not torch.equal(other_step, whole[1])


def test_accumulated_batches_are_the_same_step(make_module, make_trainer, datamodule):
    """Two micro-batches of four give the weights of one batch of eight, to rounding."""
    modules = []
    for accumulate in (1, 2):
        module = make_module(ema=None)
        make_trainer(accumulate_grad_batches=accumulate, max_steps=5).fit(module, datamodule)
        modules.append(module)
    for a, b in zip(*(m.denoiser.parameters() for m in modules), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_x0_is_a_draw_from_the_posterior_shifted_and_scaled(make_module, make_trainer, datamodule, store):
    module = make_module()
    make_trainer(max_steps=1).fit(module, datamodule)
    index = torch.zeros(20_000, dtype=torch.long)
    batch = LatentStore(store).gather(index)
    x0 = module.scaled(
        batch, lambda *shape: torch.randn(len(index), *shape, generator=torch.Generator().manual_seed(0))
    )
    mean, std = batch["moments"][0].float().chunk(2)
    scale = torch.tensor([0.3, 0.4, 0.5])[:, None, None]
    torch.testing.assert_close(x0.mean(0), (mean - 0.5) * scale, rtol=0, atol=0.02)
    torch.testing.assert_close(x0.std(0), std * scale, rtol=0.03, atol=1e-3)


@pytest.mark.parametrize("cast", [torch.nn.Module.half, torch.nn.Module.bfloat16, torch.nn.Module.double])
def test_shift_and_scale_stay_float32_when_the_module_is_cast(make_module, make_trainer, datamodule, tmp_path, cast):
    module = make_module()
    trainer = make_trainer(max_steps=1)
    trainer.fit(module, datamodule)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    loaded = DiTModule.load_from_checkpoint(tmp_path / "x.ckpt", map_location="cpu")
    for one in (module, loaded):
        shift, scale = one.latent_shift, one.latent_scale
        cast(one)
        assert one.latent_shift.dtype == one.latent_scale.dtype == torch.float32
        assert torch.equal(one.latent_shift, shift) and torch.equal(one.latent_scale, scale)
        assert scale.flatten().tolist() == pytest.approx([0.3, 0.4, 0.5])


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true", "16-true", "64-true"])
def test_shift_and_scale_are_float32_in_every_precision(make_module, make_trainer, datamodule, precision):
    trainer = make_trainer(max_steps=1, precision=precision)
    with trainer.init_module():
        module = make_module()
    assert module.latent_shift.dtype == module.latent_scale.dtype == torch.float32
    if precision != "16-true":  # which CPUs do not train
        trainer.fit(module, datamodule)
        assert module.latent_shift.dtype == module.latent_scale.dtype == torch.float32
        assert torch.equal(module.latent_scale.flatten(), torch.tensor([0.3, 0.4, 0.5]))


def test_labels_are_dropped_at_the_given_rate(make_module, make_trainer, datamodule):
    seen = []

    class Recording(DiT):
        def forward(self, x_t, t, y):
            seen.append(y)
            return super().forward(x_t, t, y)

    sizes = dict(input_size=8, in_channels=3, num_classes=5, patch_size=8, hidden_size=8, depth=1, num_heads=1)
    spy = Terms()
    module = make_module(denoiser=Recording(**sizes), class_dropout_prob=0.25)
    make_trainer(max_steps=200, callbacks=[spy]).fit(module, datamodule)
    given, used = torch.cat([s["labels"] for s in spy.steps]), torch.cat(seen)
    dropped = used == 5
    assert abs(dropped.float().mean().item() - 0.25) < 0.04
    assert torch.equal(used[~dropped], given[~dropped])


def test_runs_repeat_and_seeds_differ(make_module, make_trainer, datamodule):
    runs = []
    for seed in (0, 0, 1):
        spy = Terms()
        make_trainer(callbacks=[spy]).fit(make_module(seed=seed), datamodule)
        runs.append(torch.stack([s["loss"] for s in spy.steps]))
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_clipped_steps_have_the_given_norm(make_module, make_trainer, datamodule, precision):
    """Plain gradient descent with learning rate 1 moves the weights by the clipped gradient."""
    module = make_module(optimizer=lambda params: torch.optim.SGD(params, lr=1.0), ema=None)
    before = [p.detach().clone() for p in module.denoiser.parameters()]
    make_trainer(gradient_clip_val=1e-2, max_steps=1, precision=precision).fit(module, datamodule)
    moved = torch.cat([(p - b).flatten() for p, b in zip(module.denoiser.parameters(), before, strict=True)]).norm()
    assert module.grad_norm > 0.1
    assert moved.item() == pytest.approx(1e-2, rel=1e-3)


def test_fused_is_chosen_unless_the_user_chose():
    parameters = [torch.nn.Parameter(torch.zeros(2))]
    for chosen, expected in ((None, True), (False, False)):
        optimizer = torch.optim.AdamW(parameters, fused=chosen)
        prefer_fused(optimizer)
        assert optimizer.param_groups[0]["fused"] is expected


def test_the_fused_optimizer_runs_with_clipping_in_mixed_precision(make_module, make_trainer, datamodule):
    module = make_module()
    make_trainer(precision="bf16-mixed", gradient_clip_val=1.0).fit(module, datamodule)
    assert module.optimizers().param_groups[0]["fused"] is True


def test_monitor_logs_means_over_its_window(make_module, make_trainer, datamodule, tmp_path):
    spy = Terms()
    logger = CSVLogger(tmp_path, name="", version="")
    trainer = make_trainer(
        callbacks=[spy, TrainingMonitor()], logger=logger, log_every_n_steps=3, max_steps=6, accumulate_grad_batches=2
    )
    trainer.fit(make_module(), datamodule)
    with open(tmp_path / "metrics.csv") as file:
        first, second = list(csv.DictReader(file))
    assert (first["step"], second["step"]) == ("3", "6")
    assert float(second["throughput/images_seen"]) == 48
    terms = {k: torch.cat([s["terms"][k] for s in spy.steps[6:]]) for k in ("loss", "mse", "vlb")}
    t = torch.cat([s["t"] for s in spy.steps[6:]])
    for name, values in terms.items():
        assert float(second[f"train/{name}"]) == pytest.approx(values.mean().item(), rel=1e-5)
    for quartile, name in enumerate(("000-249", "250-499", "500-749", "750-999")):
        values = terms["loss"][t // 250 == quartile]
        assert float(second[f"loss_by_timestep/{name}"]) == pytest.approx(values.mean().item(), rel=1e-5)
    assert float(second["train/learning_rate"]) == 1e-2
    assert float(second["throughput/images_per_second"]) > 0
    assert float(second["train/grad_norm"]) == pytest.approx(trainer.lightning_module.grad_norm.item(), rel=1e-5)


def test_tensorboard_shows_what_is_promised(make_module, make_trainer, datamodule, tmp_path):
    logger = TensorBoardLogger(tmp_path, name="", version="")
    make_trainer(callbacks=[TrainingMonitor()], logger=logger, log_every_n_steps=2, val_check_interval=4).fit(
        make_module(), datamodule
    )
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert set(events.Tags()["scalars"]) >= {
        "train/loss", "train/mse", "train/vlb", "train/grad_norm", "train/learning_rate", "train/ema_distance",
        "train/ema_decay", "val/loss", "val/mse", "throughput/memory_gb", "throughput/step_seconds",
        "throughput/data_wait", "throughput/images_per_second", "throughput/images_seen", "loss_by_timestep/000-249",
    }  # fmt: skip
    assert [event.step for event in events.Scalars("train/loss")] == [2, 4]


def test_the_decay_in_force_is_logged(make_module, make_trainer, datamodule, tmp_path):
    logger = CSVLogger(tmp_path, name="", version="")
    make_trainer(callbacks=[TrainingMonitor()], logger=logger, log_every_n_steps=2).fit(
        make_module(decay=0.25, warmup=True), datamodule
    )
    with open(tmp_path / "metrics.csv") as file:
        decays = [float(row["train/ema_decay"]) for row in csv.DictReader(file)]
    assert decays == [pytest.approx(3 / 12), 0.25]  # (1 + k) / (10 + k) after k = 2 steps, then the bound


class Recorder(Profiler):
    """A user's own, which notes what it is told of."""

    def __init__(self):
        super().__init__()
        self.begun, self.ended = [], []

    def start(self, action_name):
        self.begun.append(action_name)

    def stop(self, action_name):
        self.ended.append(action_name)

    def summary(self):
        return ""


def test_time_and_waiting_are_those_of_a_step(make_module, make_trainer, datamodule, tmp_path, monkeypatch):
    """On a clock that only reading a batch (3 s) and computing on one (5 s) move; two batches are a step."""
    now = 0.0
    monkeypatch.setattr("time.perf_counter", lambda: now)

    def pass_seconds(seconds, function):
        def later(*args):
            nonlocal now
            now += seconds
            return function(*args)

        return later

    module, profiler = make_module(), Recorder()
    monkeypatch.setattr(module, "training_step", pass_seconds(5, module.training_step))
    monkeypatch.setattr(TrainDataset, "__getitem__", pass_seconds(3, TrainDataset.__getitem__))
    trainer = make_trainer(callbacks=[TrainingMonitor()], logger=CSVLogger(tmp_path, name="", version=""),
                           log_every_n_steps=2, accumulate_grad_batches=2, profiler=profiler)  # fmt: skip
    trainer.fit(module, datamodule)
    with open(tmp_path / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert float(rows[1]["throughput/step_seconds"]) == 2 * (3 + 5)
    assert float(rows[1]["throughput/data_wait"]) == 2 * 3
    assert float(rows[1]["throughput/images_per_second"]) == 8 / 16
    assert 0.1 < float(rows[1]["throughput/memory_gb"]) < 64
    assert trainer.profiler is profiler and sorted(profiler.begun) == sorted(profiler.ended)
    assert profiler.begun.count("run_training_batch") == 8


@pytest.mark.parametrize("batch_size", [3, 10])
def test_held_out_loss_does_not_depend_on_batches_or_seed(make_module, make_trainer, store, batch_size):
    reference = LatentDataModule(store, val_size=10, global_batch_size=8, val_batch_size=4)
    other = LatentDataModule(store, val_size=10, global_batch_size=8, val_batch_size=batch_size)
    results = []
    for datamodule, seed in ((reference, 0), (other, 5)):
        module = make_module(seed=seed)
        for p in module.denoiser.parameters():
            torch.nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(0))
        results.append(make_trainer().validate(module, datamodule, verbose=False)[0])
    assert results[0]["val/loss"] == pytest.approx(results[1]["val/loss"], rel=1e-5)
    assert results[0]["val/loss"] == pytest.approx(results[0]["val/mse"] + results[0]["val/vlb"], rel=1e-5)


def test_held_out_samples_are_not_trained_on(store):
    datamodule = LatentDataModule(store, val_size=10, global_batch_size=8)
    datamodule.setup()
    train, val = datamodule._train.subset.tolist(), datamodule._val.subset.tolist()
    assert len(val) == 10 and sorted(train + val) == list(range(40))


def test_reading_ahead_changes_nothing(make_module, make_trainer, store):
    runs = []
    for num_workers in (0, 2):
        spy = Terms()
        datamodule = LatentDataModule(store, val_size=10, global_batch_size=8, num_workers=num_workers)
        make_trainer(callbacks=[spy], max_steps=7).fit(make_module(), datamodule)  # more than two epochs
        runs.append(torch.stack([s["loss"] for s in spy.steps]))
    assert torch.equal(runs[0], runs[1])


def test_overfits_one_batch(make_module, make_trainer, tmp_path):
    """Eight samples, held by heart: the noise is predicted far better than by guessing zero, whose error is 1."""
    latents = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    write_store(tmp_path / "eight", latents, torch.arange(8) % 5, 5)
    spy = Terms()
    sizes = dict(input_size=8, in_channels=3, num_classes=5, patch_size=2, hidden_size=64, depth=2, num_heads=2)
    module = make_module(denoiser=DiT(**sizes), optimizer=lambda p: torch.optim.AdamW(p, lr=3e-3))
    datamodule = LatentDataModule(str(tmp_path / "eight"), global_batch_size=8, flip=False)
    make_trainer(max_steps=400, callbacks=[spy]).fit(module, datamodule)
    late = torch.cat([s["terms"]["mse"] for s in spy.steps[-50:]]).mean()
    assert late < 0.35


# Mistakes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (dict(in_channels=4), r"holds latents of shape \(3, 8, 8\), .*--model.denoiser.in_channels 3"),
        (dict(input_size=16), r"--model.denoiser.input_size 8"),
        (dict(num_classes=1000), r"has 5 classes, .* built for 1000; set --model.denoiser.num_classes 5"),
    ],
)
def test_a_denoiser_that_does_not_fit_the_store_is_refused(make_module, make_trainer, datamodule, sizes, message):
    tiny = dict(input_size=8, in_channels=3, num_classes=5, patch_size=4, hidden_size=8, depth=1, num_heads=1)
    with pytest.raises(InputError, match=message):
        make_trainer().fit(make_module(denoiser=DiT(**(tiny | sizes))), datamodule)


def test_a_corrupt_shard_stops_the_run_before_it_starts(make_module, make_trainer, tmp_path):
    write_store(tmp_path / "s", torch.randn(16, 3, 8, 8), torch.arange(16) % 5, 5)
    shard = tmp_path / "s" / "shard-00000.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1000] ^= 1
    shard.write_bytes(data)
    spy = Terms()
    with pytest.raises(InputError, match=r"shard-00000.* is corrupt"):
        make_trainer(callbacks=[spy]).fit(make_module(), LatentDataModule(str(tmp_path / "s"), global_batch_size=8))
    assert not spy.steps


def test_a_resumed_run_must_keep_its_order_and_scaling(make_module, make_trainer, store, tmp_path):
    trainer = make_trainer(max_steps=1)
    trainer.fit(make_module(), LatentDataModule(store, val_size=10, global_batch_size=8))
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    with pytest.raises(InputError, match=r"trained with data.global_batch_size 8 and cannot continue with 4"):
        make_trainer().fit(
            make_module(),
            LatentDataModule(store, val_size=10, global_batch_size=4),
            ckpt_path=tmp_path / "x.ckpt",
        )
    write_store(tmp_path / "s", torch.randn(30, 3, 8, 8), torch.arange(30) % 5, 5, scale=[0.18215])
    with pytest.raises(InputError, match="use latents of the same VAE and normalisation"):
        make_trainer().fit(
            make_module(), LatentDataModule(str(tmp_path / "s"), global_batch_size=8), ckpt_path=tmp_path / "x.ckpt"
        )


def test_stores_that_do_not_belong_together_are_refused(store, tmp_path):
    write_store(tmp_path / "s", torch.randn(8, 3, 8, 8), torch.arange(8) % 5, 5)
    with pytest.raises(InputError, match="hold different latents: kind is moments and latents"):
        LatentDataModule(store, val_store=str(tmp_path / "s")).setup()


def test_a_validation_that_lies_beyond_its_epoch_is_refused_with_the_remedy(make_trainer, make_module, datamodule):
    trainer = make_trainer(check_val_every_n_epoch=1, val_check_interval=250)
    message = (
        "trainer.val_check_interval 250 is counted anew in every epoch, and an epoch has 3 batches: set "
        "--trainer.check_val_every_n_epoch null"
    )
    with pytest.raises(InputError, match=message):
        trainer.fit(make_module(), datamodule)
    assert trainer.global_step == 0


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (dict(max_steps=4, val_check_interval=5, accumulate_grad_batches=1), "ends after 4 batches, .* after 5"),
        (dict(max_steps=4, val_check_interval=5, accumulate_grad_batches=2), None),
        (dict(max_steps=4, check_val_every_n_epoch=2, val_check_interval=1.0), "ends after 4 batches, .* after 6"),
        (dict(max_steps=-1, max_epochs=1, check_val_every_n_epoch=2, val_check_interval=3), "ends after 3 .* after 6"),
        (dict(max_steps=4, check_val_every_n_epoch=1, val_check_interval=0.5), None),
    ],
)
def test_a_run_that_would_never_validate_says_so(make_trainer, make_module, datamodule, settings, told, caplog):
    logging.getLogger("lightning.pytorch").setLevel(logging.INFO)
    with caplog.at_level(logging.INFO):
        make_trainer(limit_val_batches=1, **settings).fit(make_module(), datamodule)
    assert (told is None) == ("before its first validation" not in caplog.text)
    assert told is None or re.search(told, caplog.text)
