"""Comparison of run folders: how their settings and errors differ, with intervals and tests.

Runs whose settings differ only in the seed form a group. The first group is the baseline of all others.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from samtune.errors import UsageError
from samtune.report import finished_run, html, stats
from samtune.report.finished_run import FinishedRun

SCHEMA_VERSION = 1
_COMPARED_COSTS = ("epochs", "steps", "passes", "seconds")
_NEARLY = 1.05  # costs with a smaller ratio are nearly equal
_ONE_TEST = "; the test says whether these two models differ on these images"

Report = Mapping[str, Any]
Rows = list[dict[str, str | float | None]]


@dataclass(frozen=True, eq=False)
class Group:
    """Runs that differ only in the seed. name: its label; by default made from that of its first run."""

    runs: list[FinishedRun]
    name: str = ""

    @property
    def label(self) -> str:
        """Name of the group."""
        if self.name:
            return self.name
        more = len(self.runs) - 1
        return self.runs[0].label + (f" + {more} seed{'s' if more > 1 else ''}" if more else "")

    @property
    def errors(self) -> dict[int, float]:
        """Top-1 error in percent, by seed."""
        return {run.seed: run.scores["top1_error"] for run in self.runs}

    @property
    def cost(self) -> dict[str, float | None]:
        """Mean costs of the runs; None where the cost of a run is not known."""
        return finished_run.mean_costs([run.cost for run in self.runs])

    @property
    def entry(self) -> dict[str, Any]:
        """The group as comparisons have it."""
        about = {"label": self.label, "runs": [run.label for run in self.runs], "seeds": list(self.errors)}
        return about | {"n": len(self.runs), "split": self.runs[0].scores["split"], **self.summary}

    @property
    def summary(self) -> dict[str, Any]:
        """Mean error with Student's interval over seeds, and mean costs, as reports have them."""
        errors = list(self.errors.values())
        interval = stats.student_interval(errors)
        return {
            "mean_error": fmean(errors),
            "mean_error_ci95": [interval.low, interval.high] if interval else None,
            "no_interval": None if interval else stats.no_interval_reason(len(errors)),
            **self.cost,
        }


def compare(folders: Sequence[Path]) -> dict[str, Any]:
    """Compare two or more finished runs: kind "comparison", schema version 1.

    runs: split, error with Wilson's interval, and cost of each run. differs: settings and circumstances that are not
    the same for all, by run. groups: mean errors over seeds with Student's interval. pairs: each group against the
    first one. Errors are in percent, differences in percentage points, times in seconds; unknown values are None.

    Raises:
        UsageError: less than two runs, a run given twice, a folder without a run, or a run that is not done.
        CheckpointError: files of a run that cannot be read.
    """
    if len(folders) < 2:
        raise UsageError("a comparison needs at least two runs", hint="give their folders")
    paths = [path.resolve() for path in folders]
    for path, given in zip(paths, folders, strict=True):
        if paths.count(path) > 1:
            raise UsageError(f"run {given} is given twice", hint="give each run once")
    runs = [finished_run.read(path, label) for path, label in zip(folders, _labels(paths), strict=True)]
    groups = _groups(runs)
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": "comparison",
        "runs": [
            {"label": run.label, "path": str(run.path), "seed": run.seed, **run.scores, **run.cost} for run in runs
        ],
        "differs": _differs(runs),
        "groups": [group.entry for group in groups],
        "pairs": [pair(group, groups[0]) for group in groups[1:]],
    }


def _labels(paths: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that differ from each other."""
    for count in range(1, max(len(path.parts) for path in paths)):
        labels = [os.path.join(*path.parts[-count:]) for path in paths]
        if len(set(labels)) == len(labels):
            return labels
    return [str(path) for path in paths]


def _groups(runs: Sequence[FinishedRun]) -> list[Group]:
    """Group runs in the order of their first ones. A seed that a group already has starts another group."""
    groups: list[Group] = []
    for run in runs:
        fitting = (group for group in groups if group.runs[0].settings == run.settings and run.seed not in group.errors)
        if group := next(fitting, None):
            group.runs.append(run)
        else:
            groups.append(Group([run]))
    return groups


# ----------------------------------------------------------------------------------------------------------- entries


def _differs(runs: Sequence[FinishedRun]) -> dict[str, dict[str, Any]]:
    """Settings and circumstances that differ -> value by run, None where a setting is left open."""
    by_run = {run.label: {**run.settings, "seed": run.seed, **run.circumstances} for run in runs}
    keys = dict.fromkeys(key for values in by_run.values() for key in values)
    rows = {key: {label: values.get(key) for label, values in by_run.items()} for key in keys}
    return {key: row for key, row in rows.items() if any(value != row[runs[0].label] for value in row.values())}


def pair(group: Group, baseline: Group) -> dict[str, Any]:
    """Compare a group with the baseline: over their common seeds if there are two, by images if each is one run."""
    common = [seed for seed in group.errors if seed in baseline.errors]
    one_each = len(group.runs) == len(baseline.runs) == 1
    paired = one_each or len(common) > 1
    a, b = ([one.errors[s] for s in common] if len(common) > 1 else [*one.errors.values()] for one in (group, baseline))
    reasons = (incomparable_reason(run, baseline.runs[0]) for run in baseline.runs[1:] + group.runs)
    incomparable = next(filter(None, reasons), None)
    seeds = None if incomparable else (stats.paired_difference if paired else stats.independent_difference)(a, b)
    same = "difference" if paired else "error"
    no_interval = None if seeds else incomparable or stats.no_interval_reason(min(len(a), len(b)), same)
    return {
        "label": group.label,
        "baseline": baseline.label,
        "difference": {
            "mean": fmean(a) - fmean(b),
            "of_means": [fmean(a), fmean(b)],
            "ci95": [seeds.low, seeds.high] if seeds else None,
            "p": seeds.p if seeds else None,
            **{"paired": paired, "n": len(a), "baseline_n": len(b), "no_interval": no_interval},
        },
        "error_reduction": None if incomparable else stats.error_reduction(a, b, paired=paired)._asdict(),
        "mcnemar": mcnemar(group.runs[0], baseline.runs[0]) if one_each else None,
        "cost": {key: _compare_cost(group.cost[key], baseline.cost[key]) for key in _COMPARED_COSTS},
        "limits": list(_caveats(group, baseline, common, incomparable, no_interval)),
    }


def incomparable_reason(run: FinishedRun, other: FinishedRun) -> str | None:
    """The reason why two runs cannot be compared image by image; None if they can."""
    if run.dataset != other.dataset:
        return f"{run.label} is of {run.dataset}, {other.label} of {other.dataset}"
    split, other_split = run.scores["split"], other.scores["split"]
    if split != other_split:
        return f"{run.label} was scored on {split}, {other.label} on {other_split}"
    if run.predictions is None or other.predictions is None:
        without = run if run.predictions is None else other
        return f"predictions.parquet of {without.label} is not there, or not of what its report counted"
    if not np.array_equal(run.predictions.images, other.predictions.images):
        n, other_n = run.scores["n"], other.scores["n"]
        return f"{run.label} and {other.label} were scored on other images, or labels, of {split}: {n} and {other_n}"
    return None


def mcnemar(run: FinishedRun, baseline: FinishedRun) -> dict[str, Any] | None:
    """McNemar's test of two runs, as a report has it; None where they were not scored on the same images."""
    if incomparable_reason(run, baseline) or run.predictions is None or baseline.predictions is None:
        return None
    test = stats.mcnemar(run.predictions.wrong, baseline.predictions.wrong)
    return {"only_wrong": test.only_a_wrong, "baseline_only_wrong": test.only_b_wrong, "p": test.p}


def _compare_cost(cost: float | None, baseline: float | None) -> dict[str, Any]:
    verdict = "not equal"
    if cost is None or baseline is None:
        verdict = "not known"
    elif cost == baseline:
        verdict = "equal"
    elif max(cost, baseline) <= _NEARLY * min(cost, baseline):
        verdict = "nearly equal"
    ratio = cost / baseline if cost is not None and baseline else None
    return {"run": cost, "baseline": baseline, "ratio": ratio, "verdict": verdict}


def _caveats(
    group: Group, baseline: Group, common: Sequence[int], incomparable: str | None, no_interval: str | None
) -> Iterator[str]:
    """What cannot be concluded from a pair, and why."""
    if incomparable:
        yield f"no test: {incomparable}"
    if len(group.runs) == len(baseline.runs) == 1:
        yield f"one seed each: how much another seed would differ is not known{'' if incomparable else _ONE_TEST}"
    elif no_interval and not incomparable:
        yield no_interval
    for either in (group, baseline) if len(common) > 1 else ():
        unpaired = [str(seed) for seed in either.errors if seed not in common]
        if unpaired:
            yield f"seeds of {either.label} that have no partner are left out of the pairs: {', '.join(unpaired)}"
    machines = {(run.circumstances["machine"], run.circumstances["devices"]) for run in group.runs + baseline.runs}
    if len(machines) > 1:
        yield "seconds were taken on different machines or devices"


# -------------------------------------------------------------------------------------------------------------- text


def write(folder: Path, comparison: Report) -> None:
    """Write comparison.json and comparison.md. Raises OSError."""
    html.write_json(folder / "comparison.json", comparison)
    html.write(folder / "comparison.md", "comparison.md", content(comparison))


def markdown(comparison: Report) -> str:
    """The comparison as Markdown."""
    return html.render("comparison.md", content(comparison))


def content(comparison: Report) -> dict[str, Any]:
    """Title, tables and paragraphs, for comparison.md and comparison.html."""
    title = f"Comparison of {len(comparison['runs'])} runs"
    return {"title": title, "tables": tables(comparison), "paragraphs": paragraphs(comparison)}


def tables(comparison: Report) -> dict[str, Rows]:
    """The tables that are not empty, by title; errors are top-1."""
    rows = {"Runs": _run_rows(comparison), "Means over seeds": _group_rows(comparison)}
    rows |= {"What differs": _setting_rows(comparison)}
    return {title: found for title, found in rows.items() if found}


def paragraphs(comparison: Report) -> dict[str, list[str]]:
    """Sentences about each pair, and about all numbers, by title."""
    pairs = comparison["pairs"]
    notes = ["an interval of a run is Wilson's: how well these images pin down this model; other seeds may differ more"]
    if _group_rows(comparison):
        notes.append("an interval of a mean is Student's: where that of very many seeds may lie, on these images")
        without = (group for group in comparison["groups"] if group["no_interval"])
        notes += [f"{group['label']} has no interval; {group['no_interval']}" for group in without]
    tests = sum(pair["mcnemar"] is not None or pair["difference"]["p"] is not None for pair in pairs)
    if tests > 1:
        notes.append(f"each p is of one test alone; for {tests} together, look for p < {0.05 / tests:.2g} (Bonferroni)")
    about = {f"{pair['label']} against {pair['baseline']}": pair_lines(pair) for pair in pairs}
    return about | {"How to read this": notes}


def _run_rows(comparison: Report) -> Rows:
    return [
        {
            "run": run["label"],
            "seed": run["seed"],
            "scored": run["split"],
            "error %": run["top1_error"],
            "95 % interval": format_interval(run["top1_error_ci95"]),
            "wrong": f"{run['wrong']} of {run['n']}",
            **_cost_cells(run),
        }
        for run in comparison["runs"]
    ]


def _group_rows(comparison: Report) -> Rows:
    """Means over seeds; empty if every group is a single run."""
    if all(group["n"] == 1 for group in comparison["groups"]):
        return []
    return [
        {
            "runs": group["label"],
            "seeds": group["n"],
            "mean error %": group["mean_error"],
            "95 % interval": group["mean_error_ci95"] and format_interval(group["mean_error_ci95"]),
            **_cost_cells(group),
        }
        for group in comparison["groups"]
    ]


def _setting_rows(comparison: Report) -> Rows:
    """Settings that differ: a row per setting, a column per group."""
    return [
        {"setting": key}
        | {
            group["label"]: ", ".join(dict.fromkeys(_format_setting(values[label]) for label in group["runs"]))
            for group in comparison["groups"]
        }
        for key, values in comparison["differs"].items()
    ]


def pair_lines(pair: Report) -> list[str]:
    """Sentences about a pair: difference, test of images if each is one run, cost, and caveats."""
    lines, images = difference_lines(pair), pair["mcnemar"]
    if isinstance(images, dict):  # a sweep has a list: one test for each seed
        lines.append(
            f"images wrong by {pair['label']} alone: {images['only_wrong']}, by {pair['baseline']} alone: "
            f"{images['baseline_only_wrong']} (McNemar's exact test: {format_p(images['p'])})"
        )
    return [*lines, describe_cost(pair["cost"]), *pair["limits"]]


def difference_lines(pair: Report) -> list[str]:
    """The difference of the errors of a pair, and the error reduction in percent of the baseline's error."""
    difference, reduction = pair["difference"], pair["error_reduction"]
    test = "paired t test" if difference["paired"] else "Welch's t test"
    more = ""
    if difference["ci95"]:
        interval = format_interval(difference["ci95"], "+.2f")
        more = f" (95 % interval {interval}; {test}, {count_seeds(difference)}: {format_p(difference['p'])})"
    lines = [f"difference of errors: {difference['mean']:+.2f} percentage points{more}"]
    if reduction and reduction["percent"] is not None:
        interval = f" (no interval: {reduction['reason']})" if difference["ci95"] else ""
        if reduction["low"] is not None:
            interval = " (95 % interval {low:.1f} to {high:.1f})".format(**reduction)
        lines.append(f"error reduction: {reduction['percent']:.1f} %{interval}")
    return lines


def _cost_cells(entry: Report) -> dict[str, str | float | None]:
    names = {"epochs": "epochs", "passes": "passes", "time s": "seconds"}
    return {name: format_cost(entry[key]) for name, key in names.items()}


def describe_cost(cost: Mapping[str, Report]) -> str:
    """Which costs of a pair are equal, and which are not."""
    parts: dict[str, list[str]] = {}
    for key, compared in cost.items():
        numbers = (format_cost(compared[which]) for which in ("run", "baseline"))
        text = f"{key} {' against '.join(dict.fromkeys(number for number in numbers if number))}"
        if compared["verdict"] == "not equal" and compared["ratio"] is not None:
            text += f" (ratio {compared['ratio']:.3g})"
        parts.setdefault(compared["verdict"], []).append(key if compared["verdict"] == "not known" else text)
    order = ("equal", "nearly equal", "not equal", "not known")
    return "; ".join(f"{verdict}: {', '.join(parts[verdict])}" for verdict in order if verdict in parts)


def _format_setting(value: object) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return "open" if value is None else str(value)


def format_cost(value: float | None) -> str | None:
    """A cost with three significant digits, or as a whole number."""
    return None if value is None else f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def format_interval(bounds: Sequence[float], form: str = ".2f") -> str:
    """An interval of errors in percent; of differences with form "+.2f"."""
    return f"{bounds[0]:{form}} to {bounds[1]:{form}}"


def count_seeds(difference: Report) -> str:
    """Number of seeds that a difference is taken over."""
    n, baseline_n, paired = (difference[key] for key in ("n", "baseline_n", "paired"))
    return f"{n} seeds in pairs" if paired else f"{n} and {baseline_n} seeds"


def format_p(value: float) -> str:
    """The p of a test."""
    return "p < 0.0001" if value < 1e-4 else f"p = {value:.2g}"
