"""Pictures that a list names more than once: the same row again, another label, another split."""

import os
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from samtune.data.encoded import FileImages, RawSplits
from samtune.data.labels import Labels, is_missing
from samtune.data.split_roles import ROLES
from samtune.errors import DataError, plural, shorten
from samtune.files import readable


def without_repeats(dataset: str, raw: RawSplits) -> tuple[RawSplits, list[str]]:
    """Each picture of a list once in a split, and notes. Pictures inside a table are left alone: they have no names.

    Raises DataError for pictures with several labels.
    """
    once: RawSplits = {}
    notes: list[str] = []
    label_of: dict[str, Any] = {}
    differ: dict[str, Any] = {}
    for split, (images, labels) in raw.items():
        once[split] = images, labels
        if not isinstance(images, FileImages):
            continue
        values = [_name(value, labels.names) for value in labels.values] or [None] * len(images)
        kept: dict[tuple[str, Any], int] = {}
        for row, (path, value) in enumerate(zip(images.paths, values, strict=True)):
            file = _plain(path)
            kept.setdefault((file, value), row)
            if not is_missing(value) and label_of.setdefault(file, value) != value:
                differ.setdefault(file, value)
        if len(kept) < len(images):
            rows = list(kept.values())
            again = next(row for row in range(len(images)) if row >= len(rows) or rows[row] != row)
            example = readable(images.paths[again])
            notes.append(
                f"split {readable(split)}: {len(images) - len(rows)} of {len(images)} rows are there twice and count "
                f"once, as {example}"
            )
            chosen = [labels.values[row] for row in rows] if labels.values else labels.values
            once[split] = FileImages([images.paths[row] for row in rows]), Labels(labels.names, chosen)
    if differ:
        shown = [f"{readable(file)} is {label_of[file]!r} and {value!r}" for file, value in differ.items()]
        raise DataError(
            f"{plural(len(differ), 'picture')} of data set {dataset} with several labels: {shorten(shown)}",
            "several labels a picture are not supported",
            "keep one row of each picture",
        )
    return once, notes


def shared(raw: RawSplits, parts: Mapping[str, Sequence[str]]) -> list[str]:
    """A note on pictures that two roles share, as of what is trained on and scored. Duplicates are left to `check`.

    A folder is the same under each of its names, as where test/cat is a link to train/cat.
    """
    real = cache(os.path.realpath)  # of folders, which are few
    listed = [
        (role, images.paths)
        for role in ROLES
        for images in (raw[name][0] for name in parts.get(role, ()))
        if isinstance(images, FileImages)
    ]
    roles_of: dict[str, set[str]] = {}  # of the pictures in a folder
    for role, paths in listed:
        for folder in set(map(os.path.dirname, paths)):
            roles_of.setdefault(real(folder), set()).add(role)
    in_common = {folder for folder, roles in roles_of.items() if len(roles) > 1}
    role_of: dict[str, str] = {}
    notes = []
    for role, paths in listed if in_common else []:
        places = ((real(os.path.dirname(path)), os.path.basename(path)) for path in paths)
        files = [os.path.join(folder, name) for folder, name in places if folder in in_common]
        again = [file for file in files if role_of.setdefault(file, role) != role]
        if again:
            notes.append(
                f"{plural(len(again), 'picture')} of {role_of[again[0]]} in {role}, too: its score is better than "
                f"it should be; keep each in one split ({shorten([readable(file) for file in again])})"
            )
    return notes


def _name(value: Any, names: Sequence[str] | None) -> Any:
    value = names[value] if names is not None and isinstance(value, int) and 0 <= value < len(names) else value
    return value if isinstance(value, str | int | None) else repr(value)


def _plain(path: str) -> str:
    return os.path.normpath(path) if "//" in path or "/." in path else path
