"""Whether evaluate keeps the extractor busy: its features of a folder of images beside the bare extractor, in one run.

    python tests/benchmarks/evaluation.py [--images FOLDER | --n 512 --side 256] [--extractor inception|CLASS_PATH]

The bare extractor gets batches that lie decoded in the device's memory. Evaluate reads the same images as PNG files in
worker processes and writes their features to the cache. Runs alternate, so that both meet the same machine. Inception
gets random weights unless --inception_weights is given: they take as long. Afterwards the memory that the process has
needed at most is told, and the time of the metrics themselves.
"""

import argparse
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from ditlit.commands.encode import workers
from ditlit.evaluation import frechet_distance, load_extractor, precision_recall
from ditlit.evaluation.extraction import extract, features_of
from ditlit.evaluation.images import FolderImages
from ditlit.evaluation.statistics import statistics_of
from ditlit.pictures import save_png

sys.path.insert(0, str(Path(__file__).parents[1]))
from extractor import write_random_inception


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=Path)
    parser.add_argument("--n", type=int, default=512)
    parser.add_argument("--side", type=int, default=256)
    parser.add_argument("--extractor", default="inception")
    parser.add_argument("--inception_weights", type=Path)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if args.extractor == "inception" and args.inception_weights is None:
            args.inception_weights = folder / "inception.pth"
            write_random_inception(args.inception_weights)
        extractor = load_extractor(args.extractor, args.inception_weights).to(device)
        if args.images is None:
            args.images = folder / "images"
            generator = torch.Generator().manual_seed(0)
            for i in range(args.n):  # smooth, so that they are as large and as slow to decode as pictures
                coarse = torch.rand(1, 3, args.side // 8, args.side // 8, generator=generator)
                smooth = torch.nn.functional.interpolate(coarse, (args.side, args.side), mode="bicubic")[0]
                save_png((255 * smooth.clamp(0, 1)).to(torch.uint8), args.images / f"{i:06d}.png")
        images = FolderImages(args.images)
        layers = extractor.layers
        batches = [images.load(part).to(device) for part in torch.arange(len(images)).split(args.batch_size)]

        def bare() -> None:
            for batch in batches:
                features_of(batch, extractor, layers)
            if device.type == "cuda":
                torch.cuda.synchronize()

        def ours() -> None:
            target = folder / "features"
            target.mkdir(exist_ok=True)
            extract(images, extractor, layers, target, args.batch_size, workers(1), device)

        features_of(batches[0], extractor, layers)  # warm up
        seconds: dict[str, list[float]] = {"bare extractor": [], "evaluate": []}
        for _ in range(args.repeats):
            for label, run in (("bare extractor", bare), ("evaluate", ours)):
                start = time.perf_counter()
                run()
                seconds[label].append(time.perf_counter() - start)
        rates = {label: len(images) / statistics.median(values) for label, values in seconds.items()}
        for label, rate in rates.items():
            print(f"{label:16} {rate:10.1f} images/s")
        print(f"evaluate runs at {rates['evaluate'] / rates['bare extractor']:.1%} of the bare extractor's speed")
        print(f"most memory: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GB of the process")
        start = time.perf_counter()
        features = torch.cat([features_of(batch, extractor, ("pool",))["pool"].cpu() for batch in batches[:4]])
        x = features[torch.randint(len(features), (10_000,))] + torch.randn(10_000, features.shape[1])
        start = time.perf_counter()
        known = statistics_of(x, device)
        frechet_distance(known, statistics_of(x + 0.1, device))
        print(f"Frechet distance of 10,000 by 10,000 images: {time.perf_counter() - start:.1f} s")
        start = time.perf_counter()
        precision_recall(x, x + 0.1, device=device)
        print(f"precision and recall of them: {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    main()
