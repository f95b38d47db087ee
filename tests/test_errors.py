"""Messages count in good English, and find the name that was meant."""

import pytest

from samtune.config.duration import Duration
from samtune.errors import did_you_mean, plural, shorten, similar_names


@pytest.mark.parametrize(
    ("count", "noun", "text"),
    [
        (0, "image", "0 images"),
        (1, "image", "1 image"),
        (2, "class", "2 classes"),
        (1, "pass", "1 pass"),
        (3, "micro-batch", "3 micro-batches"),
        ("1", "epoch", "1 epoch"),
        ("1.5", "epoch", "1.5 epochs"),
    ],
)
def test_a_count_stands_with_its_noun_in_the_right_number(count, noun, text):
    assert plural(count, noun) == text


@pytest.mark.parametrize(
    ("count", "text"), [(2, "a, b"), (3, "a, b, c"), (4, "a, b, c, and 1 more"), (6, "a, b, c, and 3 more")]
)
def test_of_many_names_the_first_are_shown_and_the_others_counted(count, text):
    assert shorten("abcdef"[:count], 3) == text


@pytest.mark.parametrize(
    ("given", "text", "stored"),
    [
        ("1 epochs", "1 epoch", "1 epochs"),
        ("1 steps", "1 step", "1 steps"),
        ("1%", "1%", "1%"),
        (2, "2 epochs", "2 epochs"),
    ],
)
def test_a_duration_is_stored_in_one_form_and_shown_in_good_english(given, text, stored):
    duration = Duration.parse(given)
    assert (str(duration), duration.to_recipe()) == (text, stored)
    assert Duration.parse(text) == Duration.parse(stored) == duration


def test_the_nearest_names_are_found_and_none_is_invented():
    assert did_you_mean("rhoo", ["lr", "rho"]) == "did you mean rho?"
    assert did_you_mean("xyz", ["lr", "rho"]) == ""
    assert similar_names("reprot", ["export", "report", "report"], 2) == ["report", "export"]
