"""Every image of a data set, read once: its format, its appearance, or why it cannot be read.

What is readable is what training can decode. Work is spread over processes.
"""

import hashlib
import io
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader

from samtune.data.cache import Progress
from samtune.data.decode import DecodeRule, decode, is_constant
from samtune.data.loader import leave_signals_to_the_main_process
from samtune.data.source import Split
from samtune.errors import DataError

THUMBNAIL = 16  # side of a picture's thumbnail in pixels
_BATCH = 32
_ORIENTATION = 0x0112  # EXIF tag; 1 is upright
_LEAST_CONTRAST = 2.0  # standard deviation in grey levels, of 255, under which a picture shows nothing to compare
_MODES = {"1": "grey", "L": "grey", "LA": "grey with alpha", "P": "palette", "PA": "palette"}


@dataclass(frozen=True)
class Picture:
    """What one image is. label: its class index. sha256: of the encoded bytes, b"" if there are none to be had.

    Of an image that cannot be read, unreadable says why and the rest is empty. width and height in pixels as they are
    shown, upright. hash: 64 bits, alike for what looks alike; None without contrast, or without imagehash.
    thumbnail: THUMBNAIL x THUMBNAIL grey levels, uint8. label: -1 where it has none.
    """

    split: str
    row: int
    label: int
    path: str | None
    sha256: bytes
    unreadable: str = ""
    mode: str = ""
    width: int = 0
    height: int = 0
    animated: bool = False
    turned: bool = False
    one_colour: bool = False
    hash: int | None = None
    thumbnail: bytes = b""


def can_see_likeness() -> bool:
    """Whether the package is installed that perceptual hashes come from."""
    return find_spec("imagehash") is not None


def scan(split: Split, rule: DecodeRule, *, workers: int, progress: Progress) -> Iterator[Picture]:
    """Each image of a split, in its order. rule: how training decodes them."""
    loader: DataLoader[Any] = DataLoader(
        _Pictures(split, rule),
        batch_size=_BATCH,
        num_workers=workers,
        collate_fn=list,
        worker_init_fn=leave_signals_to_the_main_process,
        generator=torch.Generator(),
    )
    done = 0
    for batch in loader:
        yield from batch
        done += len(batch)
        progress(f"checking {split.name}", done, len(split))


class _Pictures(torch.utils.data.Dataset[Picture]):
    def __init__(self, split: Split, rule: DecodeRule) -> None:
        self.split, self.rule = split, rule

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, row: int) -> Picture:
        split = self.split
        label, path = int(split.labels[row]), split.path(row)
        where: dict[str, Any] = {"split": split.name, "row": row, "label": label, "path": path}
        encoded = b""
        try:
            encoded = split.image_bytes(row)
            pixels = decode(encoded, lambda: split.where(row), self.rule)
        except DataError as error:
            digest = hashlib.sha256(encoded).digest() if encoded else b""
            return Picture(**where, sha256=digest, unreadable=error.cause)
        about = _header(encoded) | _appearance(pixels)
        return Picture(**where, sha256=hashlib.sha256(encoded).digest(), one_colour=is_constant(pixels), **about)


def _header(encoded: bytes) -> dict[str, Any]:
    with Image.open(io.BytesIO(encoded)) as image:
        about: dict[str, Any] = {"mode": _mode(image), "width": image.width, "height": image.height}
        with suppress(Exception):  # a damaged tag or second frame; training needs neither
            orientation = image.getexif().get(_ORIENTATION, 1)
            about["turned"] = orientation in range(2, 9)
            if orientation in range(5, 9):  # it is shown upright
                about["width"], about["height"] = image.height, image.width
        with suppress(Exception):
            # A telephone's JPEG may hold a second picture (MPO); nothing moves in it.
            about["animated"] = bool(getattr(image, "is_animated", False)) and image.format != "MPO"
        return about


def _mode(image: Image.Image) -> str:
    depths = str([tile[3] for tile in getattr(image, "tile", ())])  # Pillow shows 16-bit colour as plain RGB
    if image.mode in ("I", "F"):
        return "32-bit integers" if image.mode == "I" else "floating point"
    return "16-bit" if image.mode.startswith("I") or ";16" in depths else _MODES.get(image.mode, image.mode)


def _appearance(pixels: torch.Tensor) -> dict[str, Any]:
    """Likeness of (3, height, width) uint8 pixels."""
    image = Image.fromarray(pixels.permute(1, 2, 0).numpy()).convert("L")
    thumbnail = np.asarray(image.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX))
    about: dict[str, Any] = {"thumbnail": thumbnail.tobytes()}
    if can_see_likeness() and thumbnail.std() > _LEAST_CONTRAST:
        import imagehash

        about["hash"] = int.from_bytes(np.packbits(imagehash.phash(image).hash).tobytes())
    return about
