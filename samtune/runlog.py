"""The run folder's record: status, metrics, provenance, notes. Written while the run goes on, read to make the report.

config.toml       the resolved config, with the origin of each value; a recipe that repeats the run
provenance.json   command, versions, machine, and what config names turned into (weights, splits, steps)
status.json       state (running, done, stopped, failed), exit_code, step, total_steps, degraded
metrics.jsonl     one object a line, append-only
log.txt           what the terminal said
"""

import importlib.metadata
import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from samtune.errors import MachineError, UsageError

_COLUMNS = (
    *("step", "epoch", "split", "loss", "top1_error", "lr", "rho", "sam", "grad_norm"),
    *("images_per_second", "data_wait", "seconds"),
)
State = Literal["running", "done", "stopped", "failed"]


def check_free(folder: Path) -> None:
    """Raise UsageError if a run folder is taken, MachineError if it cannot be made; nothing is created."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"run folder {folder} is not empty", mend="give another --output, or remove it")
    there = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise MachineError(
            f"run folder {folder} cannot be made", f"{there} is not a writable folder", "give another --output"
        )


class RunLog:
    """Writes one run folder."""

    def __init__(self, folder: Path, config_toml: str, provenance: Mapping[str, Any], total_steps: int) -> None:
        check_free(folder)
        self.folder, self.total_steps, self.step = folder, total_steps, 0
        self._opened = time.perf_counter()
        self.checkpoints = folder / "checkpoints"
        try:
            self.checkpoints.mkdir(parents=True)
            (folder / "config.toml").write_text(config_toml, encoding="utf-8")
            _write_whole(folder / "provenance.json", provenance)
        except OSError as error:
            raise MachineError(
                f"run folder {folder} cannot be written", error.strerror or "", "give another --output"
            ) from None
        self.status("running", None)

    def metrics(self, **row: Any) -> None:
        """Append a row to metrics.jsonl: all of _COLUMNS, with null for what its split does not have, and more."""
        row = dict.fromkeys(_COLUMNS) | row | {"seconds": self.seconds()}
        self.step = max(self.step, row["step"])
        with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")

    def seconds(self) -> float:
        """Time since the run folder was opened, which is when training begins."""
        return time.perf_counter() - self._opened

    def note(self, text: str) -> None:
        """Append a line, with its time, to log.txt."""
        with (self.folder / "log.txt").open("a", encoding="utf-8") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {text}\n")

    def status(self, state: State, exit_code: int | None) -> None:
        """Replace status.json, so that a reader always finds a whole one."""
        content = {
            "state": state,
            "exit_code": exit_code,
            "step": self.step,
            "total_steps": self.total_steps,
            "degraded": False,
        }
        _write_whole(self.folder / "status.json", content)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def read_provenance(folder: Path) -> dict[str, Any]:
    """The content of provenance.json."""
    content: dict[str, Any] = json.loads((folder / "provenance.json").read_text(encoding="utf-8"))
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


def _write_whole(path: Path, content: Mapping[str, Any]) -> None:
    part = path.with_name(f".{path.name}.part")
    part.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    part.replace(path)
