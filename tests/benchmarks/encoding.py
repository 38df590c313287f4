"""Whether the VAE ever waits for images: the encode command's pipeline beside the bare VAE on the same batches.

    python tests/benchmarks/encoding.py --images IMAGES --vae VAE [--within FOLDER] [--image_size 256] [--batches 6]

Both in one run: first the bare VAE on batches that lie decoded in memory, then the pipeline, which decodes the same
images in worker processes, encodes, and writes the store; then the bare VAE again.
"""

import argparse
import tempfile
import time

import numpy as np
import torch
from lightning.fabric import Fabric

from ditlit.commands.encode import PRECISIONS, workers
from ditlit.data.folders import LocalFolder
from ditlit.images.encoding import Batches, ShardEncoder, plan
from ditlit.images.sources import open_images
from ditlit.images.vae import Autoencoder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", required=True)
    parser.add_argument("--within")
    parser.add_argument("--vae", required=True)
    parser.add_argument("--image_size", type=int, default=256)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--batches", type=int, default=6)
    parser.add_argument("--precision", default="bf16", choices=PRECISIONS)
    args = parser.parse_args()
    fabric = Fabric(devices=1, precision=PRECISIONS[args.precision])
    source = open_images(args.images, within=args.within)
    numbers = np.concatenate(plan(len(source), 4096, shuffle=True))[: args.batch_size * args.batches]
    vae = Autoencoder(args.vae).to(fabric.device)
    with tempfile.TemporaryDirectory() as folder:
        encoder = ShardEncoder(
            source, LocalFolder(folder), vae, args.image_size, True, torch.float16, args.batch_size, workers(1), False,
            fabric.device, fabric.autocast,
        )  # fmt: skip
        parts = np.split(numbers, range(args.batch_size, len(numbers), args.batch_size))
        decoder = Batches(source, args.image_size)
        start = time.perf_counter()
        batches = [decoder[part.tolist()] for part in parts]
        decoding = time.perf_counter() - start

        def bare() -> float:
            encoder.encode(batches[0].images, batches[0].good)
            start = time.perf_counter()
            for batch in batches:
                encoder.encode(batch.images, batch.good)
            return time.perf_counter() - start

        before = bare()
        start = time.perf_counter()
        list(encoder.run({0: numbers}, lambda n: None))
        piped = time.perf_counter() - start
        after = bare()
    alone, n = (before + after) / 2, len(numbers)
    print(f"{n} images at {args.image_size} px, mirrored too, batches of {args.batch_size}, {args.precision}")
    print(f"decoding alone   {n / decoding:8.1f} images/s in one process")
    print(f"bare VAE         {n / alone:8.1f} images/s ({n / before:.1f} before, {n / after:.1f} after)")
    print(f"encode           {n / piped:8.1f} images/s, {alone / piped:.1%} of the bare VAE")
    print(f"the VAE waited   {encoder.waited:8.2f} s of {piped:.2f}: busy {1 - encoder.waited / piped:.1%} of the time")


if __name__ == "__main__":
    main()
