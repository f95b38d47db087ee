"""Charts as SVG for a page. The only user of matplotlib.

A chart has a title and a description for screen readers. It takes font and colours from its page (the custom properties
--ink, --quiet, --rule and --series-1 to --series-6), so that it is legible on light and dark. The same numbers give the
same text.
"""

import io
import re
import unicodedata
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple
from xml.etree import ElementTree

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from samtune.report.stats import ReliabilityBin

Numbers = Sequence[float | None]  # None leaves a gap

_WIDTH = 330.0  # of a chart; a page scales it, and 10 units of text with it
_LONGEST = 24  # characters of a name in a chart
_DENSE = 20  # classes from which on a heatmap is larger, with shorter names
_NUMBERED = 12  # classes up to which a heatmap has its numbers in it
# Stand-ins that matplotlib can draw with, and what takes their place, with a colour for outside of a page.
_INK, _QUIET, _RULE = "#0000f1", "#0000f2", "#0000f3"
_SERIES = ("#0000f4", "#0000f5", "#0000f6", "#0000f7", "#0000f8", "#0000f9")
_PROPERTIES = {
    _INK: "var(--ink, #222)",
    _QUIET: "var(--quiet, #666)",
    _RULE: "var(--rule, #ccc)",
    **{colour: f"var(--series-{i}, #456)" for i, colour in enumerate(_SERIES, start=1)},
}
_HEAT = (74, 128, 196)  # RGB; pixels have no custom properties, but this is seen on light and on dark
_MARKERS = "os^Dv*"
_DASHES = ("-", (0, (5, 2)), (0, (2, 1.5)), (0, (5, 1.5, 1, 1.5)), (0, (8, 2)), (0, (1, 1)))
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "samtune",
    "text.parse_math": False,  # a name may hold a dollar
    "font.size": 10,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _QUIET,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _RULE,
    "grid.linewidth": 0.6,
    "xtick.color": _QUIET,
    "ytick.color": _QUIET,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "legend.frameon": False,
    "legend.handlelength": 2.6,
    "lines.linewidth": 1.8,
    "lines.markersize": 4.5,
}


class Heading(NamedTuple):
    """Title and description of a chart, for screen readers. id: unique in its page."""

    id: str
    title: str
    description: str


class Series(NamedTuple):
    """A line through points, with an interval if low and high are given. rings: indices of marked points."""

    name: str
    x: Sequence[float]
    y: Numbers
    low: Numbers | None = None
    high: Numbers | None = None
    rings: Sequence[int] = ()


class Span(NamedTuple):
    """A part of the x axis that is marked."""

    name: str
    low: float
    high: float


def lines(
    heading: Heading,
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str,
    spans: Sequence[Span] = (),
    whole: bool = False,
    bars: bool = False,
    ticks: Sequence[str] | None = None,
    from_zero: bool = True,
    log: bool = False,
    joined: bool = True,
) -> str:
    """Lines over x. whole: ticks of x only at whole numbers.

    bars: intervals as bars, not as bands, and y not from 0. ticks: names of x = 0, 1, ..., for x that is no number.
    from_zero: whether both axes start at 0. log: y on a logarithmic scale. joined: False draws the points alone.
    """
    shift = 0.08 if ticks else 0.0  # between the series, in ticks

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for i, one in enumerate(series):
            colour = _SERIES[i % len(_SERIES)]
            x = [at + shift * (i - (len(series) - 1) / 2) for at in one.x]
            if one.low is not None and one.high is not None:
                low, high = _floats(one.low), _floats(one.high)
                if bars:
                    axes.vlines(x, low, high, color=colour, linewidth=1.2)
                else:
                    axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
            marker = _MARKERS[i % len(_MARKERS)] if len(one.x) <= 40 or not joined else ""
            dashes = _DASHES[i % len(_DASHES)] if joined else ""
            axes.plot(x, _floats(one.y), color=colour, marker=marker, linestyle=dashes, label=_label(one.name))
            ring: dict[str, Any] = {"markersize": 11, "markerfacecolor": "none", "markeredgewidth": 1.2}
            for at in one.rings:
                axes.plot(x[at], _floats(one.y)[at], "o", color=_INK, **ring)
        for span in spans:
            axes.axvspan(span.low, span.high, color=_QUIET, alpha=0.12, linewidth=0, label=_label(span.name))
        axes.set(xlabel=x_label, ylabel=y_label)
        if ticks is not None:
            axes.set_xticks(range(len(ticks)), [_label(tick) for tick in ticks])
            axes.set_xlim(-0.5, len(ticks) - 0.5)
        elif from_zero:
            axes.set_xlim(left=0)
        if log:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")  # the default is TeX, which a browser does not read
        elif from_zero and not bars:
            axes.set_ylim(bottom=0)
        if whole and ticks is None:
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)

    return _drawn(heading, 230, draw)


def intervals(
    heading: Heading,
    names: Sequence[str],
    values: Sequence[float],
    bounds: Sequence[tuple[float, float] | None],
    *,
    x_label: str,
    dots: Sequence[Sequence[float]] = (),
    zero: Literal["start", "line", "anywhere"] = "start",
) -> str:
    """A point for each name, from top to bottom, with its interval, if there is one.

    dots: the values that each point is the mean of. zero: x starts at 0, or has a line at 0, or neither.
    """

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for y, interval in enumerate(bounds):
            if interval:
                axes.hlines(y, *interval, color=_SERIES[0], linewidth=1.4)
        small: dict[str, Any] = {"color": _SERIES[1], "markersize": 3, "alpha": 0.75, "markeredgewidth": 0}
        for y, of_name in enumerate(dots):
            axes.plot(of_name, [y + 0.22] * len(of_name), "o", **small)
        axes.plot(values, range(len(names)), "o", color=_SERIES[0])
        axes.set_yticks(range(len(names)), [_label(name, 32) for name in names])
        axes.set(xlabel=x_label, ylim=(len(names) - 0.4, -0.6))
        if zero == "start":
            axes.set_xlim(left=0)
        elif zero == "line":
            axes.axvline(0, color=_INK, linewidth=1)
        axes.tick_params(axis="y", length=0)
        axes.grid(visible=False, axis="y")

    return _drawn(heading, 60 + 16 * len(names), draw)


def heatmap(heading: Heading, counts: npt.NDArray[np.int64], names: Sequence[str] | None) -> str:
    """A confusion matrix (true, predicted), each row as shares of its sum. names: None for too many classes.

    With few classes the cells show their counts. The opacity of a cell is the root of its share, so that rare
    confusions are visible.
    """
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    numbered = len(counts) <= _NUMBERED
    scale = 1 if names is None else max(1, len(names) / _DENSE)
    pixels = np.empty((*counts.shape, 4), np.uint8)
    pixels[..., :3] = _HEAT
    # With a number in it, a cell stays so pale that the number is read.
    pixels[..., 3] = np.rint(255 * (0.5 if numbered else 1) * np.sqrt(shares))

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        axes.imshow(pixels, interpolation="none")
        axes.grid(visible=False)
        axes.set(xlabel="predicted class", ylabel="true class")
        if names is None:
            axes.set_xticks([])
            axes.set_yticks([])
        else:
            positions, labels = range(len(names)), [_label(name, _LONGEST if scale == 1 else 14) for name in names]
            # The label's end stands at its tick, whatever the font of the reader.
            upright: dict[str, Any] = {"rotation": 90, "rotation_mode": "anchor", "ha": "right", "va": "center"}
            axes.set_xticks(positions, labels, **upright)
            axes.set_yticks(positions, labels)
            axes.tick_params(length=0)
        if numbered:
            for row, column in np.argwhere(counts).tolist():
                axes.text(column, row, f"{counts[row, column]}", ha="center", va="center", fontsize=9)

    return _drawn(heading, 330 * scale, draw, scale * _WIDTH)


def contours(
    heading: Heading, at: Sequence[float], panels: Sequence[tuple[str, Sequence[Sequence[float]]]], *, label: str
) -> str:
    """Contour lines of values on a plane, a panel for each name, all at the same levels.

    at: positions along both directions. panels: name and values (len(at), len(at)), the first direction along rows.
    label: what the values are.
    """
    surfaces = [np.array(values, dtype=np.float64).T for _, values in panels]
    finite = np.concatenate([values[np.isfinite(values) & (values > 0)] for values in surfaces])
    levels = np.geomspace(finite.min(), finite.max(), 12) if len(finite) and finite.min() < finite.max() else [0.0, 1.0]

    def draw(figure: Figure) -> None:
        for i, ((name, _), values) in enumerate(zip(panels, surfaces, strict=True)):
            axes = figure.add_subplot(len(panels), 1, 1 + i)
            drawn = axes.contour(at, at, values, levels=levels, colors=[_SERIES[i % len(_SERIES)]], linewidths=1)
            axes.clabel(drawn, levels=list(levels[::3]), fmt="%.2g", fontsize=8, colors=_INK)
            axes.plot(0, 0, "o", color=_INK, markersize=4)
            axes.locator_params(nbins=5)
            axes.set(xlabel="first direction", ylabel=f"second direction, {label}", aspect="equal")
            axes.set_title(_label(name), fontsize=10)

    return _drawn(heading, 300 * len(panels), draw)


def reliability(heading: Heading, bins: Sequence[ReliabilityBin]) -> str:
    """Accuracy against confidence, with the diagonal, and below it the number of predictions in each bin."""
    filled = [one for one in bins if one.n]
    width = bins[0].high - bins[0].low

    def draw(figure: Figure) -> None:
        above, below = figure.subplots(2, sharex=True, height_ratios=(3, 1))
        centres = [(one.low + one.high) / 2 for one in filled]
        above.bar(centres, [one.accuracy or 0.0 for one in filled], 0.9 * width, color=_SERIES[0], alpha=0.35)
        above.plot([0, 1], [0, 1], color=_QUIET, linewidth=1, linestyle=_DASHES[2], label="confidence = accuracy")
        means = _floats([one.confidence for one in filled]), _floats([one.accuracy for one in filled])
        above.plot(*means, "o", color=_SERIES[0], label="mean of a bin")
        above.set(ylabel="accuracy", ylim=(0, 1.02))
        above.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)
        below.bar(centres, [one.n for one in filled], 0.9 * width, color=_QUIET, alpha=0.6)
        below.set(xlabel="confidence", ylabel="images", xlim=(0, 1))
        below.yaxis.set_major_locator(MaxNLocator(2, integer=True))
        figure.align_ylabels()

    return _drawn(heading, 290, draw)


def _floats(values: Numbers) -> list[float]:
    return [float("nan") if value is None else value for value in values]


def _label(name: str, longest: int = _LONGEST) -> str:
    """The printable characters of a name, shortened."""
    text = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in unicodedata.normalize("NFC", name))
    return text if len(text) <= longest else text[: longest - 1] + "…"


def _drawn(heading: Heading, height: float, draw: Callable[[Figure], None], width: float = _WIDTH) -> str:
    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)  # the reader's browser has its own
        matplotlib.rcdefaults()  # whatever the user has set for charts of their own
        matplotlib.rcParams.update(_STYLE)
        figure = Figure((width / 72, height / 72), layout="constrained")
        draw(figure)
        text = io.BytesIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    return _inlined(heading, ElementTree.fromstring(text.getvalue()))


def _inlined(heading: Heading, root: ElementTree.Element) -> str:
    """Make a chart part of a page: add title and description, use the page's colours and font, make ids unique."""
    box = root.get("viewBox", "")
    root.attrib.clear()
    for parent in root.iter():
        for child in [child for child in parent if child.tag.endswith(("}metadata", "}style"))]:
            parent.remove(child)
    text = " ".join(value for element in root.iter() for value in element.attrib.values())
    used = set(re.findall(r"#([\w-]+)", text))
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        found = {key.rpartition("}")[2]: value for key, value in element.attrib.items()}
        if found.get("id") not in used:
            found.pop("id", None)
        element.attrib.clear()
        element.attrib.update({key: _restyled(key, value, heading.id) for key, value in found.items()})
    names = {"title": heading.title, "desc": heading.description}
    for i, (tag, content) in enumerate(names.items()):
        element = ElementTree.Element(tag, {"id": f"{heading.id}-{tag}"})
        element.text = content
        root.insert(i, element)
    # As wide as the page lets it, but no larger than its text is pleasant to read.
    widest = f"max-width: {float(box.split()[2]) / 12:.1f}rem"
    root.attrib |= {"class": "chart", "role": "img", "viewBox": box, "style": widest}
    root.attrib["aria-labelledby"], root.attrib["aria-describedby"] = (f"{heading.id}-{tag}" for tag in names)
    return ElementTree.tostring(root, encoding="unicode")


def _restyled(key: str, value: str, name: str) -> str:
    if key == "id":
        return f"{name}-{value}"
    if key == "href" and value.startswith("#"):
        return f"#{name}-{value[1:]}"
    if key == "href":
        return re.sub(r"\s", "", value)
    value = value.replace("url(#", f"url(#{name}-")
    value = re.sub("font-family: [^;]*;? ?", "", value)
    return re.sub("#0000f[1-9]", lambda found: _PROPERTIES[found[0]], value)
