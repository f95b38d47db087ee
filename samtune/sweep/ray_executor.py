"""Runs of a sweep on a Ray cluster. The only user of ray.

Each run is a task with a process of its own. All nodes must see the sweep folder, and a data set that is a folder,
under the same path. A task whose worker or node is lost starts again on another, from the run's checkpoint.
"""

import logging
import os
import signal
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray

from samtune.config.run_config import RunConfig
from samtune.errors import MachineError, UsageError, WorkerLost, first_line
from samtune.runs import lock
from samtune.runs.resume import finished_report
from samtune.sweep.executors import CPU_ONLY, start_process
from samtune.sweep.ledger import Run, log_folder, run_folder

_RETRIES = 3  # of a run whose worker or node is lost
_POLL = 0.5  # seconds
_PATIENCE = 10.0  # seconds for a cluster to answer


class RayExecutor:
    """An executor: runs are tasks of Ray, each on a GPU if the cluster has some, else on a share of a node's cores."""

    def __init__(self, address: str, config: RunConfig, jobs: int) -> None:
        """Join the cluster at "host:port", or with "auto" the one that this machine belongs to.

        jobs: runs at a time, on each GPU or else on each node. Raises MachineError where no cluster answers, UsageError
        for GPUs by number.
        """
        if config.gpus not in ("auto", "all", "0"):
            raise UsageError(
                f"--gpus {config.gpus} with --engine ray",
                "Ray gives each run a GPU",
                "give all, or 0 for the CPU; `ray start --num-gpus` says how many a node lends",
            )
        try:
            if address != "auto":  # Ray itself would try for minutes
                host, _, port = address.rpartition(":")
                socket.create_connection((host, int(port)), _PATIENCE).close()
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except (OSError, RuntimeError) as error:
            raise MachineError(
                f"no Ray cluster answers at {address}",
                first_line(error),
                "start one (`ray start --head`, and on the other nodes `ray start --address HOST:PORT`), or correct "
                "--address",
            ) from None
        self._jobs = jobs
        self._on_gpus = config.gpus != "0" and any(node.get("GPU") for node in _nodes())
        self._task = ray.remote(max_retries=_RETRIES)(_run_task)
        self._tasks: dict[Any, tuple[str, Path]] = {}

    @property
    def slots(self) -> int:
        """How many runs the present nodes can have at a time."""
        if self._on_gpus:
            return self._jobs * sum(int(node.get("GPU", 0)) for node in _nodes())
        return sum(int(node.get("CPU", 0)) // self._cores for node in _nodes())

    @property
    def _cores(self) -> int:
        """Cores of a run on the CPU: a share of the smallest node."""
        cores = [int(node["CPU"]) for node in _nodes() if node.get("CPU", 0) >= 1]  # a head often lends none
        return max(1, min(cores, default=1) // self._jobs)

    def start(self, folder: Path, run: Run) -> None:
        (log_folder(folder, run.id) / "stop").unlink(missing_ok=True)
        needs = {"num_gpus": 1 / self._jobs} if self._on_gpus else {"num_cpus": self._cores}
        env = {key: value for key, value in os.environ.items() if key.startswith(("SAMTUNE_", "HF_"))}
        env |= {} if self._on_gpus else CPU_ONLY
        task = self._task.options(**needs).remote(folder.absolute(), run, env, Path.cwd(), socket.gethostname())
        self._tasks[task] = run.id, folder

    def wait(self, seconds: float) -> list[tuple[str, int]]:
        if not self._tasks:
            time.sleep(seconds)
            return []
        ended = []
        for task in ray.wait(list(self._tasks), timeout=seconds)[0]:
            run, folder = self._tasks.pop(task)
            try:
                ended.append((run, int(ray.get(task))))
            except ray.exceptions.RayError as error:
                with (log_folder(folder, run) / "output.txt").open("a", encoding="utf-8") as output:
                    output.write(f"error: {first_line(error)}\n")
                ended.append((run, WorkerLost.exit_code))
        return ended

    def stop(self) -> None:
        for run, folder in self._tasks.values():
            (log_folder(folder, run) / "stop").touch()

    def kill(self) -> None:
        """End all runs at once: a run ends when its worker has."""
        for task in self._tasks:
            with suppress(ray.exceptions.RayError):
                ray.cancel(task, force=True)


def _nodes() -> list[Mapping[str, float]]:
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _run_task(folder: Path, run: Run, env: Mapping[str, str], cwd: Path, driver: str) -> int:
    """In a worker: start or resume a run, and wait for its end. Returns its exit code."""
    os.chdir(cwd)
    output, stop = run_folder(folder, run.id), log_folder(folder, run.id) / "stop"
    while lock.holder(output) is not None:  # a run that a lost worker started ends after its step
        time.sleep(_POLL)
    if finished_report(output) is not None:
        return 0
    if socket.gethostname() != driver:
        _decode(folder, run, env)
    process = start_process(folder, run, env)
    is_stopping = False
    while (code := process.poll()) is None:
        if not is_stopping and stop.exists():
            is_stopping = True
            process.send_signal(signal.SIGTERM)
        time.sleep(_POLL)
    return code


def _decode(folder: Path, run: Run, env: Mapping[str, str]) -> None:
    """Decode the images of a run into this node's cache."""
    os.environ |= dict(env)
    from samtune.config import loading
    from samtune.sweep.decode_once import count_decoded, one_per_machine

    settings = {key: (value, "sweep") for key, value in run.settings.items()}
    with one_per_machine(folder):
        count_decoded(loading.load(folder / "sweep.toml", overrides=settings))
