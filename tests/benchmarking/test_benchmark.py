"""The benchmark: steps of the real training path, arithmetic by hand, and nothing left behind."""

import errno
import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from ditlit.benchmarking import batch_size, sampling, training
from ditlit.benchmarking import benchmark as benchmarking
from ditlit.benchmarking.batch_size import accumulation, largest_batch
from ditlit.benchmarking.benchmark import Benchmark
from ditlit.benchmarking.ceiling import Products
from ditlit.benchmarking.cli import BenchmarkCLI
from ditlit.benchmarking.contenders import DiffusersDiT, DiffusersTraining, check_comparable
from ditlit.benchmarking.gauges import PROCESS, PeakMemory, Spread
from ditlit.benchmarking.plan import Measured, Plan, States, plan_rows, share_of_gpu
from ditlit.benchmarking.report import LargestBatch
from ditlit.benchmarking.table import as_text, number, seconds
from ditlit.benchmarking.training import Subject, gathered_bytes, measure_training
from ditlit.callbacks import costs
from ditlit.callbacks.peaks import product_dtype
from ditlit.cli import DitlitCLI
from ditlit.data import DigitsDataModule, LatentDataModule
from ditlit.diffusion import GaussianDiffusion, Sampling
from ditlit.errors import InputError
from ditlit.models import DiT, compiling, macs
from ditlit.settings.benchmark import BenchmarkSettings

FAST = ("--config", "digits.yaml", "--trainer.accelerator", "cpu", "--warmup", "2", "--repeats", "3",
        "--data.global_batch_size", "8", "--model.denoiser.depth", "1", "--compare", "none", "--gpus", "")  # fmt: skip
TRAINER = {"accelerator": "cpu", "accumulate_grad_batches": 1}


@pytest.fixture
def make_build(make_module, store):
    """Configurations of the test's small module, as the command line would build them."""

    def make(store=store, trainer=TRAINER, data=None, **changes):
        data = dict(val_size=10, global_batch_size=8) if data is None else data
        return lambda: Subject(make_module(**changes), LatentDataModule(store, **data), dict(trainer))

    return make


@pytest.fixture
def run(monkeypatch, tmp_path):
    """The command in a folder of its own; returns what it wrote."""
    monkeypatch.chdir(tmp_path)

    def run(*args):
        BenchmarkCLI([*FAST, *args]).benchmark()
        return json.loads(Path("runs/digits/benchmark.json").read_text())

    return run


class Clock:
    """Time that passes where a test says so."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        for room in (training, sampling):
            monkeypatch.setattr(room, "mark", lambda device: self.now)


# Plans ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "steps", "gpus"),
    [
        ("400k steps, 8 GPUs", 400_000, 8),
        ("7M steps, 64 GPUs", 7_000_000, 64),
        ("1.5M steps,1 GPU", 1_500_000, 1),
        ("  250 step , 2 gpus ", 250, 2),
        ("0.5K steps, 8 GPUS", 500, 8),
    ],
)
def test_plans_are_read(text, steps, gpus):
    assert Plan.parse(text) == Plan(steps, gpus)


@pytest.mark.parametrize(
    "text", ["", "400k", "8 GPUs", "400k steps, 0 GPUs", "0 steps, 8 GPUs", "0.0001k steps, 1 GPU", "-4k steps, 8 GPUs",
             "400G steps, 8 GPUs", "400k steps, 8.5 GPUs", "400k steps 8 GPUs", "400k steps, 8 GPUs, 2 nodes"],
)  # fmt: skip
def test_what_is_no_plan_is_refused(text):
    with pytest.raises(InputError, match='--plan is written like "400k steps, 8 GPUs"'):
        Plan.parse(text)


def test_a_plan_is_arithmetic_on_measured_steps():
    states = States(weights=4000, gradients=4000, optimizer=8008, average=4000)
    plain = Measured(step=0.9, startup=2.0, states=states, peak=50_008)
    small = Measured(step=1.2, startup=2.0, states=states, peak=26_008)
    rows = plan_rows(
        Plan(400_000, 8), {"plain": plain, "checkpointing": small, "compile": "install g++"}, gathered=300
    )  # fmt: skip
    by_name = {row.setting: row for row in rows}
    assert list(by_name) == ["plain", "checkpointing", "compile", "FSDP"]
    row = by_name["plain"]
    assert (row.hours, row.gpu_hours) == (100.0, 800.0)  # 400,000 * 0.9 s = 100 h
    assert (row.states, row.activations, row.memory) == (20_008, 30_000, 50_008)
    row = by_name["checkpointing"]
    assert row.hours == pytest.approx(400_000 * 1.2 / 3600) and row.gpu_hours == 8 * row.hours
    assert (row.states, row.activations, row.memory) == (20_008, 6_000, 26_008)
    assert by_name["compile"].why == "install g++" and by_name["compile"].hours is None
    row = by_name["FSDP"]
    assert (row.step_is, row.hours, row.gpu_hours) == ("as plain", 100.0, 800.0)
    assert row.states == 500 + 500 + 1001 + 500
    assert (row.activations, row.memory) == (30_300, 2501 + 30_300)


def test_a_plan_does_without_what_could_not_be_measured():
    states = States(100, 100, 200, 100)
    plain = Measured(1.0, 0.0, states, peak=None)
    for row in plan_rows(Plan(3600, 2), {"plain": plain}, gathered=1):
        assert (row.hours, row.activations, row.memory) == (1.0, None, None)
    rows = plan_rows(Plan(1, 2), {"plain": "out of memory"}, gathered=1)
    assert [row.why for row in rows] == ["out of memory", "follows from plain: out of memory"]
    rows = plan_rows(Plan(1, 2), {"plain": plain}, gathered="fsdp2 does not train with 16-mixed")
    assert rows[1].why == "fsdp2 does not train with 16-mixed"


def test_a_gpu_has_its_share_of_the_batch():
    assert share_of_gpu(256, 8, 2) == 32
    with pytest.raises(InputError, match=r"256 does not divide evenly over 8 GPUs and 3 accumulated .* multiple of 24"):
        share_of_gpu(256, 8, 3)


# The largest batch ----------------------------------------------------------------------------------------------------


def limited(limit, tried=None):
    def step(n):
        if tried is not None:
            tried.append(n)
        if n > limit:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    return step


@pytest.fixture
def nothing_to_free(monkeypatch):
    monkeypatch.setattr(batch_size, "free", lambda: None)


def test_the_largest_batch_is_found_exactly_and_soon(nothing_to_free):
    for limit in (*range(1, 34), 1000, 4095, 4096):
        tried = []
        assert largest_batch(limited(limit, tried), largest=5000) == limit
        assert len(tried) == len(set(tried)) <= 2 * limit.bit_length() + 1


def test_the_search_for_a_batch_ends(nothing_to_free):
    for largest in (1, 2, 63, 64, 65):
        assert largest_batch(limited(10**9), largest) == largest
    with pytest.raises(InputError, match=r"not even a batch of one .*gradient_checkpointing true"):
        largest_batch(limited(0))

    def broken(n):
        raise RuntimeError("another error")

    with pytest.raises(RuntimeError, match="another error"):
        largest_batch(broken)


def test_the_largest_batch_is_one_that_the_trainer_can_train(make_build, monkeypatch):
    sizes = []

    def training_step(self, batch, batch_idx):
        limited(11, sizes)(len(batch["labels"]))
        return original(self, batch, batch_idx)

    build = make_build(data=dict(global_batch_size=24), trainer=TRAINER | {"accumulate_grad_batches": 3})
    original = type(build().module).training_step
    monkeypatch.setattr(type(build().module), "training_step", training_step)
    bench = Benchmark(build, BenchmarkSettings())
    found = bench.find_batch_size()
    assert (found.samples, found.accumulate) == (11, 3)
    assert sizes.count(11) == 6, "two optimizer steps of three micro-batches"
    assert bench.subject.datamodule.global_batch_size == 24, "the configuration keeps its own"
    bench.micro_batch = 12
    with pytest.raises(InputError, match=r"11 samples fit at once, .* has 12: set --trainer.accumulate_grad_batches 3"):
        bench.find_batch_size()


def test_accumulated_batches_divide_the_global_batch():
    assert accumulation(256, 8, 32) == 1
    assert accumulation(256, 8, 31) == 2
    assert accumulation(96, 2, 17) == 3  # 48 in parts of 16
    assert accumulation(256, 3, 10) is None


def test_the_largest_batch_needs_a_gpu(run):
    with pytest.raises(InputError, match="--find_batch_size needs a CUDA GPU"):
        run("--find_batch_size", "true")


# Timing ---------------------------------------------------------------------------------------------------------------


def test_turns_alternate_with_steps_and_take_none_of_their_time(make_build, monkeypatch):
    """On a clock where a micro-batch takes a second, and a turn 100: steps of two are two seconds long."""
    clock, order = Clock(monkeypatch), []
    build = make_build(trainer=TRAINER | {"accumulate_grad_batches": 2})
    subject = build()
    original = subject.module.training_step

    def training_step(batch, batch_idx):
        clock.now += 1 if order else 8  # the first is late
        order.append("step")
        return original(batch, batch_idx)

    def make(trainer, module):
        def turn(batches):
            assert [len(batch["labels"]) for batch in batches] == [4, 4]
            clock.now += 100
            order.append("turn")

        return turn

    monkeypatch.setattr(subject.module, "training_step", training_step)
    found = measure_training(subject, warmup=2, repeats=3, makers={"other": make})
    assert found.step == Spread(2.0, 2.0, 2.0, [2.0] * 3)
    assert found.startup == 7.0
    assert found.turns["other"].values == [100.0] * 3
    step = ["step"] * 2
    assert order == step * 2 + ["turn"] * 2 + [*step, "turn"] * 3


def test_the_wait_for_data_is_a_share_of_the_step(make_build, monkeypatch):
    clock = Clock(monkeypatch)
    monkeypatch.setattr(costs.time, "perf_counter", lambda: clock.now)
    subject = make_build()()
    gather = LatentDataModule.train_dataloader

    class Slow:
        def __init__(self, loader):
            self.loader = loader

        def __len__(self):
            return len(self.loader)

        def __iter__(self):
            for batch in self.loader:
                clock.now += 1
                yield batch

    original = subject.module.training_step

    def training_step(batch, batch_idx):
        clock.now += 3
        return original(batch, batch_idx)

    monkeypatch.setattr(subject.datamodule, "train_dataloader", lambda: Slow(gather(subject.datamodule)))
    monkeypatch.setattr(subject.module, "training_step", training_step)
    found = measure_training(subject, warmup=2, repeats=3, makers={})
    assert found.waited == 0.25 and found.step.median == 4.0


def test_a_spread_is_median_lowest_and_highest():
    assert Spread.of([3.0, 1.0, 2.0, 10.0]) == Spread(2.5, 1.0, 10.0, [3.0, 1.0, 2.0, 10.0])


def test_states_are_counted_in_bytes(make_build):
    subject = make_build()()
    found = measure_training(subject, 2, 1, {})
    count = sum(p.numel() for p in subject.module.denoiser.parameters())
    tensors = len(list(subject.module.denoiser.parameters()))
    assert found.states == States(4 * count, 4 * count, 8 * count + 4 * tensors, 4 * count)  # Adam counts its steps
    without = measure_training(make_build(ema=None, trainer=TRAINER | {"precision": "bf16-true"})(), 2, 1, {}).states
    assert without == States(2 * count, 2 * count, 4 * count + 4 * tensors, 0)


def test_fsdp_gathers_two_blocks_and_the_gradients_of_one():
    model = DiT("DiT-S/8", depth=2, hidden_size=16, num_heads=2, input_size=8)
    block = sum(p.numel() for p in model.blocks[0].parameters())
    assert gathered_bytes(model, torch.bfloat16) == 6 * block
    assert gathered_bytes(nn.Linear(3, 4), torch.float32) == 12 * 16


@pytest.mark.skipif(not PROCESS.exists(), reason="needs /proc")
def test_peak_memory_sees_what_was_freed_again():
    memory = PeakMemory(torch.device("cpu"))
    memory.start()
    torch.zeros(16, 2**20).add_(1)  # 64 MiB, freed at once
    assert abs(memory.growth() - 2**26) < 2**23
    memory.start()
    assert memory.growth() < 2**23
    assert PeakMemory(torch.device("meta")).growth() is None


# Limits ---------------------------------------------------------------------------------------------------------------


def test_the_ceiling_counts_the_products_of_an_mlp():
    model = DiT("DiT-S/8", depth=1, hidden_size=16, num_heads=2, input_size=8, patch_size=2)
    products = Products(model, 4, torch.float32, torch.device("cpu"))
    assert products.shape == (4 * 16, 16, 64)
    products.count = 3
    calls = []
    monitor = torch.utils.flop_counter.FlopCounterMode(display=False)
    with monitor:
        calls.append(products())
    assert monitor.get_total_flops() == products.flops == 3 * 2 * 2 * 64 * 16 * 64


def test_products_have_the_precision_of_training():
    names = ("32-true", "16-mixed", "16-true", "bf16-mixed", "bf16-true", "64-true")
    types = [product_dtype(name) for name in names]
    assert types == [torch.float32, torch.float16, torch.float16, torch.bfloat16, torch.bfloat16, torch.float64]
    assert sampling.sampling_precision("32-true", "highest") == "32"
    assert sampling.sampling_precision("32-true", "high") == "tf32"
    assert [sampling.sampling_precision(name, "highest") for name in names[1:5]] == ["fp16", "fp16", "bf16", "bf16"]


# Sampling -------------------------------------------------------------------------------------------------------------


class Ticking(nn.Module):
    """A denoiser to which a sample is a second."""

    in_channels, input_size, num_classes = 3, (8, 8), 5

    def __init__(self, clock):
        super().__init__()
        self.clock = clock

    def forward(self, x_t, t, y):
        self.clock.now += len(x_t)
        return torch.zeros_like(x_t)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm++", "unipc", "deis"])
def test_a_sampling_step_is_one_guided_call(sampler, monkeypatch):
    clock = Clock(monkeypatch)
    monkeypatch.setattr(sampling, "prepared", lambda denoiser, *args, **kwargs: denoiser)
    settings = Sampling(sampler, num_steps=20, guidance_scale=2.0)
    args = (GaussianDiffusion(), settings, 4, torch.device("cpu"), "32", 2, 3)
    found = sampling.measure_sampling({"a": Ticking(clock), "b": Ticking(clock)}, *args)
    for name in "ab":
        assert found[name].step.values == [8.0] * 3 and found[name].unguided is None
        assert found[name].seconds == 20 * 8


def test_steps_outside_of_the_guidance_interval_cost_half(monkeypatch):
    clock = Clock(monkeypatch)
    monkeypatch.setattr(sampling, "prepared", lambda denoiser, *args, **kwargs: denoiser)
    process = GaussianDiffusion()
    settings = Sampling("ddim", 10, guidance_interval=(300, 700))
    inside = sum(300 <= t <= 700 for t in process.timesteps(10).tolist())
    assert sampling.count_guided(process, settings) == (inside, 10 - inside) and 0 < inside < 10
    found = sampling.measure_sampling({"a": Ticking(clock)}, process, settings, 4, torch.device("cpu"), "32", 2, 2)["a"]
    assert (found.step.median, found.unguided.median) == (8.0, 4.0)
    assert found.seconds == 8 * inside + 4 * (10 - inside)


# diffusers ------------------------------------------------------------------------------------------------------------


def test_the_contender_has_our_depth_width_and_call():
    ours = DiT(input_size=8, in_channels=3, num_classes=5, patch_size=2, hidden_size=16, depth=3, num_heads=2)
    theirs = DiffusersDiT(ours)
    assert len(theirs.model.transformer_blocks) == 3 and theirs.model.inner_dim == 16
    x, t, y = torch.randn(2, 3, 8, 8), torch.tensor([0, 999]), torch.tensor([0, 5])
    assert theirs(x, t, y).shape == ours(x, t, y).shape
    for name, model in (
        ("square", DiT(input_size=(8, 16), depth=1)),
        ("mlp_ratio 4, not 2", DiT(mlp_ratio=2, depth=1)),
    ):
        with pytest.raises(InputError, match=name):
            check_comparable(model)
    with pytest.raises(InputError, match="needs a DiT"):
        check_comparable(nn.Linear(1, 1))


def test_the_contender_trains_on_our_batches_with_our_optimizer_and_average(make_build):
    turns = []

    def make(trainer, module):
        turns.append(DiffusersTraining(trainer, module))
        turns.append([p.detach().clone() for p in turns[0].parameters])
        return lambda batches: None if turns[2:] else turns.append(turns[0](batches))

    build = make_build(decay=0.75, trainer=TRAINER | {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1})
    measure_training(build(), 2, 1, {"diffusers": make})
    theirs, before = turns[:2]
    changed = 0
    for p, old, average in zip(theirs.parameters, before, theirs.average, strict=True):
        torch.testing.assert_close(average, 0.75 * old + 0.25 * p.detach(), rtol=1e-5, atol=1e-7)
        changed += not torch.equal(p, old)
    assert changed > 0
    assert theirs.optimizer.param_groups[0]["lr"] == 1e-2 and theirs.optimizer.param_groups[0]["fused"]


# The whole ------------------------------------------------------------------------------------------------------------


def consistent(report):
    """Utilisation is the counted work over the limit, for every step of a report."""
    macs, ceiling = report["subject"]["macs"], report["ceiling"]["measured"]
    assert ceiling > 0
    for speed in report["training"].values():
        assert speed["of_ceiling"] * ceiling == pytest.approx(6 * macs * speed["images_per_second"], rel=1e-9)
        assert len(speed["step"]["values"]) == report["repeats"]
        assert speed["step"]["low"] <= speed["step"]["median"] <= speed["step"]["high"]
    for speed in report["sampling"].values():
        of_draw = report["sampler"]["num_steps"] * 2 * 2 * macs * speed["images_per_second"]
        assert speed["of_ceiling"] * ceiling == pytest.approx(of_draw, rel=1e-9)


def test_digits_without_a_store_and_beside_diffusers(run, capsys):
    report = run("--compare", "diffusers")
    consistent(report)
    assert report["subject"]["macs"] == macs(DiT(input_size=8, in_channels=1, num_classes=10, patch_size=2,
                                                 hidden_size=128, depth=1, num_heads=4))  # fmt: skip
    assert list(report["training"]) == list(report["sampling"]) == ["ditlit", "diffusers"]
    assert report["data_wait_share"] is None
    assert report["subject"]["data"] == "synthetic, since there is no store at data/digits/train"
    shown = capsys.readouterr().out
    for words in ("training step", "sampling step", "diffusers", "Ceiling: ", "Datasheet: not known", "synthetic",
                  "Speed of ditlit relative to diffusers", "Written to runs/digits/benchmark.json"):  # fmt: skip
        assert words in shown
    assert [str(path) for path in Path().rglob("*") if path.is_file()] == ["runs/digits/benchmark.json"]


def test_digits_with_a_store_leaves_store_and_run_as_they_are(run):
    pytest.importorskip("sklearn")
    DigitsDataModule().prepare_data()
    checkpoint = Path("runs/digits/checkpoints/last.ckpt")
    checkpoint.parent.mkdir(parents=True)
    checkpoint.write_bytes(b"precious")
    before = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    report = run("--trainer.max_steps", "1", "--trainer.limit_train_batches", "1")
    consistent(report)
    assert report["subject"]["data"] == "data/digits/train" and 0 < report["data_wait_share"] < 1
    after = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    after.pop(Path("runs/digits/benchmark.json"))
    assert after == before


def test_results_do_not_make_a_run_of_a_folder(run, monkeypatch):
    run("--trainer.max_steps", "1")
    monkeypatch.setattr(DitlitCLI, "_run_subcommand", lambda self, subcommand: None)
    monkeypatch.setattr("sys.argv", ["ditlit"])
    DitlitCLI(["fit", "--config", "digits.yaml", "--trainer.accelerator", "cpu"]).before_fit()


def test_a_plan_measures_each_setting_with_the_share_of_a_gpu(run, monkeypatch, capsys):
    monkeypatch.setattr(compiling.shutil, "which", lambda name: None)
    report = run("--plan", "7M steps, 4 GPUs", "--trainer.precision", "bf16-mixed")
    consistent(report)
    assert (report["subject"]["batch_size"], report["subject"]["global_batch_size"]) == (2, 8)
    assert report["plan"] == {"steps": 7_000_000, "gpus": 4}
    rows = {row["setting"]: row for row in report["plan_rows"]}
    assert list(rows) == ["plain", "checkpointing", "compile", "FSDP"]
    assert rows["plain"]["step"] == report["training"]["ditlit"]["step"]["median"]
    assert rows["checkpointing"]["step"] != rows["plain"]["step"], "measured, too"
    assert "install g++" in rows["compile"]["why"]
    for name in ("plain", "checkpointing", "FSDP"):
        assert rows[name]["hours"] == pytest.approx(7e6 * rows[name]["step"] / 3600)
        assert rows[name]["gpu_hours"] == pytest.approx(4 * rows[name]["hours"])
    assert 4 * rows["FSDP"]["states"] == pytest.approx(rows["plain"]["states"], abs=16)
    assert "Plan: 7,000,000 steps of 8 images on 4 GPUs" in capsys.readouterr().out


def test_a_plan_measures_checkpointing_and_compiling_whatever_the_configuration_does(make_build, monkeypatch):
    measured = []

    def measure(subject, warmup, repeats, makers):
        measured.append((subject.module.denoiser.config["gradient_checkpointing"], subject.module.compile_blocks))
        if measured[-1] == (False, False):
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return found

    def build():
        subject = make_build()()
        denoiser = subject.module.denoiser
        subject.module.denoiser = DiT(**(denoiser.config | {"gradient_checkpointing": True}))
        return subject

    bench = Benchmark(build, BenchmarkSettings(plan="1k steps, 2 GPUs"))
    found = measure_training(bench.subject, 2, 1, {})
    monkeypatch.setattr(benchmarking, "measure_training", measure)
    rows = {name: bench.variant(name, found) for name in benchmarking.VARIANTS}
    assert measured == [(False, False), (False, True)], "checkpointing is measured already"
    assert rows["plain"] == "out of memory" and rows["checkpointing"] == rows["compile"] == benchmarking.measured(found)


def test_too_large_a_batch_says_what_to_do(make_build, monkeypatch):
    build = make_build(trainer=TRAINER | {"accumulate_grad_batches": 2})
    monkeypatch.setattr(type(build().module), "training_step", lambda *args: limited(3)(4))
    with pytest.raises(InputError, match="out of memory with 4 samples at once: raise --trainer"):
        Benchmark(build, BenchmarkSettings(plan="1 step, 1 GPU")).run()


class Plain(nn.Module):
    """A denoiser that is no DiT."""

    in_channels, input_size, num_classes, config = 3, (8, 8), 5, {}

    def __init__(self):
        super().__init__()
        self.net = nn.Conv2d(3, 3, 1)

    def forward(self, x_t, t, y):
        return self.net(x_t)


def test_other_denoisers_are_timed_and_not_counted(make_build, monkeypatch):
    monkeypatch.setattr(compiling.shutil, "which", lambda name: None)
    build = make_build(denoiser=Plain())
    report = Benchmark(build, BenchmarkSettings(warmup=2, repeats=2, compare="none", plan="1 step, 1 GPU")).run()
    assert report.subject.macs is report.ceiling.measured is report.training["ditlit"].of_ceiling is None
    assert report.training["ditlit"].images_per_second > 0 and not report.sampling
    assert report.plan_rows[1].why == "this denoiser has no gradient_checkpointing"
    text = as_text(report)
    assert "Plain: 12 parameters, - multiply-adds" in text and "sampling step" not in text
    report.largest_batch = LargestBatch(11, 3)
    assert "11 samples at once on this device. For global_batch_size 8 on 1 GPU: --trainer.accum" in as_text(report)
    report.largest_batch = LargestBatch(11, None)
    assert "No number of accumulated batches makes global_batch_size 8 fit 1 GPU." in as_text(report)
    with pytest.raises(InputError, match="--compare diffusers needs a DiT"):
        Benchmark(build, BenchmarkSettings(compare="diffusers"))


def test_the_store_must_fit_the_model_as_in_fit(make_build, store):
    with pytest.raises(InputError, match="exceeds the 30 training samples"):
        Benchmark(make_build(data=dict(val_size=10, global_batch_size=32)), BenchmarkSettings()).run()
    wrong = DiT(input_size=8, in_channels=4, num_classes=5, patch_size=4, hidden_size=16, depth=1, num_heads=2)
    with pytest.raises(InputError, match=r"--model\.denoiser\.in_channels 3"):
        Benchmark(make_build(denoiser=wrong), BenchmarkSettings()).run()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--warmup", "1"], "--warmup is 2 at least"),
        (["--repeats", "0"], "repeats must be positive"),
        (["--plan", "soon"], "--plan is written like"),
        (["--plan", "1k steps, 3 GPUs"], "global_batch_size 8 does not divide evenly over 3 GPUs"),
        (["--out", "."], "is a folder"),
        (["--out", "s3://bucket/x.json"], "choose one with --out"),
        (["--trainer.default_root_dir", "gs://bucket/run"], "choose one with --out"),
    ],
)
def test_mistakes_are_told_before_anything_is_measured(run, args, message, monkeypatch):
    monkeypatch.setattr(training.Subject, "fit", lambda *args, **kwargs: pytest.fail("nothing should run"))
    with pytest.raises(InputError, match=message):
        run(*args)


def test_a_report_that_cannot_be_written_is_shown(run, monkeypatch, capsys):
    def full(path, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("ditlit.benchmarking.cli.write_atomically", full)
    monkeypatch.setattr("ditlit.benchmarking.cli.as_text", lambda report: "the numbers")
    monkeypatch.setattr(Benchmark, "run", lambda self: SimpleNamespace(as_dict=dict))
    with pytest.raises(InputError, match=r"json: No space left on device. The numbers are those shown above"):
        run()
    assert "the numbers" in capsys.readouterr().out


def test_one_process_measures(make_build, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    with pytest.raises(InputError, match="run it without torchrun"):
        Benchmark(make_build(), BenchmarkSettings())


def test_alone_it_answers_everything(monkeypatch, tmp_path, capsys):
    """Of a recipe whose store is not here: steps, ceiling, diffusers, sampling, and the run on one, 8 and 64 GPUs."""
    monkeypatch.chdir(tmp_path)
    small = ["--model.denoiser.depth", "1", "--model.denoiser.hidden_size", "32", "--model.denoiser.num_heads", "2",
             "--data.global_batch_size", "16", "--warmup", "2", "--repeats", "2", "--model.compile", "false",
             "--trainer.precision", "32-true", "--model.sampling.num_steps", "2"]  # fmt: skip
    BenchmarkCLI(["--config", "xl2.yaml", "--trainer.accelerator", "cpu", *small]).benchmark()
    text = capsys.readouterr().out
    report = json.loads(Path("runs/xl2/benchmark.json").read_text())
    assert set(report["training"]) == set(report["sampling"]) == {"ditlit", "diffusers"}
    assert "Ceiling: " in text and "Speed of ditlit relative to diffusers: " in text and "synthetic" in text
    one, eight, many = report["run_rows"]
    assert report["run_steps"] == 400_000 and one["step"] == report["training"]["ditlit"]["step"]["median"]
    assert eight["hours"] == pytest.approx(400_000 * eight["step"] / 3600)
    assert eight["gpu_hours"] == pytest.approx(8 * eight["hours"])
    assert many["why"] == "global_batch_size 16 does not divide evenly"
    assert "The run: 400,000 steps of 16 images" in text and "\n  8 GPUs " in text and "\n  64 GPUs " in text


def test_a_batch_that_does_not_fit_at_once_is_measured_in_parts(make_build, monkeypatch):
    """8 samples are halved until 2 fit; the shares of more GPUs are measured so too."""
    tried = []
    original = benchmarking.measure_training

    def measure(subject, *rest):
        batch = subject.datamodule.global_batch_size // subject.trainer["accumulate_grad_batches"]
        tried.append((subject.datamodule.global_batch_size, batch))
        if batch > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(subject, *rest)

    monkeypatch.setattr(benchmarking, "measure_training", measure)
    settings = BenchmarkSettings(warmup=2, repeats=1, compare="none", gpus="1,2,4")
    report = Benchmark(make_build(trainer=TRAINER | {"max_steps": 100}), settings).run()
    assert tried == [(8, 8), (8, 4), (8, 2), (4, 2), (2, 2)]
    assert report.subject.accumulate == 4 and [row.setting for row in report.run_rows] == ["1 GPU", "2 GPUs", "4 GPUs"]
    monkeypatch.setattr(benchmarking, "measure_training", lambda *_: runs_out())
    with pytest.raises(InputError, match="out of memory with 1 sample at once"):
        Benchmark(make_build(), settings).run()


def runs_out():
    raise torch.OutOfMemoryError("CUDA out of memory")


def test_the_numbers_of_gpus_are_numbers():
    for text in ("8 GPUs", "0", "-1"):
        with pytest.raises(InputError, match="--gpus takes numbers separated by commas"):
            BenchmarkSettings(gpus=text)


def test_contenders_that_are_not_known_are_refused(run):
    with pytest.raises(InputError, match="--compare takes auto or diffusers or none, got 'nanogpt'"):
        run("--compare", "nanogpt")


def test_numbers_and_durations_are_short():
    assert [number(v) for v in (118.64e9, 412.3e12, 18.6e6, 7500, 12, None)] == [
        "118.64 G", "412.30 T", "18.60 M", "7.50 k", "12", "-"]  # fmt: skip
    assert [seconds(v) for v in (61.23, 1.5, 0.1, 0.0123)] == ["61.2 s", "1.500 s", "0.100 s", "12.30 ms"]
