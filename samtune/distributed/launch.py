"""Start one command as several ranks by torch.distributed's elastic agent, watch them, and report why they ended.

Each rank runs the same command with RANK and the like in its environment, as torchrun would start it. The error of a
rank takes precedence over the lost connections that the others report because of it.
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
_GRACE_SECONDS = 5.0  # in which the others end by themselves when one rank has failed
_HINT = "go on with --resume; --max-restarts N restarts all ranks by itself"


@dataclass(frozen=True)
class LaunchSpec:
    """Which processes to start. ranks: number of ranks on this machine, the same on each of the others.

    endpoint: "host:port" on which the machine of node_rank 0 listens; None for a single machine, on any free port.
    """

    ranks: int
    nnodes: int = 1
    node_rank: int = 0
    endpoint: str | None = None
    max_restarts: int = 0


def local_rank_count(gpus: str, processes: int | None) -> int:
    """Number of ranks on this machine. Raises MachineError if it lacks the GPUs."""
    if processes is not None or gpus in ("auto", "0"):
        return processes or 1
    return len(device.gpu_numbers(gpus))


def launch(arguments: Sequence[str], spec: LaunchSpec, stop: StopRequest) -> Mapping[str, Any] | None:
    """Run the command with these arguments on all ranks; return what rank 0 prints, None if it is on another machine.

    The first signal is forwarded, and the ranks end after their step. The second one kills them.

    Raises what ended the launch: the error of a rank, WorkerLost for one that was killed, Stopped, or MachineError if
    the machines cannot reach each other.
    """
    if spec.endpoint is not None:
        environment.check_host("--rdzv-endpoint ", spec.endpoint.rpartition(":")[0])
    with tempfile.TemporaryDirectory(prefix="samtune-") as temporary:
        folder = Path(temporary)
        _set_environment(folder, spec)
        agent = _Agent([*COMMAND, *arguments], folder, spec)
        monitor = _Monitor(folder, spec, stop)
        stop.is_deferred = True
        agent.start()
        try:
            while not agent.ended.wait(_POLL_SECONDS):
                monitor.check()
        except BaseException as error:
            _kill_all(folder, error, agent)
            raise
        statuses = rank_status.read_statuses(folder)
        cause = _cause(statuses, agent.error, monitor)
        if isinstance(cause, Stopped | WorkerLost) and stop.is_requested():
            stop.has_checkpoint = isinstance(cause, Stopped) and cause.exit_code == Stopped.SAVED
            stop.raise_stopped()
        if cause is not None:
            raise cause
        return statuses[0].result if 0 in statuses else None


def _set_environment(folder: Path, spec: LaunchSpec) -> None:
    """Set the environment variables that all ranks inherit."""
    os.environ[environment.STATUS_FOLDER] = str(folder)
    os.environ[environment.LAUNCHER] = str(os.getpid())
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # torch prints stacks when a rank notices that another ended
    # Restarted ranks meet at another port: the old one would give them addresses of processes that are gone.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    # Ranks with a thread for every core each would slow each other twentyfold.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, device.available_cpus() // spec.ranks)))
    if spec.nnodes == 1:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # needs no network, and no host name that resolves


class _Agent(threading.Thread):
    """torch's elastic agent, in a thread, so that it does not handle signals."""

    def __init__(self, command: Sequence[str], folder: Path, spec: LaunchSpec) -> None:
        super().__init__(name="agent", daemon=True)
        self._command, self._folder, self._spec = command, folder, spec
        self.error: Exception | None = None
        # Not `join`: a signal handler that raises in it makes Python 3.11 believe that the thread has ended.
        self.ended = threading.Event()

    def run(self) -> None:
        """Start the ranks, and wait until all have ended, restarted ones as well."""
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
            local_addr=_local_address(spec.endpoint),
            logs_specs=DefaultLogsSpecs(log_dir=str(self._folder / "agent")),
        )
        try:
            elastic_launch(config, self._command[0])(*self._command[1:])
        except Exception as error:
            self.error = error
        finally:
            self.ended.set()


def _local_address(endpoint: str | None) -> str | None:
    """The address by which other machines reach this one; None for the host's name."""
    if endpoint is None:
        return "127.0.0.1"
    host, _, port = endpoint.rpartition(":")
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, int(port)))  # sends nothing, but chooses the route
        address = str(probe.getsockname()[0])
        if not address.startswith("127.") or host == "localhost" or host.startswith("127."):
            return address
    return None


class _Monitor:
    """Watches running ranks: forwards a signal to them, and kills those that do not notice that another has failed."""

    def __init__(self, folder: Path, spec: LaunchSpec, stop: StopRequest) -> None:
        self._folder, self._spec, self._stop = folder, spec, stop
        self._is_forwarded = False
        self._warn_at = time.monotonic() + _WARN_AFTER
        self._attempt = ""
        self._failed_at: float | None = None  # in this attempt
        self._restarts_left = spec.max_restarts
        self.killed: set[int] = set()

    def check(self) -> None:
        statuses = rank_status.read_statuses(self._folder)
        if self._stop.signal is not None and not self._is_forwarded:
            self._forward(self._stop.signal, statuses)
        if not statuses and self._spec.nnodes > 1 and time.monotonic() >= self._warn_at:
            self._warn_at, others = math.inf, self._spec.nnodes - 1
            console.warn(
                f"no other machine has come to {self._spec.endpoint}\n"
                f"  cause: --nnodes waits for {others} more with this endpoint, each with a --node-rank of its own\n"
                "  hint:  start the same command there; without --nnodes this machine runs alone"
            )
        attempt = next((status.attempt for status in statuses.values()), "")
        if attempt != self._attempt:
            self._attempt, self._failed_at = attempt, None
        failed = [status for status in statuses.values() if _has_failed(status)]
        if failed and self._failed_at is None:
            self._failed_at = time.monotonic()
            self._announce_restart(failed)
        elif failed and self._failed_at is not None and time.monotonic() - self._failed_at > _GRACE_SECONDS:
            # A rank that waits for the lost one in a driver answers to no other signal.
            left = [status for status in statuses.values() if status not in failed and _is_alive(status.pid)]
            self.killed |= {status.rank for status in left}
            _send(left, signal.SIGKILL)

    def _forward(self, number: signal.Signals, statuses: Mapping[int, RankStatus]) -> None:
        if not statuses and self._spec.nnodes > 1:
            self._stop.raise_stopped()  # no rank has started; the other machines may never come
        self._is_forwarded = bool(statuses)
        if self._is_forwarded:
            (self._folder / "over").write_text(str(128 + number), encoding="utf-8")  # no rank starts from now on
            console.info(f"{number.name}: the ranks end after their step; a second one ends them at once")
        # Not the signal itself: a terminal or Slurm has sent that to the ranks already, and twice means at once.
        _send(statuses.values(), signal.SIGUSR1)

    def _announce_restart(self, failed: Sequence[RankStatus]) -> None:
        if self._restarts_left and not any(status.is_cause for status in failed):
            self._restarts_left -= 1
            lost = [status for status in failed if status.exit_code is None] or failed
            names = " and ".join(f"rank {status.rank} (process {status.pid})" for status in lost)
            restart = f"restart {self._spec.max_restarts - self._restarts_left} of {self._spec.max_restarts}"
            console.warn(f"lost {names}; all ranks begin again from the newest checkpoint ({restart})")


def _has_failed(status: RankStatus) -> bool:
    if status.exit_code is None:
        return not _is_alive(status.pid)
    return status.exit_code not in (0, Stopped.SAVED)


def _is_alive(pid: int) -> bool:
    """Whether a process is running. A zombie, whose parent has not waited for it yet, is not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _send(statuses: Iterable[RankStatus], number: signal.Signals) -> None:
    for status in statuses:
        with suppress(ProcessLookupError):
            os.kill(status.pid, number)


def _kill_all(folder: Path, error: BaseException, agent: _Agent) -> None:
    """Kill all ranks, and have none start again."""
    code = error.exit_code if isinstance(error, Stopped) else SamtuneError.exit_code
    (folder / "over").write_text(str(code), encoding="utf-8")
    deadline = time.monotonic() + _GRACE_SECONDS
    while True:
        _send(rank_status.read_statuses(folder).values(), signal.SIGKILL)
        if agent.ended.wait(_POLL_SECONDS) or time.monotonic() > deadline:
            return


def _cause(
    statuses: Mapping[int, RankStatus], failure: Exception | None, monitor: _Monitor
) -> SamtuneError | Stopped | None:
    """The error that ended the launch; None if all ranks succeeded."""
    stopped = [
        status for status in statuses.values() if status.exit_code is not None and status.exit_code >= Stopped.SAVED
    ]
    # The status of a rank counts, whatever ends its process afterwards: a late signal, or torch's agent.
    done = {rank for rank, status in statuses.items() if status.exit_code in (0, Stopped.SAVED)}
    all_failed = _failed_processes(failure)
    failed = {rank: process for rank, process in all_failed.items() if rank not in done}
    if not stopped and not failed and (failure is None or all_failed):
        return None
    by_time = sorted(statuses.values(), key=lambda status: status.time)
    for status in by_time:
        if status.is_cause and status not in stopped:
            return _error(status, statuses)
    saved = [status for status in by_time if status.exit_code == Stopped.SAVED]
    if saved:  # no rank ends so before rank 0 has saved: one stands for all
        return Stopped(saved[0].message, Stopped.SAVED)
    for rank, (pid, code) in failed.items():
        if code < 0 and -code != signal.SIGTERM and rank not in monitor.killed:
            return _lost(rank, pid, code)
    if stopped:
        first = min(stopped, key=lambda status: status.time)
        return Stopped(first.message, first.exit_code or 0)
    for rank, (pid, code) in failed.items():
        if code == SamtuneError.exit_code:
            error = WorkerLost(f"rank {rank} (process {pid}) ended with a defect", "its traceback stands above")
            error.exit_code = SamtuneError.exit_code
            return error
    for status in by_time:
        if status.exit_code == WorkerLost.exit_code:
            return _error(status, statuses)
    for rank, (pid, code) in failed.items():
        return _lost(rank, pid, code)
    assert failure is not None
    return MachineError(
        "the machines cannot reach each other",
        first_line(failure),
        "start the same command on each of them, with the same --nnodes and --rdzv-endpoint and its own --node-rank; "
        "the port must be free on the first one",
    )


def _failed_processes(failure: Exception | None) -> dict[int, tuple[int, int]]:
    """Rank -> (process, exit code) of those that failed, as the agent reports it."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    if not isinstance(failure, ChildFailedError):
        return {}
    return {rank: (process.pid, process.exitcode) for rank, process in sorted(failure.failures.items())}


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
    end = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    cause = "the system does so when memory runs out" if code == -signal.SIGKILL else ""
    return WorkerLost(f"rank {rank} (process {pid}) {end}", cause, _HINT)
