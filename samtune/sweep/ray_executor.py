"""The runs of a sweep on a Ray cluster. The only user of ray.

Each run is a task, a process of its own like on one machine, in the same folder: that must be on a disk that all nodes
share, under one path, as must be a data set that is a folder. A task whose worker or node is lost begins again on
another, and goes on from the run's checkpoint.
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
from samtune.sweep.executors import begin, use_cpu
from samtune.sweep.ledger import Run, log_folder, run_folder

_RETRIES = 3  # of a run whose worker or node is lost
_LOOK = 0.5  # seconds
_PATIENCE = 10.0  # seconds for a cluster to answer


class Cluster:
    """Runs as tasks of Ray, each with a GPU where the cluster has some, else with its share of a node's cores."""

    def __init__(self, address: str, config: RunConfig, jobs: int) -> None:
        """Join the cluster at an address, "host:port", or "auto": the one that this machine belongs to.

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
        self._attend = ray.remote(max_retries=_RETRIES)(_attend)
        self._tasks: dict[Any, tuple[str, Path]] = {}

    @property
    def slots(self) -> int:
        """How many runs the nodes that are there now can have at a time."""
        if self._on_gpus:
            return self._jobs * sum(int(node.get("GPU", 0)) for node in _nodes())
        return sum(int(node.get("CPU", 0)) // self._cores for node in _nodes())

    @property
    def _cores(self) -> int:
        """Of a run on the CPU: a share of the smallest node."""
        cores = [int(node["CPU"]) for node in _nodes() if node.get("CPU", 0) >= 1]  # a head often lends none
        return max(1, min(cores, default=1) // self._jobs)

    def start(self, folder: Path, run: Run) -> None:
        """Begin a run of the sweep in this folder, or go on with it."""
        (log_folder(folder, run.id) / "stop").unlink(missing_ok=True)
        needs = {"num_gpus": 1 / self._jobs} if self._on_gpus else {"num_cpus": self._cores}
        place = {} if self._on_gpus else use_cpu()
        place |= {key: value for key, value in os.environ.items() if key.startswith(("SAMTUNE_", "HF_"))}
        task = self._attend.options(**needs).remote(folder.absolute(), run, place, Path.cwd(), socket.gethostname())
        self._tasks[task] = run.id, folder

    def ended(self, seconds: float) -> list[tuple[str, int]]:
        """(id, exit code) of runs that have ended, after so many seconds at most."""
        if not self._tasks:
            time.sleep(seconds)
            return []
        found = []
        for task in ray.wait(list(self._tasks), timeout=seconds)[0]:
            run, folder = self._tasks.pop(task)
            try:
                found.append((run, int(ray.get(task))))
            except ray.exceptions.RayError as error:
                with (log_folder(folder, run) / "output.txt").open("a", encoding="utf-8") as output:
                    output.write(f"error: {first_line(error)}\n")
                found.append((run, WorkerLost.exit_code))
        return found

    def stop(self) -> None:
        """Ask all runs to save and to end."""
        for run, folder in self._tasks.values():
            (log_folder(folder, run) / "stop").touch()

    def kill(self) -> None:
        """End all runs at once: they do so when their workers have gone."""
        for task in self._tasks:
            with suppress(ray.exceptions.RayError):
                ray.cancel(task, force=True)


def _nodes() -> list[Mapping[str, float]]:
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _attend(folder: Path, run: Run, place: Mapping[str, str], cwd: Path, driver: str) -> int:
    """In a worker: begin a run or go on with it, and see it through. Returns its exit code."""
    os.chdir(cwd)
    there, stop = run_folder(folder, run.id), log_folder(folder, run.id) / "stop"
    while lock.holder(there) is not None:  # what a lost worker had begun ends after its step
        time.sleep(_LOOK)
    if finished_report(there) is not None:
        return 0
    if socket.gethostname() != driver:
        _decode_here(folder, run, place)
    process = begin(folder, run, place)
    asked = False
    while (code := process.poll()) is None:
        if not asked and stop.exists():
            asked = True
            process.send_signal(signal.SIGTERM)
        time.sleep(_LOOK)
    return code


def _decode_here(folder: Path, run: Run, place: Mapping[str, str]) -> None:
    """The images of a run, into this node's cache; one process of a node at a time."""
    os.environ |= dict(place)
    from samtune.config import loading
    from samtune.sweep.decode_once import alone_here, prepared

    own = {key: (value, "sweep") for key, value in run.settings.items()}
    with alone_here(folder):
        prepared(loading.load(folder / "sweep.toml", overrides=own))
