"""Pictures in folders, and lists of pictures: which file has which label in which split. Opens no picture."""

import csv
import json
import os
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from samtune.data.roles import ROLES, role_of
from samtune.errors import DataError, UsageError

Pictures = dict[str, tuple[list[str], list[Any]]]  # split -> (paths, labels)

LISTS = (".csv", ".jsonl")
_ENDINGS = (".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm", ".jp2", ".avif")
_LEFT_BY_SYSTEMS = ("thumbs.db", "desktop.ini")
_PATH_COLUMNS = ("path", "image", "img", "file", "file_name", "filename", "filepath")
_LABEL_COLUMNS = ("label", "labels", "class", "class_name")


def scan_folder(root: Path, named: Collection[str] = ()) -> tuple[Pictures, list[str]]:
    """Pictures as <split>/<class>/..., or <class>/... where the folders are no splits; {} if there are none.

    With them what was passed over beside or between pictures: paths of files that are none by their ending.

    named: folders that are splits though their names do not say so. Splits keep their folders' names. A class may have
    folders inside: its name is the path then, as in bird/owl. Files that begin with a dot are no one's business.
    Raises DataError for a picture that lies in no class folder while others do.
    """
    folders = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    splits = {path.name: path for path in folders if role_of(path.name) in ROLES or path.name in named}
    if len(splits) < len(folders) and not {"train", *named} & {*splits, *map(role_of, splits)}:
        splits = {"train": root}  # classes alone; one of them may well be called test
    pictures: Pictures = {}
    passed_over: list[str] = []
    for split, folder in splits.items():
        paths = list(_pictures_in(folder, passed_over))
        labels = [path.parent.relative_to(folder).as_posix() for path in paths]
        if "." in labels and len(set(labels)) > 1:
            raise DataError(
                f"picture {paths[labels.index('.')]} lies in no class folder",
                f"others of split {split} do",
                "move it into its class, or remove it",
            )
        if paths and "." not in labels:
            pictures[split] = ([str(path) for path in paths], labels)
    return pictures, passed_over


def _pictures_in(folder: Path, passed_over: list[str]) -> Iterator[Path]:
    """All pictures below a folder; other files below one of its own folders are added to passed_over."""
    entered = {os.path.realpath(folder)}
    for place, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and _enter(place, name, entered))
        for name in sorted(files):
            if name.startswith(".") or name.lower() in _LEFT_BY_SYSTEMS:
                continue
            if name.lower().endswith(_ENDINGS):
                yield Path(place) / name
            elif place != str(folder):
                passed_over.append(os.path.join(place, name))


def _enter(place: str, name: str, entered: set[str]) -> bool:
    """Whether a folder is seen for the first time: a link may lead back to where the walk has been."""
    real = os.path.realpath(os.path.join(place, name))
    new = real not in entered
    entered.add(real)
    return new


def has_metadata(root: Path) -> bool:
    """Whether a file tells the labels, in the hub's manner, and the folders do not."""
    return any(
        path.suffix in (".csv", ".jsonl", ".parquet") for path in (*root.glob("metadata.*"), *root.glob("*/metadata.*"))
    )


def parquet_files(root: Path) -> dict[str, list[str]]:
    """Split -> its parquet files, as data/<split>-00000-of-00001.parquet, <split>.parquet or <split>/*.parquet.

    {} if there are none, or if a README or an unusual layout leaves it to the `datasets` library to tell.
    """
    readme = root / "README.md"
    if readme.is_file() and re.search("^configs:", readme.read_text(encoding="utf-8", errors="replace"), re.M):
        return {}
    files: dict[str, list[str]] = {}
    folders = set()
    for path in sorted((*root.glob("*.parquet"), *root.glob("*/*.parquet"))):
        whole, shards = re.subn("-[0-9]+-of-[0-9]+.*$", "", path.stem)
        if shards or role_of(whole) in ROLES:
            split, folder = whole, path.parent
        elif role_of(path.parent.name) in ROLES and path.parent != root:
            split, folder = path.parent.name, root
        else:
            return {}
        folders.add(folder)
        files.setdefault(split, []).append(str(path))
    return files if len(folders) <= 1 else {}


def read_list(path: Path, image_key: str | None, label_key: str | None) -> Pictures:
    """A csv file with a header, or a jsonl file: a picture's path, its label, and its split where there is a column.

    Relative paths are seen from the list's folder. Without a column `split` all pictures are train. Labels of a csv
    file are numbers where all of them are.

    Raises:
        UsageError: a key is no column.
        DataError: no such columns, a row that cannot be read, or paths that lead nowhere.
    """
    rows = list(_read_csv(path) if path.suffix.lower() == ".csv" else _read_jsonl(path))
    there = list(dict.fromkeys(key for _, row in rows for key in row))
    if not rows:
        raise DataError(f"list {path} has no rows", mend="one picture a row: path,label or path,label,split")
    image = _column(path, there, "--image-key", image_key, _PATH_COLUMNS)
    label = _column(path, there, "--label-key", label_key, _LABEL_COLUMNS)
    pictures: Pictures = {}
    for line, row in rows:
        if not isinstance(row.get(image), str) or not row[image]:
            raise DataError(f"line {line} of {path} has no {image}", mend="mend or remove the line")
        if "split" in there and not row.get("split"):
            raise DataError(f"line {line} of {path} has no split", mend="fill in the column split, or remove it")
        paths, labels = pictures.setdefault(str(row.get("split", "train")), ([], []))
        paths.append(str(path.parent / row[image]))
        labels.append(_plain(row.get(label), f"line {line} of {path}"))
    for paths, _ in pictures.values():
        if not Path(paths[0]).is_file():
            raise DataError(
                f"picture {paths[0]} of list {path} is not there", mend="paths are seen from the folder of the list"
            )
    if path.suffix.lower() == ".csv":
        _read_numbers(pictures)
    return pictures


def _read_csv(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:  # a BOM is no part of the first column's name
            reader = csv.DictReader(file, skipinitialspace=True)
            for row in reader:
                if None in row:
                    raise DataError(
                        f"line {reader.line_num} of {path} has more values than the header",
                        mend="quote values that hold commas",
                    )
                yield reader.line_num, row
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"list {path} cannot be read", str(error)) from None


def _read_jsonl(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"list {path} cannot be read", str(error)) from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"line {number} of {path} is not JSON", str(error)) from None
        if not isinstance(row, dict):
            raise DataError(f"line {number} of {path} is no object", mend='write {"path": ..., "label": ...}')
        yield number, row


def _column(path: Path, there: list[str], flag: str, key: str | None, names: tuple[str, ...]) -> str:
    if key is not None and key not in there:
        raise UsageError(f"{flag} {key}: list {path} has no such column", mend=f"its columns: {', '.join(there)}")
    found = key or next((name for name in names if name in there), None)
    if found is None:
        raise DataError(
            f"list {path} has no column {names[0]}",
            f"its columns: {', '.join(there)}",
            f"write a header such as path,label,split, or name the column by {flag}",
        )
    return found


def _plain(label: Any, where: str) -> str | int | None:
    """A label of a list as it is stored. Raises DataError for what is neither text nor a whole number: NaN, [0]."""
    if isinstance(label, float) and label.is_integer():
        label = int(label)
    if not (label is None or isinstance(label, str) or (isinstance(label, int) and abs(label) < 2**63)):
        raise DataError(
            f"{where} has the label {label!r}, which is no class",
            "a label is text, or a whole number from 0 on",
            "mend or remove the line",
        )
    return label


def _read_numbers(pictures: Pictures) -> None:
    """Turn text labels into numbers, in place, where all of them are: 10 comes after 9 then, and -1 is no class.

    NaN among numbers is a label that is missing; among words it is a word.
    """
    texts = {label for _, labels in pictures.values() for label in labels if label}
    numbers = {text for text in texts if text.lower() != "nan"}
    if all(re.fullmatch("-?(0|[1-9][0-9]{0,17})", text) for text in numbers):
        for _, labels in pictures.values():
            labels[:] = [int(label) if label in numbers else None for label in labels]
