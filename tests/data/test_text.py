"""Counts and lists of names in messages."""

import pytest

from samtune.text import plural, shorten


@pytest.mark.parametrize(
    ("count", "text"), [(2, "a, b"), (3, "a, b, c"), (4, "a, b, c, and 1 more"), (6, "a, b, c, and 3 more")]
)
def test_of_many_names_the_first_are_shown_and_the_others_counted(count, text):
    assert shorten("abcdef"[:count], 3) == text


@pytest.mark.parametrize(("count", "text"), [(0, "0 pictures"), (1, "1 picture"), (2, "2 pictures")])
def test_a_count_agrees_with_its_noun(count, text):
    assert plural(count, "picture") == text
