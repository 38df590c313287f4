"""A training step of DiT-S/2 beside the same model written plainly and diffusers': loss, backward, AdamW and EMA.

    python tests/benchmarks/training.py [--variant DiT-S/2] [--batch_size 16] [--repeats 5]

Contenders take turns in one run: the plain model in float32 and in bf16, ours in both and compiled in bf16, and
diffusers' DiTTransformer2DModel of equal depth and width in bf16 (mixed precision: float32 weights, bf16 products).
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Callable

import torch
from diffusers import DiTTransformer2DModel
from plain_dit import PlainDiT
from torch import Tensor, nn

from ditlit.diffusion import GaussianDiffusion
from ditlit.models import DiT, macs
from ditlit.models.compiling import compile_blocks


def make_step(model: nn.Module, call: Callable, precision: str, batch: tuple[Tensor, Tensor]) -> Callable[[], dict]:
    """A training step that returns the seconds of its parts."""
    process = GaussianDiffusion()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.0, fused=True)
    average = [p.detach().clone() for p in parameters]
    device = batch[0].device

    def step() -> dict:
        marks = [now(device)]
        x0, y = batch
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            loss = process.loss(call, x0, y)["loss"].mean()
        marks.append(now(device))
        loss.backward()
        marks.append(now(device))
        optimizer.step()
        optimizer.zero_grad()
        marks.append(now(device))
        torch._foreach_lerp_(average, [p.detach() for p in parameters], 1e-4)
        marks.append(now(device))
        names = ("forward", "backward", "optimizer", "ema")
        return dict(zip(names, (b - a for a, b in itertools.pairwise(marks)), strict=True))

    return step


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--variant", default="DiT-S/2")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    batch = torch.randn(args.batch_size, 4, 32, 32, device=device), torch.arange(args.batch_size, device=device)

    def ours(compiled: bool = False) -> DiT:
        model = DiT(args.variant).to(device).train()
        if compiled:
            compile_blocks(model, device)
        return model

    plain = [PlainDiT(DiT(args.variant)).to(device).train() for _ in range(2)]
    config = DiT(args.variant).config
    theirs = DiTTransformer2DModel(
        num_attention_heads=config["num_heads"], attention_head_dim=config["hidden_size"] // config["num_heads"],
        in_channels=4, out_channels=8, num_layers=config["depth"], sample_size=32, patch_size=config["patch_size"],
        num_embeds_ada_norm=1000, norm_eps=1e-6,
    ).to(device).train()  # fmt: skip
    models = [ours(), ours(), ours(compiled=True)]
    steps = {
        "plain, float32": make_step(plain[0], plain[0], "32", batch),
        "plain, bf16": make_step(plain[1], plain[1], "bf16", batch),
        "diffusers, bf16": make_step(theirs, lambda x, t, y: theirs(x, t, y).sample, "bf16", batch),
        "ditlit, float32": make_step(models[0], models[0], "32", batch),
        "ditlit, bf16": make_step(models[1], models[1], "bf16", batch),
        "ditlit, bf16, compiled": make_step(models[2], models[2], "bf16", batch),
    }
    times = {name: [] for name in steps}
    for repeat in range(args.repeats + 1):
        for name, step in steps.items():
            parts = step()
            if repeat:
                times[name].append(parts)
    print(
        f"{args.variant}, batch {args.batch_size}, {device}, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}; medians of {args.repeats}"
    )
    flops = 6 * macs(models[0]) * args.batch_size
    medians = {}
    for name, rows in times.items():
        parts = {part: statistics.median(row[part] for row in rows) for part in rows[0]}
        medians[name] = total = statistics.median(sum(row.values()) for row in rows)
        low, high = min(sum(row.values()) for row in rows), max(sum(row.values()) for row in rows)
        shares = ", ".join(f"{part} {value:.3f}" for part, value in parts.items())
        print(f"{name:22} {total:7.3f} s ({low:.3f} to {high:.3f}; {shares}), {flops / total / 1e12:.2f} TFLOP/s")
    for ours in ("ditlit, bf16", "ditlit, bf16, compiled"):
        ratios = (f"{medians[name] / medians[ours]:.2f}x {name}" for name in steps if not name.startswith("ditlit"))
        print(f"speed of {ours}: {'; '.join(ratios)}")


if __name__ == "__main__":
    main()
