"""Image operations for training and evaluation, from torchvision and timm. Both take and give uint8 tensors.

Normalisation is not here: it runs on the device, on the whole batch (`normalize`).
"""

from collections.abc import Callable, Mapping
from typing import Any

import timm.data
import torch
from torchvision.transforms import InterpolationMode, v2

Transform = Callable[[torch.Tensor], torch.Tensor]


def train_transform(data_config: Mapping[str, Any], scale: float, hflip: float) -> Transform:
    """Random resized crop, area in [scale, 1] of the image, then a flip with chance hflip.

    (3, h, w) uint8 -> (3, size, size) uint8. Draws from torch's global CPU generator.
    """
    transform: Transform = v2.Compose(
        [
            v2.RandomResizedCrop(
                data_config["input_size"][1:],
                scale=(scale, 1.0),
                interpolation=InterpolationMode(data_config["interpolation"]),
                antialias=True,
            ),
            v2.RandomHorizontalFlip(hflip),
        ]
    )
    return transform


def eval_transform(data_config: Mapping[str, Any]) -> Transform:
    """Resize and crop as the pretrained weights were evaluated: timm's own transform, crop share and mode included.

    (3, h, w) uint8 -> (3, size, size) uint8.
    """
    transform: Transform = timm.data.create_transform(
        input_size=data_config["input_size"],
        interpolation=data_config["interpolation"],
        crop_pct=data_config["crop_pct"],
        crop_mode=data_config["crop_mode"],
        is_training=False,
        normalize=False,
    )
    return transform


def normalize(images: torch.Tensor, data_config: Mapping[str, Any]) -> torch.Tensor:
    """(batch, 3, h, w) uint8 -> float32 with the weights' own mean and standard deviation (stated for [0, 1])."""
    mean = torch.tensor(data_config["mean"], device=images.device).view(1, 3, 1, 1) * 255
    std = torch.tensor(data_config["std"], device=images.device).view(1, 3, 1, 1) * 255
    return (images.float() - mean) / std
