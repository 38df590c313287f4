"""A flow goes the whole way that a diffusion goes: training, continuing, drawing, judging its loss, measuring."""

import csv
import json

import pytest
import torch
from calls import evaluate_loss, sample
from lightning.pytorch.loggers import CSVLogger
from weights import contents_of, scrambled

import ditlit
from ditlit.benchmarking.sampling import count_guided
from ditlit.callbacks import SampleGrid, TrainingMonitor
from ditlit.checkpoints.safetensors_files import write_safetensors
from ditlit.data import DigitsDataModule
from ditlit.diffusion import RectifiedFlow, Sampling
from ditlit.errors import InputError
from ditlit.evaluation.images import JOB
from ditlit.models import DiT
from ditlit.pictures import read_png
from ditlit.settings.evaluate import SweepSettings


@pytest.fixture
def flow_module(make_module):
    def make(**process):
        sizes = dict(input_size=8, in_channels=1, num_classes=10, patch_size=4, hidden_size=16, depth=2, num_heads=2)
        torch.manual_seed(0)
        settings = dict(process=RectifiedFlow(**process), sampling=Sampling("euler", 3))
        return make_module(denoiser=DiT(**sizes, learn_sigma=False), **settings)

    return make


@pytest.fixture
def train(flow_module, make_trainer, tmp_path):
    def run(steps, ckpt_path=None, save=None, process=None, **changes):
        trainer = make_trainer(max_steps=steps, **changes)
        data = DigitsDataModule(str(tmp_path / "digits"), global_batch_size=64, val_batch_size=360)
        trainer.fit(flow_module(**(process or {})), data, ckpt_path=ckpt_path, weights_only=False)
        trainer.save_checkpoint(tmp_path / (save or f"{steps}.ckpt"))
        return torch.load(tmp_path / (save or f"{steps}.ckpt"))

    return run


def test_a_continued_flow_is_the_one_that_never_stopped(train, tmp_path):
    process = dict(distribution="logit_normal", direction_weight=1.0)
    whole = train(6, save="whole.ckpt", process=process)
    train(3, process=process)
    continued = train(6, ckpt_path=tmp_path / "3.ckpt", process=process)
    for key in ("state_dict", "current_model_state"):
        assert all(torch.equal(value, continued[key][name]) for name, value in whole[key].items())
    assert whole["hyper_parameters"]["process"]["init_args"]["distribution"] == "logit_normal"


def test_curves_and_grids_are_those_of_a_flow(train, tmp_path):
    logger = CSVLogger(tmp_path, name="logs")
    train(
        4, process=dict(direction_weight=0.5), logger=logger, log_every_n_steps=2, val_check_interval=4,
        callbacks=[TrainingMonitor(), SampleGrid(every_n_steps=4, per_class=1)],
    )  # fmt: skip
    with open(tmp_path / "logs" / "version_0" / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    spans = {name for name in rows[0] if name.startswith("loss_by_timestep/")}
    assert spans == {f"loss_by_timestep/{span}" for span in ("0.00-0.25", "0.25-0.50", "0.50-0.75", "0.75-1.00")}
    value = {name: [float(row[name]) for row in rows if row.get(name)] for name in rows[0]}
    for split in ("train", "val"):
        loss, mse, direction = (value[f"{split}/{name}"][-1] for name in ("loss", "mse", "direction"))
        assert loss == pytest.approx(mse + 0.5 * direction, rel=1e-5) and mse > 0.3
    assert read_png(tmp_path / "samples" / "step-00000004.png").shape[0] in (1, 3)


def test_every_sampler_of_flows_draws_from_a_checkpoint_and_others_are_refused(train, tmp_path):
    train(1)
    ckpt = str(tmp_path / "1.ckpt")
    drawn = {}
    for sampler in RectifiedFlow.samplers:
        out = tmp_path / sampler
        sample(ckpt, str(out), num_samples=4, sampler=sampler, num_steps=4, guidance_scale=1.5, accelerator="cpu",
               guidance_interval="0.1,0.9")  # fmt: skip
        drawn[sampler] = torch.stack([read_png(path) for path in sorted((out / "images").glob("*.png"))])
    assert torch.equal(drawn["euler"], drawn["ddim"]) and not torch.equal(drawn["euler"], drawn["sde"])
    with pytest.raises(InputError, match=r"^ddpm is no sampler for RectifiedFlow; choose euler"):
        sample(ckpt, str(tmp_path / "out"), num_samples=4, accelerator="cpu")
    job = json.loads((tmp_path / "euler" / JOB).read_text())
    assert "shift" not in job["sampling"] and job["sampling"]["guidance_interval"] == [0.1, 0.9]
    sample(
        ckpt,
        str(tmp_path / "euler"),
        num_samples=4,
        sampler="euler",
        num_steps=4,
        guidance_scale=1.5,
        accelerator="cpu",
        guidance_interval="0.1,0.9",
    )  # fmt: skip  the job is done, and stays so
    with pytest.raises(InputError, match="other sampling"):
        sample(ckpt, str(tmp_path / "euler"), num_samples=4, sampler="euler", num_steps=4, guidance_scale=1.5,
               accelerator="cpu", guidance_interval="0.1,0.9", shift=2.0)  # fmt: skip
    images = ditlit.load(ckpt).sample([3, 8], Sampling("heun", 3, guidance_scale=1.0))
    assert images.shape == (2, 1, 8, 8)


def test_the_loss_of_a_flow_is_judged_over_its_own_time(train, tmp_path, capsys):
    train(1)
    evaluate_loss(str(tmp_path / "1.ckpt"), str(tmp_path / "digits" / "train"), num_samples=64, draws=1, bins=4,
                  accelerator="cpu", out=str(tmp_path / "loss.json"))  # fmt: skip
    text = capsys.readouterr().out
    assert " 0.25 to  0.50" in text and "timesteps" in text
    record = json.loads((tmp_path / "loss.json").read_text())
    assert record["edges"] == [0, 0.25, 0.5, 0.75, 1] and all(mse > 0.5 for mse in record["mse"])


def test_sweeps_and_measurements_know_intervals_of_a_flow():
    points = SweepSettings(ckpt="c", reference="r", out="o", sampler="euler", num_steps="10", guidance_scale="2",
                           interval="all,0.1-0.9").points  # fmt: skip
    assert [point.guidance_interval for point in points] == [None, (0.1, 0.9)]
    assert count_guided(RectifiedFlow(), points[1]) == (9, 1)  # of times 1.0 to 0.1


def test_a_flow_starts_from_the_weights_of_a_diffusion(flow_module, make_trainer, tmp_path, monkeypatch):
    """Blocks, patches and labels are kept; the last layer and the embedding of time mean something else in a flow."""
    sizes = dict(input_size=8, in_channels=1, num_classes=10, patch_size=4, hidden_size=16, depth=2, num_heads=2)
    source = scrambled(**sizes)
    write_safetensors(contents_of(source), tmp_path / "dit.safetensors")
    said = []
    monkeypatch.setattr("ditlit.training.module.rank_zero_info", said.append)
    module = flow_module()
    module.init_from = str(tmp_path / "dit.safetensors")
    fresh = {name: value.clone() for name, value in module.denoiser.state_dict().items()}
    data = DigitsDataModule(str(tmp_path / "digits"), global_batch_size=64, val_batch_size=360)
    make_trainer(max_steps=0).fit(module, data)
    for name, value in module.denoiser.state_dict().items():
        anew = name.startswith(("time_embed.", "final.linear."))
        assert torch.equal(value, fresh[name] if anew else source.state_dict()[name]), name
    line = next(line for line in said if line.startswith("Process: "))
    assert line.startswith("Process: GaussianDiffusion to RectifiedFlow; time_embed.mlp.0.weight, time_embed")
    assert line.endswith("final.linear.weight, final.linear.bias begin anew, blocks, patches and labels are kept")
