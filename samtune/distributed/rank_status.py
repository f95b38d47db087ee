"""What a rank tells the process that launched it: that it is at work, and how it ended.

Each rank writes a file into a folder of the launcher: an exit code alone carries no message, and does not tell a cause
from its consequences.
"""

import json
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from samtune.distributed.environment import rank_info, status_folder
from samtune.errors import SamtuneError, Stopped, WorkerLost
from samtune.files import write_atomic


@dataclass(frozen=True)
class RankStatus:
    """What a rank tells its launcher. exit_code: None while it is at work. result: what rank 0 has to print.

    attempt: what the ranks have in common that were started together, and no others.
    """

    rank: int
    pid: int
    attempt: str = ""
    exit_code: int | None = None
    message: str = ""
    cause: str = ""
    hint: str = ""
    time: float = 0.0
    result: Mapping[str, Any] | None = None

    @property
    def is_cause(self) -> bool:
        """Whether this rank ended for a reason of its own, which a restart would not fix.

        A signal before there was anything to save is none: torch's agent sends it to those that are left.
        """
        none = (None, 0, SamtuneError.exit_code, WorkerLost.exit_code)
        return self.exit_code not in none and (self.exit_code or 0) < 128


def report_ready() -> None:
    """Tell the launcher that this rank is there, and hears signals from now on. In other processes it does nothing."""
    if status_folder() is not None:
        write_status(None)


def write_status(
    exit_code: int | None, error: SamtuneError | Stopped | None = None, result: Mapping[str, Any] | None = None
) -> None:
    """Tell the launcher that this rank is at work (None), or how it ended."""
    there, here = status_folder(), rank_info()
    assert there is not None
    assert here is not None
    words = (error.message, error.cause, error.hint) if isinstance(error, SamtuneError) else (str(error or ""), "", "")
    attempt = os.environ["MASTER_PORT"]  # our launcher has another one for each
    word = RankStatus(here.rank, os.getpid(), attempt, exit_code, *words, time.time(), result)
    write_atomic(there / f"{here.rank}.json", json.dumps(asdict(word)))


def exit_code_of_launch() -> int | None:
    """The exit code of a launch that is over, for a rank that is started all the same; None if there is work to do."""
    there = status_folder()
    if there is None:
        return None
    if (there / "over").exists():
        return int((there / "over").read_text(encoding="utf-8"))
    return next((word.exit_code for word in _all_statuses(there) if word.is_cause), None)


def read_statuses(there: Path) -> dict[int, RankStatus]:
    """What the ranks of this machine have said, by rank; of those that were started last."""
    said = _all_statuses(there)
    latest = max(said, key=lambda word: word.time).attempt if said else ""
    return {word.rank: word for word in said if word.attempt == latest}


def _all_statuses(there: Path) -> list[RankStatus]:
    said = (RankStatus(**json.loads(path.read_text(encoding="utf-8"))) for path in there.glob("[0-9]*.json"))
    return sorted(said, key=lambda word: word.rank)
