"""The run folder's record: status, metrics, provenance, notes. Written while the run goes on, read to make the report.

config.toml       the resolved config, with the origin of each value; a recipe that repeats the run
provenance.json   command, versions, machine, what config names turned into (weights, splits, steps), and each resume
status.json       state (running, done, stopped, failed), exit_code, step, total_steps, degraded; pid, host, updated,
                  error (what, why, mend)
metrics.jsonl     one object a line, append-only
log.txt           what the terminal said; log-rank1.txt and so on: the same of the other ranks

None of it is worth a run: where status, metrics or notes cannot be written, the run goes on and is marked as degraded.
"""

import errno
import importlib.metadata
import json
import os
import platform
import re
import shlex
import socket
import sys
import threading
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from samtune import console
from samtune.errors import LOST, MachineError, SamtuneError, Stopped, UsageError, first_line
from samtune.files import write_atomic
from samtune.runs import lock

_COLUMNS = (
    *("step", "epoch", "split", "loss", "top1_error", "lr", "rho", "sam", "grad_norm"),
    *("images_per_second", "data_wait", "seconds"),
)
_HEARTBEAT = 5.0  # seconds between two updates of status.json
# What makes a folder that of a run, or of a sweep. Of a run that was ended before it had begun there may be others:
# config.toml is written last. Files of others, such as a batch system's output, are nobody's business here.
_OWN = (
    *("config.toml", "status.json", "metrics.jsonl", "report.json", "report.md", "report.html", "predictions.parquet"),
    *("diagnostics.json", "sweep.toml", "ledger.json"),
)
State = Literal["running", "done", "stopped", "failed"]


def holds_run(folder: Path) -> bool:
    """Whether a run has begun in this folder."""
    return (folder / "config.toml").is_file()


def has_checkpoints(folder: Path) -> bool:
    """Whether a run has saved something in this folder."""
    checkpoints = folder / "checkpoints"
    copies = (checkpoints / name / "manifest.json" for name in ("last", "best"))  # of links that were followed
    return any(checkpoints.glob("step-*")) or any(copy.is_file() for copy in copies)


def resolve_checkpoint(checkpoints: Path, name: str) -> Path:
    """The folder that last, best or step-000123 means: by a link, by a file that names it, or itself."""
    path = checkpoints / name
    return checkpoints / path.read_text(encoding="utf-8").strip() if path.is_file() else path


def check_done(folder: Path) -> None:
    """Raise UsageError for a folder that holds no run, or one that has not come to its end."""
    if not holds_run(folder):
        raise UsageError(f"there is no run in {folder}", hint="give a run folder: `samtune runs FOLDER` lists them")
    try:
        state = read_status(folder)["state"]
    except (OSError, ValueError, KeyError, TypeError):
        state = "done" if (folder / "report.json").is_file() else "not known, as status.json cannot be read"
    if state != "done":
        resume = shlex.join(["samtune", "run", "--resume", "--output", str(folder)])
        raise UsageError(
            f"run {folder} is not done", f"its state is {state}", f"let it end, or go on with it: {resume}"
        )


def check_free(folder: Path) -> None:
    """Raise for a folder that a new run cannot have; nothing is created.

    UsageError: something is in it. MachineError: it cannot be made, or another process is using it.
    """
    lock.check_unused(folder)
    _check_empty(folder)
    there = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise MachineError(
            f"run folder {folder} cannot be made", f"{there} is not a writable folder", "give another --output"
        )


@contextmanager
def result_folder(folder: Path) -> Iterator[Path]:
    """A folder, made if need be, that results are written to in this block. Raises MachineError if that cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
    except OSError as error:
        raise MachineError(f"{folder} cannot be written", error.strerror or "", "give another --output") from None


def _check_empty(folder: Path) -> None:
    there = [name for name in _OWN if (folder / name).exists()]
    if folder.is_file() or has_checkpoints(folder) or there:
        resume = "go on with its run by --resume, " if holds_run(folder) else ""
        what = f"run folder {folder} is {'a file' if folder.is_file() else 'not empty'}"
        why = f"it has {there[0]} of another run" if there else ""
        raise UsageError(what, why, f"{resume}give another --output, or remove it")


class RunLog:
    """Writes one run folder, alone: while it is open, no other process can."""

    def __init__(self, folder: Path, held: lock.Lock | None, total_steps: int, seconds: float = 0.0) -> None:
        """seconds: what the run had taken when it was interrupted. Use `create` or `reopen`."""
        self.folder, self.checkpoints, self.total_steps = folder, folder / "checkpoints", total_steps
        self.step = 0
        self.degraded = False
        self.followers: list[Callable[[Mapping[str, Any]], None]] = []  # each is given the rows of metrics
        self._name = "log.txt"
        self._lock = held
        self._opened = time.perf_counter() - seconds
        self._last_status = -_HEARTBEAT
        self._saying = threading.RLock()  # how a run ends is said by whichever thread knows it
        self._over = False
        self._metrics_bytes = 0  # length of metrics.jsonl up to the last whole row
        self._unwritten: list[str] = []  # rows of metrics that wait for room

    @classmethod
    def create(cls, folder: Path, config_toml: str, provenance: Mapping[str, Any], total_steps: int) -> "RunLog":
        """Begin a new run folder. Raises UsageError or MachineError as `check_free` does."""
        check_free(folder)
        try:
            (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
            log = cls(folder, lock.acquire(folder), total_steps)
            _check_empty(folder)  # another process may have been here a moment ago
            write_atomic(folder / "provenance.json", _json(provenance), durable=True)
            write_atomic(folder / "config.toml", config_toml, durable=True)
        except OSError as error:
            raise MachineError(
                f"run folder {folder} cannot be written", error.strerror or "", "give another --output"
            ) from None
        log.status("running", None)
        return log

    @classmethod
    def reopen(
        cls, folder: Path, held: lock.Lock, total_steps: int, *, step: int, seconds: float, metrics_bytes: int
    ) -> "RunLog":
        """Go on with a run folder after so many steps; what metrics.jsonl says of later ones is cut off."""
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
            if metrics.exists():
                os.truncate(metrics, metrics_bytes)
        (folder / "diagnostics.json").unlink(missing_ok=True)  # of a divergence that the run goes on from
        log.status("running", None)
        return log

    def close(self) -> None:
        """Let other processes use the folder."""
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
        for follow in self.followers:
            follow(row)

    def synced_metrics_bytes(self) -> int:
        """Length of metrics.jsonl up to the last whole row, which is on the disk now."""
        with self.best_effort("metrics.jsonl"), (self.folder / "metrics.jsonl").open("ab") as file:
            os.fsync(file.fileno())
        return self._metrics_bytes

    def seconds(self) -> float:
        """Time that the run has taken since its folder was opened, which is when training begins; pauses left out."""
        return time.perf_counter() - self._opened

    @property
    def notes(self) -> Path:
        """log.txt, of the other ranks log-rank1.txt and so on."""
        return self.folder / self._name

    def log(self, text: str) -> None:
        """Append a line, with its time, to log.txt."""
        with self.best_effort(self._name), self.notes.open("a", encoding="utf-8") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {text}\n")

    def info(self, text: str) -> None:
        """A line for the terminal and for log.txt."""
        console.info(text)
        self.log(text)

    def warn(self, text: str) -> None:
        """The same, for what the user should look at though the run goes on."""
        console.warn(text)
        self.log(f"warning: {text}")

    def heartbeat(self, step: int) -> None:
        """The run has done so many steps; status.json says so every few seconds."""
        self.step = step
        if time.monotonic() - self._last_status >= _HEARTBEAT:
            self.status("running", None)

    def status(self, state: State, exit_code: int | None, error: BaseException | None = None) -> None:
        """Replace status.json, so that a reader always finds a whole one. A run that is over does not run again."""
        with self._saying:
            if not (self._over and state == "running"):
                self._write_status(state, exit_code, error)
                self._over = state != "running"

    def _write_status(self, state: State, exit_code: int | None, error: BaseException | None) -> None:
        self._last_status = time.monotonic()
        content = {
            "state": state,
            "exit_code": exit_code,
            "step": self.step,
            "total_steps": self.total_steps,
            "degraded": self.degraded,
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "updated": now(),
            "error": None if error is None else _in_words(error),
        }
        with self.best_effort("status.json"):
            write_atomic(self.folder / "status.json", _json(content))

    @contextmanager
    def best_effort(self, what: str) -> Iterator[None]:
        """Where a file of the run folder cannot be written in this block, the run goes on without it."""
        try:
            yield
        except OSError as error:
            self.degrade(f"{self.folder / what} cannot be kept: {error.strerror or first_line(error)}")

    def degrade(self, why: str) -> None:
        """The run goes on without something that is not worth ending it; said once."""
        if not self.degraded:
            console.warn(f"{why}; the run goes on")
        self.degraded = True


class NullLog(RunLog):
    """What the ranks beside rank 0 have in its place: notes go to log-rank1.txt and so on, the rest is rank 0's."""

    def __init__(self, folder: Path, rank: int, total_steps: int, step: int = 0, seconds: float = 0.0) -> None:
        super().__init__(folder, None, total_steps, seconds)
        self.step = step
        self._name = f"log-rank{rank}.txt"
        self.degraded = True  # rank 0 says it where the folder cannot be written

    def metrics(self, **row: Any) -> None:
        """Nothing: rank 0's are those of all."""

    def status(self, state: State, exit_code: int | None, error: BaseException | None = None) -> None:
        """Nothing but the time."""
        self._last_status = time.monotonic()


def amend_status(folder: Path, error: SamtuneError | Stopped) -> None:
    """The launcher knows better what ended a run than rank 0, which was only left alone, or was killed itself."""
    with suppress(OSError, ValueError):
        status = read_status(folder)
        if status["state"] in ("running", "stopped") or (status["error"] or {}).get("what") == LOST:
            state = "stopped" if isinstance(error, Stopped) else "failed"
            status |= {"state": state, "exit_code": error.exit_code, "error": _in_words(error), "updated": now()}
            write_atomic(folder / "status.json", _json(status))


def _in_words(error: BaseException) -> dict[str, str]:
    if isinstance(error, SamtuneError):
        return {"what": error.message, "why": error.cause, "mend": error.hint}
    if isinstance(error, Stopped):
        return {"what": str(error), "why": "", "mend": error.hint}
    return {"what": first_line(error), "why": "", "mend": ""}


def note_resume(
    folder: Path, config_toml: str | None, resumed: Mapping[str, Any], provenance: Mapping[str, Any]
) -> None:
    """Write down that a run goes on: with which versions, from which step, and with which settings changed.

    config_toml: the settings, where they have changed. provenance: what they turned into, now.
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
    write_atomic(folder / "provenance.json", _json(after), durable=True)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl; what is no row is passed over, and without the file there is none."""
    rows = []
    with suppress(OSError):
        for line in (folder / "metrics.jsonl").read_text(encoding="utf-8", errors="replace").splitlines():
            with suppress(ValueError):
                row = json.loads(line)
                if isinstance(row, dict) and {"step", "epoch", "split", "seconds"} <= row.keys():
                    rows.append(row)
    return rows


def read_settings(folder: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The settings that config.toml holds, and where each came from; those that are open have an origin alone.

    Raises OSError or ValueError where it cannot be read.
    """
    text = (folder / "config.toml").read_text(encoding="utf-8")
    origins = re.findall(r"^(?:# )?(\w+) (?:= .*|is open) *# (.*)$", text, re.MULTILINE)
    return tomllib.loads(text), dict(origins)


def read_provenance(folder: Path) -> dict[str, Any]:
    """The content of provenance.json. Raises OSError, or ValueError for what is no JSON object."""
    return _read_object(folder / "provenance.json")


def read_status(folder: Path) -> dict[str, Any]:
    """The content of status.json. Raises as `read_provenance`."""
    return _read_object(folder / "status.json")


def read_report(folder: Path) -> dict[str, Any]:
    """The content of report.json. Raises as `read_provenance`."""
    return _read_object(folder / "report.json")


def _read_object(path: Path) -> dict[str, Any]:
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} holds no JSON object")
    return content


def versions() -> dict[str, str]:
    """Python's version and those of the packages that decide a result."""
    packages = ("samtune", "torch", "torchvision", "timm", "datasets", "numpy")
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in packages}


def command() -> str:
    """The command line as it was typed."""
    return shlex.join(["samtune", *sys.argv[1:]])


def now() -> str:
    """The current time, in UTC."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _json(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"
