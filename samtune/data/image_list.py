"""Lists of pictures: .csv, .tsv and .jsonl files with a column of paths and one of labels. Opens no picture."""

import codecs
import csv
import io
import json
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from samtune.data import columns
from samtune.data.columns import Columns, Table
from samtune.data.formats import is_readable
from samtune.data.split_columns import split_of_rows
from samtune.data.split_roles import DataSelection
from samtune.errors import DataError
from samtune.files import readable
from samtune.text import similar_names

LISTS = (".csv", ".tsv", ".jsonl", ".ndjson")
_DELIMITERS = (",", ";", "\t", "|")
_LIKE = 10_000  # names of files that are compared with one that is missing


@dataclass(frozen=True)
class ListSplits:
    """What a list holds: split -> paths and labels, row by row; notes for the user; where it was found."""

    splits: dict[str, tuple[list[str], list[Any]]]
    notes: list[str]
    columns: Columns


def read_list(path: Path, wanted: DataSelection) -> ListSplits:
    """A list with a header (csv) or names of columns (jsonl): a picture's path, its label and perhaps its split.

    Columns go by wanted, else by their names; a column of names of splits is noticed whatever its name. Without one all
    is train. Labels that are numbers in every row are numbers, also where they are written as 1.0.

    Raises:
        UsageError: a wanted column is not there.
        DataError: no such columns, a row that cannot be read, or paths that lead nowhere.
    """
    read = read_table(path)
    if not read.lines:
        raise DataError(f"list {path} has no rows", hint="one picture a row: path,label or path,label,split")
    where = [f"line {line} of {path}" for line in read.lines]
    found = columns.find(str(path), Table.of_lists(read.values), wanted)
    used = (found.image, found.label, *found.splits, *found.one_hot)
    read.check_names(path, used)
    values, notes = _without_blanks(read.values, used)
    notes = [*found.notes, *notes]
    of_row: list[str | None] = ["train"] * len(where)
    if found.splits:
        of_row, more = split_of_rows(f"{path}", found.splits, values, where, wanted)
        notes += more
    rows = [row for row, split in enumerate(of_row) if split is not None]
    where = [where[row] for row in rows]
    values = {name: [values[name][row] for row in rows] for name in used if name}
    of_used = [split for split in of_row if split is not None]

    labels = values[found.label] if found.label else None
    labels = labels or columns.one_hot_labels(Table.of_lists(values), found.one_hot, where)
    labels = _numbers([_plain(label, place) for label, place in zip(labels, where, strict=True)])
    for place, image in zip(where, values[found.image], strict=True):
        if not isinstance(image, str | int) or image == "":
            raise DataError(f"{place} has no {found.image}", hint="fix or remove the line")
    groups: dict[str, list[int]] = {}
    for row, split in enumerate(of_used):
        groups.setdefault(split, []).append(row)
    paths, more = find_files(
        list(map(str, values[found.image])), list(groups.values()), path.parent, wanted, f"list {path}"
    )
    splits: dict[str, tuple[list[str], list[Any]]] = {}
    for split, file, label in zip(of_used, paths, labels, strict=True):
        files, of_split = splits.setdefault(split, ([], []))
        files.append(file)
        of_split.append(label)
    return ListSplits(splits, [*notes, *more], found)


def find_columns(path: Path, wanted: DataSelection) -> Columns:
    """The columns of pictures, labels and splits of a list. Raises as `read_list` does."""
    return columns.find(str(path), Table.of_lists(read_table(path).values), wanted)


def names_of_columns(path: Path) -> list[str]:
    """What the columns of a list are called. Raises DataError where it cannot be read."""
    return list(read_table(path).values)


def read_names(path: Path, wanted: DataSelection) -> tuple[list[str], list[str]]:
    """The files of a list of pictures that need no label, and notes: `find_files` looks for them.

    Raises:
        UsageError: a wanted column is not there.
        DataError: no column of paths, a row without one, or paths that lead nowhere.
    """
    read = read_table(path)
    column = columns.find_image(str(path), Table.of_lists(read.values), wanted)
    read.check_names(path, [column])
    if not read.lines:
        raise DataError(f"list {path} has no rows", hint="one picture a row, below a header such as path")
    values, _ = _without_blanks(read.values, [column])
    for line, image in zip(read.lines, values[column], strict=True):
        if not isinstance(image, str | int) or image == "":
            raise DataError(f"line {line} of {path} has no {column}", hint="fix or remove the line")
    names = list(map(str, values[column]))
    return find_files(names, [range(len(names))], path.parent, wanted, f"list {path}")


# --------------------------------------------------------------------------------------------------------------- files


def find_files(
    names: Sequence[str], groups: Sequence[Sequence[int]], folder: Path, wanted: DataSelection, dataset: str
) -> tuple[list[str], list[str]]:
    """The files of pictures that a list or table names, and notes.

    Relative paths are seen from wanted.image_root, else from `folder`. groups: the rows of each split. Where some of a
    group have a file there, the others are missing; where none has, the ends of the paths are looked for among all
    pictures below, with or without their endings: /their/disk/cat/1.jpg is cat/1.jpg. Backslashes and both Unicode
    forms of a name are understood. Raises DataError for a group that is not found, by its first row or by most of
    them, and for a name that several files have.
    """
    root = root_of(wanted, folder)
    paths = [file_of(root, name, wanted) for name in names]
    elsewhere = [rows for rows in groups if rows and not any(os.path.isfile(paths[i]) for i in rows)]
    if not elsewhere:
        return paths, []
    missing = elsewhere[0][0]
    suffix = _suffix(wanted)
    files = _pictures_by_end(root)
    found = _by_ends([readable(name.replace("\\", "/") + suffix) for name in names], elsewhere, root, files)
    if found is None:
        near = _nearest(readable(names[missing].replace("\\", "/") + suffix), files)
        raise DataError(
            f"picture {readable(paths[missing])} of {dataset} is not there",
            f"nor is there another picture of that name below {readable(str(root))}"
            + (f"; the nearest is {readable(os.path.relpath(near, root))}" if near else ""),
            "--image-root FOLDER names a folder that holds the pictures, --image-suffix .jpg what their names lack",
        )
    several = next((i for i, files in enumerate(found) if len(files) > 1), None)
    if several is not None:
        raise DataError(
            f"picture {names[several]} of {dataset} may be any of {len(found[several])} files",
            ", ".join(map(readable, found[several][:3])),
            "--image-root FOLDER tells in which folder they lie",
        )
    shown = next((i for rows in elsewhere for i in rows if found[i]), missing)
    note = f"pictures are found by their names: {readable(names[shown])} is {readable(found[shown][0])}"
    return [files[0] if files else path for files, path in zip(found, paths, strict=True)], [note]


def _by_ends(
    names: Sequence[str], groups: Sequence[Sequence[int]], root: Path, files: Mapping[str, list[str]]
) -> list[list[str]] | None:
    """The files below a folder whose paths end as the names do; None where the first and most of a group have none.

    As few leading folders as possible are left out, and as many of each name, none in which names differ: then a file
    that is missing stays so. Else the longest end that is there counts, if each name has a file of its own.
    """
    parts = [tuple(part for part in name.split("/") if part not in ("", ".", "..")) for name in names]

    def ending_in(end: Sequence[str]) -> list[str]:
        there = files.get(_small_ending("/".join(end)), [])
        if len(there) < 2:
            return there
        whole = [file for file in there if os.path.relpath(file, root).count(os.sep) + 1 == len(end)]  # not below
        return whole if len(whole) == 1 else there

    levels = zip(*(folders for *folders, _ in parts), strict=False)
    in_common = sum(1 for _ in takewhile(lambda level: len(set(level)) == 1, levels))
    for left_out in range(in_common + 1):
        found = [ending_in(name[left_out:]) for name in parts]
        if all(found[rows[0]] or 2 * sum(bool(found[i]) for i in rows) > len(rows) for rows in groups):
            return found
    ends = [[there for start in range(len(name)) if (there := ending_in(name[start:]))][:1] for name in parts]
    if all(ends):
        found = [there for (there,) in ends]
        chosen = [there[0] for there in found if len(there) == 1]
        if len(chosen) < len(found) or len(set(chosen)) == len(set(parts)):
            return found
    return None


def root_of(wanted: DataSelection, folder: Path) -> Path:
    """Where relative paths are seen from: wanted.image_root, else `folder`. Raises DataError where it is no folder."""
    if wanted.image_root is None:
        return folder
    root = next((place for place in (Path(wanted.image_root), folder / wanted.image_root) if place.is_dir()), None)
    if root is None:
        raise DataError(f"--image-root {wanted.image_root} is no folder", f"seen from {Path.cwd()} and {folder}")
    return root


def _suffix(wanted: DataSelection) -> str:
    """What names lack: "jpg" means ".jpg", and "_left.jpg" what it says."""
    suffix = wanted.image_suffix
    return f".{suffix}" if suffix.isalnum() and is_readable(f"a.{suffix}") else suffix


def file_of(root: Path, name: str, wanted: DataSelection) -> str:
    """The path of a name, with wanted.image_suffix, in the form in which it is there, if it is."""
    name += _suffix(wanted)
    path = os.path.join(root, name)
    if name.isascii() and "\\" not in name:
        return path
    forms: tuple[Callable[[str], str], ...] = (
        lambda text: text,
        lambda text: text.replace("\\", "/"),
        lambda text: unicodedata.normalize("NFC", text.replace("\\", "/")),
        lambda text: unicodedata.normalize("NFD", text.replace("\\", "/")),
    )
    there = (candidate for form in forms if os.path.isfile(candidate := os.path.join(root, form(name))))
    return next(there, path)


def _pictures_by_end(root: Path) -> dict[str, list[str]]:
    """Every picture below a folder by each end of its path (c.png, b/c.png, a/b/c.png), with and without its ending."""
    found: dict[str, list[str]] = {}
    for place, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        above = readable(os.path.relpath(place, root)).split("/") if place != str(root) else []
        for name in sorted(files):
            if is_readable(name) and not name.startswith("."):
                path = os.path.join(place, name)
                for form in dict.fromkeys((readable(name), os.path.splitext(readable(name))[0])):
                    for start in range(len(above) + 1):
                        found.setdefault(_small_ending("/".join([*above[start:], form])), []).append(path)
    return found


def _small_ending(name: str) -> str:
    """a.JPG is a.jpg; no other part of a name is changed."""
    stem, ending = os.path.splitext(name)
    return stem + ending.lower() if is_readable(name) else name


def _nearest(name: str, files: Mapping[str, list[str]]) -> str | None:
    """A picture whose name is like another: in other case, with other zeros in front (1 and 001.png), or misspelt."""

    def plain(text: str) -> str:
        return re.sub("0+(?=[0-9])", "", os.path.splitext(os.path.basename(text))[0].casefold())

    there = {plain(file): file for found in reversed(list(files.values())) for file in found}
    near = [plain(name)] if plain(name) in there else similar_names(plain(name), list(there)[:_LIKE])
    return there[near[0]] if near else None


# -------------------------------------------------------------------------------------------------------------- formats


@dataclass(frozen=True)
class Rows:
    """Columns by name, and the line of each row. repeated: names that several columns have."""

    values: dict[str, list[Any]]
    lines: list[int]
    repeated: Collection[str] = ()

    def check_names(self, path: Path, used: Iterable[str]) -> None:
        """Raise DataError where it is not clear which column is meant."""
        for name in used:
            if name in self.repeated:
                raise DataError(
                    f"list {path} has several columns {name}",
                    "one of them would be used",
                    "rename or remove the others",
                )


def read_table(path: Path) -> Rows:
    """The rows of a list. Raises DataError where it cannot be read."""
    return _read_csv(path) if path.suffix.lower() in (".csv", ".tsv") else _read_jsonl(path)


def _without_blanks(values: Mapping[str, list[Any]], used: Iterable[str]) -> tuple[dict[str, list[Any]], list[str]]:
    """Columns without the blanks around their values, and a note on each where that changes some."""
    found = dict(values)
    notes = []
    for name in filter(None, used):
        found[name] = [value.strip() if isinstance(value, str) else value for value in values[name]]
        changed = [value for value in values[name] if isinstance(value, str) and value != value.strip()]
        if changed:
            rows = f"{len(changed)} row{'s' if len(changed) > 1 else ''}"
            notes.append(f"column {name}: blanks around the values of {rows} are left out, as {readable(changed[0])!r}")
    return found, notes


def _read_csv(path: Path) -> Rows:
    """A table with a header. Bytes that are not UTF-8 stay as they are: they may be a path's.

    A first line `sep=;` tells the delimiter, as for Excel. Rows without a value are none.
    """
    text = _text(path)
    told = re.match(r'[\r\n]*"?sep=([^\r\n])"?[,;\t|]*(?=[\r\n])', text, re.IGNORECASE)
    text = text[: told.start()] + text[told.end() :] if told else text  # its end stays, for the numbers of lines
    header = text.lstrip("\r\n").partition("\n")[0]
    delimiter = max(_DELIMITERS, key=header.count) if path.suffix.lower() == ".csv" else "\t"
    delimiter = told[1] if told else delimiter
    lines = []
    try:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True)
        names = [name.strip() for name in next((row for row in reader if any(map(str.strip, row))), [])]
        values: dict[str, list[Any]] = {name: [] for name in names if name}
        for row in reader:
            if not any(map(str.strip, row)):
                continue
            if any(row[len(names) :]):
                raise DataError(
                    f"line {reader.line_num} of {path} has more values than the header",
                    hint=f"quote values that hold {delimiter!r}",
                )
            lines.append(reader.line_num)
            cells = dict(zip(names, row, strict=False))
            for name, column in values.items():
                column.append(cells.get(name))
    except csv.Error as error:
        raise DataError(f"list {path} cannot be read", str(error)) from None
    return Rows(values, lines, {name for name, count in Counter(names).items() if count > 1})


def _text(path: Path) -> str:
    try:
        raw = path.read_bytes()
        if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            return raw.decode("utf-16")
        return raw.decode("utf-8-sig", "surrogateescape")  # a BOM is no part of the first column's name
    except OSError as error:
        raise DataError(f"list {path} cannot be read", error.strerror or "") from None
    except UnicodeDecodeError as error:
        raise DataError(f"list {path} cannot be read", str(error), "save it as UTF-8") from None


def _read_jsonl(path: Path) -> Rows:
    rows: list[dict[str, Any]] = []
    lines: list[int] = []
    for number, row in _objects(path):
        rows.append(row)
        lines.append(number)
    names = dict.fromkeys(name for row in rows for name in row)
    return Rows({name: [row.get(name) for row in rows] for name in names}, lines)


def _objects(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    # Not splitlines: JSON may hold Unicode's own line characters.
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"line {number} of {path} is not JSON", str(error)) from None
        if not isinstance(row, dict):
            raise DataError(f"line {number} of {path} is no object", hint='write {"path": ..., "label": ...}')
        yield number, row


# -------------------------------------------------------------------------------------------------------------- labels


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
