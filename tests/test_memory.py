"""Memory that does not suffice for a step: what was tried, and what each setting would make of it."""

import sys
from types import SimpleNamespace

import pytest
import torch
from pretended import NAME, pretended_gpu

from ditlit.__main__ import main
from ditlit.models import DiT
from ditlit.training import DiTModule, memory
from ditlit.training.memory import gigabytes, out_of_memory, place_of, planned, saved_bytes, states_of


def runs_out(*args):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def validation_step(self, batch, batch_idx):
    runs_out()


def on_train_start(self):
    runs_out()


@pytest.fixture
def fit(monkeypatch, capsys):
    """The command, in small; returns what it says when it ends."""
    pytest.importorskip("sklearn")

    def run(*words):
        small = ["--model.denoiser.depth", "2", "--model.denoiser.hidden_size", "16", "--model.denoiser.num_heads", "2"]
        monkeypatch.setattr(sys, "argv", ["ditlit", "fit", "--config", "digits.yaml", *small, *words])
        with pytest.raises(SystemExit) as end:
            main()
        said = capsys.readouterr().err
        assert end.value.code == 2 and "Traceback" not in said
        return said.split("ditlit: error: ")[1]

    return run


def test_running_out_in_training_is_one_message(fit, monkeypatch):
    monkeypatch.setattr(DiTModule, "training_step", runs_out)
    said = fit("--trainer.accelerator", "cpu")
    assert "does not suffice for a step of this model (depth 2, hidden_size 16, " in said
    assert "with 128 samples at once (global_batch_size 128 over 1 device)" in said
    assert "in precision 32-true" in said
    assert "--trainer.accumulate_grad_batches 2: 64 samples at once, about" in said
    assert "--model.denoiser.use_checkpoint true: 128 samples at once, about" in said
    assert "ditlit benchmark with the same settings and --find_batch_size true" in said


@pytest.mark.parametrize(
    ("method", "said"),
    [
        (validation_step, "while validating: lower --data.val_batch_size"),
        (on_train_start, "outside of the training steps"),
    ],
)
def test_running_out_beside_the_steps_says_where(fit, monkeypatch, method, said):
    monkeypatch.setattr(DiTModule, method.__name__, method)
    text = fit("--trainer.accelerator", "cpu", "--trainer.val_check_interval", "1")
    assert "does not suffice beside" in text and said in text and "accumulate" not in text


def test_a_gpu_is_told_what_fits_it(make_module, make_trainer, datamodule, monkeypatch):
    """One with room for 3 of 8 samples: 2 at once, in 4 parts, by numbers that hold for every batch."""
    module, original = make_module(), DiTModule.training_step

    def training_step(batch, batch_idx):
        return original(module, batch, batch_idx) if len(batch["labels"]) <= 3 else runs_out()

    monkeypatch.setattr(module, "training_step", training_step)
    with pretended_gpu():
        trainer = make_trainer(accelerator="gpu", precision="bf16-mixed", max_steps=1)
        with pytest.raises(torch.OutOfMemoryError) as error:
            trainer.fit(module, datamodule)
        assert place_of(error.value) is None
        plain, small = planned(trainer, module, trainer.strategy.root_device)
        assert module.device.type == "cuda" and saved_bytes(trainer, module, 7) == plain.of(7)
        assert 0 < small.of_sample < plain.of_sample and len(module.denoiser.recomputed) == 0
        states = states_of(module, trainer.optimizers[0])
        room = int((states.total + plain.of(3)) / memory.ROOM) + 1
        monkeypatch.setattr(memory, "room_on", lambda device: room)
        first, *help = out_of_memory(trainer, module, None).split("\n  ")
        again = make_trainer(accelerator="gpu", precision="bf16-mixed", max_steps=1, accumulate_grad_batches=4)
        again.fit(module, datamodule)  # as it is told
        assert states_of(module, again.optimizers[0]).total == pytest.approx(states.total, rel=0.1)
    assert f"memory of {NAME} (85.9 GB, of which {gigabytes(room)} are free for this run) does not suffice" in first
    assert "8 samples at once (global_batch_size 8 over 1 device) in precision bf16-mixed, about" in first
    assert f"about {gigabytes(states.total + plain.of(8))}: {gigabytes(states.total)} for weights" in first
    assert help[0] == (
        "--trainer.accumulate_grad_batches 4: 2 samples at once, about "
        f"{gigabytes(states.total + plain.of(2))}, for the same result"
    )
    assert help[1].startswith("--model.denoiser.use_checkpoint true: 8 samples at once, about ")
    assert gigabytes(states.total + small.of(8)) in help[1]


def test_states_are_known_before_the_first_step(make_module, make_trainer, datamodule):
    module, trainer = make_module(), make_trainer(max_steps=1)
    before = states_of(module, module.optimizer(list(module.denoiser.parameters())))
    trainer.fit(module, datamodule)
    state = [value for values in trainer.optimizers[0].state.values() for value in values.values() if value.ndim > 0]
    parameters = list(module.denoiser.parameters())
    held = [*parameters, *parameters, *state, *module.ema._average_model.values]  # gradients are as large
    assert before.total == pytest.approx(memory.num_bytes(held), rel=1e-3)  # Adam also counts its steps


def test_more_gpus_can_share_the_states(monkeypatch):
    denoiser = DiT("DiT-B/2", num_classes=10, use_checkpoint=True)
    module = DiTModule(denoiser)
    trainer = SimpleNamespace(datamodule=SimpleNamespace(global_batch_size=256), world_size=4, optimizers=[],
                              accumulate_grad_batches=2, precision="bf16-mixed",
                              strategy=SimpleNamespace(root_device=torch.device("cpu")))  # fmt: skip
    monkeypatch.setattr(memory, "planned", runs_out)  # not even one sample
    first, *help = out_of_memory(trainer, module, None).split("\n  ")
    states = 5 * 4 * sum(p.numel() for p in denoiser.parameters())  # weights, gradients, two moments, the average
    assert (
        "this model (DiT-B/2)" in first
        and f"{states / 1e9:.1f} GB for weights, gradients, optimizer and moving average" in first
    )
    assert "32 samples at once (global_batch_size 256 over 4 devices and 2 accumulated batches)" in first
    assert help == [
        "--trainer.accumulate_grad_batches 4: 16 samples at once, for the same result",
        f"--trainer.strategy fsdp2: {states / 4e9:.1f} GB in place of {states / 1e9:.1f} GB for weights, gradients, "
        "optimizer and moving average",
        "ditlit benchmark with the same settings and --find_batch_size true tells the most samples that fit",
    ]
