"""Images of a data set as small pictures for a page."""

import base64
import io
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from samtune.data.splits import Indices, open_parts
from samtune.errors import DataError
from samtune.options import RunConfig

if TYPE_CHECKING:
    from samtune.data.decode import DecodeRule

_SIDE = 112  # pixels of the longer side, at most
_LOSSLESS = 64  # up to this side a picture stays as it is: blurred digits are no longer theirs


def thumbnails(config: RunConfig, split: str, rows: Indices, labels: Indices) -> list[str]:
    """The images of these rows of a run's "val" or "test" split, as data URIs.

    labels: those that the run saw, to know the data again. Raises DataError where they are no longer there, or others;
    and what `open_parts` raises.
    """
    parts = open_parts(config)
    chosen = parts.test if split == "test" else parts.val
    if chosen is None or (len(rows) and rows.max() >= len(chosen)) or (chosen.labels[rows] != labels).any():
        raise DataError(f"data set {config.dataset} is not what it was when the run read it")
    return [picture(chosen.image_bytes(row), chosen.where(row)) for row in rows.tolist()]


def picture(encoded: bytes, where: str, rule: "DecodeRule | None" = None) -> str:
    """An encoded image as a data URI. rule: how it is decoded, if not plainly. Raises DataError for what is none."""
    from samtune.data.decode import PLAIN, decode  # with torch, which takes long to load: a data set may be gone

    pixels = decode(encoded, lambda: where, rule or PLAIN).permute(1, 2, 0).numpy()
    image = Image.fromarray(np.ascontiguousarray(pixels))
    kind = "PNG" if max(image.size) <= _LOSSLESS else "JPEG"
    image.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, kind, **({"quality": 85} if kind == "JPEG" else {}))
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
