"""A folder, list or table on disk -> raw splits, by whichever of the readers understands it."""

import os
from collections.abc import Collection, Sequence
from pathlib import Path

from samtune.data import idx, image_folder, image_list, list_file, listed_folder, repeats, table_splits, tables
from samtune.data.encoded import PathSplits, RawSplits
from samtune.data.folder_tree import sorted_entries
from samtune.data.formats import archive_ending, is_readable, unpacking
from samtune.data.split_roles import ROLES, DataSelection, role_of
from samtune.errors import DataError, UsageError, shorten
from samtune.files import readable


def read_path(
    path: Path, origin: str, selection: DataSelection, train: Sequence[str], classes: Sequence[str]
) -> tuple[RawSplits, list[str]]:
    """The splits of a folder or a list under their own names, and notes on how they were read.

    origin: what messages call it. train: possible names of the train split. classes: names that are known already.
    Raises DataError or UsageError.
    """
    if path.is_file() and path.suffix.lower() in list_file.ENDINGS:
        return _without_repeats(origin, image_list.read_list(path, selection))
    arrays = idx.read_folder(path, origin, selection.dataset_config) if path.is_dir() else {}
    if arrays:
        check_no_columns(origin, selection, "it is a folder of idx files")
        return arrays, []
    splits = tables.read_path(path, origin, selection.dataset_config)
    metadata = [] if splits else tables.metadata(path)
    if not splits and (not metadata or _are_beside_classes(metadata, path, selection)):
        pictures = _read_folder(path, selection, classes)
        if pictures.columns is not None:
            return _without_repeats(origin, pictures)
        if pictures.splits:
            check_no_columns(origin, selection, "it is a folder of pictures, whose folders are the labels")
            reason = "no column of it has the name of a label, and the folders are classes; --label-key names one"
            notes = [f"{file.relative_to(path)} is not read: {reason}" for file in metadata]
            return pictures.raw(), [*pictures.notes, *notes]
        if pictures.notes:
            message = f"data set {origin} has no labelled pictures"
            raise DataError(message, "; ".join(pictures.notes), _unpack_hint(path))
    if not splits and len(metadata) == 1 and metadata[0].parent == path:
        listed = listed_folder.read_metadata(metadata[0], selection)
        if listed is not None:
            return _without_repeats(origin, listed)
    splits = splits or tables.read_by_library(path, origin, selection.dataset_config)
    raw, notes = table_splits.raw_splits(origin, splits, path if path.is_dir() else path.parent, selection, train)
    raw, more = repeats.without_repeats(origin, raw)
    return raw, [*notes, *more, *(_splits_beside_tables(path, raw) if path.is_dir() else [])]


def _without_repeats(origin: str, listed: PathSplits) -> tuple[RawSplits, list[str]]:
    raw, notes = repeats.without_repeats(origin, listed.raw())
    return raw, [*listed.notes, *notes]


def _read_folder(path: Path, selection: DataSelection, classes: Sequence[str]) -> PathSplits:
    """The pictures of a folder; by the lists in it where its folders are fewer than two classes."""
    try:
        pictures = _read_pictures(path, selection, classes)
    except DataError:
        listed = _read_lists(path, selection)
        if listed is None:
            raise
        return listed
    names = {name for _, labels in pictures.splits.values() for name in labels}
    if len(names) < 2 and not (names and names <= set(classes)):
        return _read_lists(path, selection) or pictures
    if selection.train_split is None and not names <= set(classes):
        train = next((split for split in pictures.splits if role_of(split) == "train"), ".")
        train = "." if train in names or not (path / train).is_dir() else train
        listed_folder.check_same_labels(path, pictures.splits, train)
    pictures.notes += [
        f"list {readable(str(file))} is not read: folders tell the classes (--dataset takes it, too)"
        for file in listed_folder.lists_with_labels(path)
        if file not in tables.metadata(path)  # which has a note of its own
    ]
    return pictures


def _read_pictures(path: Path, selection: DataSelection, classes: Sequence[str]) -> PathSplits:
    """The pictures of a folder; those in its archives where no class folder has any. A logo may lie beside them."""
    pictures: PathSplits | DataError
    try:
        pictures = image_folder.read_folder(path, selection, classes)
        if pictures.splits or pictures.notes:
            return pictures
    except image_folder.NoClassFolders as error:
        pictures = error
    unpacked = {str(archive): str(tables.unpack(archive)) for archive in tables.archives(path)}
    if unpacked:
        return image_folder.read_folder(path, selection, classes, unpacked)
    if isinstance(pictures, DataError):
        raise pictures
    return pictures


def _read_lists(path: Path, selection: DataSelection) -> PathSplits | None:
    """The pictures of the lists in a folder. The hint of an error names the archives, which may hold the pictures."""
    try:
        return listed_folder.read_lists(path, selection)
    except DataError as error:
        hint = _unpack_hint(path)
        raise DataError(error.message, error.cause, f"{hint}; or: {error.hint}") if hint else error from None


def _unpack_hint(path: Path) -> str:
    """The commands that unpack the archives right in a folder; "" where there are none."""
    archives = [entry.name for entry in sorted_entries(path) if archive_ending(entry.name) and entry.is_file()]
    commands = shorten([f"`{unpacking(name)}`" for name in archives])
    return f"unpack the pictures, in {readable(str(path))}: {commands}" if archives else ""


def _splits_beside_tables(path: Path, splits: Collection[str]) -> list[str]:
    """Notes on archives and folders in a folder of tables whose names are those of splits without a table."""
    roles = {role_of(split) for split in splits}
    notes = []
    for entry in sorted_entries(path):
        ending = archive_ending(entry.name)
        role = role_of(readable(entry.name.removesuffix(ending) if ending else entry.name))
        files = (name for _, _, names in os.walk(entry.path) for name in names)
        if role in ROLES and role not in roles and (ending or any(map(is_readable, files))):
            notes.append(f"{readable(entry.name)} is not read: the data set has tables for its other splits")
    return notes


def _are_beside_classes(metadata: Sequence[Path], path: Path, selection: DataSelection) -> bool:
    """Whether metadata files have no labels, and folders are classes."""
    if selection.label_key or any(map(listed_folder.has_label_column, metadata)):
        return False
    try:
        pictures = image_folder.read_folder(path, selection)
    except image_folder.NoClassFolders:
        return False
    return any(len(set(labels)) > 1 for _, labels in pictures.splits.values())


def check_no_columns(origin: str, selection: DataSelection, cause: str) -> None:
    """Raise UsageError if a column was asked for, of a data set without a table. cause: what it has instead."""
    for kind in ("image", "label", "split"):
        key = getattr(selection, f"{kind}_key")
        if key not in (None, kind):
            raise UsageError(
                f"--{kind}-key {key}: data set {origin} has no such column",
                cause,
                "leave it out, or give a list of the pictures by --dataset",
            )
