"""The sweep folder: the state of each run, and the choices.

    sweep.toml           a recipe that repeats the sweep
    ledger.json          runs with their states, and choices
    runs/ID              run folders; selection runs lose their checkpoints when they are done
    logs/ID/output.txt   output of the run; exit_code: its exit code, if it ended by itself

Run folders have the truth about their runs; the ledger repeats it and can be made again.
"""

import json
import os
import shutil
import signal
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from samtune.config import loading
from samtune.errors import DataError, Diverged, Stopped, UsageError
from samtune.files import write_atomic
from samtune.runs import lock
from samtune.runs.folder import BOOTSTRAP, check_free, read_status
from samtune.runs.resume import finished_report

SCHEMA_VERSION = 1
Stage = Literal["probe", "select", "final"]
State = Literal["waiting", "running", "done", "stopped", "failed"]


@dataclass(frozen=True, eq=False)
class Run:
    """A run of the plan. point: settings that its arm tries; settings: all that differ from the shared ones.

    budget, arm: None for a probe. steps: optimizer steps of a training; passes: forward-backward passes of the run,
    with --bootstrap of both trainings.
    """

    id: str
    stage: Stage
    budget: str | None
    arm: str | None
    point: Mapping[str, Any]
    seed: int
    settings: Mapping[str, Any]
    steps: int
    passes: float


@dataclass(frozen=True)
class Outcome:
    """The state of a run. stopped: it can be resumed; failed: with exit_code and cause."""

    state: State
    exit_code: int | None = None
    cause: str = ""
    report: Mapping[str, Any] | None = None

    @property
    def diverged(self) -> bool:
        """Whether the run ended because a loss was not finite."""
        return self.exit_code == Diverged.exit_code


def run_folder(folder: Path, run: str) -> Path:
    """The run folder of a run."""
    return folder / "runs" / run


def log_folder(folder: Path, run: str) -> Path:
    """The folder of a run's output; the process that has claimed the run holds its lock."""
    return folder / "logs" / run


def outcome(folder: Path, run: str, *, mine: bool = False) -> Outcome:
    """The outcome of a run. mine: this process has claimed it and asks for its earlier state."""
    output, log = run_folder(folder, run), log_folder(folder, run)
    is_taken = lock.holder(output) or (None if mine else lock.holder(log))
    report = finished_report(output)  # read after the locks: a run that ends in between is done
    if report is not None:
        return Outcome("done", 0, report=report)
    if is_taken:
        return Outcome("running")
    try:
        code = int((log / "exit_code").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return Outcome("stopped" if output.is_dir() else "waiting")
    if code == Stopped.SAVED or code > 128:
        return Outcome("stopped", code)
    return Outcome("failed", code, _cause(output, log, code))


def _cause(output: Path, log: Path, code: int) -> str:
    """The cause of a failure, in one line."""
    if code < 0:
        memory = ": the system does so when memory runs out" if code == -signal.SIGKILL else ""
        return f"it was ended by {signal.Signals(-code).name}{memory}"
    with suppress(OSError, ValueError, KeyError, TypeError):  # it may have ended before it had a status
        status = read_status(output)
        if status["state"] == "failed" and status["exit_code"] == code:
            return str(status["error"]["what"])
    tail = ""
    with suppress(OSError), (log / "output.txt").open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 8192))
        tail = file.read().decode(errors="replace")
    lines = [line for line in tail.splitlines() if line.strip()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return (errors or lines or [f"exit code {code}"])[-1]


def write_exit_code(folder: Path, run: str, code: int) -> None:
    """Store the exit code of a run that ended by itself."""
    write_atomic(log_folder(folder, run) / "exit_code", f"{code}\n")


def drop_checkpoints(folder: Path, run: Run) -> None:
    """Delete the checkpoints of a run, unless it is a final run."""
    if run.stage != "final":
        output = run_folder(folder, run.id)
        for trained in (output, output / BOOTSTRAP):
            shutil.rmtree(trained / "checkpoints", ignore_errors=True)


# -------------------------------------------------------------------------------------------------------------- choice


def is_answer(run: Run, outcome: Outcome) -> bool:
    """Whether a failure is a result: a selection run whose loss is not finite, so that its point is out."""
    return outcome.state == "failed" and outcome.diverged and run.stage == "select"


def choose(points: Sequence[Mapping[int, Outcome]]) -> int | None:
    """The index of the best point of an arm on validation, from its outcomes by seed; None without one, or not yet.

    The best point has the lowest mean top-1 error, then the lowest mean loss, then the first place. A point that
    diverged with any seed is out.
    """
    if not all(outcome.state == "done" or outcome.diverged for point in points for outcome in point.values()):
        return None
    means = {i: _mean_scores(point.values()) for i, point in enumerate(points)}
    ranked = [(scores, i) for i, scores in means.items() if scores is not None]
    return min(ranked)[1] if ranked else None


def _mean_scores(outcomes: Iterable[Outcome]) -> tuple[float, float] | None:
    """Mean top-1 error in percent and mean loss on validation; None if a run has none."""
    scores = [outcome.report["val"] if outcome.report else None for outcome in outcomes]
    if not scores or None in scores:
        return None
    error, loss = (sum(score[key] for score in scores if score) for key in ("top1_error", "loss"))
    return error / len(scores), loss / len(scores)


# ----------------------------------------------------------------------------------------------------- write and read


def write(
    folder: Path, runs: Sequence[Run], outcomes: Mapping[str, Outcome], chosen: Sequence[Mapping[str, Any]], total: int
) -> None:
    """Replace ledger.json if it changes.

    chosen: budget, arm and point of each arm, null where none is chosen yet. total: number of runs to come in all.
    """
    entries = []
    for run in runs:
        found = outcomes[run.id]
        entry = {"folder": f"runs/{run.id}", "state": found.state, "exit_code": found.exit_code}
        entries.append(asdict(run) | entry | {"why": found.cause or None})
    content = {"schema_version": SCHEMA_VERSION, "kind": "sweep", "total_runs": total}
    content |= {"chosen": list(chosen), "runs": entries}
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    file = folder / "ledger.json"
    if not file.is_file() or file.read_text(encoding="utf-8") != text:
        write_atomic(file, text)


def read(folder: Path) -> dict[str, Any]:
    """The results of a sweep so far, as plain data; states and scores are those of the run folders.

    settings: those that all runs share. sweep: the table. budgets: as text, [null] for the recipe's length.
    arms: for each budget and arm: points (point, val_error in percent and val_loss as means over seeds, runs by seed),
    chosen (a point, or null), final (its runs, each with its report, or null).
    failed: id, exit_code, why, log. missing: ids of the known runs that have still to be done.
    totals: runs, done, failed, train_seconds.

    Raises UsageError for a folder without a sweep, DataError for a ledger that cannot be read.
    """
    if not (folder / "ledger.json").is_file():
        hint = "give the folder that `samtune sweep` made"
        if (folder / "sweep.toml").is_file():
            hint = "it has not begun a run yet; the same `samtune sweep` continues"
        raise UsageError(f"there is no ledger of a sweep in {folder}", hint=hint)
    try:
        ledger = json.loads((folder / "ledger.json").read_text(encoding="utf-8"))
        runs = [Run(**{key: entry[key] for key in Run.__dataclass_fields__}) for entry in ledger["runs"]]
        table = loading.sweep_table(folder / "sweep.toml")
        total, chosen = ledger["total_runs"], ledger["chosen"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{folder / 'ledger.json'} cannot be read", str(error), "the same `samtune sweep` makes it again"
        ) from None
    outcomes = {run: outcome(folder, run.id) for run in runs}
    failed = {run: found for run, found in outcomes.items() if found.state == "failed"}
    done = [found.report for found in outcomes.values() if found.report]
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": "sweep",
        "folder": str(folder),
        "settings": loading.load(folder / "sweep.toml").model_dump(mode="json"),
        "sweep": table,
        "budgets": table.get("budgets") or [None],
        "arms": [_arm_entry(folder, choice, outcomes) for choice in chosen],
        "probes": [_run_entry(folder, run, found) for run, found in outcomes.items() if run.stage == "probe"],
        "failed": [
            {"id": run.id, "exit_code": found.exit_code, "why": found.cause}
            | {"log": str(log_folder(folder, run.id) / "output.txt")}
            for run, found in failed.items()
        ],
        "missing": [run.id for run, found in outcomes.items() if found.state != "done" and not is_answer(run, found)],
        "totals": {
            "runs": total,
            "done": len(done),
            "failed": len(failed),
            "train_seconds": sum(report["train_seconds"] or 0 for report in done),
        },
    }


def _arm_entry(folder: Path, choice: Mapping[str, Any], outcomes: Mapping[Run, Outcome]) -> dict[str, Any]:
    of_arm = [run for run in outcomes if (run.budget, run.arm) == (choice["budget"], choice["arm"])]
    by_point: dict[str, list[Run]] = {}
    for run in of_arm:
        if run.stage == "select":
            by_point.setdefault(json.dumps(run.point), []).append(run)
    points = []
    for tried in by_point.values():
        error, loss = _mean_scores(outcomes[run] for run in tried) or (None, None)
        entry = {"point": tried[0].point, "chosen": tried[0].point == choice["point"], "val_error": error}
        points.append(entry | {"val_loss": loss, "runs": [_run_entry(folder, run, outcomes[run]) for run in tried]})
    return {
        "budget": choice["budget"],
        "arm": choice["arm"],
        "points": points,
        "chosen": choice["point"],
        "final": [_run_entry(folder, run, outcomes[run]) for run in of_arm if run.stage == "final"],
    }


def _run_entry(folder: Path, run: Run, outcome: Outcome) -> dict[str, Any]:
    entry = {"id": run.id, "seed": run.seed, "folder": str(run_folder(folder, run.id)), "state": outcome.state}
    return entry | {"settings": run.settings, "steps": run.steps, "passes": run.passes, "report": outcome.report}


def check_usable(folder: Path) -> None:
    """Raise UsageError or MachineError for a folder that cannot have a sweep and has none."""
    if not (folder / "sweep.toml").is_file():
        check_free(folder)
