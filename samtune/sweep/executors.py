"""Where the runs of a sweep take place: each in a process of its own, so that whatever ends it ends no other."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from samtune.config.run_config import RunConfig
from samtune.distributed import environment, signals
from samtune.errors import UsageError
from samtune.runs import run_log
from samtune.sweep.ledger import Run, log_folder, run_folder
from samtune.sweep.spec import flag
from samtune.text import plural

COMMAND = (sys.executable, "-m", "samtune")
_GRACE = 30.0  # seconds that a run has to end


class Engine(Protocol):
    """Takes runs that this process has claimed, and tells which have ended."""

    @property
    def slots(self) -> int:
        """How many runs it has at a time."""

    def start(self, folder: Path, run: Run) -> None:
        """Begin a run of the sweep in this folder, or go on with it."""

    def ended(self, seconds: float) -> list[tuple[str, int]]:
        """(id, exit code) of runs that have ended, after so many seconds at most."""

    def stop(self) -> None:
        """Ask all runs to save and to end."""

    def kill(self) -> None:
        """End all runs at once."""


def command(folder: Path, run: Run) -> list[str]:
    """The command line of a run: the sweep's own recipe, and what the run has of its own."""
    flags = [flag(key, value) for key, value in run.settings.items()]
    recipe, output = str(folder / "sweep.toml"), str(run_folder(folder, run.id))
    return [*COMMAND, "run", recipe, "--resume", f"--output={output}", *flags]


def begin(folder: Path, run: Run, place: Mapping[str, str]) -> "subprocess.Popen[bytes]":
    """Start a run's process. place: environment that says where it computes.

    It has a session of its own: a terminal's Ctrl-C comes to it once, from here. It ends when this process has gone.
    """
    log = log_folder(folder, run.id)
    (log / "exit_code").unlink(missing_ok=True)
    arguments = command(folder, run)
    with (log / "output.txt").open("ab") as output:
        output.write(f"\n{run_log.now()}  {' '.join(arguments)}\n".encode())
        output.flush()
        return subprocess.Popen(
            arguments,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | dict(place) | {signals.PARENT: str(os.getpid())},
            start_new_session=True,
        )


class Local:
    """On this machine: so many runs at a time on each GPU, or on the CPU, whose cores they share."""

    def __init__(self, places: Sequence[Mapping[str, str]]) -> None:
        """places: for each run at a time, the environment that says where it computes."""
        self._slots = len(places)
        self._free = list(places)
        self._running: dict[str, tuple[subprocess.Popen[bytes], Mapping[str, str]]] = {}

    @property
    def slots(self) -> int:
        """How many runs it has at a time."""
        return self._slots

    def start(self, folder: Path, run: Run) -> None:
        """Begin a run of the sweep in this folder, or go on with it."""
        place = self._free.pop(0)
        self._running[run.id] = begin(folder, run, place), place

    def ended(self, seconds: float) -> list[tuple[str, int]]:
        """(id, exit code) of runs that have ended, after so many seconds at most."""
        deadline = time.monotonic() + seconds
        while True:
            found = []
            for run, (process, place) in list(self._running.items()):
                code = process.poll()
                if code is not None:
                    del self._running[run]
                    self._free.append(place)
                    found.append((run, code))
            if found or time.monotonic() >= deadline:
                return found
            time.sleep(0.1)

    def stop(self) -> None:
        """Ask all runs to save and to end."""
        for process, _ in self._running.values():
            process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """End all runs at once: to those that were asked to stop it is the second signal."""
        self.stop()
        for process, _ in self._running.values():
            try:
                process.wait(_GRACE)
            except subprocess.TimeoutExpired:
                process.kill()


def places_here(config: RunConfig, jobs: int) -> list[dict[str, str]]:
    """Where runs compute on this machine, `jobs` at a time on each GPU that is asked for, or else on the CPU.

    Raises MachineError where there are no such GPUs, UsageError for more runs than cores.
    """
    from samtune.distributed import device  # torch: not for the workers of a cluster

    numbers = [] if config.processes is not None or config.gpus == "0" else device.gpu_numbers(config.gpus)
    if numbers:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        names = [visible[number] if visible != [""] else str(number) for number in numbers]
        return [{"CUDA_VISIBLE_DEVICES": name} for _ in range(jobs) for name in names]
    cores = device.available_cpus()
    if jobs > cores:
        raise UsageError(
            f"--jobs {jobs}: this machine has {plural(cores, 'core')}", "each run needs one", f"give {cores} at most"
        )
    place = use_cpu()
    if jobs > 1 and "OMP_NUM_THREADS" not in os.environ:
        place["OMP_NUM_THREADS"] = str(cores // jobs)
    return [place] * jobs


def use_cpu() -> dict[str, str]:
    """The environment of a run that shall see no GPU."""
    return {"CUDA_VISIBLE_DEVICES": ""}


def refuse_ranks() -> None:
    """Raise UsageError in a rank of torchrun or of a Slurm step: a sweep starts runs, and is not one of several."""
    if environment.rank_info() is not None:
        raise UsageError(
            "samtune sweep as one of several ranks",
            "a sweep starts its runs by itself",
            "start it once, or several times with the same --output: they share the work",
        )
