"""Progress on stderr: live lines on a terminal and in a notebook, otherwise a line now and then."""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, Self

from rich.console import Group
from rich.live import Live
from rich.text import Text

from samtune.console.live import Curves, Line, draw_bar, draw_chart, draw_numbers, duration
from samtune.console.messages import info, stderr

_PLAIN_INTERVAL = 15.0  # seconds between two progress lines where there is no terminal
_RUNS_INTERVAL = 60.0  # the same, of a sweep
_REFRESH = 4  # times a second that live lines are drawn
_NOTEBOOK_INTERVAL = 0.5  # seconds between two messages to a notebook
_NOTEBOOK_WIDTH = 110  # characters of its line
_WHOLE: dict[str, Any] = {"no_wrap": True, "overflow": "ignore"}
_CHART_HEIGHT = 18  # lines of a terminal that has room for a chart


class _NotebookLine:
    """A line in the output of a notebook's cell, which is updated in place."""

    def __init__(self, draw: Callable[[], str]) -> None:
        self._draw = draw
        self._shown: Any = None  # IPython's handle of the line
        self._drawn_at = 0.0

    def start(self) -> None:
        """Nothing to do: the line appears with its first text."""

    def refresh(self, *, last: bool = False) -> None:
        """Draw the current text, unless it was drawn just before."""
        now = time.monotonic()
        if not last and now - self._drawn_at < _NOTEBOOK_INTERVAL:
            return
        self._drawn_at = now
        content = {"text/plain": self._draw()}
        if self._shown is not None:
            self._shown.update(content, raw=True)
        elif content["text/plain"]:
            from IPython.display import display  # a notebook has it

            self._shown = display(content, raw=True, display_id=True)  # type: ignore[no-untyped-call]

    def stop(self) -> None:
        """Leave the current text in place."""
        self.refresh(last=True)


class _Live(ABC):
    """Progress lines below the log, updated in place: all of them on a terminal, only the last in a notebook."""

    def __init__(self) -> None:
        self._live: Live | _NotebookLine | None = None
        if stderr.is_jupyter and not stderr.quiet:
            self._live = _NotebookLine(self._last_line_text)
        elif stderr.is_interactive and not stderr.quiet:
            self._live = Live(
                get_renderable=lambda: Group(*(Text.assemble(*line, **_WHOLE) for line in self._lines(stderr.width))),
                console=stderr,
                transient=True,
                refresh_per_second=_REFRESH,
            )

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def _changed(self) -> None:
        """Redraw the line of a notebook; a terminal is redrawn by a thread."""
        if isinstance(self._live, _NotebookLine):
            self._live.refresh()

    def _last_line_text(self) -> str:
        lines = self._lines(_NOTEBOOK_WIDTH)
        return "".join(part for part, _ in lines[-1]) if lines else ""

    @property
    def _ascii(self) -> bool:
        return not stderr.encoding.startswith("utf")

    @abstractmethod
    def _lines(self, width: int) -> list[Line]:
        """The lines to draw now, in `width` columns."""


class RunsProgress(_Live):
    """Progress of several runs: a live bar for each on a terminal, otherwise a line now and then."""

    def __init__(self) -> None:
        self._last_line = time.monotonic()
        self._runs: dict[str, tuple[int, int] | None] = {}
        self._began: dict[str, tuple[int, float]] = {}  # step and time at which a run was first seen
        super().__init__()

    def show(self, runs: Mapping[str, tuple[int, int] | None]) -> None:
        """Show (step, total steps) of each active run; None before its first step."""
        if self._live is None:
            text = ", ".join(f"{run} step {steps[0]}/{steps[1]}" for run, steps in runs.items() if steps)
            if text and time.monotonic() - self._last_line >= _RUNS_INTERVAL:
                self._last_line = time.monotonic()
                info(text)
            return
        for run, steps in runs.items():
            if steps:
                self._began.setdefault(run, (steps[0], time.monotonic()))
        self._runs = dict(runs)
        self._changed()

    def _lines(self, width: int) -> list[Line]:
        return [self._bar(run, steps, width) for run, steps in self._runs.items()]

    def _bar(self, run: str, steps: tuple[int, int] | None, width: int) -> Line:
        if steps is None:
            return draw_bar(run, 0, None, width)
        (first, since), numbers = self._began[run], {}
        if steps[0] > first:
            left = (time.monotonic() - since) / (steps[0] - first) * (steps[1] - steps[0])
            numbers["left"] = f"{duration(left)} left"
        return draw_bar(run, *steps, width, numbers=numbers, importance=[*numbers, "bar"], ascii_only=self._ascii)


class RunProgress(_Live):
    """Progress of a run: a live chart and bar on a terminal, otherwise a line now and then."""

    def __init__(self, total_steps: int = 0, done: int = 0, rows: Iterable[Mapping[str, Any]] = ()) -> None:
        """done, rows: steps and rows of metrics of an earlier process."""
        self._total, self._done, self._step = total_steps, done, done
        self._started = self._last_line = time.monotonic()
        self._numbers: dict[str, str] = {}
        self._state: dict[str, str] = {}
        self._counting: tuple[str, int, int | None, str] | None = None  # name, done, total, speed
        self._curves = Curves()
        self._drawn: tuple[object, list[Line]] = (None, [])  # key and lines of the last chart
        for row in rows:
            self.add(row)
        super().__init__()

    def add(self, row: Mapping[str, Any]) -> None:
        """Add a row of metrics to the chart."""
        self._curves.add(row)

    def train(
        self,
        step: int,
        *,
        loss: float,
        top1_error: float,
        images_per_second: float,
        data_wait: float,
        lr: float,
        rho: float,
        memory: Callable[[], int],
    ) -> None:
        """Show a step. loss, top1_error: means of the epoch so far. data_wait: share of the time, in [0, 1].

        lr, rho: of this step. memory: returns the peak in bytes; it is called only when the number is shown.
        """
        now = time.monotonic()
        numbers = {
            "loss": f"loss {loss:.3f}",
            "error": f"error {top1_error:.1f} %",
            "speed": f"{images_per_second:.0f} images/s",
            "data wait": f"data wait {100 * data_wait:.0f} %",
        }
        left = (now - self._started) / (step - self._done) * (self._total - step)
        if self._live is None:
            speed = f"{numbers['speed']}  {numbers['data wait']}"
            self._line(f"step {step}/{self._total}  {numbers['loss']}  {numbers['error']}  {speed}  {left:.0f} s left")
            return
        self._step = step
        self._numbers = numbers | {"left": f"{duration(left)} left"}
        if now - self._last_line >= 1 / _REFRESH:
            self._last_line = now
            self._state = {"rate": f"{lr:.3g}", "rho": f"{rho:.3g}", "memory": f"{memory() / 2**30:.2f} GiB"}
        self._changed()

    def score(self, split: str, done: int, total: int) -> None:
        """Show how many images of a split are scored."""
        self.count(f"scoring {split}", done, total)

    def count(self, what: str, done: int, total: int | None, images_per_second: float | None = None) -> None:
        """Show how many images of a pass are done. total: None if it is known only at the end."""
        speed = "" if images_per_second is None else f"  {images_per_second:.0f} images/s"
        if self._live is None:
            self._line(f"{what}: {done}{'' if total is None else f'/{total}'} images{speed}")
        else:
            self._counting = (what, done, total, speed) if done != total else None
            self._changed()

    def _lines(self, width: int) -> list[Line]:
        bar = partial(draw_bar, width=width, ascii_only=self._ascii)
        has_chart = self._curves.points and stderr.height >= _CHART_HEIGHT and not self._ascii
        if has_chart and self._drawn[0] != (key := (self._curves.points, width)):
            self._drawn = (key, draw_chart(self._curves, self._total, width))
        lines = [*self._drawn[1]] if has_chart else []
        if self._total:
            best = self._curves.best
            state = ({"best": f"val {best[0]:.2f} % (epoch {best[1]})"} if best else {}) | self._state
            lines += [draw_numbers(width, **state)] if state else []
            importance = ["left", "loss", "speed", "bar", "error", "data wait"] if self._numbers else ["bar"]
            lines.append(bar("step", self._step, self._total, numbers=self._numbers, importance=importance))
        if self._counting is not None:
            what, done, total, speed = self._counting
            numbers = {"images": f"{f'{done} ' if total is None else ''}images{speed}"}
            lines.append(bar(what, done, total, numbers=numbers, importance=["images", "bar"]))
        return lines

    def _line(self, text: str) -> None:
        if time.monotonic() - self._last_line >= _PLAIN_INTERVAL:
            self._last_line = time.monotonic()
            info(text)
