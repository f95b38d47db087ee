"""The images of a sweep: how many there are to train on, and their decoding, once for all runs."""

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from samtune import console
from samtune.config.run_config import RunConfig
from samtune.data.splits import open_run_splits
from samtune.runs import lock
from samtune.train.run_data import load_run_data

_POLL = 1.0  # seconds
_ROWS = tuple(RunConfig.settings(affects="rows") | RunConfig.settings(affects="images"))


def count_once(count: Callable[[RunConfig], int]) -> Callable[[RunConfig], int]:
    """Cache a count of training images for each combination of the settings that decide it."""
    counts: dict[tuple[Any, ...], int] = {}

    def cached(config: RunConfig) -> int:
        key = tuple(getattr(config, name) for name in _ROWS)
        if key not in counts:
            counts[key] = count(config)
        return counts[key]

    return cached


def count_listed(config: RunConfig) -> int:
    """Number of images a run would train on, by the listing of the data set: no image is read."""
    return len(open_run_splits(config).train_rows)


def count_decoded(config: RunConfig) -> int:
    """Number of images a run trains on; decodes all images into the cache."""
    config = config.derive("bootstrap", False, "both of its trainings have the same images")
    return len(load_run_data(config).train_rows)


@contextmanager
def one_per_machine(folder: Path) -> Iterator[None]:
    """Let one process of a machine at a time decode the images of a sweep folder; others wait."""
    slot = folder / "logs" / f"data-{socket.gethostname()}"
    slot.mkdir(exist_ok=True)
    held = None
    while held is None:
        holder = lock.holder(slot)
        if holder is not None:
            console.info(f"{holder} is decoding the images; waiting for it")
        while lock.holder(slot) is not None:
            time.sleep(_POLL)
        held = lock.try_acquire(slot)
    try:
        yield
    finally:
        held.release()
