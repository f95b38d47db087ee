"""The rows of metrics.jsonl: read, averaged over epochs, compared, and checked for a collapse."""

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

_NEAR_CHANCE = 0.9  # of the error of a guess


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl; what is no row is passed over, and without the file there is none."""
    rows = []
    with suppress(OSError):
        for line in (folder / "metrics.jsonl").read_text(encoding="utf-8", errors="replace").splitlines():
            with suppress(ValueError):
                row = json.loads(line)
                if isinstance(row, dict) and {"step", "epoch", "split", "seconds"} <= row.keys():
                    rows.append(row)
    return rows


def best_key(row: Mapping[str, Any]) -> tuple[float, float]:
    """What makes a validation row the best: the lowest top-1 error, then the lowest loss."""
    return row["top1_error"], row["loss"]


def epoch_means(train: Sequence[Mapping[str, Any]], key: str = "loss") -> dict[int, float]:
    """Mean over the images of each epoch, from the rows of its parts; rows in which no step was applied have none."""
    totals: dict[int, tuple[float, int]] = {}
    for row in train:
        if row[key] is None:
            continue
        total, n = totals.get(row["epoch"], (0.0, 0))
        totals[row["epoch"]] = (total + row[key] * row["n"], n + row["n"])
    return {epoch: total / n for epoch, (total, n) in totals.items()}


def collapse_warning(epoch: int, loss: float, top1_error: float, classes: int) -> str | None:
    """The warning for an epoch that is no better than a guess by mean train loss, ln(classes), and by top-1 error.

    A model that is right far more often has only been too sure of what it got wrong, as a new head is at first.
    """
    chance = math.log(classes)
    # Nor NaN, where no step was applied.
    if not (loss >= chance and top1_error >= _NEAR_CHANCE * 100 * (1 - 1 / classes)):
        return None
    return (
        f"epoch {epoch}: the train loss is {loss:.2f}, no better than guessing (ln {classes} = {chance:.2f}). "
        "Likely causes: the learning rate is too high (--lr, --head-lr-factor), the gradient is not clipped "
        "(--clip-grad), rho is too large, the labels do not belong to the images, or the weights expect other inputs."
    )
