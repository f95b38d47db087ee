"""Predictions -> a page of thumbnails, the least certain first."""

import heapq
import itertools
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from samtune.data.inputs import Input
from samtune.data.thumbnails import picture
from samtune.errors import DataError, plural
from samtune.predict.predictor import Batch, Predictor
from samtune.predict.ranking import ranked
from samtune.predict.writers import writing
from samtune.report import html
from samtune.report.html import Column, Table

MOST = 500
"""Most pictures that a page shows."""
_CLASSES = 3  # of each picture


class Gallery:
    """Collects the least certain of all predicted pictures, and the number of pictures of each class."""

    def __init__(self, predictor: Predictor) -> None:
        self._predictor = predictor
        self._heap: list[tuple[float, int, Input, list[tuple[str, float]]]] = []  # the most certain one first
        self._number = itertools.count()
        self._classes: Counter[str] = Counter()
        self._bad: list[tuple[str, str]] = []

    def add(self, batch: Batch) -> None:
        """Add a batch."""
        names = self._predictor.class_names
        for one, row, best in zip(
            batch.inputs, batch.probabilities, ranked(batch.probabilities, _CLASSES).tolist(), strict=True
        ):
            top = [(names[i], float(row[i])) for i in best]
            self._classes[top[0][0]] += 1
            entry = (-top[0][1], -next(self._number), one, top)
            (heapq.heappush if len(self._heap) < MOST else heapq.heappushpop)(self._heap, entry)
        self._bad += [(one.path, error.cause or error.message) for one, error in batch.bad]

    def write(self, path: Path) -> None:
        """Draw the page. Raises MachineError where it cannot be written."""
        content = self._content()
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            html.write(path, "predictions.html", content)

    def _content(self) -> dict[str, Any]:
        predictor, n = self._predictor, sum(self._classes.values())
        shown = sorted(self._heap, reverse=True)
        which = f"the {len(shown)} least certain of {n} pictures" if len(shown) < n else plural(n, "picture")
        counts = [(name, count, 100 * count / n) for name, count in self._classes.most_common()]
        columns = [Column("class"), Column("pictures", "d"), Column("share (%)", ".1f")]
        sections = {"classes": "Classes", "pictures": "Pictures"} | ({"bad": "Left out"} if self._bad else {})
        return {
            "title": f"{plural(n, 'picture')}, {len(predictor.class_names)} classes",
            "subtitle": f"Predicted by checkpoint {_short(predictor.folder)}, step {predictor.manifest['step']}.",
            "sections": sections,
            "reading": _reading(predictor),
            "counts": Table("pictures by predicted class", columns, counts),
            "which": f"Shown are {which}: the least certain first, by the probability of the predicted class.",
            "pictures": [self._shown(one, top) for _, _, one, top in shown],
            "bad": Table("pictures that cannot be decoded", [Column("picture"), Column("reason")], self._bad),
        }

    def _shown(self, one: Input, top: Sequence[tuple[str, float]]) -> dict[str, Any]:
        drawn = ""
        with suppress(DataError):  # the file may have changed since
            drawn = picture(one.read(), one.path, self._predictor.decode_rule)
        about = {"alt": f"{one.path}: {top[0][0]}", "name": Path(one.path).name, "path": one.path}
        return about | {"picture": drawn, "top": [(name, f"{p:.3f}") for name, p in top]}


def _short(folder: Path) -> str:
    """The folder of a checkpoint as RUN/STEP."""
    folder = folder.resolve()
    return f"{folder.parent.parent.name}/{folder.name}" if folder.parent.name == "checkpoints" else folder.name


def _reading(predictor: Predictor) -> str:
    fitted = predictor.temperature
    if fitted is None:
        return (
            "The probabilities are the model's own, and no temperature was fitted: they rank the pictures, and may all "
            "be too low, as label smoothing leaves them, or too high. `samtune eval RUN --temperature` corrects that."
        )
    return (
        f"The probabilities follow a temperature of {fitted.temperature:.3g}, fitted on {fitted.n} validation images: "
        f"it took their expected calibration error from {100 * fitted.ece_before:.1f} % to "
        f"{100 * fitted.ece_after:.1f} %."
    )
