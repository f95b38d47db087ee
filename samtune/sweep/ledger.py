"""The sweep folder: what became of each run, and what was chosen.

    sweep.toml           a recipe that repeats the sweep
    ledger.json          its runs and their states, and what was chosen
    runs/ID              run folders; of runs that chose, the checkpoints go when they are done
    logs/ID/output.txt   what the run said; exit_code: how it ended, if nobody had asked it to

What a run folder says of its run is true; the ledger repeats it, and can be made again.
"""

import json
import shutil
import signal
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from samtune.config import loading
from samtune.errors import DataError, Diverged, Stopped, UsageError
from samtune.files import write_atomic
from samtune.runs import lock
from samtune.runs.folder import check_free, read_status
from samtune.runs.resume import finished_report

SCHEMA_VERSION = 1
Stage = Literal["probe", "select", "final"]
State = Literal["waiting", "running", "done", "stopped", "failed"]


@dataclass(frozen=True, eq=False)
class Run:
    """A run of the plan. point: the settings that its arm tries; settings: all that it has of its own, those included.

    budget, arm: None for a probe, which serves all. steps: of the optimizer; passes: forward-backward ones in them.
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
    """What became of a run. stopped: it goes on, whoever takes it; failed: with exit_code, for `why`."""

    state: State
    exit_code: int | None = None
    cause: str = ""
    report: Mapping[str, Any] | None = None

    @property
    def diverged(self) -> bool:
        """Whether a loss was not finite."""
        return self.exit_code == Diverged.exit_code


def run_folder(folder: Path, run: str) -> Path:
    """Where a run of the sweep is."""
    return folder / "runs" / run


def log_folder(folder: Path, run: str) -> Path:
    """What a run said is kept here, and who has taken it holds the lock of this folder."""
    return folder / "logs" / run


def outcome(folder: Path, run: str, *, mine: bool = False) -> Outcome:
    """What became of a run. mine: this process has taken it, and asks what it was before."""
    there, log = run_folder(folder, run), log_folder(folder, run)
    taken = lock.holder(there) or (None if mine else lock.holder(log))
    report = finished_report(there)  # asked after that: a run that ends in between is done
    if report is not None:
        return Outcome("done", 0, report=report)
    if taken:
        return Outcome("running")
    code = _exit_code(log)
    if code is None:
        return Outcome("stopped" if there.is_dir() else "waiting")
    if code == Stopped.SAVED or code > 128:
        return Outcome("stopped", code)
    return Outcome("failed", code, _why(there, log, code))


def _exit_code(log: Path) -> int | None:
    try:
        return int((log / "exit_code").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _why(there: Path, log: Path, code: int) -> str:
    """The cause of a failure, in a line."""
    if code < 0:
        memory = ": the system does so when memory runs out" if code == -signal.SIGKILL else ""
        return f"it was ended by {signal.Signals(-code).name}{memory}"
    try:
        status = read_status(there)
        if status["state"] == "failed" and status["exit_code"] == code:
            return str(status["error"]["what"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # it came to no status
    lines = [line for line in _tail(log / "output.txt").splitlines() if line.strip()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return (errors or lines or [f"exit code {code}"])[-1]


def _tail(path: Path) -> str:
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 8192))
            return file.read().decode(errors="replace")
    except OSError:
        return ""


def note_end(folder: Path, run: str, code: int) -> None:
    """Keep how a run ended by itself."""
    write_atomic(log_folder(folder, run) / "exit_code", f"{code}\n")


def drop_checkpoints(folder: Path, run: Run) -> None:
    """Of a run that chose, what it said is all that is needed; of a last fit, its weights are."""
    if run.stage != "final":
        shutil.rmtree(run_folder(folder, run.id) / "checkpoints", ignore_errors=True)


# -------------------------------------------------------------------------------------------------------------- choice


def is_answer(run: Run, found: Outcome) -> bool:
    """Of a run that chooses, that a loss is not finite tells enough: its point is out."""
    return found.state == "failed" and found.diverged and run.stage == "select"


def choose(points: Sequence[Mapping[int, Outcome]]) -> int | None:
    """Which point of an arm is best on validation, from its outcomes by seed; None if none is, or not yet.

    The lowest mean top-1 error, then the lowest mean loss, then the first. A point that diverged with any seed is out.
    """
    everything = [outcome for point in points for outcome in point.values()]
    if not all(outcome.state == "done" or outcome.diverged for outcome in everything):
        return None
    means = {i: _mean_scores(point.values()) for i, point in enumerate(points)}
    ranked = [(scores, i) for i, scores in means.items() if scores is not None]
    return min(ranked)[1] if ranked else None


def _mean_scores(outcomes: Iterable[Outcome]) -> tuple[float, float] | None:
    """Mean top-1 error in percent and mean loss on validation; None if a run has none."""
    scores = [outcome.report["val"] if outcome.report else None for outcome in outcomes]
    found = [(score["top1_error"], score["loss"]) for score in scores if score]
    if not scores or len(found) < len(scores):
        return None
    return sum(error for error, _ in found) / len(found), sum(loss for _, loss in found) / len(found)


# ----------------------------------------------------------------------------------------------------- write and read


def write(
    folder: Path, runs: Sequence[Run], outcomes: Mapping[str, Outcome], chosen: Sequence[Mapping[str, Any]], total: int
) -> None:
    """Replace ledger.json.

    chosen: budget, arm and point of each arm; null where it is not chosen yet. total: how many runs there will be.
    """
    entries = [_entry(run, outcomes[run.id]) for run in runs]
    content = {"schema_version": SCHEMA_VERSION, "kind": "sweep", "total_runs": total}
    content |= {"chosen": list(chosen), "runs": entries}
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    file = folder / "ledger.json"
    if not file.is_file() or file.read_text(encoding="utf-8") != text:
        write_atomic(file, text)


def _entry(run: Run, found: Outcome) -> dict[str, Any]:
    about = {"folder": f"runs/{run.id}", "state": found.state, "exit_code": found.exit_code}
    return asdict(run) | about | {"why": found.cause or None}


def read(folder: Path) -> dict[str, Any]:
    """All that a sweep has found so far, as plain data; states and scores are those of the run folders.

    settings: what all runs share. sweep: the table. budgets: as text, [null] for the recipe's own length.
    arms: for each budget and arm: points (point, val_error in percent and val_loss as means over seeds, runs by seed),
    chosen (a point, or null), final (its runs, each with its report, or null).
    failed: id, exit_code, why, log. missing: ids of those runs that can be told by now, and have still to be done.
    totals: runs, done, failed, train_seconds.

    Raises UsageError for a folder without a sweep, DataError for a ledger that cannot be read.
    """
    if not (folder / "ledger.json").is_file():
        hint = "give the folder that `samtune sweep` made"
        if (folder / "sweep.toml").is_file():
            hint = "it has not begun a run yet; the same `samtune sweep` goes on"
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
    outcomes = {run.id: outcome(folder, run.id) for run in runs}
    done = [found.report for found in outcomes.values() if found.report]
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": "sweep",
        "folder": str(folder),
        "settings": loading.load(folder / "sweep.toml").model_dump(mode="json"),
        "sweep": table,
        "budgets": table.get("budgets") or [None],
        "arms": [_arm(folder, choice, runs, outcomes) for choice in chosen],
        "probes": [_said_of(folder, run, outcomes[run.id]) for run in runs if run.stage == "probe"],
        "failed": [
            {
                "id": run,
                "exit_code": found.exit_code,
                "why": found.cause,
                "log": str(log_folder(folder, run) / "output.txt"),
            }
            for run, found in outcomes.items()
            if found.state == "failed"
        ],
        "missing": [
            run.id for run in runs if outcomes[run.id].state != "done" and not is_answer(run, outcomes[run.id])
        ],
        "totals": {
            "runs": total,
            "done": len(done),
            "failed": sum(found.state == "failed" for found in outcomes.values()),
            "train_seconds": sum(report["train_seconds"] or 0 for report in done),
        },
    }


def _arm(
    folder: Path, choice: Mapping[str, Any], runs: Sequence[Run], outcomes: Mapping[str, Outcome]
) -> dict[str, Any]:
    own = [run for run in runs if (run.budget, run.arm) == (choice["budget"], choice["arm"])]
    points = []
    for point in _distinct(run.point for run in own if run.stage == "select"):
        tried = [run for run in own if run.stage == "select" and run.point == point]
        means = _mean_scores(outcomes[run.id] for run in tried)
        points.append(
            {
                "point": point,
                "chosen": point == choice["point"],
                "val_error": means[0] if means else None,
                "val_loss": means[1] if means else None,
                "runs": [_said_of(folder, run, outcomes[run.id]) for run in tried],
            }
        )
    final = [_said_of(folder, run, outcomes[run.id]) for run in own if run.stage == "final"]
    return {
        "budget": choice["budget"],
        "arm": choice["arm"],
        "points": points,
        "chosen": choice["point"],
        "final": final,
    }


def _distinct(points: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    found: list[Mapping[str, Any]] = []
    for point in points:
        found += [point] if point not in found else []
    return found


def _said_of(folder: Path, run: Run, found: Outcome) -> dict[str, Any]:
    about = {"id": run.id, "seed": run.seed, "folder": str(run_folder(folder, run.id)), "state": found.state}
    return about | {"settings": run.settings, "steps": run.steps, "passes": run.passes, "report": found.report}


def check_usable(folder: Path) -> None:
    """Raise UsageError or MachineError for a folder that no sweep can have; one that holds a sweep can."""
    if not (folder / "sweep.toml").is_file():
        check_free(folder)
