"""Settings of a run that differ for some data sets; flags and recipes take precedence."""

from collections.abc import Mapping
from typing import Any

DATASET_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "fashion_mnist": {"hflip": 0.0},  # shoes all point to the left
    "mnist5k": {"hflip": 0.0, "scale": 0.7},
    "svhn": {"hflip": 0.0, "scale": 0.7},
    "svhn_extra": {"hflip": 0.0, "scale": 0.7},
}
