"""What people see: notes and progress on stderr, results on stdout. The only user of rich."""

import json
import re
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Self

from rich.cells import cell_len
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from samtune.console import live

_PLAIN_INTERVAL = 15.0  # seconds between two progress lines where there is no terminal
_RUNS_INTERVAL = 60.0  # the same, of a sweep
_REFRESH = 4  # times a second that what is live is drawn
_NOTEBOOK_INTERVAL = 0.5  # seconds between two messages to a notebook
_NOTEBOOK_WIDTH = 110  # characters of its line
_CHART_HEIGHT = 18  # lines of a terminal that has room for a chart
_HANG = 12  # characters: a longer label does not indent what is wrapped below it


Row = Mapping[str, str | float | None]

_err = Console(stderr=True, highlight=False, soft_wrap=True, emoji=False)


def configure(*, quiet: bool) -> None:
    """Whether notes and progress are left out, as in all ranks but the first; errors are said by whoever has them."""
    _err.quiet = quiet


def info(text: str) -> None:
    """A line about what is going on."""
    _say(_err, text)


def warn(text: str, *, on_any_rank: bool = False) -> None:
    """Something that the user should look at, though the run goes on."""
    _say(_loud() if on_any_rank else _err, text, "warning:", "yellow")


def error(text: str) -> None:
    """Why the command ends."""
    _say(_loud(), text, "error:", "red")


def _say(console: Console, text: str, label: str = "", style: str = "") -> None:
    """On a terminal, lines are wrapped at words; elsewhere, where programs look for them, they stay whole."""
    said = f"{label} {text}" if label else text
    if console.is_terminal:
        said = "\n".join(wrapped(line, console.width) for line in said.split("\n"))
    console.print(f"[{style}]{label}[/]{escape(said[len(label) :])}" if label else escape(said))


def wrapped(line: str, width: int) -> str:
    """A line broken between words, below its label: "data    ...", "  hint:  ...".

    A word stays in one piece, however long it is, and so does a command in backquotes.
    """
    label = re.match(r"\s*[\w-]+(?::\s+|\s{2,})|\s+", line)
    hang = len(label[0]) if label and len(label[0]) <= _HANG and 2 * len(label[0]) <= width else 2
    lines = [""]
    for word in re.findall(r"\s*(?:[(]?`[^`]*`\S*|\S+)", line):
        if cell_len(lines[-1] + word) <= width or len(lines[-1]) <= hang:
            lines[-1] += word
        else:
            lines.append(" " * hang + word.lstrip())
    return "\n".join(lines)


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
    cells = [{"name": name, "value": value} for name, value in rows.items()]
    console = Console(highlight=False, emoji=False)
    widths = _widths(cells, ["name", "value"], set(), console.width)
    if widths is None:
        print_prose([title, *(f"{name}: {value}" for name, value in rows.items())])
        return
    table = Table(title=escape(title), show_header=False, title_justify="left")
    table.add_column(style="bold", width=widths["name"])
    table.add_column(width=widths["value"])
    for name, value in rows.items():
        table.add_row(escape(name), escape(value))
    _print(console, table)


def print_rows(title: str, rows: Sequence[Row], *, droppable: Sequence[str] = ()) -> None:
    """A list on stdout, for people: one column per key of the first row, numbers to the right, "-" for None.

    No word is broken. In a narrow room the droppable columns go, the first of them first, and it is said which; where
    the rest does not fit either, there is a value a line: half a number or half a path is worse than none.
    """
    console = Console(highlight=False, emoji=False)
    _print(console, *_listed(title, rows, droppable, console))


def _listed(title: str, rows: Sequence[Row], droppable: Sequence[str], console: Console) -> list[RenderableType]:
    """The table of `print_rows`, and a line below it that names what it has no room for; or lines."""
    width = console.width
    cells = [{name: _cell(value) for name, value in row.items()} for row in rows]
    numbers = {name for name in rows[0] if not any(isinstance(row[name], str) for row in rows)}
    droppable = [name for name in droppable if name in cells[0]]
    for gone in range(len(droppable) + 1):
        names = [name for name in cells[0] if name not in droppable[:gone]]
        widths = _widths(cells, names, numbers, width, with_names=True)
        if widths is not None:
            break
    else:
        lines = (f"{'  ' if i else ''}{name}: {value}" for row in cells for i, (name, value) in enumerate(row.items()))
        return [
            Text(wrapped(line, width) if console.is_terminal else line, no_wrap=True, overflow="ignore")
            for line in lines
        ]
    table = Table(title=escape(title), title_justify="left")
    for name in names:
        table.add_column(name, justify="right" if name in numbers else "left", width=widths[name])
    for row in cells:
        table.add_row(*(escape(row[name]) for name in names))
    if not gone:
        return [table]
    left_out = f"no room here for: {', '.join(droppable[:gone])} (a wider terminal or --json has them)"
    return [table, Text(wrapped(left_out, width))]


def _widths(
    cells: Sequence[Mapping[str, str]], names: Sequence[str], numbers: set[str], width: int, *, with_names: bool = False
) -> dict[str, int] | None:
    """Widths of columns in which no word is broken, nor a number or a name; None where they do not fit."""
    columns = {name: [*([name] if with_names else []), *(row[name] for row in cells)] for name in names}
    wanted = {name: max(cell_len(text) for text in texts) for name, texts in columns.items()}
    found = {
        name: wanted[name] if name in numbers else max(cell_len(word) for text in texts for word in ["", *text.split()])
        for name, texts in columns.items()
    }
    room = width - 1 - sum(3 + one for one in found.values())  # a border, and a blank on either side
    if room < 0:
        return None
    for _ in range(room):
        name = max(names, key=lambda name: wanted[name] / max(1, found[name]))
        if found[name] >= wanted[name]:
            break
        found[name] += 1
    return found


def _cell(value: str | float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def _print(console: Console, *drawn: RenderableType) -> None:
    with console.capture() as captured:
        for one in drawn:
            console.print(one, soft_wrap=isinstance(one, Text))
    _to_stdout(captured.get())


def print_lines(lines: Iterable[str]) -> None:
    """The rest of a result on stdout, unwrapped: paths can be copied."""
    _to_stdout("".join(line + "\n" for line in lines))


def print_prose(lines: Iterable[str]) -> None:
    """The same, for sentences: on a terminal they are wrapped at words."""
    console = Console(highlight=False, emoji=False)
    print_lines(wrapped(line, console.width) if console.is_terminal else line for line in lines)


def print_markdown(text: str) -> None:
    """A page of Markdown on stdout, rendered for the width of the terminal."""
    from samtune.console import markdown

    _to_stdout(markdown.render(text))


def is_watched() -> bool:
    """Whether results go to a terminal, where they can be drawn over."""
    return Console().is_interactive


def watch_rows(
    title: str, look: Callable[[], tuple[Sequence[Row], Sequence[str]]], *, seconds: float, droppable: Sequence[str]
) -> None:
    """Show rows and the lines below them, on a terminal, and look again every few seconds, until Ctrl-C."""
    console = Console(highlight=False, emoji=False)

    def draw() -> RenderableType:
        rows, lines = look()
        listed = _listed(title, rows, droppable, console) if rows else []
        said = [Text(line) for line in lines]
        return Group(*listed, *said, Text(f"{time.strftime('%H:%M:%S')}, again every {seconds:g} s; Ctrl-C ends"))

    with suppress(KeyboardInterrupt), Live(draw(), console=console, auto_refresh=False) as shown:
        while True:
            time.sleep(seconds)
            shown.update(draw(), refresh=True)


def _to_stdout(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _text(line: live.Line) -> Text:
    return Text.assemble(*line, no_wrap=True, overflow="ignore")


class _NotebookLine:
    """A line in the output of a notebook's cell, which is drawn over again."""

    def __init__(self, draw: Callable[[], str]) -> None:
        self._draw = draw
        self._shown: Any = None  # IPython's handle of it
        self._drawn_at = 0.0

    def start(self) -> None:
        """It is there from its first words on."""

    def refresh(self, *, last: bool = False) -> None:
        """Draw what it says now, if the last time was not just before."""
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
        """What it says now stays."""
        self.refresh(last=True)


class _Live(ABC):
    """Lines that are drawn over again below the notes: on the terminal, and in a notebook the last of them; elsewhere
    nothing. A context.
    """

    def __init__(self) -> None:
        self._live: Live | _NotebookLine | None = None
        if _err.is_jupyter and not _err.quiet:
            self._live = _NotebookLine(self._last_line_text)
        elif _err.is_interactive and not _err.quiet:
            self._live = Live(
                get_renderable=lambda: Group(*(_text(line) for line in self._lines(_err.width))),
                console=_err,
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
        """There is something new to draw; a terminal looks by itself, from a thread."""
        if isinstance(self._live, _NotebookLine):
            self._live.refresh()

    def _last_line_text(self) -> str:
        lines = self._lines(_NOTEBOOK_WIDTH)
        return "".join(part for part, _ in lines[-1]) if lines else ""

    @property
    def _ascii(self) -> bool:
        return not _err.encoding.startswith("utf")

    @abstractmethod
    def _lines(self, width: int) -> list[live.Line]:
        """What is drawn now, in so many columns."""


class RunsProgress(_Live):
    """How far several runs are: a live bar for each on a terminal, otherwise a line now and then. Use it as a context;
    notes printed meanwhile appear above the bars.
    """

    def __init__(self) -> None:
        self._last_line = time.monotonic()
        self._runs: dict[str, tuple[int, int] | None] = {}
        self._began: dict[str, tuple[int, float]] = {}  # the step, and the time, at which a run was first seen to go on
        super().__init__()

    def show(self, runs: Mapping[str, tuple[int, int] | None]) -> None:
        """(step, total steps) of each run that is going on; None before its first step."""
        if self._live is None:
            said = ", ".join(f"{run} step {steps[0]}/{steps[1]}" for run, steps in runs.items() if steps)
            if said and time.monotonic() - self._last_line >= _RUNS_INTERVAL:
                self._last_line = time.monotonic()
                info(said)
            return
        for run, steps in runs.items():
            if steps:
                self._began.setdefault(run, (steps[0], time.monotonic()))
        self._runs = dict(runs)
        self._changed()

    def _lines(self, width: int) -> list[live.Line]:
        return [self._bar(run, steps, width) for run, steps in self._runs.items()]

    def _bar(self, run: str, steps: tuple[int, int] | None, width: int) -> live.Line:
        if steps is None:
            return live.bar(run, 0, None, width)
        first, since = self._began[run]
        numbers = {}
        if steps[0] > first:
            left = (time.monotonic() - since) / (steps[0] - first) * (steps[1] - steps[0])
            numbers["left"] = f"{live.duration(left)} left"
        importance = [*numbers, "bar"]
        return live.bar(run, *steps, width, numbers=numbers, importance=importance, ascii_only=self._ascii)


class RunProgress(_Live):
    """Progress of a run: a live chart and bar on a terminal, otherwise a line now and then.

    Use it as a context; notes printed meanwhile appear above the bar.
    """

    def __init__(self, total_steps: int = 0, done: int = 0, rows: Iterable[Mapping[str, Any]] = ()) -> None:
        """done: steps that an earlier process did, and rows: the metrics that it measured."""
        self._total, self._done, self._step = total_steps, done, done
        self._started = self._last_line = time.monotonic()
        self._numbers: dict[str, str] = {}
        self._state: dict[str, str] = {}
        self._counting: tuple[str, int, int | None, str] | None = None  # what, done, total, speed
        self._curves = live.Curves()
        self._drawn: tuple[object, list[live.Line]] = (None, [])  # a chart, and what it was drawn of
        for row in rows:
            self.add(row)
        super().__init__()

    def add(self, row: Mapping[str, Any]) -> None:
        """A row of metrics has been written."""
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
        """A step is done. loss and error since the epoch began; data_wait: share of the time, in [0, 1].

        lr, rho: of this step. memory: tells the peak in bytes, and is asked where it is shown.
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
        self._numbers = numbers | {"left": f"{live.duration(left)} left"}
        if now - self._last_line >= 1 / _REFRESH:
            self._last_line = now
            self._state = {"rate": f"{lr:.3g}", "rho": f"{rho:.3g}", "memory": f"{memory() / 2**30:.2f} GiB"}
        self._changed()

    def score(self, split: str, done: int, total: int) -> None:
        """So many of a split's images are scored."""
        self.count(f"scoring {split}", done, total)

    def count(self, what: str, done: int, total: int | None, images_per_second: float | None = None) -> None:
        """So many images of a pass over all of them are done; total: None where that is known at the end only."""
        speed = "" if images_per_second is None else f"  {images_per_second:.0f} images/s"
        if self._live is None:
            self._line(f"{what}: {done}{'' if total is None else f'/{total}'} images{speed}")
        else:
            self._counting = (what, done, total, speed) if done != total else None
            self._changed()

    def _lines(self, width: int) -> list[live.Line]:
        lines = self._charted(width) if self._curves.points and _err.height >= _CHART_HEIGHT and not self._ascii else []
        if self._total:
            best = self._curves.best
            state = ({"best": f"val {best[0]:.2f} % (epoch {best[1]})"} if best else {}) | self._state
            lines += [live.numbers(width, **state)] if state else []
            importance = ["left", "loss", "speed", "bar", "error", "data wait"] if self._numbers else ["bar"]
            lines.append(
                live.bar(
                    "step",
                    self._step,
                    self._total,
                    width,
                    numbers=self._numbers,
                    importance=importance,
                    ascii_only=self._ascii,
                )
            )
        if self._counting is not None:
            what, done, total, speed = self._counting
            numbers = {"images": f"{f'{done} ' if total is None else ''}images{speed}"}
            lines.append(
                live.bar(
                    what, done, total, width, numbers=numbers, importance=["images", "bar"], ascii_only=self._ascii
                )
            )
        return lines

    def _charted(self, width: int) -> list[live.Line]:
        key = (self._curves.points, width)
        if self._drawn[0] != key:
            self._drawn = (key, live.chart(self._curves, self._total, width))
        return [*self._drawn[1]]

    def _line(self, text: str) -> None:
        if time.monotonic() - self._last_line >= _PLAIN_INTERVAL:
            self._last_line = time.monotonic()
            info(text)
