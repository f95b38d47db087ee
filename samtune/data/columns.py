"""Which columns of a list or a table hold images, labels and splits: by flags, else by their names and values."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Literal

from samtune.data.split_columns import is_sure_flag, may_tell_splits, names_no_train, role_of_flag, tells_splits
from samtune.data.split_roles import DataSelection
from samtune.errors import DataError, UsageError

Kind = Literal["images", "classes", "text", "number", "list", "other"]

# Names of columns, the likeliest first. Case, blanks and signs do not count: "File Name" is filename.
_IMAGE_NAMES = (
    *("path", "image", "img", "file", "filename", "filepath", "imagepath", "imgpath", "imagefile", "imagefilename"),
    *("imagename", "imgname", "imagefilepath", "filepaths", "filenames", "images", "picture", "photo", "jpg", "png"),
    *("webp", "jpeg", "imageid", "imgid", "pictureid", "photoid", "id", "idcode"),
)
_LABEL_NAMES = (
    *("label", "labels", "class", "classname", "finelabel", "category", "categoryname", "species", "breed", "target"),
    *("targets", "labelname", "cls", "variety", "diagnosis", "dx", "y", "classid", "labelid", "categoryid"),
)
_SURE_LABEL_NAMES = 4  # the first ones, which mean nothing else
_ROW_NUMBERS = ("", "index", "unnamed", "unnamed0", "idx", "rowid")


@dataclass(frozen=True)
class Columns:
    """The columns of one list or table. label is "" where one_hot names a column for each class.

    splits: the column of names of splits, or the columns of flags such as is_test; none where all is train. notes: on
    columns that are not used.
    """

    image: str
    label: str
    splits: tuple[str, ...] = ()
    one_hot: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Table:
    """The values and the kind of each column."""

    values: Mapping[str, Sequence[Any]]
    kinds: Mapping[str, Kind]

    @classmethod
    def of_lists(cls, values: Mapping[str, Sequence[Any]]) -> "Table":
        """Columns of a list, where all is text or whatever JSON holds."""
        return cls(values, dict.fromkeys(values, "text"))

    def of_kind(self, *kinds: Kind) -> list[str]:
        """The columns of these kinds."""
        return [name for name, kind in self.kinds.items() if kind in kinds]


def find(dataset: str, table: Table, selection: DataSelection, *, needs_label: bool = True) -> Columns:
    """The columns of a table.

    Raises UsageError for a flag that names no column, DataError where a column cannot be told; both list what there is.
    needs_label: whether there has to be one; else label may be "".
    """
    _check_selection(dataset, table, selection)
    search = _Search(table, selection)
    if search.image is None or (needs_label and search.label is None and not search.one_hot):
        kind, flag = ("image", "--image-key") if search.image is None else ("label", "--label-key")
        or_several = "; --label-key a,b where each class has a column" if kind == "label" else ""
        raise DataError(
            f"data set {dataset} has no {kind} column that can be told",
            f"its columns: {', '.join(table.kinds)}",
            f"name it by {flag}{or_several}; a list has a header such as path,label,split",
        )
    several = search.names_of_splits or search.repeated_flags
    if len(several) > 1:
        message = f"data set {dataset} has {len(several)} columns of splits: {', '.join(several)}"
        raise DataError(message, hint="choose one by --split-key")
    return Columns(search.image, search.label or "", tuple(search.splits), search.one_hot, tuple(search.notes()))


def find_image(dataset: str, table: Table, selection: DataSelection) -> str:
    """The column of images, or of their paths, where labels do not matter: also the only column there is.

    By flags, names and kinds: no value is read. Raises as `find` does.
    """
    _check_selection(dataset, table, selection)
    only = next(iter(table.kinds)) if len(table.kinds) == 1 else None
    column = _Search(table, selection).image or (only if only in table.of_kind("text") else None)
    if column is None:
        raise DataError(
            f"{dataset} has no column of pictures or paths that can be told",
            f"its columns: {', '.join(table.kinds)}",
            "name it by --image-key; a list has a header such as path",
        )
    return column


def _check_selection(dataset: str, table: Table, selection: DataSelection) -> None:
    classes = _selected_classes(table, selection)
    for kind in ("image", "label", "split"):
        key = getattr(selection, f"{kind}_key")
        if key not in (None, *table.kinds) and not (kind == "label" and classes):
            message = f"--{kind}-key {key}: data set {dataset} has no such column"
            raise UsageError(message, hint=f"its columns: {', '.join(table.kinds)}")
    for name in set(classes) & set(table.values):
        if table.kinds[name] not in ("text", "number") or not _is_indicator(table.values[name]):
            raise DataError(
                f"column {name} of data set {dataset} holds other than 0 and 1",
                f"--label-key {selection.label_key} takes each column as a class",
                "name columns of 0 and 1 alone, or one column of labels",
            )
    if selection.image_key is not None and table.kinds[selection.image_key] in ("classes", "list"):
        raise DataError(f"column {selection.image_key} holds no images", hint="name another by --image-key")


def _selected_classes(table: Table, selection: DataSelection) -> tuple[str, ...]:
    """The columns that --label-key cat,dog names, each of them a class; () where it names one column."""
    names = tuple((selection.label_key or "").split(","))
    is_several = selection.label_key not in table.kinds and len(names) > 1
    return names if is_several and set(names) <= set(table.kinds) else ()


class _Search:
    """A search for the columns of a table: each is taken from those that the others leave."""

    def __init__(self, table: Table, selection: DataSelection) -> None:
        self.table, self.selection = table, selection
        self._indicators: dict[str, bool] = {}

    @cached_property
    def image(self) -> str | None:
        """Of pictures in the table, else of their paths."""
        pictures = self.table.of_kind("images")
        by_name = _by_name(pictures, _IMAGE_NAMES) or (pictures[0] if len(pictures) == 1 else None)
        paths = [name for name in self.table.of_kind("text", "number") if name != self.selection.label_key]
        return self.selection.image_key or by_name or _by_name(paths, _IMAGE_NAMES)

    @cached_property
    def splits(self) -> list[str]:
        """Columns that say of each row in which split it is."""
        return self.names_of_splits or list(self.flags) or self.unsure[:1]

    @cached_property
    def names_of_splits(self) -> list[str]:
        """Columns of names of splits; more than one leaves it to the user. The label is none of them."""
        if self.selection.split_key:
            return [self.selection.split_key]
        taken = (self.image, self._named_label, *self._classes)
        others = [name for name in self.table.of_kind("text", "classes", "number") if name not in taken]
        by_name = _by_name(others, ("split",))
        return [by_name] if by_name else [name for name in others if name in self._like_splits]

    @cached_property
    def flags(self) -> dict[str, str]:
        """Columns of yes and no -> the split of which they speak. Where nothing else is the label, `test` may be it.

        A column `train` is a class where it stands among columns of classes, of which each row has one.
        """
        taken = (self.image, self._named_label, *self.names_of_splits, *self._classes)
        others = [name for name in self.table.of_kind("text", "number") if name not in taken]
        roles = {name: role_of_flag(name, partial(self.table.values.__getitem__, name)) for name in others}
        flags = {name: role for name, role in roles.items() if role is not None}
        sure = {name: role for name, role in flags.items() if is_sure_flag(name) or role != "train"}
        classes = self._one_hot_beside(sure) if self._named_label is None else ()
        if set(flags) - set(sure) & set(classes) and self._has_one_class_a_row(classes):
            flags = sure
        if self._label_beside(flags) is None and not self._one_hot_beside(flags):
            flags = {name: role for name, role in flags.items() if is_sure_flag(name)}
        return flags

    @cached_property
    def unsure(self) -> list[str]:
        """Columns whose names speak of splits and whose values do not, where nothing else tells the splits.

        None is the label, or a class.
        """
        if self.names_of_splits or self.flags:
            return []
        taken = (self.image, self.label, *self._classes, *self._block(self._left([])))
        others = [name for name in self.table.of_kind("text", "classes", "number") if name not in taken]
        unclear = [name for name in others if may_tell_splits(name, partial(self.table.values.__getitem__, name))]
        return unclear if self.label or self._one_hot_beside(unclear) else []

    @property
    def repeated_flags(self) -> list[str]:
        """Flags that speak of a split of which another one speaks."""
        roles = list(self.flags.values())
        return [name for name, role in self.flags.items() if roles.count(role) > 1]

    @cached_property
    def label(self) -> str | None:
        """By its name; else the only one that declares classes; else the only one that is left."""
        return self._label_beside(self.flags)

    @cached_property
    def one_hot(self) -> tuple[str, ...]:
        """A column of 0 and 1 for each class, where nothing else can be the label."""
        return self._one_hot_beside([*self.flags, *self.unsure]) if self.label is None else ()

    def notes(self) -> list[str]:
        """Notes on columns that are not used, and might be."""
        notes = []
        used = (self.image, self.label, *self.splits, *self.one_hot)
        others = [name for name in self.table.kinds if name not in used and _plain(name) not in _ROW_NUMBERS]
        if self.one_hot and others and not self._classes:
            notes.append(f"columns {', '.join(self.one_hot)} are the classes; not used: {', '.join(others)}")
        texts = [name for name in others if self.table.kinds[name] in ("text", "classes")] if not self.splits else []
        notes += [
            f"column {name} is not taken for one of splits, as it names no train (--split-key {name} takes it)"
            for name in texts
            if names_no_train(name, self.table.values[name])
        ]
        block = self._block([self.label, *others]) if self.selection.label_key and self.label else ()
        if self.label in block:
            notes.append(
                f"column {self.label} is one of several of which each row has one: "
                f"--label-key {','.join(block)} takes each as a class"
            )
        return notes

    def _label_beside(self, flags: Iterable[str]) -> str | None:
        if self._classes:
            return None
        if self._named_label:
            return self._named_label
        left = self._left(flags)
        classes = [name for name in left if self.table.kinds[name] == "classes"]
        left = [name for name in left if self.table.kinds[name] != "images"]
        return classes[0] if len(classes) == 1 else left[0] if len(left) == 1 else None

    def _one_hot_beside(self, flags: Iterable[str]) -> tuple[str, ...]:
        """All that is left, if it holds 0 and 1 alone; else the columns of 0 and 1 of which each row has one."""
        if self._classes:
            return self._classes
        left = self._left(flags)
        block = [name for name in left if self._is_indicator(name)]
        return tuple(left) if len(left) > 1 and len(block) == len(left) else self._block(block)

    def _block(self, names: Iterable[str]) -> tuple[str, ...]:
        """Those of the columns that hold 0 and 1 alone, if each row has a 1 in one of them, and not all in the same."""
        block = tuple(name for name in names if self._is_indicator(name))
        if len(block) < 2 or not self._has_one_class_a_row(block):
            return ()
        return block if sum(any(_number(v) == 1 for v in self.table.values[name]) for name in block) > 1 else ()

    def _is_indicator(self, name: str) -> bool:
        if name not in self._indicators:
            kind = self.table.kinds[name]
            self._indicators[name] = kind in ("text", "number") and _is_indicator(self.table.values[name])
        return self._indicators[name]

    @cached_property
    def _classes(self) -> tuple[str, ...]:
        return _selected_classes(self.table, self.selection)

    def _has_one_class_a_row(self, classes: Sequence[str]) -> bool:
        rows = zip(*(self.table.values[name] for name in classes), strict=True)
        return all([_number(value) for value in row].count(1.0) == 1 for row in rows)

    def _left(self, flags: Iterable[str]) -> list[str]:
        left = [name for name in self.table.kinds if name not in (self.image, *self.names_of_splits, *flags)]
        return [name for name in left if _plain(name) not in _ROW_NUMBERS]

    @cached_property
    def _named_label(self) -> str | None:
        """By its name. What is called label or class is it; of others those that tell no splits come first."""
        if self._classes:
            return None
        if self.selection.label_key:
            return self.selection.label_key
        kinds = self.table.kinds
        taken = (self.image, self.selection.split_key)
        candidates = [name for name in kinds if name not in taken and kinds[name] != "images"]
        other = [name for name in candidates if name not in self._like_splits]
        return _by_name(candidates, _LABEL_NAMES[:_SURE_LABEL_NAMES]) or _by_name(other or candidates, _LABEL_NAMES)

    @cached_property
    def _like_splits(self) -> list[str]:
        texts = [name for name in self.table.of_kind("text", "classes") if name != self.image]
        return [name for name in texts if tells_splits(name, self.table.values[name])]


def has_label(names: Iterable[str]) -> bool:
    """Whether one of the columns has a usual name of a label."""
    return _by_name(names, _LABEL_NAMES) is not None


def one_hot_labels(table: Table, names: Sequence[str], where: Sequence[str]) -> list[str | None]:
    """The class of each row: the name of the column that has 1; None where none has.

    where: each row for messages. Raises DataError for a row with several.
    """
    labels: list[str | None] = []
    for row_name, row in zip(where, zip(*(table.values[name] for name in names), strict=True), strict=True):
        classes = [name for name, value in zip(names, row, strict=True) if _number(value) == 1]
        if len(classes) > 1:
            raise DataError(
                f"{row_name} has {len(classes)} labels: {', '.join(classes)}",
                "several labels a picture are not supported",
                "keep one, or name the columns of the classes by --label-key a,b, or a column with one label",
            )
        labels.append(classes[0] if classes else None)
    return labels


def _by_name(columns: Iterable[str], names: Sequence[str]) -> str | None:
    """The first column with one of the names, which are in order of preference."""
    by_plain = {_plain(column): column for column in reversed(list(columns))}
    return next((by_plain[name] for name in names if name in by_plain), None)


def _plain(name: str) -> str:
    return re.sub("[^a-z0-9]", "", name.casefold())


def _is_indicator(values: Sequence[Any]) -> bool:
    """Whether all values are 0, 1 or blank, and some are not blank."""
    return all(_number(value) in (0, 1, None) for value in values) and any(_number(v) is not None for v in values)


def _number(value: Any) -> float | None:
    """None for a blank, NaN for what is no number."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    try:
        return float(value)
    except (TypeError, ValueError):
        return float("nan")
