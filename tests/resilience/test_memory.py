"""Memory that does not suffice for a step: what was tried, and what each setting would make of it."""

import sys
from types import SimpleNamespace

import pytest
import torch

from ditlit.__main__ import main
from ditlit.callbacks import evaluation
from ditlit.models import DiT
from ditlit.resilience import memory
from ditlit.resilience.memory import bytes_of_states, out_of_memory
from ditlit.training import DiTModule


def runs_out(*args):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def test_running_out_in_training_is_one_message(monkeypatch, capsys):
    monkeypatch.setattr(DiTModule, "training_step", runs_out)
    monkeypatch.setattr(sys, "argv", ["ditlit", "fit", "--config", "digits.yaml", "--trainer.accelerator", "cpu"])
    with pytest.raises(SystemExit) as end:
        main()
    said = capsys.readouterr().err.split("ditlit: error: ")[1]
    assert end.value.code == 2 and "Traceback" not in said
    assert "does not suffice for a step of 128 samples at once (global_batch_size 128 over 1 device)" in said
    assert "in precision 32-true" in said
    assert "--trainer.accumulate_grad_batches 2: 64 samples at once, and half the activations" in said
    assert "ditlit benchmark with the same settings and --find_batch_size true" in said


@pytest.mark.parametrize(
    ("at_work", "advice"),
    [("validation_step", "lower --data.val_batch_size"), ("draw_images", "lower batch_size of the callback")],
)
def test_running_out_beside_the_steps_says_where(at_work, advice):
    places = {}
    exec(f"def {at_work}(): runs_out()", {"runs_out": runs_out}, places)
    with pytest.raises(torch.OutOfMemoryError) as error:
        places[at_work]()
    module = SimpleNamespace(denoiser=None, device=torch.device("cpu"))
    said = out_of_memory(SimpleNamespace(), module, error.value)
    assert said.startswith("the memory of this machine (cpu) does not suffice while") and advice in said
    assert hasattr(DiTModule, at_work) or hasattr(evaluation, at_work), "the function has another name now"


def test_the_numbers_are_those_of_the_plan(make_module, make_trainer, datamodule):
    """After a step, when the optimizer's state is there."""
    module, trainer = make_module(), make_trainer(max_steps=1)
    trainer.fit(module, datamodule)
    state = [value for values in trainer.optimizers[0].state.values() for value in values.values() if value.ndim > 0]
    parameters = list(module.denoiser.parameters())
    held = [*parameters, *parameters, *state, *module.ema._average_model.values]  # gradients are as large
    assert bytes_of_states(trainer, module) == memory.num_bytes(held)


def test_what_would_help_on_four_gpus(monkeypatch):
    denoiser = DiT("DiT-B/2", num_classes=10)
    module = SimpleNamespace(denoiser=denoiser, device=torch.device("cuda", 0), ema=object())
    optimizer = torch.optim.AdamW(denoiser.parameters())
    trainer = SimpleNamespace(datamodule=SimpleNamespace(global_batch_size=256), world_size=4, optimizers=[optimizer],
                              accumulate_grad_batches=2, precision="bf16-mixed")  # fmt: skip
    card = SimpleNamespace(name="NVIDIA A10", total_memory=24e9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    first, *help = out_of_memory(trainer, module, torch.OutOfMemoryError()).split("\n")
    states = 5 * 4 * sum(p.numel() for p in denoiser.parameters())  # weights, gradients, two moments, the average
    assert "NVIDIA A10 (24.0 GB)" in first and f"take {states / 1e9:.1f} GB of it" in first
    assert "32 samples at once (global_batch_size 256 over 4 devices and 2 accumulated batches)" in first
    assert [line.strip().split(":")[0] for line in help] == [
        "--trainer.accumulate_grad_batches 4", "--model.denoiser.gradient_checkpointing true",
        "--trainer.strategy fsdp2",
        "ditlit benchmark with the same settings and --find_batch_size true finds the most samples that fit",
    ]  # fmt: skip
    assert "0.3 GB of those between blocks" in help[1]  # 12 blocks x 32 samples x 256 tokens x 768 x 4 bytes
    assert f"{states / 4e9:.1f} GB of the states on each device" in help[2]
