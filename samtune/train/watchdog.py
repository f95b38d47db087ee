"""A thread that watches whether a run still moves."""

import statistics
import threading
import time
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Self

_PERIOD = 1.0  # seconds between two looks
_REMEMBERED = 50  # beats whose median is the usual time
_SLOW = 10  # times the usual time, and
_SLOW_SECONDS = 30.0  # at least so long, is worth a warning


class Watchdog:
    """Calls on_slow once when a beat takes far longer than usual, and on_stuck when it takes longer than the timeout.

    on_slow: (seconds so far, usual seconds). on_stuck: (seconds so far); called from the watching thread, as the main
    one cannot be reached. timeout: in seconds; 0 is never.

    Time in which the whole process stood still does not count: a batch system may suspend a job for hours.
    """

    def __init__(
        self, timeout: float, on_slow: Callable[[float, float], None], on_stuck: Callable[[float], None]
    ) -> None:
        self.timeout, self._on_slow, self._on_stuck = timeout, on_slow, on_stuck
        self._durations: deque[float] = deque(maxlen=_REMEMBERED)
        self._elapsed = 0.0  # since the last beat
        self._warned = False
        self._beaten = time.monotonic()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def heartbeat(self) -> None:
        """A step, or a batch of an evaluation, is done."""
        now = time.monotonic()
        self._durations.append(now - self._beaten)
        self._beaten = now
        self._elapsed = 0.0
        self._warned = False

    def look(self, passed: float) -> None:
        """So many seconds have passed since the last look."""
        self._elapsed += min(passed, 2 * _PERIOD)
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
            self.look(now - last)
            last = now

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()
