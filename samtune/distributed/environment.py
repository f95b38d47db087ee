"""The environment of a rank: which of the processes of a launch this one is.

samtune's launcher and torchrun set RANK, WORLD_SIZE and the like. Slurm sets variables of its own.
"""

import os
import re
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from samtune.errors import MachineError, UsageError, WorkerLost, first_line

# Environment variables: the folder in which ranks report their status, and the launcher's process id.
STATUS_FOLDER, LAUNCHER = "SAMTUNE_LAUNCH", "SAMTUNE_LAUNCHER"
_POLL_SECONDS = 0.5
_DNS_SECONDS = 5.0  # in which the name of a machine that has just started becomes known
_MAX = 10**9  # ranks, machines
_PORTS = range(20_000, 30_000)  # one of them for each Slurm job


@dataclass(frozen=True)
class RankInfo:
    """Which rank a process is. machine: number of its machine, from 0; local: among the ranks of this machine."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    machine: int


@cache
def rank_info() -> RankInfo | None:
    """Which rank this process is; None if it is the only process. Slurm's variables become torch.distributed's.

    Raises UsageError that names an invalid variable.
    """
    if not {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys() and not _adopt_slurm_step(
        os.environ
    ):
        return None
    world_size = _read_int("WORLD_SIZE", 1, _MAX)
    if world_size == 1 and STATUS_FOLDER not in os.environ:
        return None  # left over in a shell that was once a rank
    rank = _read_int("RANK", 0, world_size - 1)
    _read_int("MASTER_PORT", 0, 2**16 - 1)
    local_world_size = _read_int("LOCAL_WORLD_SIZE", 1, world_size, default=world_size)
    local_rank = _read_int("LOCAL_RANK", 0, local_world_size - 1, default=rank)
    return RankInfo(rank, world_size, local_rank, local_world_size, _read_int("GROUP_RANK", 0, _MAX, default=0))


def _read_int(name: str, low: int, high: int, default: int | None = None) -> int:
    """The value of an environment variable. Raises UsageError unless it is a whole number from low to high."""
    text = os.environ.get(name)
    if text is None and default is not None:
        return default
    if text is None or not re.fullmatch("[0-9]{1,18}", text.strip()) or not low <= int(text) <= high:
        allowed = f"a whole number from {low} on" if high == _MAX else f"a whole number from {low} to {high}"
        raise UsageError(
            f"{name}={text} in the environment" if text is not None else f"the environment has no {name}",
            f"it says which rank this process is, and must be {allowed}",
            f"set it as a launcher would; or, if there is none, run {command_without_launcher()}",
        )
    return int(text)


def _adopt_slurm_step(environ: Any) -> bool:
    """Set torch.distributed's variables from those of a Slurm step with several tasks; False without such a step."""
    # A batch script itself is no rank: SLURM_PROCID is 0 there, but the number of tasks of a step is not set.
    if _read_int("SLURM_STEP_NUM_TASKS", 0, _MAX, default=1) < 2:
        return False
    for name in ("SLURM_PROCID", "SLURM_LOCALID"):
        _read_int(name, 0, _MAX)
    for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"):
        _read_int(name, 0, 2**32, default=0)
    tasks = re.match("[0-9]+", environ.get("SLURM_STEP_TASKS_PER_NODE", "1"))
    environ["RANK"], environ["WORLD_SIZE"] = environ["SLURM_PROCID"], environ["SLURM_STEP_NUM_TASKS"]
    environ["LOCAL_RANK"], environ["GROUP_RANK"] = environ["SLURM_LOCALID"], environ.get("SLURM_NODEID", "0")
    environ["LOCAL_WORLD_SIZE"] = tasks[0] if tasks else "1"
    environ.setdefault("MASTER_ADDR", first_host(environ.get("SLURM_STEP_NODELIST", "localhost")))
    job = int(environ.get("SLURM_JOB_ID", 0)) + int(environ.get("SLURM_STEP_ID", 0))
    environ.setdefault("MASTER_PORT", str(_PORTS[job % len(_PORTS)]))
    return True


def first_host(nodes: str) -> str:
    """The first host of a list in Slurm's notation: "gpu[03-05,9],cpu1" -> "gpu03"."""
    prefix, number = re.match(r"([^,\[]*)(?:\[(\w+))?", nodes).groups()  # type: ignore[union-attr]
    return f"{prefix}{number or ''}"


def check_host(given: str, host: str, hint: str = "") -> None:
    """Raise MachineError if a host's name cannot be resolved; that of a new machine may take some seconds.

    given: the flag or the variable that names it. hint: what else may help.
    """
    deadline = time.monotonic() + _DNS_SECONDS
    while True:
        try:
            socket.getaddrinfo(host, None)
        except (OSError, UnicodeError) as error:
            if time.monotonic() > deadline:
                raise MachineError(
                    f"{given}{host}: there is no host of that name",
                    first_line(error),
                    f"give the name or the address of the first machine, as this one knows it{hint}",
                ) from None
            time.sleep(_DNS_SECONDS / 5)
        else:
            return


def wants_launch(gpus: str, processes: int | None, nnodes: int = 1) -> bool:
    """Whether this process launches ranks, perhaps a single one, and is no rank itself."""
    return rank_info() is None and (
        nnodes > 1 or (processes or 1) > 1 or (processes is None and gpus not in ("auto", "0"))
    )


def check_processes(processes: int | None) -> None:
    """Raise UsageError for --processes in a rank of another launcher, if that has started another number."""
    info = rank_info()
    if info is not None and status_folder() is None and processes not in (None, info.local_world_size):
        raise UsageError(
            f"--processes {processes} in one of {info.local_world_size} ranks",
            f"{launcher_variables()} says that a launcher has started them",
            f"leave --processes out; or, if there is no launcher, run {command_without_launcher()}",
        )


def launcher_variables() -> str:
    """The variables that make this process a rank."""
    if os.environ.get("SLURM_STEP_NUM_TASKS") == os.environ["WORLD_SIZE"]:
        return f"SLURM_STEP_NUM_TASKS={os.environ['WORLD_SIZE']}"
    return f"RANK={os.environ['RANK']} WORLD_SIZE={os.environ['WORLD_SIZE']}"


def command_without_launcher() -> str:
    """A command line that runs as if there were no launcher."""
    by_slurm = "WORLD_SIZE" not in os.environ or launcher_variables().startswith("SLURM")
    names = ("SLURM_STEP_NUM_TASKS",) if by_slurm else ("RANK", "WORLD_SIZE")
    return f"env {' '.join(f'-u {name}' for name in names)} samtune ..."


def is_rank0() -> bool:
    """Whether this process prints and writes for all: rank 0, the only process, or one with invalid variables."""
    try:
        info = rank_info()
    except UsageError:
        return True
    return info is None or info.rank == 0


def restart_count() -> int:
    """How often the launcher has restarted the ranks."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


_launcher: int | None = None  # process id
_on_loss: list[Callable[[], None]] = []


def on_launcher_loss(callback: Callable[[], None]) -> None:
    """Call this before this rank ends because its launcher has."""
    _on_loss.append(callback)


def exit_with_launcher() -> None:
    """Have this rank end within a second after its launcher, ours or torchrun, whatever it is doing."""
    global _launcher
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    _launcher = int(os.environ.get(LAUNCHER, os.getppid()))  # it may be gone already

    def watch() -> None:
        while not is_orphan():
            time.sleep(_POLL_SECONDS)
        try:
            for callback in _on_loss:
                callback()
        finally:
            os._exit(WorkerLost.exit_code)  # from this thread: the main one may wait for another rank

    threading.Thread(target=watch, name="launcher", daemon=True).start()


def is_orphan() -> bool:
    """Whether the launcher has ended before this rank."""
    return _launcher is not None and os.getppid() != _launcher


def status_folder() -> Path | None:
    """The folder in which a rank of our own launcher reports its status; None for all other processes."""
    folder = os.environ.get(STATUS_FOLDER)
    return Path(folder) if folder and rank_info() is not None else None
