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
    """Tell the launcher that this rank runs, and hears signals from now on. In other processes it does nothing."""
    if status_folder() is not None:
        write_status(None)


def write_status(
    exit_code: int | None, error: SamtuneError | Stopped | None = None, result: Mapping[str, Any] | None = None
) -> None:
    """Tell the launcher that this rank is at work (None), or how it ended."""
    folder, rank = status_folder(), rank_info()
    assert folder is not None
    assert rank is not None
    texts = (error.message, error.cause, error.hint) if isinstance(error, SamtuneError) else (str(error or ""), "", "")
    attempt = os.environ["MASTER_PORT"]  # our launcher has another one for each
    status = RankStatus(rank.rank, os.getpid(), attempt, exit_code, *texts, time.time(), result)
    write_atomic(folder / f"{rank.rank}.json", json.dumps(asdict(status)))


def exit_code_of_launch() -> int | None:
    """The exit code of a launch that is over, for a rank that is started all the same; None if there is work to do."""
    folder = status_folder()
    if folder is None:
        return None
    if (folder / "over").exists():
        return int((folder / "over").read_text(encoding="utf-8"))
    for status in _read_all(folder):
        if status.is_cause or (status.rank, status.exit_code) == (0, 0):
            return status.exit_code
    return None


def read_statuses(folder: Path) -> dict[int, RankStatus]:
    """Statuses of this machine's ranks by rank, of the latest attempt only."""
    statuses = _read_all(folder)
    latest = max(statuses, key=lambda status: status.time).attempt if statuses else ""
    return {status.rank: status for status in statuses if status.attempt == latest}


def _read_all(folder: Path) -> list[RankStatus]:
    statuses = (RankStatus(**json.loads(path.read_text(encoding="utf-8"))) for path in folder.glob("[0-9]*.json"))
    return sorted(statuses, key=lambda status: status.rank)
