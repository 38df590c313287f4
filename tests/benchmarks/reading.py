"""How fast latents are read, beside other ways to keep them; one process, batches in random order.

    python tests/benchmarks/reading.py [--samples 20000] [--batch_size 256] [--folder /tmp/reading]

Writes the same random records (8x32x32 float16, 16 KB: the moments of a 256x256 image) as a latent store, as one .npy
file an image, and as webdataset and litdata shards where these packages are installed, then reads each as batches of
tensors, after one pass that brings it into the page cache. webdataset reads in the order of its shards, through a
shuffle buffer; the others read at random. Also prints how much memory of its own (not of the page cache) the reader
takes for a whole epoch.
"""

import argparse
import io
import shutil
import statistics
import tarfile
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from ditlit.data import write_store
from ditlit.data.store import LatentStore

SHAPE = (8, 32, 32)


def rate(make_epoch, repeats: int) -> tuple[float, float, float]:
    """Median, lowest and highest samples per second over some epochs, after one that warms up."""
    rates = []
    for repeat in range(repeats + 1):
        start, count = time.perf_counter(), 0
        for batch in make_epoch(repeat):
            count += len(batch)
        if repeat:
            rates.append(count / (time.perf_counter() - start))
    return statistics.median(rates), min(rates), max(rates)


def own_memory() -> int:
    """Bytes of anonymous memory of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    return 0


def latent_store(folder: Path, records: np.ndarray, labels: np.ndarray, batch_size: int):
    store = write_store(folder / "store", torch.from_numpy(records), torch.from_numpy(labels), 10, kind="moments")

    def epoch(seed: int):
        order = torch.randperm(len(store), generator=torch.Generator().manual_seed(seed))
        for index in order.split(batch_size):
            yield store.gather(index)["moments"]

    return epoch


def npy_files(folder: Path, records: np.ndarray, labels: np.ndarray, batch_size: int):
    (folder / "npy").mkdir()
    for i, record in enumerate(records):
        np.save(folder / "npy" / f"{i}.npy", record)

    def epoch(seed: int):
        order = np.random.default_rng(seed).permutation(len(records))
        for start in range(0, len(order), batch_size):
            files = [np.load(folder / "npy" / f"{i}.npy") for i in order[start : start + batch_size]]
            yield torch.from_numpy(np.stack(files))

    return epoch


def webdataset_shards(folder: Path, records: np.ndarray, labels: np.ndarray, batch_size: int):
    import webdataset

    (folder / "wds").mkdir()
    for start in range(0, len(records), 4096):
        with tarfile.open(folder / "wds" / f"{start // 4096:05d}.tar", "w") as tar:
            for i in range(start, min(start + 4096, len(records))):
                for suffix, value in (("npy", npy_bytes(records[i])), ("cls", str(labels[i]).encode())):
                    info = tarfile.TarInfo(f"{i:08d}.{suffix}")
                    info.size = len(value)
                    tar.addfile(info, io.BytesIO(value))
    urls = sorted(map(str, (folder / "wds").glob("*.tar")))

    def epoch(seed: int):
        dataset = webdataset.WebDataset(urls, shardshuffle=False).shuffle(1000).decode().to_tuple("npy", "cls")
        for arrays, _ in dataset.batched(batch_size):
            yield torch.from_numpy(np.stack(arrays) if isinstance(arrays, list) else arrays)

    return epoch


def npy_bytes(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def litdata_chunks(folder: Path, records: np.ndarray, labels: np.ndarray, batch_size: int):
    import litdata
    from litdata.streaming.writer import BinaryWriter

    (folder / "litdata").mkdir()
    writer = BinaryWriter(str(folder / "litdata"), chunk_bytes="64MB")
    for i, record in enumerate(records):
        writer[i] = {"moments": torch.from_numpy(record), "label": int(labels[i])}
    writer.done()
    writer.merge()

    def epoch(seed: int):
        dataset = litdata.StreamingDataset(str(folder / "litdata"), shuffle=True, seed=seed)
        for batch in litdata.StreamingDataLoader(dataset, batch_size=batch_size, num_workers=0):
            yield batch["moments"]

    return epoch


READERS = {
    "latent store": (latent_store, None),
    ".npy files": (npy_files, None),
    "webdataset": (webdataset_shards, "webdataset"),
    "litdata": (litdata_chunks, "litdata"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--samples", type=int, default=20_000)
    parser.add_argument("--batch_size", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/reading"))
    args = parser.parse_args()
    shutil.rmtree(args.folder, ignore_errors=True)
    args.folder.mkdir(parents=True)
    records = np.random.default_rng(0).standard_normal((args.samples, *SHAPE), dtype=np.float32).astype(np.float16)
    labels = np.arange(args.samples) % 10
    print(f"{args.samples:,} records of 16 KB, batches of {args.batch_size}; median (range) of {args.repeats} epochs")
    ours = None
    for name, (make, package) in READERS.items():
        if package is not None and find_spec(package) is None:
            print(f"{name:14} skipped: not installed")
            continue
        median, low, high = rate(make(args.folder, records, labels, args.batch_size), args.repeats)
        ours = ours or median
        print(f"{name:14} {median:10,.0f} samples/s ({low:,.0f} to {high:,.0f}); the store is {ours / median:.1f}x")
    del records
    store = LatentStore(args.folder / "store")
    before = own_memory()
    for index in torch.randperm(len(store)).split(args.batch_size):
        store.gather(index)
    size = sum(shard.num_bytes for shard in store.manifest.shards)
    print(f"memory of its own after an epoch over {size / 1e6:,.0f} MB: {(own_memory() - before) / 1e6:+.1f} MB")
    shutil.rmtree(args.folder)


if __name__ == "__main__":
    main()
