"""What people see: notes and progress on stderr, results on stdout. The only user of rich."""

import json
import os
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

_PLAIN_INTERVAL = 15.0  # seconds between two progress lines where there is no terminal


class _Stderr(Console):
    def on_broken_pipe(self) -> None:
        """Whoever read our notes has gone; the run goes on without them. (rich would exit.)"""
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


_err = _Stderr(stderr=True, highlight=False, soft_wrap=True)


def note(text: str) -> None:
    """A line about what is going on."""
    _say(escape(text))


def warn(text: str) -> None:
    """Something that the user should look at, though the run goes on."""
    _say(f"[yellow]warning:[/] {escape(text)}")


def error(text: str) -> None:
    """Why the command ends."""
    _say(f"[red]error:[/] {escape(text)}")


def _say(markup: str) -> None:
    with suppress(OSError):  # a terminal that is gone is no reason to lose a run; the log has it all
        _err.print(markup)


def print_json(content: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> None:
    """The result, alone on stdout, for programs."""
    _to_stdout(json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def print_table(title: str, rows: Mapping[str, str]) -> None:
    """The result on stdout, for people: one row per name."""
    table = Table(title=title, show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column()
    for name, value in rows.items():
        table.add_row(name, escape(value))
    _print(table)


def print_rows(title: str, rows: Sequence[Mapping[str, str | int | None]]) -> None:
    """A list on stdout, for people: one column per key of the first row, numbers to the right, "-" for None."""
    table = Table(title=title, title_justify="left")
    for name, value in rows[0].items():
        number = not isinstance(value, str)
        table.add_column(name, justify="right" if number else "left", no_wrap=number)
    for row in rows:
        table.add_row(*("-" if value is None else escape(str(value)) for value in row.values()))
    _print(table)


def _print(table: Table) -> None:
    console = Console(highlight=False)
    with console.capture() as drawn:
        console.print(table)
    _to_stdout(drawn.get())


def print_lines(lines: Iterable[str]) -> None:
    """The rest of a result on stdout, unwrapped: paths can be copied."""
    _to_stdout("".join(line + "\n" for line in lines))


def _to_stdout(text: str) -> None:
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader has gone, as in `samtune ... | head -1`. The work is done; let Python's own flush at exit succeed.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class RunProgress:
    """Progress of a run: a live bar on a terminal, otherwise a line now and then.

    Use it as a context; notes printed meanwhile appear above the bar.
    """

    def __init__(self, total_steps: int = 0) -> None:
        self._total = total_steps
        self._started = self._last_line = time.monotonic()
        self._bar: Progress | None = None
        if _err.is_interactive:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[numbers]}"),
                TimeRemainingColumn(compact=True, elapsed_when_finished=True),
                TextColumn("left"),
                console=_err,
                transient=True,
            )
            self._steps = self._bar.add_task("step", total=total_steps, numbers="", visible=total_steps > 0)
        self._counting: TaskID | None = None

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def train(self, step: int, *, loss: float, top1_error: float, images_per_second: float, data_wait: float) -> None:
        """A step is done. loss and error since the epoch began; data_wait: share of the time, in [0, 1]."""
        speed = f"{images_per_second:.0f} images/s  data wait {100 * data_wait:.0f} %"
        numbers = f"loss {loss:.3f}  error {top1_error:.1f} %  {speed}"
        if self._bar is not None:
            self._bar.update(self._steps, completed=step, numbers=numbers)
        else:
            left = (time.monotonic() - self._started) / step * (self._total - step)
            self._line(f"step {step}/{self._total}  {numbers}  {left:.0f} s left")

    def score(self, split: str, done: int, total: int) -> None:
        """So many of a split's images are scored."""
        self.count(f"scoring {split}", done, total)

    def decode(self, split: str, done: int, total: int) -> None:
        """So many of a split's images are decoded."""
        self.count(f"decoding {split}", done, total)

    def count(self, what: str, done: int, total: int) -> None:
        """So many images of a pass over all of them are done."""
        if self._bar is None:
            self._line(f"{what}: {done}/{total} images")
            return
        if self._counting is None:
            self._counting = self._bar.add_task(what, total=total, numbers="images")
        self._bar.update(self._counting, completed=done)
        if done == total:
            self._bar.remove_task(self._counting)
            self._counting = None

    def _line(self, text: str) -> None:
        if time.monotonic() - self._last_line >= _PLAIN_INTERVAL:
            self._last_line = time.monotonic()
            note(text)
