"""The report of a sweep, report.json and report.md, from the files of its folder, in whatever state it is.

Seeds are independent repetitions; the images of test are the same for all runs. So statistics over seeds (means, paired
differences) and over images (McNemar's test for each seed) are reported side by side, and no test adds up the images of
several runs as if there were more of them.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from samtune.report import comparison, finished_run, html, stats
from samtune.report.comparison import Group
from samtune.sweep import arms, ledger, tables, verdict
from samtune.sweep.budget import Budget

SCHEMA_VERSION = 1
_PLAIN = ("sgd", "sgd-2x")
_AT_END = ("rho", "lr")  # settings whose best value may lie beyond the grid
_SPLITS = ("train", "val", "test", "split_hash")

Entry = Mapping[str, Any]


def build(folder: Path) -> dict[str, Any]:
    """Build the report of a sweep: kind "sweep", schema version 1.

    Errors are top-1 in percent, differences in percentage points, intervals at 95 %, times in seconds. Costs are means
    over runs. Unknown values are None.

    asked: what is compared. made_of: model, data and machines, from the runs. progress: runs that are done, failed or
    missing, and the cost of all. selection: each point of each arm on validation. choices: the chosen points, and how
    sure they are. final: each arm on test, over seeds. comparisons: pairs of arms for each budget, as in
    `samtune.report.comparison.pair`; mcnemar: by seed. baselines: the better plain arm of each budget, by its error on
    test. pays: the budget from which on an arm with SAM has less error than sgd. verdict, warnings: sentences.

    Raises:
        UsageError: there is no sweep in the folder.
        DataError, CheckpointError: its ledger, or the record of a run, cannot be read.
    """
    sweep = ledger.read(folder)
    groups = {
        (arm["budget"], arm["arm"]): Group(
            [finished_run.read(Path(run["folder"]), run["id"]) for run in runs], arm["arm"]
        )
        for arm in sweep["arms"]
        if (runs := _scored(arm["final"], "test"))
    }
    comparisons = [
        _compare(groups[budget, arm], groups[budget, baseline], budget)
        for budget, arm in groups
        for baseline in _PLAIN
        if (budget, baseline) in groups and (arm != baseline == "sgd" or arms.has_sam(arm))
    ]
    tried = [[_point(arm, point, sweep["missing"]) for point in arm["points"]] for arm in sweep["arms"]]
    settings = sweep["settings"]
    report: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "kind": "sweep",
        "asked": {
            "model": settings["model"],
            "dataset": settings["dataset"],
            "arms": list(dict.fromkeys(arm["arm"] for arm in sweep["arms"])),
            "budgets": sweep["budgets"],
            "seeds": sweep["sweep"]["seeds"],
            "selection_seeds": sweep["sweep"]["selection_seeds"],
            "grid": {key: value for key, value in sweep["sweep"].items() if isinstance(value, dict)},
            "settings": settings,
        },
        "made_of": _made_of(sweep),
        "progress": _progress(sweep),
        "selection": [point for points in tried for point in points],
        "choices": [_choice(arm, points) for arm, points in zip(sweep["arms"], tried, strict=True)],
        "final": [_final(arm, groups.get((arm["budget"], arm["arm"]))) for arm in sweep["arms"]],
        "comparisons": comparisons,
        "baselines": list(_baselines(groups)),
        "pays": list(_break_even(comparisons)),
    }
    return report | {"verdict": verdict.verdict(report), "warnings": verdict.warnings(report)}


def write(folder: Path, report: Entry) -> None:
    """Write report.json and report.md; several processes may do so at once. Raises OSError."""
    html.write_json(folder / "report.json", report)
    html.write(folder / "report.md", "sweep.md", tables.content(report))


# ---------------------------------------------------------------------------------------------------- runs and progress


def _runs(sweep: Entry) -> Iterator[Entry]:
    """All runs that are planned so far."""
    yield from sweep["probes"]
    for arm in sweep["arms"]:
        for point in arm["points"]:
            yield from point["runs"]
        yield from arm["final"]


def _scored(runs: Sequence[Entry], split: str) -> list[Entry]:
    return [run for run in runs if run["report"] and run["report"][split]]


def _progress(sweep: Entry) -> dict[str, Any]:
    """diverged: selection runs whose loss was not finite. unplanned: number of runs that depend on a choice to come."""
    runs = list(_runs(sweep))
    states = {run["id"]: run["state"] for run in runs}
    failed = [
        {"run": run["id"], "why": run["why"], "exit_code": run["exit_code"], "log": f"logs/{run['id']}/output.txt"}
        for run in sweep["failed"]
    ]
    missing, total = sweep["missing"], sweep["totals"]["runs"]
    reports = [run["report"] for run in runs if run["report"]]
    return {
        "runs": total,
        "done": len(reports),
        "failed": [run for run in failed if run["run"] in missing],
        "diverged": [run for run in failed if run["run"] not in missing],
        "missing": [{"run": run, "state": states[run]} for run in missing if states[run] != "failed"],
        "unplanned": max(0, total - len(states)),
        "passes": sum(report["cost"]["forward_backward_passes"] or 0 for report in reports),
        "train_seconds": sweep["totals"]["train_seconds"],
    }


def _made_of(sweep: Entry) -> dict[str, Any] | None:
    """Model, data, machines and versions, from the reports of the runs; None before one is done."""
    reports = [run["report"] for run in _runs(sweep) if run["report"]]
    if not reports:
        return None
    finals = [run for arm in sweep["arms"] for run in arm["final"] if run["report"]]
    tried = [run for arm in sweep["arms"] for point in arm["points"] for run in point["runs"] if run["report"]]
    packages = dict.fromkeys(package for report in reports for package in report["versions"])

    def distinct(value: Callable[[Entry], str | None]) -> list[str]:
        return list(dict.fromkeys(found for report in reports if (found := value(report)) is not None))

    def splits(runs: Sequence[Entry]) -> dict[str, Any] | None:
        return {key: runs[0]["report"]["dataset"][key] for key in _SPLITS} if runs else None

    return {
        "model": reports[0]["model"],
        "dataset": {key: reports[0]["dataset"][key] for key in ("name", "source", "classes")}
        | {"selection": splits(tried), "final": splits(finals)},
        "machines": distinct(lambda report: report["machine"]),
        "devices": distinct(lambda report: ", ".join(report["devices"])),
        "precision": distinct(lambda report: report["precision"]),
        "versions": {
            package: distinct(lambda report, key=package: report["versions"].get(key))  # type: ignore[misc]
            for package in packages
        },
        "started": min(report["started"] for report in reports),
        "warnings": {run["id"]: run["report"]["warnings"] for run in finals if run["report"]["warnings"]},
    }


# ------------------------------------------------------------------------------------------------------------ selection


def _point(arm: Entry, point: Entry, missing: Sequence[str]) -> dict[str, Any]:
    """A point of an arm on validation. state: done, diverged (a loss was not finite) or missing.

    wilson_ci95: the interval of one run with the mean error of all seeds, which validate on the same images.
    """
    runs = _scored(point["runs"], "val")
    scores = [run["report"]["val"] for run in runs]
    errors = [score["top1_error"] for score in scores]
    interval = stats.student_interval(errors)
    is_complete = len(runs) == len(point["runs"])
    has_diverged = any(run["state"] == "failed" and run["id"] not in missing for run in point["runs"])
    mean = fmean(errors) if is_complete else None
    wilson = None
    if mean is not None:
        n = scores[0]["n"]
        wilson = [100 * bound for bound in stats.wilson_interval(round(mean * n / 100), n)]
    return {
        "budget": arm["budget"],
        "arm": arm["arm"],
        "point": point["point"],
        "label": arms.label(point["point"]),
        "chosen": point["chosen"],
        "state": "done" if is_complete else "diverged" if has_diverged else "missing",
        "runs": [run["id"] for run in runs],
        "seeds": [run["seed"] for run in runs],
        "images": scores[0]["n"] if scores else None,
        "val_errors": errors,
        "mean_error": mean,
        "wilson_ci95": wilson,
        "mean_error_ci95": [interval.low, interval.high] if interval and is_complete else None,
        "mean_loss": fmean(score["loss"] for score in scores) if is_complete else None,
        **finished_run.mean_costs([finished_run.costs(run["report"]) for run in runs]),
    }


def _choice(arm: Entry, points: Sequence[Entry]) -> dict[str, Any]:
    """The chosen point of an arm. uncertain: the next best point lies within Wilson's interval of the chosen one.

    at_end: settings whose chosen value is the smallest or the largest that was tried. by: the reason why it was chosen
    over the next best one.
    """
    chosen = arm["chosen"]
    entry: dict[str, Any] = {"budget": arm["budget"], "arm": arm["arm"], "point": chosen, "points": len(points)}
    entry |= {"label": None if chosen is None else arms.label(chosen), "mean_error": None, "wilson_ci95": None}
    entry |= {"images": None, "next": None, "uncertain": None, "by": None, "at_end": []}
    entry |= {"diverged": sum(point["state"] == "diverged" for point in points)}
    best = next((point for point in points if point["chosen"]), None)
    if best is None or best["mean_error"] is None:
        return entry
    others = [point for point in points if point is not best and point["mean_error"] is not None]
    second = min(others, key=lambda point: (point["mean_error"], point["mean_loss"]), default=None)
    return entry | {
        **{key: best[key] for key in ("mean_error", "wilson_ci95", "images")},
        "next": {key: second[key] for key in ("label", "mean_error", "mean_loss")} if second else None,
        "uncertain": second["mean_error"] <= best["wilson_ci95"][1] if second else None,
        "by": _reason(best, second),
        "at_end": list(_ends(best["point"], [point["point"] for point in points])),
    }


def _reason(best: Entry, second: Entry | None) -> str:
    """The reason why a point was chosen over the next best one: its error, its loss, or its place in the grid."""
    if second is None or second["mean_error"] != best["mean_error"]:
        return "error"
    return "loss" if second["mean_loss"] != best["mean_loss"] else "order"


def _ends(chosen: Entry, tried: Sequence[Entry]) -> Iterator[dict[str, Any]]:
    for key in _AT_END:
        values = sorted({point[key] for point in tried if key in point})
        if len(values) > 1 and chosen[key] in (values[0], values[-1]):
            yield {"setting": key, "value": chosen[key], "end": "lower" if chosen[key] == values[0] else "upper"}


# ---------------------------------------------------------------------------------------------------------- final runs


def _final(arm: Entry, group: Group | None) -> dict[str, Any]:
    """An arm on test. n: number of scored seeds, of those in `asked_seeds`; images: of test, the same for all.

    lost_seeds: seeds that failed. unscored_seeds: seeds that are done, on data without test images. by_checkpoint: mean
    error of the last and the best checkpoint; {} where the runs did not validate.
    """
    runs = group.runs if group else []
    has_both = bool(runs) and all({"last", "best"} <= run.test_errors.keys() for run in runs)
    summary = group.summary if group else dict.fromkeys(("mean_error", "mean_error_ci95", "no_interval"))
    return {
        "budget": arm["budget"],
        "arm": arm["arm"],
        "point": arm["chosen"],
        "label": None if arm["chosen"] is None else arms.label(arm["chosen"]),
        "by": "validation" if arm["points"] else "only point",
        "asked_seeds": [run["seed"] for run in arm["final"]],
        "lost_seeds": [run["seed"] for run in arm["final"] if run["state"] == "failed"],
        "unscored_seeds": [run["seed"] for run in arm["final"] if run["report"] and not run["report"]["test"]],
        "runs": [run.label for run in runs],
        "seeds": [run.seed for run in runs],
        "n": len(runs),
        "images": runs[0].scores["n"] if runs else None,
        "wrong": [run.scores["wrong"] for run in runs],
        "test_errors": [run.scores["top1_error"] for run in runs],
        "by_checkpoint": {name: fmean(run.test_errors[name] for run in runs) for name in ("last", "best") if has_both},
        **(summary if group else summary | finished_run.mean_costs([])),
    }


def _compare(group: Group, baseline: Group, budget: str | None) -> dict[str, Any]:
    baseline_runs = {run.seed: run for run in baseline.runs}
    tests = [
        {"seed": run.seed, **test}
        for run in group.runs
        if run.seed in baseline_runs and (test := comparison.mcnemar(run, baseline_runs[run.seed]))
    ]
    return {"budget": budget} | comparison.pair(group, baseline) | {"mcnemar": tests}


def _baselines(groups: Mapping[tuple[str | None, str], Group]) -> Iterator[dict[str, Any]]:
    for budget in dict.fromkeys(budget for budget, _ in groups):
        means = {arm: fmean(groups[budget, arm].errors.values()) for arm in _PLAIN if (budget, arm) in groups}
        if means:
            better = min(means, key=lambda arm: means[arm])
            yield {"budget": budget, "arm": better, "mean_errors": means}


def _break_even(comparisons: Sequence[Entry]) -> Iterator[dict[str, Any]]:
    """For each arm with SAM and each unit with several budgets: where its error becomes less than that of sgd.

    from: the smallest budget at which, and at all larger ones, its mean error is less. sure_from: the same for the
    whole interval of the difference.
    """
    by_unit: dict[tuple[str, str], list[tuple[float, Entry]]] = {}
    for pair in comparisons:
        if pair["budget"] and pair["baseline"] == "sgd" and arms.has_sam(pair["label"]):
            budget = Budget.parse(pair["budget"])
            by_unit.setdefault((pair["label"], budget.unit), []).append((budget.amount, pair))
    for (arm, unit), amounts in by_unit.items():
        pairs = [pair for _, pair in sorted(amounts, key=lambda amount_and_pair: amount_and_pair[0])]
        if len(pairs) > 1:
            yield {
                "arm": arm,
                "baseline": "sgd",
                "unit": unit,
                "tried": [pair["budget"] for pair in pairs],
                "from": _first_budget(pairs, lambda difference: bool(difference["mean"] < 0)),
                "sure_from": _first_budget(pairs, lambda difference: bool((difference["ci95"] or [0, 0])[1] < 0)),
            }


def _first_budget(pairs: Sequence[Entry], holds: Callable[[Entry], bool]) -> str | None:
    """The first budget from which on something holds for all differences."""
    first = None
    for pair in reversed(pairs):
        if not holds(pair["difference"]):
            break
        first = pair["budget"]
    return first
