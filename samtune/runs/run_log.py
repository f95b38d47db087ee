"""The writer of a run folder: log lines, rows of metrics, status.json, and a note of each resume.

Logs are best effort: where one cannot be written, the run goes on and is marked as degraded.
"""

import errno
import importlib.metadata
import json
import os
import platform
import shlex
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from samtune import console
from samtune.errors import LOST, MachineError, SamtuneError, Stopped, first_line
from samtune.files import write_atomic
from samtune.runs import lock
from samtune.runs.folder import check_empty, check_free, read_provenance, read_status, to_json

_COLUMNS = (
    *("step", "epoch", "split", "loss", "top1_error", "lr", "rho", "sam", "grad_norm"),
    *("images_per_second", "data_wait", "seconds"),
)
# Raise it when `data.transforms.EvalTransform` changes scores. Runs before "2" name none, and resized in float32.
EVALUATION_VERSION = "2"
_HEARTBEAT = 5.0  # seconds between two updates of status.json
State = Literal["running", "done", "stopped", "failed"]


class RunLog:
    """The only writer of a run folder: while it is open, no other process can write there."""

    def __init__(self, folder: Path, held: lock.Lock | None, total_steps: int, seconds: float = 0.0) -> None:
        """Use `create` or `reopen`. seconds: run time before the interruption."""
        self.folder, self.checkpoints, self.total_steps = folder, folder / "checkpoints", total_steps
        self.step = 0
        self.degraded = False
        self.passes = ""  # how they are run: eager or CUDA graphs
        self.listeners: list[Callable[[Mapping[str, Any]], None]] = []  # called with each row of metrics
        self._name = "log.txt"
        self._lock = held
        self._opened = time.perf_counter() - seconds
        self._last_status = -_HEARTBEAT
        self._status_lock = threading.RLock()  # any thread may report how the run ended
        self._has_ended = False
        self._metrics_bytes = 0  # length of metrics.jsonl up to the last whole row
        self._unwritten: list[str] = []  # rows of metrics that wait for room

    @classmethod
    def create(
        cls,
        folder: Path,
        config_toml: str,
        provenance: Mapping[str, Any] | None,
        total_steps: int,
        *,
        is_new: bool = True,
    ) -> "RunLog":
        """Create a run folder. Raises UsageError or MachineError as `check_free` does.

        provenance: None in the first training of --bootstrap. is_new: check that the folder has no files of a run;
        False where that training has used it before.
        """
        if is_new:
            check_free(folder)
        try:
            (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
            log = cls(folder, lock.acquire(folder), total_steps)
            if is_new:
                check_empty(folder)  # another process may have been here a moment ago
            if provenance is not None:
                write_atomic(folder / "provenance.json", to_json(provenance), durable=True)
            write_atomic(folder / "config.toml", config_toml, durable=True)
        except OSError as error:
            raise MachineError(
                f"run folder {folder} cannot be written", error.strerror or "", "give another --output"
            ) from None
        log.status("running", None)
        return log

    @classmethod
    def reopen(
        cls,
        folder: Path,
        held: lock.Lock,
        total_steps: int,
        *,
        step: int,
        seconds: float,
        metrics_bytes: int,
        keep_tests: bool = False,
    ) -> "RunLog":
        """Open the folder of a run that resumes after a step; rows of metrics.jsonl of later steps are cut off.

        metrics_bytes: length of metrics.jsonl up to that step. keep_tests: keep later rows that are
        whole; where all steps are done, they are the results on test.
        """
        log = cls(folder, held, total_steps, seconds)
        log.step = step
        log.checkpoints.mkdir(exist_ok=True)
        with suppress(OSError, ValueError, AttributeError):
            log.degraded = bool(read_status(folder).get("degraded"))
        with log.best_effort("metrics.jsonl"):
            metrics = folder / "metrics.jsonl"
            length = metrics.stat().st_size if metrics.exists() else 0
            log._metrics_bytes = min(length, metrics_bytes)
            if length < metrics_bytes:
                raise OSError("rows of steps that are done are missing")
            if keep_tests:
                log._metrics_bytes = max(metrics_bytes, metrics.read_bytes().rfind(b"\n") + 1)
            if metrics.exists():
                os.truncate(metrics, log._metrics_bytes)
        (folder / "diagnostics.json").unlink(missing_ok=True)  # of the divergence that interrupted the run
        log.status("running", None)
        return log

    def close(self) -> None:
        """Release the folder."""
        if self._lock is not None:
            self._lock.release()

    def metrics(self, **row: Any) -> None:
        """Append a row to metrics.jsonl: all of _COLUMNS, with null for what its split does not have, and more."""
        row = dict.fromkeys(_COLUMNS) | row | {"seconds": self.seconds()}
        self._unwritten.append(json.dumps(row, allow_nan=False) + "\n")
        rows = "".join(self._unwritten).encode()
        with self.best_effort("metrics.jsonl"), (self.folder / "metrics.jsonl").open("ab", buffering=0) as file:
            if file.tell() > self._metrics_bytes:  # half a row, for which there was no room
                file.truncate(self._metrics_bytes)
            if file.write(rows) < len(rows):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._metrics_bytes += len(rows)
            self._unwritten.clear()
        for listener in self.listeners:
            listener(row)

    def synced_metrics_bytes(self) -> int:
        """Sync metrics.jsonl to disk and return its length up to the last whole row."""
        with self.best_effort("metrics.jsonl"), (self.folder / "metrics.jsonl").open("ab") as file:
            os.fsync(file.fileno())
        return self._metrics_bytes

    def seconds(self) -> float:
        """Seconds of the run since training began, without the pauses between interruption and resume."""
        return time.perf_counter() - self._opened

    @property
    def notes(self) -> Path:
        """The path of log.txt; on ranks other than 0 log-rank1.txt and so on."""
        return self.folder / self._name

    def log(self, text: str) -> None:
        """Append a line, with its time, to log.txt."""
        with self.best_effort(self._name), self.notes.open("a", encoding="utf-8") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {text}\n")

    def info(self, text: str) -> None:
        """Write a line to the terminal and to log.txt."""
        console.info(text)
        self.log(text)

    def warn(self, text: str) -> None:
        """Write a warning to the terminal and to log.txt."""
        console.warn(text)
        self.log(f"warning: {text}")

    def heartbeat(self, step: int) -> None:
        """Record the number of steps done; update status.json every few seconds."""
        self.step = step
        if time.monotonic() - self._last_status >= _HEARTBEAT:
            self.status("running", None)

    def status(self, state: State, exit_code: int | None, error: BaseException | None = None) -> None:
        """Replace status.json atomically. After a run has ended, the state "running" is ignored."""
        with self._status_lock, self.best_effort("status.json"):
            if self._has_ended and state == "running":
                return
            self._has_ended = state != "running"
            self._last_status = time.monotonic()
            content = {
                "state": state,
                "exit_code": exit_code,
                "step": self.step,
                "total_steps": self.total_steps,
                "degraded": self.degraded,
                "passes": self.passes,
                "pid": os.getpid(),
                "host": socket.gethostname(),
                "updated": now(),
                "error": None if error is None else _error_fields(error),
            }
            write_atomic(self.folder / "status.json", to_json(content))

    @contextmanager
    def best_effort(self, name: str) -> Iterator[None]:
        """Let the run go on where a file of the run folder cannot be written in this block."""
        try:
            yield
        except OSError as error:
            self.degrade(f"{self.folder / name} cannot be kept: {error.strerror or first_line(error)}")

    def degrade(self, reason: str) -> None:
        """Mark the run as degraded, with a warning the first time."""
        if not self.degraded:
            console.warn(f"{reason}; the run goes on")
        self.degraded = True


class NullLog(RunLog):
    """The log of ranks other than 0: lines go to log-rank1.txt and so on; rank 0 writes all else."""

    def __init__(self, folder: Path, rank: int, total_steps: int, step: int = 0, seconds: float = 0.0) -> None:
        super().__init__(folder, None, total_steps, seconds)
        self.step = step
        self._name = f"log-rank{rank}.txt"
        self.degraded = True  # rank 0 warns where the folder cannot be written

    def metrics(self, **row: Any) -> None:
        """Do nothing: rank 0 writes the metrics of all."""

    def status(self, state: State, exit_code: int | None, error: BaseException | None = None) -> None:
        """Only remember the time."""
        self._last_status = time.monotonic()


def amend_status(folder: Path, error: SamtuneError | Stopped) -> None:
    """Correct status.json by what the launcher knows: rank 0 may have lost another rank, or was killed itself."""
    with suppress(OSError, ValueError):
        status = read_status(folder)
        if status["state"] in ("running", "stopped") or (status["error"] or {}).get("what") == LOST:
            state = "stopped" if isinstance(error, Stopped) else "failed"
            status |= {"state": state, "exit_code": error.exit_code, "error": _error_fields(error), "updated": now()}
            write_atomic(folder / "status.json", to_json(status))


def _error_fields(error: BaseException) -> dict[str, str]:
    if isinstance(error, SamtuneError):
        return {"what": error.message, "why": error.cause, "mend": error.hint}
    if isinstance(error, Stopped):
        return {"what": str(error), "why": "", "mend": error.hint}
    return {"what": first_line(error), "why": "", "mend": ""}


def note_resume(
    folder: Path, config_toml: str | None, resumed: Mapping[str, Any], provenance: Mapping[str, Any]
) -> None:
    """Add an entry to "resumed" of provenance.json, and replace config.toml.

    config_toml: the settings; None where none has changed. resumed: the entry. provenance: its present content.
    """
    try:
        before = read_provenance(folder)
    except (OSError, ValueError):
        before = {}
    kept = ("command", "started", "versions", "machine", "devices", "model")
    after = dict(provenance) | {key: before[key] for key in kept if key in before}
    after["resumed"] = [*before.get("resumed", []), resumed]
    if config_toml is not None:
        write_atomic(folder / "config.toml", config_toml, durable=True)
    write_atomic(folder / "provenance.json", to_json(after), durable=True)


def versions() -> dict[str, str]:
    """The versions of Python, of the packages that affect results, and of the evaluation's resize and crop."""
    packages = ("samtune", "torch", "torchvision", "timm", "datasets", "numpy")
    versions = {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in packages}
    return versions | {"evaluation": EVALUATION_VERSION}


def command() -> str:
    """The command line as it was typed."""
    return shlex.join(["samtune", *sys.argv[1:]])


def now() -> str:
    """The current time, in UTC."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
