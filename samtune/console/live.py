"""The lines of a live display: a bar, a chart of the run so far, and its numbers.

Each function takes the width and returns lines as pieces of (text, style); nothing here draws on a terminal.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Line = list[tuple[str, str]]

_LONGEST_BAR, _SHORTEST_BAR = 24, 8
_ROWS = 5  # of a chart, each of four dots
_AXIS = 6  # characters that the numbers of the y axis take
_NARROWEST = 24  # of a chart, with its axis
_STYLES = {"train": "cyan", "val": "magenta"}
_DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))  # of a braille character, by column and row


def shorten(text: str, room: int) -> str:
    """Shorten a text at its beginning: paths differ at their ends."""
    return text if len(text) <= room else "..." + text[len(text) - room + 3 :] if room > 3 else text[:room]


def duration(seconds: float) -> str:
    """12:34, or 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def draw_bar(
    name: str,
    done: int,
    total: int | None,
    width: int,
    *,
    numbers: Mapping[str, str] | None = None,
    importance: Sequence[str] = (),
    ascii_only: bool = False,
) -> Line:
    """One line: a name, a bar, how many are done, and as many of the numbers as fit.

    total: None where it is not known yet. importance: names of numbers, and "bar", the most important first.
    """
    count = f"{done}/{total}" if total is not None else "..."
    name = shorten(name, max(1, width - len(count) - 1))
    room = width - len(name) - 1 - len(count)
    kept, length = set(), 0
    for part in importance:
        needed = _SHORTEST_BAR + 1 if part == "bar" else 2 + len((numbers or {}).get(part, ""))
        if needed > room:
            break
        room -= needed
        kept.add(part)
    if "bar" in kept:
        length = min(_LONGEST_BAR, _SHORTEST_BAR + room)
    line: Line = [(name, ""), (" ", "")]
    if length:
        filled = round(length * done / total) if total else 0
        full, empty = ("#", "-") if ascii_only else ("━", "━")
        line += [(full * filled, "magenta"), (empty * (length - filled), "bright_black"), (" ", "")]
    line.append((count, "green"))
    return line + [(f"  {text}", "") for part, text in (numbers or {}).items() if part in kept]


@dataclass
class Curves:
    """Loss and top-1 error of a run so far, as points (step, value) by split; best: validation's (error, epoch)."""

    loss: dict[str, list[tuple[int, float]]] = field(default_factory=lambda: {"train": [], "val": []})
    top1_error: dict[str, list[tuple[int, float]]] = field(default_factory=lambda: {"train": [], "val": []})
    best: tuple[float, int] | None = None

    def add(self, row: Mapping[str, Any]) -> None:
        """Add a row of metrics; rows of other splits are ignored."""
        split, step = row["split"], row["step"]
        if split not in self.loss:
            return
        for key, curves in (("loss", self.loss), ("top1_error", self.top1_error)):
            if row.get(key) is not None:
                curves[split].append((step, row[key]))
        error = row.get("top1_error")
        if split == "val" and error is not None and (self.best is None or error < self.best[0]):
            self.best = (error, row["epoch"])

    @property
    def points(self) -> int:
        """Number of points."""
        return sum(map(len, (*self.loss.values(), *self.top1_error.values())))


def draw_chart(curves: Curves, total_steps: int, width: int) -> list[Line]:
    """Loss and error side by side over the steps of the whole run; on a narrow terminal only error, or nothing."""
    gap = 2
    half = (width - gap) // 2
    if half >= _NARROWEST:
        left = _panel("loss", curves.loss, total_steps, half)
        right = _panel("error %", curves.top1_error, total_steps, half)
        return [[*one, (" " * gap, ""), *other] for one, other in zip(left, right, strict=True)]
    return _panel("error %", curves.top1_error, total_steps, width) if width >= _NARROWEST else []


def draw_numbers(width: int, **values: str) -> Line:
    """Names and values on one line, as many as fit, the most important first."""
    line: Line = []
    for name, value in values.items():
        text = f"{'   ' if line else ''}{name} {value}"
        if sum(len(part) for part, _ in line) + len(text) > width:
            break
        line.append((text, ""))
    return line


def _panel(name: str, series: Mapping[str, Sequence[tuple[int, float]]], total_steps: int, width: int) -> list[Line]:
    """A title with the last values, and a plot; all lines are `width` wide."""
    finite = {split: [point for point in points if math.isfinite(point[1])] for split, points in series.items()}
    title: Line = [(name, "bold")]
    for split, points in finite.items():
        text = f" {split} {points[-1][1]:.{3 if name == 'loss' else 1}f}" if points else ""
        if text and sum(len(part) for part, _ in title) + len(text) <= width:
            title.append((text, _STYLES[split]))
    title.append((" " * (width - sum(len(part) for part, _ in title)), ""))
    columns = width - _AXIS - 1
    values = [value for points in finite.values() for _, value in points]
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    dots: dict[str, list[list[int]]] = {}
    for split, points in finite.items():
        dots[split] = [[0] * columns for _ in range(_ROWS)]
        for x, y in _traced(points, total_steps, 2 * columns, low, high):
            dots[split][y // 4][x // 2] |= _DOTS[x % 2][y % 4]
    labels = {0: f"{high:.3g}", _ROWS - 1: f"{low:.3g}"} if values else {}
    return [title] + [
        [(f"{labels.get(row, ''):>{_AXIS}} ", "bright_black"), *_plotted(dots["train"][row], dots["val"][row])]
        for row in range(_ROWS)
    ]


def _traced(
    points: Sequence[tuple[int, float]], total_steps: int, columns: int, low: float, high: float
) -> list[tuple[int, int]]:
    """The dots of a line through the means of the points that fall into one column: (x, y), y from the top."""
    sums: dict[int, tuple[float, int]] = {}
    for step, value in points:
        x = min(columns - 1, step * columns // max(1, total_steps))
        total, n = sums.get(x, (0.0, 0))
        sums[x] = (total + value, n + 1)
    bottom = 4 * _ROWS - 1
    span = (high - low) or 1.0
    places = [(x, bottom - round(bottom * (total / n - low) / span)) for x, (total, n) in sorted(sums.items())]
    dots = places[:1]
    for (x, y), (next_x, next_y) in itertools.pairwise(places):
        right, down = next_x - x, next_y - y
        pieces = max(right, abs(down))
        dots += [(x + round(right * i / pieces), y + round(down * i / pieces)) for i in range(1, pieces + 1)]
    return dots


def _plotted(train: Sequence[int], val: Sequence[int]) -> Line:
    """A row of a plot. A character of both lines has the colour of validation."""
    cells = [
        (chr(0x2800 + (under | over)) if under | over else " ", "val" if over else "train" if under else "")
        for under, over in zip(train, val, strict=True)
    ]
    parts = itertools.groupby(cells, lambda cell: cell[1])
    return [("".join(text for text, _ in part), _STYLES.get(split, "")) for split, part in parts]
