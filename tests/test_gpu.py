"""Everything on a GPU: on the one of this machine, or on a pretended one that refuses to mix devices as CUDA does."""

import contextlib
import copy
import warnings

import numpy as np
import pytest
import torch
from calls import encode, evaluate, evaluate_loss, sample
from diffusers import AutoencoderTiny
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image
from pretended import pretended_gpu
from torch.utils.data import DataLoader

from ditlit import analysis
from ditlit.benchmarking import benchmark
from ditlit.benchmarking.benchmark import Benchmark
from ditlit.benchmarking.table import as_text
from ditlit.benchmarking.training import Subject
from ditlit.callbacks import ActivationMaxima, DigitsReport, SampleGrid, SampleMetrics, TrainingMonitor
from ditlit.data import DigitsDataModule, LatentDataModule, write_store
from ditlit.diffusion import GaussianDiffusion, Sampling
from ditlit.images.vae import Autoencoder
from ditlit.models import DiT
from ditlit.settings.benchmark import BenchmarkSettings
from ditlit.training import EMA, DiTModule

K = 5
SIZES = dict(input_size=8, in_channels=3, num_classes=K, patch_size=4, hidden_size=16, depth=2, num_heads=2)


# The pretence ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def pretended():
    with pretended_gpu():
        yield


class Foreign(torch.autograd.Function):
    """Meets the other tensor in the backward pass only."""

    @staticmethod
    def forward(ctx, x, foreign):
        ctx.save_for_backward(foreign)
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0], None


MIXES = {
    "an operator": lambda cpu, gpu: cpu + gpu,
    "a product": lambda cpu, gpu: torch.nn.functional.linear(gpu[None], cpu[None]),
    "a scalar where none is taken": lambda cpu, gpu: torch.stack([gpu.sum(), cpu.sum()]),
    "writing to the CPU": lambda cpu, gpu: cpu.add_(gpu),
    "writing to a CPU scalar": lambda cpu, gpu: cpu.sum().add_(gpu.sum()),
    "indices": lambda cpu, gpu: cpu[gpu.long()],
    "a buffer": lambda cpu, gpu: torch.nn.Embedding.from_pretrained(cpu[:, None])(gpu.long()),
    "many at once": lambda cpu, gpu: torch._foreach_add([gpu], [cpu]),
    "a backward pass": lambda cpu, gpu: Foreign.apply(gpu.requires_grad_(), cpu).sum().backward(),
    "numpy": lambda cpu, gpu: np.asarray(gpu),
    "a CPU generator": lambda cpu, gpu: torch.randn(3, device="cuda", generator=torch.Generator()),
    "a GPU generator": lambda cpu, gpu: cpu.uniform_(generator=torch.Generator("cuda")),
}


@pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES)
def test_the_pretended_gpu_refuses_what_cuda_refuses(mix, pretended):
    cpu, gpu = torch.zeros(3), torch.zeros(3).to("cuda")
    with pytest.raises((RuntimeError, TypeError), match="device"):
        mix(cpu, gpu)


def test_the_pretended_gpu_takes_what_cuda_takes(pretended):
    cpu, gpu = torch.arange(3.0), torch.arange(3.0).to("cuda")
    on_gpu = [
        gpu * cpu.sum(), gpu[cpu.long()], gpu.clone().copy_(cpu), gpu.new_tensor([1]), torch.zeros_like(cpu, device=0),
        torch.zeros(3, device="cuda"), torch.as_tensor(cpu, device="cuda"), copy.deepcopy(gpu), cpu.to(gpu), cpu.cuda(),
        gpu.view(3, 1).double().detach(), torch.randn(3, device=gpu.device, generator=torch.Generator("cuda")),
        torch.where(gpu > 1, gpu, cpu.sum()),
    ]  # fmt: skip
    on_cpu = [cpu, gpu.cpu(), gpu.to("cpu", torch.float64), torch.zeros_like(gpu, device="cpu"), cpu.copy_(gpu)]
    assert {x.device.type for x in on_gpu} == {"cuda"} and {x.device.type for x in on_cpu} == {"cpu"}
    assert gpu.is_cuda and gpu.tolist() == gpu.cpu().tolist() == [0, 1, 2] and gpu.sum().item() == 3


def test_modules_and_optimizers_move_to_the_pretended_gpu_whole(pretended):
    module = torch.nn.Linear(3, 2)
    before = list(module.parameters())
    module.to("cuda")
    assert all(a is b and a.is_cuda for a, b in zip(module.parameters(), before, strict=True))
    optimizer = torch.optim.AdamW(module.parameters(), fused=True)
    module(torch.ones(1, 3, device="cuda")).sum().backward()
    optimizer.step()
    assert all(value.is_cuda for state in optimizer.state.values() for value in state.values())
    with pytest.raises(RuntimeError, match="two devices"):
        module(torch.ones(1, 3))


# The same cases on either ---------------------------------------------------------------------------------------------


@pytest.fixture
def gpu():
    with contextlib.nullcontext() if torch.cuda.is_available() else pretended_gpu(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "'pin_memory' argument is set as true")  # the pretended one pins nothing
        warnings.filterwarnings("ignore", "__array__ implementation doesn't accept a copy")  # of torch, below a mode
        yield torch.device("cuda", 0)


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    torch.manual_seed(0)
    blocks = dict(encoder_block_out_channels=(4, 4), decoder_block_out_channels=(4, 4),
                  num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1))  # fmt: skip
    folder = tmp_path_factory.mktemp("vae")
    AutoencoderTiny(latent_channels=3, **blocks).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def latents(tmp_path_factory, vae):
    """A store of latents of a VAE, with a posterior, and shift and scale."""
    folder = tmp_path_factory.mktemp("latents") / "store"
    generator = torch.Generator().manual_seed(0)
    moments = torch.rand(20, 6, 8, 8, generator=generator)
    write_store(folder, moments, torch.arange(20) % K, K, kind="moments", shift=[0.5], scale=[0.3, 0.4, 0.5],
                vae=Autoencoder(vae).entry, image_size=16)  # fmt: skip
    return str(folder)


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    path = tmp_path_factory.mktemp("real") / "real.npz"
    np.savez(path, arr_0=np.random.default_rng(0).integers(0, 256, (20, 16, 16, 3), dtype=np.uint8))
    return str(path)


@pytest.fixture
def data(latents):
    return LatentDataModule(latents, val_size=8, global_batch_size=8, val_batch_size=4, predict_samples=3)


@pytest.fixture
def train(make_trainer):
    def make(**changes):
        return make_trainer(**(dict(accelerator="gpu", max_steps=2, gradient_clip_val=1.0) | changes))

    return make


@pytest.fixture(scope="module")
def saved(latents, tmp_path_factory):
    """A checkpoint of one step, made on the CPU."""
    folder = tmp_path_factory.mktemp("saved")
    module = DiTModule(DiT(**SIZES), ema=EMA(0.9))
    trainer = Trainer(accelerator="cpu", devices=1, max_steps=1, logger=False, enable_checkpointing=False,
                      enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder)  # fmt: skip
    trainer.fit(module, LatentDataModule(latents, global_batch_size=8))
    trainer.save_checkpoint(folder / "saved.ckpt")
    return str(folder / "saved.ckpt")


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true", "16-mixed"])
def test_fit_with_everything_that_watches(gpu, make_module, train, data, real, tmp_path, precision):
    module = make_module(sampling=Sampling(num_steps=3, guidance_scale=2.0, guidance_interval=(100, 900)))
    metrics = SampleMetrics(real, every_n_steps=2, num_samples=6, extractor="extractor.Colours", num_workers=0,
                            cache=str(tmp_path / "cache"))  # fmt: skip
    callbacks = [TrainingMonitor(), SampleGrid(every_n_steps=1, per_class=1), metrics, ActivationMaxima()]
    callbacks += [ModelCheckpoint(tmp_path, "last", every_n_train_steps=2)]
    settings = dict(callbacks=callbacks, enable_checkpointing=True, logger=True, log_every_n_steps=1)
    settings |= dict(precision=precision, accumulate_grad_batches=2, val_check_interval=1, num_sanity_val_steps=1)
    train(**settings).fit(module, data)
    assert list(tmp_path.rglob("samples/step-00000002.png"))
    again = train(precision=precision, accumulate_grad_batches=2, max_steps=3)
    again.fit(make_module(), data, ckpt_path=tmp_path / "last.ckpt")


def test_fit_from_a_loader_of_ones_own(gpu, make_module, train):
    latents = torch.randn(16, 3, 8, 8)
    samples = [{"latents": x, "labels": torch.tensor(i % K)} for i, x in enumerate(latents)]
    train().fit(make_module(), DataLoader(samples, batch_size=8))


def test_fit_a_second_time_and_draw(gpu, make_module, train, data):
    module = make_module()
    for _ in range(2):
        trainer = train(max_steps=1, callbacks=[SampleGrid(every_n_steps=1, per_class=1)])
        trainer.validate(module, data)
        trainer.fit(module, data)
    module.to(gpu)
    assert module.sample(torch.zeros(2, dtype=torch.long, device=gpu), [0, 1]).device == gpu


def test_a_bad_step_is_traced(gpu, make_module, train, data, tmp_path):
    class Poison(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 1:
                batch["moments"][1] = torch.inf

    train(max_steps=3, callbacks=[Poison()]).fit(make_module(), data)
    assert "the latents themselves" in (tmp_path / "nonfinite.json").read_text()


def test_fit_from_weights(gpu, make_module, train, data, saved):
    train().fit(make_module(init_from=saved), data)


def test_validate_test_and_predict(gpu, make_module, train, data, saved, real, tmp_path):
    metrics = SampleMetrics(real, num_samples=6, num_test_samples=6, extractor="extractor.Colours", num_workers=0,
                            cache=str(tmp_path / "cache"))  # fmt: skip
    trainer = train(callbacks=[SampleGrid(per_class=1), metrics])
    for run in (trainer.validate, trainer.test, trainer.predict):
        run(make_module(), data, ckpt_path=saved)
    assert len(list((tmp_path / "predictions").iterdir())) == 3


@pytest.mark.parametrize("move", [lambda module: module.to("cuda"), lambda module: module.cuda()], ids=["to", "cuda"])
def test_a_loaded_module_draws_where_it_is_moved(gpu, saved, move):
    module = DiTModule.load_from_checkpoint(saved, map_location="cpu")
    module.sampling = Sampling(num_steps=3)
    x = move(module).sample(torch.zeros(2, dtype=torch.long, device=gpu), [0, 1])
    again = module.cpu().sample(torch.zeros(2, dtype=torch.long), [0, 1])
    assert x.device == gpu and again.device.type == "cpu"
    torch.testing.assert_close(x.cpu(), again, rtol=1e-3, atol=1e-3)


JOBS = {
    "ddpm": dict(save="npz,latents"),
    "ddim": dict(sampler="ddim", eta=0.5, precision="bf16", guidance_interval=(100, 900), save_steps=2),
    "dpm++": dict(sampler="dpm++", precision="tf32", guidance_channels=2),
    "unipc": dict(sampler="unipc"),
    "deis": dict(sampler="deis", weights="raw"),
    "sheets of guidance": dict(sheet="guidance", sheet_scales="1,2"),
    "sheets of noise": dict(sheet="noise", sheet_columns=2, sampler="ddim"),
    "sheets of classes": dict(sheet="classes", sheet_columns=2, sampler="ddim", classes="1,2"),
}


@pytest.mark.parametrize("job", JOBS.values(), ids=JOBS)
def test_sample(gpu, saved, tmp_path, job):
    sample(saved, str(tmp_path / "out"), **(dict(num_steps=4, per_class=1, batch_size=3, classes="3,1") | job))


def test_evaluate(gpu, saved, latents, real, tmp_path):
    settings = dict(extractor="extractor.Colours", num_workers=0, batch_size=8, cache=str(tmp_path / "cache"))
    evaluate(latents, real, metrics="fid,is,precision,recall,kid", bootstrap=2, sample_sizes="10,20",
             out=str(tmp_path / "report.json"), save_stats=str(tmp_path / "stats.npz"), **settings)  # fmt: skip
    evaluate_loss(saved, latents, batch_size=8, draws=2, out=str(tmp_path / "loss.json"))


@pytest.mark.parametrize("precision", ["32", "bf16"])
def test_encode(gpu, vae, tmp_path, precision):
    (tmp_path / "images" / "ant").mkdir(parents=True)
    for i in range(3):
        Image.effect_noise((20, 20), 50).convert("RGB").save(tmp_path / "images" / "ant" / f"{i}.png")
    encode(str(tmp_path / "images"), str(tmp_path / "store"), vae, image_size=16, batch_size=2, num_workers=0,
           precision=precision, normalize="channel")  # fmt: skip


def test_benchmark(gpu, make_module, latents, tmp_path, monkeypatch):
    def build(store=latents):
        trainer = {"accelerator": "gpu", "accumulate_grad_batches": 1}
        return Subject(make_module(), LatentDataModule(store, global_batch_size=8), trainer)

    monkeypatch.delitem(benchmark.VARIANTS, "compile")  # which takes long
    for store in (latents, str(tmp_path / "nowhere")):
        settings = BenchmarkSettings(warmup=2, repeats=1, compare="diffusers", plan="10 steps, 2 GPUs")
        report = Benchmark(lambda store=store: build(store), settings).run()
        assert report.machine.device == torch.cuda.get_device_name(gpu) in as_text(report)


def test_the_largest_batch(gpu, make_module, tmp_path, monkeypatch):
    def build():
        trainer = {"accelerator": "gpu", "accumulate_grad_batches": 1}
        return Subject(make_module(), LatentDataModule(str(tmp_path / "nowhere"), global_batch_size=8), trainer)

    monkeypatch.setattr(benchmark, "largest_batch", lambda step: step(8) or 8)
    assert Benchmark(build, BenchmarkSettings(find_batch_size=True)).find_batch_size().samples == 8


def test_analysis(gpu, saved, latents):
    opened = analysis.open_checkpoint(saved, latents)
    rows = opened.rows(3)
    x0, y = opened.samples(rows)
    denoiser, process = opened.ema.denoiser, opened.ema.process
    t, noise = torch.tensor([0, 500, 999], device=gpu), torch.randn(x0.shape, device=gpu)
    assert len(opened.images(x0)) == 3
    analysis.attended_distance(analysis.attention_maps(denoiser, x0, t, y, 0), (2, 2))
    analysis.block_changes(denoiser, x0, t, y)
    analysis.gate_values(denoiser, t, y)
    analysis.sizes(denoiser, x0, t, y)
    analysis.neighbours(analysis.class_similarities(denoiser), 2)
    analysis.label_effect(denoiser, process, x0, y, t, noise)
    analysis.losses_at_scales(denoiser, process, x0, y, [1.0, 2.0], t, noise)
    analysis.predictions_at_scales(denoiser, process, x0, y, [1.0, 2.0], 500, noise)
    analysis.channel_statistics(opened.raw_latents(rows))
    analysis.round_trips(opened.autoencoder, opened.raw_latents(rows))
    analysis.mirrored(opened.autoencoder, opened.raw_latents(rows))
    pipeline = opened.pipeline(Sampling(num_steps=3), "raw")
    analysis.snapshots(pipeline, torch.tensor([0, 1]), 2)
    analysis.Quality(opened.images(x0), device=gpu)(opened.images(x0), y)


def test_the_quickstart(gpu, train, make_module, tmp_path):
    denoiser = DiT(input_size=8, in_channels=1, num_classes=10, patch_size=4, hidden_size=16, depth=1, num_heads=2)
    module = make_module(denoiser=denoiser, process=GaussianDiffusion(clip_x0=True))
    data = DigitsDataModule(str(tmp_path / "digits"), global_batch_size=8)
    train(callbacks=[SampleGrid(), DigitsReport(num_samples=20)]).fit(module, data)
