"""Images of a data set as small pictures for a page."""

import base64
import io

import numpy as np
from PIL import Image

from samtune.config.run_config import RunConfig
from samtune.data.decode import PLAIN, DecodeRule, decode_pixels
from samtune.data.source import Split
from samtune.data.splits import Indices, open_run_splits
from samtune.errors import DataError

_SIDE = 112  # pixels of the longer side, at most
_LOSSLESS = 64  # up to this side a picture stays as it is: blurred digits are no longer theirs


def open_splits(config: RunConfig) -> dict[str, Split | None]:
    """What a run chose on and what it scored, "val" and "test". Raises what `open_parts` raises."""
    parts = open_run_splits(config)
    return {"val": parts.val, "test": parts.test}


def thumbnails(split: Split | None, rows: Indices, labels: Indices) -> list[str]:
    """The images of these rows of a split, as data URIs.

    labels: those that the run saw, to know the data again. Raises DataError where they are no longer there, or others.
    """
    if split is None or (len(rows) and rows.max() >= len(split)) or (split.labels[rows] != labels).any():
        raise DataError("the data set is not what it was when the run read it")
    return [picture(split.image_bytes(row), split.where(row)) for row in rows.tolist()]


def picture(encoded: bytes, where: str, rule: DecodeRule = PLAIN) -> str:
    """An encoded image as a data URI. rule: how it is decoded, if not plainly. Raises DataError for what is none."""
    image = Image.fromarray(np.ascontiguousarray(decode_pixels(encoded, lambda: where, rule)))
    kind = "PNG" if max(image.size) <= _LOSSLESS else "JPEG"
    image.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, kind, **({"quality": 85} if kind == "JPEG" else {}))
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
