"""A model that takes pictures as they are decoded: the evaluation transform in tensor operations that can be exported.

`data.transforms.EvalTransform` is a Python function of a picture's size. Here the size is a tensor, so that one graph
serves pictures of any size. Resize and crop together are a matrix for each axis, of the part that the crop keeps.

torch resizes uint8 in integers: weights are rounded to 16 bits, and pixels to 8 after each axis. The same is done here
in double precision, in which all these integers are exact, so that the pixels are the same.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from samtune.data.transforms import LONGEST
from samtune.errors import ModelError

_PRECISIONS = 22  # of weights, in bits after the point: torch takes the best one by which they fit into 16 bits
# interpolation -> (half the width of the filter in pixels, its values), as in torch's antialiased resize
_FILTERS: Mapping[str, tuple[float, Callable[[torch.Tensor], torch.Tensor]]] = {
    "bilinear": (1.0, lambda x: (1 - x).clamp(min=0)),
    "bicubic": (2.0, lambda x: _cubic(x)),
}


class WithPreprocessing(nn.Module):
    """(height, width, 3) uint8 -> probabilities (classes,), logits (classes,), pixels (3, size, size) in 0, 1, ... 255.

    pixels: what the model saw before normalisation. temperature: divides the logits before the softmax.
    """

    mean: torch.Tensor  # (3, 1, 1), of values from 0 to 255, as is std
    std: torch.Tensor

    def __init__(self, model: nn.Module, data_config: Mapping[str, Any], temperature: float = 1.0) -> None:
        """Raises ModelError for a model whose transform is not one of these: centre crop or squash, of a square."""
        super().__init__()
        _, height, width = data_config["input_size"]
        interpolation, crop_mode = data_config["interpolation"], data_config["crop_mode"]
        if height != width or interpolation not in _FILTERS or crop_mode not in ("center", "squash"):
            raise ModelError(
                f"no preprocessing for {height} x {width} px, {interpolation}, crop mode {crop_mode}",
                f"known are squares, {' and '.join(_FILTERS)}, center and squash",
                "leave --with-preprocessing out",
            )
        self.model, self.temperature, self.crop_mode = model, temperature, crop_mode
        self.size, self.resized = int(height), int(height / data_config["crop_pct"])
        self.support, self.filter = _FILTERS[interpolation]
        for name in ("mean", "std"):
            values = torch.tensor(data_config[name]) * 255
            self.register_buffer(name, values.view(3, 1, 1), persistent=False)

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """A picture, RGB and upright, of any size."""
        pixels = self._resize(image)
        logits = self.model(((pixels - self.mean) / self.std)[None])[0]
        return (logits / self.temperature).softmax(0), logits, pixels

    def _resize(self, image: torch.Tensor) -> torch.Tensor:
        height, width = (torch.arange(n)[-1] + 1 for n in image.shape[:2])
        if self.crop_mode == "squash":
            rows = self._matrix(image.shape[0], height, torch.tensor(self.resized))
            columns = self._matrix(image.shape[1], width, torch.tensor(self.resized))
        else:  # the shorter side becomes `resized`; of a very long picture the ends are left out
            short = torch.minimum(height, width)
            kept_height, kept_width = (torch.minimum(side, LONGEST * short) for side in (height, width))
            rows = self._matrix(image.shape[0], kept_height, _floor(self.resized * kept_height, short))
            columns = self._matrix(image.shape[1], kept_width, _floor(self.resized * kept_width, short))
        # First along the rows of pixels, then across, as torch does.
        along = _rounded(image.permute(2, 0, 1).double() @ columns.T)
        return _rounded(rows @ along).float()

    def _matrix(self, length: int, kept: torch.Tensor, resized: torch.Tensor) -> torch.Tensor:
        """What each pixel of the cropped side takes of each of the `length` pixels of the picture: (size, length).

        kept: pixels in the middle that are resized at all. resized: how many they become, of which `size` are kept.
        """
        source = torch.arange(length) - _floor(torch.arange(length)[-1] + 1 - kept, torch.tensor(2))
        target = torch.arange(self.size) + _first_of_crop(resized, self.size)
        weights = self._weights(source, target, kept, resized)
        # The precision follows from the largest weight of all. It is at the edge, where fewer pixels share the sum.
        largest = torch.maximum(weights.max(), self._weights(source, torch.zeros_like(target), kept, resized).max())
        factors = torch.tensor([2.0**bits for bits in range(1, _PRECISIONS + 1)], dtype=torch.float64)
        fitting = (largest * factors + 0.5).floor() < 2**15
        factor = torch.where(fitting, factors, torch.ones(())).max()
        scaled = weights * factor
        return torch.where(scaled < 0, (scaled - 0.5).ceil(), (scaled + 0.5).floor()) / factor

    def _weights(
        self, source: torch.Tensor, target: torch.Tensor, kept: torch.Tensor, resized: torch.Tensor
    ) -> torch.Tensor:
        """The filter's values, of sum 1: (target, source), double. Outside of the resized picture they are 0."""
        scale = kept.double() / resized.double()
        wide = scale.clamp(min=1.0)
        center = scale * (target.double() + 0.5)
        support = self.support * wide
        first = (center - support + 0.5).long().clamp(min=0)
        end = torch.minimum((center + support + 0.5).long(), kept)
        weights = self.filter(((source.double() - center[:, None] + 0.5) * (1 / wide)).abs())
        inside = (source >= first[:, None]) & (source < end[:, None])
        # A crop larger than the resized picture is black around it.
        inside &= ((target >= 0) & (target < resized))[:, None]
        weights = torch.where(inside, weights, torch.zeros((), dtype=torch.float64))
        total = weights.cumsum(1)[:, -1:]  # one after the other, as torch adds them up
        return torch.where(total > 0, weights / total, weights)


def _rounded(values: torch.Tensor) -> torch.Tensor:
    """To 0, 1, ... 255; halves up, as torch does by adding half before it cuts bits off."""
    return (values + 0.5).floor().clamp(0, 255)


def _floor(value: torch.Tensor, divisor: torch.Tensor) -> torch.Tensor:
    return torch.div(value, divisor, rounding_mode="floor")


def _first_of_crop(resized: torch.Tensor, size: int) -> torch.Tensor:
    """Where torchvision's central crop begins: halves are rounded to even; what is missing is added on both sides."""
    two = torch.tensor(2)
    half = _floor(resized - size, two)
    begin = half + torch.remainder(resized - size, 2) * torch.remainder(half, 2)
    return torch.where(resized < size, -_floor(size - resized, two), begin)


def _cubic(x: torch.Tensor) -> torch.Tensor:
    """Keys' filter with a = -0.5. (...) >= 0."""
    a = -0.5
    inner = ((a + 2) * x - (a + 3)) * x * x + 1
    outer = (((x - 5) * x + 8) * x - 4) * a
    return torch.where(x < 1, inner, torch.where(x < 2, outer, torch.zeros((), dtype=torch.float64)))
