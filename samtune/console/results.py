"""Results on stdout: JSON, tables and text."""

import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from rich.cells import cell_len
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from samtune.console.messages import wrapped

Row = Mapping[str, str | float | None]


def print_json(content: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> None:
    """Print a result as JSON, for programs."""
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:  # \u escapes, for a terminal without the character, or a path that is not UTF-8
        text = json.dumps(content, indent=2) + "\n"
    _to_stdout(text)


def print_table(title: str, rows: Mapping[str, str]) -> None:
    """Print a result as a table with one row per name."""
    cells = [{"name": name, "value": value} for name, value in rows.items()]
    console = Console(highlight=False, emoji=False)
    if (widths := _widths(cells, ["name", "value"], set(), console.width)) is None:
        print_prose([title, *(f"{name}: {value}" for name, value in rows.items())])
        return
    table = Table(title=escape(title), show_header=False, title_justify="left")
    table.add_column(style="bold", width=widths["name"])
    table.add_column(width=widths["value"])
    for name, value in rows.items():
        table.add_row(escape(name), escape(value))
    _print(console, table)


def print_rows(title: str, rows: Sequence[Row], *, droppable: Sequence[str] = ()) -> None:
    """Print a table: one column per key of the first row, numbers to the right, "-" for None.

    No word is broken. On a narrow terminal the droppable columns are left out, the first of them first, and named
    below. If the rest does not fit either, each value has a line.
    """
    console = Console(highlight=False, emoji=False)
    _print(console, *_table(title, rows, droppable, console))


def _table(title: str, rows: Sequence[Row], droppable: Sequence[str], console: Console) -> list[RenderableType]:
    """The table of `print_rows` and a line with the columns left out; or a line for each value."""
    width = console.width
    cells = [{name: _cell(value) for name, value in row.items()} for row in rows]
    numbers = {name for name in rows[0] if not any(isinstance(row[name], str) for row in rows)}
    droppable = [name for name in droppable if name in cells[0]]
    for n_dropped in range(len(droppable) + 1):
        names = [name for name in cells[0] if name not in droppable[:n_dropped]]
        if widths := _widths(cells, names, numbers, width, with_names=True):
            break
    else:
        lines = (f"{'  ' if i else ''}{name}: {value}" for row in cells for i, (name, value) in enumerate(row.items()))
        lines = (wrapped(line, width) if console.is_terminal else line for line in lines)
        return [Text(line, no_wrap=True, overflow="ignore") for line in lines]
    table = Table(title=escape(title), title_justify="left")
    for name in names:
        table.add_column(name, justify="right" if name in numbers else "left", width=widths[name])
    for row in cells:
        table.add_row(*(escape(row[name]) for name in names))
    if not n_dropped:
        return [table]
    left_out = f"no room here for: {', '.join(droppable[:n_dropped])} (a wider terminal or --json has them)"
    return [table, Text(wrapped(left_out, width))]


def _widths(
    cells: Sequence[Mapping[str, str]], names: Sequence[str], numbers: set[str], width: int, *, with_names: bool = False
) -> dict[str, int] | None:
    """Widths of columns that break no word, number or name; None where they do not fit."""
    columns = {name: [*([name] if with_names else []), *(row[name] for row in cells)] for name in names}
    wanted = {name: max(cell_len(text) for text in texts) for name, texts in columns.items()}
    widths = {
        name: wanted[name] if name in numbers else max(cell_len(word) for text in texts for word in ["", *text.split()])
        for name, texts in columns.items()
    }
    room = width - 1 - sum(3 + column for column in widths.values())  # a border, and a blank on either side
    if room < 0:
        return None
    for _ in range(room):
        name = max(names, key=lambda name: wanted[name] / max(1, widths[name]))
        if widths[name] >= wanted[name]:
            break
        widths[name] += 1
    return widths


def _cell(value: str | float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def _print(console: Console, *parts: RenderableType) -> None:
    with console.capture() as captured:
        for part in parts:
            console.print(part, soft_wrap=isinstance(part, Text))
    _to_stdout(captured.get())


def print_lines(lines: Iterable[str]) -> None:
    """Print lines of a result without wrapping, so that paths can be copied."""
    _to_stdout("".join(line + "\n" for line in lines))


def print_prose(lines: Iterable[str]) -> None:
    """Print sentences; on a terminal they are wrapped at words."""
    console = Console(highlight=False, emoji=False)
    print_lines(wrapped(line, console.width) if console.is_terminal else line for line in lines)


def print_markdown(text: str) -> None:
    """Print a page of Markdown, rendered for the width of the terminal."""
    from samtune.console.markdown import render  # takes a fifth of a second

    _to_stdout(render(text))


def is_watched() -> bool:
    """Whether results go to a terminal, where they can be updated in place."""
    return Console().is_interactive


def watch_rows(
    title: str, look: Callable[[], tuple[Sequence[Row], Sequence[str]]], *, seconds: float, droppable: Sequence[str]
) -> None:
    """Show rows and the lines below them on a terminal, and update them every few seconds, until Ctrl-C."""
    console = Console(highlight=False, emoji=False)

    def draw() -> RenderableType:
        rows, lines = look()
        table = _table(title, rows, droppable, console) if rows else []
        footer = f"{time.strftime('%H:%M:%S')}, again every {seconds:g} s; Ctrl-C ends"
        return Group(*table, *(Text(line) for line in [*lines, footer]))

    with suppress(KeyboardInterrupt), Live(draw(), console=console, auto_refresh=False) as shown:
        while True:
            time.sleep(seconds)
            shown.update(draw(), refresh=True)


def _to_stdout(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
