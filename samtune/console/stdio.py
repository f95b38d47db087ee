"""stdout and stderr that do not break a command when they are closed, full, without a reader, or not UTF-8."""

import io
import os
import select
import sys
from contextlib import suppress
from typing import Any, TextIO

from samtune.errors import MachineError

_without_reader = False


def reader_is_gone() -> bool:
    """Whether the reader of stdout has gone, so that output is discarded."""
    return _without_reader


class _Results(io.FileIO):
    """stdout. A reader that has gone, such as `head -1`, is no error; a result that cannot be written is."""

    def write(self, data: Any) -> int:
        try:
            while (written := super().write(data)) is None:  # a pipe that does not block, and is full
                select.select((), (self,), ())
            return written
        except BrokenPipeError:
            global _without_reader
            _without_reader = True
            _discard_output(self.fileno())
            return len(data)
        except OSError as error:
            _discard_output(self.fileno())  # else Python would fail once more, when it ends
            raise MachineError(
                "the result could not be written",
                f"stdout: {error.strerror}",
                "send stdout elsewhere; what a run has found is in its folder, in report.json",
            ) from None


class _Notes(io.FileIO):
    """stderr. A note that cannot be written never ends a run."""

    def write(self, data: Any) -> int:
        with suppress(OSError):
            return super().write(data) or len(data)
        return len(data)


def guard() -> None:
    """Replace sys.stdout and sys.stderr. Call it once, in a process of samtune."""
    for number in (0, 1, 2):
        _open_if_closed(number)
    sys.stdout = _text(_Results(1, "w", closefd=False), sys.stdout)
    sys.stderr = _text(_Notes(2, "w", closefd=False), sys.stderr)


def _open_if_closed(number: int) -> None:
    """Open a closed stream, whose number the next opened file would take, with what libraries print there."""
    try:
        os.fstat(number)
    except OSError:
        os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one


def _text(raw: io.FileIO, before: TextIO | None) -> TextIO:
    return io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding=before.encoding if before else "utf-8",
        errors="backslashreplace",
        line_buffering=raw.isatty() or raw.fileno() == 2,
    )


def _discard_output(number: int) -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, number)
    os.close(nowhere)
