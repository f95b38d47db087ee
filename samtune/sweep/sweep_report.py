"""Sweep folder -> report.json and report.md: a pure function of what is on disk, whatever became of the sweep.

Seeds are independent repetitions, the images of test are not: they are the same for all runs. So what seeds tell
(means, paired differences) and what images tell (McNemar's test, seed by seed) stand side by side, and no test adds the
images of several runs up as if there were so many more of them.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from samtune.files import write_atomic
from samtune.report import compare, finished_run, stats
from samtune.report.compare import Group
from samtune.sweep import arms, ledger, tables, verdict
from samtune.sweep.budget import Budget

SCHEMA_VERSION = 1
_PLAIN = ("sgd", "sgd-2x")
_AT_END = ("rho", "lr")  # settings whose best value may lie beyond the grid
_Scores = Sequence[Mapping[str, Any]]


def build(folder: Path) -> dict[str, Any]:
    """The report of a sweep: kind "sweep", schema version 1.

    Errors are top-1 in percent, differences in percentage points, intervals at 95 %, times in seconds; costs are means
    over runs; what is not known, or not there yet, is None.

    asked: what was to be compared. made_of: model, data and places, from the runs. progress: which runs are done, have
    failed or are missing, and what all took. selection: each point of each arm on validation; choices: what was chosen,
    and how surely. final: each arm on test, over seeds. comparisons: pairs of arms, each budget, as
    `samtune.report.compare.pair` has them; mcnemar: seed by seed. baselines: the better plain arm of each budget, by
    its error on test. pays: from which budget on an arm with SAM has less error than sgd. verdict, warnings: in words.

    Raises:
        UsageError: there is no sweep in the folder.
        DataError, CheckpointError: its ledger, or the record of a run, cannot be read.
    """
    found = ledger.read(folder)
    groups = {
        (arm["budget"], arm["arm"]): Group(
            [finished_run.read(Path(run["folder"]), run["id"]) for run in runs], arm["arm"]
        )
        for arm in found["arms"]
        if (runs := _scored(arm["final"], "test"))
    }
    comparisons = [
        _compared(groups[budget, arm], groups[budget, baseline], budget)
        for budget, arm in groups
        for baseline in _PLAIN
        if (budget, baseline) in groups and (arm != baseline == "sgd" or arms.has_sam(arm))
    ]
    tried = [[_point(arm, point, set(found["missing"])) for point in arm["points"]] for arm in found["arms"]]
    settings = found["settings"]
    report: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "kind": "sweep",
        "asked": {
            "model": settings["model"],
            "dataset": settings["dataset"],
            "arms": list(dict.fromkeys(arm["arm"] for arm in found["arms"])),
            "budgets": found["budgets"],
            "seeds": found["sweep"]["seeds"],
            "selection_seeds": found["sweep"]["selection_seeds"],
            "grid": {key: value for key, value in found["sweep"].items() if isinstance(value, dict)},
            "settings": settings,
        },
        "made_of": _made_of(found),
        "progress": _progress(found),
        "selection": [point for points in tried for point in points],
        "choices": [_choice(arm, points) for arm, points in zip(found["arms"], tried, strict=True)],
        "final": [_final(arm, groups.get((arm["budget"], arm["arm"]))) for arm in found["arms"]],
        "comparisons": comparisons,
        "baselines": list(_baselines(groups)),
        "pays": list(_break_even(comparisons)),
    }
    return report | {"verdict": verdict.verdict(report), "warnings": verdict.warnings(report)}


def write(folder: Path, report: Mapping[str, Any]) -> None:
    """Write report.json and report.md from what `collect` returned; several processes may do so."""
    text = json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_atomic(folder / "report.json", text)
    write_atomic(folder / "report.md", tables.markdown(report))


# ----------------------------------------------------------------------------------------------------- what there is


def _runs(found: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """All runs that are planned by now."""
    yield from found["probes"]
    for arm in found["arms"]:
        for point in arm["points"]:
            yield from point["runs"]
        yield from arm["final"]


def _scored(runs: _Scores, split: str) -> list[Mapping[str, Any]]:
    return [run for run in runs if run["report"] and run["report"][split]]


def _progress(found: Mapping[str, Any]) -> dict[str, Any]:
    """Diverged: runs that were to choose, and whose loss was not finite. Unplanned: not known before a choice."""
    states = {run["id"]: run["state"] for run in _runs(found)}
    failed = [
        {"run": run["id"], "why": run["why"], "exit_code": run["exit_code"], "log": f"logs/{run['id']}/output.txt"}
        for run in found["failed"]
    ]
    wanted = set(found["missing"])
    reports = [run["report"] for run in _runs(found) if run["report"]]
    return {
        "runs": found["totals"]["runs"],
        "done": len(reports),
        "failed": [run for run in failed if run["run"] in wanted],
        "diverged": [run for run in failed if run["run"] not in wanted],
        "missing": [{"run": run, "state": states[run]} for run in found["missing"] if states[run] != "failed"],
        "unplanned": max(0, found["totals"]["runs"] - len(states)),
        "passes": sum(report["cost"]["forward_backward_passes"] or 0 for report in reports),
        "train_seconds": found["totals"]["train_seconds"],
    }


def _made_of(found: Mapping[str, Any]) -> dict[str, Any] | None:
    """Names and counts from the runs, which know what a name became; None before one is done."""
    reports = {run["id"]: run["report"] for run in _runs(found) if run["report"]}
    if not reports:
        return None
    finals = [run["report"] for arm in found["arms"] for run in arm["final"] if run["report"]]
    points = [point for arm in found["arms"] for point in arm["points"]]
    tried = [run["report"] for point in points for run in point["runs"] if run["report"]]
    first, *_ = reports.values()
    packages = dict.fromkeys(package for report in reports.values() for package in report["versions"])
    return {
        "model": first["model"],
        "dataset": {key: first["dataset"][key] for key in ("name", "source", "classes")}
        | {
            stage: {key: among[0]["dataset"][key] for key in ("train", "val", "test", "split_hash")} if among else None
            for stage, among in (("selection", tried), ("final", finals))
        },
        "machines": _distinct(reports, lambda report: report["machine"]),
        "devices": _distinct(reports, lambda report: ", ".join(report["devices"])),
        "precision": _distinct(reports, lambda report: report["precision"]),
        "versions": {
            package: _distinct(reports, lambda r, key=package: r["versions"].get(key)) for package in packages
        },
        "started": min(report["started"] for report in reports.values()),
        "warnings": {
            run["id"]: run["report"]["warnings"]
            for arm in found["arms"]
            for run in arm["final"]
            if run["report"] and run["report"]["warnings"]
        },
    }


def _distinct(reports: Mapping[str, Any], of: Callable[..., str | None]) -> list[str]:
    return list(dict.fromkeys(value for report in reports.values() if (value := of(report)) is not None))


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known and len(known) == len(values) else None


# ------------------------------------------------------------------------------------------------------------ selection


def _point(arm: Mapping[str, Any], point: Mapping[str, Any], missing: set[str]) -> dict[str, Any]:
    """A point of an arm on validation. state: done; diverged, where a loss was not finite; else missing.

    wilson_ci95: of one run with the mean error of all seeds, as they validate on the same images.
    """
    runs = _scored(point["runs"], "val")
    scores = [run["report"]["val"] for run in runs]
    errors = [score["top1_error"] for score in scores]
    interval = stats.student_interval(errors)
    complete = len(runs) == len(point["runs"])
    n = scores[0]["n"] if scores else None
    diverged = any(run["state"] == "failed" and run["id"] not in missing for run in point["runs"])
    return {
        "budget": arm["budget"],
        "arm": arm["arm"],
        "point": point["point"],
        "label": arms.words(point["point"]),
        "chosen": point["chosen"],
        "state": "done" if complete else "diverged" if diverged else "missing",
        "runs": [run["id"] for run in runs],
        "seeds": [run["seed"] for run in runs],
        "images": n,
        "val_errors": errors,
        "mean_error": fmean(errors) if complete else None,
        "wilson_ci95": _wilson(fmean(errors), n) if complete and n else None,
        "mean_error_ci95": [interval.low, interval.high] if interval and complete else None,
        "mean_loss": _mean([score["loss"] for score in scores]) if complete else None,
        **_cost([run["report"] for run in runs]),
    }


def _wilson(error: float, n: int) -> list[float]:
    return [100 * bound for bound in stats.wilson_interval(round(error * n / 100), n)]


def _cost(reports: _Scores) -> dict[str, float | None]:
    return {
        "epochs": _mean([report["epochs"] for report in reports]),
        "steps": _mean([report["steps"] for report in reports]),
        "passes": _mean([report["cost"]["forward_backward_passes"] for report in reports]),
        "seconds": _mean([report["train_seconds"] for report in reports]),
        "images_per_second": _mean([report["images_per_second"] for report in reports]),
    }


def _choice(arm: Mapping[str, Any], points: _Scores) -> dict[str, Any]:
    """What was chosen for an arm. uncertain: the next best point lies within Wilson's interval of the chosen one.

    at_end: settings whose chosen value is the smallest or the largest one that was tried. by: what made it better than
    the next one.
    """
    chosen = arm["chosen"]
    about: dict[str, Any] = {"budget": arm["budget"], "arm": arm["arm"], "point": chosen, "points": len(points)}
    about |= {"label": None if chosen is None else arms.words(chosen), "mean_error": None, "wilson_ci95": None}
    about |= {"images": None, "next": None, "uncertain": None, "by": None, "at_end": []}
    about |= {"diverged": sum(point["state"] == "diverged" for point in points)}
    best = next((point for point in points if point["chosen"]), None)
    if best is None or best["mean_error"] is None:
        return about
    others = [point for point in points if point is not best and point["mean_error"] is not None]
    second = min(others, key=lambda point: (point["mean_error"], point["mean_loss"]), default=None)
    return about | {
        **{key: best[key] for key in ("mean_error", "wilson_ci95", "images")},
        "next": {key: second[key] for key in ("label", "mean_error", "mean_loss")} if second else None,
        "uncertain": second["mean_error"] <= best["wilson_ci95"][1] if second else None,
        "by": _reason(best, second),
        "at_end": list(_ends(best["point"], [point["point"] for point in points])),
    }


def _reason(best: Mapping[str, Any], second: Mapping[str, Any] | None) -> str:
    """What made a point better than the next best one; after error and loss, their order."""
    if second is None or second["mean_error"] != best["mean_error"]:
        return "error"
    return "loss" if second["mean_loss"] != best["mean_loss"] else "order"


def _ends(chosen: Mapping[str, Any], tried: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    for key in _AT_END:
        values = sorted({point[key] for point in tried if key in point})
        if len(values) > 1 and chosen[key] in (values[0], values[-1]):
            yield {"setting": key, "value": chosen[key], "end": "lower" if chosen[key] == values[0] else "upper"}


# ----------------------------------------------------------------------------------------------------------- last fits


def _final(arm: Mapping[str, Any], group: Group | None) -> dict[str, Any]:
    """An arm on test. n: seeds that are scored, of those in `asked_seeds`; images: of test, the same for all.

    lost_seeds: those that failed; unscored_seeds: those that are done, but on data without test images.
    """
    runs = group.runs if group else []
    errors = list(group.errors.values()) if group else []
    interval = stats.student_interval(errors)
    return {
        "budget": arm["budget"],
        "arm": arm["arm"],
        "point": arm["chosen"],
        "label": None if arm["chosen"] is None else arms.words(arm["chosen"]),
        "by": "validation" if arm["points"] else "only point",
        "asked_seeds": [run["seed"] for run in arm["final"]],
        "lost_seeds": [run["seed"] for run in arm["final"] if run["state"] == "failed"],
        "unscored_seeds": [run["seed"] for run in arm["final"] if run["report"] and not run["report"]["test"]],
        "runs": [run.label for run in runs],
        "seeds": [run.seed for run in runs],
        "n": len(errors),
        "images": runs[0].scores["n"] if runs else None,
        "wrong": [run.scores["wrong"] for run in runs],
        "test_errors": errors,
        "mean_error": fmean(errors) if errors else None,
        "mean_error_ci95": [interval.low, interval.high] if interval else None,
        "no_interval": None if interval or not errors else stats.why_no_interval(len(errors)),
        **(group.cost if group else _cost([])),
    }


def _compared(group: Group, baseline: Group, budget: str | None) -> dict[str, Any]:
    theirs = {run.seed: run for run in baseline.runs}
    tests = ((run.seed, compare.mcnemar(run, theirs[run.seed])) for run in group.runs if run.seed in theirs)
    return (
        {"budget": budget}
        | compare.pair(group, baseline)
        | {"mcnemar": [{"seed": seed, **test} for seed, test in tests if test]}
    )


def _baselines(groups: Mapping[tuple[str | None, str], Group]) -> Iterator[dict[str, Any]]:
    for budget in dict.fromkeys(budget for budget, _ in groups):
        means = {arm: fmean(groups[budget, arm].errors.values()) for arm in _PLAIN if (budget, arm) in groups}
        if means:
            better = min(means, key=lambda arm: means[arm])
            yield {"budget": budget, "arm": better, "mean_errors": means}


def _break_even(comparisons: _Scores) -> Iterator[dict[str, Any]]:
    """For each arm with SAM and each unit of budgets of which several were tried: where its error begins to be less.

    from: the smallest budget at which, and at all larger ones, its mean is below that of sgd; sure_from: the same for
    the whole interval of the difference.
    """
    tried = [
        pair for pair in comparisons if pair["budget"] and pair["baseline"] == "sgd" and arms.has_sam(pair["label"])
    ]
    for arm, unit in dict.fromkeys((pair["label"], Budget.parse(pair["budget"]).unit) for pair in tried):
        costs = {pair["budget"]: Budget.parse(pair["budget"]) for pair in tried}
        own = [pair for pair in tried if pair["label"] == arm and costs[pair["budget"]].unit == unit]
        own.sort(key=lambda pair: costs[pair["budget"]].amount)
        if len(own) < 2:
            continue
        yield {
            "arm": arm,
            "baseline": "sgd",
            "unit": unit,
            "tried": [pair["budget"] for pair in own],
            "from": _from_where(own, lambda found: bool(found["mean"] < 0)),
            "sure_from": _from_where(own, lambda found: bool(found["ci95"] and found["ci95"][1] < 0)),
        }


def _from_where(pairs: _Scores, holds: Callable[[Mapping[str, Any]], bool]) -> str | None:
    """The first budget from which on something holds for all differences."""
    found = None
    for pair in reversed(pairs):
        if not holds(pair["difference"]):
            break
        found = pair["budget"]
    return found
