"""Pictures to be classified: files, folders, globs, lists, parquet files, and paths on stdin. Opens no picture.

They come one after the other, so that a million of them need no more memory than ten; of a list the names are held.
"""

import glob
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from samtune.data import columns, image_list, list_file
from samtune.data.folder_tree import is_folder, is_ignored, leads_back, sorted_entries
from samtune.data.formats import installation, is_readable, is_unreadable
from samtune.data.image_paths import image_path, image_root
from samtune.data.split_roles import DataSelection
from samtune.errors import DataError, UsageError, first_line
from samtune.files import readable

STDIN = "-"
_ROWS = 16  # of a parquet file that are read at once: their pictures are in memory together
_KINDS = f"a picture, a folder, a glob, a list ({', '.join(list_file.ENDINGS)}), a .parquet file, or {STDIN} for stdin"


@dataclass(frozen=True)
class Input:
    """One picture. path: its file, or its name in a table, as readable text. file: as the system has it; encoded: its
    bytes, where they come from a table.
    """

    path: str
    file: str = ""
    encoded: bytes | None = None

    def read(self) -> bytes:
        """The encoded picture. Raises DataError where there is none."""
        if self.encoded is not None:
            return self.encoded
        if is_unreadable(self.file):
            command = installation(self.file)
            hint = f"`{command}` reads it" if command else "convert it"
            raise DataError(f"{self.path} cannot be decoded", "nothing here reads its format", hint)
        try:
            return Path(self.file).read_bytes()
        except (OSError, ValueError) as error:  # a name with a zero byte is a ValueError
            why = (error.strerror if isinstance(error, OSError) else None) or str(error)
            raise DataError(f"{self.path} cannot be read", why) from None


class _Source(Protocol):
    """The pictures of one argument."""

    def __iter__(self) -> Iterator[Input]: ...

    def count(self) -> int | None:
        """How many pictures there are; None if that is known only at the end."""


@dataclass(frozen=True)
class Inputs:
    """All pictures that were asked for, in order of the arguments. notes: what a user should know of how they are read.

    A second iteration reads folders and tables again; stdin can be read once.
    """

    sources: Sequence[_Source]
    notes: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[Input]:
        for source in self.sources:
            yield from source

    def count(self) -> int | None:
        """How many there are; None if unknown, as of stdin."""
        counts = [source.count() for source in self.sources]
        return None if None in counts else sum(count for count in counts if count is not None)


def find(arguments: Sequence[str], selection: DataSelection, stdin: BinaryIO | None = None) -> Inputs:
    """What the arguments name. Folders are read at any depth, but for what begins with a dot.

    selection: image_key, image_root and image_suffix tell how lists and tables are read. stdin: where "-" reads from.
    Raises DataError for a path that is not there or names no picture, UsageError for a wrong column, and for "-" twice.
    """
    if arguments.count(STDIN) > 1:
        raise UsageError(f"{STDIN} is given twice", "stdin can be read once", f"give {STDIN} once")
    sources: list[_Source] = []
    notes: list[str] = []
    for argument in arguments:
        if argument == STDIN:
            sources.append(_Files(partial(_paths, stdin or sys.stdin.buffer), are_counted=False))
        elif os.path.lexists(argument):
            sources.append(_source(argument, selection, notes))
        else:
            matches = sorted(glob.iglob(argument, recursive=True)) if glob.has_magic(argument) else []
            if not matches:
                name = readable(argument)
                message = f"glob {name} matches nothing" if glob.has_magic(argument) else f"{name} is not there"
                raise DataError(message, f"seen from {readable(os.getcwd())}", f"give {_KINDS}")
            # A folder's other files are passed over by a glob as by the folder itself.
            chosen = [path for path in matches if os.path.isdir(path) or _is_table(path) or _is_picture(path)]
            sources += [_source(path, selection, notes) for path in chosen or matches]
    return Inputs(sources, tuple(dict.fromkeys(notes)))


def _source(path: str, selection: DataSelection, notes: list[str]) -> _Source:
    if os.path.isdir(path):
        return _folder(path, selection)
    ending = os.path.splitext(path)[1].lower()
    if ending in list_file.ENDINGS:
        names, more = image_list.read_names(Path(path), selection)
        notes += more
        return _Files(lambda: [name.removeprefix(f".{os.sep}") for name in names])
    if ending == ".txt":
        raise DataError(
            f"{readable(path)} is no picture",
            "a file of paths is read on stdin",
            f"samtune predict RUN - < {shlex.quote(readable(path))}",
        )
    return _table(path, selection) if ending == ".parquet" else _Files(lambda: [path])


def _table(path: str, selection: DataSelection) -> "_Parquet":
    """A parquet file whose footer and column are there."""
    table = _Parquet(Path(path), selection)
    _ = table.column
    return table


def _folder(path: str, selection: DataSelection) -> _Source:
    """The pictures of a folder; where it holds none, those of its parquet files."""
    if next(_pictures(path), None) is not None:
        return _Files(partial(_pictures, path))
    tables = [_table(file, selection) for file in _walk(path, frozenset()) if file.lower().endswith(".parquet")]
    if not tables:
        raise DataError(f"folder {readable(path)} holds no pictures", "nor does any folder in it", f"give {_KINDS}")
    return Inputs(tables)


def _is_picture(path: str) -> bool:
    return is_readable(path) or is_unreadable(path)


def _is_table(path: str) -> bool:
    return os.path.splitext(path)[1].lower() in (*list_file.ENDINGS, ".parquet")


@dataclass(frozen=True)
class _Files:
    """Files by the paths that a function gives at each iteration. stdin gives them once: they are not counted."""

    paths: Callable[[], Iterable[str]]
    are_counted: bool = True

    def __iter__(self) -> Iterator[Input]:
        return inputs_of(self.paths())

    def count(self) -> int | None:
        return sum(1 for _ in self.paths()) if self.are_counted else None


def _pictures(root: str) -> Iterator[str]:
    """The pictures of a folder at any depth, by their endings."""
    return filter(_is_picture, _walk(root, frozenset()))


def _walk(root: str, ancestors: frozenset[str]) -> Iterator[str]:
    """The files of a folder and below, in order of their names; a link to a folder around it is not followed."""
    ancestors |= {os.path.realpath(root)}
    entries = [entry for entry in sorted_entries(root) if not is_ignored(entry.name)]
    yield from (entry.path for entry in entries if not is_folder(entry))
    for entry in entries:
        if is_folder(entry) and not leads_back(entry, ancestors):
            yield from _walk(entry.path, ancestors)


def _paths(stream: BinaryIO) -> Iterator[str]:
    """A path a line, or separated by zero bytes as `find -print0` does."""
    return (os.fsdecode(raw) for line in stream for raw in line.rstrip(b"\r\n").split(b"\0") if raw)


@dataclass(frozen=True)
class _Parquet:
    """A parquet file with a column of pictures or of their paths, which are seen from its folder. Read in small parts.

    A picture without a name of its own is called by its row: test.parquet:17.
    """

    path: Path
    selection: DataSelection

    def __iter__(self) -> Iterator[Input]:
        column = self.column
        try:
            parts = self._file.iter_batches(batch_size=_ROWS, columns=[column], use_threads=False)
            for row, cell in enumerate(cell for part in parts for cell in part.column(0).to_pylist()):
                yield self._input(cell, f"{readable(str(self.path))}:{row}")
        except (OSError, ValueError) as error:  # of arrow's family, these are the parents
            raise self._damaged(error) from None

    def count(self) -> int:
        return int(self._file.metadata.num_rows)

    @cached_property
    def _file(self) -> Any:
        import pyarrow.parquet as pq

        try:
            return pq.ParquetFile(self.path)
        except (OSError, ValueError) as error:
            raise self._damaged(error) from None

    @cached_property
    def column(self) -> str:
        """Of pictures. Raises DataError for a file that is no table, or has none."""
        kinds = {field.name: _kind(str(field.type)) for field in self._file.schema_arrow}
        return columns.find_image(str(self.path), columns.Table({}, kinds), self.selection)

    def _input(self, cell: Any, row_name: str) -> Input:
        encoded, name = (cell.get("bytes"), cell.get("path")) if isinstance(cell, dict) else (cell, None)
        if isinstance(encoded, bytes):
            return Input(readable(name) if name else row_name, encoded=encoded)
        name = name if encoded is None else str(encoded)
        if not name:
            return Input(row_name, encoded=b"")
        file = image_path(image_root(self.selection, self.path.parent), name, self.selection)
        return Input(readable(file), file)

    def _damaged(self, error: Exception) -> DataError:
        return DataError(f"table {readable(str(self.path))} cannot be read", first_line(error))


def _kind(arrow_type: str) -> columns.Kind:
    if arrow_type.startswith("struct<") and "bytes:" in arrow_type:
        return "images"
    if "list" in arrow_type or "binary" in arrow_type:
        return "list" if "list" in arrow_type else "images"
    return "text" if "string" in arrow_type else "number" if re.match("u?int|float|double", arrow_type) else "other"


def inputs_of(paths: Iterable[str | os.PathLike[str]]) -> Iterator[Input]:
    """Files by their paths."""
    return (Input(readable(os.fspath(path)), os.fspath(path)) for path in paths)
