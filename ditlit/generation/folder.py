"""The folder of a sampling job: what was asked for, which images are there, and what is made of them."""

import csv
import io
import json
import os
import zipfile
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from ditlit.data.folders import remove_leftovers, write_atomically
from ditlit.errors import InputError
from ditlit.pictures import grid_of, read_png, save_png

JOB = "sample.json"
IMAGES = "images"
LATENTS = "latents"
NPZ = "samples.npz"
MOST_IN_GRID = 100


class SampleFolder:
    """Keeps the images of a job as PNG files, each named by its number, so that a killed job makes what is missing.

    Args:
        path: of the folder.
        labels: of all samples (n,).
        keep_latents: keep raw latents too, one safetensors file for each batch.
    """

    def __init__(self, path: str | Path, labels: Tensor, keep_latents: bool):
        self.path = Path(path)
        self.labels = labels
        self.keep_latents = keep_latents
        self._present: set[str] = set()

    def check(self, job: dict[str, Any]) -> None:
        """Compare what is asked for with what the folder holds.

        Raises:
            InputError: where it holds images of another job.
        """
        record, images = self.path / JOB, self.path / IMAGES
        if record.exists():
            begun = json.loads(record.read_text())
            different = [name for name in job if name != "made_by" and begun.get(name) != as_json(job[name])]
            if different:
                raise InputError(
                    f"{record} says that the images there were asked for with other {', '.join(different)}; choose "
                    "another folder, or delete it"
                )
        elif images.is_dir() and any(images.iterdir()):
            raise InputError(f"{images} holds images of something else; choose another folder")

    def begin(self, job: dict[str, Any]) -> None:
        """Write down what is asked for, where that is not done yet, and clear away what a killed job left."""
        (self.path / IMAGES).mkdir(parents=True, exist_ok=True)
        if not (self.path / JOB).exists():
            write_atomically(self.path / JOB, json.dumps(job, indent=1).encode())
        for folder in (IMAGES, LATENTS):
            remove_leftovers(self.path / folder)

    def look(self) -> None:
        """List what is there."""
        self._present = set(os.listdir(self.path / IMAGES))
        if self.keep_latents:
            (self.path / LATENTS).mkdir(exist_ok=True)
            self._present |= set(os.listdir(self.path / LATENTS))

    def image_path(self, index: int) -> Path:
        return self.path / IMAGES / f"{index:06d}.png"

    def latents_path(self, batch: Sequence[int]) -> Path:
        return self.path / LATENTS / f"{batch[0]:06d}-{batch[-1]:06d}.safetensors"

    def lacks(self, batch: Sequence[int]) -> bool:
        """Whether anything of a batch is missing. All of it is drawn again then: kernels round by batch."""
        names = {self.image_path(i).name for i in batch}
        if self.keep_latents:
            names.add(self.latents_path(batch).name)
        return not names <= self._present

    def write(self, batch: Sequence[int], images: Tensor, latents: Tensor, threads: ThreadPoolExecutor) -> list[Future]:
        """Write a batch's latents, and begin to write its images (N, C, H, W), bytes: those that are not there."""
        missing = [(i, image) for i, image in zip(batch, images, strict=True) if self._lacks_image(i)]
        if self.keep_latents:
            tensors = {"latents": latents.cpu(), "labels": self.labels[list(batch)], "index": torch.tensor(batch)}
            write_atomically(self.latents_path(batch), safetensors.torch.save(tensors))
        return [threads.submit(save_png, image, self.image_path(i)) for i, image in missing]

    def _lacks_image(self, index: int) -> bool:
        return self.image_path(index).name not in self._present

    # When all images are there --------------------------------------------------------------------------------------

    def finish(self, per_row: int, npz: bool) -> None:
        """Write the labels, a grid of the first images, and the npz file where it is wanted."""
        text = io.StringIO()
        rows = csv.writer(text, lineterminator="\n")
        rows.writerow(("file", "label"))
        rows.writerows((self.image_path(i).name, label) for i, label in enumerate(self.labels.tolist()))
        write_atomically(self.path / IMAGES / "labels.csv", text.getvalue().encode())
        first = range(min(len(self.labels), max(per_row, MOST_IN_GRID // per_row * per_row)))
        save_png(grid_of(torch.stack([read_png(self.image_path(i)) for i in first]), per_row), self.path / "grid.png")
        if npz:
            self.write_npz()

    def write_npz(self) -> None:
        """``samples.npz`` as the ADM evaluator reads it: ``arr_0`` (n, H, W, 3) bytes, and labels ``arr_1`` (n,).

        Written image by image, since 50,000 of them fill 10 GB.
        """
        n = len(self.labels)
        _, h, w = read_png(self.image_path(0)).shape
        temporary = self.path / f".{NPZ}.{os.getpid()}.tmp"
        with zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
            with archive.open("arr_0.npy", "w", force_zip64=True) as file:
                header = {"descr": "|u1", "fortran_order": False, "shape": (n, h, w, 3)}
                np.lib.format.write_array_header_1_0(file, header)
                for i in range(n):
                    file.write(read_png(self.image_path(i)).expand(3, h, w).permute(1, 2, 0).contiguous().numpy())
            with archive.open("arr_1.npy", "w") as file:
                np.lib.format.write_array(file, self.labels.numpy())
        os.replace(temporary, self.path / NPZ)


def as_json(value: Any) -> Any:
    """A value as it comes back from a JSON file: tuples are lists there."""
    return json.loads(json.dumps(value))
