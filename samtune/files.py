"""Files: their names as text that can be printed, stored and compared, and files that are replaced as a whole."""

import os
import re
import socket
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def readable(name: str) -> str:
    """A name as valid Unicode in composed form (NFC), so that equal names are equal text on every system.

    Bytes that are not UTF-8 are read as Windows-1252, in which older systems wrote names.
    """
    try:
        raw = os.fsencode(name)
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        try:
            text = raw.decode("cp1252")
        except UnicodeDecodeError:
            text = raw.decode("latin-1")
    except UnicodeEncodeError:  # half of a surrogate pair, as JSON can hold
        text = name.encode("utf-8", "replace").decode("utf-8")
    return unicodedata.normalize("NFC", text)


def natural_key(name: str) -> tuple[list[str | tuple[int, str]], str]:
    """Sort key in which the digits of a name count as numbers: 2 before 10, class9 before class10."""
    parts = re.split("([0-9]+)", name)
    digits = (part.lstrip("0") for part in parts[1::2])
    numbers = iter([(len(number), number) for number in digits])  # compared as numbers of any length
    return [next(numbers) if i % 2 else part for i, part in enumerate(parts)], name


def first_existing_parent(path: Path) -> Path:
    """The path itself where it exists, else the nearest folder above it that does."""
    return next(parent for parent in (path, *path.absolute().parents) if parent.exists())


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path to write to: the file there replaces `path` at the end of the block; an error removes it.

    A reader finds the old file or the new one, whole, also where several processes write it. Raises OSError.
    """
    part = path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}.part")
    try:
        yield part
        part.replace(path)
    except BaseException:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        raise


def write_atomic(path: Path, content: str, *, durable: bool = False) -> None:
    """Replace a file by this text, as `replacing` does. durable: also after a loss of power. Raises OSError."""
    with replacing(path) as part, part.open("w", encoding="utf-8", errors="replace") as file:  # names may be any bytes
        file.write(content)
        if durable:
            file.flush()
            os.fsync(file.fileno())
