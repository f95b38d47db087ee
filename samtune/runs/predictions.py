"""A run's prediction for each image of the split that it was scored on, and the confusions among them."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from samtune.errors import CheckpointError, first_line

Counts = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Predictions:
    """One entry per image. rows: index into the split. labels, predicted: classes. probability: of the predicted."""

    split: str
    rows: Counts
    labels: Counts
    predicted: Counts
    probability: npt.NDArray[np.float64]

    @property
    def correct(self) -> npt.NDArray[np.bool_]:
        """Whether the most probable class is the label."""
        correct: npt.NDArray[np.bool_] = self.labels == self.predicted
        return correct

    def confusion(self, classes: int) -> Counts:
        """Images by (true class, predicted class)."""
        counts = np.zeros((classes, classes), dtype=np.int64)
        np.add.at(counts, (self.labels, self.predicted), 1)
        return counts

    def confident_mistakes(self, most: int) -> Counts:
        """Positions of wrong predictions, the most probable first."""
        wrong = np.flatnonzero(~self.correct)
        return wrong[np.lexsort((self.rows[wrong], -self.probability[wrong]))][:most]


def write(
    path: Path, *, split: str, rows: Counts, labels: Counts, predicted: Counts, probability: npt.NDArray[np.float32]
) -> None:
    """Write predictions.parquet: one row per image of the split. Paired tests need it."""
    table = pa.table({"index": rows, "label": labels, "prediction": predicted, "probability": probability})
    pq.write_table(table.replace_schema_metadata({"split": split}), path)


def read(path: Path, classes: int) -> Predictions:
    """predictions.parquet of a run with so many classes. Raises CheckpointError where it is not there or damaged."""
    try:
        table = pq.read_table(path)
        index, label, prediction, probability = (
            table.column(name).to_numpy() for name in ("index", "label", "prediction", "probability")
        )
        found = Predictions(
            split=(table.schema.metadata or {})[b"split"].decode(),
            rows=index.astype(np.int64),
            labels=label.astype(np.int64),
            predicted=prediction.astype(np.int64),
            probability=probability.astype(np.float64),
        )
        for classified in (found.labels, found.predicted):
            if len(classified) and not 0 <= classified.min() <= classified.max() < classes:
                raise ValueError(f"a class that is not one of {classes}")
    except FileNotFoundError:
        raise CheckpointError(f"{path} is not there") from None
    except (OSError, KeyError, ValueError, TypeError, pa.ArrowException) as error:
        raise CheckpointError(f"{path} cannot be read", first_line(error)) from None
    return found


def confused_pairs(counts: Counts, most: int) -> list[tuple[int, int]]:
    """(true class, predicted class) of the most frequent mistakes."""
    wrong = counts.copy()
    np.fill_diagonal(wrong, 0)
    order = np.argsort(-wrong, axis=None, kind="stable")[:most]
    pairs = [divmod(place, len(wrong)) for place in order.tolist()]
    return [(true, predicted) for true, predicted in pairs if wrong[true, predicted]]
