"""A folder of pictures whose labels stand in lists beside them, as competitions have it: train.csv, test.csv."""

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from samtune.data import image_list
from samtune.data.columns import Columns
from samtune.data.image_list import ListSplits
from samtune.data.names import readable
from samtune.data.roles import ROLES, Wanted, parse, role_of
from samtune.errors import DataError, UsageError


def read_lists(root: Path, wanted: Wanted) -> ListSplits | None:
    """The splits of which lists right in the folder tell the pictures and labels; None without a list of train.

    Each list is the split of its name; one without the labels that train has is left out, with a note. A picture is
    looked for in the folder of its split first. Raises what `image_list.read_list` raises.
    """
    with_labels = labelled(root, wanted)
    others = [path for path in _lists(root) if _role(path) == "train" and path not in with_labels]
    by_role = {_role(path): path for path in reversed([*with_labels, *others])}
    if "train" not in by_role:
        return None
    train = _read(by_role["train"], "train", root, wanted)
    splits, notes = dict(train.splits), list(train.notes)
    told = [by_role["train"].name]
    for path in _lists(root):
        role = _role(path)
        if role not in ROLES or role == "train" or role in map(role_of, splits) or by_role.get(role, path) != path:
            continue
        if not set(_label_columns(train.columns)) <= set(image_list.names_of_columns(path)):
            notes.append(f"{readable(path.name)} is left out: it has no labels")
            continue
        more = _read(path, role, root, replace(wanted, label_key=train.columns.label or wanted.label_key))
        if len(more.splits) > 1:
            raise DataError(
                f"list {path} tells {len(more.splits)} splits, and so does its name: {', '.join(more.splits)}",
                mend="give one list by --dataset",
            )
        splits[role] = next(iter(more.splits.values()))
        notes += more.notes
        told.append(path.name)
    note = f"labels of {readable(str(root))} stand in {', '.join(map(readable, told))}; no folder is a class"
    return ListSplits(splits, [note, *notes], train.columns)


def labelled(root: Path, wanted: Wanted | None = None) -> list[Path]:
    """The lists right in a folder that have columns of pictures and of labels; that of train first, of test last.

    A form for answers is none of them: its labels are examples.
    """
    found = [path for path in _lists(root) if _role(path) != "answers" and _has_labels(path, wanted or Wanted())]
    order = ["train", "", "validation", "test"]
    return sorted(found, key=lambda path: (order.index(_role(path)), len(path.stem)))


def _lists(root: Path) -> Iterator[Path]:
    for name in sorted(os.listdir(root)):
        if os.path.splitext(name)[1].lower() in image_list.LISTS and not name.startswith("."):
            yield root / name


def _role(path: Path) -> str:
    """train_labels.csv is of train, sample_submission.csv a form for answers."""
    role, rest = parse(path.stem)
    return "answers" if {"submission", "samplesubmission"} & set(rest) else role if role in ROLES else ""


def _has_labels(path: Path, wanted: Wanted) -> bool:
    try:
        return bool(_label_columns(image_list.find_columns(path, wanted)))
    except (DataError, UsageError):
        return False


def _label_columns(found: Columns) -> tuple[str, ...]:
    return found.one_hot or (found.label,)


def _read(path: Path, role: str, root: Path, wanted: Wanted) -> ListSplits:
    folders = [entry for entry in os.scandir(root) if entry.is_dir() and role_of(entry.name) == role]
    if len(folders) == 1 and wanted.image_root is None:
        try:
            return image_list.read_list(path, replace(wanted, image_root=folders[0].path))
        except DataError:
            pass  # they lie elsewhere
    return image_list.read_list(path, wanted)
