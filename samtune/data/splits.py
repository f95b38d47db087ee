"""The rows that a run trains on, validates on and tests on: seeded held-out parts and subsets."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from samtune.config.run_config import RunConfig
from samtune.data.source import LabelledDataset, Split, concat_splits, open_source
from samtune.data.split_roles import DataSelection
from samtune.errors import DataError, UsageError, shorten

Indices = npt.NDArray[np.int64]


def _rows_by_class(labels: Indices) -> Iterator[tuple[int, Indices]]:
    """Each label, ascending, with its rows, ascending; by one sort, since there may be many of both."""
    order = np.argsort(labels, kind="stable")
    classes, starts = np.unique(labels[order], return_index=True)
    for label, (start, end) in zip(classes.tolist(), pairwise([*starts.tolist(), len(order)]), strict=True):
        yield label, order[start:end]


def stratified_split(labels: Indices, fraction: float, seed: int) -> tuple[Indices, Indices]:
    """Hold out the same share of every class: (rows to train on, rows to validate on), both ascending.

    Of each class with at least two rows, round(fraction * rows) are held out, at least one and never all.
    The choice depends only on (labels, fraction, seed).
    """
    held_out = []
    for label, rows in _rows_by_class(labels):
        if len(rows) < 2:
            continue
        count = min(max(1, round(fraction * len(rows))), len(rows) - 1)
        held_out.append(np.random.default_rng([seed, label]).permutation(rows)[:count])
    validation = np.sort(np.concatenate(held_out)) if held_out else np.empty(0, dtype=np.int64)
    return np.setdiff1d(np.arange(len(labels)), validation), validation


def stratified_subset(labels: Indices, count: int, seed: int) -> Indices:
    """Positions of `count` rows, ascending: every class in proportion, and each at least once where count allows it.

    A smaller subset lies within a larger one. The choice depends only on (labels, count, seed).
    """
    rank = np.empty(len(labels))  # of a row in a random order of its class, in [0, 1)
    for label, rows in _rows_by_class(labels):
        rank[rows] = np.random.default_rng([seed, label, 1]).permutation(len(rows)) / len(rows)
    ties = np.random.default_rng([seed, 1]).permutation(len(labels))
    return np.sort(np.lexsort((ties, rank))[:count])


def split_hash(*parts: Indices) -> str:
    """A short name for a split: equal names mean equal rows in every part."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(np.ascontiguousarray(part, dtype="<i8").tobytes())
    return digest.hexdigest()[:16]


def train_and_validation(
    data: LabelledDataset, fraction: float, seed: int, needs_validation: bool = True
) -> tuple[Split, Indices, Split, Indices]:
    """The (split, rows) to train on and to validate on. Rows without a label are in neither.

    The data set's own validation split where it has one; else a stratified share of train.
    Raises DataError if nothing is left to train on, or to validate on where that is needed.
    """
    train = data.splits["train"]
    rows = train.labelled
    if "validation" in data.splits:
        parts = (train, rows, data.splits["validation"], data.splits["validation"].labelled)
    else:
        kept, held_out = stratified_split(train.labels[rows], fraction, seed)
        parts = (train, rows[kept], train, rows[held_out])
    if len(parts[1]) == 0 or (needs_validation and len(parts[3]) == 0):
        raise DataError(
            f"data set {data.name} is too small: {len(parts[1])} images to train on, {len(parts[3])} to validate on",
            "validation takes one image at least of each class that has two",
            "add images or a validation split, or train without validation by --no-val",
        )
    return parts


@dataclass(frozen=True)
class RunSplits:
    """All rows of a run: (split, rows) to train on, to validate on, and to test on. No test split: no test_rows.

    sources: with --no-val, train and validation as they would have been, of which train is made; val_rows are none.
    """

    data: LabelledDataset
    train: Split
    train_rows: Indices
    val: Split
    val_rows: Indices
    test: Split | None
    test_rows: Indices
    sources: tuple[tuple[Split, Indices], ...] = ()


def open_run_splits(config: RunConfig, dataset: str | None = None, classes: Sequence[str] | None = None) -> RunSplits:
    """Open the data set of a config, and tell its rows; the same config gives the same rows, in a run and afterwards.

    dataset: where the data is now, if it has moved. classes: of a run that began earlier, in its order. Raises what
    `source.open_source` and `train_and_validation` raise, and UsageError for --no-val without a test split.
    """
    data = open_source(dataset or config.dataset, DataSelection.of(config), classes)
    if classes is not None:
        _check_classes(data, classes)
    seed = config.split_seed
    train, train_rows, val, val_rows = train_and_validation(data, config.val_fraction, seed, config.val)
    test_rows = data.test.labelled if data.test else np.arange(0)
    train_count = max(1, round(config.train_fraction * len(train_rows)))
    parts = RunSplits(
        data,
        train,
        _at_most(min(train_count, config.max_train or train_count), train, train_rows, seed),
        val,
        _at_most(config.max_eval, val, val_rows, seed),
        data.test,
        _at_most(config.max_eval, data.test, test_rows, seed) if data.test else test_rows,
    )
    return parts if config.val else _with_validation(parts)


def _check_classes(data: LabelledDataset, classes: Sequence[str]) -> None:
    """Raise DataError where this cannot be the data of a run with these classes."""
    unknown = [name for split in data.splits.values() for name in split.unknown]
    if "train" in data.splits and not unknown:
        return
    raise DataError(
        f"data set {data.origin} is not that of the run: "
        + (f"it has images of class {unknown[0]!r}" if unknown else "it has no train split"),
        f"the run has {len(classes)} classes: {shorten(classes)}",
        "give the data set of the run by --dataset",
    )


def _with_validation(parts: RunSplits) -> RunSplits:
    """Validation is trained on, too. Raises UsageError where nothing is left to score."""
    if parts.test is None:
        raise UsageError(
            f"--no-val: data set {parts.data.name} has no test split",
            "a run that trains on its validation images has nothing else to be scored on",
            "leave --no-val out, or name a split by --test-split",
        )
    if parts.val is parts.train:
        train, rows = parts.train, np.sort(np.concatenate([parts.train_rows, parts.val_rows]))
    else:
        train = concat_splits(parts.train, parts.val)
        rows = np.concatenate([parts.train_rows, len(parts.train) + parts.val_rows])
    sources = ((parts.train, parts.train_rows), (parts.val, parts.val_rows))
    return replace(parts, train=train, train_rows=rows, val_rows=parts.val_rows[:0], sources=sources)


def _at_most(count: int | None, split: Split, rows: Indices, seed: int) -> Indices:
    if count is None or count >= len(rows):
        return rows
    subset: Indices = rows[stratified_subset(split.labels[rows], count, seed)]
    return subset
