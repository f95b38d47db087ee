"""Durations and the learning rate."""

import pytest

from samtune.schedules import Duration, cosine_with_warmup


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


def test_the_learning_rate_warms_up_peaks_and_falls_to_zero():
    factors = [cosine_with_warmup(step, total_steps=100, warmup_steps=10) for step in range(101)]
    assert factors[0] == pytest.approx(1 / 11)
    assert factors[10] == 1
    assert factors[55] == pytest.approx(0.5)
    assert factors[100] == pytest.approx(0)
    assert factors[:11] == sorted(factors[:11])
    assert factors[10:] == sorted(factors[10:], reverse=True)


def test_without_warmup_the_first_step_has_the_full_rate():
    assert cosine_with_warmup(0, total_steps=3, warmup_steps=0) == 1
