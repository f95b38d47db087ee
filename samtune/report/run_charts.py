"""Charts, tables and pictures of a run's predictions: errors by class, calibration, most confident mistakes."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from samtune.config import loading
from samtune.errors import SamtuneError
from samtune.report import svg_charts
from samtune.report.html import Chart, Column, Table
from samtune.report.stats import expected_calibration_error, wilson_interval
from samtune.report.svg_charts import Heading
from samtune.runs.predictions import Counts, Predictions, confused_pairs

if TYPE_CHECKING:
    from samtune.data.source import Split

Splits = Mapping[str, "Split | None"]
SPLIT_NAMES = {"test": "test", "val": "validation"}
_LABELLED = 40  # classes up to which a confusion matrix has its names, and a table of all cells
_WORST = 25  # classes that the chart of errors shows
_PAIRS = 15  # confusions that are listed; ten times as many where the matrix is too large for a table
_MISTAKES = 12  # pictures
_CALIBRATED = 0.02  # an expected calibration error below which there is nothing to fix


def by_class(predictions: Predictions, names: Sequence[str]) -> dict[str, Any]:
    """Errors of each class, confused pairs, and the confusion matrix."""
    counts = predictions.confusion(len(names))
    n, wrong = counts.sum(axis=1), counts.sum(axis=1) - counts.diagonal()
    present = np.flatnonzero(n)
    order = present[np.lexsort((present, -n[present], -wrong[present] / n[present]))].tolist()
    error = {i: 100 * int(wrong[i]) / int(n[i]) for i in order}
    bounds = {i: [100 * bound for bound in wilson_interval(int(wrong[i]), int(n[i]))] for i in order}
    split = SPLIT_NAMES[predictions.split]
    table = Table(
        f"errors of {len(order)} classes on {split}, the worst first",
        [Column("class"), Column("images", "d"), Column("wrong", "d")]
        + [Column(f"{name} (%)", ".2f") for name in ("error", "from", "to")],
        [(names[i], int(n[i]), int(wrong[i]), error[i], *bounds[i]) for i in order],
    )
    worst = order[:_WORST]
    chart = svg_charts.intervals(
        Heading("per-class", "Error of each class", f"Worst: {names[worst[0]]}, {error[worst[0]]:.2f} %."),
        [names[i] for i in worst],
        [error[i] for i in worst],
        [(bounds[i][0], bounds[i][1]) for i in worst],
        x_label="error (%)",
    )
    shown = "" if len(worst) == len(order) else f"The worst {len(worst)} of {len(order)} classes. "
    absent = f" {len(names) - len(order)} classes have no image there." if len(order) < len(names) else ""
    return {
        "errors_note": f"{sum(error[i] == 0 for i in order)} of {len(order)} classes have no error on {split}.{absent} "
        "The fewer images a class has, the wider its interval.",
        "per_class": Chart(chart, f"{shown}Error of each class with Wilson's 95 % interval, the worst first.", table),
        "pairs": _pairs(counts, names, _PAIRS),
        "confusion": _confusion(counts, names),
    }


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
    heading = Heading("confusion", "Confusion matrix", f"{len(names)} classes; {right}")
    unnamed = "" if labelled else f" {len(names)} classes, in the order of their labels: too many to be named."
    caption = (
        "Confusion matrix: a row for each true class. The deeper a cell's colour, the larger its share of the row, by "
        f"the root, so that single mistakes are seen.{unnamed}"
    )
    return Chart(svg_charts.heatmap(heading, counts, names if labelled else None), caption, table)


def calibration(predictions: Predictions, *, classes: int, smoothing: float, has_val: bool) -> dict[str, Any]:
    """Reliability diagram and calibration error; where the error is large, its likely cause and remedy.

    classes: number of classes. smoothing: label smoothing in training. has_val: whether there are validation images
    to fit a temperature on.
    """
    error, bins = expected_calibration_error(predictions.probability, predictions.correct)
    confidence, accuracy = 100 * predictions.probability.mean(), 100 * predictions.correct.mean()
    surer = "surer" if confidence > accuracy else "less sure"
    table = Table(
        "reliability by bin of confidence",
        [Column("confidence"), Column("images", "d"), Column("mean confidence", ".4f"), Column("accuracy", ".4f")],
        [(f"{one.low:.3f} to {one.high:.3f}", one.n, one.confidence, one.accuracy) for one in bins],
    )
    heading = Heading("reliability", "Reliability diagram", f"Expected calibration error {100 * error:.2f} %.")
    return {
        "calibration_note": f"Expected calibration error: {100 * error:.2f} % ({len(bins)} bins of equal width, Guo et "
        f"al. 2017). The model gives its predictions a probability of {confidence:.2f} % in the mean, and "
        f"{accuracy:.2f} % of them are right: it is {surer} than it is right."
        + _calibration_hint(error, confidence < accuracy, smoothing, has_val, classes),
        "calibration": Chart(
            svg_charts.reliability(heading, bins),
            "Accuracy against confidence: on the dotted line a model is as sure as it is right. Below, the images of "
            "each bin; where they are few, its bar says little.",
            table,
        ),
    }


def _calibration_hint(error: float, is_unsure: bool, smoothing: float, has_val: bool, classes: int) -> str:
    if error < _CALIBRATED:
        return ""
    cause, most = "", f"{100 * (1 - smoothing * (1 - 1 / classes)):.4g} %"
    if is_unsure and smoothing > 0:
        cause = f" Label smoothing ({smoothing:g}) does that: in training the right class is to get {most}, not 100."
    if not has_val:
        return f"{cause} One temperature would fix most of it, fitted on validation images; this run held none out."
    return (
        f"{cause} `samtune eval RUN --temperature` fits one temperature on validation, which leaves every class as it "
        "is and mends most of this; `samtune predict` then uses it."
    )


def mistakes(
    folder: Path, predictions: Predictions, names: Sequence[str], splits: Splits | None = None
) -> dict[str, Any]:
    """The wrong predictions with the highest probability, with their pictures if the data set can be read.

    splits: the splits by name; by default they are opened.
    """
    chosen = predictions.confident_mistakes(_MISTAKES)
    columns = (predictions.rows, predictions.labels, predictions.predicted, predictions.probability)
    rows = [
        (row, names[label], names[predicted], probability)
        for row, label, predicted, probability in zip(*(column[chosen].tolist() for column in columns), strict=True)
    ]
    pictures: Sequence[str] = [""] * len(rows)
    missing = None
    try:
        if rows:
            from samtune.data.thumbnails import open_splits, thumbnails  # with the libraries that read data sets

            splits = splits or open_splits(loading.load(folder / "config.toml"))
            pictures = thumbnails(splits.get(predictions.split), predictions.rows[chosen], predictions.labels[chosen])
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
                "alt": f"Image {row} of {SPLIT_NAMES[predictions.split]}: {label}, taken for {prediction}",
            }
            for (row, label, prediction, probability), picture in zip(rows, pictures, strict=True)
        ],
        "mistakes_table": Table(
            "wrong predictions with the highest probability",
            [Column("image", "d"), Column("true class"), Column("taken for"), Column("probability", ".3f")],
            rows,
        ),
    }
