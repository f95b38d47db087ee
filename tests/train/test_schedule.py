"""Durations, the learning rate and rho."""

import itertools

import pytest

from samtune.config import loading
from samtune.config.duration import Duration
from samtune.train.batch_plan import BatchPlan
from samtune.train.schedule import RhoSchedule, TrainingLength, cosine, warmup


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


@pytest.mark.parametrize(
    "text", ["8 epochs", "2000000 steps", "123456.7 steps", "0.1234567%", "0.00000001%", "10 minutes"]
)
def test_a_duration_prints_as_it_is_read(text):
    assert str(Duration.parse(text)) == text


def test_the_cosine_falls_from_one_to_zero():
    factors = [cosine(step, total_steps=100) for step in range(101)]
    assert factors[0] == 1
    assert factors[50] == pytest.approx(0.5)
    assert factors[100] == pytest.approx(0)
    assert factors == sorted(factors, reverse=True)


def test_a_run_of_1800_epochs_is_one_cosine_whose_rate_at_a_step_follows_from_the_step_alone():
    """So a run that is resumed after any epoch has the rates of one that was not interrupted."""
    config = loading.load(None, {"model": "m", "dataset": "d", "epochs": 1800, "batch_size": 256, "warmup_epochs": 0})
    length = TrainingLength.of(config, BatchPlan.of(config, 1, 45_000), 45_000)
    assert (length.steps_per_epoch, length.total_steps, length.warmup_steps) == (175, 315_000, 0)
    assert len(length.rho.sam_steps) == length.total_steps
    epochs = [cosine(epoch * 175, length.total_steps) for epoch in range(1801)]
    assert all(later < earlier for earlier, later in itertools.pairwise(epochs))
    assert epochs[900] == pytest.approx(0.5)
    assert epochs[1800] == 0
    last = [cosine(step, length.total_steps) for step in range(314_990, 315_000)]
    assert all(later < earlier for earlier, later in itertools.pairwise(last))
    assert last[-1] > 0


def test_a_warmup_rises_evenly_from_its_first_step_and_stays():
    assert [warmup(step, 4) for step in range(6)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1, 1])
    assert warmup(0, 0) == 1


def radii(**options):
    schedule = RhoSchedule(peak=0.1, total_steps=10, **options)
    return [round(schedule(step), 6) for step in range(10)]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0.1] * 10),
        ({"every": 1}, [0.1] * 10),
        ({"every": 3}, [0.1, 0, 0] * 3 + [0.1]),
        ({"start": 7}, [0] * 7 + [0.1] * 3),
        ({"end": 3}, [0.1] * 3 + [0] * 7),
        ({"start": 2, "end": 7, "every": 2}, [0, 0, 0.1, 0, 0.1, 0, 0.1, 0, 0, 0]),
        ({"shape": "linear"}, [0.1, 0.09, 0.08, 0.07, 0.06, 0.05, 0.04, 0.03, 0.02, 0.01]),
        ({"shape": "linear", "final": 0.2, "start": 5}, [0] * 5 + [0.1, 0.12, 0.14, 0.16, 0.18]),
        ({"shape": "cosine", "start": 4, "end": 8}, [0] * 4 + [0.1, 0.085355, 0.05, 0.014645, 0, 0]),
        ({"shape": "lr"}, [round(0.1 * cosine(step, 10), 6) for step in range(10)]),
        ({"warmup_steps": 4}, [0.02, 0.04, 0.06, 0.08] + [0.1] * 6),
    ],
)
def test_rho_at_each_step(options, expected):
    assert radii(**options) == pytest.approx(expected)


def test_a_rho_of_zero_is_no_sam_at_any_step():
    assert not any(RhoSchedule(peak=0.0, total_steps=10)(step) for step in range(10))
