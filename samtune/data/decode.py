"""Encoded bytes -> uint8 RGB pixels, by one rule for training, evaluation and prediction."""

import io
import warnings
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import simplejpeg
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from samtune.errors import DataError, first_line

_ORIENTATION = 274  # the EXIF tag that says how to turn an image
_MOST_PIXELS = Image.MAX_IMAGE_PIXELS or 89_478_485
# Where Pillow would warn, `decode` refuses. (To turn its warning into an error for a while is not safe in threads.)
warnings.simplefilter("ignore", Image.DecompressionBombWarning)


def decode(encoded: bytes, where: Callable[[], str]) -> torch.Tensor:
    """Decode an image to a uint8 tensor (3, height, width), a view of pixels that lie as (height, width, 3).

    Upright as its EXIF tag says, the first frame where there are many; grey and palette images become RGB, 16 bits are
    scaled to 8, CMYK is converted, what is transparent is laid over white. where: tells the image's place, for the
    error. Raises DataError for bytes that are no image, or only the beginning of one, or more than 89 megapixels.
    """
    try:
        image: Image.Image = Image.open(io.BytesIO(encoded))
        if image.width * image.height > _MOST_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels: a decompression bomb?")
        pixels = _plain_jpeg(encoded, image)
        if pixels is None:
            if image.getexif().get(_ORIENTATION, 1) != 1:
                image = ImageOps.exif_transpose(image)
            pixels = np.array(_to_rgb(image))
    except UnidentifiedImageError:
        why = "it is no image" if encoded else "it is empty"
        raise DataError(f"{where()} cannot be decoded", why, "mend or remove the image") from None
    except Exception as error:  # each format of damaged bytes has its own: OSError, SyntaxError, struct.error, ...
        raise DataError(f"{where()} cannot be decoded", first_line(error), "mend or remove the image") from None
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _plain_jpeg(encoded: bytes, image: Image.Image) -> npt.NDArray[np.uint8] | None:
    """The common case, in half of the time and bit for bit as Pillow has it: both stand on libjpeg-turbo.

    None for anything else, and where the decoder complains: Pillow then says whether it is an image.
    """
    if image.format != "JPEG" or image.mode != "RGB" or image.getexif().get(_ORIENTATION, 1) != 1:
        return None
    try:
        pixels: npt.NDArray[np.uint8] = simplejpeg.decode_jpeg(encoded, "RGB")
    except ValueError:
        return None
    return pixels


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits of grey: Pillow would cut them off at 255
        grey = np.asarray(image, dtype=np.float64) / 257
        return Image.fromarray(np.rint(grey.clip(0, 255)).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image if image.mode == "RGB" else image.convert("RGB")
