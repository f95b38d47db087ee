"""The validation part of train, where a data set has no validation split of its own."""

import hashlib

import numpy as np
import numpy.typing as npt

from samtune.data.source import Source, Split
from samtune.errors import DataError

Indices = npt.NDArray[np.int64]


def stratified_split(labels: Indices, fraction: float, seed: int) -> tuple[Indices, Indices]:
    """Hold out the same share of every class: (rows to train on, rows to validate on), both ascending.

    Of each class with at least two rows, round(fraction * rows) are held out, at least one and never all.
    The choice depends on (labels, fraction, seed) alone.
    """
    held_out = []
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        if len(rows) < 2:
            continue
        count = min(max(1, round(fraction * len(rows))), len(rows) - 1)
        held_out.append(np.random.default_rng([seed, int(label)]).permutation(rows)[:count])
    validation = np.sort(np.concatenate(held_out)) if held_out else np.empty(0, dtype=np.int64)
    return np.setdiff1d(np.arange(len(labels)), validation), validation


def split_hash(*parts: Indices) -> str:
    """A short name for a split: equal names mean equal rows in every part."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(np.ascontiguousarray(part, dtype="<i8").tobytes())
    return digest.hexdigest()[:16]


def train_and_validation(data: Source, fraction: float, seed: int) -> tuple[Split, Indices, Split, Indices]:
    """What a run trains on and what it chooses on: (split, rows) of each.

    The data set's own validation split where it has one; else a stratified share of train.
    Raises DataError if nothing is left to train or to validate on.
    """
    train = data.splits["train"]
    rows = np.arange(len(train))
    if "validation" in data.splits:
        parts = (train, rows, data.splits["validation"], np.arange(len(data.splits["validation"])))
    else:
        kept, held_out = stratified_split(train.labels, fraction, seed)
        parts = (train, kept, train, held_out)
    if len(parts[1]) == 0 or len(parts[3]) == 0:
        raise DataError(
            f"data set {data.name} is too small: {len(parts[1])} images to train on, {len(parts[3])} to validate on",
            mend="validation takes at least one image of each class that has two; add images, or a validation split",
        )
    return parts
