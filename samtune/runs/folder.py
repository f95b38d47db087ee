"""A run folder: what it holds, whether a run may use it, and how its files are read.

config.toml       the resolved config, with the origin of each value; a recipe that repeats the run
provenance.json   command, versions, machine, what config names turned into (weights, splits, steps), and each resume
status.json       state (running, done, stopped, failed), exit_code, step, total_steps, degraded, passes; pid, host,
                  updated, error (what, why, mend)
metrics.jsonl     one object a line, append-only
log.txt           what the terminal said; log-rank1.txt and so on: the same of the other ranks
checkpoints/      see samtune/runs/checkpoint.py
bootstrap/        with --bootstrap: the folder of the first training, a run of its own, and labels.parquet, its
                  predictions for the training images. Until those are there, the run has only config.toml and
                  status.json
"""

import json
import os
import re
import shlex
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from samtune.errors import MachineError, UsageError
from samtune.files import first_existing_parent
from samtune.runs import lock

# A folder with one of these belongs to a run or a sweep. A run that ended before it began may have left others, as
# config.toml is written last. All other files, such as a batch system's output, may lie there.
_RUN_FILES = (
    *("config.toml", "status.json", "metrics.jsonl", "report.json", "report.md", "report.html", "predictions.parquet"),
    *("diagnostics.json", "sweep.toml", "ledger.json"),
)
BOOTSTRAP = "bootstrap"
BOOTSTRAP_LABELS = "labels.parquet"


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
    """Raise for a folder that a new run cannot use; nothing is created.

    UsageError: it has files of a run. MachineError: it cannot be made, or another process writes it.
    """
    lock.check_unused(folder)
    check_empty(folder)
    parent = first_existing_parent(folder)
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise MachineError(
            f"run folder {folder} cannot be made", f"{parent} is not a writable folder", "give another --output"
        )


@contextmanager
def result_folder(folder: Path) -> Iterator[Path]:
    """Make a folder for the results written in this block. Raises MachineError where they cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
    except OSError as error:
        raise MachineError(f"{folder} cannot be written", error.strerror or "", "give another --output") from None


def check_empty(folder: Path) -> None:
    """Raise UsageError if the folder is a file, or has files of a run or a sweep."""
    files = [name for name in _RUN_FILES if (folder / name).exists()]
    if folder.is_file() or has_checkpoints(folder) or files:
        resume = "go on with its run by --resume, " if holds_run(folder) else ""
        raise UsageError(
            f"run folder {folder} is {'a file' if folder.is_file() else 'not empty'}",
            f"it has {files[0]} of another run" if files else "",
            f"{resume}give another --output, or remove it",
        )


def read_settings(folder: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The settings that config.toml holds, and the origin of each; open ones have only an origin.

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


def to_json(content: Mapping[str, Any]) -> str:
    """The text of a JSON file."""
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def _read_object(path: Path) -> dict[str, Any]:
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} holds no JSON object")
    return content
