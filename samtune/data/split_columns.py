"""Columns that tell in which split each row is: by names of splits, or by flags such as is_test."""

import re
import shlex
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from samtune.data.split_roles import ROLES, UNLABELLED, DataSelection, parse, role_of, roles_beside, words_of
from samtune.errors import DataError
from samtune.files import readable

_MOST = 50  # values of a column that may be names of splits; paths and words of a language are more
_MOST_UNNAMED = 5  # splits of names that say nothing, as 0, 1 and 2
_NAMES = {"split", "set", "subset", "partition", "phase", "usage", "stage"}
_SURE_NAMES = {"split", "subset", "partition"}  # also beside other words: official_split
_BESIDE_NAMES = {"is", "in", "for", "use", "used", "flag", "or", "and", "id", "name", "data"}
_SHORT = {"tr": "train", "va": "validation", "te": "test"}  # in a column with such a name
_BLANK = {"", "none", "na", "nan", "null"}
_NO_SPLIT = {*_BLANK, "unused", "notused", "ignore", "ignored", "exclude", "excluded", "nosplit"}
_FLAGS = {"0": False, "0.0": False, "1": True, "1.0": True}
_FLAGS |= {"false": False, "f": False, "no": False, "n": False}
_FLAGS |= {"true": True, "t": True, "yes": True, "y": True}
_WORDS_OF_FLAGS = {"is", "in", "for", "use", "used", "flag"}  # is_training_image, used_for_test


def tells_splits(column: str, values: Sequence[Any]) -> bool:
    """Whether these are names of splits: all of them, train or two roles among them; or train beside another role.

    In a column that is called subset, or the like, the name of one role is enough.
    """
    distinct = _distinct(values, _MOST)
    names = {value for value in distinct or () if not _says_no_split(value)}
    roles = set(roles_beside(names).values()) & set(ROLES)
    if is_called_split(column):
        return bool(roles)
    return (len(roles) > 1 and ("train" in roles or not _unknown(names))) or ("train" in roles and not _unknown(names))


def names_no_train(column: str, values: Sequence[Any]) -> bool:
    """Whether a column of any name has the name of a role that is not train's, and no other: a remark, or splits."""
    names = {value for value in _distinct(values, _MOST) or () if not _says_no_split(value)}
    roles = set(roles_beside(names).values())
    return not is_called_split(column) and not _unknown(names) and len(roles) == 1 and roles <= {"validation", "test"}


def may_tell_splits(column: str, values: Callable[[], Sequence[Any]]) -> bool:
    """Whether the name of a column speaks of splits, and its values are few: 2 to 5. They are asked about."""
    distinct = (_distinct(values(), _MOST_UNNAMED) if is_called_split(column) else None) or set()
    return len(distinct) > 1 and not all(map(_says_no_split, distinct))


def is_called_split(column: str) -> bool:
    """Whether a name speaks of splits and of nothing else: subset, set_id, train_or_test; or of a split: my_split."""
    roles, _ = words_of(column)
    rest = re.findall("[^\\W\\d_]+", re.sub("(?<=[a-z])(?=[A-Z])", " ", column).casefold())
    rest = [word if word in _NAMES else word.removesuffix("id") or word for word in rest]
    if _SURE_NAMES & set(rest):
        return True
    if "".join(rest).removesuffix("id") == "dataset":  # where a picture is from
        return False
    others = {word for word in rest if words_of(word)[1]} - _NAMES - _BESIDE_NAMES
    return not others and bool(_NAMES & set(rest) or {"train", "test"} & roles)


def _distinct(values: Sequence[Any], most: int) -> set[str] | None:
    """The values as text, all blanks as one; None where there are more."""
    texts: set[str] = set()
    distinct: set[str] = set()
    for value in values:
        text = str(value)
        if text not in texts:
            texts.add(text)
            distinct.add("" if _is_blank(text) else text.strip())
        if len(distinct) > most:
            return None
    return distinct


def role_of_flag(name: str, values: Callable[[], Sequence[Any]]) -> str | None:
    """The role of which a column of yes and no speaks: is_test, isTrain, val, used_for_training. A blank is no.

    values: its values, which are read where its name says so. What is valid in most rows is a picture that is sound.
    Raises DataError where only the name is that of a flag.
    """
    role, rest = parse(re.sub("^is", "", name, flags=re.IGNORECASE))
    if role not in ROLES or not set(rest) <= _WORDS_OF_FLAGS:
        return None
    counts = Counter(map(_plain, values()))
    counts = Counter({value: count for value, count in counts.items() if not _is_blank(value)})
    if not counts or not set(counts) <= set(_FLAGS):
        if is_sure_flag(name) and counts and not tells_splits(name, values()):
            odd = next(value for value in counts if value not in _FLAGS)
            raise DataError(
                f"column {name} speaks of a split, and has the value {odd!r}",
                "a flag is 0 or 1, false or true",
                "fix or remove the column, or name another that tells the splits by --split-key",
            )
        return None
    count = sum(number for value, number in counts.items() if _FLAGS[value])
    is_soundness = "valid" in name.casefold() and "validation" not in name.casefold() and 2 * count > len(values())
    return None if is_soundness else role


def is_sure_flag(name: str) -> bool:
    """Whether a name says that its column is a flag: is_train, where train alone may be a class."""
    return bool(re.match("is|in_|for_|use|flag", name, re.IGNORECASE) or re.search("flag$", name, re.IGNORECASE))


def split_of_rows(
    dataset: str,
    columns: Sequence[str],
    values: Mapping[str, Sequence[Any]],
    where: Sequence[str],
    selection: DataSelection,
) -> tuple[list[str | None], list[str]]:
    """The split of each row, None for one in no split, and notes.

    columns: one with names of splits, or flags. where: each row for messages. A row without a flag is of train, or of
    test where train has a flag. Raises DataError for values that cannot be roles, and where no row is in a split.
    """
    flags = _flags_among(columns, values, selection)
    notes: list[str] = []
    if flags:
        of_row = _by_flags(flags, values, where)
    else:
        of_row, notes = _by_names(dataset, columns[0], values[columns[0]], selection)
    subject = f"column {columns[0]} tells" if len(columns) == 1 else f"columns {', '.join(columns)} tell"
    sizes = Counter(split for split in of_row if split is not None)
    if tuple(columns) != ("split",):
        notes.append(f"{subject} the splits: {', '.join(f'{readable(name)} {size}' for name, size in sizes.items())}")
    left_out = [row for row, split in enumerate(of_row) if split is None]
    if left_out:
        seen = Counter(str(values[columns[0]][row] or "") for row in left_out)
        example = "no flag" if flags else ", ".join(f"{readable(value)!r} {count}" for value, count in seen.items())
        notes.append(f"{len(left_out)} of {len(of_row)} rows are in no split and left out ({columns[0]}: {example})")
    if not sizes:
        raise DataError(f"no row of data set {dataset} is in a split", "; ".join(notes), "fill the column in")
    return of_row, notes


def _flags_among(
    columns: Sequence[str], values: Mapping[str, Sequence[Any]], selection: DataSelection
) -> dict[str, str]:
    """Column -> role of columns that are flags; not where a split is asked for by the value itself."""
    asked = {name for names in selection.splits.values() for name in names}
    roles = {name: role_of_flag(name, partial(values.__getitem__, name)) for name in columns}
    flags = {name: role for name, role in roles.items() if role is not None}
    return {} if asked & {str(value) for name in flags for value in values[name]} else flags


def _by_flags(flags: Mapping[str, str], values: Mapping[str, Sequence[Any]], where: Sequence[str]) -> list[str | None]:
    without = next((role for role in ("train", "test") if role not in flags.values()), None)
    of_row: list[str | None] = []
    for row_name, row in zip(where, zip(*(values[name] for name in flags), strict=True), strict=True):
        set_flags = [name for name, value in zip(flags, row, strict=True) if _FLAGS.get(_plain(value))]
        if len(set_flags) > 1:
            message = f"{row_name} is in {len(set_flags)} splits: {', '.join(set_flags)}"
            raise DataError(message, hint="fix the row, or name one --split-key")
        of_row.append(flags[set_flags[0]] if set_flags else without)
    return of_row


def _by_names(
    dataset: str, column: str, values: Sequence[Any], selection: DataSelection
) -> tuple[list[str | None], list[str]]:
    """The split of each row, and notes. Names that differ in case are one split, unless both are asked for."""
    asked = {name for names in selection.splits.values() for name in names}
    texts = ["" if value is None else str(value).strip() for value in values]
    no_split = {text for text in set(texts) if _says_no_split(text) and text not in asked}
    of_row = [None if text in no_split else text for text in texts]
    one_name, notes = _one_name(column, dict.fromkeys(name for name in of_row if name is not None), asked)
    of_row = [one_name.get(name, name) if name is not None else None for name in of_row]
    names = [name for name in of_row if name is not None]
    unknown = [name for name in _unknown(names) if name not in asked]
    if unknown and selection.split_key is None and column != "split":
        every = shlex.quote("+".join(dict.fromkeys(one_name.get(text, text) for text in texts)))
        sizes = Counter(texts).most_common(12)
        key = f"--split-key {shlex.quote(column)}"
        raise DataError(
            f"column {column} of data set {dataset} tells the splits, and {unknown[0]!r} is the name of none",
            "its values: " + ", ".join(f"{name or repr(name)} {count}" for name, count in sizes),
            f"{key} takes each value as a split of its own; --train-split, --val-split and --test-split say which are "
            f"used (train+extra joins two); if it tells no splits, {key} --train-split {every} takes all rows",
        )
    return of_row, notes


def _one_name(column: str, splits: Collection[str], asked: set[str]) -> tuple[dict[str, str], list[str]]:
    """Name -> the name of its split, where that is another one, and notes: Train is train, tr is train beside te."""
    names: dict[str, str] = {}
    for text in {name.casefold(): None for name in splits}:
        forms = [name for name in splits if name.casefold() == text]
        chosen = [name for name in forms if name in asked]
        if len(chosen) < 2:
            one = (chosen or [name for name in forms if name == text] or forms)[0]
            names |= {name: one for name in forms if name != one}
    short = {name: _SHORT[name.casefold()] for name in splits if name.casefold() in _SHORT}
    are_roles = all(role_of(name) in ROLES for name in set(splits) - set(short))
    if are_roles and is_called_split(column) and not asked & set(splits):
        names |= short
    renamed = ", ".join(f"{readable(name)} is {readable(one)}" for name, one in names.items())
    return names, [f"column {column}: {renamed}"] if renamed else []


def _unknown(names: Iterable[str]) -> list[str]:
    """Names that tell no role, neither alone nor beside the others."""
    return [name for name, role in roles_beside(names).items() if not {role, role_of(name)} & set(ROLES)]


def _is_blank(text: str) -> bool:
    """Whether a value says nothing, as text: None, NaN, "", N/A."""
    return re.sub(r"[\W_]", "", text.casefold()) in _BLANK


def _says_no_split(text: str) -> bool:
    return re.sub(r"[\W_]", "", text.casefold()) in _NO_SPLIT or parse(text)[0] == UNLABELLED


def _plain(value: Any) -> str:
    return "" if value is None or value != value else str(value).strip().casefold()
