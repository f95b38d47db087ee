"""Learning curves: charts of loss or error over epochs, of one run, and of groups of runs as means over seeds."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from samtune.report import svg_charts
from samtune.report.html import Chart, Column, Table, cell
from samtune.report.svg_charts import Heading, Series, Span
from samtune.runs.folder import read_provenance
from samtune.runs.metrics import epoch_means, read_metrics

Key = Literal["loss", "top1_error"]
Curve = dict[float, float | None]  # by epoch; None where a value was not finite
_UNITS = {"loss": ("loss (nats)", ".4f"), "top1_error": ("error (%)", ".2f")}


def run_charts(rows: Sequence[Mapping[str, Any]], per_epoch: int, spans: Sequence[Span]) -> list[Chart]:
    """Charts of loss and top-1 error of a run, from its rows of metrics; without rows, no chart."""
    bounds = _points(rows, "val", "top1_error_ci95", per_epoch)
    charts = []
    names = {"train": "train", "val": "validation", "val_ema": "validation, averaged weights"}
    keys: tuple[tuple[Key, str], ...] = (("loss", "Loss"), ("top1_error", "Top-1 error"))
    for key, title in keys:
        curves = {name: _points(rows, split, key, per_epoch) for split, name in names.items()}
        series = [Series(name, list(curve), list(curve.values())) for name, curve in curves.items()]
        note = ""
        if key == "top1_error" and bounds:
            low, high = zip(*bounds.values(), strict=True)
            series[1] = series[1]._replace(low=low, high=high)
            note = "; the band is Wilson's 95 % interval of validation"
        charts.append(_chart(f"curve-{key.replace('_', '-')}", key, title, series, note=note, spans=spans))
    return [chart for chart in charts if chart]


def group_chart(name: str, groups: Mapping[str, Sequence[Path]], split: str, about: str = "") -> Chart | None:
    """Train loss or validation error of groups of runs, at the weights w; None where no run has rows of it.

    name: unique in its page. groups: run folders, by label of the group. split: train or val. about: which runs.
    """
    key: Key = "loss" if split == "train" else "top1_error"
    title = "Train loss" if split == "train" else "Validation error"
    means = {label: _mean([_read(folder, split, key) for folder in folders]) for label, folders in groups.items()}
    note = "; the mean over seeds" if any(len(folders) > 1 for folders in groups.values()) else ""
    series = [Series(label, list(curve), list(curve.values())) for label, curve in means.items()]
    return _chart(name, key, title, series, about=about and f", {about}", note=note)


def _chart(
    name: str,
    key: Key,
    title: str,
    series: Sequence[Series],
    *,
    about: str = "",
    note: str = "",
    spans: Sequence[Span] = (),
) -> Chart | None:
    """Lines over epochs, and their numbers as a table; None where no series has a value."""
    series = [one for one in series if any(value is not None for value in one.y)]
    if not series:
        return None
    unit, form = _UNITS[key]
    heading = f"{title} over epochs{about}"
    last = (f"{one.name} {cell(one.y[-1], form)} at epoch {one.x[-1]:.6g}" for one in series)
    about_svg = Heading(name, heading, f"Last values: {'; '.join(last)}.")
    svg = svg_charts.lines(about_svg, series, x_label="epoch", y_label=unit, spans=spans, whole=True)
    points = [dict(zip(one.x, one.y, strict=True)) for one in series]
    table = Table(
        f"{title.lower()} by epoch{about}",
        [Column("epoch", ".6g"), *(Column(one.name, form) for one in series)],
        [(x, *(at.get(x) for at in points)) for x in sorted({x for at in points for x in at})],
    )
    return Chart(svg, f"{heading}{note}.", table)


def _points(rows: Sequence[Mapping[str, Any]], split: str, key: str, per_epoch: int) -> dict[float, Any]:
    """Epoch -> value of the rows of a split; of train, the mean over each epoch at its end."""
    rows = [row for row in rows if row["split"] == split]
    if split != "train":
        return {row["step"] / per_epoch: row[key] for row in rows}
    means = epoch_means(rows, key)
    ends = {row["epoch"]: row["step"] / per_epoch for row in rows}
    return {end: means.get(epoch) for epoch, end in ends.items()}


def _read(folder: Path, split: str, key: Key) -> Curve:
    with suppress(OSError, ValueError, KeyError, TypeError):
        return _points(read_metrics(folder), split, key, read_provenance(folder)["steps_per_epoch"])
    return {}  # a run without a readable record has no curve


def _mean(curves: Sequence[Curve]) -> Curve:
    """Mean of the curves that are not empty, at the epochs of the first; None where one of them has no value."""
    curves = [curve for curve in curves if curve]
    mean: Curve = {}
    for epoch in curves[0] if curves else ():
        values = [value for curve in curves if (value := curve.get(epoch)) is not None]
        mean[epoch] = fmean(values) if len(values) == len(curves) else None
    return mean
