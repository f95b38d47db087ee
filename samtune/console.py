"""What people see: notes and progress on stderr, results on stdout. The only user of rich."""

import json
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from samtune import ranks

_PLAIN_INTERVAL = 15.0  # seconds between two progress lines where there is no terminal
_RUNS_INTERVAL = 60.0  # the same, of a sweep
_FOLDED = 8  # characters: a column of words is not folded to less


# Of several ranks the first one speaks; an error is said by whoever has it.
_quiet = not ranks.is_first()
_err = Console(stderr=True, highlight=False, soft_wrap=True, emoji=False, quiet=_quiet)


def note(text: str) -> None:
    """A line about what is going on."""
    _err.print(escape(text))


def warn(text: str, *, on_any_rank: bool = False) -> None:
    """Something that the user should look at, though the run goes on."""
    (_loud() if on_any_rank else _err).print(f"[yellow]warning:[/] {escape(text)}")


def error(text: str) -> None:
    """Why the command ends."""
    _loud().print(f"[red]error:[/] {escape(text)}")


def _loud() -> Console:
    return Console(stderr=True, highlight=False, soft_wrap=True, emoji=False)


def print_json(content: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> None:
    """The result, alone on stdout, for programs."""
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:  # JSON has its own way to write a character that the terminal or a path's bytes have not
        text = json.dumps(content, indent=2) + "\n"
    _to_stdout(text)


def print_table(title: str, rows: Mapping[str, str]) -> None:
    """The result on stdout, for people: one row per name."""
    table = Table(title=escape(title), show_header=False, title_justify="left")
    table.add_column(style="bold", overflow="fold")
    table.add_column(overflow="fold")  # not cut: half a path is worse than none
    for name, value in rows.items():
        table.add_row(escape(name), escape(value))
    _print(table)


def print_rows(title: str, rows: Sequence[Mapping[str, str | float | None]]) -> None:
    """A list on stdout, for people: one column per key of the first row, numbers to the right, "-" for None.

    Where the columns do not fit beside each other, a value a line: half a number or half a path is worse than none.
    """
    cells = [{name: _cell(value) for name, value in row.items()} for row in rows]
    table = Table(title=escape(title), title_justify="left")
    room = 1
    for name in rows[0]:
        number = not any(isinstance(row[name], str) for row in rows)
        table.add_column(name, justify="right" if number else "left", no_wrap=number, overflow="fold")
        widest = max(len(name), *(len(row[name]) for row in cells))
        room += 3 + (widest if number else min(widest, _FOLDED))
    for row in cells:
        table.add_row(*map(escape, row.values()))
    if room <= Console().width:
        _print(table)
    else:
        print_lines(
            f"{'  ' if i else ''}{name}: {value}" for row in cells for i, (name, value) in enumerate(row.items())
        )


def _cell(value: str | float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def _print(table: Table) -> None:
    console = Console(highlight=False, emoji=False)
    with console.capture() as drawn:
        console.print(table)
    _to_stdout(drawn.get())


def print_lines(lines: Iterable[str]) -> None:
    """The rest of a result on stdout, unwrapped: paths can be copied."""
    _to_stdout("".join(line + "\n" for line in lines))


def _to_stdout(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


class RunsProgress:
    """How far several runs are: a live bar for each on a terminal, otherwise a line now and then. Use it as a context;
    notes printed meanwhile appear above the bars.
    """

    def __init__(self) -> None:
        self._last_line = time.monotonic()
        self._bars: dict[str, TaskID] = {}
        self._progress: Progress | None = None
        if _err.is_interactive:
            columns = TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn()
            self._progress = Progress(*columns, TimeRemainingColumn(compact=True), console=_err, transient=True)

    def __enter__(self) -> Self:
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress is not None:
            self._progress.stop()

    def show(self, runs: Mapping[str, tuple[int, int] | None]) -> None:
        """(step, total steps) of each run that is going on; None before its first step."""
        if self._progress is None:
            said = ", ".join(f"{run} step {steps[0]}/{steps[1]}" for run, steps in runs.items() if steps)
            if said and time.monotonic() - self._last_line >= _RUNS_INTERVAL:
                self._last_line = time.monotonic()
                note(said)
            return
        for run in self._bars.keys() - runs.keys():
            self._progress.remove_task(self._bars.pop(run))
        for run, steps in runs.items():
            done, total = steps or (0, None)
            if run not in self._bars:
                self._bars[run] = self._progress.add_task(run, total=total)
            self._progress.update(self._bars[run], completed=done, total=total)


class RunProgress:
    """Progress of a run: a live bar on a terminal, otherwise a line now and then.

    Use it as a context; notes printed meanwhile appear above the bar.
    """

    def __init__(self, total_steps: int = 0, done: int = 0) -> None:
        """done: steps that an earlier process did."""
        self._total, self._done = total_steps, done
        self._started = self._last_line = time.monotonic()
        self._bar: Progress | None = None
        if _err.is_interactive and not _quiet:
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
            self._steps = self._bar.add_task(
                "step", total=total_steps, completed=done, numbers="", visible=total_steps > 0
            )
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
            left = (time.monotonic() - self._started) / (step - self._done) * (self._total - step)
            self._line(f"step {step}/{self._total}  {numbers}  {left:.0f} s left")

    def score(self, split: str, done: int, total: int) -> None:
        """So many of a split's images are scored."""
        self.count(f"scoring {split}", done, total)

    def count(self, what: str, done: int, total: int | None, images_per_second: float | None = None) -> None:
        """So many images of a pass over all of them are done; total: None where that is known at the end only."""
        speed = "" if images_per_second is None else f"  {images_per_second:.0f} images/s"
        if self._bar is None:
            self._line(f"{what}: {done}{'' if total is None else f'/{total}'} images{speed}")
            return
        if self._counting is None:
            self._counting = self._bar.add_task(what, total=total, numbers="images")
        self._bar.update(self._counting, completed=done, numbers=f"images{speed}")
        if done == total:
            self._bar.remove_task(self._counting)
            self._counting = None

    def _line(self, text: str) -> None:
        if time.monotonic() - self._last_line >= _PLAIN_INTERVAL:
            self._last_line = time.monotonic()
            note(text)
