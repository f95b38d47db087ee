"""Decoded images in a memory-mapped file, so that each is decoded once, for all epochs, processes and runs.

The file is named by the content of the encoded images: a changed picture is another file, and the same data under
another path is the same file. It lies under $SAMTUNE_CACHE, else in the user's cache folder.
"""

import hashlib
import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from samtune.data.decode import decode
from samtune.data.source import Split
from samtune.data.splits import Indices
from samtune.errors import DataError

Progress = Callable[[str, int, int], None]  # split, images done, images in all

_RULE = b"1"  # changes with `decode`, so that pixels made by an older rule are not taken for today's
_NAMED = 10  # bad images that an error names
_SMALL = 4096  # bytes of an image that is decoded so fast that threads would only wait for Python's lock
_SAMPLE = 256  # images after which the size of all is foretold


@dataclass(frozen=True)
class Pixels:
    """One file of decoded images, one after the other as (height, width, 3) uint8.

    offsets: (n,) place of each in bytes. shapes: (n, 2) height and width; (0, 0) where an image cannot be decoded.
    """

    file: Path
    offsets: npt.NDArray[np.int64]
    shapes: npt.NDArray[np.int64]

    def __getitem__(self, row: int) -> torch.Tensor:
        """(3, height, width) uint8, a view of the file."""
        height, width = self.shapes[row].tolist()
        start = int(self.offsets[row])
        pixels = self._bytes[start : start + height * width * 3].reshape(height, width, 3)
        return torch.from_numpy(pixels).permute(2, 0, 1)

    def map(self) -> None:
        """Take hold of the file: it stays readable even if another run removes it to make room."""
        _ = self._bytes

    def take(self, places: npt.NDArray[np.int64]) -> torch.Tensor | None:
        """(n, 3, height, width) uint8, a copy, if all images of the file are of one shape; else None."""
        if self._whole is None:
            return None
        return torch.from_numpy(self._whole[places]).permute(0, 3, 1, 2)

    @cached_property
    def _whole(self) -> npt.NDArray[np.uint8] | None:
        if len(self.shapes) == 0 or (self.shapes != self.shapes[0]).any():
            return None
        return self._bytes.reshape(len(self.shapes), *self.shapes[0].tolist(), 3)

    @cached_property
    def _bytes(self) -> npt.NDArray[np.uint8]:
        if self.file.stat().st_size == 0:  # no image could be decoded
            return np.empty(0, np.uint8)
        # Copy on write: the file stays as it is, whatever is done to the pixels.
        return np.memmap(self.file, np.uint8, "c")

    def __getstate__(self) -> dict[str, object]:
        """For another process: it maps the file itself."""
        return {key: value for key, value in self.__dict__.items() if not key.startswith("_")}


@dataclass(frozen=True)
class JoinedPixels:
    """Several files as one: the images of the first, then those of the second, and so on."""

    files: tuple[Pixels, ...]

    def __getitem__(self, row: int) -> torch.Tensor:
        """(3, height, width) uint8, a view of its file."""
        file = int(np.searchsorted(self._starts, row, side="right")) - 1
        return self.files[file][row - int(self._starts[file])]

    def take(self, places: npt.NDArray[np.int64]) -> torch.Tensor | None:
        """(n, 3, height, width) uint8, a copy, if all images of all files are of one shape; else None."""
        file_of = np.searchsorted(self._starts, places, side="right") - 1
        found = [file.take(places[file_of == i] - self._starts[i]) for i, file in enumerate(self.files)]
        taken = [images for images in found if images is not None]
        if len(taken) < len(found) or len({images.shape[1:] for images in taken}) > 1:
            return None
        order = np.argsort(np.argsort(file_of, kind="stable"))  # from file by file to the order of places
        return torch.cat(taken)[torch.from_numpy(order)]

    @cached_property
    def _starts(self) -> npt.NDArray[np.int64]:
        return np.array([0, *itertools.accumulate(len(file.shapes) for file in self.files)])[:-1]


@dataclass(frozen=True)
class Images:
    """The images of a split, from the cache where they are there.

    place: where a row's pixels stand in the cache. bad: why an image cannot be decoded, by row; known once it has been
    looked at.
    """

    split: Split
    pixels: Pixels | JoinedPixels | None = None
    place: Mapping[int, int] = field(default_factory=dict)
    bad: Mapping[int, str] = field(default_factory=dict)

    def __getitem__(self, row: int) -> torch.Tensor:
        """(3, height, width) uint8. Raises DataError for what is no image."""
        place = self.place.get(row)
        if self.pixels is not None and place is not None and row not in self.bad:
            return self.pixels[place]
        return decode(self.split.image_bytes(row), lambda: self.split.where(row))

    def take(self, rows: Indices) -> Sequence[torch.Tensor] | torch.Tensor:
        """(3, h, w) uint8 each; where the cache has them in one shape, as one tensor (n, 3, h, w)."""
        if self.pixels is not None and not self.bad and (self._places[rows] >= 0).all():
            together = self.pixels.take(self._places[rows])
            if together is not None:
                return together
        return [self[row] for row in rows.tolist()]

    @cached_property
    def _places(self) -> npt.NDArray[np.int64]:
        """`place` as an array over all rows, -1 where there is none."""
        places = np.full(len(self.split), -1)
        places[list(self.place)] = list(self.place.values())
        return places


def united(split: Split, first: Images, second: Images) -> Images:
    """The images of a split whose rows were looked at in two parts: some in the first, the others in the second.

    Where the second is of another split, its rows come after those of the first one's.
    """
    before = 0 if second.split is first.split else len(first.split)
    cached = [(images, shift) for images, shift in ((first, 0), (second, before)) if images.pixels is not None]
    files: list[Pixels] = []
    place: dict[int, int] = {}
    for images, shift in cached:
        assert isinstance(images.pixels, Pixels)
        start = sum(len(file.shapes) for file in files)
        place |= {row + shift: start + at for row, at in images.place.items()}
        files.append(images.pixels)
    bad = dict(first.bad) | {row + before: why for row, why in second.bad.items()}
    return Images(split, JoinedPixels(tuple(files)) if files else None, place, bad)


def look_at(
    split: Split, rows: Indices, *, limit: int, threads: int, progress: Progress, always: bool = False
) -> Images:
    """Decode these rows of a split, unless that was done before, and keep the pixels.

    limit: bytes that the cache may hold in all; the files that were not used for longest go. What does not fit is not
    kept; then it is looked at only if that is asked for by `always`. A cache that cannot be written is done without.
    """
    rows = np.unique(rows)
    if len(rows) == 0 or (limit == 0 and not always):
        return Images(split)
    if not always and split.encoded_bytes() * len(rows) / len(split) > limit:  # decoded it is larger still
        return Images(split)

    def kept(pixels: Pixels, bad: Mapping[int, str]) -> Images:
        place = {row: i for i, row in enumerate(rows.tolist())}
        return Images(split, pixels, place, {int(rows[i]): why for i, why in bad.items()})

    def looked_at(images: Iterator[torch.Tensor | str]) -> Images:
        if not always:
            return Images(split)
        reasons = zip(rows.tolist(), images, strict=True)
        return Images(split, bad={row: image for row, image in reasons if isinstance(image, str)})

    folder = _root() / _name(split, rows)
    found = _open(folder)
    if found is not None:
        os.utime(folder)
        return kept(*found)
    decoded = _decoded(split, rows, threads, progress)
    sample = list(islice(decoded, _SAMPLE))
    foretold = sum(image.numel() for image in sample if isinstance(image, torch.Tensor)) / len(sample) * len(rows)
    everything = itertools.chain(sample, decoded)
    if foretold > limit:
        return looked_at(everything)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _make_room(folder.parent, limit - int(foretold))
        _write(folder, everything)
    except OSError:
        # No room, no permission, a shared disk that is away: training goes on, with a decoder in every epoch.
        return looked_at(_decoded(split, rows, threads, progress))
    found = _open(folder)
    return Images(split) if found is None else kept(*found)


def _root() -> Path:
    given = os.environ.get("SAMTUNE_CACHE")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "samtune" / "decoded"


def _name(split: Split, rows: Indices) -> str:
    digest = hashlib.sha256(_RULE)
    for row in rows.tolist():
        try:
            encoded = split.image_bytes(row)
        except DataError:
            encoded = b""
        digest.update(len(encoded).to_bytes(8, "little"))
        digest.update(encoded)
    return digest.hexdigest()[:32]


def _decoded(split: Split, rows: Indices, threads: int, progress: Progress) -> Iterator[torch.Tensor | str]:
    """Each image in order, or the reason why it is none. Both decoders work without Python's lock."""

    def one(row: int) -> torch.Tensor | str:
        try:
            return decode(split.image_bytes(row), lambda: split.where(row))
        except DataError as error:
            return error.why or error.what

    def some(part: Indices) -> list[torch.Tensor | str]:
        return [one(row) for row in part.tolist()]

    if 0 < split.encoded_bytes() < _SMALL * len(split):
        threads = 1
    with ThreadPoolExecutor(threads, "decoder") as pool:
        for start in range(0, len(rows), _SAMPLE):  # in portions: a data set need not fit into memory
            portion = rows[start : start + _SAMPLE]
            for part in pool.map(some, np.array_split(portion, threads)):
                yield from part
            progress(split.name, start + len(portion), len(rows))


def _write(folder: Path, images: Iterator[torch.Tensor | str]) -> None:
    """Beside its place first, then renamed: a reader finds a whole one or none."""
    part = Path(tempfile.mkdtemp(prefix=".part-", dir=folder.parent))
    try:
        shapes: list[tuple[int, ...]] = []
        offsets: list[int] = []
        bad: dict[int, str] = {}
        end = 0
        with (part / "pixels").open("wb") as file:
            for row, image in enumerate(images):
                offsets.append(end)
                if isinstance(image, str):
                    bad[row] = image
                    shapes.append((0, 0))
                    continue
                shapes.append(tuple(image.shape[1:]))
                end += file.write(np.ascontiguousarray(image.permute(1, 2, 0).numpy()).data)
        np.savez(part / "index.npz", offsets=np.array(offsets), shapes=np.array(shapes))
        (part / "bad.json").write_text(json.dumps(bad), encoding="utf-8")
        if not folder.exists():  # else another process was faster
            part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _open(folder: Path) -> tuple[Pixels, dict[int, str]] | None:
    """None where there is nothing, or nothing whole."""
    try:
        with np.load(folder / "index.npz") as index:
            offsets, shapes = index["offsets"], index["shapes"]
        bad = {int(row): why for row, why in json.loads((folder / "bad.json").read_text(encoding="utf-8")).items()}
        if (folder / "pixels").stat().st_size != int((shapes[:, 0] * shapes[:, 1] * 3).sum()):
            raise ValueError("the file of pixels is not whole")
    except (OSError, ValueError, KeyError):
        shutil.rmtree(folder, ignore_errors=True)
        return None
    pixels = Pixels(folder / "pixels", offsets, shapes)
    pixels.map()
    return pixels, bad


def _make_room(root: Path, room: int) -> None:
    """Remove what was not used for longest until the rest takes no more than `room` bytes."""
    kept = sorted((path for path in root.iterdir() if path.is_dir()), key=lambda path: path.stat().st_mtime)
    sizes = {path: sum(file.stat().st_size for file in path.iterdir()) for path in kept}
    for path in kept:
        if sum(sizes.values()) <= room:
            return
        shutil.rmtree(path, ignore_errors=True)
        del sizes[path]


def in_both(images: Images, rows: Indices, others: Images, other_rows: Indices) -> int:
    """How many of the other images are, byte for byte, among these; 0 where they are too many to be kept decoded."""
    if images.pixels is None or others.pixels is None:
        return 0
    seen = {hash(images.split.image_bytes(row)) for row in rows.tolist()}
    return sum(hash(others.split.image_bytes(row)) in seen for row in other_rows.tolist())


def bad_among(images: Images, rows: Indices) -> list[dict[str, Any]]:
    """The rows that cannot be decoded: split, row, where, reason; for an error or a report."""
    return [
        {"split": images.split.name, "row": row, "where": images.split.where(row), "reason": images.bad[row]}
        for row in rows.tolist()
        if row in images.bad
    ]


def without_bad(images: Images, rows: Indices) -> Indices:
    """The rows that can be decoded."""
    return rows[~np.isin(rows, list(images.bad))]


def refuse(bad: list[dict[str, Any]]) -> None:
    """Raise DataError that names bad images, if there are any."""
    if not bad:
        return
    named = "; ".join(f"{item['where']}: {item['reason']}" for item in bad[:_NAMED])
    raise DataError(
        f"{len(bad)} image{'s' if len(bad) > 1 else ''} cannot be decoded",
        named + (f"; and {len(bad) - _NAMED} more" if len(bad) > _NAMED else ""),
        "mend or remove them, or train without them by --on-bad-image skip",
    )
