"""The errors that a user can fix, their exit codes, and the words of their messages.

    SamtuneError                 message, cause, hint: one line each
     |- UsageError          2    the command line or the recipe
     |- DataError           3    images, labels, splits
     |- ModelError          4    model names, pretrained weights, the hub
     |- CheckpointError     5    files that samtune or somebody else wrote
     |- OutOfMemory         6    the device's memory
     |- Diverged            7    a loss or a gradient that is not finite
     |- MachineError        8    folders, disks, devices
     `- WorkerLost          9    a data worker or a device that no longer answers

    Stopped          75, 128 + n    signal n: nothing is wrong; 75 if all work is in a checkpoint

Exit code 0 is success and 1 is a defect of samtune itself, which keeps its traceback.
"""

import difflib
from collections.abc import Iterable, Sequence


class SamtuneError(Exception):
    """An error that the user can fix.

    message: the value and the rule it broke. cause: where it came from. hint: what to do next.
    They are the arguments of the exception, so that it can be pickled in a data-loading process.
    """

    exit_code = 1

    def __init__(self, message: str, cause: str = "", hint: str = "") -> None:
        super().__init__(message, cause, hint)
        self.message, self.cause, self.hint = message, cause, hint

    def __str__(self) -> str:
        lines = [self.message]
        lines += [f"  cause: {self.cause}"] if self.cause else []
        lines += [f"  hint:  {self.hint}"] if self.hint else []
        return "\n".join(lines)


ORPHANED = "the launcher is gone"
LOST = "the connection to another rank is lost"
"""The messages of a rank that ended only because another one, or the launcher, did."""


def first_line(error: BaseException) -> str:
    """The type and the first line of another library's error."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__


class UsageError(SamtuneError):
    """An invalid flag or recipe."""

    exit_code = 2


class DataError(SamtuneError):
    """A data set that is missing, unreadable or contradicts itself."""

    exit_code = 3


class ModelError(SamtuneError):
    """A model that does not exist, or whose weights or hub cannot be reached."""

    exit_code = 4


class CheckpointError(SamtuneError):
    """A weights file or a run folder that is damaged or does not match."""

    exit_code = 5


class OutOfMemory(SamtuneError):
    """A batch that does not fit the device."""

    exit_code = 6


class Diverged(SamtuneError):
    """A loss or a gradient that is not finite; the weights were not updated with it."""

    exit_code = 7


class MachineError(SamtuneError):
    """A folder, disk or device that fails."""

    exit_code = 8


class WorkerLost(SamtuneError):
    """A data worker that was killed, or a step that never ends."""

    exit_code = 9


class Stopped(BaseException):
    """A signal ended the run. Not an Exception: no handler for errors may swallow it."""

    SAVED = 75  # sysexits.h: temporary failure, try again

    def __init__(self, message: str, exit_code: int, hint: str = "") -> None:
        super().__init__(message)
        self.exit_code = exit_code
        self.hint = hint or ("go on with --resume" if exit_code == self.SAVED else "what was saved before is intact")


def plural(count: int | str, noun: str) -> str:
    """A count with its noun: 1 image, 2 images, 0 classes. A str is a number that is formatted already."""
    ending = "" if str(count) == "1" else "es" if noun.endswith(("s", "tch")) else "s"
    return f"{count} {noun}{ending}"


def shorten(names: Sequence[str], limit: int = 6, separator: str = ", ") -> str:
    """The first of many names, and how many follow."""
    rest = len(names) - limit
    return separator.join(names[:limit]) + (f"{separator}and {rest} more" if rest > 0 else "")


def similar_names(name: str, names: Iterable[str], most: int = 1, cutoff: float = 0.6) -> list[str]:
    """The names that are most like one, the nearest first. cutoff: least similarity, of 1 for equal names."""
    return difflib.get_close_matches(name, list(dict.fromkeys(names)), n=most, cutoff=cutoff)


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """The question for a name that does not exist: "did you mean rho?"; "" where none is like it."""
    return "".join(f"did you mean {similar}?" for similar in similar_names(name, names))
