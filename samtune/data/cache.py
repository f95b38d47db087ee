"""Decoded images in a file, so that each is decoded once, for all epochs, processes and runs.

The file is named by the content of the encoded images and by the rule that decodes them: a changed picture is another
file, and the same data under another path is the same file. It lies under $SAMTUNE_CACHE, else in the user's cache
folder.
"""

import hashlib
import itertools
import json
import os
import shutil
import tempfile
import weakref
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from samtune import console
from samtune.config import cache_folders
from samtune.data.decode import PLAIN, DecodeRule, decode, is_constant
from samtune.data.source import Split
from samtune.data.splits import Indices
from samtune.data.text import plural, shorten
from samtune.errors import DataError

Progress = Callable[[str, int, int], None]  # what is going on, images done, images in all

_RULE = "4"  # changes with `decode`, so that pixels made by an older rule are not taken for today's
_NAMED = 10  # bad images that an error names
_SMALL = 4096  # bytes of an image that is decoded so fast that threads would only wait for Python's lock
_SAMPLED = 256  # images by whose headers the size of all is foretold
_AT_ONCE = 64 * 2**20  # bytes of pixels that all threads together decode before they hand them over
_MAPPED = 2**28  # bytes of a file up to which it is mapped into memory; a larger one would count as the process's own


@dataclass(frozen=True)
class Pixels:
    """One file of decoded images, one after the other as (height, width, 3) uint8.

    offsets: (n,) place of each in bytes. shapes: (n, 2) height and width; (0, 0) where an image cannot be decoded.
    """

    file: Path
    offsets: npt.NDArray[np.int64]
    shapes: npt.NDArray[np.int64]

    def __getitem__(self, row: int) -> torch.Tensor:
        """(3, height, width) uint8; what is done to it does not reach the file."""
        height, width = self.shapes[row].tolist()
        pixels = np.empty((height, width, 3), np.uint8) if self._mapped is None else self._view(row, height, width)
        if self._mapped is None:
            os.preadv(self._descriptor, [pixels.data], int(self.offsets[row]))
        return torch.from_numpy(pixels).permute(2, 0, 1)

    def map(self) -> None:
        """Take hold of the file: it stays readable even if another run removes it to make room."""
        _ = self._mapped if self.file.stat().st_size <= _MAPPED else self._descriptor

    def take(self, places: npt.NDArray[np.int64]) -> torch.Tensor | None:
        """(n, 3, height, width) uint8, a copy, if all images of the file are of one shape; else None."""
        if len(self.shapes) == 0 or (self.shapes != self.shapes[0]).any():
            return None
        height, width = self.shapes[0].tolist()
        if self._mapped is not None:
            taken = self._mapped.reshape(-1, height, width, 3)[places]
        else:
            taken = np.empty((len(places), height, width, 3), np.uint8)
            for image, start in zip(taken, self.offsets[places].tolist(), strict=True):
                os.preadv(self._descriptor, [image.data], start)
        return torch.from_numpy(taken).permute(0, 3, 1, 2)

    def _view(self, row: int, height: int, width: int) -> npt.NDArray[np.uint8]:
        assert self._mapped is not None
        start = int(self.offsets[row])
        return self._mapped[start : start + height * width * 3].reshape(height, width, 3)

    @cached_property
    def _mapped(self) -> npt.NDArray[np.uint8] | None:
        """The file as memory, if it is not too large. Copy on write: the file stays as it is."""
        size = self.file.stat().st_size
        if size > _MAPPED:
            return None
        return np.memmap(self.file, np.uint8, "c") if size else np.empty(0, np.uint8)

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

    rule: how they are decoded. place: where a row's pixels stand in the cache. bad: why an image cannot be decoded, by
    row; constant: rows of one colour only; digest: of an image's bytes, by row. These three are known of images that
    have been looked at.
    """

    split: Split
    rule: DecodeRule = PLAIN
    pixels: Pixels | JoinedPixels | None = None
    place: Mapping[int, int] = field(default_factory=dict)
    bad: Mapping[int, str] = field(default_factory=dict)
    constant: Collection[int] = ()
    digest: Mapping[int, int] = field(default_factory=dict)

    def __getitem__(self, row: int) -> torch.Tensor:
        """(3, height, width) uint8. Raises DataError for what is no image."""
        place = self.place.get(row)
        if self.pixels is not None and place is not None and row not in self.bad:
            return self.pixels[place]
        return decode(self.split.image_bytes(row), lambda: self.split.where(row), self.rule)

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


def concat_images(split: Split, first: Images, second: Images) -> Images:
    """The images of a split whose rows were looked at in two parts: some in the first, the others in the second.

    Where the second is of another split, its rows come after those of the first one's.
    """
    before = 0 if second.split is first.split else len(first.split)
    files: list[Pixels] = []
    place: dict[int, int] = {}
    for images, shift in ((first, 0), (second, before)):
        if images.pixels is not None:
            assert isinstance(images.pixels, Pixels)
            start = sum(len(file.shapes) for file in files)
            place |= {row + shift: start + at for row, at in images.place.items()}
            files.append(images.pixels)
    return Images(
        split,
        first.rule,
        JoinedPixels(tuple(files)) if files else None,
        place,
        dict(first.bad) | {row + before: why for row, why in second.bad.items()},
        {*first.constant, *(row + before for row in second.constant)},
        dict(first.digest) | {row + before: digest for row, digest in second.digest.items()},
    )


# ------------------------------------------------------------------------------------------------------------- looking


@dataclass(frozen=True)
class _Look:
    """What came of decoding some images once, in their order. digests: (n,) uint64 of the encoded bytes."""

    digests: npt.NDArray[np.uint64]
    pixels: Pixels | None
    bad: Mapping[int, str]
    constant: Collection[int]


def decode_into_cache(
    split: Split,
    rows: Indices,
    *,
    rule: DecodeRule = PLAIN,
    limit: int,
    threads: int,
    progress: Progress,
    always: bool = False,
    root: Path | None = None,
) -> Images:
    """Decode these rows of a split, unless that was done before, and keep the pixels.

    limit: bytes that the cache may hold in all; the files that were not used for longest go. What does not fit is not
    kept, nor read; with `always` it is looked at all the same, once: which images are bad is kept. A cache that cannot
    be written is done without. root: folder of another cache than the user's.
    """
    rows = np.unique(rows)
    if len(rows) == 0 or (limit == 0 and not always):
        return Images(split, rule)
    foretold = foretold_bytes(split, rows, rule)
    fits = foretold <= limit
    if not fits and not always:
        return Images(split, rule)
    root, signature = root or decoded_folder(), _signature(split, rows, rule)
    digests = None
    folder = _folder_of(root, signature)
    if folder is None:
        digests = _digests(split, rows, threads, progress)
        folder = root / _name(rule, digests)
    look = _open(folder)
    if look is None or (fits and look.pixels is None):
        digests = digests or _digests(split, rows, threads, progress)
        portion = max(1, int(_AT_ONCE / threads / (1 + foretold / len(rows))))
        try:
            root.mkdir(parents=True, exist_ok=True)
            _make_room(root, limit - foretold if fits else limit)
            _write(folder, _decoded(split, rows, rule, threads, portion, progress), digests, keep_pixels=fits)
            look = _open(folder)
        except OSError as error:  # no room, no permission, a shared disk that is away: each epoch decodes
            _warn_once(f"decoded images cannot be kept in {root} ({error.strerror}): every epoch decodes them")
            if not always:
                return Images(split, rule)
            look = _record(_decoded(split, rows, rule, threads, portion, progress), digests, None)
    _note_use(folder, signature)
    numbers = rows.tolist()
    return Images(
        split,
        rule,
        look.pixels if look else None,
        {row: i for i, row in enumerate(numbers)} if look and look.pixels else {},
        {numbers[i]: why for i, why in look.bad.items()} if look else {},
        {numbers[i] for i in look.constant} if look else (),
        dict(zip(numbers, look.digests.tolist(), strict=True)) if look else {},
    )


def is_kept(split: Split, rows: Indices, rule: DecodeRule, threads: int, progress: Progress, at_most: int) -> bool:
    """Whether the cache has the pixels of these rows, as far as that can be told by reading at most so many bytes.

    Files are known by their names, sizes and times; of tables the images are read.
    """
    rows = np.unique(rows)
    root, signature = decoded_folder(), _signature(split, rows, rule)
    folder = _folder_of(root, signature)
    if folder is None:
        in_tables = split.images.table_bytes * len(rows) / max(1, len(split))
        if not 0 < in_tables <= at_most:
            return False
        folder = root / _name(rule, _digests(split, rows, threads, progress))
    look = _open(folder)
    return look is not None and look.pixels is not None


def _name(rule: DecodeRule, digests: Sequence[bytes]) -> str:
    """Of the folder for these images."""
    return hashlib.sha256(f"{_RULE} {rule.key}".encode() + b"".join(digests)).hexdigest()[:32]


@cache
def _warn_once(text: str) -> None:
    console.warn(text)


def decoded_folder() -> Path:
    """The folder of decoded images."""
    given = os.environ.get("SAMTUNE_CACHE")
    if given:
        return Path(given)
    return cache_folders.user_cache() / "samtune" / "decoded"


def foretold_bytes(split: Split, rows: Indices, rule: DecodeRule) -> int:
    """Size of the pixels of all rows, by the headers of some of them."""
    sampled = rows[np.linspace(0, len(rows) - 1, min(len(rows), _SAMPLED)).round().astype(int)].tolist()
    pixels = 0
    for row in sampled:
        with suppress(Exception), split.images.open(row) as file, Image.open(file) as image:
            width, height = rule.reduced(*image.size)
            pixels += width * height
    return round(3 * pixels / len(sampled) * len(rows))


def _signature(split: Split, rows: Indices, rule: DecodeRule) -> str | None:
    """Names files by their paths, sizes and times, without reading them; None for images in tables."""
    if split.images.table_bytes > 0:
        return None
    digest = hashlib.sha256(f"{_RULE} {rule.key}".encode())
    for row in rows.tolist():
        path = split.images.path(row)
        try:
            found = os.stat(path)
            digest.update(f"{found.st_size} {found.st_mtime_ns} {found.st_ctime_ns} ".encode())
        except (OSError, ValueError):
            digest.update(b"gone ")
        digest.update(os.fsencode(os.path.abspath(path)) + b"\n")
    return digest.hexdigest()


def _folder_of(root: Path, signature: str | None) -> Path | None:
    """Where files of this signature were kept."""
    if signature is not None:
        for path in root.glob("*/signatures"):
            with suppress(OSError):
                if signature in path.read_text(encoding="utf-8").split():
                    return path.parent
    return None


def _note_use(folder: Path, signature: str | None) -> None:
    with suppress(OSError):
        os.utime(folder)
        if signature is not None and _folder_of(folder.parent, signature) is None:
            with (folder / "signatures").open("a", encoding="utf-8") as file:
                file.write(f"{signature}\n")


def _digests(split: Split, rows: Indices, threads: int, progress: Progress) -> list[bytes]:
    """Of the encoded bytes of each image; of one that cannot be read, of nothing."""

    def one(row: int) -> bytes:
        try:
            return hashlib.sha256(split.image_bytes(row)).digest()
        except DataError:
            return hashlib.sha256().digest()

    found: list[bytes] = []
    with ThreadPoolExecutor(threads, "reader") as pool:
        for start in range(0, len(rows), _SAMPLED):
            found += pool.map(one, rows[start : start + _SAMPLED].tolist())
            progress(f"reading {split.name}", len(found), len(rows))
    return found


Decoded = tuple[torch.Tensor | str, bool]  # pixels, or the reason why there are none; whether they are of one colour


def _decoded(
    split: Split, rows: Indices, rule: DecodeRule, threads: int, portion: int, progress: Progress
) -> Iterator[Decoded]:
    """Each image in order. Both decoders work without Python's lock. portion: images that a thread decodes at once."""

    def one(row: int) -> Decoded:
        try:
            pixels = decode(split.image_bytes(row), lambda: split.where(row), rule)
        except DataError as error:
            return error.cause or error.message, False
        return pixels, is_constant(pixels)

    def some(part: Indices) -> list[Decoded]:
        return [one(row) for row in part.tolist()]

    if 0 < split.images.table_bytes < _SMALL * len(split):
        threads = 1
    parts = (rows[start : start + portion] for start in range(0, len(rows), portion))
    done = 0
    with ThreadPoolExecutor(threads, "decoder") as pool:  # never far ahead: a data set need not fit into memory
        pending = deque(pool.submit(some, part) for part in itertools.islice(parts, threads + 1))
        while pending:
            found = pending.popleft().result()
            pending.extend(pool.submit(some, part) for part in itertools.islice(parts, 1))
            yield from found
            done += len(found)
            progress(f"decoding {split.name}", done, len(rows))


def _record(images: Iterator[Decoded], digests: Sequence[bytes], file: BinaryIO | None) -> _Look:
    """Take the images one by one, and write their pixels into the file, if there is one."""
    shapes: list[tuple[int, ...]] = []
    offsets: list[int] = []
    bad: dict[int, str] = {}
    constant: list[int] = []
    end = 0
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
    return _Look(np.array([int.from_bytes(digest[:8]) for digest in digests], np.uint64), pixels, bad, constant)


def _write(folder: Path, images: Iterator[Decoded], digests: Sequence[bytes], *, keep_pixels: bool) -> None:
    """Beside its place first, then renamed: a reader finds a whole one or none."""
    part = Path(tempfile.mkdtemp(prefix=".part-", dir=folder.parent))
    try:
        if keep_pixels:
            with (part / "pixels").open("wb") as file:
                look = _record(images, digests, file)
            assert look.pixels is not None
            np.savez(part / "index.npz", digests=look.digests, offsets=look.pixels.offsets, shapes=look.pixels.shapes)
        else:
            look = _record(images, digests, None)
            np.savez(part / "index.npz", digests=look.digests)
        odd = {"bad": look.bad, "constant": look.constant}
        (part / "odd.json").write_text(json.dumps(odd), encoding="utf-8")
        if keep_pixels and not (folder / "pixels").exists():
            shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():  # else another process was faster
            part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _open(folder: Path) -> _Look | None:
    """None where there is nothing, or nothing whole."""
    try:
        odd = json.loads((folder / "odd.json").read_text(encoding="utf-8"))
        bad = {int(row): why for row, why in odd["bad"].items()}
        with np.load(folder / "index.npz") as index:
            if "shapes" not in index:
                return _Look(index["digests"], None, bad, odd["constant"])
            digests, offsets, shapes = index["digests"], index["offsets"], index["shapes"]
        if (folder / "pixels").stat().st_size != int((shapes[:, 0] * shapes[:, 1] * 3).sum()):
            raise ValueError("the file of pixels is not whole")
    except (OSError, ValueError, KeyError, TypeError):
        shutil.rmtree(folder, ignore_errors=True)
        return None
    pixels = Pixels(folder / "pixels", offsets, shapes)
    pixels.map()
    return _Look(digests, pixels, bad, odd["constant"])


def _make_room(root: Path, room: int) -> None:
    """Remove what was not used for longest until the rest takes no more than `room` bytes."""
    kept = sorted((path for path in root.iterdir() if path.is_dir()), key=lambda path: path.stat().st_mtime)
    sizes = {path: sum(file.stat().st_size for file in path.iterdir()) for path in kept}
    for path in kept:
        if sum(sizes.values()) <= room:
            return
        shutil.rmtree(path, ignore_errors=True)
        del sizes[path]


# -------------------------------------------------------------------------------------------------- what was looked at


def count_shared_images(images: Images, rows: Indices, others: Images, other_rows: Indices) -> int:
    """How many of the other images are, byte for byte, among these; 0 where they have not been looked at."""
    seen = {images.digest.get(row) for row in rows.tolist()} - {None}
    return sum(others.digest.get(row) in seen for row in other_rows.tolist())


def of_one_colour(images: Images, rows: Indices) -> list[str]:
    """The places of pictures that show one colour only: black ones, most likely."""
    return [images.split.where(row) for row in rows.tolist() if row in images.constant]


def undecodable_rows(images: Images, rows: Indices) -> list[dict[str, Any]]:
    """The rows that cannot be decoded: split, row, where, reason; for an error or a report."""
    return [
        {"split": images.split.name, "row": row, "where": images.split.where(row), "reason": images.bad[row]}
        for row in rows.tolist()
        if row in images.bad
    ]


def drop_undecodable(images: Images, rows: Indices) -> Indices:
    """The rows that can be decoded."""
    return rows[~np.isin(rows, list(images.bad))]


def raise_if_undecodable(bad: list[dict[str, Any]]) -> None:
    """Raise DataError that names bad images, if there are any."""
    if not bad:
        return
    raise DataError(
        f"{plural(len(bad), 'image')} cannot be decoded",
        shorten([f"{item['where']}: {item['reason']}" for item in bad], _NAMED, "; "),
        "fix or remove them, or train without them by --on-bad-image skip",
    )
