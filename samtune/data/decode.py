"""Encoded bytes -> uint8 RGB pixels, by one rule for training and evaluation."""

import io
import warnings
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torchvision.transforms.v2.functional import pil_to_tensor

from samtune.errors import DataError, first_line


def decode(encoded: bytes, where: Callable[[], str]) -> torch.Tensor:
    """Decode an image to a uint8 tensor (3, height, width), turned upright as its EXIF tag says.

    Grey and palette images become RGB; of 16 bits the upper 8 are kept; what is transparent is laid over white; of an
    animation the first frame is taken. where: tells the image's place, for the error. Raises DataError for bytes that
    are no image, or only the beginning of one.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image: Image.Image = Image.open(io.BytesIO(encoded))
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):  # Pillow would clip 16 bits at 255: a white image
                image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
            if image.has_transparency_data:
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
            pixels: torch.Tensor = pil_to_tensor(image.convert("RGB"))
    except UnidentifiedImageError:
        why = "it is no image" if encoded else "it is empty"
        raise DataError(f"{where()} cannot be decoded", why, "mend or remove the image") from None
    except Exception as error:  # each format of damaged bytes has its own: OSError, SyntaxError, struct.error, ...
        raise DataError(f"{where()} cannot be decoded", first_line(error), "mend or remove the image") from None
    return pixels
