"""Rows of metrics and predictions -> charts with their captions and tables, and pictures: what a page shows of them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from samtune.config import loading
from samtune.errors import SamtuneError
from samtune.report import svg_charts
from samtune.report.html import Chart, Column, Table, cell
from samtune.report.stats import expected_calibration_error, wilson_interval
from samtune.report.svg_charts import Series, Span, Words
from samtune.runs.metrics import epoch_means
from samtune.runs.predictions import Counts, Predictions, confused_pairs

if TYPE_CHECKING:
    from samtune.data.source import Split

Opened = Mapping[str, "Split | None"]
SPLITS = {"test": "test", "val": "validation"}  # in words
_LABELLED = 40  # classes up to which a confusion matrix has its names, and a table of all cells
_WORST = 25  # classes that the chart of errors shows
_PAIRS = 15  # confusions that are listed; ten times as many where the matrix is too large for a table
_MISTAKES = 12  # pictures
_CALIBRATED = 0.02  # an expected calibration error below which there is nothing to fix


def curves(rows: Sequence[Mapping[str, Any]], per_epoch: int, spans: Sequence[Span]) -> list[Chart]:
    """Loss and top-1 error over epochs, of rows of metrics; what was never measured is left out."""
    drawn = (
        _curve(rows, per_epoch, spans, "loss", "Loss", "loss (nats)"),
        _curve(rows, per_epoch, spans, "top1_error", "Top-1 error", "error (%)"),
    )
    return [chart for chart in drawn if chart]


def _curve(
    rows: Sequence[Mapping[str, Any]],
    per_epoch: int,
    spans: Sequence[Span],
    key: Literal["loss", "top1_error"],
    name: str,
    unit: str,
) -> Chart | None:
    def measured(title: str, split: str) -> Series:
        own = [row for row in rows if row["split"] == split]
        series = Series(title, [row["step"] / per_epoch for row in own], [row[key] for row in own])
        if split != "val" or key == "loss":
            return series
        bounds = [row["top1_error_ci95"] for row in own]
        return series._replace(low=[low for low, _ in bounds], high=[high for _, high in bounds])

    train = [row for row in rows if row["split"] == "train"]
    ends = {row["epoch"]: row["step"] / per_epoch for row in train}
    means = epoch_means(train, key)
    everything = (
        Series("train", list(ends.values()), [means.get(epoch) for epoch in ends]),
        measured("validation", "val"),
        measured("validation, averaged weights", "val_ema"),
    )
    series = [one for one in everything if any(value is not None for value in one.y)]
    if not series:
        return None
    points = {one.name: dict(zip(one.x, one.y, strict=True)) for one in series}
    form = ".2f" if key == "top1_error" else ".4f"
    table = Table(
        f"{name.lower()} by epoch",
        [Column("epoch", ".6g"), *(Column(title, form) for title in points)],
        [(x, *(at.get(x) for at in points.values())) for x in sorted({x for at in points.values() for x in at})],
    )
    last = (f"{one.name} {cell(one.y[-1], form)} at epoch {one.x[-1]:.6g}" for one in series)
    words = Words(f"curve-{key.replace('_', '-')}", f"{name} over epochs", f"Last values: {'; '.join(last)}.")
    caption = f"{name} over epochs" + (
        "; the band is Wilson's 95 % interval of validation." if key == "top1_error" and "validation" in points else "."
    )
    return Chart(
        svg_charts.lines(words, series, x_label="epoch", y_label=unit, spans=spans, whole=True), caption, table
    )


def by_class(found: Predictions, names: Sequence[str]) -> dict[str, Any]:
    """Errors of each class, confused pairs, and the confusion matrix."""
    counts = found.confusion(len(names))
    n, wrong = counts.sum(axis=1), counts.sum(axis=1) - counts.diagonal()
    there = np.flatnonzero(n)
    order = there[np.lexsort((there, -n[there], -wrong[there] / n[there]))].tolist()
    error = {i: 100 * int(wrong[i]) / int(n[i]) for i in order}
    bounds = {i: tuple(100 * bound for bound in wilson_interval(int(wrong[i]), int(n[i]))) for i in order}
    table = Table(
        f"errors of {len(order)} classes on {SPLITS[found.split]}, the worst first",
        [Column("class"), Column("images", "d"), Column("wrong", "d"), *_percents("error", "from", "to")],
        [(names[i], int(n[i]), int(wrong[i]), error[i], *bounds[i]) for i in order],
    )
    worst = order[:_WORST]
    chart = svg_charts.intervals(
        Words("per-class", "Error of each class", f"Worst: {names[worst[0]]}, {error[worst[0]]:.2f} %."),
        [names[i] for i in worst],
        [error[i] for i in worst],
        [(bounds[i][0], bounds[i][1]) for i in worst],
        x_label="error (%)",
    )
    shown = "" if len(worst) == len(order) else f"The worst {len(worst)} of {len(order)} classes. "
    absent = f" {len(names) - len(order)} classes have no image there." if len(order) < len(names) else ""
    free = sum(error[i] == 0 for i in order)
    return {
        "errors_note": f"{free} of {len(order)} classes have no error on {SPLITS[found.split]}.{absent} The fewer "
        "images a class has, the wider its interval.",
        "per_class": Chart(chart, f"{shown}Error of each class with Wilson's 95 % interval, the worst first.", table),
        "pairs": _pairs(counts, names, _PAIRS),
        "confusion": _confusion(counts, names),
    }


def _percents(*names: str) -> list[Column]:
    return [Column(f"{name} (%)", ".2f") for name in names]


def _pairs(counts: Counts, names: Sequence[str], most: int) -> Table | None:
    pairs = confused_pairs(counts, most)
    if not pairs:
        return None
    return Table(
        "the most frequent confusions",
        [Column("true class"), Column("taken for"), Column("images", "d"), Column("of the class", "d")],
        [(names[true], names[other], int(counts[true, other]), int(counts[true].sum())) for true, other in pairs],
    )


def _confusion(counts: Counts, names: Sequence[str]) -> Chart:
    labelled = len(names) <= _LABELLED
    table = _pairs(counts, names, 10 * _PAIRS)
    if labelled or table is None:
        table = Table(
            "images by true class (rows) and predicted class (columns)",
            [Column("true class"), *(Column(name, "d") for name in names)],
            [(name, *row) for name, row in zip(names, counts.tolist(), strict=True)],
        )
    right = f"{int(counts.trace())} of {int(counts.sum())} images lie on the diagonal."
    words = Words("confusion", "Confusion matrix", f"{len(names)} classes; {right}")
    without = "" if labelled else f" {len(names)} classes, in the order of their labels: too many to be named."
    caption = (
        "Confusion matrix: a row for each true class. The deeper a cell's colour, the larger its share of the row, by "
        f"the root, so that single mistakes are seen.{without}"
    )
    return Chart(svg_charts.heatmap(words, counts, names if labelled else None), caption, table)


def calibration(found: Predictions, *, classes: int, smoothing: float, has_val: bool) -> dict[str, Any]:
    """Whether the model is as sure as it is right; if not, why, and what mends it.

    classes: how many there are. smoothing: of the labels in training. has_val: whether there are images to fit a
    temperature on.
    """
    error, bins = expected_calibration_error(found.probability, found.correct)
    confidence, accuracy = 100 * found.probability.mean(), 100 * found.correct.mean()
    surer = "surer than it is right" if confidence > accuracy else "less sure than it is right"
    table = Table(
        "reliability by bin of confidence",
        [Column("confidence"), Column("images", "d"), Column("mean confidence", ".4f"), Column("accuracy", ".4f")],
        [(f"{one.low:.3f} to {one.high:.3f}", one.n, one.confidence, one.accuracy) for one in bins],
    )
    words = Words("reliability", "Reliability diagram", f"Expected calibration error {100 * error:.2f} %.")
    return {
        "calibration_note": f"Expected calibration error: {100 * error:.2f} % ({len(bins)} bins of equal width, Guo et "
        f"al. 2017). The model gives its predictions a probability of {confidence:.2f} % in the mean, and "
        f"{accuracy:.2f} % of them are right: it is {surer}."
        + _hint(error, confidence < accuracy, smoothing, has_val, classes),
        "calibration": Chart(
            svg_charts.reliability(words, bins),
            "Accuracy against confidence: on the dotted line a model is as sure as it is right. Below, the images of "
            "each bin; where they are few, its bar says little.",
            table,
        ),
    }


def _hint(error: float, is_unsure: bool, smoothing: float, has_val: bool, classes: int) -> str:
    if error < _CALIBRATED:
        return ""
    why = ""
    if is_unsure and smoothing > 0:
        most = 100 * (1 - smoothing * (1 - 1 / classes))
        why = (
            f" Label smoothing ({smoothing:g}) does that: in training the right class is to get {most:.4g} %, not 100."
        )
    if not has_val:
        return f"{why} One temperature would fix most of it, fitted on validation images; this run held none out."
    return (
        f"{why} `samtune eval RUN --temperature` fits one temperature on validation, which leaves every class as it is "
        "and mends most of this; `samtune predict` then uses it."
    )


def mistakes(folder: Path, found: Predictions, names: Sequence[str], opened: Opened | None = None) -> dict[str, Any]:
    """The wrong predictions with the highest probability, with their pictures where the data set is still there.

    opened: its splits by name, else they are opened.
    """
    chosen = found.confident_mistakes(_MISTAKES)
    rows = [
        (int(found.rows[i]), names[found.labels[i]], names[found.predicted[i]], float(found.probability[i]))
        for i in chosen.tolist()
    ]
    pictures: Sequence[str] = [""] * len(rows)
    missing = None
    try:
        if rows:
            # With what opens the data set, for the pictures alone.
            from samtune.data.thumbnails import open_splits, thumbnails

            opened = opened or open_splits(loading.load(folder / "config.toml"))
            pictures = thumbnails(opened.get(found.split), found.rows[chosen], found.labels[chosen])
    except (SamtuneError, OSError) as error:
        missing = f"The pictures cannot be shown: {str(error).splitlines()[0]}."
    return {
        "pictures_missing": missing,
        "mistakes": [
            {
                "label": label,
                "prediction": prediction,
                "probability": f"{probability:.3f}",
                "picture": picture,
                "alt": f"Image {row} of {SPLITS[found.split]}: {label}, taken for {prediction}",
            }
            for (row, label, prediction, probability), picture in zip(rows, pictures, strict=True)
        ],
        "mistakes_table": Table(
            "wrong predictions with the highest probability",
            [Column("image", "d"), Column("true class"), Column("taken for"), Column("probability", ".3f")],
            rows,
        ),
    }
