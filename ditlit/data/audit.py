"""Everything that can be wrong with the files of a store, found in one pass over all of their bytes."""

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from ditlit.data.folders import Folder, open_folder
from ditlit.data.manifest import Manifest, Shard, read_manifest
from ditlit.data.shards import check_labels, check_size, check_sum, parse_shard
from ditlit.data.store import read_labels
from ditlit.errors import InputError


def audit(location: str | Path) -> list[str]:
    """Read every byte of a store, on a disk or at a URL, and describe all that is wrong with it; an empty list is good.

    Checks sizes, checksums, headers, shapes and types of all shards, that labels are in range and those in the file of
    all labels, that all shards hold the same number type, and that every number is finite. Shows a progress bar.

    Raises:
        InputError: where the manifest itself is missing or damaged.
    """
    folder = open_folder(location)
    manifest = read_manifest(folder)
    problems = []
    labels: list[Tensor | None] = [None] * len(manifest.shards)
    if manifest.labels is not None:
        try:
            labels = list(read_labels(folder, manifest).split([shard.num_samples for shard in manifest.shards]))
        except InputError as error:
            problems.append(str(error))
    dtypes = {}
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        reports = pool.map(lambda shard, part: audit_shard(folder, manifest, shard, part), manifest.shards, labels)
        for shard, (dtype, found) in zip(
            manifest.shards, tqdm(reports, f"checking {location}", len(labels), unit="shard"), strict=True
        ):
            problems += found
            if dtype is not None:
                dtypes.setdefault(dtype, shard.file)
    if len(dtypes) > 1:
        names = ", ".join(f"{dtype} in {file}" for dtype, file in dtypes.items())
        problems.append(f"the shards of {location} hold different number types: {names}")
    return problems


def audit_shard(
    folder: Folder, manifest: Manifest, shard: Shard, labels: Tensor | None
) -> tuple[torch.dtype | None, list[str]]:
    """The number type of a shard, if it can be read, and what is wrong with it."""
    where = folder.location(shard.file)
    problems = []
    try:
        data = folder.read(shard.file)
        check_size(len(data), shard, where)
    except FileNotFoundError:
        return None, [f"{where} is missing; copy or encode this shard again"]
    except (InputError, OSError) as error:
        return None, [str(error)]
    try:
        check_sum(hashlib.sha256(data).hexdigest(), shard, where)
    except InputError as error:
        problems.append(str(error))
    try:
        arrays = parse_shard(data, shard, manifest, where)
    except InputError as error:
        return None, [*problems, str(error)]
    own = torch.from_numpy(arrays.labels.copy())
    try:
        check_labels(own, manifest.num_classes, where)
    except InputError as error:
        problems.append(str(error))
    if labels is not None and not torch.equal(own, labels):
        count = int((own != labels).sum())
        problems.append(f"{where}: {count} of {len(own)} labels differ from those in {manifest.labels.file}")
    for name, array in ((manifest.kind, arrays.latents), (f"flipped_{manifest.kind}", arrays.flipped)):
        if array is not None and (count := int((~torch.from_numpy(array.copy()).view(arrays.dtype).isfinite()).sum())):
            problems.append(f"{where}: {count} of {array.size} numbers in {name} are NaN or Inf; encode it again")
    return arrays.dtype, problems
