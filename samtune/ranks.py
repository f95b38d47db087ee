"""Which of several processes of one command this one is, and what it tells the process that launched it.

A launcher gives each of its processes, the ranks, a place: ours and torchrun by RANK, WORLD_SIZE and their like, Slurm
by variables of its own. Ours also gives them a folder, in which each says who it is and how it ended: an exit code
alone could not carry an error's words, nor tell the cause from what follows from it.
"""

import json
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from samtune.errors import MachineError, SamtuneError, Stopped, UsageError, WorkerLost, first_line

FOLDER, LAUNCHER = "SAMTUNE_LAUNCH", "SAMTUNE_LAUNCHER"  # where ranks leave their words; the launcher's process
_LOOK = 0.5  # seconds
_KNOWN_AFTER = 5.0  # seconds in which the name of a machine that has just started becomes known
_MOST = 10**9  # ranks
_PORTS = range(20_000, 30_000)  # one of them for each Slurm job


@dataclass(frozen=True)
class Place:
    """A rank's place among all. machine: number of the machine, from 0; local: among the ranks of this machine."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    machine: int


@cache
def place() -> Place | None:
    """The place of this process; None where it is alone. Slurm's variables are translated into torch.distributed's.

    Raises UsageError that names a variable which cannot be meant.
    """
    if not {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys() and not _translate(os.environ):
        return None
    world_size = _number("WORLD_SIZE", 1, _MOST)
    if world_size == 1 and FOLDER not in os.environ:
        return None  # as a shell may still say that was once a rank
    rank = _number("RANK", 0, world_size - 1)
    _number("MASTER_PORT", 0, 2**16 - 1)
    local_world_size = _number("LOCAL_WORLD_SIZE", 1, world_size, default=world_size)
    local_rank = _number("LOCAL_RANK", 0, local_world_size - 1, default=rank)
    return Place(rank, world_size, local_rank, local_world_size, _number("GROUP_RANK", 0, _MOST, default=0))


def _number(name: str, low: int, high: int, default: int | None = None) -> int:
    """What a variable of the environment says. Raises UsageError where that is no whole number from low to high."""
    text = os.environ.get(name)
    if text is None and default is not None:
        return default
    if text is None or not re.fullmatch("[0-9]{1,18}", text.strip()) or not low <= int(text) <= high:
        allowed = f"a whole number from {low} on" if high == _MOST else f"a whole number from {low} to {high}"
        raise UsageError(
            f"{name}={text} in the environment" if text is not None else f"the environment has no {name}",
            f"it tells a rank its place among all, and must be {allowed}",
            f"set it as a launcher would; or, if there is none, run {alone()}",
        )
    return int(text)


def _translate(environ: Any) -> bool:
    """Slurm's variables of a job step with several tasks -> torch.distributed's; False where there is no such step."""
    # A batch script itself is no rank: SLURM_PROCID is 0 there, but the number of tasks of a step is not set.
    if _number("SLURM_STEP_NUM_TASKS", 0, _MOST, default=1) < 2:
        return False
    for name in ("SLURM_PROCID", "SLURM_LOCALID"):
        _number(name, 0, _MOST)
    for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"):
        _number(name, 0, 2**32, default=0)
    tasks = re.match("[0-9]+", environ.get("SLURM_STEP_TASKS_PER_NODE", "1"))
    environ["RANK"], environ["WORLD_SIZE"] = environ["SLURM_PROCID"], environ["SLURM_STEP_NUM_TASKS"]
    environ["LOCAL_RANK"], environ["GROUP_RANK"] = environ["SLURM_LOCALID"], environ.get("SLURM_NODEID", "0")
    environ["LOCAL_WORLD_SIZE"] = tasks[0] if tasks else "1"
    environ.setdefault("MASTER_ADDR", first_host(environ.get("SLURM_STEP_NODELIST", "localhost")))
    job = int(environ.get("SLURM_JOB_ID", 0)) + int(environ.get("SLURM_STEP_ID", 0))
    environ.setdefault("MASTER_PORT", str(_PORTS[job % len(_PORTS)]))
    return True


def first_host(nodes: str) -> str:
    """The first host of a list as Slurm writes it: "gpu[03-05,9],cpu1" -> "gpu03"."""
    prefix, number = re.match(r"([^,\[]*)(?:\[(\w+))?", nodes).groups()  # type: ignore[union-attr]
    return f"{prefix}{number or ''}"


def check_host(given: str, host: str, mend: str = "") -> None:
    """Raise MachineError where a host's name means nothing; a new one may take a moment to be known.

    given: the flag or the variable that names it. mend: what else may help.
    """
    deadline = time.monotonic() + _KNOWN_AFTER
    while True:
        try:
            socket.getaddrinfo(host, None)
        except (OSError, UnicodeError) as error:
            if time.monotonic() > deadline:
                raise MachineError(
                    f"{given}{host}: there is no host of that name",
                    first_line(error),
                    f"give the name or the address of the first machine, as this one knows it{mend}",
                ) from None
            time.sleep(_KNOWN_AFTER / 5)
        else:
            return


def asked_for(gpus: str, processes: int | None, nnodes: int = 1) -> bool:
    """Whether this process shall launch ranks, and not be one: that a single GPU comes of it is not ruled out."""
    return place() is None and (nnodes > 1 or (processes or 1) > 1 or (processes is None and gpus not in ("auto", "0")))


def check_processes(processes: int | None) -> None:
    """Raise UsageError for --processes in a rank of another launcher, which has started another number."""
    here = place()
    if here is not None and folder() is None and processes not in (None, here.local_world_size):
        raise UsageError(
            f"--processes {processes} in one of {here.local_world_size} ranks",
            f"{origin()} says that a launcher has started them",
            f"leave --processes out; or, if there is no launcher, run {alone()}",
        )


def origin() -> str:
    """The variables that make this process a rank."""
    if os.environ.get("SLURM_STEP_NUM_TASKS") == os.environ["WORLD_SIZE"]:
        return f"SLURM_STEP_NUM_TASKS={os.environ['WORLD_SIZE']}"
    return f"RANK={os.environ['RANK']} WORLD_SIZE={os.environ['WORLD_SIZE']}"


def alone() -> str:
    """What lets the command run as if there were no launcher."""
    by_slurm = "WORLD_SIZE" not in os.environ or origin().startswith("SLURM")
    names = ("SLURM_STEP_NUM_TASKS",) if by_slurm else ("RANK", "WORLD_SIZE")
    return f"env {' '.join(f'-u {name}' for name in names)} samtune ..."


def is_first() -> bool:
    """Whether this process speaks and writes for all: rank 0, the only one, or one whose place cannot be meant."""
    try:
        here = place()
    except UsageError:
        return True
    return here is None or here.rank == 0


def restarts() -> int:
    """How often the launcher has started the ranks again."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


_launcher: int | None = None  # its process
_last_words: list[Callable[[], None]] = []


def before_an_orphan_ends(say_so: Callable[[], None]) -> None:
    """Have this done if the launcher is gone, and this rank ends for that."""
    _last_words.append(say_so)


def end_with_the_launcher() -> None:
    """From now on, this rank ends within a second after its launcher, ours or torchrun, whatever it is doing."""
    global _launcher
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    _launcher = int(os.environ.get(LAUNCHER, os.getppid()))  # it may be gone already

    def watch() -> None:
        while not is_orphan():
            time.sleep(_LOOK)
        try:
            for say_so in _last_words:
                say_so()
        finally:
            os._exit(WorkerLost.exit_code)  # from this thread: the main one may wait for another rank

    threading.Thread(target=watch, name="launcher", daemon=True).start()


def is_orphan() -> bool:
    """Whether the launcher has ended before this rank."""
    return _launcher is not None and os.getppid() != _launcher


# ----------------------------------------------------------------------------------------------- words to the launcher


@dataclass(frozen=True)
class Word:
    """What a rank tells its launcher. exit_code: None while it is at work. result: what rank 0 has to print.

    attempt: what the ranks have in common that were started together, and no others.
    """

    rank: int
    pid: int
    attempt: str = ""
    exit_code: int | None = None
    what: str = ""
    why: str = ""
    mend: str = ""
    time: float = 0.0
    result: Mapping[str, Any] | None = None

    @property
    def is_cause(self) -> bool:
        """Whether this rank ended for a reason of its own, which a restart would not mend.

        A signal before there was anything to save is none: torch's agent sends it to those that are left.
        """
        none = (None, 0, SamtuneError.exit_code, WorkerLost.exit_code)
        return self.exit_code not in none and (self.exit_code or 0) < 128


def folder() -> Path | None:
    """Where a rank of our own launcher leaves its words; None for all other processes."""
    given = os.environ.get(FOLDER)
    return Path(given) if given and place() is not None else None


def report_for_work() -> None:
    """Tell the launcher that this rank is there, and hears signals from now on. In other processes it does nothing."""
    if folder() is not None:
        say(None)


def say(
    exit_code: int | None, error: SamtuneError | Stopped | None = None, result: Mapping[str, Any] | None = None
) -> None:
    """Tell the launcher that this rank is at work (None), or how it ended."""
    there, here = folder(), place()
    assert there is not None
    assert here is not None
    words = (error.what, error.why, error.mend) if isinstance(error, SamtuneError) else (str(error or ""), "", "")
    attempt = os.environ["MASTER_PORT"]  # our launcher has another one for each
    word = Word(here.rank, os.getpid(), attempt, exit_code, *words, time.time(), result)
    part = there / f".{here.rank}"
    part.write_text(json.dumps(asdict(word)), encoding="utf-8")
    part.replace(there / f"{here.rank}.json")


def over() -> int | None:
    """The exit code of a launch that is over, for a rank that is started all the same; None if there is work to do."""
    there = folder()
    if there is None:
        return None
    if (there / "over").exists():
        return int((there / "over").read_text(encoding="utf-8"))
    return next(
        (word.exit_code for word in _all_words(there) if word.is_cause or (word.rank, word.exit_code) == (0, 0)), None
    )


def words(there: Path) -> dict[int, Word]:
    """What the ranks of this machine have said, by rank; of those that were started last."""
    said = _all_words(there)
    latest = max(said, key=lambda word: word.time).attempt if said else ""
    return {word.rank: word for word in said if word.attempt == latest}


def _all_words(there: Path) -> list[Word]:
    said = (Word(**json.loads(path.read_text(encoding="utf-8"))) for path in there.glob("[0-9]*.json"))
    return sorted(said, key=lambda word: word.rank)
