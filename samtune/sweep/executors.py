"""Executors of a sweep: they start runs, each in a process of its own, so that a crash ends no other run."""

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
from samtune.errors import UsageError, plural
from samtune.runs import run_log
from samtune.sweep.ledger import Run, log_folder, run_folder
from samtune.sweep.spec import flag

COMMAND = (sys.executable, "-m", "samtune")
CPU_ONLY = {"CUDA_VISIBLE_DEVICES": ""}
"""Environment of a run that sees no GPU."""
_GRACE = 30.0  # seconds that a run has to end


class Executor(Protocol):
    """Starts runs that this process has claimed, and reports which have ended."""

    @property
    def slots(self) -> int:
        """How many runs it has at a time."""

    def start(self, folder: Path, run: Run) -> None:
        """Start or resume a run of the sweep in this folder."""

    def wait(self, seconds: float) -> list[tuple[str, int]]:
        """(id, exit code) of runs that have ended; returns after `seconds` at most."""

    def stop(self) -> None:
        """Ask all runs to save and end."""

    def kill(self) -> None:
        """End all runs at once."""


def start_process(folder: Path, run: Run, env: Mapping[str, str]) -> "subprocess.Popen[bytes]":
    """Start the process of a run. env: variables that decide where it computes.

    It has its own session, so that a terminal's Ctrl-C reaches it only through this process. It ends when this process
    has ended.
    """
    log = log_folder(folder, run.id)
    (log / "exit_code").unlink(missing_ok=True)
    flags = [flag(key, value) for key, value in run.settings.items()]
    recipe, output = str(folder / "sweep.toml"), str(run_folder(folder, run.id))
    command = [*COMMAND, "run", recipe, "--resume", f"--output={output}", *flags]
    with (log / "output.txt").open("ab") as output_file:
        output_file.write(f"\n{run_log.now()}  {' '.join(command)}\n".encode())
        output_file.flush()
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output_file,
            stderr=subprocess.STDOUT,
            env=os.environ | dict(env) | {signals.PARENT: str(os.getpid())},
            start_new_session=True,
        )


class LocalExecutor:
    """An executor on this machine: several runs on each GPU, or on the CPU, whose cores they share.

    slots: for each run at a time, its environment (see `local_slots`).
    """

    def __init__(self, slots: Sequence[Mapping[str, str]]) -> None:
        self.slots = len(slots)
        self._free = list(slots)
        self._running: dict[str, tuple[subprocess.Popen[bytes], Mapping[str, str]]] = {}

    def start(self, folder: Path, run: Run) -> None:
        slot = self._free.pop(0)
        self._running[run.id] = start_process(folder, run, slot), slot

    def wait(self, seconds: float) -> list[tuple[str, int]]:
        deadline = time.monotonic() + seconds
        while True:
            ended = [(run, code) for run, (process, _) in self._running.items() if (code := process.poll()) is not None]
            for run, _ in ended:
                self._free.append(self._running.pop(run)[1])
            if ended or time.monotonic() >= deadline:
                return ended
            time.sleep(0.1)

    def stop(self) -> None:
        for process, _ in self._running.values():
            process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """End all runs at once: for runs that were asked to stop this is the second signal."""
        self.stop()
        for process, _ in self._running.values():
            try:
                process.wait(_GRACE)
            except subprocess.TimeoutExpired:
                process.kill()


def local_slots(config: RunConfig, jobs: int) -> list[dict[str, str]]:
    """Environments of the runs at a time on this machine: `jobs` on each requested GPU, else on the CPU.

    Raises MachineError where there are no such GPUs, UsageError for more runs than cores.
    """
    from samtune.distributed import device  # imports torch, which the workers of a cluster do not need

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
    threads = {"OMP_NUM_THREADS": str(cores // jobs)} if jobs > 1 and "OMP_NUM_THREADS" not in os.environ else {}
    return [CPU_ONLY | threads] * jobs


def refuse_ranks() -> None:
    """Raise UsageError in a rank of torchrun or of a Slurm step: a sweep starts its runs itself."""
    if environment.rank_info() is not None:
        raise UsageError(
            "samtune sweep as one of several ranks",
            "a sweep starts its runs by itself",
            "start it once, or several times with the same --output: they share the work",
        )
