"""A folder of pictures whose labels stand in lists beside them, as competitions have it: train.csv, test.csv."""

import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from samtune.data import columns, image_list
from samtune.data.columns import Columns
from samtune.data.image_list import ListSplits
from samtune.data.split_roles import ROLES, DataSelection, parse, role_of
from samtune.data.text import shorten
from samtune.errors import DataError, UsageError
from samtune.files import readable

# Words in the name of a list whose labels are examples or guesses; and those that a list of true ones may have.
_FORMS = {
    *("submission", "submissions", "samplesubmission", "submit", "form", "forms", "sample", "samples", "example"),
    *("pred", "preds", "predict", "predicted", "prediction", "predictions", "answer", "answers", "output", "outputs"),
    *("result", "results"),
}
_OF_LISTS = {
    *("label", "labels", "labelled", "labeled", "list", "df", "meta", "metadata", "info", "annotation"),
    *("annotations", "class", "classes", "target", "targets", "truth", "ground", "groundtruth", "gt", "csv"),
    *("file", "files", "solution"),
}


def read_lists(root: Path, wanted: DataSelection) -> ListSplits | None:
    """The splits of which lists right in the folder tell the pictures and labels; None without a list of train.

    Each list is the split of its name; one without the labels that train has is left out, with a note. A picture is
    looked for in the folder of its split first. Raises what `image_list.read_list` raises.
    """
    with_labels = [path for path in lists_with_labels(root, wanted) if path.suffix.lower() in image_list.LISTS]
    others = [path for path in _lists(root) if _role(path) == "train" and path not in with_labels]
    by_role = {_role(path): path for path in reversed([*with_labels, *others])}
    if "train" not in by_role:
        return None
    train = _read(by_role["train"], "train", root, wanted)
    splits, notes = dict(train.splits), list(train.notes)
    told = [_place(by_role["train"], root)]
    of_train = parse(by_role["train"].stem)[1]
    for path in _lists(root):
        role, name = _role(path), _place(path, root)
        if role not in ROLES or role == "train" or by_role.get(role, path) != path:
            continue
        if role in map(role_of, splits):
            notes.append(f"{name} is not read: {told[0]} tells the split {role} itself")
            continue
        if not set(parse(path.stem)[1]) <= {*_OF_LISTS, *of_train}:
            notes.append(f"{name} is not read: by its name it may hold something else than the labels of {role}")
            continue
        if not set(_label_columns(train.columns)) <= set(image_list.names_of_columns(path)):
            notes.append(f"{name} is left out: it has no labels")
            continue
        more = _read(path, role, root, replace(wanted, label_key=train.columns.label or wanted.label_key))
        if len(more.splits) > 1:
            raise DataError(
                f"list {path} tells {len(more.splits)} splits, and so does its name: {', '.join(more.splits)}",
                hint="give one list by --dataset",
            )
        splits[role] = next(iter(more.splits.values()))
        notes += more.notes
        told.append(name)
    note = f"labels of {readable(str(root))} stand in {', '.join(told)}; no folder is a class"
    return ListSplits(splits, [note, *notes], train.columns)


def read_metadata(path: Path, wanted: DataSelection) -> ListSplits | None:
    """The splits of a metadata file of several: train/0.png is a row of train, unless a column tells the splits.

    None where its paths begin with no folder of a split, and for a table, which `datasets` reads.
    """
    if path.suffix.lower() not in image_list.LISTS:
        return None
    try:
        listed = image_list.read_list(path, wanted)
    except DataError:
        return None  # it may name its pictures as only `datasets` understands it
    if listed.columns.splits:
        return listed
    splits: dict[str, tuple[list[str], list[Any]]] = {}
    for files, labels in listed.splits.values():
        for file, label in zip(files, labels, strict=True):
            split = os.path.relpath(file, path.parent).split(os.sep)[0]
            of_split = splits.setdefault(readable(split), ([], []))
            of_split[0].append(file)
            of_split[1].append(label)
    if not all(role_of(split) in ROLES for split in splits):
        return None
    return replace(listed, splits=splits)


def lists_with_labels(root: Path, wanted: DataSelection | None = None) -> list[Path]:
    """The lists of a folder that have columns of pictures and of labels; that of train first, of test last.

    A form for answers is none of them: its labels are examples. Where any column may be the labels, the list comes
    after those that call one so.
    """
    lists = [path for path in _lists(root, (".parquet",)) if _role(path) != "answers"]
    by_path = {path: _columns_of(path, wanted or DataSelection()) for path in lists}
    found = {path: columns_of for path, columns_of in by_path.items() if columns_of is not None}
    order = ["train", "", "validation", "test"]

    def place(path: Path) -> tuple[int, bool, int]:
        is_guess = not found[path].one_hot and not _may_be_labels(found[path].label)
        return order.index(_role(path)), is_guess, len(path.stem)

    return sorted(found, key=place)


def check_beside(root: Path, splits: Mapping[str, tuple[Sequence[str], Sequence[str]]], train: str) -> None:
    """Raise DataError for a list in the folder that tells other labels of its pictures than the folders do.

    A list names the pictures by their names or ids, whatever its columns are called. It tells the same as the folders
    where a column has their names in nearly all rows, a column of labels one value for each of them, or each of them is
    a column. splits: paths and folders, picture by picture. train: what --train-split says where the folders are meant.
    """
    for path in _lists(root, (".parquet",)):
        role = _role(path)
        of_role = [of for split, of in splits.items() if role in ("", role_of(split))]
        folder_of = {picture: folder for of in of_role for picture, folder in zip(*of, strict=True)}
        values = _read_columns(path) if folder_of else {}
        key, named = _pictures_of(path, values, list(folder_of))
        if not named:
            continue
        of_row = [folder_of[picture].casefold() for picture in named.values()]
        told = {
            name: [_text(column[row]).casefold() for row in named] for name, column in values.items() if name != key
        }
        labels = [name for name in told if _may_be_labels(name)]
        one_hot = [name for name in told if set(told[name]) <= {"0", "1", "0.0", "1.0"}]
        if any(row.count("1") + row.count("1.0") != 1 for row in zip(*(told[name] for name in one_hot), strict=True)):
            one_hot = []  # flags of any kind
        is_same = (
            any(
                10 * sum(map(str.__eq__, told[name], of_row)) >= 9 * len(of_row)
                for name in told
                if name in labels or name not in one_hot
            )
            or any(_divide_alike(told[name], of_row) for name in labels)
            or set(of_row) <= {name.casefold() for name in one_hot}
        )
        if is_same or (not labels and len(one_hot) < 2):
            continue
        row, picture = next(iter(named.items()))
        example = f"{os.path.relpath(picture, root)} is {_text(values[labels[0]][row])}" if labels else shorten(one_hot)
        raise DataError(
            f"list {readable(str(path))} tells other labels than the folders, which would be the classes",
            f"folders: {shorten(sorted(set(folder_of.values())))}; by the list {readable(example)}",
            f"give the list by --dataset {readable(str(path))}; where the folders are meant, take it away, or say "
            f"--train-split {train}",
        )


def _divide_alike(first: Sequence[str], second: Sequence[str]) -> bool:
    """Whether each value of one stands for one of the other, of several."""
    return len(set(zip(first, second, strict=True))) == len(set(first)) == len(set(second)) > 1


def _pictures_of(
    path: Path, values: Mapping[str, Sequence[Any]], pictures: Sequence[str]
) -> tuple[str, dict[int, str]]:
    """The column that names the pictures, and row -> picture; none unless most rows or most pictures have one."""
    by_name: dict[str, list[str]] = {}
    for picture in pictures if values else ():
        name = readable(os.path.basename(picture))
        for form in {name, os.path.splitext(name)[0]}:
            by_name.setdefault(form, []).append(picture)
    try:
        first = [columns.find_image(str(path), columns.Table.of_lists(values), DataSelection())]
    except DataError:
        first = []
    for column in dict.fromkeys([*first, *values]):
        named = {}
        for row, value in enumerate(values[column]):
            end = readable(_text(value)).replace("\\", "/")
            there = by_name.get(end.rpartition("/")[2], [])
            if len(there) > 1:
                there = [file for file in there if readable(file).endswith("/" + end.lstrip("./"))]
            if len(there) == 1:
                named[row] = there[0]
        if 2 * len(named) > min(len(values[column]), len(pictures)):
            return column, named
    return "", {}


def _read_columns(path: Path) -> dict[str, list[Any]]:
    """The columns of a list, those of pictures left out; {} where it cannot be read, which is said when it is."""
    try:
        if path.suffix.lower() != ".parquet":
            return dict(image_list.read_table(path).values)
        import pyarrow.parquet as pq

        plain = [field.name for field in pq.read_schema(path) if "binary" not in str(field.type)]
        return {str(name): list(values) for name, values in pq.read_table(path, columns=plain).to_pydict().items()}
    except (DataError, OSError, ValueError, TypeError):  # of arrow's family, these are the parents
        return {}


def _text(value: Any) -> str:
    return "" if value is None else str(value).strip()


def _may_be_labels(column: str) -> bool:
    """Whether its name is that of a label, or has a word that is one: Finding Labels, class_name_en."""
    words = [word for word in re.findall("[a-z]+", column.casefold()) if len(word) > 4]
    return columns.has_label([column, *words])


def _lists(root: Path, more: Collection[str] = ()) -> Iterator[Path]:
    """The lists right in a folder, and in those of its folders that are splits. more: other endings."""
    for entry in sorted(os.scandir(root), key=lambda entry: entry.name):
        if entry.name.startswith("."):
            continue
        if os.path.splitext(entry.name)[1].lower() in (*image_list.LISTS, *more) and os.path.isfile(entry.path):
            yield Path(entry.path)
    for entry in sorted(os.scandir(root), key=lambda entry: entry.name):
        if role_of(entry.name) in ROLES and os.path.isdir(entry.path) and os.access(entry.path, os.R_OK):
            for name in sorted(os.listdir(entry.path)):
                if os.path.splitext(name)[1].lower() in image_list.LISTS and not name.startswith("."):
                    yield Path(entry.path) / name


def _place(path: Path, root: Path) -> str:
    return readable(str(path.relative_to(root)))


def _role(path: Path) -> str:
    """train_labels.csv is of train, test/labels.csv of test, sample_submission.csv a form for answers."""
    role, _ = parse(path.stem)
    role = role if role in ROLES else role_of(path.parent.name)
    words = set(re.findall("[^\\W\\d_]+", path.stem.casefold()))
    if words & (_FORMS if role != "train" else {"submission", "samplesubmission"}):
        return "answers"
    return role if role in ROLES else ""


def _columns_of(path: Path, wanted: DataSelection) -> Columns | None:
    try:
        if path.suffix.lower() == ".parquet":
            return columns.find(str(path), columns.Table.of_lists(_read_columns(path)), wanted)
        return image_list.find_columns(path, wanted)
    except (DataError, UsageError):
        return None


def _label_columns(found: Columns) -> tuple[str, ...]:
    return found.one_hot or (found.label,)


def _read(path: Path, role: str, root: Path, wanted: DataSelection) -> ListSplits:
    folders = [entry for entry in os.scandir(root) if entry.is_dir() and role_of(entry.name) == role]
    if len(folders) == 1 and wanted.image_root is None:
        try:
            return image_list.read_list(path, replace(wanted, image_root=folders[0].path))
        except DataError:
            pass  # they lie elsewhere
    return image_list.read_list(path, wanted)
