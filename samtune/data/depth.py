"""The range of pictures of more than 8 bits: which of their values become black and white.

Cameras store 12 bits in 16, microscopes numbers in [0, 1], scanners negative integers. The values of one file do not
tell which: those of the training images together do.
"""

import io
from collections.abc import Mapping

import numpy as np
from PIL import Image

from samtune.data.decode import DecodeRule, Range, deep_mode, deep_values, without_alpha
from samtune.data.source import Split
from samtune.data.splits import Indices

_SAMPLED = 256  # images that are looked at, evenly spread
_HEAD = 32  # bytes of a file that tell a JPEG or a PNG of 8 bits
_BITS = (8, 10, 12, 14, 16)
_NAMES = {"I;16": "16-bit grey", "RGB;16": "16-bit colour", "I": "32-bit grey", "F": "floating-point grey"}
_TOPS = (1.0, 255.0, 65535.0)  # of floating-point numbers from 0 on


def value_ranges(split: Split, rows: Indices) -> dict[str, Range]:
    """Mode -> values that become black and white, of the deep modes among these rows; {} where all have 8 bits.

    Integers from 0 on: 0 to the largest number of 8, 10, 12, 14 or 16 bits that holds all values. Floating-point
    numbers from 0 on: 0 to 1, to 255 or to 65535 in the same way; those between -1 and 1 have that range. Anything
    else: from the least to the largest value. An image that cannot be decoded does not count.
    """
    extremes = _lowest_and_highest(split, rows)
    return {mode: _usual_range(low, high, mode == "F") for mode, (low, high) in extremes.items()}


def range_warnings(rule: DecodeRule, splits: Mapping[str, Split]) -> list[str]:
    """Warnings on validation and test pictures whose values do not fit the range of the training images.

    They hold values that are more than a tenth of the range outside of it, or none above an eighth of it.
    """
    warnings = []
    for role in ("validation", "test"):
        extremes = _lowest_and_highest(splits[role], splits[role].labelled) if role in splits else {}
        for mode, (low, high) in sorted(extremes.items()):
            black, white = rule.range_of(mode)
            outside = max(high - white, black - low) > (white - black) / 10
            if outside or (black >= 0 and high < white / 8):
                becomes = "what is outside becomes black or white" if outside else "they are nearly black"
                warnings.append(
                    f"{_NAMES[mode]} pictures of {role} hold {low:g} to {high:g}, and {black:g} is black and {white:g} "
                    f"white, as in train: {becomes}; store all splits in one range"
                )
    return warnings


def _lowest_and_highest(split: Split, rows: Indices) -> dict[str, Range]:
    """Mode -> the least and the largest value, of a sample of these rows."""
    by_mode: dict[str, list[Range]] = {}
    for row in rows[np.linspace(0, len(rows) - 1, min(len(rows), _SAMPLED)).round().astype(int)].tolist():
        extremes = _extremes(split, row)
        if extremes is not None:
            by_mode.setdefault(extremes[0], []).append(extremes[1])
    return {mode: (min(low for low, _ in all_), max(high for _, high in all_)) for mode, all_ in by_mode.items()}


def range_notes(ranges: Mapping[str, Range]) -> list[str]:
    """Notes on ranges other than all of 16 bits: one line for each mode."""
    return [
        f"{_NAMES[mode]} pictures: {low:g} is black and {high:g} is white, by the range of the training images"
        for mode, (low, high) in sorted(ranges.items())
        if mode == "F" or (low, high) != (0, 65535)
    ]


def _extremes(split: Split, row: int) -> tuple[str, Range] | None:
    try:
        with split.images.open(row) as file:
            head = file.read(_HEAD)
            if head.startswith(b"\xff\xd8") or (head.startswith(b"\x89PNG") and head[24:25] != b"\x10"):
                return None
            file.seek(0)
            mode = deep_mode(Image.open(file))
            if mode is None:
                return None
            file.seek(0)
            encoded = file.read()
        values = deep_values(encoded, Image.open(io.BytesIO(encoded)), mode)
    except Exception:  # reported when the images are decoded
        return None
    colours = without_alpha(values)
    finite = colours[np.isfinite(colours)]
    return (mode, (float(finite.min()), float(finite.max()))) if finite.size else None


def _usual_range(low: float, high: float, is_float: bool) -> Range:
    if low < 0:
        return (-1.0, 1.0) if is_float and low >= -1 and high <= 1 else (low, high)
    tops = _TOPS if is_float else [float(2**bits - 1) for bits in _BITS]
    return 0.0, next((top for top in tops if high <= top), high)
