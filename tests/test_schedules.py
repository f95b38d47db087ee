"""Durations and the learning rate."""

import pytest

from samtune.schedules import Duration, cosine, warmup


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        (8, 80),
        (1.5, 15),
        ("8", 80),
        ("8 epochs", 80),
        ("1 epoch", 10),
        ("5000 steps", 5000),
        ("20%", 40),
        (" 2.5 % ", 5),
    ],
)
def test_durations_become_steps(text, steps):
    assert Duration.parse(text).steps(steps_per_epoch=10, total_steps=200) == steps


@pytest.mark.parametrize("text", ["", "ten", "-3", "3 hours", "1e3 steps", True, None])
def test_what_is_no_duration_is_refused(text):
    with pytest.raises(ValueError, match="epochs"):
        Duration.parse(text)


@pytest.mark.parametrize("text", ["8 epochs", "5000 steps", "2.5%"])
def test_a_duration_prints_as_it_is_read(text):
    assert str(Duration.parse(text)) == text


def test_the_cosine_falls_from_one_to_zero():
    factors = [cosine(step, total_steps=100) for step in range(101)]
    assert factors[0] == 1
    assert factors[50] == pytest.approx(0.5)
    assert factors[100] == pytest.approx(0)
    assert factors == sorted(factors, reverse=True)


def test_a_warmup_rises_evenly_from_its_first_step_and_stays():
    assert [warmup(step, 4) for step in range(6)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1, 1])
    assert warmup(0, 0) == 1
