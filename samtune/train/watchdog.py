"""The watchdog of a run: a thread that warns of a slow step, and ends a process whose step never ends."""

import faulthandler
import os
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Self

from samtune import console
from samtune.distributed import collectives, environment, rank_status
from samtune.errors import ORPHANED, WorkerLost
from samtune.runs.run_log import RunLog

_PERIOD = 1.0  # seconds between two checks
_WINDOW = 50  # heartbeats whose median is the usual time
# A warning is due after this many times the usual time, and at least this many seconds.
_SLOW, _SLOW_SECONDS = 10, 30.0
_LAST_MESSAGE_SECONDS = 5.0  # to print the error of a stuck step, and to ask which rank is absent


class Watchdog:
    """Calls on_slow once if a heartbeat is far later than usual, and on_stuck if it is later than the timeout.

    timeout: in seconds; 0 is never. on_slow: (seconds so far, usual seconds). on_stuck: (seconds so far). Both are
    called from the watchdog's thread. Time in which the whole process was suspended does not count.
    """

    def __init__(
        self, timeout: float, on_slow: Callable[[float, float], None], on_stuck: Callable[[float], None]
    ) -> None:
        self.timeout, self._on_slow, self._on_stuck = timeout, on_slow, on_stuck
        self._durations: deque[float] = deque(maxlen=_WINDOW)
        self._elapsed = 0.0  # seconds since the last heartbeat
        self._warned = False
        self._last_heartbeat = time.monotonic()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def heartbeat(self) -> None:
        """A step, or a batch of an evaluation, is done."""
        now = time.monotonic()
        self._durations.append(now - self._last_heartbeat)
        self._last_heartbeat = now
        self._elapsed = 0.0
        self._warned = False

    def check(self, seconds: float) -> None:
        """Check the time. seconds: since the last check."""
        self._elapsed += min(seconds, 2 * _PERIOD)
        usual = statistics.median(self._durations) if self._durations else 0.0
        if self.timeout and self._elapsed > self.timeout:
            self._on_stuck(self._elapsed)
        elif self._durations and not self._warned and self._elapsed > max(_SLOW_SECONDS, _SLOW * usual):
            self._warned = True
            self._on_slow(self._elapsed, usual)

    def _watch(self) -> None:
        last = time.monotonic()
        while not self._ended.wait(_PERIOD):
            now = time.monotonic()
            self.check(now - last)
            last = now

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()


def watch_run(log: RunLog, timeout: float) -> Watchdog:
    """A watchdog that logs slow steps, and ends the process after the timeout, in seconds."""

    def slow(seconds: float, usual: float) -> None:
        log.warn(
            f"after step {log.step} nothing has moved for {seconds:.0f} s, usually {usual:.1f} s; log.txt says where"
        )
        _write_stacks(log)

    def stuck(seconds: float) -> None:
        error = WorkerLost(
            f"after step {log.step} nothing has moved for {_duration(seconds)}",
            f"a device, a disk or a data worker does not answer; {log.notes.name} says where the run stands",
            "go on with --resume; --step-timeout gives it more time",
        )
        try:
            if collectives.world_size() > 1:
                error = _naming(error, _absent_ranks())
            log.log(str(error))
            _write_stacks(log)
            log.status("failed", error.exit_code, error)
            # In a thread: a terminal that takes no more output would block this one.
            message = threading.Thread(target=_report, args=(error,), daemon=True)
            message.start()
            message.join(_LAST_MESSAGE_SECONDS)
        finally:
            os._exit(error.exit_code)  # the main thread cannot be reached

    def orphaned() -> None:
        error = WorkerLost(ORPHANED, "nobody watches over the ranks any more", "go on with --resume")
        log.log(str(error))
        log.status("failed", error.exit_code, error)

    environment.on_launcher_loss(orphaned)
    return Watchdog(timeout, slow, stuck)


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} minutes"


def _absent_ranks() -> Sequence[int]:
    """Ranks that the others wait for. They ask through rank 0: if that does not answer, it is rank 0."""
    answers: list[Sequence[int]] = []
    ask = threading.Thread(
        target=lambda: answers.append(collectives.find_absent_ranks(_LAST_MESSAGE_SECONDS)), daemon=True
    )
    ask.start()
    ask.join(2 * _LAST_MESSAGE_SECONDS)
    return answers[0] if answers else [0]


def _naming(error: WorkerLost, absent: Sequence[int]) -> WorkerLost:
    """The error, naming the ranks that the others wait for, if any are known."""
    if not absent:
        return error
    names = " and ".join(f"rank {rank}" for rank in absent)
    return WorkerLost(f"{names} is stuck: {error.message}", "the other ranks wait for it", error.hint)


def _report(error: WorkerLost) -> None:
    if environment.status_folder() is not None:
        rank_status.write_status(error.exit_code, error)
    else:
        console.error(str(error))


def _write_stacks(log: RunLog) -> None:
    with suppress(OSError), log.notes.open("a", encoding="utf-8") as file:
        faulthandler.dump_traceback(file)
