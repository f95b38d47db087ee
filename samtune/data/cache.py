"""Decoded images in a file, so that each is decoded once, for all epochs, processes and runs.

The file is named by the content of the encoded images and by the rule that decodes them: a changed picture is another
file, and the same data under another path is the same file. It lies under $SAMTUNE_CACHE, else in the user's cache
folder.
"""

import hashlib
import itertools
import os
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from samtune import console
from samtune.config import cache_folders
from samtune.data.decode import PLAIN, DecodeRule, decode, is_constant
from samtune.data.pixels import ImageOrReason, JoinedPixels, Pixels, evict, load, record, write
from samtune.data.source import Split
from samtune.data.splits import Indices
from samtune.errors import DataError, plural, shorten

Progress = Callable[[str, int, int], None]  # activity, images done, images in all

_RULE = "4"  # changes with `decode`, so that pixels made by an older rule are not taken for today's
_NAMED = 10  # bad images that an error names
_SMALL = 4096  # bytes of an image that is decoded so fast that threads would only wait for Python's lock
_SAMPLED = 256  # images by whose headers the size of all is estimated
_BYTES_AT_ONCE = 64 * 2**20  # bytes of pixels that all threads together decode before they hand them over


@dataclass(frozen=True)
class Images:
    """The images of a split, from the cache where it has them.

    rule: how they are decoded. slot_of: row -> its position in pixels. bad: why an image cannot be decoded, by
    row; constant: rows of one colour only; digest: of an image's bytes, by row. These three are known of images that
    were decoded before.
    """

    split: Split
    rule: DecodeRule = PLAIN
    pixels: Pixels | JoinedPixels | None = None
    slot_of: Mapping[int, int] = field(default_factory=dict)
    bad: Mapping[int, str] = field(default_factory=dict)
    constant: Collection[int] = ()
    digest: Mapping[int, int] = field(default_factory=dict)

    def __getitem__(self, row: int) -> torch.Tensor:
        """(3, height, width) uint8. Raises DataError for what is no image."""
        slot = self.slot_of.get(row)
        if self.pixels is not None and slot is not None and row not in self.bad:
            return self.pixels[slot]
        return decode(self.split.image_bytes(row), lambda: self.split.where(row), self.rule)

    def take(self, rows: Indices) -> Sequence[torch.Tensor] | torch.Tensor:
        """(3, h, w) uint8 each; where the cache has them in one shape, as one tensor (n, 3, h, w)."""
        if self.pixels is not None and not self.bad and (self._slots[rows] >= 0).all():
            together = self.pixels.take(self._slots[rows])
            if together is not None:
                return together
        return [self[row] for row in rows.tolist()]

    def within(self, limit: int) -> int:
        """How many images one may take at once for about so many bytes; 1 where they are still to be decoded."""
        return max(1, limit // max(1, self.pixels.mean_bytes)) if self.pixels is not None else 1

    @cached_property
    def _slots(self) -> npt.NDArray[np.int64]:
        """The slot of each row, -1 where there is none."""
        slots = np.full(len(self.split), -1)
        slots[list(self.slot_of)] = list(self.slot_of.values())
        return slots


def concat_images(split: Split, first: Images, second: Images) -> Images:
    """The images of a split whose rows were decoded in two parts: some in the first, the others in the second.

    Where the second is of another split, its rows come after those of the first one's.
    """
    before = 0 if second.split is first.split else len(first.split)
    files: list[Pixels] = []
    slot_of: dict[int, int] = {}
    for images, shift in ((first, 0), (second, before)):
        if images.pixels is not None:
            assert isinstance(images.pixels, Pixels)
            start = sum(len(file.shapes) for file in files)
            slot_of |= {row + shift: start + slot for row, slot in images.slot_of.items()}
            files.append(images.pixels)
    return Images(
        split,
        first.rule,
        JoinedPixels(tuple(files)) if files else None,
        slot_of,
        dict(first.bad) | {row + before: why for row, why in second.bad.items()},
        {*first.constant, *(row + before for row in second.constant)},
        dict(first.digest) | {row + before: digest for row, digest in second.digest.items()},
    )


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
    """Decode these rows of a split, unless the cache has them, and keep the pixels.

    limit: bytes that the cache may hold in all; the least recently used files are removed. What does not fit is
    neither kept nor decoded; with `always` it is decoded once, and only which images are bad is kept. A cache that
    cannot be written is not used. root: folder of another cache than the user's.
    """
    rows = np.unique(rows)
    estimated = estimated_bytes(split, rows, rule) if len(rows) and (limit > 0 or always) else 0
    fits = estimated <= limit
    if len(rows) == 0 or not (always or (fits and limit > 0)):
        return Images(split, rule)
    root, signature = root or decoded_folder(), _signature(split, rows, rule)
    digests = None
    folder = _folder_of(root, signature)
    if folder is None:
        digests = _digests(split, rows, threads, progress)
        folder = root / _folder_name(rule, digests)
    decoded = load(folder)
    if decoded is None or (fits and decoded.pixels is None):
        digests = digests or _digests(split, rows, threads, progress)
        portion = max(1, int(_BYTES_AT_ONCE / threads / (1 + estimated / len(rows))))
        try:
            root.mkdir(parents=True, exist_ok=True)
            evict(root, limit - estimated if fits else limit)
            write(folder, _decode_all(split, rows, rule, threads, portion, progress), digests, keep_pixels=fits)
            decoded = load(folder)
        except OSError as error:  # no room, no permission, a shared disk that is away: each epoch decodes
            _warn_once(f"decoded images cannot be kept in {root} ({error.strerror}): every epoch decodes them")
            if not always:
                return Images(split, rule)
            decoded = record(_decode_all(split, rows, rule, threads, portion, progress), digests, None)
    _mark_used(folder, signature)
    if decoded is None:
        return Images(split, rule)
    numbers = rows.tolist()
    return Images(
        split,
        rule,
        decoded.pixels,
        {row: i for i, row in enumerate(numbers)} if decoded.pixels else {},
        {numbers[i]: reason for i, reason in decoded.bad.items()},
        {numbers[i] for i in decoded.constant},
        dict(zip(numbers, decoded.digests.tolist(), strict=True)),
    )


def is_cached(split: Split, rows: Indices, rule: DecodeRule, threads: int, progress: Progress, at_most: int) -> bool:
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
        folder = root / _folder_name(rule, _digests(split, rows, threads, progress))
    decoded = load(folder)
    return decoded is not None and decoded.pixels is not None


def _folder_name(rule: DecodeRule, digests: Sequence[bytes]) -> str:
    return hashlib.sha256(f"{_RULE} {rule.key}".encode() + b"".join(digests)).hexdigest()[:32]


@cache
def _warn_once(text: str) -> None:
    console.warn(text)


def decoded_folder() -> Path:
    """The folder of decoded images."""
    folder = os.environ.get("SAMTUNE_CACHE")
    return Path(folder) if folder else cache_folders.user_cache() / "samtune" / "decoded"


def estimated_bytes(split: Split, rows: Indices, rule: DecodeRule) -> int:
    """Size of the pixels of all rows, by the headers of some of them."""
    sampled = rows[np.linspace(0, len(rows) - 1, min(len(rows), _SAMPLED)).round().astype(int)].tolist()
    pixels = 0
    for row in sampled:
        with suppress(Exception), split.images.open(row) as file, Image.open(file) as image:
            width, height = rule.reduced(*image.size)
            pixels += width * height
    return round(3 * pixels / len(sampled) * len(rows))


def _signature(split: Split, rows: Indices, rule: DecodeRule) -> str | None:
    """A hash of the paths, sizes and times of files, which are not read; None for images in tables."""
    if split.images.table_bytes > 0:
        return None
    digest = hashlib.sha256(f"{_RULE} {rule.key}".encode())
    for row in rows.tolist():
        path = split.images.path(row)
        try:
            stat = os.stat(path)
            digest.update(f"{stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns} ".encode())
        except (OSError, ValueError):
            digest.update(b"gone ")
        digest.update(os.fsencode(os.path.abspath(path)) + b"\n")
    return digest.hexdigest()


def _folder_of(root: Path, signature: str | None) -> Path | None:
    if signature is not None:
        for path in root.glob("*/signatures"):
            with suppress(OSError):
                if signature in path.read_text(encoding="utf-8").split():
                    return path.parent
    return None


def _mark_used(folder: Path, signature: str | None) -> None:
    with suppress(OSError):
        os.utime(folder)
        if signature is not None and _folder_of(folder.parent, signature) is None:
            with (folder / "signatures").open("a", encoding="utf-8") as file:
                file.write(f"{signature}\n")


def _digests(split: Split, rows: Indices, threads: int, progress: Progress) -> list[bytes]:
    """SHA-256 of the encoded bytes of each image; of no bytes, for one that cannot be read."""

    def one(row: int) -> bytes:
        try:
            return hashlib.sha256(split.image_bytes(row)).digest()
        except DataError:
            return hashlib.sha256().digest()

    digests: list[bytes] = []
    with ThreadPoolExecutor(threads, "reader") as pool:
        for start in range(0, len(rows), _SAMPLED):
            digests += pool.map(one, rows[start : start + _SAMPLED].tolist())
            progress(f"reading {split.name}", len(digests), len(rows))
    return digests


def _decode_all(
    split: Split, rows: Indices, rule: DecodeRule, threads: int, portion: int, progress: Progress
) -> Iterator[ImageOrReason]:
    """Each image in order. Both decoders work without Python's lock. portion: images that a thread decodes at once."""

    def one(row: int) -> ImageOrReason:
        try:
            pixels = decode(split.image_bytes(row), lambda: split.where(row), rule)
        except DataError as error:
            return error.cause or error.message, False
        return pixels, is_constant(pixels)

    def decode_part(part: Indices) -> list[ImageOrReason]:
        return [one(row) for row in part.tolist()]

    if 0 < split.images.table_bytes < _SMALL * len(split):
        threads = 1
    parts = (rows[start : start + portion] for start in range(0, len(rows), portion))
    done = 0
    with ThreadPoolExecutor(threads, "decoder") as pool:  # never far ahead: a data set need not fit into memory
        pending = deque(pool.submit(decode_part, part) for part in itertools.islice(parts, threads + 1))
        while pending:
            images = pending.popleft().result()
            pending.extend(pool.submit(decode_part, part) for part in itertools.islice(parts, 1))
            yield from images
            done += len(images)
            progress(f"decoding {split.name}", done, len(rows))


def count_shared_images(images: Images, rows: Indices, others: Images, other_rows: Indices) -> int:
    """How many of the other images are, byte for byte, among these; 0 where they were not decoded."""
    seen = {images.digest.get(row) for row in rows.tolist()} - {None}
    return sum(others.digest.get(row) in seen for row in other_rows.tolist())


def one_colour(images: Images, rows: Indices) -> list[str]:
    """Where images of one colour only come from, most likely black ones; for messages."""
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
