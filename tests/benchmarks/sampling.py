"""Guided sampling beside diffusers' DiTPipeline: the same weights, scheduler, steps, batch and precision, in one run.

    python tests/benchmarks/sampling.py [--variant DiT-S/2] [--batch_size 4] [--num_steps 50] [--precision bf16]

Random weights and a VAE so small that decoding takes no time on either side. Runs alternate, so that both meet the same
machine. With --compile true both denoisers are compiled.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DiTPipeline
from torch import nn

from ditlit import checkpoints
from ditlit.checkpoints.contents import CheckpointContents, describe
from ditlit.checkpoints.safetensors_files import write_safetensors
from ditlit.commands import call
from ditlit.diffusion import GaussianDiffusion, Sampling
from ditlit.generation.pipeline import WEIGHTS, SamplingPipeline
from ditlit.images.vae import load_decoder
from ditlit.models import DiT, macs


def make_files(variant: str, folder: Path) -> None:
    """A checkpoint of random weights and the pipeline made from it."""
    torch.manual_seed(0)
    model = DiT(variant)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.02)
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4,) * 4, norm_num_groups=2, latent_channels=4,
    ).save_pretrained(folder / "vae")  # fmt: skip
    latents = dict(shift=[0.0], scale=[0.18215], kind="moments", vae={"source": str(folder / "vae")})
    contents = CheckpointContents(
        model.state_dict(), describe(model), describe(GaussianDiffusion()), latents, 0, "ema", "ours"
    )
    write_safetensors(contents, folder / "model.safetensors")
    call("convert", source=str(folder / "model.safetensors"), out=str(folder / "pipeline"), vae=str(folder / "vae"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--variant", default="DiT-S/2")
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--num_steps", type=int, default=50)
    parser.add_argument("--precision", choices=WEIGHTS, default="bf16")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    y = torch.arange(args.batch_size)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_files(args.variant, folder)
        loaded = checkpoints.load(folder / "model.safetensors")
        count = macs(loaded.denoiser)
        decode = load_decoder(loaded.latents["vae"], None, device)
        sampling = Sampling("ddim", args.num_steps, guidance_scale=4.0)
        pipeline = SamplingPipeline(
            loaded.denoiser, loaded.process, loaded.latents, sampling, 0, device, args.precision, decode, 16,
            args.compile,
        )  # fmt: skip
        pipeline = DiTPipeline.from_pretrained(folder / "pipeline").to(device, WEIGHTS[args.precision])
        pipeline.set_progress_bar_config(disable=True)
        if args.compile:
            pipeline.transformer.compile()

        def ours() -> None:
            pipeline.images(pipeline.draw(range(args.batch_size), y))

        def theirs() -> None:
            pipeline(y.tolist(), guidance_scale=4.0, num_inference_steps=args.num_steps, output_type="np")

        times = {ours: [], theirs: []}
        for repeat in range(args.repeats + 1):
            for function, seconds in times.items():
                start = time.perf_counter()
                function()
                if repeat:
                    seconds.append(time.perf_counter() - start)
    print(
        f"{args.variant}, {args.num_steps} guided DDIM steps, batch {args.batch_size}, {args.precision}, "
        f"{'compiled' if args.compile else 'eager'}, {device}, torch {torch.__version__}"
    )
    medians = {}
    for label, function in (("ditlit", ours), ("DiTPipeline", theirs)):
        seconds = times[function]
        medians[label] = statistics.median(seconds)
        flops = 2 * count * 2 * args.batch_size * args.num_steps / medians[label]
        print(
            f"{label:12} {medians[label]:8.2f} s ({min(seconds):.2f} to {max(seconds):.2f}), "
            f"{args.batch_size / medians[label]:.3f} images/s, {flops / 1e12:.2f} TFLOP/s"
        )
    print(f"ditlit is {medians['DiTPipeline'] / medians['ditlit']:.2f}x as fast")


if __name__ == "__main__":
    main()
