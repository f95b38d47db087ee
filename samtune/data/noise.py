"""Label noise in the training split: flipped at random, or given in a file.

Only the labels that a run trains on change. Validation and test keep the data set's labels, also where validation is
held out of train.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq

from samtune.data.source import Split
from samtune.data.splits import Indices
from samtune.errors import CheckpointError, DataError, first_line, shorten

_ROW_COLUMN = "index"
_READERS: Mapping[str, Callable[[Path], pa.Table]] = {
    ".parquet": pq.read_table,
    ".csv": pyarrow.csv.read_csv,
    ".jsonl": pyarrow.json.read_json,
}


@dataclass(frozen=True)
class LabelNoise:
    """Which training labels were changed, and how.

    kind: symmetric, pair, file, or bootstrap for a file that the run made. fraction: flipped / n, of the n training
    rows. seed: None for labels from a file. source: "random", or "FILE, column KEY". rows: (flipped,) into the train
    split, ascending. labels, noisy_labels: (flipped,) int64, what they were and what they became.
    """

    kind: str
    seed: int | None
    source: str
    n: int
    rows: Indices
    labels: Indices
    noisy_labels: Indices

    @property
    def about(self) -> dict[str, Any]:
        """The entry of a report."""
        return {
            "kind": self.kind,
            "fraction": len(self.rows) / self.n,
            "flipped": len(self.rows),
            "n": self.n,
            "seed": self.seed,
            "source": self.source,
        }

    def write(self, path: Path) -> None:
        """A parquet file with one row per changed label: index into the train split, label, noisy_label."""
        pq.write_table(pa.table({_ROW_COLUMN: self.rows, "label": self.labels, "noisy_label": self.noisy_labels}), path)


def read_changes(path: Path) -> tuple[Indices, Indices]:
    """(rows, noisy labels) of a file that `LabelNoise.write` made. Raises CheckpointError if it is not readable."""
    try:
        table = pq.read_table(path)
        rows, noisy = (table.column(name).to_numpy().astype(np.int64) for name in (_ROW_COLUMN, "noisy_label"))
    except (OSError, KeyError, ValueError, pa.ArrowException) as error:
        raise CheckpointError(
            f"{path} cannot be read", first_line(error), "it has the labels that the run was trained on: put it back"
        ) from None
    return rows, noisy


def flip(
    train: Split, rows: Indices, class_names: Sequence[str], *, fraction: float, kind: str, seed: int
) -> tuple[Split, LabelNoise]:
    """The train split with round(fraction * n) of these n rows' labels flipped, and which.

    symmetric: to one of the other classes, each as likely. pair: to the next class, after the last one the first.
    The choice depends on (rows, seed) alone; a row that is flipped at one fraction is flipped, to the same label, at
    every larger one. Raises DataError if there is no other class.
    """
    classes = len(class_names)
    if classes < 2:
        raise DataError("--label-noise needs two classes", f"there is only {class_names[0]!r}", "leave it out")
    generator = np.random.default_rng(seed)
    order = generator.permutation(len(rows))
    steps = generator.integers(1, classes, len(rows)) if kind == "symmetric" else np.ones(len(rows), dtype=np.int64)
    count = round(fraction * len(rows))
    noisy = train.labels.copy()
    chosen = rows[order[:count]]
    noisy[chosen] = (noisy[chosen] + steps[:count]) % classes
    return _changed(train, noisy, rows, kind, seed, "random")


def from_file(
    train: Split, rows: Indices, class_names: Sequence[str], *, path: Path, key: str, labelled: int | None = None
) -> tuple[Split, LabelNoise]:
    """The train split with the labels of a file for these rows, and which of them differ from its own.

    The file has a label for every row of the train split, in its order, or in any order with a column `index`. Rows
    that are not trained on may have none (null).
    labelled: where a validation split was joined to train (--no-val), the rows before it; if the file ends there, the
    others keep their labels. Raises DataError that names the row.
    """
    labelled = len(train) if labelled is None else labelled
    table = _read(path)
    if key not in table.column_names:
        raise DataError(
            f"--train-labels {path} has no column {key!r}",
            f"its columns: {', '.join(table.column_names)}",
            "name one of them by --train-labels-key",
        )
    values = table[key].to_pylist()
    if len(values) not in (labelled, len(train)):
        message = f"--train-labels {path} has {len(values)} rows, and split train has {labelled}"
        raise DataError(message, hint="give one label for every row of the split, validation part included")
    row_of = np.arange(len(values))  # of each row of the file, in the split
    if _ROW_COLUMN in table.column_names:
        row_of = np.array(table[_ROW_COLUMN].to_pylist())
        if not np.array_equal(np.sort(row_of), np.arange(len(values))):
            message = f"column {_ROW_COLUMN} of --train-labels {path} is not each row of split train once"
            raise DataError(message, hint=f"number the rows from 0 to {len(values) - 1}, or remove the column")
    meaning = _meaning(class_names)
    given = np.array([meaning.get(v, -1) if isinstance(v, str | int) else -1 for v in values], dtype=np.int64)
    is_needed = np.isin(row_of, rows) | np.array([v is not None for v in values])
    if ((given < 0) & is_needed).any():
        row = int(np.flatnonzero((given < 0) & is_needed)[0])
        raise DataError(
            f"row {row} of --train-labels {path} has the {key} {values[row]!r}, which is no class",
            f"there are {len(class_names)} classes: {shorten(class_names)}",
            "give class names, or numbers that count from 0",
        )
    given = given[np.argsort(row_of)]
    noisy = train.labels.copy()
    in_file = rows[rows < len(given)]
    noisy[in_file] = given[in_file]
    return _changed(train, noisy, rows, "file", None, f"{path}, column {key}")


def _changed(
    train: Split, noisy: Indices, rows: Indices, kind: str, seed: int | None, where: str
) -> tuple[Split, LabelNoise]:
    changed = np.flatnonzero(noisy != train.labels)
    noise = LabelNoise(kind, seed, where, len(rows), changed, train.labels[changed], noisy[changed])
    return replace(train, labels=noisy), noise


def _meaning(class_names: Sequence[str]) -> Mapping[Any, int]:
    """What a value in a file means. Numbers are positions, unless the classes themselves are named by numbers."""
    are_numbers = all(name.isdecimal() for name in class_names)
    numbers = {int(name) if are_numbers else i: i for i, name in enumerate(class_names)}
    return {name: i for i, name in enumerate(class_names)} | numbers


def _read(path: Path) -> pa.Table:
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"--train-labels {path}: unknown kind of file", hint=f"give {', '.join(_READERS)}")
    try:
        return reader(path)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"--train-labels {path} cannot be read", first_line(error), "check path and content") from None
