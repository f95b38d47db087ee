"""When a checkpoint is due."""

from types import SimpleNamespace

import pytest

from samtune.config.duration import Duration
from samtune.train import checkpointing
from samtune.train.checkpointing import CheckpointSaver


def made(every):
    config = SimpleNamespace(save_every=Duration.parse(every))
    return CheckpointSaver(
        SimpleNamespace(config=config, steps_per_epoch=10, total_steps=100, is_sharded=False), None, None
    )


@pytest.mark.parametrize(("every", "due"), [("4 steps", [4, 8, 12]), ("0.5 epochs", [5, 10]), ("6%", [6, 12])])
def test_steps_are_counted_from_the_beginning_of_the_run(every, due):
    """So that a run that goes on saves after the same steps."""
    assert [step for step in range(1, 13) if made(every).due(step)] == due


def test_minutes_are_counted_from_the_last_save(monkeypatch):
    now = 1000.0
    monkeypatch.setattr(checkpointing.time, "monotonic", lambda: now)
    chosen = made("10 minutes")
    now += 599
    assert not chosen.due(7)
    now += 1
    assert chosen.due(7)
