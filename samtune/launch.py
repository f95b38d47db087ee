"""One command, several processes: started by torch.distributed's elastic agent, watched, and answered for.

Each rank is this very command once more, with its place in the environment, as torchrun would start it. What ends a
launch is told apart from what follows from it: the error of a rank goes before the loss that the others noticed.
"""

import logging
import math
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from samtune import console, device, ranks
from samtune.errors import MachineError, SamtuneError, Stopped, WorkerLost, first_line
from samtune.options import RunConfig
from samtune.ranks import Word
from samtune.runlog import amend_status
from samtune.signals import StopRequest

COMMAND = (sys.executable, "-m", "samtune")
_LOOK = 0.2  # seconds between two looks at the ranks
_WARNED_AFTER = 15.0  # seconds of waiting for other machines
_GRACE = 5.0  # seconds that the others have to end by themselves when one rank has failed
_MEND = "go on with --resume; --max-restarts lets all ranks begin again by themselves"


@dataclass(frozen=True)
class Fleet:
    """Which processes to start: so many ranks here, and as many on each of the other machines.

    endpoint: "host:port" where the machines meet; the one of node_rank 0 listens there. None with one machine alone,
    which takes any free port.
    """

    ranks: int
    nnodes: int = 1
    node_rank: int = 0
    endpoint: str | None = None
    max_restarts: int = 0


def ranks_here(gpus: str, processes: int | None) -> int:
    """How many ranks this machine has. Raises MachineError where it has no such GPUs."""
    if processes is not None or gpus in ("auto", "0"):
        return processes or 1
    return len(device.gpu_numbers(gpus))


def run(settings: RunConfig, stop: StopRequest, arguments: Sequence[str]) -> Mapping[str, Any] | None:
    """`samtune run` with these settings on several ranks: the report, None if rank 0 is on another machine.

    arguments: the command line of `samtune` that gave the settings. Raises what `launch` raises; status.json of the run
    says so, too.
    """
    count = ranks_here(settings.gpus, settings.processes)  # before a folder is made
    settings = settings.with_output()
    assert settings.output is not None
    fleet = Fleet(
        count,
        settings.nnodes,
        settings.node_rank,
        settings.rdzv_endpoint if settings.nnodes > 1 else None,
        settings.max_restarts,
    )
    named = [] if settings.origins["output"] == "flag" else ["--output", str(settings.output)]
    try:
        result = launch([*arguments, *named], fleet, stop)
    except (SamtuneError, Stopped) as error:
        amend_status(settings.output, error)
        if named:
            with suppress(OSError):
                settings.output.rmdir()  # it was made for this run, and is still empty
        raise
    if result is None:
        console.note("the result is on the machine of rank 0")
    return result


def launch(arguments: Sequence[str], fleet: Fleet, stop: StopRequest) -> Mapping[str, Any] | None:
    """Run the command with these arguments on all ranks; what rank 0 has to print, None if it is on another machine.

    The first signal is handed on, and the ranks end after their step; the second one ends them at once.

    Raises what ended the launch: the error of a rank, WorkerLost for one that was killed, Stopped, MachineError where
    the machines do not find each other.
    """
    if fleet.endpoint is not None:
        ranks.check_host("--rdzv-endpoint ", fleet.endpoint.rpartition(":")[0])
    with tempfile.TemporaryDirectory(prefix="samtune-") as there:
        folder = Path(there)
        _set_environment(folder, fleet)
        agent = _Agent([*COMMAND, *arguments], folder, fleet)
        watch = _Watch(folder, fleet, stop)
        stop.patient = True
        agent.start()
        try:
            while not agent.ended.wait(_LOOK):
                watch.look()
        except BaseException as error:
            _give_up(folder, error, agent)
            raise
        said = ranks.words(folder)
        cause = _cause(said, agent.error, watch)
        if isinstance(cause, Stopped | WorkerLost) and stop.by is not None:  # they ended as they were asked to
            stop.saved = isinstance(cause, Stopped) and cause.exit_code == Stopped.SAVED
            stop.end()
        if cause is not None:
            raise cause
        return said[0].result if 0 in said else None


def _set_environment(folder: Path, fleet: Fleet) -> None:
    """What all ranks inherit."""
    os.environ[ranks.FOLDER] = str(folder)
    os.environ[ranks.LAUNCHER] = str(os.getpid())
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # torch dumps stacks where a rank notices that another ended
    # Ranks that begin again meet at another port: at the old one they would find addresses of those that are gone.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    # Ranks that compete for the same cores, each with a thread for every one of them, slow each other twentyfold.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, device.cores() // fleet.ranks)))
    if fleet.nnodes == 1:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # no network is needed, nor a host name that means something


class _Agent(threading.Thread):
    """torch's elastic agent, in a thread of its own, so that signals remain ours."""

    def __init__(self, command: Sequence[str], folder: Path, fleet: Fleet) -> None:
        super().__init__(name="agent", daemon=True)
        self._command, self._folder, self._fleet = command, folder, fleet
        self.error: Exception | None = None
        # Not `join`: a signal handler that raises in it makes Python 3.11 believe that the thread has ended.
        self.ended = threading.Event()

    def run(self) -> None:
        """Until all ranks have ended, and those that began again, too."""
        from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
        from torch.distributed.launcher.api import LaunchConfig, elastic_launch

        logging.disable()  # it would say in its own words what is said here
        fleet = self._fleet
        config = LaunchConfig(
            min_nodes=fleet.nnodes,
            max_nodes=fleet.nnodes,
            nproc_per_node=fleet.ranks,
            run_id="samtune",
            rdzv_backend="c10d",
            rdzv_endpoint=fleet.endpoint or "localhost:0",
            rdzv_configs={"is_host": fleet.node_rank == 0},
            max_restarts=fleet.max_restarts,
            local_addr=_own_address(fleet.endpoint),
            logs_specs=DefaultLogsSpecs(log_dir=str(self._folder / "agent")),
        )
        try:
            elastic_launch(config, self._command[0])(*self._command[1:])
        except Exception as error:
            self.error = error
        finally:
            self.ended.set()


def _own_address(endpoint: str | None) -> str | None:
    """The address by which other machines reach this one; None lets torch take the host's name."""
    if endpoint is None:
        return "127.0.0.1"
    host, _, port = endpoint.rpartition(":")
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, int(port)))  # sends nothing, but asks for the way
        own = str(probe.getsockname()[0])
        if not own.startswith("127.") or host == "localhost" or host.startswith("127."):
            return own
    return None


class _Watch:
    """What the launcher does while the ranks are at work: it hands signals on, and ends those that do not notice."""

    def __init__(self, folder: Path, fleet: Fleet, stop: StopRequest) -> None:
        self._folder, self._fleet, self._stop = folder, fleet, stop
        self._handed_on = False
        self._attempt = ""
        self._failed_at: float | None = None
        self._restarts = fleet.max_restarts
        self.killed: set[int] = set()
        self._warned_at = time.monotonic() + _WARNED_AFTER

    def look(self) -> None:
        said = ranks.words(self._folder)
        if self._stop.by is not None and not self._handed_on:
            if not said and self._fleet.nnodes > 1:
                self._stop.end()  # no rank has begun; the other machines may never come
            self._handed_on = bool(said)
            if self._handed_on:
                (self._folder / "over").write_text(str(128 + self._stop.by), encoding="utf-8")  # none begins any more
                console.note(f"{self._stop.by.name}: the ranks end after their step; a second one ends them at once")
            # Not the signal itself: a terminal or Slurm has sent that to the ranks already, and twice means at once.
            _send(said.values(), signal.SIGUSR1)
        if not said and self._fleet.nnodes > 1 and time.monotonic() >= self._warned_at:
            self._warned_at, others = math.inf, self._fleet.nnodes - 1
            console.warn(
                f"no other machine has come to {self._fleet.endpoint}\n"
                f"  why:  --nnodes waits for {others} more with this endpoint, each with a --node-rank of its own\n"
                "  mend: start the same command there; without --nnodes this machine runs alone"
            )
        failed = [word for word in said.values() if _has_failed(word)]
        attempt = next((word.attempt for word in said.values()), "")
        if attempt != self._attempt:
            self._attempt, self._failed_at = attempt, None
        if not failed:
            return
        if self._failed_at is None:
            self._failed_at = time.monotonic()
            if self._restarts and not any(word.is_cause for word in failed):
                self._restarts -= 1
                lost = [word for word in failed if word.exit_code is None] or failed
                who = " and ".join(f"rank {word.rank} (process {word.pid})" for word in lost)
                again = f"restart {self._fleet.max_restarts - self._restarts} of {self._fleet.max_restarts}"
                console.warn(f"lost {who}; all ranks begin again from the newest checkpoint ({again})")
        elif time.monotonic() - self._failed_at > _GRACE:
            # One that waits in a driver for the lost one answers to no other signal.
            left = [word for word in said.values() if word not in failed and _is_alive(word.pid)]
            self.killed |= {word.rank for word in left}
            _send(left, signal.SIGKILL)


def _has_failed(word: Word) -> bool:
    if word.exit_code is None:
        return not _is_alive(word.pid)
    return word.exit_code not in (0, Stopped.SAVED)


def _is_alive(pid: int) -> bool:
    """Nor is one that was killed and that the agent, its parent, has not asked after yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _send(said: Iterable[Word], number: signal.Signals) -> None:
    for word in said:
        with suppress(ProcessLookupError):
            os.kill(word.pid, number)


def _give_up(folder: Path, error: BaseException, agent: _Agent) -> None:
    """End all ranks at once, and let none begin again."""
    code = error.exit_code if isinstance(error, Stopped) else SamtuneError.exit_code
    (folder / "over").write_text(str(code), encoding="utf-8")
    deadline = time.monotonic() + _GRACE
    while True:
        _send(ranks.words(folder).values(), signal.SIGKILL)
        if agent.ended.wait(_LOOK) or time.monotonic() > deadline:
            return


def _cause(said: Mapping[int, Word], failure: Exception | None, watch: _Watch) -> SamtuneError | Stopped | None:
    """What ended the launch; None if nothing did."""
    stopped = [word for word in said.values() if word.exit_code is not None and word.exit_code >= Stopped.SAVED]
    # What a rank has said counts, whatever ends its process afterwards: a signal that comes late, or torch's agent.
    done = {rank for rank, word in said.items() if word.exit_code in (0, Stopped.SAVED)}
    all_ended = _ended(failure)
    ended = {rank: how for rank, how in all_ended.items() if rank not in done}
    if not stopped and not ended and (failure is None or all_ended):
        return None
    by_time = sorted(said.values(), key=lambda word: word.time)
    for word in by_time:
        if word.is_cause and word not in stopped:
            return _error(word, said)
    saved = [word for word in by_time if word.exit_code == Stopped.SAVED]
    if saved:  # none ends before rank 0 has saved, so one that says so says it for all
        return Stopped(saved[0].what, Stopped.SAVED)
    for rank, (pid, code) in ended.items():
        if code < 0 and -code != signal.SIGTERM and rank not in watch.killed:
            return _lost(rank, pid, code)
    if stopped:
        first = min(stopped, key=lambda word: word.time)
        return Stopped(first.what, first.exit_code or 0)
    for rank, (pid, code) in ended.items():
        if code == SamtuneError.exit_code:
            error = WorkerLost(f"rank {rank} (process {pid}) ended with a defect", "its traceback stands above")
            error.exit_code = SamtuneError.exit_code
            return error
    for word in by_time:
        if word.exit_code == WorkerLost.exit_code:
            return _error(word, said)
    for rank, (pid, code) in ended.items():
        return _lost(rank, pid, code)
    assert failure is not None
    return MachineError(
        "the machines do not come together",
        first_line(failure),
        "start the same command on each of them, with the same --nnodes and --rdzv-endpoint and its own --node-rank; "
        "the port must be free on the first one",
    )


def _ended(failure: Exception | None) -> dict[int, tuple[int, int]]:
    """(process, exit code) of each rank that failed, as the agent saw it."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    if not isinstance(failure, ChildFailedError):
        return {}
    return {rank: (found.pid, found.exitcode) for rank, found in sorted(failure.failures.items())}


def _error(word: Word, said: Mapping[int, Word]) -> SamtuneError:
    is_named = word.what.startswith("rank ") or any(w.what == word.what for w in said.values() if w is not word)
    error = SamtuneError(word.what if is_named else f"rank {word.rank}: {word.what}", word.why, word.mend)
    assert word.exit_code is not None
    error.exit_code = word.exit_code
    return error


def _lost(rank: int, pid: int, code: int) -> WorkerLost:
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    why = "the system does so when memory runs out" if code == -signal.SIGKILL else ""
    return WorkerLost(f"rank {rank} (process {pid}) {how}", why, _MEND)
