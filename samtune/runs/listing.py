"""One row per run of a folder: its state, its errors, and what to do next. For `samtune runs`."""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from samtune.errors import UsageError, first_line
from samtune.runs import lock
from samtune.runs.folder import BOOTSTRAP, read_report, read_status
from samtune.runs.metrics import read_metrics

DROPPABLE = ("updated (UTC)", "progress", "val %")
"""Columns of `table` that a narrow terminal drops, in this order."""
_STATES = ("running", "done", "stopped", "failed")


def list_runs(folder: Path) -> list[dict[str, Any]]:
    """The runs in a folder, which may be a run itself, and in its subfolders; the last one written comes first.

    state: what status.json says, but "killed" where it says running and nobody writes the folder, and "damaged" where
    status.json cannot be read. val_error, test_error: top-1, in percent. next: what to do, None if nothing.
    Unknown values are None. Raises UsageError without a folder.
    """
    if not folder.is_dir():
        raise UsageError(
            f"there is no folder {folder}", hint="give the folder that holds the runs: samtune runs FOLDER"
        )
    found = [path.parent for pattern in ("", "*/", "*/*/") for path in folder.glob(f"{pattern}status.json")]
    rows = [_row(path) for path in found if not (path.name == BOOTSTRAP and path.parent in found)]
    return sorted(rows, key=lambda row: (row["updated"] or "", row["path"]), reverse=True)


def table(rows: Sequence[Mapping[str, Any]], folder: Path) -> list[dict[str, str | float | None]]:
    """The columns for the terminal; val and test are top-1 errors. Runs are named relative to the folder."""
    return [
        {
            "run": row["path"] if Path(row["path"]) == folder else str(Path(row["path"]).relative_to(folder)),
            "state": row["state"] + (" (degraded)" if row["degraded"] else ""),
            "progress": _progress(row["step"], row["total_steps"]),
            "val %": row["val_error"],
            "test %": row["test_error"],
            "updated (UTC)": row["updated"] and row["updated"].replace("T", " ").rstrip("Z"),
        }
        for row in rows
    ]


def todo(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Lines with the error and the next step, for the runs that need something."""
    for row in rows:
        if row["error"] or row["next"]:
            yield f"{row['path']}: {row['error'] or row['state']}"
        if row["next"]:
            yield f"  next: {row['next']}"


def _progress(step: int | None, total: int | None) -> str | None:
    return f"{step}/{total} ({100 * step // total} %)" if step is not None and total else None


def is_running(folder: Path) -> bool:
    """Whether a process is writing this run now."""
    return bool(_row(folder)["state"] == "running")


def read_step(folder: Path) -> tuple[int, int] | None:
    """(step, total steps) by status.json, of the first training of --bootstrap until it is done; None if unreadable."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        status = read_status(folder)
        if status["total_steps"] == 0:  # its first training is not done
            status = read_status(folder / BOOTSTRAP)
        return int(status["step"]), int(status["total_steps"])
    return None


def _row(folder: Path) -> dict[str, Any]:
    row: dict[str, Any] = {
        "path": str(folder),
        "state": "damaged",
        **dict.fromkeys(("exit_code", "step", "total_steps", "val_error", "test_error", "updated", "pid", "host")),
        "degraded": False,
        "error": None,
        "next": f"look at {folder}",
    }
    # Before status.json is read: a run that ends in between has written its end there.
    writer = lock.holder(folder)
    try:
        written = datetime.fromtimestamp((folder / "status.json").stat().st_mtime, UTC)
        row["updated"] = written.strftime("%Y-%m-%dT%H:%M:%SZ")
        status = read_status(folder)
        if status.get("state") not in _STATES:
            raise ValueError("it names no state of a run")
    except (OSError, ValueError) as error:
        return row | {"error": f"status.json cannot be read: {first_line(error)}"}
    for key, kind in (("exit_code", int), ("step", int), ("total_steps", int), ("pid", int), ("degraded", bool)):
        row[key] = status[key] if isinstance(status.get(key), kind) else row[key]
    if row["total_steps"] == 0:
        row["step"], row["total_steps"] = read_step(folder) or (None, None)
    for key in ("host", "updated"):
        row[key] = status[key] if isinstance(status.get(key), str) else row[key]
    # Again, for a run that began in between.
    row["state"] = _state(status["state"], writer or lock.holder(folder))
    failure = status["error"] if isinstance(status.get("error"), dict) else {}
    row["error"] = str(failure.get("what") or "").partition("\n")[0] or None
    row["next"] = _next(folder, row["state"], failure.get("mend"))
    return row | _errors(folder, row["state"])


def _state(written: str, writer: str | None) -> str:
    """The state of a run. A killed process wrote no last status, and a resumed one perhaps not yet its first."""
    if written == "done":
        return written
    if writer is not None:
        return "running"
    return "killed" if written == "running" else written


def _next(folder: Path, state: str, hint: object) -> str | None:
    resume = f"samtune run --resume --output {shlex.quote(str(folder))}"
    if state in ("stopped", "killed"):
        return resume
    if state == "failed" and hint:
        return f"{hint} ({resume})" if "--resume" in str(hint) else str(hint)
    return f"look at {folder / 'log.txt'}" if state == "failed" else None


def _errors(folder: Path, state: str) -> dict[str, float | None]:
    """Top-1 errors: of the report if the run is done, else the last in its metrics."""
    scores: dict[str, Any] = {}
    if state == "done":
        try:
            scores = read_report(folder)
        except (OSError, ValueError):
            state = "without report"
    if state != "done":
        scores = {str(row["split"]): row for row in read_metrics(folder)}
    errors = {}
    for split in ("val", "test"):
        scored = scores.get(split)
        error = scored.get("top1_error") if isinstance(scored, dict) else None
        errors[f"{split}_error"] = float(error) if isinstance(error, int | float) else None
    return errors
