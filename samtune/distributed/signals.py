"""Signals that stop a run: after the first one it saves and ends, at the second one it ends immediately."""

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
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
# A second one of these ends the process immediately. (When a terminal closes, shell and kernel both send SIGHUP.)
_IMMEDIATE = (signal.SIGINT, signal.SIGTERM)


PARENT = "SAMTUNE_PARENT"
"""Environment variable: the process that a run belongs to, and ends with."""
_POLL_SECONDS = 0.5


def exit_with_parent() -> None:
    """If this process belongs to another one, send itself SIGTERM as soon as that has ended."""
    if PARENT not in os.environ:
        return
    parent = int(os.environ.pop(PARENT))  # it is not the parent of what this process starts

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_POLL_SECONDS)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="parent", daemon=True).start()


class Interrupted(BaseException):
    """Work was broken off that a resumed run does again."""


class StopRequest:
    """The signals that this process has received so far.

    signal: the first one. is_deferred: whether it is only recorded, since the run checks for it; otherwise it raises
    Stopped. is_agreed: whether all ranks know that one of them was asked to stop, perhaps not this one.
    has_checkpoint: whether a stopped run can be resumed.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self.is_deferred = False
        self.is_agreed = False
        self.has_checkpoint = False

    def is_requested(self) -> bool:
        """Whether this process was asked to stop."""
        return self.signal is not None

    def raise_stopped(self) -> NoReturn:
        """Raise Stopped for the first signal. Call it where everything is saved, or nothing is worth saving."""
        name = self.signal.name if self.signal else "a signal to another rank"
        code = Stopped.SAVED if self.has_checkpoint else 128 + (self.signal or signal.SIGTERM)
        raise Stopped(f"stopped by {name}", code)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        # A rank may get one signal twice: from the sender, to its whole process group, and from its launcher.
        is_second = self.signal is not None and (environment.status_folder() is None or self.signal == number)
        if is_second and number in _IMMEDIATE:
            raise Stopped(f"stopped by a second signal, {signal.Signals(number).name}", 128 + number)
        self.signal = self.signal or signal.Signals(number)
        if not self.is_deferred:
            self.raise_stopped()


@contextmanager
def listening() -> Iterator[StopRequest]:
    """Handle the signals in this block, in a program's main thread; ignored ones stay ignored, as nohup wants it."""
    request = StopRequest()
    numbers = [s for s in _SIGNALS if signal.getsignal(s) is not signal.SIG_IGN]
    if threading.current_thread() is not threading.main_thread():
        numbers = []
    before = {s: signal.signal(s, request._handle) for s in numbers}
    try:
        yield request
    finally:
        for s, handler in before.items():
            # A rank has only to report how it ended, and a signal to all ranks may reach it late.
            signal.signal(s, handler if environment.status_folder() is None else signal.SIG_IGN)
