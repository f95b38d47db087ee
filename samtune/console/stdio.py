"""stdout and stderr that do not break the command: they may be closed, full, without a reader, or not speak UTF-8."""

import io
import os
import select
import sys
from contextlib import suppress
from typing import Any, TextIO

from samtune.errors import MachineError

_without_reader = False


def reader_is_gone() -> bool:
    """Whether whoever read stdout has had enough: what is written there from now on goes nowhere."""
    return _without_reader


class _Results(io.FileIO):
    """stdout. Whoever read it may have had enough, as `head -1` has; a result that cannot be written is an error."""

    def write(self, data: Any) -> int:
        try:
            while (written := super().write(data)) is None:  # a pipe that does not block, and is full
                select.select((), (self,), ())
            return written
        except BrokenPipeError:
            global _without_reader
            _without_reader = True
            _drop_what_comes(self.fileno())
            return len(data)
        except OSError as error:
            _drop_what_comes(self.fileno())  # else Python would fail once more, when it ends
            raise MachineError(
                "the result could not be written",
                f"stdout: {error.strerror}",
                "send stdout elsewhere; what a run has found is in its folder, in report.json",
            ) from None


class _Notes(io.FileIO):
    """stderr. A note that cannot be written is no reason to end a run, whoever wrote it: we, a library, a thread."""

    def write(self, data: Any) -> int:
        with suppress(OSError):
            return super().write(data) or len(data)
        return len(data)


def guard() -> None:
    """Put both in the place of sys.stdout and sys.stderr. For a process that is ours, and once."""
    for number in (0, 1, 2):
        _open_if_closed(number)
    sys.stdout = _text(_Results(1, "w", closefd=False), sys.stdout)
    sys.stderr = _text(_Notes(2, "w", closefd=False), sys.stderr)


def _open_if_closed(number: int) -> None:
    """A number that is free would go to the next file that is opened, and what libraries print there, into it."""
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


def _drop_what_comes(number: int) -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, number)
    os.close(nowhere)
