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

from samtune import console
from samtune.distributed import device, environment, rank_status
from samtune.distributed.rank_status import RankStatus
from samtune.distributed.signals import StopRequest
from samtune.errors import MachineError, SamtuneError, Stopped, WorkerLost, first_line

COMMAND = (sys.executable, "-m", "samtune")
_POLL_SECONDS = 0.2
_WARN_AFTER = 15.0  # seconds of waiting for other machines
_GRACE = 5.0  # seconds that the others have to end by themselves when one rank has failed
_HINT = "go on with --resume; --max-restarts lets all ranks begin again by themselves"


@dataclass(frozen=True)
class LaunchSpec:
    """Which processes to start: so many ranks here, and as many on each of the other machines.

    endpoint: "host:port" where the machines meet; the one of node_rank 0 listens there. None with one machine alone,
    which takes any free port.
    """

    ranks: int
    nnodes: int = 1
    node_rank: int = 0
    endpoint: str | None = None
    max_restarts: int = 0


def local_rank_count(gpus: str, processes: int | None) -> int:
    """How many ranks this machine has. Raises MachineError where it has no such GPUs."""
    if processes is not None or gpus in ("auto", "0"):
        return processes or 1
    return len(device.gpu_numbers(gpus))


def launch(arguments: Sequence[str], spec: LaunchSpec, stop: StopRequest) -> Mapping[str, Any] | None:
    """Run the command with these arguments on all ranks; what rank 0 has to print, None if it is on another machine.

    The first signal is handed on, and the ranks end after their step; the second one ends them at once.

    Raises what ended the launch: the error of a rank, WorkerLost for one that was killed, Stopped, MachineError where
    the machines do not find each other.
    """
    if spec.endpoint is not None:
        environment.check_host("--rdzv-endpoint ", spec.endpoint.rpartition(":")[0])
    with tempfile.TemporaryDirectory(prefix="samtune-") as temporary:
        folder = Path(temporary)
        _set_environment(folder, spec)
        agent = _Agent([*COMMAND, *arguments], folder, spec)
        monitor = _Monitor(folder, spec, stop)
        stop.patient = True
        agent.start()
        try:
            while not agent.ended.wait(_POLL_SECONDS):
                monitor.check()
        except BaseException as error:
            _give_up(folder, error, agent)
            raise
        statuses = rank_status.read_statuses(folder)
        cause = _cause(statuses, agent.error, monitor)
        if isinstance(cause, Stopped | WorkerLost) and stop.by is not None:  # they ended as they were asked to
            stop.saved = isinstance(cause, Stopped) and cause.exit_code == Stopped.SAVED
            stop.end()
        if cause is not None:
            raise cause
        return statuses[0].result if 0 in statuses else None


def _set_environment(folder: Path, spec: LaunchSpec) -> None:
    """What all ranks inherit."""
    os.environ[environment.FOLDER] = str(folder)
    os.environ[environment.LAUNCHER] = str(os.getpid())
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # torch dumps stacks where a rank notices that another ended
    # Ranks that begin again meet at another port: at the old one they would find addresses of those that are gone.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    # Ranks that compete for the same cores, each with a thread for every one of them, slow each other twentyfold.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, device.available_cpus() // spec.ranks)))
    if spec.nnodes == 1:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # no network is needed, nor a host name that means something


class _Agent(threading.Thread):
    """torch's elastic agent, in a thread of its own, so that signals remain ours."""

    def __init__(self, command: Sequence[str], folder: Path, spec: LaunchSpec) -> None:
        super().__init__(name="agent", daemon=True)
        self._command, self._folder, self._spec = command, folder, spec
        self.error: Exception | None = None
        # Not `join`: a signal handler that raises in it makes Python 3.11 believe that the thread has ended.
        self.ended = threading.Event()

    def run(self) -> None:
        """Until all ranks have ended, and those that began again, too."""
        from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
        from torch.distributed.launcher.api import LaunchConfig, elastic_launch

        logging.disable()  # its messages repeat what is reported here
        spec = self._spec
        config = LaunchConfig(
            min_nodes=spec.nnodes,
            max_nodes=spec.nnodes,
            nproc_per_node=spec.ranks,
            run_id="samtune",
            rdzv_backend="c10d",
            rdzv_endpoint=spec.endpoint or "localhost:0",
            rdzv_configs={"is_host": spec.node_rank == 0},
            max_restarts=spec.max_restarts,
            local_addr=_own_address(spec.endpoint),
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


class _Monitor:
    """What the launcher does while the ranks are at work: it hands signals on, and ends those that do not notice."""

    def __init__(self, folder: Path, spec: LaunchSpec, stop: StopRequest) -> None:
        self._folder, self._spec, self._stop = folder, spec, stop
        self._handed_on = False
        self._attempt = ""
        self._failed_at: float | None = None
        self._restarts = spec.max_restarts
        self.killed: set[int] = set()
        self._warned_at = time.monotonic() + _WARN_AFTER

    def check(self) -> None:
        statuses = rank_status.read_statuses(self._folder)
        if self._stop.by is not None and not self._handed_on:
            if not statuses and self._spec.nnodes > 1:
                self._stop.end()  # no rank has begun; the other machines may never come
            self._handed_on = bool(statuses)
            if self._handed_on:
                (self._folder / "over").write_text(str(128 + self._stop.by), encoding="utf-8")  # none begins any more
                console.info(f"{self._stop.by.name}: the ranks end after their step; a second one ends them at once")
            # Not the signal itself: a terminal or Slurm has sent that to the ranks already, and twice means at once.
            _send(statuses.values(), signal.SIGUSR1)
        if not statuses and self._spec.nnodes > 1 and time.monotonic() >= self._warned_at:
            self._warned_at, others = math.inf, self._spec.nnodes - 1
            console.warn(
                f"no other machine has come to {self._spec.endpoint}\n"
                f"  cause: --nnodes waits for {others} more with this endpoint, each with a --node-rank of its own\n"
                "  hint:  start the same command there; without --nnodes this machine runs alone"
            )
        failed = [status for status in statuses.values() if _has_failed(status)]
        attempt = next((status.attempt for status in statuses.values()), "")
        if attempt != self._attempt:
            self._attempt, self._failed_at = attempt, None
        if not failed:
            return
        if self._failed_at is None:
            self._failed_at = time.monotonic()
            if self._restarts and not any(status.is_cause for status in failed):
                self._restarts -= 1
                lost = [status for status in failed if status.exit_code is None] or failed
                who = " and ".join(f"rank {status.rank} (process {status.pid})" for status in lost)
                again = f"restart {self._spec.max_restarts - self._restarts} of {self._spec.max_restarts}"
                console.warn(f"lost {who}; all ranks begin again from the newest checkpoint ({again})")
        elif time.monotonic() - self._failed_at > _GRACE:
            # One that waits in a driver for the lost one answers to no other signal.
            left = [status for status in statuses.values() if status not in failed and _is_alive(status.pid)]
            self.killed |= {status.rank for status in left}
            _send(left, signal.SIGKILL)


def _has_failed(status: RankStatus) -> bool:
    if status.exit_code is None:
        return not _is_alive(status.pid)
    return status.exit_code not in (0, Stopped.SAVED)


def _is_alive(pid: int) -> bool:
    """Nor is one that was killed and that the agent, its parent, has not asked after yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _send(statuses: Iterable[RankStatus], number: signal.Signals) -> None:
    for status in statuses:
        with suppress(ProcessLookupError):
            os.kill(status.pid, number)


def _give_up(folder: Path, error: BaseException, agent: _Agent) -> None:
    """End all ranks at once, and let none begin again."""
    code = error.exit_code if isinstance(error, Stopped) else SamtuneError.exit_code
    (folder / "over").write_text(str(code), encoding="utf-8")
    deadline = time.monotonic() + _GRACE
    while True:
        _send(rank_status.read_statuses(folder).values(), signal.SIGKILL)
        if agent.ended.wait(_POLL_SECONDS) or time.monotonic() > deadline:
            return


def _cause(
    statuses: Mapping[int, RankStatus], failure: Exception | None, monitor: _Monitor
) -> SamtuneError | Stopped | None:
    """What ended the launch; None if nothing did."""
    stopped = [
        status for status in statuses.values() if status.exit_code is not None and status.exit_code >= Stopped.SAVED
    ]
    # What a rank has reported counts, whatever ends its process afterwards: a signal that comes late, or torch's agent.
    done = {rank for rank, status in statuses.items() if status.exit_code in (0, Stopped.SAVED)}
    all_ended = _ended(failure)
    ended = {rank: how for rank, how in all_ended.items() if rank not in done}
    if not stopped and not ended and (failure is None or all_ended):
        return None
    by_time = sorted(statuses.values(), key=lambda status: status.time)
    for status in by_time:
        if status.is_cause and status not in stopped:
            return _error(status, statuses)
    saved = [status for status in by_time if status.exit_code == Stopped.SAVED]
    if saved:  # none ends before rank 0 has saved, so one that says so says it for all
        return Stopped(saved[0].message, Stopped.SAVED)
    for rank, (pid, code) in ended.items():
        if code < 0 and -code != signal.SIGTERM and rank not in monitor.killed:
            return _lost(rank, pid, code)
    if stopped:
        first = min(stopped, key=lambda status: status.time)
        return Stopped(first.message, first.exit_code or 0)
    for rank, (pid, code) in ended.items():
        if code == SamtuneError.exit_code:
            error = WorkerLost(f"rank {rank} (process {pid}) ended with a defect", "its traceback stands above")
            error.exit_code = SamtuneError.exit_code
            return error
    for status in by_time:
        if status.exit_code == WorkerLost.exit_code:
            return _error(status, statuses)
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


def _error(status: RankStatus, statuses: Mapping[int, RankStatus]) -> SamtuneError:
    is_named = status.message.startswith("rank ") or any(
        other.message == status.message for other in statuses.values() if other is not status
    )
    error = SamtuneError(
        status.message if is_named else f"rank {status.rank}: {status.message}", status.cause, status.hint
    )
    assert status.exit_code is not None
    error.exit_code = status.exit_code
    return error


def _lost(rank: int, pid: int, code: int) -> WorkerLost:
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    why = "the system does so when memory runs out" if code == -signal.SIGKILL else ""
    return WorkerLost(f"rank {rank} (process {pid}) {how}", why, _HINT)
