"""Images to be evaluated, read lazily: those of a folder, or the decodes of a latent store."""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ditlit.data.manifest import IMAGE_SUFFIXES
from ditlit.data.store import LatentStore
from ditlit.errors import InputError
from ditlit.images.decoding import PREPROCESSING, BrokenImage, decode, preprocess
from ditlit.images.sources import ImageSource, folder_entries
from ditlit.images.vae import load_autoencoder
from ditlit.pictures import to_uint8

JOB = "sample.json"  # what ``ditlit sample`` writes beside its images


class Images(Protocol):
    """A set of images in a fixed order.

    Attributes:
        location: file or folder, for messages.
        about: what a report says of them.
    """

    location: str
    about: dict[str, Any]

    def __len__(self) -> int: ...

    def load(self, numbers: Sequence[int]) -> Tensor:
        """What a worker process reads of the images with these numbers: bytes (N, 3, H, W), or latents.

        Raises:
            InputError: naming the image that cannot be read or does not fit the others.
        """
        ...

    def finish(self, batch: Tensor) -> Tensor:
        """Bytes (N, 3, H, W) from what was loaded, on the device that holds it."""
        ...

    def digest(self) -> str:
        """SHA-256 of the content, wherever it lies and whatever its files are called."""
        ...


class FolderImages:
    """Image files below a folder, in the order of their names. Of a ``ditlit sample`` folder, those in ``images``.

    Args:
        folder: of the images.
        size: cut and resize to this side, as encoding does; by default images stay as they are, and must be equal.

    Raises:
        InputError: where there are none, or the job that makes them is not done.
    """

    def __init__(self, folder: Path, size: int | None = None):
        self.location = str(folder)
        self.size = size
        job = next((path for path in (folder / JOB, folder.parent / JOB) if path.is_file()), None)
        if job is not None and job.parent == folder:
            folder = folder / "images"
        entries = sorted(folder_entries(folder, "")) if folder.is_dir() else []
        if not entries:
            raise InputError(f"there are no images in {folder}: no file ends in {', '.join(IMAGE_SUFFIXES)}")
        self.source = ImageSource(folder, [], entries, [0] * len(entries), 1, None)
        first = self._read(0)
        self.shape = tuple(first.shape)
        self.about: dict[str, Any] = {
            "kind": "folder",
            "location": self.location,
            "n": len(entries),
            "size": f"{first.shape[1]}x{first.shape[2]}",
            "resize": "none" if size is None else f"{PREPROCESSING}, {size}x{size}",
        }
        if job is not None:
            self.about["job"] = read_job(job, len(entries))

    def __len__(self) -> int:
        return len(self.source)

    def load(self, numbers: Sequence[int]) -> Tensor:
        images = []
        for i in numbers:
            image = self._read(i)
            if tuple(image.shape) != self.shape:
                sizes = [f"{shape[2]}x{shape[1]}" for shape in (image.shape, self.shape)]
                raise InputError(
                    f"the images in {self.location} are not of one size: {self.source.name(i)!r} is {sizes[0]}, the "
                    f"first is {sizes[1]}; give --reference_size (or --generated_size) to cut and resize them as "
                    "encode does"
                )
            images.append(image)
        return torch.stack(images)

    def finish(self, batch: Tensor) -> Tensor:
        return batch

    def digest(self) -> str:
        def of(i: int) -> bytes:
            return hashlib.sha256(self.source.read(i)).digest()

        digest = hashlib.sha256(f"{len(self)} files, {self.size}".encode())
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
            for start in range(0, len(self), 4096):
                for part in threads.map(of, range(start, min(start + 4096, len(self)))):
                    digest.update(part)
        return digest.hexdigest()

    def _read(self, i: int) -> Tensor:
        try:
            data = self.source.read(i)
            if self.size is not None:
                return preprocess(data, self.size)
            return torch.from_numpy(np.array(decode(data))).permute(2, 0, 1).contiguous()  # (3, H, W)
        except (BrokenImage, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise InputError(f"{self.source.root / self.source.name(i)} cannot be decoded: {error}") from None


def read_job(path: Path, n: int) -> dict[str, Any]:
    """What ``ditlit sample`` was asked for.

    Raises:
        InputError: where some of its images are missing.
    """
    job = json.loads(path.read_text())
    if job.get("num_samples", n) != n:
        raise InputError(
            f"{path.parent} holds {n:,} of the {job['num_samples']:,} images that {path} asks for; run the same "
            "ditlit sample again to make the others"
        )
    if len(job.get("classes", [])) > 20:
        job["classes"] = f"{len(job['classes'])} classes"
    return job


class StoreImages:
    """The decodes of a latent store; of a posterior, those of its mean.

    Args:
        location: of the store.
        vae: folder or hub name of its VAE, instead of the one that the manifest names.
        device: to decode on.
    """

    def __init__(self, location: str, vae: str | None = None, device: torch.device | str = "cpu"):
        self.location = location
        self.store = LatentStore(location)
        manifest = self.store.manifest
        autoencoder = load_autoencoder(manifest.vae, vae, manifest.shape[0]).to(torch.device(device))
        self.decode: Callable[[Tensor], Tensor] = autoencoder.decode
        self.about = {
            "kind": "store",
            "location": location,
            "n": len(self.store),
            "size": manifest.image_size and f"{manifest.image_size}x{manifest.image_size}",
            "resize": "none",
            "vae": (manifest.vae or {}).get("hash", "pixels"),
            "preprocessing": manifest.preprocessing,
        }

    def __len__(self) -> int:
        return len(self.store)

    def load(self, numbers: Sequence[int]) -> Tensor:
        latents = self.store.gather(torch.tensor(list(numbers)))[self.store.kind]
        return latents.chunk(2, dim=1)[0] if self.store.kind == "moments" else latents  # (N, C, H, W)

    def finish(self, batch: Tensor) -> Tensor:
        return to_uint8(self.decode(batch.float())).expand(-1, 3, -1, -1)

    def digest(self) -> str:
        manifest = self.store.manifest
        parts = [manifest.kind, str((manifest.vae or {}).get("hash")), *(shard.sha256 for shard in manifest.shards)]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"decode": None}  # workers only read
