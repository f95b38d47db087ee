"""The rows of .csv, .tsv and .jsonl files."""

import codecs
import csv
import io
import json
import re
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from samtune.errors import DataError, first_line

ENDINGS = (".csv", ".tsv", ".jsonl", ".ndjson")
_DELIMITERS = (",", ";", "\t", "|")


@dataclass(frozen=True)
class Rows:
    """Columns by name, and the line of each row. repeated: names that several columns have."""

    columns: dict[str, list[Any]]
    lines: list[int]
    repeated: Collection[str] = ()

    def check_names(self, path: Path, names: Iterable[str]) -> None:
        """Raise DataError for a name that several columns have."""
        name = next((name for name in names if name in self.repeated), None)
        if name is not None:
            message = f"list {path} has several columns {name}"
            raise DataError(message, "one of them would be used", "rename or remove the others")


def read_rows(path: Path) -> Rows:
    """The rows of a list, or of a parquet file without its columns of pictures. Raises DataError if unreadable."""
    ending = path.suffix.lower()
    if ending == ".parquet":
        return _read_parquet(path)
    return _read_csv(path) if ending in (".csv", ".tsv") else _read_jsonl(path)


def _read_parquet(path: Path) -> Rows:
    import pyarrow.parquet as pq

    try:
        names = [field.name for field in pq.read_schema(path) if "binary" not in str(field.type)]
        table = pq.read_table(path, columns=names)
    except (OSError, ValueError, TypeError) as error:  # the parents of arrow's errors
        raise DataError(f"table {path} cannot be read", first_line(error)) from None
    return Rows(table.to_pydict(), list(range(table.num_rows)))


def _read_csv(path: Path) -> Rows:
    """A table with a header. Bytes that are not UTF-8 are kept, as surrogates: they may be a path's.

    A first line `sep=;` gives the delimiter, as for Excel. Rows without a value are skipped.
    """
    text = _text(path)
    declared = re.match(r'[\r\n]*"?sep=([^\r\n])"?[,;\t|]*(?=[\r\n])', text, re.IGNORECASE)
    if declared:  # the end of its line is kept, so that line numbers stay right
        text = text[: declared.start()] + text[declared.end() :]
    header = text.lstrip("\r\n").partition("\n")[0]
    delimiter = max(_DELIMITERS, key=header.count) if path.suffix.lower() == ".csv" else "\t"
    delimiter = declared[1] if declared else delimiter
    lines = []
    try:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True)
        names = [name.strip() for name in next((row for row in reader if any(map(str.strip, row))), [])]
        columns: dict[str, list[Any]] = {name: [] for name in names if name}
        for row in reader:
            if not any(map(str.strip, row)):
                continue
            if any(row[len(names) :]):
                message = f"line {reader.line_num} of {path} has more values than the header"
                raise DataError(message, hint=f"quote values that hold {delimiter!r}")
            lines.append(reader.line_num)
            cells = dict(zip(names, row, strict=False))
            for name, column in columns.items():
                column.append(cells.get(name))
    except csv.Error as error:
        raise DataError(f"list {path} cannot be read", str(error)) from None
    return Rows(columns, lines, {name for name, count in Counter(names).items() if count > 1})


def _text(path: Path) -> str:
    try:
        raw = path.read_bytes()
        if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            return raw.decode("utf-16")
        return raw.decode("utf-8-sig", "surrogateescape")  # a BOM is no part of the first column's name
    except OSError as error:
        raise DataError(f"list {path} cannot be read", error.strerror or "") from None
    except UnicodeDecodeError as error:
        raise DataError(f"list {path} cannot be read", str(error), "save it as UTF-8") from None


def _read_jsonl(path: Path) -> Rows:
    rows: list[dict[str, Any]] = []
    lines: list[int] = []
    # Not splitlines: JSON may hold Unicode's own line characters.
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"line {number} of {path} is not JSON", str(error)) from None
        if not isinstance(row, dict):
            raise DataError(f"line {number} of {path} is no object", hint='write {"path": ..., "label": ...}')
        rows.append(row)
        lines.append(number)
    names = dict.fromkeys(name for row in rows for name in row)
    return Rows({name: [row.get(name) for row in rows] for name in names}, lines)
