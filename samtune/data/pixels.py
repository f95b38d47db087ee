"""Files of decoded images: written once as a whole, read by row."""

import itertools
import json
import os
import shutil
import tempfile
import weakref
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import torch

_MAPPED = 2**28  # bytes of a file up to which it is mapped into memory; a larger one would count as the process's own


@dataclass(frozen=True)
class Pixels:
    """One file of decoded images, one after the other as (height, width, 3) uint8.

    offsets: (n,) start of each in bytes. shapes: (n, 2) height and width; (0, 0) where an image cannot be decoded.
    """

    file: Path
    offsets: npt.NDArray[np.int64]
    shapes: npt.NDArray[np.int64]

    def __getitem__(self, row: int) -> torch.Tensor:
        """(3, height, width) uint8, a copy: changes do not reach the file."""
        height, width = self.shapes[row].tolist()
        start = int(self.offsets[row])
        if self._mapped is not None:
            pixels = self._mapped[start : start + height * width * 3].reshape(height, width, 3)
        else:
            pixels = np.empty((height, width, 3), np.uint8)
            os.preadv(self._descriptor, [pixels.data], start)
        return torch.from_numpy(pixels).permute(2, 0, 1)

    def map(self) -> None:
        """Open the file: it stays readable even if another run removes it to make room."""
        _ = self._mapped if self.file.stat().st_size <= _MAPPED else self._descriptor

    def take(self, slots: npt.NDArray[np.int64]) -> torch.Tensor | None:
        """(n, 3, height, width) uint8, a copy, if all images of the file are of one shape; else None."""
        if len(self.shapes) == 0 or (self.shapes != self.shapes[0]).any():
            return None
        height, width = self.shapes[0].tolist()
        if self._mapped is not None:
            taken = self._mapped.reshape(-1, height, width, 3)[slots]
        else:
            taken = np.empty((len(slots), height, width, 3), np.uint8)
            for image, start in zip(taken, self.offsets[slots].tolist(), strict=True):
                os.preadv(self._descriptor, [image.data], start)
        return torch.from_numpy(taken).permute(0, 3, 1, 2)

    @cached_property
    def mean_bytes(self) -> int:
        """Of one image."""
        return 3 * int(self.shapes.prod(1).mean()) if len(self.shapes) else 0

    @cached_property
    def _mapped(self) -> npt.NDArray[np.uint8] | None:
        """The file in memory, copy on write; None where it is too large."""
        size = self.file.stat().st_size
        if size > _MAPPED:
            return None
        # As a plain array: each view of a memmap costs as much as all else that Python does to read an image.
        return np.asarray(np.memmap(self.file, np.uint8, "c")) if size else np.empty(0, np.uint8)

    @cached_property
    def _descriptor(self) -> int:
        descriptor = os.open(self.file, os.O_RDONLY)
        weakref.finalize(self, os.close, descriptor)
        return descriptor

    def __getstate__(self) -> dict[str, object]:
        """For another process: it opens the file itself."""
        return {key: value for key, value in self.__dict__.items() if not key.startswith("_")}


@dataclass(frozen=True)
class JoinedPixels:
    """Several files as one: the images of the first, then those of the second, and so on."""

    files: tuple[Pixels, ...]

    def __getitem__(self, row: int) -> torch.Tensor:
        """(3, height, width) uint8, of its file."""
        file = int(np.searchsorted(self._starts, row, side="right")) - 1
        return self.files[file][row - int(self._starts[file])]

    def take(self, slots: npt.NDArray[np.int64]) -> torch.Tensor | None:
        """(n, 3, height, width) uint8, a copy, if all images of all files are of one shape; else None."""
        file_of = np.searchsorted(self._starts, slots, side="right") - 1
        taken = [file.take(slots[file_of == i] - self._starts[i]) for i, file in enumerate(self.files)]
        whole = [images for images in taken if images is not None]
        if len(whole) < len(taken) or len({images.shape[1:] for images in whole}) > 1:
            return None
        order = np.argsort(np.argsort(file_of, kind="stable"))  # from file by file to the order of slots
        return torch.cat(whole)[torch.from_numpy(order)]

    @cached_property
    def mean_bytes(self) -> int:
        """Of one image of the file that has the larger ones."""
        return max(file.mean_bytes for file in self.files)

    @cached_property
    def _starts(self) -> npt.NDArray[np.int64]:
        return np.array([0, *itertools.accumulate(len(file.shapes) for file in self.files)])[:-1]


ImageOrReason = tuple[torch.Tensor | str, bool]  # pixels, or why there are none; whether they are of one colour


@dataclass(frozen=True)
class Decoded:
    """The result of decoding some images, in their order.

    digests: (n,) uint64 of the encoded bytes. bad: position -> why it cannot be decoded. constant: positions of images
    of one colour.
    """

    digests: npt.NDArray[np.uint64]
    pixels: Pixels | None
    bad: Mapping[int, str]
    constant: Collection[int]


def record(images: Iterator[ImageOrReason], digests: Sequence[bytes], file: BinaryIO | None) -> Decoded:
    """Take the images one by one, and write their pixels into a file, if any. digests: SHA-256 of each."""
    shapes: list[tuple[int, ...]] = []
    bad: dict[int, str] = {}
    offsets, constant, end = [], [], 0
    for row, (image, is_one_colour) in enumerate(images):
        offsets.append(end)
        shapes.append((0, 0) if isinstance(image, str) else tuple(image.shape[1:]))
        if isinstance(image, str):
            bad[row] = image
        elif file is not None:
            end += file.write(np.ascontiguousarray(image.permute(1, 2, 0).numpy()).data)
        if is_one_colour:
            constant.append(row)
    pixels = None if file is None else Pixels(Path(file.name), np.array(offsets), np.array(shapes))
    return Decoded(np.array([int.from_bytes(digest[:8]) for digest in digests], np.uint64), pixels, bad, constant)


def write(folder: Path, images: Iterator[ImageOrReason], digests: Sequence[bytes], *, keep_pixels: bool) -> None:
    """Write a folder under another name, then rename it: a reader finds a whole one or none."""
    part = Path(tempfile.mkdtemp(prefix=".part-", dir=folder.parent))
    try:
        with (part / "pixels").open("wb") if keep_pixels else nullcontext() as file:
            decoded = record(images, digests, file)
        of_pixels: Any = {"offsets": decoded.pixels.offsets, "shapes": decoded.pixels.shapes} if decoded.pixels else {}
        np.savez(part / "index.npz", digests=decoded.digests, **of_pixels)
        odd = {"bad": decoded.bad, "constant": decoded.constant}
        (part / "odd.json").write_text(json.dumps(odd), encoding="utf-8")
        if keep_pixels and not (folder / "pixels").exists():
            shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():  # else another process was faster
            part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def load(folder: Path) -> Decoded | None:
    """Read a folder that `write` wrote; None where it is missing or damaged."""
    try:
        odd = json.loads((folder / "odd.json").read_text(encoding="utf-8"))
        bad = {int(row): why for row, why in odd["bad"].items()}
        with np.load(folder / "index.npz") as index:
            if "shapes" not in index:
                return Decoded(index["digests"], None, bad, odd["constant"])
            digests, offsets, shapes = index["digests"], index["offsets"], index["shapes"]
        if (folder / "pixels").stat().st_size != int((shapes[:, 0] * shapes[:, 1] * 3).sum()):
            raise ValueError("the file of pixels is not whole")
    except (OSError, ValueError, KeyError, TypeError):
        shutil.rmtree(folder, ignore_errors=True)
        return None
    pixels = Pixels(folder / "pixels", offsets, shapes)
    pixels.map()
    return Decoded(digests, pixels, bad, odd["constant"])


def evict(root: Path, room: int) -> None:
    """Remove the least recently used folders until the others take no more than `room` bytes."""
    kept = sorted((path for path in root.iterdir() if path.is_dir()), key=lambda path: path.stat().st_mtime)
    sizes = {path: sum(file.stat().st_size for file in path.iterdir()) for path in kept}
    for path in kept:
        if sum(sizes.values()) <= room:
            return
        shutil.rmtree(path, ignore_errors=True)
        del sizes[path]
