"""What makes a step fast and must not change it: compiled blocks, attention by products, fp16, and no waiting."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from lightning.pytorch.plugins import MixedPrecision
from torch.utils._python_dispatch import TorchDispatchMode

from ditlit import checkpoints
from ditlit.callbacks import TrainingMonitor
from ditlit.data import LatentDataModule
from ditlit.diffusion import GaussianDiffusion
from ditlit.errors import InputError
from ditlit.models import DiT, blocks, compiling


def trained(make_module, make_trainer, datamodule, module=None, **trainer):
    module = module or make_module()
    made = make_trainer(**({"max_steps": 4} | trainer))
    made.fit(module, datamodule)
    return module, made


# Attention and GELU ---------------------------------------------------------------------------------------------------


def test_attention_by_products_is_attention():
    torch.manual_seed(0)
    q, k, v, g = torch.randn(4, 2, 3, 7, 8, dtype=torch.float64)
    results = []
    for attention in (blocks.attention_by_products, F.scaled_dot_product_attention):
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        out = attention(*inputs)
        results.append([out, *torch.autograd.grad(out, inputs, g)])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


def test_training_in_bf16_on_a_cpu_differs_by_rounding_only(monkeypatch):
    """Products instead of the fused kernel: loss and gradients stay as near to float64 as the kernel's are."""
    torch.manual_seed(0)
    attention = blocks.Attention(32, 4, dropout=0.0)
    x = torch.randn(2, 16, 32)

    def gradients(dtype):
        module = blocks.Attention(32, 4, dropout=0.0).to(dtype)
        module.load_state_dict(attention.state_dict())
        module(x.to(dtype)).square().sum().backward()
        return torch.cat([p.grad.flatten().double() for p in module.parameters()])

    exact = gradients(torch.float64)
    calls = []
    by_products = blocks.attention_by_products
    monkeypatch.setattr(blocks, "attention_by_products", lambda *qkv: calls.append(1) or by_products(*qkv))
    ours = gradients(torch.bfloat16)
    assert calls, "bf16 with gradients on a CPU goes by products"
    monkeypatch.setattr(blocks, "products_are_faster", lambda q: False)
    kernel = gradients(torch.bfloat16)
    assert (ours - exact).norm() < 1.5 * (kernel - exact).norm()
    assert (ours - exact).norm() < 0.01 * exact.norm()


def test_compiled_gelu_is_gelu():
    x = torch.linspace(-20, 20, 4001, dtype=torch.float64)
    u = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
    expected = 0.5 * x * (1 + torch.tanh(u))
    torch.testing.assert_close(blocks.gelu_tanh(x), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.compile(blocks.gelu_tanh)(x), expected, rtol=1e-9, atol=1e-12)


# Compiling ------------------------------------------------------------------------------------------------------------


def test_a_compiled_run_is_the_same_run_and_leaves_the_same_checkpoint(make_module, make_trainer, datamodule, tmp_path):
    files = []
    for compile in (False, True):
        module, trainer = trained(make_module, make_trainer, datamodule, make_module(compile=compile))
        files.append(tmp_path / f"{compile}.ckpt")
        trainer.save_checkpoint(files[-1])
        assert any(block._compiled_call_impl is not None for block in module.denoiser.blocks) == compile
    eager, compiled = (torch.load(file, weights_only=True) for file in files)
    assert list(eager["state_dict"]) == list(compiled["state_dict"])
    for name in ("state_dict", "current_model_state"):
        for key, value in eager[name].items():
            torch.testing.assert_close(compiled[name][key], value, rtol=1e-3, atol=1e-5, msg=key)
    assert checkpoints.load(str(files[1])).step == 4


def test_compiling_without_a_compiler_says_what_to_install(make_module, make_trainer, datamodule, monkeypatch):
    monkeypatch.setattr(compiling.shutil, "which", lambda name: None)
    with pytest.raises(InputError, match=r"install g\+\+, or set --model.compile false"):
        trained(make_module, make_trainer, datamodule, make_module(compile=True))
    monkeypatch.setattr(compiling.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install triton"):
        compiling.compile_blocks(DiT("DiT-S/8", depth=1), torch.device("cuda"))


# Waiting --------------------------------------------------------------------------------------------------------------


class Reads(Callback):
    """Counts how often values of tensors are brought into Python, by step."""

    class Mode(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
                self.count += 1
            return func(*args, **(kwargs or {}))

    def __init__(self):
        self.mode = self.Mode()
        self.totals = []

    def on_train_start(self, trainer, pl_module):
        self.mode.__enter__()

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.totals.append(self.mode.count)

    def on_train_end(self, trainer, pl_module):
        self.mode.__exit__(None, None, None)

    @property
    def by_step(self):
        """Reads from the start of each step to the start of the next."""
        return [after - before for before, after in itertools.pairwise(self.totals)]


def test_a_step_waits_for_nothing(make_module, make_trainer, store):
    """Two values are read in a step: a size while its batch is gathered in the CPU's memory, and whether the step
    before was skipped, which a GPU has sent by then.
    """
    reads = Reads()
    datamodule = LatentDataModule(store, val_size=8, global_batch_size=4)
    trained(make_module, make_trainer, datamodule, callbacks=[TrainingMonitor(), reads], log_every_n_steps=100,
            max_steps=7, gradient_clip_val=1.0)  # fmt: skip
    assert reads.by_step == [1, 2, 2, 2, 2, 2]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_step_on_a_gpu_waits_for_nothing(make_module, make_trainer, datamodule):
    class Strict(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            torch.cuda.set_sync_debug_mode("error" if trainer.global_step > 1 else "default")

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            torch.cuda.set_sync_debug_mode("default")

    trained(make_module, make_trainer, datamodule, callbacks=[Strict()], log_every_n_steps=100, max_steps=6,
            accelerator="gpu")  # fmt: skip


# Work -----------------------------------------------------------------------------------------------------------------


class Kernels(TorchDispatchMode):
    """Counts the operations that compute or move something: on a GPU each is a kernel that the host has to start."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.count += not (func.is_view or func is torch.ops.aten.detach.default)
        return out


def kernels(step):
    step()  # what is made once
    with Kernels() as mode:
        step()
    return mode.count


def test_a_step_has_few_operations():
    """Those of the loss, alone and with its backward pass, and those of each further block."""
    process, counts = GaussianDiffusion(), []
    x0, noise, t, y = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), torch.tensor([0, 5]), torch.tensor([1, 2])
    out = torch.randn(2, 8, 8, 8, requires_grad=True)
    assert kernels(lambda: process.loss(lambda *_: out, x0, y, t=t, noise=noise)) <= 70
    assert kernels(lambda: process.loss(lambda *_: out, x0, y, t=t, noise=noise)["loss"].mean().backward()) <= 140
    for depth in (1, 3):
        model = DiT("DiT-S/2", 8, depth=depth, hidden_size=32, num_heads=2)
        counts.append(kernels(lambda: process.loss(model, x0, y, t=t, noise=noise)["loss"].mean().backward()))  # noqa: B023
    assert (counts[1] - counts[0]) / 2 <= 85


# fp16 -----------------------------------------------------------------------------------------------------------------


def test_fp16_scales_the_loss_and_clips_the_true_gradients(make_module, make_trainer, datamodule):
    """Four steps in fp16 with a loss scale of 1024 give the weights and the norm of float32, to fp16's rounding."""
    norms, weights = [], []
    for half in (False, True):
        scaler = torch.amp.GradScaler("cpu", init_scale=1024)
        plugins = [MixedPrecision("16-mixed", "cpu", scaler)] if half else None
        module, _ = trained(make_module, make_trainer, datamodule, plugins=plugins, gradient_clip_val=0.1)
        norms.append(module.grad_norm)
        weights.append(torch.cat([p.detach().flatten() for p in module.denoiser.parameters()]))
    torch.testing.assert_close(norms[1], norms[0], rtol=0.02, atol=0)
    start = torch.cat([p.detach().flatten() for p in make_module().denoiser.parameters()])
    assert (weights[1] - weights[0]).norm() < 0.1 * (weights[0] - start).norm()
    assert scaler.get_scale() == 1024
