"""Columns -> class indices: which columns hold images and labels, what the classes are, which class each row has."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from samtune.errors import DataError, UsageError

# Columns that are looked for, in this order; then a column that is the only one of its kind.
_IMAGE_COLUMNS = ("image", "img")
_LABEL_COLUMNS = ("label", "labels", "fine_label")


@dataclass(frozen=True)
class Labels:
    """The labels of a split as they stand there.

    names: the class names, where the data set declares them and values are positions in it; else None.
    values: (n,) text, numbers or whatever else was found.
    """

    names: tuple[str, ...] | None
    values: Sequence[Any]

    @property
    def hidden(self) -> bool:
        """Whether none is told, as in the test split of a competition: all are -1, NaN or blank."""
        return all(value in (None, "", -1) or value != value for value in self.values)


def find_columns(
    dataset: str, there: Mapping[str, str], image_key: str | None, label_key: str | None
) -> tuple[str, str]:
    """(image column, label column) of a table with these columns: name -> kind ("Image", "ClassLabel", ...).

    Raises UsageError for a key that is no column, DataError where none can be found; both list the columns.
    """
    for flag, key in (("--image-key", image_key), ("--label-key", label_key)):
        if key is not None and key not in there:
            raise UsageError(
                f"{flag} {key}: data set {dataset} has no such column", mend=f"its columns: {', '.join(there)}"
            )
    image = image_key or _find(there, _IMAGE_COLUMNS, "Image")
    label = label_key or _find(there, _LABEL_COLUMNS, "ClassLabel")
    if image is None or label is None:
        kind, flag = ("image", "--image-key") if image is None else ("label", "--label-key")
        raise DataError(
            f"data set {dataset} has no {kind} column that can be told",
            f"its columns: {', '.join(there)}",
            f"name it by {flag}; a folder of pictures needs two class folders or more",
        )
    return image, label


def _find(there: Mapping[str, str], names: Sequence[str], kind: str) -> str | None:
    by_name = [name for name in names if name in there]
    of_kind = [name for name, its_kind in there.items() if its_kind == kind]
    return by_name[0] if by_name else of_kind[0] if len(of_kind) == 1 else None


def class_names(train: Sequence[Labels]) -> tuple[str, ...]:
    """The classes of a data set, from the parts of its train split: declared names, else the distinct labels in order.

    Numbers are ordered as numbers, text as text. Declared names keep the order of the first part.
    """
    declared = [name for part in train for name in part.names or ()]
    values = {value for part in train if part.names is None for value in part.values if _is_class(value)}
    if declared:
        values = {value for value in values if isinstance(value, str)}  # numbers are positions then
    ordered = sorted(values, key=lambda value: (isinstance(value, str), value))
    return tuple(dict.fromkeys([*declared, *map(str, ordered)]))


def _is_class(value: Any) -> bool:
    """Whether a label that is not declared can mean a class: text or a count, not a blank, NaN or -1."""
    return (isinstance(value, str) and value != "") or (isinstance(value, int) and value >= 0)


def to_classes(labels: Labels, split: str, classes: tuple[str, ...], declared: bool) -> npt.NDArray[np.int64]:
    """Class index of each row, (n,) int64 in [0, len(classes)): equal names are one class, whatever a split's order.

    declared: whether train declares its names; bare numbers of other splits are positions then, else names themselves.
    Raises DataError with the first row whose label is no class of train.
    """
    index = {name: i for i, name in enumerate(classes)}
    names = labels.names if labels.names is not None else classes if declared else None
    positions = None if names is None else [index.get(name, -1) for name in names]

    def to_class(value: Any) -> int:
        if positions is not None and isinstance(value, int):
            return positions[value] if 0 <= value < len(positions) else -1
        return index.get(str(value), -1) if _is_class(value) else -1

    found = np.asarray([to_class(value) for value in labels.values], dtype=np.int64)
    if (found < 0).any():
        row = int(np.argmax(found < 0))
        value = labels.values[row]
        if labels.names is not None and isinstance(value, int) and 0 <= value < len(labels.names):
            value = labels.names[value]
        some = ", ".join(classes[:6]) + (", ..." if len(classes) > 6 else "")
        raise DataError(
            f"row {row} of split {split} has the label {value!r}, which is no class",
            f"train has {len(classes)} classes: {some}",
            "mend or remove the row; labels count from 0",
        )
    return found
