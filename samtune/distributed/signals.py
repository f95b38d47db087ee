"""Signals that ask a run to end: the first one after this step, with a checkpoint; the second one at once."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from samtune.distributed import environment
from samtune.errors import Stopped

# Slurm sends SIGUSR1 some time before it ends a job (--signal=USR1@60); SIGHUP comes when the terminal is gone.
_HEARD = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
# Somebody does not want to wait. (When a terminal closes, shell and kernel send SIGHUP both.)
_AT_ONCE = (signal.SIGINT, signal.SIGTERM)


PARENT = "SAMTUNE_PARENT"
"""The process that a run belongs to, and without which it shall not go on."""
_LOOK = 0.5  # seconds


def end_with_the_parent() -> None:
    """If this process belongs to another one, it is asked to end as soon as that has gone."""
    if PARENT not in os.environ:
        return
    parent = int(os.environ.pop(PARENT))  # it is not the parent of what this process starts

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_LOOK)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="parent", daemon=True).start()


class Interrupted(BaseException):
    """Something is left undone that is done again when the run goes on."""


class StopRequest:
    """What signals have asked for so far.

    patient: whether the first signal is only remembered, as the run will look; otherwise it raises Stopped, too.
    saved: whether there is a checkpoint that a stopped run can go on from. agreed: whether all ranks know of a signal,
    though this one may have heard none.
    """

    def __init__(self) -> None:
        self.patient = False
        self.saved = False
        self.agreed = False
        self.by: signal.Signals | None = None

    def is_requested(self) -> bool:
        """Whether this process was asked to end."""
        return self.by is not None

    def end(self) -> NoReturn:
        """Raise Stopped as the first signal asked for: where all that was done is saved, or does not count."""
        by = self.by.name if self.by else "a signal to another rank"
        raise Stopped(f"stopped by {by}", Stopped.SAVED if self.saved else 128 + (self.by or signal.SIGTERM))

    def _hear(self, number: int, frame: FrameType | None) -> None:
        # A rank hears what its launcher hands on, besides what was sent to the whole group of processes: that is one.
        is_second = self.by is not None and (environment.status_folder() is None or self.by == number)
        if is_second and number in _AT_ONCE:
            raise Stopped(f"stopped by a second signal, {signal.Signals(number).name}", 128 + number)
        self.by = self.by or signal.Signals(number)
        if not self.patient:
            self.end()


@contextmanager
def listening() -> Iterator[StopRequest]:
    """Hear the signals in this block, in a program's main thread; what is ignored stays ignored: nohup means it."""
    request = StopRequest()
    heard = [s for s in _HEARD if signal.getsignal(s) is not signal.SIG_IGN]
    if threading.current_thread() is not threading.main_thread():
        heard = []
    before = {s: signal.signal(s, request._hear) for s in heard}
    try:
        yield request
    finally:
        for s, handler in before.items():
            # A rank has only to say how it ended, and what was sent to all ranks may reach it late.
            signal.signal(s, handler if environment.status_folder() is None else signal.SIG_IGN)
