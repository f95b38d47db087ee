"""Signals that end a block by an error."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class OutOfTime(BaseException):
    """A block has taken too long."""


class Ended(BaseException):
    """This process was asked to end."""


@contextmanager
def raising(number: signal.Signals, error: type[BaseException]) -> Iterator[None]:
    """In the block, the signal raises the error."""

    def handle(*_: Any) -> None:
        raise error

    before = signal.signal(number, handle)
    try:
        yield
    finally:
        signal.signal(number, before)


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """In the block, OutOfTime is raised after so many seconds."""
    with raising(signal.SIGALRM, OutOfTime):
        signal.setitimer(signal.ITIMER_REAL, seconds, 5.0)  # again, in case that the first one meets a destructor
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
