"""Learning curves of several groups of runs in one chart: each is the mean over the seeds of its group."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from statistics import fmean
from typing import Literal

from samtune.report import svg_charts
from samtune.report.html import Chart, Column, Table
from samtune.report.svg_charts import Series, Words
from samtune.runs.folder import read_provenance
from samtune.runs.metrics import epoch_means, read_metrics

_Curve = dict[float, float | None]  # by epoch; None where a value was not finite
_NAMES = {
    ("train", "loss"): ("Train loss", "loss (nats)", ".4f"),
    ("val", "top1_error"): ("Validation error", "error (%)", ".2f"),
}


def curve(
    name: str, groups: Mapping[str, Sequence[Path]], split: Literal["train", "val"], about: str = ""
) -> Chart | None:
    """Train loss or validation error over epochs, at the weights w; None where no run has rows of it.

    name: unique in its page. groups: run folders, by what their group is called. about: which runs these are.
    """
    key: Literal["loss", "top1_error"] = "loss" if split == "train" else "top1_error"
    found = {group: _mean([_read(folder, split, key) for folder in folders]) for group, folders in groups.items()}
    found = {group: curve for group, curve in found.items() if curve}
    if not found:
        return None
    title, unit, form = _NAMES[split, key]
    heading = f"{title} over epochs{about and f', {about}'}"
    ends = (
        f"{group} {format(value, form)}" for group, at in found.items() if (value := list(at.values())[-1]) is not None
    )
    words = Words(name, heading, f"Last values: {'; '.join(ends)}.")
    series = [Series(group, list(at), list(at.values())) for group, at in found.items()]
    several = any(len(folders) > 1 for folders in groups.values())
    epochs = sorted({epoch for at in found.values() for epoch in at})
    table = Table(
        f"{title.lower()} by epoch{about and f', {about}'}",
        [Column("epoch", ".4g"), *(Column(group, form) for group in found)],
        [(epoch, *(at.get(epoch) for at in found.values())) for epoch in epochs],
    )
    caption = f"{heading}{'; the mean over seeds' if several else ''}."
    return Chart(svg_charts.lines(words, series, x_label="epoch", y_label=unit, whole=True), caption, table)


def _read(folder: Path, split: str, key: Literal["loss", "top1_error"]) -> _Curve:
    with suppress(OSError, ValueError, KeyError, TypeError):
        per_epoch = read_provenance(folder)["steps_per_epoch"]
        rows = [row for row in read_metrics(folder) if row["split"] == split]
        if split != "train":
            return {row["step"] / per_epoch: row[key] for row in rows}
        means = epoch_means(rows, key)
        return {
            step / per_epoch: means.get(epoch) for epoch, step in {row["epoch"]: row["step"] for row in rows}.items()
        }
    return {}  # a run without a readable record has no curve


def _mean(curves: Sequence[_Curve]) -> _Curve:
    there = [curve for curve in curves if curve]
    if not there:
        return {}
    found: _Curve = {}
    for epoch in there[0]:
        values = [curve.get(epoch) for curve in there]
        known = [value for value in values if value is not None]
        found[epoch] = fmean(known) if len(known) == len(there) else None
    return found
