"""Lists of pictures: .csv, .tsv and .jsonl files with a column of paths and one of labels. Opens no picture."""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from samtune.data import columns
from samtune.data.encoded import PathSplits
from samtune.data.image_paths import find_files
from samtune.data.labels import strip_blanks
from samtune.data.list_file import read_rows
from samtune.data.split_columns import split_of_rows
from samtune.data.split_roles import DataSelection
from samtune.errors import DataError


def read_list(path: Path, selection: DataSelection) -> PathSplits:
    """A list with a header (csv) or names of columns (jsonl): a picture's path, its label and perhaps its split.

    Columns are taken by the selection, else by their names; a column of names of splits is noticed whatever its name.
    Without one all is train. Labels that are numbers in every row are numbers, also where they are written as 1.0.
    Raises UsageError for a selected column that is missing, DataError for no such columns, a row that cannot be read,
    and paths that lead nowhere.
    """
    rows = read_rows(path)
    if not rows.lines:
        raise DataError(f"list {path} has no rows", hint="one picture a row: path,label or path,label,split")
    where = [f"line {line} of {path}" for line in rows.lines]
    used = columns.find(str(path), columns.Table.of_lists(rows.columns), selection)
    names = [name for name in (used.image, used.label, *used.splits, *used.one_hot) if name]
    rows.check_names(path, names)
    values, blanks = _without_blanks(rows.columns, names)
    notes = [*used.notes, *blanks]
    split_of: list[str | None] = ["train"] * len(where)
    if used.splits:
        split_of, more = split_of_rows(f"{path}", used.splits, values, where, selection)
        notes += more
    in_splits = [row for row, split in enumerate(split_of) if split is not None]
    where = [where[row] for row in in_splits]
    values = {name: [values[name][row] for row in in_splits] for name in names}

    labels = values[used.label] if used.label else None
    labels = labels or columns.one_hot_labels(columns.Table.of_lists(values), used.one_hot, where)
    labels = _numbers([_plain(label, line) for label, line in zip(labels, where, strict=True)])
    images = _image_names(values[used.image], used.image, where)
    groups: dict[str, list[int]] = {}
    for row, split in enumerate(split for split in split_of if split is not None):
        groups.setdefault(split, []).append(row)
    files, more = find_files(images, list(groups.values()), path.parent, selection, f"list {path}")
    splits = {split: ([files[i] for i in rows], [labels[i] for i in rows]) for split, rows in groups.items()}
    return PathSplits(splits, [*notes, *more], used)


def read_names(path: Path, selection: DataSelection) -> tuple[list[str], list[str]]:
    """The files of a list of pictures that need no label, and notes of `find_files`. Raises as `read_list` does."""
    rows = read_rows(path)
    column = columns.find_image(str(path), columns.Table.of_lists(rows.columns), selection)
    rows.check_names(path, [column])
    if not rows.lines:
        raise DataError(f"list {path} has no rows", hint="one picture a row, below a header such as path")
    values, _ = _without_blanks(rows.columns, [column])
    names = _image_names(values[column], column, [f"line {line} of {path}" for line in rows.lines])
    return find_files(names, [range(len(names))], path.parent, selection, f"list {path}")


def _image_names(cells: Sequence[Any], column: str, where: Sequence[str]) -> list[str]:
    """The paths or ids of pictures as text. Raises DataError for a row without one."""
    for line, cell in zip(where, cells, strict=True):
        if not isinstance(cell, str | int) or cell == "":
            raise DataError(f"{line} has no {column}", hint="fix or remove the line")
    return list(map(str, cells))


def _without_blanks(values: Mapping[str, list[Any]], names: Iterable[str]) -> tuple[dict[str, list[Any]], list[str]]:
    """Columns without the blanks around the values of these, and a note for each that changes."""
    stripped = dict(values)
    notes = []
    for name in names:
        stripped[name], more = strip_blanks(name, values[name])
        notes += more
    return stripped, notes


def _plain(label: Any, where: str) -> str | int | None:
    """A label as it is stored. Raises DataError for what is neither text nor a whole number: NaN, [0]."""
    if isinstance(label, float) and label.is_integer():
        label = int(label)
    if not (label is None or isinstance(label, str) or (isinstance(label, int) and abs(label) < 2**63)):
        several = isinstance(label, list | dict)
        raise DataError(
            f"{where} has the label {label!r}, which is no class",
            "several labels a picture are not supported" if several else "a label is text, or a whole number from 0 on",
            "fix or remove the line",
        )
    return label


def _numbers(labels: list[str | int | None]) -> list[str | int | None]:
    """Text labels as numbers where all of them are: 10 comes after 9 then, and -1 is no class.

    NaN among numbers is a label that is missing; among words it is a word.
    """
    texts = {label for label in labels if isinstance(label, str) and label}
    numbers = {text for text in texts if text.lower() != "nan"}
    if not all(re.fullmatch(r"-?(0|[1-9][0-9]{0,17})(\.0*)?", text) for text in numbers):
        return labels
    return [
        label if isinstance(label, int) else int(label.partition(".")[0]) if label in numbers else None
        for label in labels
    ]
