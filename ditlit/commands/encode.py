"""``ditlit encode``: from a folder of images to a latent store."""

import hashlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.fabric import Fabric

from ditlit.commands.processes import Progress, ending_together, gathered, launch, share
from ditlit.data.audit import audit
from ditlit.data.folders import Folder, LocalFolder, check_writable, open_folder, remove_leftovers
from ditlit.data.manifest import MANIFEST, Manifest, read_manifest
from ditlit.data.shards import shard_name
from ditlit.data.store import finish_store
from ditlit.errors import InputError, counted
from ditlit.images.decoding import PREPROCESSING
from ditlit.images.encoding import ShardEncoder, Written, plan, read_back
from ditlit.images.sources import ImageSource, open_images
from ditlit.images.summary import summarize
from ditlit.images.vae import Autoencoder
from ditlit.settings.encode import EncodeSettings

SETTINGS = "encode.json"  # how the store is made, written first: a rerun must continue with the same
PRECISIONS = {"32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}
RECORDED = ("flips", "precision", "dtype", "normalize", "shard_size", "shuffle")  # of the settings, there
MOST_NAMED = 20  # broken files in a message


@ending_together
def encode(settings: EncodeSettings) -> None:
    """See :class:`EncodeSettings`."""
    if settings.verify is not None:
        check(settings.verify)
        return
    out = settings.out
    folder = open_folder(out)
    if isinstance(folder, LocalFolder):
        check_outside(folder.path, Path(settings.images, (settings.within or "").strip("/")))
    source = open_images(settings.images, settings.labels, settings.within)
    autoencoder = Autoencoder(settings.vae)
    record = {
        "images": listing_hash(source),
        "image_size": settings.image_size,
        "preprocessing": PREPROCESSING,
        "vae": autoencoder.entry,
    } | {name: getattr(settings, name) for name in RECORDED}
    files = folder.names()
    check_settings(folder, files, record)
    if MANIFEST in files:
        print(f"{out} is complete already; delete it to encode anew")
        return
    if isinstance(folder, LocalFolder):
        check_writable(folder.path, "--out")

    fabric, on_this_machine = launch(settings.execution, PRECISIONS[settings.precision])
    if fabric.global_rank == 0:
        print(source.about)
        if source.said:
            print(source.said)
        if isinstance(folder, LocalFolder):
            remove_leftovers(folder.path)
        folder.write(SETTINGS, json.dumps(record, indent=1).encode())
    fabric.barrier()
    shards = dict(enumerate(plan(len(source), settings.shard_size, settings.shuffle)))
    mine = share(sorted(k for k in shards if shard_name(k) in files), fabric)
    done = gathered({k: read_back(folder, k, autoencoder.kind) for k in mine}, fabric)
    done = {k: written for k, written in done.items() if written is not None}
    encoder = ShardEncoder(
        source,
        folder,
        autoencoder.to(fabric.device),
        settings.image_size,
        settings.flips,
        getattr(torch, settings.dtype),
        settings.batch_size,
        workers(on_this_machine) if settings.num_workers is None else settings.num_workers,
        settings.skip_broken,
        fabric.device,
        fabric.autocast,
    )
    missing = {k: shards[k] for k in shards if k not in done}
    done |= gathered(encode_missing(encoder, missing, len(source), fabric), fabric)
    broken = gathered(encoder.broken, fabric)
    if broken and not settings.skip_broken:
        if fabric.global_rank != 0:
            sys.exit(2)  # the first rank says why
        raise InputError(
            f"{report(broken)}\nEvery shard without them is in {out}. Repair these files and run the command again, or "
            "leave them out with --skip_broken true: what is written is kept"
        )
    if fabric.global_rank == 0:
        written = [done[k] for k in sorted(done)]
        skipped = {name: why for shard in written for name, why in shard.skipped.items()}
        if len(skipped) == len(source):
            raise InputError(f"none of {counted(len(source), 'image')} can be decoded: {report(skipped)}")
        manifest = finish(folder, written, source, autoencoder, settings)
        if skipped:
            print(report(skipped))
        summarize(folder, manifest, written, source, shards, autoencoder, fabric.device)
    fabric.barrier()


def check(location: str) -> None:
    problems = audit(location)
    if problems:
        raise InputError(f"{location} is damaged:\n  " + "\n  ".join(problems))
    manifest = read_manifest(open_folder(location))
    print(
        f"{location} is whole: {counted(manifest.num_samples, 'sample')} in {counted(len(manifest.shards), 'shard')}, "
        "every checksum, shape, label and number"
    )


def check_outside(store: Path, images: Path) -> None:
    """Refuse a store among the images: they would be other ones when the job goes on."""
    if images.is_dir() and store.resolve().is_relative_to(images.resolve()):
        raise InputError(f"--out {store} lies in {images}, among the images to encode; choose a folder outside of it")


def listing_hash(source: ImageSource) -> str:
    """Identifies which images get which labels. Not their bytes: a broken file may be repaired between two runs."""
    digest = hashlib.sha256()
    for i, label in enumerate(source.labels.tolist()):
        digest.update(f"{source.name(i)}\0{label}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def check_settings(folder: Folder, files: set[str], settings: dict[str, Any]) -> None:
    """Refuse to continue a store with other images or settings than it was begun with."""
    if SETTINGS not in files:
        if MANIFEST in files or any(name.startswith("shard-") for name in files):
            raise InputError(
                f"{folder.location(SETTINGS)} is missing: the store there was made otherwise; choose another folder"
            )
        return
    try:
        begun = json.loads(folder.read(SETTINGS))
    except ValueError:
        begun = {}
    # The same weights may lie in another place now.
    comparable = [{k: (v or {}).get("hash") if k == "vae" else v for k, v in s.items()} for s in (begun, settings)]
    if comparable[0] != comparable[1]:
        names = [name for name in settings if comparable[0].get(name) != comparable[1][name]]
        raise InputError(
            f"{folder.location(SETTINGS)} says that this store was begun with other {', '.join(names)}: give the same "
            "again to continue it, choose another folder, or delete it"
        )


def workers(num_devices: int) -> int:
    """Decoding processes for each device of this machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, (cores - 1) // num_devices)


def encode_missing(
    encoder: ShardEncoder, shards: dict[int, np.ndarray], num_images: int, fabric: Fabric
) -> dict[int, Written]:
    """Encode this rank's part of the shards, and return it."""
    mine = {k: shards[k] for k in share(list(shards), fabric)}
    todo, my_images = (sum(len(i) for i in s.values()) for s in (shards, mine))
    written = {}
    start = time.perf_counter()
    with Progress("encoding", num_images, num_images - todo, my_images, fabric) as progress:
        for number, shard in encoder.run(mine, progress.advance):
            written[number] = shard
    seconds = time.perf_counter() - start
    if mine and fabric.global_rank == 0:
        busy = 1 - encoder.waited / seconds
        print(f"{todo / seconds:,.1f} images/s; the VAE was busy {busy:.0%} of the time")
    return written


def finish(
    folder: Folder,
    written: list[Written],
    source: ImageSource,
    vae: Autoencoder,
    settings: EncodeSettings,
) -> Manifest:
    """Write the labels and the manifest, which make the shards a store."""
    labels = torch.cat([shard.labels for shard in written])
    channels, h, w = written[0].shape
    if vae.kind == "moments":
        channels //= 2
    shift, scale = vae.shift, vae.scale
    if settings.normalize == "channel":
        first, second = sum(shard.sums for shard in written) / (len(labels) * (1 + settings.flips) * h * w)
        shift, scale = first.tolist(), (1 / np.sqrt(second - first**2)).tolist()
    manifest = Manifest(
        vae.kind,
        (channels, h, w),
        source.num_classes,
        [shard.shard for shard in written],
        shift=shift,
        scale=scale,
        flipped=settings.flips,
        class_names=source.class_names,
        image_size=settings.image_size,
        preprocessing=PREPROCESSING,
        vae=vae.entry,
    )
    finish_store(folder, manifest, labels)
    return manifest


def report(broken: dict[str, str]) -> str:
    names = sorted(broken)
    lines = [f"  {name}: {broken[name]}" for name in names[:MOST_NAMED]]
    if len(names) > MOST_NAMED:
        lines.append(f"  and {len(names) - MOST_NAMED} more")
    return f"{counted(len(names), 'image')} cannot be decoded:\n" + "\n".join(lines)
