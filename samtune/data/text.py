"""Counts and lists of names as parts of messages."""

from collections.abc import Sequence


def plural(count: int, noun: str) -> str:
    """A count with its noun: 1 picture, 2 pictures."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def shorten(names: Sequence[str], limit: int = 6, separator: str = ", ") -> str:
    """The first of many names, and how many follow."""
    rest = len(names) - limit
    return separator.join(names[:limit]) + (f"{separator}and {rest} more" if rest > 0 else "")
