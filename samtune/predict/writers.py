"""Predictions and embeddings -> files, written as they are computed."""

import codecs
import csv
import io
import json
import os
import shutil
import struct
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np

from samtune import console
from samtune.data.formats import is_readable
from samtune.errors import MachineError, UsageError
from samtune.predict.ranking import Floats, ranked

FORMATS = ("csv", "jsonl", "json", "parquet")
EMBEDDINGS = (".safetensors", ".npy")
_RUN_FILES = {"predictions.parquet", "report.json", "provenance.json", "status.json", "metrics.jsonl"}
_RUN_FILES |= {"label_noise.parquet"}
_GROUP_ROWS = 8192  # rows of a row group of a parquet file


class Writer(Protocol):
    """Writes predictions in one format."""

    def write(self, paths: Sequence[str], probabilities: Floats) -> None:
        """Write rows of pictures: (n,) paths, (n, classes)."""

    def close(self, summary: dict[str, Any]) -> None:
        """Finish the file. summary: further keys of json."""


def format_of(kind: str | None, output: Path | None) -> str:
    """The format: kind, else by the suffix of output, else csv. Raises UsageError for an unknown one."""
    suffix = output.suffix.lower().lstrip(".") if output is not None else ""
    name = kind or {"ndjson": "jsonl"}.get(suffix, suffix) or "csv"
    if name not in FORMATS:
        formats = ", ".join(FORMATS)
        message = f"--format {name}: must be one of {formats}" if kind else f"--output {output}: ends in no format"
        raise UsageError(message, hint=f"--format is one of {formats}")
    return name


def writer(kind: str, file: BinaryIO, class_names: Sequence[str], *, top: int, every: bool) -> Writer:
    """A writer of this format. top: number of most probable classes to write. every: also write all probabilities."""
    make: Callable[..., Writer] = {"csv": _Csv, "jsonl": _JsonLines, "json": _Json, "parquet": _Parquet}[kind]
    return make(file, class_names, top, every)


class _Rows:
    """Base of all formats: columns and rows."""

    def __init__(self, file: BinaryIO, class_names: Sequence[str], top: int, every: bool) -> None:
        self.file, self.names, self.top, self.every = file, class_names, min(top, len(class_names)), every

    @property
    def columns(self) -> list[str]:
        """Names: path, class, probability, class_2, probability_2, ..., p_<class>, ..."""
        ranks = ["" if i == 1 else f"_{i}" for i in range(1, self.top + 1)]
        return [
            "path",
            *(f"{name}{rank}" for rank in ranks for name in ("class", "probability")),
            *([f"p_{name}" for name in self.names] if self.every else []),
        ]

    def rows(self, paths: Sequence[str], probabilities: Floats) -> Iterator[list[str | np.float32]]:
        """The values of each picture, in order of the columns."""
        for path, row, best in zip(paths, probabilities, ranked(probabilities, self.top).tolist(), strict=True):
            values: list[str | np.float32] = [path]
            for i in best:
                values += [self.names[i], row[i]]
            yield values + (list(row) if self.every else [])

    def close(self, summary: dict[str, Any]) -> None:
        pass


class _Csv(_Rows):
    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._csv = csv.writer(codecs.getwriter("utf-8")(self.file), lineterminator="\n")
        self._csv.writerow(self.columns)

    def write(self, paths: Sequence[str], probabilities: Floats) -> None:
        rows = self.rows(paths, probabilities)
        self._csv.writerows([str(value) for value in row] for row in rows)  # the shortest text of a float32
        self.file.flush()


class _JsonLines(_Rows):
    def write(self, paths: Sequence[str], probabilities: Floats) -> None:
        for row in self.objects(paths, probabilities):
            self.file.write((json.dumps(row, ensure_ascii=False) + "\n").encode())
        self.file.flush()

    def objects(self, paths: Sequence[str], probabilities: Floats) -> Iterator[dict[str, Any]]:
        """One object per picture: path, class, probability; with top > 1 also top, with every also probabilities."""
        for path, *texts in (map(str, row) for row in self.rows(paths, probabilities)):  # the shortest of a float32
            best, rest = texts[: 2 * self.top], texts[2 * self.top :]
            top = [{"class": name, "probability": float(p)} for name, p in zip(best[::2], best[1::2], strict=True)]
            row: dict[str, Any] = {"path": path, **top[0]}
            if self.top > 1:
                row["top"] = top
            if self.every:
                row["probabilities"] = {name: float(p) for name, p in zip(self.names, rest, strict=True)}
            yield row


class _Json(_JsonLines):
    """One object: "predictions", a row each, then the keys of the summary."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._separator = ""
        self.file.write(b'{\n"predictions": [')

    def write(self, paths: Sequence[str], probabilities: Floats) -> None:
        for row in self.objects(paths, probabilities):
            self.file.write(f"{self._separator}\n  {json.dumps(row, ensure_ascii=False)}".encode())
            self._separator = ","

    def close(self, summary: dict[str, Any]) -> None:
        rest = json.dumps(summary, indent=2, ensure_ascii=False, default=str).encode()
        self.file.write(b"\n],\n" + rest.removeprefix(b"{\n") + b"\n")
        self.file.flush()


class _Parquet(_Rows):
    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        import pyarrow as pa
        import pyarrow.parquet as pq

        text = {0, *range(1, 1 + 2 * self.top, 2)}  # path, and the classes
        types = [pa.string() if i in text else pa.float32() for i in range(len(self.columns))]
        self._schema = pa.schema(list(zip(self.columns, types, strict=True)))
        self._writer = pq.ParquetWriter(self.file, self._schema)
        self._waiting: list[list[str | np.float32]] = []

    def write(self, paths: Sequence[str], probabilities: Floats) -> None:
        self._waiting += self.rows(paths, probabilities)
        if len(self._waiting) >= _GROUP_ROWS:
            self._write_group()

    def close(self, summary: dict[str, Any]) -> None:
        self._write_group()
        self._writer.close()
        self.file.flush()

    def _write_group(self) -> None:
        import pyarrow as pa

        columns: list[Sequence[Any]] = list(zip(*self._waiting, strict=True)) or [()] * len(self.columns)
        arrays = [pa.array(values, kind) for values, kind in zip(columns, self._schema.types, strict=True)]
        self._writer.write_table(pa.Table.from_arrays(arrays, schema=self._schema))
        self._waiting = []


# ---------------------------------------------------------------------------------------------------------------- files


def check(files: Mapping[str, Path | None], *, force: bool, read: Sequence[Path] = ()) -> None:
    """Raise UsageError for output files that cannot be written, or exist and are not forced. files: flag -> path.

    read: paths that the command reads. These, pictures and a run's own files are never overwritten.
    """
    given = {flag: path for flag, path in files.items() if path is not None}
    for flag, path in given.items():
        if path.is_file() and (is_readable(path.name) or _is_of_run(path) or any(map(path.samefile, read))):
            raise UsageError(f"{flag} {path} is a picture, a file of a run, or read here", hint="name another file")
        if path.is_dir():
            raise UsageError(f"{flag} {path} is a folder", hint="name a file")
        if _is_stream(path) and flag != "--output":
            raise UsageError(f"{flag} {path} is a device or a pipe", hint="name a file")
        if path.exists() and not (force or _is_stream(path)):
            raise UsageError(f"{flag} {path} is there already", hint="name another file, or write over it by --force")
    if len({path.absolute() for path in given.values()}) < len(given):
        raise UsageError(f"{' and '.join(given)} name one file", hint="give each a file of its own")
    embeddings = given.get("--embeddings")
    if embeddings is not None and embeddings.suffix.lower() not in EMBEDDINGS:
        raise UsageError(f"--embeddings {embeddings}: must end in {' or '.join(EMBEDDINGS)}")


def _is_of_run(path: Path) -> bool:
    return path.name in _RUN_FILES and (path.parent / "status.json").is_file()


def _is_stream(path: Path) -> bool:
    """Whether it is a device or a pipe, as /dev/null, /dev/stdout or a shell's >(command)."""
    return path.exists() and (not path.is_file() or (path.is_symlink() and path.absolute().is_relative_to("/dev")))


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raise MachineError where a file cannot be written in this block."""
    try:
        yield
    except OSError as error:
        raise MachineError(f"{path} cannot be written", error.strerror or str(error), "write elsewhere") from None


@contextmanager
def opened(path: Path | None) -> Iterator[BinaryIO]:
    """Open stdout (None), a device, a pipe, or a file, which is PATH.part until it is complete. Raises as `writing`."""
    if path is None:
        yield sys.stdout.buffer
        return
    part = path.with_name(f"{path.name}.part")
    with writing(path):
        if _is_stream(path):
            with path.open("wb") as file:
                yield file
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            try:
                yield file
            except BaseException:
                console.info(f"what was written of {path} until now is in {part}")
                raise
        os.replace(part, path)


# ----------------------------------------------------------------------------------------------------------- embeddings


class Embeddings:
    """Writes pooled features to a .npy or a .safetensors file (key "embeddings"): (n, features), float32.

    Such a file starts with the number of its rows, so they go to a temporary file first.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._rows, self._features = path, 0, 0
        self._raw_path = path.with_name(f"{path.name}.rows.part")
        self._raw: BinaryIO | None = None

    def write(self, features: Floats) -> None:
        """Append (n, features). Raises MachineError where there is no room."""
        with writing(self._path):
            if self._raw is None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._raw = self._raw_path.open("wb")
            self._raw.write(np.ascontiguousarray(features, "<f4").data)
        self._rows += len(features)
        self._features = features.shape[1]

    def close(self, about: dict[str, str]) -> None:
        """Write the file. about: metadata of a .safetensors file."""
        with writing(self._path):
            if self._raw is not None:
                self._raw.close()
            with opened(self._path) as file:
                file.write(self._header(about))
                if self._raw is not None:
                    with self._raw_path.open("rb") as rows:
                        shutil.copyfileobj(rows, file, 1 << 20)
            self._raw_path.unlink(missing_ok=True)

    def discard(self) -> None:
        """Remove the temporary file."""
        if self._raw is not None:
            self._raw.close()
        with suppress(OSError):  # the folder may be read-only
            self._raw_path.unlink(missing_ok=True)

    def _header(self, about: dict[str, str]) -> bytes:
        shape = (self._rows, self._features)
        if self._path.suffix.lower() == ".npy":
            header = io.BytesIO()
            np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": shape})
            return header.getvalue()
        entry = {"dtype": "F32", "shape": shape, "data_offsets": [0, 4 * self._rows * self._features]}
        text = json.dumps({"__metadata__": about, "embeddings": entry}).encode()
        text += b" " * (-len(text) % 8)
        return struct.pack("<Q", len(text)) + text
