"""Arrow tables -> raw splits: their columns of images, labels and splits."""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from samtune.data import columns
from samtune.data.encoded import EncodedImages, FileImages, RawSplits, TableImages
from samtune.data.image_paths import find_files
from samtune.data.labels import Labels, strip_blanks
from samtune.data.split_columns import split_of_rows
from samtune.data.split_roles import DataSelection, role_of
from samtune.data.tables import image_column
from samtune.errors import DataError

if TYPE_CHECKING:
    from samtune.data.tables import ArrowTable, Tables

_LIST_TYPES = ("List", "LargeList", "Sequence")


def raw_splits(
    dataset: str, tables: "Tables", folder: Path, selection: DataSelection, train: Sequence[str]
) -> tuple[RawSplits, list[str]]:
    """Images and labels of each table, and notes; a table that stands alone and has a column of splits is divided.

    folder: where relative paths are seen from. train: what a train split may be called; its columns are used first,
    and a table without its column of labels has hidden ones. Raises DataError or UsageError.
    """
    splits: RawSplits = {}
    notes: list[str] = []
    label = ""
    for name in sorted(tables, key=lambda name: name not in train and role_of(name) != "train"):
        table = tables[name]
        hidden = bool(label) and label not in table.features
        used = _find_columns(dataset, table, selection, hidden)
        label = label or used.label
        images, more = _images(dataset, table, used.image, folder, selection)
        labels, blanks = (Labels(None, ()), []) if hidden else _labels(dataset, table, used)
        notes += [note for note in (*used.notes, *blanks, *more) if note not in notes]
        if used.splits and len(tables) == 1 and not hidden:
            where = [f"row {row}" for row in range(len(table))]
            split_of, more = split_of_rows(dataset, used.splits, _Values(table), where, selection)
            return _divide(split_of, images, labels), [*notes, *more]
        splits[name] = images, labels
    return splits, notes


def _find_columns(dataset: str, table: "ArrowTable", selection: DataSelection, hidden: bool) -> columns.Columns:
    view = columns.Table(_Values(table), {name: _kind(feature) for name, feature in table.features.items()})
    if hidden:
        selection = DataSelection(image_key=selection.image_key)
    used = columns.find(dataset, view, selection, needs_label=not hidden)
    if not hidden and used.label and view.kinds[used.label] == "list":
        raise DataError(
            f"column {used.label} of data set {dataset} holds lists of labels",
            "several labels a picture are not supported",
            "name a column with one label by --label-key",
        )
    return used


class _Values(Mapping[str, Sequence[Any]]):
    """The columns of a table as lists, each read when it is asked for; positions of declared classes as names."""

    def __init__(self, table: "ArrowTable") -> None:
        self._table = table

    def __getitem__(self, name: str) -> Sequence[Any]:
        values = _column(self._table, name)
        names = getattr(self._table.features[name], "names", None)
        return values if names is None else [None if v is None or not 0 <= v < len(names) else names[v] for v in values]

    def __iter__(self) -> Iterator[str]:
        return iter(self._table.features)

    def __len__(self) -> int:
        return len(self._table.features)


def _column(table: "ArrowTable", name: str) -> list[Any]:
    values: list[Any] = table.select_columns([name]).with_format("arrow")[:][name].to_pylist()
    return values


def _kind(feature: Any) -> columns.Kind:
    name, dtype = type(feature).__name__, str(getattr(feature, "dtype", ""))
    if name == "Image" or "binary" in dtype or (isinstance(feature, dict) and "bytes" in feature):
        return "images"
    if name == "ClassLabel":
        return "classes"
    if name in _LIST_TYPES or isinstance(feature, list):
        return "list"
    return "text" if "string" in dtype else "number" if re.match("u?int|float|bool|double", dtype) else "other"


def _images(
    dataset: str, table: "ArrowTable", column: str, folder: Path, selection: DataSelection
) -> tuple[EncodedImages, list[str]]:
    """A column of encoded images; where it holds paths only, their files. Raises DataError if it holds none."""
    if _kind(table.features[column]) in ("text", "number"):
        names = [str(value) for value in _column(table, column)]
    else:
        images = image_column(table, column, folder)
        if len(images) == 0 or images.table_bytes > 0:
            return images, []
        names = [cell["path"] or "" for cell in _column(images.table, column)]
    paths, notes = find_files(names, [range(len(names))], folder, selection, f"data set {dataset}")
    return FileImages(paths), notes


def _labels(dataset: str, table: "ArrowTable", used: columns.Columns) -> tuple[Labels, list[str]]:
    feature: Any = None if used.one_hot else table.features[used.label]
    if used.one_hot:
        where = [f"row {row} of data set {dataset}" for row in range(len(table))]
        values: list[Any] = list(columns.one_hot_labels(columns.Table.of_lists(_Values(table)), used.one_hot, where))
    else:  # one missing label makes floating-point numbers of the others, where a table was written with pandas
        values = [int(v) if isinstance(v, float) and v.is_integer() else v for v in _column(table, used.label)]
    if hasattr(feature, "names"):
        return Labels(tuple(feature.names), values), []
    values, notes = strip_blanks(used.label, values)
    return Labels(None, values), notes


def _divide(split_of: Sequence[str | None], images: EncodedImages, labels: Labels) -> RawSplits:
    """One table by the split of each row; rows of None are in none."""
    splits: RawSplits = {}
    for split in dict.fromkeys(split for split in split_of if split is not None):
        rows = np.array([row for row, other in enumerate(split_of) if other == split])
        if isinstance(images, TableImages):
            chosen: EncodedImages = TableImages(images.table, images.column, images.folder, rows)
        else:
            chosen = FileImages([images.path(row) for row in rows.tolist()])
        splits[split] = chosen, Labels(labels.names, [labels.values[row] for row in rows.tolist()])
    return splits
