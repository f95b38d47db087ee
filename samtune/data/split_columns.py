"""Columns that tell in which split each row is: by names of splits, or by flags such as is_test."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from samtune.data.names import readable
from samtune.data.roles import ROLES, UNLABELLED, Wanted, parse, role_of, roles_beside
from samtune.errors import DataError

_MOST = 50  # values of a column that may be names of splits; paths and words of a language are more
_MOST_NUMBERS = 5  # of splits that are numbers
_NAMES = {"set", "subset", "partition", "phase", "usage", "stage", "dataset_split", "data_split"}
_NUMBERED = {"subset", "partition", "dataset_split", "data_split"}  # of these, numbers are splits that have no name
_NO_SPLIT = {
    *("", "none", "na", "nan", "null", "unused", "notused", "ignore", "ignored", "exclude", "excluded", "nosplit"),
}
_FLAGS = {"0": False, "0.0": False, "1": True, "1.0": True}
_FLAGS |= {"": False, "none": False, "false": False, "f": False, "no": False, "n": False}
_FLAGS |= {"true": True, "t": True, "yes": True, "y": True}
_WORDS_OF_FLAGS = {"is", "in", "for", "use", "used", "flag"}  # is_training_image, used_for_test


def tells_splits(column: str, values: Sequence[Any]) -> bool:
    """Whether these are names of splits: all of them, or one of train beside one of validation or test.

    In a column that is called subset, or the like, one of them is enough; or numbers, which are then asked about.
    """
    distinct: set[str] = set()
    for value in values:
        distinct.add(str(value))
        if len(distinct) > _MOST:
            return False
    names = {value for value in distinct if not _says_no_split(value)}
    if not names:
        return False
    if (
        _plain(column) in _NUMBERED
        and 1 < len(names) <= _MOST_NUMBERS
        and all(re.fullmatch(r"\d(\.0)?", n) for n in names)
    ):
        return True
    told = set(roles_beside(names).values()) & set(ROLES)
    return not _unknown(names) or bool(told and (("train" in told and len(told) > 1) or _plain(column) in _NAMES))


def role_of_flag(name: str, values: Callable[[], Sequence[Any]]) -> str | None:
    """The role of which a column of yes and no speaks: is_test, isTrain, val, used_for_training. A blank is no.

    values: its values, which are read where its name says so. What is valid in most rows is a picture that is sound.
    Raises DataError where only the name is that of a flag.
    """
    role, rest = parse(re.sub("^is", "", name, flags=re.IGNORECASE))
    if role not in ROLES or not set(rest) <= _WORDS_OF_FLAGS:
        return None
    found = Counter(_plain(value) for value in values())
    if set(found) == {""} or not set(found) <= set(_FLAGS):
        if is_sure_flag(name) and set(found) != {""} and not tells_splits(name, values()):
            odd = next(value for value in found if value not in _FLAGS)
            raise DataError(
                f"column {name} speaks of a split, and has the value {odd!r}",
                "a flag is 0 or 1, false or true",
                "mend or remove the column, or name another that tells the splits by --split-key",
            )
        return None
    count = sum(number for value, number in found.items() if _FLAGS[value])
    is_soundness = "valid" in name.casefold() and "validation" not in name.casefold() and 2 * count > len(values())
    return None if is_soundness else role


def is_sure_flag(name: str) -> bool:
    """Whether a name says that its column is a flag: is_train, where train alone may be a class."""
    return bool(re.match("is|in_|for_|use|flag", name, re.IGNORECASE) or re.search("flag$", name, re.IGNORECASE))


def split_of_rows(
    dataset: str, columns: Sequence[str], values: Mapping[str, Sequence[Any]], where: Sequence[str], wanted: Wanted
) -> tuple[list[str | None], list[str]]:
    """The split of each row, None for one in no split, and what is to be said of it.

    columns: one with names of splits, or flags. where: a row's place in words. A row without a flag is of train, or of
    test where train has a flag. Raises DataError for values that cannot be told, and where no row is in a split.
    """
    flags = _flags_among(columns, values, wanted)
    of_row = _by_flags(flags, values, where) if flags else _by_names(dataset, columns[0], values[columns[0]], wanted)
    told = f"column {columns[0]} tells" if len(columns) == 1 else f"columns {', '.join(columns)} tell"
    sizes = Counter(split for split in of_row if split is not None)
    notes = []
    if tuple(columns) != ("split",):
        notes.append(f"{told} the splits: {', '.join(f'{readable(name)} {size}' for name, size in sizes.items())}")
    left_out = [row for row, split in enumerate(of_row) if split is None]
    if left_out:
        seen = Counter(str(values[columns[0]][row] or "") for row in left_out)
        example = "no flag" if flags else ", ".join(f"{readable(value)!r} {count}" for value, count in seen.items())
        notes.append(f"{len(left_out)} of {len(of_row)} rows are in no split and left out ({columns[0]}: {example})")
    if not sizes:
        raise DataError(f"no row of data set {dataset} is in a split", "; ".join(notes), "fill the column in")
    return of_row, notes


def _flags_among(columns: Sequence[str], values: Mapping[str, Sequence[Any]], wanted: Wanted) -> dict[str, str]:
    """Column -> role of columns that are flags; not where a split is asked for by the value itself."""
    asked = {name for names in wanted.splits.values() for name in names}
    roles = {name: role_of_flag(name, partial(values.__getitem__, name)) for name in columns}
    flags = {name: role for name, role in roles.items() if role is not None}
    return {} if asked & {str(value) for name in flags for value in values[name]} else flags


def _by_flags(flags: Mapping[str, str], values: Mapping[str, Sequence[Any]], where: Sequence[str]) -> list[str | None]:
    without = next((role for role in ("train", "test") if role not in flags.values()), None)
    of_row: list[str | None] = []
    for place, row in zip(where, zip(*(values[name] for name in flags), strict=True), strict=True):
        there = [name for name, value in zip(flags, row, strict=True) if _FLAGS[_plain(value)]]
        if len(there) > 1:
            raise DataError(
                f"{place} is in {len(there)} splits: {', '.join(there)}", mend="mend the row, or name one --split-key"
            )
        of_row.append(flags[there[0]] if there else without)
    return of_row


def _by_names(dataset: str, column: str, values: Sequence[Any], wanted: Wanted) -> list[str | None]:
    asked = {name for names in wanted.splits.values() for name in names}
    texts = [str(value) for value in values]
    no_split = {text for text in set(texts) if _says_no_split(text) and text not in asked}
    of_row = [None if text in no_split else text for text in texts]
    names = [name for name in of_row if name is not None]
    unknown = [name for name in _unknown(names) if name not in asked]
    if unknown and wanted.split_key is None and column != "split":
        raise DataError(
            f"column {column} of data set {dataset} tells the splits, and {unknown[0]!r} is the name of none",
            "its values: " + ", ".join(f"{name} {count}" for name, count in Counter(names).most_common(12)),
            f"--split-key {column} takes each value as a split of its own; --train-split, --val-split and --test-split "
            "say which are used (train+extra joins two)",
        )
    return of_row


def _unknown(names: Iterable[str]) -> list[str]:
    """Names that tell no role, neither alone nor beside the others."""
    return [name for name, role in roles_beside(names).items() if not {role, role_of(name)} & set(ROLES)]


def _says_no_split(text: str) -> bool:
    return re.sub("[^a-z0-9]", "", text.casefold()) in _NO_SPLIT or parse(text)[0] == UNLABELLED


def _plain(value: Any) -> str:
    return "" if value is None or value != value else str(value).strip().casefold()
