"""Folders of idx files, the form in which MNIST, Fashion-MNIST, KMNIST and EMNIST are published.

An idx file holds two zero bytes, the type of its values, the number of its dimensions, each dimension as a big-endian
32-bit number, and the values (LeCun, Cortes and Burges, The MNIST Database of Handwritten Digits, 1998). A split is a
pair of them: train-images-idx3-ubyte and train-labels-idx1-ubyte, plain or as .gz.
"""

import gzip
import math
import re
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from samtune.data.encoded import ArrayImages, RawSplits
from samtune.data.labels import Labels
from samtune.data.tables import configuration_error
from samtune.errors import DataError, first_line, plural
from samtune.files import readable

_NAME = re.compile(r"(?:(?P<set>.+)-)?(?P<split>[^-.]+)-(?P<part>images|labels)[.-]idx\d-ubyte(?:\.gz)?", re.I)
_SPLITS = {"t10k": "test"}  # of MNIST: the test split, of 10,000 pictures
_UBYTE = 8
_TYPES = {8: "ubyte", 9: "byte", 11: "short", 12: "int", 13: "float", 14: "double"}
_DIMENSIONS = {"images": (3, 4), "labels": (1,)}
_CHANNELS = (1, 3)

_Files = dict[str, dict[str, Path]]  # split -> "images" and "labels" -> file


def read_folder(folder: Path, origin: str, config: str | None = None, class_names: Sequence[str] = ()) -> RawSplits:
    """The splits of a folder of idx files; {} where it holds none.

    The files lie in the folder, in its folder raw, or in raw below one of its folders, as torchvision stores them.
    origin: for messages. config: which data set, where there are several. class_names: of the labels from 0 on; by
    default those of classes.txt, a name a line, or of EMNIST's mapping.txt; without them the labels are the names.
    Raises DataError for files that are damaged or do not fit each other, UsageError for a config that is not there.
    """
    sets = _find(folder)
    if config not in sets and (config is not None or len(sets) > 1) and sets:
        raise configuration_error(origin, list(sets), config)
    files = sets.get(config) if config is not None else next(iter(sets.values()), None)
    return {split: _read_split(of_split, class_names) for split, of_split in (files or {}).items()}


def _find(folder: Path) -> dict[str, _Files]:
    """Name of each data set -> its files. The name is the beginning of the files' names, else that of the folder."""
    sets: dict[str, _Files] = {}
    for location, name in (
        (folder, folder.name),
        (folder / "raw", folder.name),
        *((raw, raw.parent.name) for raw in sorted(folder.glob("*/raw"))),
    ):
        for path in sorted(location.glob("*-ubyte*")):  # a plain file before the .gz that it was unpacked from
            match = _NAME.fullmatch(path.name)
            if match is not None and path.is_file():
                split = _SPLITS.get(match["split"], match["split"])
                parts = sets.setdefault(match["set"] or name, {}).setdefault(split, {})
                parts.setdefault(match["part"].lower(), path)
    return sets


def _read_split(files: dict[str, Path], class_names: Sequence[str]) -> tuple[ArrayImages, Labels]:
    for part, other, dimensions in (("labels", "images", ("idx3", "idx1")), ("images", "labels", ("idx1", "idx3"))):
        if part not in files:
            file = files[other]
            raise DataError(
                f"idx file {_shown(file)} has no {part}",
                f"no file of {part} of this split is in {_shown(file.parent)}",
                f"put {readable(file.name.replace(other, part).replace(*dimensions))} beside it",
            )
    images, labels = _read(files["images"], "images"), _read(files["labels"], "labels")
    if len(images) != len(labels):
        raise DataError(
            f"idx file {_shown(files['images'])} has {plural(len(images), 'image')} and {plural(len(labels), 'label')}",
            f"the labels are in {_shown(files['labels'])}",
            "take both files from one source",
        )
    if images.ndim == 4 and images.shape[3] not in _CHANNELS:
        raise DataError(
            f"idx file {_shown(files['images'])} has pictures of {images.shape[3]} channels",
            "the last of four dimensions is that of the channels",
            "store 1 channel (grey) or 3 (red, green, blue)",
        )
    if images.ndim == 4 and images.shape[3] == 1:
        images = images[..., 0]
    return ArrayImages(images), _named(labels, files["labels"], class_names)


def _read(path: Path, part: str) -> npt.NDArray[np.uint8]:
    """The values of an idx file: in memory where it is compressed, else mapped into it. Raises DataError."""
    is_compressed = path.suffix.lower() == ".gz"
    try:
        with gzip.open(path) if is_compressed else path.open("rb") as file:
            magic = file.read(4)
            if len(magic) < 4 or magic[:2] != b"\0\0" or magic[2] not in _TYPES:
                raise _damaged(path, f"it begins with {magic!r}, and an idx file with two zero bytes and a type")
            if magic[2] != _UBYTE:
                message = f"idx file {_shown(path)} holds values of type {_TYPES[magic[2]]}"
                raise DataError(message, f"{part} are unsigned bytes (ubyte)", "convert it, or give another file")
            if magic[3] not in _DIMENSIONS[part]:
                message = f"idx file {_shown(path)} has {plural(magic[3], 'dimension')}"
                allowed = " or ".join(map(str, _DIMENSIONS[part]))
                raise DataError(message, f"{part} have {allowed}", "convert it, or give another file")
            header = file.read(4 * magic[3])
            if len(header) < 4 * magic[3]:
                raise _damaged(path, "it ends within its header")
            shape = tuple(np.frombuffer(header, ">u4").tolist())
            size = math.prod(shape)
            values: Any = file.read(size + 1) if is_compressed else b""
            stored = len(values) if is_compressed else path.stat().st_size - file.tell()
            if stored != size:
                told = f"its header tells {' x '.join(map(str, shape))} bytes"
                raise _damaged(path, f"{told}, and {'more' if stored > size else stored} are there")
            if not is_compressed and size:
                values = np.memmap(path, np.uint8, "r", file.tell(), size)
    except (OSError, EOFError, OverflowError, zlib.error) as error:
        if isinstance(error, OSError) and error.strerror:
            raise DataError(
                f"idx file {_shown(path)} cannot be read", error.strerror, "check its permissions"
            ) from None
        raise _damaged(path, first_line(error)) from None
    return np.frombuffer(values, np.uint8).reshape(shape)


def _damaged(path: Path, cause: str) -> DataError:
    return DataError(f"idx file {_shown(path)} is damaged", cause, "download or unpack it again")


def _named(labels: npt.NDArray[np.uint8], path: Path, class_names: Sequence[str]) -> Labels:
    """Labels with the names of their classes, if these are given or lie beside the file of labels."""
    names = dict(enumerate(class_names)) or _read_names(path)
    if not names:
        return Labels(None, labels.tolist())
    unnamed = sorted(set(np.unique(labels).tolist()) - names.keys())
    if unnamed:
        listed = f"{min(names)} to {max(names)}"
        message = f"label {unnamed[0]} of idx file {_shown(path)} has no name"
        raise DataError(message, f"there are names for {listed}", "complete the list of names, or take it away")
    position = {label: i for i, label in enumerate(sorted(names))}
    return Labels(tuple(names[label] for label in position), [position[label] for label in labels.tolist()])


def _read_names(path: Path) -> dict[int, str]:
    """Label -> class name, by classes.txt or EMNIST's mapping.txt beside a file of labels; {} without them.

    A line of the mapping holds a label and the codes of the characters that it stands for, of which the first counts.
    """
    match = _NAME.fullmatch(path.name)
    prefix = f"{match['set']}-" if match is not None and match["set"] else ""
    classes, mapping = path.parent / "classes.txt", path.parent / f"{prefix}mapping.txt"
    file = classes if classes.is_file() else mapping
    if not file.is_file():
        return {}
    try:
        lines = [line.strip() for line in file.read_text("utf-8").splitlines() if line.strip()]
        if file == classes:
            return dict(enumerate(lines))
        return {int(label): chr(int(code)) for label, code, *_ in map(str.split, lines)}
    except (OSError, ValueError, OverflowError) as error:
        hint = "a line holds a class name (classes.txt), or a label and a character's code (mapping.txt)"
        raise DataError(f"the class names in {_shown(file)} cannot be read", first_line(error), hint) from None


def _shown(path: Path) -> str:
    return readable(str(path))
