"""Parts of messages: counts with their nouns, shortened lists of names, and suggestions for mistyped names."""

import difflib
from collections.abc import Iterable, Sequence


def plural(count: int | str, noun: str) -> str:
    """A count with its noun: 1 image, 2 images, 0 classes. A str is a number that is formatted already."""
    ending = "" if str(count) == "1" else "es" if noun.endswith(("s", "tch")) else "s"
    return f"{count} {noun}{ending}"


def shorten(names: Sequence[str], limit: int = 6, separator: str = ", ") -> str:
    """The first of many names, and how many follow."""
    rest = len(names) - limit
    return separator.join(names[:limit]) + (f"{separator}and {rest} more" if rest > 0 else "")


def similar_names(name: str, names: Iterable[str], most: int = 1, cutoff: float = 0.6) -> list[str]:
    """The names that are most like one, the nearest first. cutoff: least similarity, of 1 for equal names."""
    return difflib.get_close_matches(name, list(dict.fromkeys(names)), n=most, cutoff=cutoff)


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """The question for a name that does not exist: "did you mean rho?"; "" where none is like it."""
    return "".join(f"did you mean {similar}?" for similar in similar_names(name, names))
