"""Predictions and embeddings -> files, row by row: none of it is held until the end."""

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
_OF_A_RUN = {"predictions.parquet", "report.json", "provenance.json", "status.json", "metrics.jsonl"}
_ROWS = 8192  # of a parquet file that are written at once, as a group


class Writer(Protocol):
    """Where predictions go."""

    def write(self, paths: Sequence[str], probabilities: Floats) -> None:
        """Rows of pictures: (n,) paths, (n, classes)."""
        ...

    def close(self, summary: dict[str, Any]) -> None:
        """All rows are written. summary: what json says besides them."""
        ...


def format_of(kind: str | None, output: Path | None) -> str:
    """The format that is asked for, else by the file's ending, else csv. Raises UsageError for another."""
    ending = output.suffix.lower().lstrip(".") if output is not None else ""
    chosen = kind or {"ndjson": "jsonl"}.get(ending, ending) or "csv"
    if chosen not in FORMATS:
        raise UsageError(
            f"--format {chosen}: must be one of {', '.join(FORMATS)}"
            if kind
            else f"--output {output}: ends in no format",
            hint=f"--format is one of {', '.join(FORMATS)}",
        )
    return chosen


def writer(kind: str, file: BinaryIO, class_names: Sequence[str], *, top: int, every: bool) -> Writer:
    """top: so many classes of each picture, with their probabilities. every: the probabilities of all classes, too."""
    make: Callable[..., Writer] = {"csv": _Csv, "jsonl": _JsonLines, "json": _Json, "parquet": _Parquet}[kind]
    return make(file, class_names, top, every)


class _Rows:
    """What all formats share: the columns of a row."""

    def __init__(self, file: BinaryIO, class_names: Sequence[str], top: int, every: bool) -> None:
        self.file, self.names, self.top, self.every = file, class_names, min(top, len(class_names)), every

    @property
    def columns(self) -> list[str]:
        """path, class, probability, class_2, probability_2, ..., p_<class>, ..."""
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


class _Csv(_Rows):
    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._row(self.columns)

    def write(self, paths: Sequence[str], probabilities: Floats) -> None:
        for values in self.rows(paths, probabilities):
            self._row([str(value) for value in values])  # of a number the shortest text that is this float32
        self.file.flush()

    def close(self, summary: dict[str, Any]) -> None:
        pass

    def _row(self, values: Sequence[str]) -> None:
        text = io.StringIO(newline="")
        csv.writer(text, lineterminator="\n").writerow(values)
        self.file.write(text.getvalue().encode())


class _JsonLines(_Rows):
    def write(self, paths: Sequence[str], probabilities: Floats) -> None:
        for one in self.objects(paths, probabilities):
            self.file.write((json.dumps(one, ensure_ascii=False) + "\n").encode())
        self.file.flush()

    def close(self, summary: dict[str, Any]) -> None:
        pass

    def objects(self, paths: Sequence[str], probabilities: Floats) -> Iterator[dict[str, Any]]:
        """Each picture: path, class, probability; top, where more than one is asked for; probabilities, if all are."""
        for path, *values in self.rows(paths, probabilities):
            best = values[: 2 * self.top]
            ranking = [{"class": name, "probability": _plain(p)} for name, p in zip(best[::2], best[1::2], strict=True)]
            one: dict[str, Any] = {"path": path, **ranking[0]}
            if self.top > 1:
                one["top"] = ranking
            if self.every:
                rest = values[2 * self.top :]
                one["probabilities"] = {name: _plain(p) for name, p in zip(self.names, rest, strict=True)}
            yield one


class _Json(_JsonLines):
    """One object: "predictions", a row each, then what `close` is given."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._separator = ""
        self.file.write(b'{\n"predictions": [')

    def write(self, paths: Sequence[str], probabilities: Floats) -> None:
        for one in self.objects(paths, probabilities):
            self.file.write(f"{self._separator}\n  {json.dumps(one, ensure_ascii=False)}".encode())
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

        text = {"path", *(name for name in self.columns[1 : 1 + 2 * self.top : 2])}
        types = [pa.string() if name in text else pa.float32() for name in self.columns[: 1 + 2 * self.top]]
        types += [pa.float32()] * (len(self.columns) - len(types))
        self._schema = pa.schema(list(zip(self.columns, types, strict=True)))
        self._table = pa.Table
        self._writer = pq.ParquetWriter(_Counted(self.file), self._schema)
        self._waiting: list[list[str | np.float32]] = []

    def write(self, paths: Sequence[str], probabilities: Floats) -> None:
        self._waiting += self.rows(paths, probabilities)
        if len(self._waiting) >= _ROWS:
            self._flush()

    def close(self, summary: dict[str, Any]) -> None:
        self._flush()
        self._writer.close()
        self.file.flush()

    def _flush(self) -> None:
        values: list[Sequence[Any]] = list(zip(*self._waiting, strict=True)) or [()] * len(self.columns)
        columns = [np.array(c, np.float32) if self._schema.types[i] == "float" else c for i, c in enumerate(values)]
        self._writer.write_table(
            self._table.from_arrays(list(map(_array, columns, self._schema.types)), schema=self._schema)
        )
        self._waiting = []


def _array(values: Any, kind: Any) -> Any:
    import pyarrow as pa

    return pa.array(values, kind)


class _Counted(io.RawIOBase):
    """A file that knows how much was written: a pipe does not."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__()
        self._file, self._written = file, 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._file.write(data)
        self._written += len(data)
        return len(data)

    def tell(self) -> int:
        return self._written


def _plain(value: Any) -> float:
    """A float32 as the shortest number that is this float32."""
    return float(str(value))


# --------------------------------------------------------------------------------------------------------------- places


def check(files: Mapping[str, Path | None], *, force: bool, read: Sequence[Path] = ()) -> None:
    """Whether files can be written there, by their flags. Raises UsageError where one is there, and no force.

    read: arguments that name what is read. Neither these nor pictures nor a run's own files are ever written over.
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
    return path.name in _OF_A_RUN and (path.parent / "status.json").is_file()


def _is_stream(path: Path) -> bool:
    """Whether it is a device or a pipe, as /dev/null, /dev/stdout or a shell's >(command): no file to be replaced."""
    return path.exists() and (not path.is_file() or (path.is_symlink() and path.absolute().is_relative_to("/dev")))


@contextmanager
def opened(path: Path | None) -> Iterator[BinaryIO]:
    """stdout, a device or a pipe; or a file that appears when it is whole, and is in PATH.part until then.

    Raises MachineError where it cannot be written.
    """
    if path is None:
        yield sys.stdout.buffer
        return
    part = path.with_name(f"{path.name}.part")
    try:
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
    except OSError as error:
        raise MachineError(f"{path} cannot be written", error.strerror or str(error), "write elsewhere") from None


# ----------------------------------------------------------------------------------------------------------- embeddings


class Embeddings:
    """Rows of pooled features, kept on the disk, and in the end a file: how many there are stands at its beginning.

    A .npy file is the array (n, features); a .safetensors file holds it as "embeddings", float32 both.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._rows, self._features = path, 0, 0
        self._raw_path = path.with_name(f"{path.name}.rows.part")
        self._raw: BinaryIO | None = None

    def write(self, features: Floats) -> None:
        """(n, features), after those before. Raises MachineError where there is no room."""
        try:
            if self._raw is None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._raw = self._raw_path.open("wb")
            self._raw.write(np.ascontiguousarray(features, "<f4").data)
        except OSError as error:
            raise self._unwritten(error) from None
        self._rows += len(features)
        self._features = features.shape[1]

    def close(self, about: dict[str, str]) -> None:
        """Write the file. about: what a .safetensors file says of it."""
        try:
            if self._raw is not None:
                self._raw.close()
            with opened(self._path) as file:
                file.write(self._header(about))
                if self._raw is not None:
                    with self._raw_path.open("rb") as rows:
                        shutil.copyfileobj(rows, file, 1 << 20)
            self._raw_path.unlink(missing_ok=True)
        except OSError as error:
            raise self._unwritten(error) from None

    def discard(self) -> None:
        """Nothing came of it."""
        if self._raw is not None:
            self._raw.close()
        with suppress(OSError):  # in a folder that nothing can be written to
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

    def _unwritten(self, error: OSError) -> MachineError:
        return MachineError(f"{self._path} cannot be written", error.strerror or str(error), "write elsewhere")
