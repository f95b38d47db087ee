"""The status of each rank for its launcher: that it is running, or how it ended.

Each rank writes a file into a folder of the launcher. An exit code has no message, and does not tell a cause from its
consequences.
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
    """The status of a rank. exit_code: None while it is running. result: what rank 0 has to print.

    attempt: the same for the ranks that were started together, different after a restart.
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
        """Whether this rank ended for a reason that a restart would not fix.

        A signal before the first checkpoint is no such reason: torch's agent sends it to the remaining ranks.
        """
        others = (None, 0, SamtuneError.exit_code, WorkerLost.exit_code)
        return self.exit_code not in others and (self.exit_code or 0) < 128


def report_ready() -> None:
    """Tell the launcher that this rank is running and handles signals. Does nothing in other processes."""
    if status_folder() is not None:
        write_status(None)


def write_status(
    exit_code: int | None, error: SamtuneError | Stopped | None = None, result: Mapping[str, Any] | None = None
) -> None:
    """Tell the launcher that this rank is running (None), or how it ended."""
    folder, info = status_folder(), rank_info()
    assert folder is not None
    assert info is not None
    texts = (error.message, error.cause, error.hint) if isinstance(error, SamtuneError) else (str(error or ""), "", "")
    attempt = os.environ["MASTER_PORT"]  # our launcher takes another one for each
    status = RankStatus(info.rank, os.getpid(), attempt, exit_code, *texts, time.time(), result)
    write_atomic(folder / f"{info.rank}.json", json.dumps(asdict(status)))


def exit_code_of_launch() -> int | None:
    """The exit code of a launch that has ended, for a rank that is started after that; None if the launch goes on."""
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
