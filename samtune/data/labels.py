"""Labels -> class indices: what the classes are, and which class each row has."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from samtune.errors import DataError, plural, shorten
from samtune.files import natural_key, readable


@dataclass(frozen=True)
class Labels:
    """The labels of a split as they are stored.

    names: the class names, where the data set declares them and values are positions in it; else None.
    values: (n,) text, numbers or other. are_names: whether each value is a name, also "-1", as those of folders are.
    """

    names: tuple[str, ...] | None
    values: Sequence[Any]
    are_names: bool = False

    @property
    def hidden(self) -> bool:
        """Whether all are missing, as in the test split of a competition."""
        return all(map(self.lacks, self.values))

    def lacks(self, value: Any) -> bool:
        """Whether a value means that there is no label."""
        return not self.are_names and is_missing(value)


@dataclass(frozen=True)
class Classified:
    """Labels as indices of classes.

    indices: (n,) int64 in [-1, classes); -1 for a label that is missing or no class. unlabelled: rows whose label is
    missing. unknown: rows of each class that is none of those asked for.
    """

    indices: npt.NDArray[np.int64]
    unlabelled: int
    unknown: Mapping[str, int]


def is_missing(value: Any) -> bool:
    """Whether a label is None, blank, -1 (number or text) or NaN."""
    return value in (None, "", -1, "-1") or value != value


def strip_blanks(column: str, values: Sequence[Any]) -> tuple[list[Any], list[str]]:
    """The values of a column without the blanks around them, and a note where that changes some."""
    stripped = [value.strip() if isinstance(value, str) else value for value in values]
    changed = [old for old, new in zip(values, stripped, strict=True) if isinstance(old, str) and old != new]
    if not changed:
        return stripped, []
    rows = plural(len(changed), "row")
    return stripped, [f"column {column}: blanks around the values of {rows} are left out, as {readable(changed[0])!r}"]


def class_names(train: Sequence[Labels]) -> tuple[str, ...]:
    """The classes of a data set, from the parts of its train split: declared names, else the distinct labels in order.

    Numbers are ordered as numbers, text as text, and digits inside text as numbers too. Declared names keep the order
    of the first part.
    """
    declared = [readable(name) for part in train for name in part.names or ()]
    values = {
        value for part in train if part.names is None for value in part.values if part.are_names or _is_class(value)
    }
    if declared:
        values = {value for value in values if isinstance(value, str)}  # numbers are positions then
    ordered = sorted({readable(str(value)) for value in values}, key=natural_key)
    return tuple(dict.fromkeys([*declared, *ordered]))


def _is_class(value: Any) -> bool:
    """Whether a label that is not declared can mean a class: text or a count, not a blank, NaN or -1."""
    return (isinstance(value, str) and not is_missing(value)) or (isinstance(value, int) and value >= 0)


def classify(labels: Labels, classes: Sequence[str], declared: Sequence[str] | None) -> Classified:
    """The class of each row: equal names are one class, whatever a split's own order.

    declared: the names that the train split of the data set declares, if it does; bare numbers of other splits are
    positions in them, else names themselves.
    """
    index = {readable(name): i for i, name in enumerate(classes)}
    names = labels.names if labels.names is not None else declared
    distinct = {value for value in labels.values if isinstance(value, str | int)}
    index_of = {value: index.get(_name(labels, value, names) or "", -1) for value in distinct}
    indices = np.asarray([index_of[v] if isinstance(v, str | int) else -1 for v in labels.values], dtype=np.int64)
    rows = np.flatnonzero(indices < 0).tolist()
    missing = sum(labels.lacks(labels.values[row]) for row in rows)
    others = [labels.values[row] for row in rows if not labels.lacks(labels.values[row])]
    return Classified(indices, missing, Counter(_name(labels, value, names) or repr(value) for value in others))


def _name(labels: Labels, value: Any, names: Sequence[str] | None) -> str | None:
    """The name of the class that a label means; None for what is no class."""
    if labels.are_names:
        return readable(value)
    if names is not None and isinstance(value, int):
        return readable(names[value]) if 0 <= value < len(names) else None
    return readable(str(value)) if _is_class(value) else None


def check(labels: Labels, classified: Classified, split: str, classes: Sequence[str], on_unlabelled: str) -> None:
    """Raise DataError for the first row of an unknown class, or without a label if on_unlabelled is "error"."""
    skips = on_unlabelled != "error"
    if not classified.unknown and (skips or not classified.unlabelled):
        return
    rows = np.flatnonzero(classified.indices < 0).tolist()
    row = next(row for row in rows if not (skips and labels.lacks(labels.values[row])))
    value = labels.values[row]
    if labels.names is not None and isinstance(value, int) and 0 <= value < len(labels.names):
        value = labels.names[value]
    cause = f"train has {len(classes)} classes: {shorten(classes)}"
    same = next((name for name in classes if str(value).casefold() == name.casefold()), None)
    cause += f"; {same} is written otherwise" if same else ""
    if labels.are_names:
        message = f"class folder {readable(value)} of split {split} is no class of train"
        raise DataError(message, cause, "rename the folder, or take it away")
    skip = f"; --on-unlabelled skip leaves out the {classified.unlabelled} rows without a label"
    raise DataError(
        f"row {row} of split {split} has the label {value!r}, which is no class",
        cause,
        "fix or remove the row; labels count from 0" + (skip if labels.lacks(value) else ""),
    )
