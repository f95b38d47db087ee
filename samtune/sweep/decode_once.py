"""The images of a sweep: how many there are to train on, and how they are decoded once for all runs."""

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

_LOOK = 1.0  # seconds
_ROWS = tuple(RunConfig.settings(affects="rows") | RunConfig.settings(affects="images"))


def images_to_train_on(read: Callable[[RunConfig], int]) -> Callable[[RunConfig], int]:
    """The same, asked once for each choice of rows."""
    known: dict[tuple[Any, ...], int] = {}

    def rows(config: RunConfig) -> int:
        key = tuple(getattr(config, name) for name in _ROWS)
        if key not in known:
            known[key] = read(config)
        return known[key]

    return rows


def listed(config: RunConfig) -> int:
    """How many images a run would train on, by the data set's table of contents: no image is read."""
    return len(open_run_splits(config).train_rows)


def prepared(config: RunConfig) -> int:
    """The same, with all images decoded into the cache, once for all runs."""
    return len(load_run_data(config).train_rows)


@contextmanager
def alone_here(folder: Path) -> Iterator[None]:
    """One process of a machine at a time decodes; the others wait, and find it done."""
    place = folder / "logs" / f"data-{socket.gethostname()}"
    place.mkdir(exist_ok=True)
    held = None
    while held is None:
        who = lock.holder(place)
        if who is not None:
            console.info(f"{who} is decoding the images; waiting for it")
        while lock.holder(place) is not None:
            time.sleep(_LOOK)
        held = lock.try_acquire(place)
    try:
        yield
    finally:
        held.release()
