"""Encoded bytes -> uint8 RGB pixels, by one rule for training, evaluation and prediction."""

import io
import math
import re
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image, UnidentifiedImageError

from samtune.data import tiff
from samtune.data.formats import register_plugins
from samtune.errors import DataError, first_line

if TYPE_CHECKING:
    import torch

Range = tuple[float, float]  # values of a deep picture that become 0 and 255

# EXIF orientation -> what turns the picture upright.
_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_MOST_SCALED = 8  # libjpeg itself decodes at 1/2, 1/4 and 1/8 of the size, in less time
_PLAIN_RANGES: Mapping[str, Range] = {"I;16": (0, 65535), "I": (0, 65535), "RGB;16": (0, 65535), "F": (0, 1)}
_OF_16_BITS = re.compile("RGB[AaX]?;16[BLN]")  # how Pillow calls 16 bits of colour in a file, and their order of bytes
_WITH_ALPHA = (2, 4)  # channels, the last of which is alpha
_GREY_AND_ALPHA = "LA;16B"
_OTHER_ORDER = {"B": "L", "L": "B", "N": "B" if sys.byteorder == "little" else "L"}
_LARGE = 16_000_000  # pixels of pictures of which a process decodes one at a time
_one_large = threading.Lock()
_ROWS = 1024  # of a deep picture that are converted at once

# Pillow's own limit is for all of a process, and below what scanners make: `decode` has one of its own.
Image.MAX_IMAGE_PIXELS = None
register_plugins()


@dataclass(frozen=True)
class DecodeRule:
    """How a data set is decoded.

    min_side: pixels that the shorter side of a picture should keep; a larger picture is decoded at 1/2, 1/4, ... of its
    size, as long as it keeps them. None keeps all. max_megapixels: larger pictures are refused. ranges: mode of deep
    pictures ("I;16" and "RGB;16" 16 bits, "I" 32-bit integers, "F" floating-point numbers) -> values that become black
    and white, or white and black where the file says that its lowest are white; others are cut off there. The plain
    rule is all of 16 bits, and 0 to 1.
    """

    min_side: int | None = None
    max_megapixels: float = 500
    ranges: Mapping[str, Range] = field(default_factory=dict)

    @classmethod
    def of(cls, stored: Mapping[str, Any]) -> "DecodeRule":
        """From what `to_json` gave."""
        ranges = {mode: (float(low), float(high)) for mode, (low, high) in stored["ranges"].items()}
        return cls(stored["min_side"], stored["max_megapixels"], ranges)

    def to_json(self) -> dict[str, Any]:
        """Plain data, to be stored."""
        ranges = {mode: list(range_) for mode, range_ in self.ranges.items()}
        return {"min_side": self.min_side, "max_megapixels": self.max_megapixels, "ranges": ranges}

    @property
    def key(self) -> str:
        """Text that differs where the pixels of some picture may differ."""
        return f"{self.min_side} {self.max_megapixels} {sorted(self.ranges.items())}"

    def range_of(self, mode: str) -> Range:
        """The values of a deep mode that become black and white."""
        return self.ranges.get(mode, _PLAIN_RANGES[mode])

    def reduction(self, width: int, height: int) -> int:
        """1, 2, 4, ...: by how much a picture of this size is reduced."""
        if self.min_side is None or min(width, height) < 2 * self.min_side:
            return 1
        return int(2 ** math.floor(math.log2(min(width, height) / self.min_side)))

    def reduced(self, width: int, height: int) -> tuple[int, int]:
        """The size after that."""
        by = self.reduction(width, height)
        return math.ceil(width / by), math.ceil(height / by)


PLAIN = DecodeRule()


def decode(encoded: bytes, where: Callable[[], str], rule: DecodeRule = PLAIN) -> "torch.Tensor":
    """The pixels of `decode_pixels` as a uint8 tensor (3, height, width), a view of what lies as (height, width, 3)."""
    import torch  # takes long to load, and a page that shows a few pictures does without

    return torch.from_numpy(decode_pixels(encoded, where, rule)).permute(2, 0, 1)


def decode_pixels(encoded: bytes, where: Callable[[], str], rule: DecodeRule = PLAIN) -> npt.NDArray[np.uint8]:
    """Decode an image to RGB pixels (height, width, 3).

    Upright as its EXIF tag says, the first frame where there are many; grey and palette images become RGB, deep ones
    are scaled to 8 bits, CMYK is converted, what is transparent is laid over white, and large ones are reduced, as the
    rule says. where: tells the image's place, for the error. Raises DataError for bytes that are no image, or only the
    beginning of one, or of more pixels than the rule allows.
    """
    try:
        image: Image.Image = Image.open(io.BytesIO(encoded))
        pixels = image.width * image.height
        if pixels > rule.max_megapixels * 1e6:
            raise _TooLarge(f"{image.width} x {image.height} pixels, more than {rule.max_megapixels:g} megapixels")
        with _one_large if pixels >= _LARGE else nullcontext():
            return _decode(encoded, image, rule)
    except UnidentifiedImageError:
        why = str(tiff.unopened(encoded) or "it is no image") if encoded else "it is empty"
        raise DataError(f"{where()} cannot be decoded", why, "fix or remove the image") from None
    except tiff.Unreadable as error:
        raise DataError(f"{where()} cannot be decoded", str(error), "convert or remove the image") from None
    except _TooLarge as error:
        hint = "remove the image, or allow it by --max-megapixels"
        raise DataError(f"{where()} cannot be decoded", str(error), hint) from None
    except Exception as error:  # each format of damaged bytes has its own: OSError, SyntaxError, struct.error, ...
        raise DataError(f"{where()} cannot be decoded", first_line(error), "fix or remove the image") from None


def from_pillow(image: Image.Image, rule: DecodeRule = PLAIN) -> "torch.Tensor":
    """An image that is in memory already, as `decode` would have it: (3, height, width) uint8.

    A large JPEG may differ by a rounding: there libjpeg itself reduces it. Raises DataError as `decode` does.
    """
    import torch

    try:
        pixels = image.width * image.height
        if pixels > rule.max_megapixels * 1e6:
            raise _TooLarge(f"{image.width} x {image.height} pixels, more than {rule.max_megapixels:g} megapixels")
        tiff.prepare(image)
        own = image.copy()  # reduced at reading, it would not be the caller's any more
        by = rule.reduction(own.width, own.height)
        turn = _UPRIGHT.get(image.getexif().get(_ORIENTATION, 1))  # when it is loaded: a TIFF is upright then
        deep = deep_mode(own)
        rgb = _to_rgb(b"", own if deep is None else image, deep, rule, by)
        return torch.from_numpy(np.array(rgb if turn is None else rgb.transpose(turn))).permute(2, 0, 1)
    except Exception as error:
        raise DataError("an image in memory cannot be read", first_line(error), "fix or leave out the image") from None


class _TooLarge(ValueError):
    """An image of more pixels than the rule allows."""


def _decode(encoded: bytes, image: Image.Image, rule: DecodeRule) -> npt.NDArray[np.uint8]:
    tiff.prepare(image)
    by, size = rule.reduction(image.width, image.height), rule.reduced(image.width, image.height)
    deep = deep_mode(image)
    # A TIFF is turned by Pillow itself, when it is loaded.
    turn = None if image.format == "TIFF" else _UPRIGHT.get(image.getexif().get(_ORIENTATION, 1))
    pixels = _plain_jpeg(encoded, image, by)
    if pixels is None or turn is not None or pixels.shape[1::-1] != size:
        small = _to_rgb(encoded, image, deep, rule, by) if pixels is None else Image.fromarray(pixels)
        if small.size != size:
            small = small.reduce(by // (image.width // small.width))
        pixels = np.array(small if turn is None else small.transpose(turn))
    return pixels


def _plain_jpeg(encoded: bytes, image: Image.Image, by: int) -> npt.NDArray[np.uint8] | None:
    """The common case, in half of the time and bit for bit as Pillow has it: both stand on libjpeg-turbo.

    Reduced by as much of `by` as libjpeg can. None for anything else, and where the decoder complains: Pillow then says
    whether it is an image.
    """
    if image.format not in ("JPEG", "MPO") or image.mode != "RGB":
        return None
    scale = min(by, _MOST_SCALED)
    at_least = {"min_height": math.ceil(image.height / scale), "min_width": math.ceil(image.width / scale)}
    try:
        pixels: npt.NDArray[np.uint8] = simplejpeg.decode_jpeg(encoded, "RGB", **(at_least if scale > 1 else {}))
    except ValueError:
        return None
    return pixels


def _to_rgb(encoded: bytes, image: Image.Image, deep: str | None, rule: DecodeRule, by: int) -> Image.Image:
    """Any other image as RGB, reduced by `by` before it is converted: large ones would take much memory."""
    width = image.width
    if deep is not None:
        image = _to_8_bits(deep_values(encoded, image, deep), rule.range_of(deep), tiff.low_is_white(image))
    elif by > 1:
        image.draft(None, rule.reduced(image.width, image.height))  # a grey or CMYK JPEG; does nothing to the others
        image.load()
    if image.mode == "La":
        image = image.convert("LA")
    if image.mode in ("P", "1"):  # what cannot be averaged
        image = image.convert("RGBA" if image.has_transparency_data else "RGB" if image.mode == "P" else "L")
    if by > 1:
        image = image.reduce(by // round(width / image.width))
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image if image.mode == "RGB" else image.convert("RGB")


def deep_mode(image: Image.Image) -> str | None:
    """The mode of an image of more than 8 bits, before it is loaded; None for others."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return image.mode[:4]
    raw_modes = [_raw_mode(tile) for tile in getattr(image, "tile", ())]
    if _GREY_AND_ALPHA in raw_modes:
        return "I;16"
    is_deep = any(map(_OF_16_BITS.fullmatch, raw_modes)) or any(map(_is_deep_ppm, getattr(image, "tile", ())))
    return "RGB;16" if is_deep else None


def deep_values(encoded: bytes, image: Image.Image, mode: str) -> npt.NDArray[Any]:
    """The values of an image of a deep mode: (height, width), or (height, width, channels), `without_alpha` of them."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        tiff.prepare(image)
        values = np.asarray(image)
        return values.view(np.uint32) if mode == "I" and tiff.is_unsigned(image) else values
    # This one may be loaded already, and does not tell any more how it was stored.
    upper, lower = Image.open(io.BytesIO(encoded)), Image.open(io.BytesIO(encoded))
    stored = _raw_mode(upper.tile[0])
    if _is_deep_ppm(upper.tile[0]):
        tile: Any = upper.tile[0]
        scaled = np.frombuffer(encoded, ">u2", upper.width * upper.height * 3, tile[2]) * (65535 / float(tile[3][1]))
        return np.rint(scaled).astype(np.uint16).reshape(upper.height, upper.width, 3)
    if stored == _GREY_AND_ALPHA:
        # Pillow gives the upper byte of both. Taken for four channels of 8 bits, all bytes are there.
        upper.tile = [_with_raw_mode(tile, "RGBA") for tile in upper.tile]
        return np.ascontiguousarray(upper).view(">u2").astype(np.uint16)
    # Of 16 bits of colour Pillow gives the upper byte; told the other order of bytes, it gives the lower one.
    mode = stored.replace("a", "A")  # colour times alpha, which Pillow would divide in each byte by itself
    upper.tile = [_with_raw_mode(tile, mode) for tile in upper.tile]
    lower.tile = [_with_raw_mode(tile, mode[:-1] + _OTHER_ORDER[mode[-1]]) for tile in lower.tile]
    values = np.asarray(upper).astype(np.uint16) << 8 | np.asarray(lower)
    return values if mode == stored else _without_factor(values)


def without_alpha(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Grey or colour alone."""
    return values[..., :-1] if values.ndim == 3 and values.shape[2] in _WITH_ALPHA else values


def _without_factor(values: npt.NDArray[np.uint16]) -> npt.NDArray[np.uint16]:
    """Colour that was multiplied by alpha, as it was before."""
    alpha = values[..., -1:].astype(np.float64)
    colour = np.rint(values[..., :-1] * (65535 / np.maximum(alpha, 1))).clip(0, 65535).astype(np.uint16)
    return np.concatenate([colour, values[..., -1:]], axis=2)


def _is_deep_ppm(tile: Any) -> bool:
    return bool(tile[0] == "ppm" and tile[3][0] == "RGB" and tile[3][1] > 255)


def _raw_mode(tile: Any) -> str:
    return str(tile[3][0] if isinstance(tile[3], tuple) else tile[3])


def _with_raw_mode(tile: Any, mode: str) -> Any:
    return tile._replace(args=(mode, *tile[3][1:]) if isinstance(tile[3], tuple) else mode)


def _to_8_bits(values: npt.NDArray[Any], black_and_white: Range, inverted: bool) -> Image.Image:
    """Values from black to white become 0 to 255, inverted 255 to 0, others are cut off; what is no number is black."""
    low, high = black_and_white
    levels = np.empty(values.shape, np.uint8)
    has_alpha = without_alpha(values) is not values
    for start in range(0, len(values), _ROWS):
        part = values[start : start + _ROWS].astype(np.float64)
        scaled = (part - low) * (255 / (high - low)) if high > low else part * 0
        if inverted:
            scaled = 255 - scaled
        if has_alpha:
            scaled[..., -1] = part[..., -1] / 257
        levels[start : start + _ROWS] = np.rint(np.nan_to_num(scaled, nan=0).clip(0, 255))
    return Image.fromarray(levels)  # of two channels, LA; of four, RGBA


def is_constant(pixels: "torch.Tensor") -> bool:
    """Whether a decoded picture shows one colour only."""
    return bool((pixels == pixels[:, :1, :1]).all())
