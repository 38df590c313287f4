"""A training step of a DiT beside the same model written plainly and diffusers': loss, backward, AdamW and EMA.

    python tests/benchmarks/training.py [--variant DiT-XL/2] [--batch_sizes 32 64] [--repeats 8] [--rounds 1]

Contenders: the plain model in float32 and in bf16, ours in both and compiled in bf16, and diffusers'
DiTTransformer2DModel of equal depth and width in bf16 (mixed precision: float32 weights, bf16 products). One is in
memory at a time, so that it may be as large as the device allows; more rounds show how far the machine drifts
meanwhile. Kernels are those of a step on a GPU; on a CPU the operations that PyTorch dispatches.
"""

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers import DiTTransformer2DModel
from plain_dit import PlainDiT
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from ditlit.diffusion import GaussianDiffusion
from ditlit.models import DiT, macs
from ditlit.models.compiling import compile_blocks

COLUMNS = ("step", "(lowest to highest)", "images/s", "TFLOP/s", "peak GiB", "first", "kernels")
HEADER = f"{'':24}" + "".join(map(str.rjust, COLUMNS, (10, 24, 10, 9, 10, 9, 9)))


@dataclass
class Contender:
    """A model, and how it is trained."""

    build: Callable[[str], nn.Module]
    precision: str
    compiled: bool = False


class Diffusers(nn.Module):
    """diffusers' model of a variant's depth and width, with the call of ours."""

    def __init__(self, variant: str):
        super().__init__()
        config = DiT(variant).config
        self.model = DiTTransformer2DModel(
            num_attention_heads=config["num_heads"], attention_head_dim=config["hidden_size"] // config["num_heads"],
            in_channels=4, out_channels=8, num_layers=config["depth"], sample_size=32, patch_size=config["patch_size"],
            num_embeds_ada_norm=1000, norm_eps=1e-6,
        )  # fmt: skip

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return self.model(x, t, y).sample


CONTENDERS = {
    "plain, float32": Contender(lambda variant: PlainDiT(DiT(variant)), "32"),
    "plain, bf16": Contender(lambda variant: PlainDiT(DiT(variant)), "bf16"),
    "diffusers, bf16": Contender(Diffusers, "bf16"),
    "ditlit, float32": Contender(DiT, "32"),
    "ditlit, bf16": Contender(DiT, "bf16"),
    "ditlit, bf16, compiled": Contender(DiT, "bf16", compiled=True),
}


def make_step(model: nn.Module, precision: str, compiled: bool, batch: tuple[Tensor, Tensor]) -> Callable[[], None]:
    process = GaussianDiffusion()
    if compiled:
        compile_blocks(model, batch[0].device)
        process.compile()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.0, fused=True)
    average = [p.detach().clone() for p in parameters]

    def step() -> None:
        x0, y = batch
        with torch.autocast(x0.device.type, torch.bfloat16, enabled=precision == "bf16"):
            loss = process.loss(model, x0, y)["loss"].mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        torch._foreach_lerp_(average, [p.detach() for p in parameters], 1e-4)

    return step


def seconds(step: Callable[[], None], device: torch.device) -> float:
    start = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def kernels(step: Callable[[], None], device: torch.device) -> int:
    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as found:
        step()
    events = found.events()
    return len(events) if on_gpu else sum(event.name.startswith("aten::") for event in events)


def row(name: str, contender: Contender, args: argparse.Namespace, batch_size: int, device: torch.device) -> float:
    """Measure one contender and print what was found; the median of its steps in seconds."""
    torch.manual_seed(0)
    batch = torch.randn(batch_size, 4, 32, 32, device=device), torch.arange(batch_size, device=device) % 1000
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    step = make_step(contender.build(args.variant).to(device).train(), contender.precision, contender.compiled, batch)
    first = seconds(step, device)
    seconds(step, device)
    times = [seconds(step, device) for _ in range(args.repeats)]
    median = statistics.median(times)
    peak = f"{torch.cuda.max_memory_allocated() / 2**30:.1f}" if device.type == "cuda" else "-"
    tflops = 6 * macs(DiT(args.variant)) * batch_size / median / 1e12
    spread = f"({min(times):.4f} to {max(times):.4f})"
    print(
        f"{name:24}{median:8.4f} s{spread:>24}{batch_size / median:10.1f}{tflops:9.2f}{peak:>10}{first:7.1f} s"
        f"{kernels(step, device):9,}",
        flush=True,
    )
    return median


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--variant", default="DiT-S/2")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[16])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--only", nargs="+", default=[""], help="contenders whose names contain one of these words")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    card = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    chosen = {name: one for name, one in CONTENDERS.items() if any(word in name for word in args.only)}
    for batch_size in args.batch_sizes:
        print(f"{args.variant}, batch {batch_size}, {card}, torch {torch.__version__}; medians of {args.repeats}")
        print(HEADER)
        medians: dict[str, list[float]] = {name: [] for name in chosen}
        for _ in range(args.rounds):
            for name, contender in chosen.items():
                medians[name].append(row(name, contender, args, batch_size, device))
                torch.compiler.reset()  # which holds on to the model
                gc.collect()
                if device.type == "cuda":
                    torch.cuda.empty_cache()
        best = {name: min(found) for name, found in medians.items()}
        for ours in (name for name in best if name.startswith("ditlit, bf16")):
            others = (name for name in best if not name.startswith("ditlit"))
            print(f"speed of {ours}: {'; '.join(f'{best[other] / best[ours]:.2f}x {other}' for other in others)}")


if __name__ == "__main__":
    main()
