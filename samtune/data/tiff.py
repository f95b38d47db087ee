"""TIFF: what Pillow would read wrongly or not at all, and how it is read rightly, as far as it can be.

Decided by the tags alone: channels, their bits and kind of number, how they are interleaved, and the order of bytes.
"""

import io
from collections.abc import Mapping
from typing import Any

from PIL import Image, TiffImagePlugin

_HEADS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_WIDTH, _BITS, _PHOTOMETRIC, _SAMPLES, _PLANES, _EXTRA, _FORMAT = 256, 258, 262, 277, 284, 338, 339  # tags
_MIN_IS_WHITE, _COLOUR = 0, (2, 5)  # photometric interpretations; RGB and CMYK
_UNSIGNED, _SIGNED, _FLOAT = 1, 2, 3  # formats of samples
_NUMBERS = {_UNSIGNED: "unsigned integers", _SIGNED: "signed integers", _FLOAT: "floating-point numbers"}
# libtiff hands numbers over in the order of this machine, and Pillow takes them in that of the file.
_OWN_ORDER = {"I;16BS": "I;16NS", "I;32BS": "I;32NS", "F;32BF": "F;32NF"}


class Unreadable(ValueError):
    """A TIFF whose pixels would be wrong: what it is, and a command that converts it."""


def prepare(image: Image.Image) -> None:
    """Before a TIFF that Pillow has opened is loaded: see to the order of bytes. Raises Unreadable.

    Of channels in separate planes, Pillow reads those of colour of 8 bits, with plain alpha at most; signed numbers of
    8 bits it takes for unsigned ones.
    """
    if not isinstance(image, TiffImagePlugin.TiffImageFile):
        return
    tags = image.tag_v2
    bits, samples = _numbers(tags, _BITS, 1), _number(tags, _SAMPLES, 1)
    in_planes = samples > 1 and _number(tags, _PLANES, 1) == 2
    extra = tags.get(_EXTRA, ())  # channels besides colour: left out, or one of plain alpha, else the image is unusual
    has_usual_channels = _number(tags, _PHOTOMETRIC, 0) in _COLOUR and (not any(extra) or extra == (2,))
    is_usual = max(bits) <= 8 and has_usual_channels
    if (in_planes and not is_usual) or (max(bits) == 8 and _number(tags, _FORMAT, _UNSIGNED) == _SIGNED):
        raise Unreadable(_describe(tags))
    if samples == 1 and _number(tags, _PLANES, 1) == 2 and image.tile:
        tags[_PLANES] = 1  # which is the same for one channel; Pillow takes it for one of several
        image._setup()
    image.tile = [
        tile._replace(args=(_OWN_ORDER.get(tile.args[0], tile.args[0]), *tile.args[1:]))
        if tile.codec_name == "libtiff" and isinstance(tile.args, tuple)
        else tile
        for tile in image.tile
    ]


def unopened(encoded: bytes) -> Unreadable | None:
    """What a TIFF is that Pillow does not open; None for what is no TIFF, or a damaged one."""
    if not encoded.startswith(_HEADS):
        return None
    try:
        head = encoded[: 16 if encoded[2:4] in (b"+\0", b"\0+") else 8]
        tags, file = TiffImagePlugin.ImageFileDirectory_v2(head), io.BytesIO(encoded)
        file.seek(tags.next)
        tags.load(file)
        return Unreadable(_describe(tags)) if _WIDTH in tags else None
    except Exception:  # each kind of damage has its own
        return None


def low_is_white(image: Image.Image) -> bool:
    """Whether the lowest values of a deep picture are white, which Pillow does not heed."""
    return _number(getattr(image, "tag_v2", {}), _PHOTOMETRIC, 1) == _MIN_IS_WHITE


def is_unsigned(image: Image.Image) -> bool:
    """Whether its integers of 32 bits have no sign: Pillow takes them for signed ones."""
    tags: Mapping[int, Any] = getattr(image, "tag_v2", {})
    return _numbers(tags, _BITS, 0) == (32,) and _number(tags, _FORMAT, _UNSIGNED) == _UNSIGNED


def _numbers(tags: Mapping[int, Any], tag: int, default: int) -> tuple[int, ...]:
    value = tags.get(tag)
    values = value if isinstance(value, tuple) else (value,)
    return values if values and values[0] is not None else (default,)


def _number(tags: Mapping[int, Any], tag: int, default: int) -> int:
    return _numbers(tags, tag, default)[0]


def _describe(tags: Mapping[int, Any]) -> str:
    samples, bits = _number(tags, _SAMPLES, 1), _numbers(tags, _BITS, 1)
    text = f"it is a TIFF of {samples} channel{'s' * (samples > 1)} of {'/'.join(map(str, dict.fromkeys(bits)))} bits"
    kind = _NUMBERS.get(_number(tags, _FORMAT, _UNSIGNED), "numbers of an unknown kind")
    planes = " in separate planes" if samples > 1 and _number(tags, _PLANES, 1) == 2 else ""
    order = ", most significant byte first" if max(bits) > 8 and getattr(tags, "prefix", b"") == b"MM" else ""
    return f"{text} ({kind}{order}){planes}, which cannot be read; this converts it: {_conversion(tags)}"


def _conversion(tags: Mapping[int, Any]) -> str:
    """The command after which it can be read, with its values as they are, or scaled to 16 bits for colour."""
    samples, bits, kind = _number(tags, _SAMPLES, 1), max(_numbers(tags, _BITS, 1)), _number(tags, _FORMAT, _UNSIGNED)
    if samples == 1 and _number(tags, _PHOTOMETRIC, 1) == _MIN_IS_WHITE:
        return "magick IN.tif -depth 16 OUT.png"
    bands = "" if samples in (1, 3) else "-b 1 " if samples == 2 else "-b 1 -b 2 -b 3 "
    if kind == _UNSIGNED and bits <= 16:
        type_ = "UInt16" if bits > 8 else "Byte"
    elif samples >= 3:
        type_ = "UInt16 -scale MIN MAX 0 65535"
    else:
        type_ = "Float32" if kind != _SIGNED or bits > 32 else "Int32"
    return f"gdal_translate {bands}-ot {type_} -co INTERLEAVE=PIXEL IN.tif OUT.tif"
