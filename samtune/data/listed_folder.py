"""A folder of pictures whose labels stand in lists beside them, as competitions have it: train.csv, test.csv."""

import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from samtune.data import columns, image_list, list_file
from samtune.data.encoded import PathSplits
from samtune.data.split_roles import ROLES, DataSelection, parse, role_of
from samtune.errors import DataError, UsageError, shorten
from samtune.files import readable

# Words in the name of a list whose labels are examples or guesses; and those that a list of true ones may have.
_ANSWER_WORDS = {
    *("submission", "submissions", "samplesubmission", "submit", "form", "forms", "sample", "samples", "example"),
    *("pred", "preds", "predict", "predicted", "prediction", "predictions", "answer", "answers", "output", "outputs"),
    *("result", "results"),
}
_LABEL_WORDS = {
    *("label", "labels", "labelled", "labeled", "list", "df", "meta", "metadata", "info", "annotation"),
    *("annotations", "class", "classes", "target", "targets", "truth", "ground", "groundtruth", "gt", "csv"),
    *("file", "files", "solution"),
}


def read_lists(root: Path, selection: DataSelection) -> PathSplits | None:
    """The splits whose pictures and labels are given by lists in a folder; None without a list of train.

    Each list is the split of its name; one without the labels that train has is left out, with a note. A picture is
    looked for in the folder of its split first. Raises what `image_list.read_list` raises.
    """
    with_labels = [path for path in lists_with_labels(root, selection) if path.suffix.lower() in list_file.ENDINGS]
    others = [path for path in _lists(root) if _role(path) == "train" and path not in with_labels]
    by_role = {_role(path): path for path in reversed([*with_labels, *others])}
    if "train" not in by_role:
        return None
    train = _read(by_role["train"], "train", root, selection)
    assert train.columns is not None
    label = train.columns.label
    splits, notes = dict(train.splits), list(train.notes)
    used = [_relative(by_role["train"], root)]
    train_words = parse(by_role["train"].stem)[1]
    for path in _lists(root):
        role, name = _role(path), _relative(path, root)
        if role not in ROLES or role == "train" or by_role.get(role, path) != path:
            continue
        if role in map(role_of, splits):
            notes.append(f"{name} is not read: {used[0]} tells the split {role} itself")
            continue
        if not set(parse(path.stem)[1]) <= {*_LABEL_WORDS, *train_words}:
            notes.append(f"{name} is not read: by its name it may hold something else than the labels of {role}")
            continue
        if not set(train.columns.one_hot or (label,)) <= set(list_file.read_rows(path).columns):
            notes.append(f"{name} is left out: it has no labels")
            continue
        more = _read(path, role, root, replace(selection, label_key=label or selection.label_key))
        if len(more.splits) > 1:
            message = f"list {path} tells {len(more.splits)} splits, and so does its name: {', '.join(more.splits)}"
            raise DataError(message, hint="give one list by --dataset")
        splits[role] = next(iter(more.splits.values()))
        notes += more.notes
        used.append(name)
    note = f"labels of {readable(str(root))} stand in {', '.join(used)}; no folder is a class"
    return PathSplits(splits, [note, *notes], train.columns)


def read_metadata(path: Path, selection: DataSelection) -> PathSplits | None:
    """The splits of a metadata file of several: train/0.png is a row of train, unless a column names the splits.

    None where its paths begin with no folder of a split, and for a table, which `datasets` reads.
    """
    if path.suffix.lower() not in list_file.ENDINGS:
        return None
    try:
        listed = image_list.read_list(path, selection)
    except DataError:
        return None  # it may name its pictures as only `datasets` understands it
    assert listed.columns is not None
    if listed.columns.splits:
        return listed
    by_folder = PathSplits({}, listed.notes, listed.columns)
    for files, labels in listed.splits.values():
        for file, label in zip(files, labels, strict=True):
            by_folder.add(readable(os.path.relpath(file, path.parent).split(os.sep)[0]), label, [file])
    return by_folder if all(role_of(split) in ROLES for split in by_folder.splits) else None


def lists_with_labels(root: Path, selection: DataSelection | None = None) -> list[Path]:
    """The lists of a folder that have columns of pictures and of labels; that of train first, of test last.

    Templates for answers do not count: their labels are examples. A list where any column may be the labels comes after
    those with a column that has the name of one.
    """
    lists = [path for path in _lists(root, (".parquet",)) if _role(path) != "answers"]
    by_path = {path: _columns_of(path, selection or DataSelection()) for path in lists}
    columns_of = {path: used for path, used in by_path.items() if used is not None}
    order = ["train", "", "validation", "test"]

    def rank(path: Path) -> tuple[int, bool, int]:
        is_guess = not columns_of[path].one_hot and not _may_be_labels(columns_of[path].label)
        return order.index(_role(path)), is_guess, len(path.stem)

    return sorted(columns_of, key=rank)


def check_same_labels(root: Path, splits: Mapping[str, tuple[Sequence[str], Sequence[str]]], train: str) -> None:
    """Raise DataError for a list in the folder that gives its pictures other labels than the folders do.

    A list names the pictures by their names or ids, whatever its columns are called. It agrees with the folders where a
    column has their names in nearly all rows, a column of labels one value for each of them, or each of them is a
    column. splits: paths and folders, picture by picture. train: the value of --train-split if the folders are meant.
    """
    for path in _lists(root, (".parquet",)):
        role = _role(path)
        of_role = [pictures for split, pictures in splits.items() if role in ("", role_of(split))]
        folder_of = {picture: folder for pictures in of_role for picture, folder in zip(*pictures, strict=True)}
        values = _read_columns(path) if folder_of else {}
        key, picture_of = _pictures_by_row(path, values, list(folder_of))
        if not picture_of:
            continue
        folders = [folder_of[picture].casefold() for picture in picture_of.values()]
        texts = {
            name: [_text(column[row]).casefold() for row in picture_of]
            for name, column in values.items()
            if name != key
        }
        labels = [name for name in texts if _may_be_labels(name)]
        one_hot = [name for name in texts if set(texts[name]) <= {"0", "1", "0.0", "1.0"}]
        if any(row.count("1") + row.count("1.0") != 1 for row in zip(*(texts[name] for name in one_hot), strict=True)):
            one_hot = []  # flags of any kind
        is_same = (
            any(
                10 * sum(map(str.__eq__, texts[name], folders)) >= 9 * len(folders)
                for name in texts
                if name in labels or name not in one_hot
            )
            or any(_are_renamed(texts[name], folders) for name in labels)
            or set(folders) <= {name.casefold() for name in one_hot}
        )
        if is_same or (not labels and len(one_hot) < 2):
            continue
        row, picture = next(iter(picture_of.items()))
        example = f"{os.path.relpath(picture, root)} is {_text(values[labels[0]][row])}" if labels else shorten(one_hot)
        raise DataError(
            f"list {readable(str(path))} tells other labels than the folders, which would be the classes",
            f"folders: {shorten(sorted(set(folder_of.values())))}; by the list {readable(example)}",
            f"give the list by --dataset {readable(str(path))}; where the folders are meant, take it away, or say "
            f"--train-split {train}",
        )


def _are_renamed(first: Sequence[str], second: Sequence[str]) -> bool:
    """Whether each of several values of one stands for one value of the other."""
    return len(set(zip(first, second, strict=True))) == len(set(first)) == len(set(second)) > 1


def _pictures_by_row(
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
        picture_of = {}
        for row, value in enumerate(values[column]):
            end = readable(_text(value)).replace("\\", "/")
            matches = by_name.get(end.rpartition("/")[2], [])
            if len(matches) > 1:
                matches = [file for file in matches if readable(file).endswith("/" + end.lstrip("./"))]
            if len(matches) == 1:
                picture_of[row] = matches[0]
        if 2 * len(picture_of) > min(len(values[column]), len(pictures)):
            return column, picture_of
    return "", {}


def _read_columns(path: Path) -> dict[str, list[Any]]:
    """The columns of a list; {} where it cannot be read: an error follows where it is used."""
    try:
        return list_file.read_rows(path).columns
    except DataError:
        return {}


def has_label_column(path: Path) -> bool:
    """Whether a list or table can be read and has a column with a usual name of a label."""
    return columns.has_label(_read_columns(path))


def _text(value: Any) -> str:
    return "" if value is None else str(value).strip()


def _may_be_labels(column: str) -> bool:
    """Whether its name is that of a label, or has a word that is one: Finding Labels, class_name_en."""
    words = [word for word in re.findall("[a-z]+", column.casefold()) if len(word) > 4]
    return columns.has_label([column, *words])


def _lists(root: Path, more: Collection[str] = ()) -> Iterator[Path]:
    """The lists right in a folder, and in those of its folders that are splits. more: other endings, right in it."""
    entries = sorted(os.scandir(root), key=lambda entry: entry.name)
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if os.path.splitext(entry.name)[1].lower() in (*list_file.ENDINGS, *more) and os.path.isfile(entry.path):
            yield Path(entry.path)
    for entry in entries:
        if role_of(entry.name) in ROLES and os.path.isdir(entry.path) and os.access(entry.path, os.R_OK):
            for name in sorted(os.listdir(entry.path)):
                if os.path.splitext(name)[1].lower() in list_file.ENDINGS and not name.startswith("."):
                    yield Path(entry.path) / name


def _relative(path: Path, root: Path) -> str:
    return readable(str(path.relative_to(root)))


def _role(path: Path) -> str:
    """The role of a list by its name: train_labels.csv train, test/labels.csv test, sample_submission.csv answers."""
    role, _ = parse(path.stem)
    role = role if role in ROLES else role_of(path.parent.name)
    words = set(re.findall("[^\\W\\d_]+", path.stem.casefold()))
    if words & (_ANSWER_WORDS if role != "train" else {"submission", "samplesubmission"}):
        return "answers"
    return role if role in ROLES else ""


def _columns_of(path: Path, selection: DataSelection) -> columns.Columns | None:
    try:
        return columns.find(str(path), columns.Table.of_lists(list_file.read_rows(path).columns), selection)
    except (DataError, UsageError):
        return None


def _read(path: Path, role: str, root: Path, selection: DataSelection) -> PathSplits:
    folders = [entry for entry in os.scandir(root) if entry.is_dir() and role_of(entry.name) == role]
    if len(folders) == 1 and selection.image_root is None:
        try:
            return image_list.read_list(path, replace(selection, image_root=folders[0].path))
        except DataError:
            pass  # they lie elsewhere
    return image_list.read_list(path, selection)
