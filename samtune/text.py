"""Parts of messages: counts with their nouns, and names that are like one that was mistyped."""

import difflib
from collections.abc import Iterable


def plural(count: int | str, noun: str) -> str:
    """A count with its noun: 1 image, 2 images, 0 classes. A str is a number that is formatted already."""
    ending = "" if str(count) == "1" else "es" if noun.endswith(("s", "tch")) else "s"
    return f"{count} {noun}{ending}"


def similar_names(name: str, names: Iterable[str], most: int = 1, cutoff: float = 0.6) -> list[str]:
    """The names that are most like one, the nearest first. cutoff: least similarity, of 1 for equal names."""
    return difflib.get_close_matches(name, list(dict.fromkeys(names)), n=most, cutoff=cutoff)


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """The question for a name that does not exist: "did you mean rho?"; "" where none is like it."""
    return "".join(f"did you mean {similar}?" for similar in similar_names(name, names))
