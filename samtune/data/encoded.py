"""Splits as a data set has them: encoded images, of files, Arrow tables or arrays, and stored labels.

Classes are not numbered yet, and roles not given.
"""

import bisect
import io
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
import numpy.typing as npt

from samtune.data.columns import Columns
from samtune.data.labels import Labels


class EncodedImages(Protocol):
    """Images as encoded bytes, by row."""

    def __len__(self) -> int: ...

    def open(self, row: int) -> BinaryIO:
        """An image as an open file. Raises OSError where there is none."""

    def path(self, row: int) -> str:
        """The file of an image, or the name that it had before it was put into a table; "" if unknown."""

    @property
    def table_bytes(self) -> int:
        """Size of the images that are stored in tables."""


@dataclass(frozen=True)
class FileImages:
    """One file per image. paths: as the operating system has them, which need not be valid Unicode."""

    paths: Sequence[str]
    table_bytes: int = 0

    def __len__(self) -> int:
        return len(self.paths)

    def open(self, row: int) -> BinaryIO:
        return Path(self.paths[row]).open("rb")

    def path(self, row: int) -> str:
        return self.paths[row]


@dataclass(frozen=True)
class TableImages:
    """A column of struct(bytes, path) in an Arrow table; a cell without bytes names a file.

    It is read without the library's formatting of rows, which takes longer than decoding a small picture. folder: of
    relative paths. rows: those of the table that count, None for all.
    """

    table: Any  # datasets.Dataset
    column: str
    folder: Path
    rows: npt.NDArray[Any] | None = None

    def __len__(self) -> int:
        return len(self.table) if self.rows is None else len(self.rows)

    def open(self, row: int) -> BinaryIO:
        encoded, path = self._cell(row)
        return (self.folder / path).open("rb") if encoded is None else io.BytesIO(encoded)

    def path(self, row: int) -> str:
        encoded, path = self._cell(row)
        return str(self.folder / path) if encoded is None else path

    @cached_property
    def table_bytes(self) -> int:
        return int(sum(chunk.field("bytes").total_values_length for chunk in self._chunks))

    def _cell(self, row: int) -> tuple[bytes | None, str]:
        row = row if self.rows is None else int(self.rows[row])
        chunk = bisect.bisect_right(self._starts, row) - 1
        i = row - self._starts[chunk]
        encoded, path = (self._chunks[chunk].field(name)[i].as_py() for name in ("bytes", "path"))
        return encoded, path or ""

    @cached_property
    def _chunks(self) -> list[Any]:
        """Arrow arrays of struct(bytes, path), memory-mapped where the table is."""
        return list(self.table.with_format("arrow")[:].column(self.column).chunks)

    @cached_property
    def _starts(self) -> list[int]:
        return [0, *itertools.accumulate(len(chunk) for chunk in self._chunks)][:-1]


@dataclass(frozen=True, eq=False)
class ArrayImages:
    """Images of one size in an array, each given as PGM (grey) or PPM (colour): its values behind a short header.

    pixels: (n, height, width) or (n, height, width, 3) uint8.
    """

    pixels: npt.NDArray[np.uint8]

    def __len__(self) -> int:
        return len(self.pixels)

    def open(self, row: int) -> BinaryIO:
        image = self.pixels[row]
        height, width = image.shape[:2]
        return io.BytesIO(f"{'P5' if image.ndim == 2 else 'P6'} {width} {height} 255\n".encode() + image.tobytes())

    def path(self, row: int) -> str:
        return ""

    @property
    def table_bytes(self) -> int:
        return self.pixels.nbytes


@dataclass(frozen=True)
class JoinedImages:
    """The images of several parts, one part after the other."""

    parts: Sequence[EncodedImages]

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def open(self, row: int) -> BinaryIO:
        part, i = self._part(row)
        return part.open(i)

    def path(self, row: int) -> str:
        part, i = self._part(row)
        return part.path(i)

    @property
    def table_bytes(self) -> int:
        return sum(part.table_bytes for part in self.parts)

    def _part(self, row: int) -> tuple[EncodedImages, int]:
        part = bisect.bisect_right(self._starts, row) - 1
        return self.parts[part], row - self._starts[part]

    @cached_property
    def _starts(self) -> list[int]:
        return [0, *itertools.accumulate(map(len, self.parts))][:-1]


def joined(parts: Sequence[EncodedImages]) -> EncodedImages:
    """The images of all parts, one part after the other."""
    return parts[0] if len(parts) == 1 else JoinedImages(parts)


RawSplits = dict[str, tuple[EncodedImages, Labels]]  # name of the split in the data set -> images and labels


@dataclass
class PathSplits:
    """Pictures by split: name -> (paths, labels), picture by picture; notes for the user.

    columns: those of the list that names the pictures; None where their folders are the labels.
    """

    splits: dict[str, tuple[list[str], list[Any]]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    columns: Columns | None = None

    def add(self, split: str, label: Any, paths: Sequence[str]) -> None:
        """Add pictures with one label to a split."""
        all_paths, labels = self.splits.setdefault(split, ([], []))
        all_paths += paths
        labels += [label] * len(paths)

    def raw(self) -> RawSplits:
        """Raw splits of these paths: each picture is a file."""
        are_names = self.columns is None
        return {
            split: (FileImages(paths), Labels(None, labels, are_names))
            for split, (paths, labels) in self.splits.items()
        }
