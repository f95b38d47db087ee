"""Run folders -> what differs between runs, and what of it is more than chance: a pure function of what is on disk.

Runs whose settings differ in the seed alone are one group. The first group is the baseline of all others.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from samtune.errors import UsageError
from samtune.report import finished_run, stats
from samtune.report.finished_run import FinishedRun

SCHEMA_VERSION = 1
_NEARLY = 1.05  # costs with a smaller ratio are nearly equal
_ONE_TEST = "; the test says whether these two models differ on these images"


@dataclass(frozen=True, eq=False)
class Group:
    """Runs that differ in the seed alone, and each has another one. name: what it is called, else after its first."""

    runs: list[FinishedRun]
    name: str = ""

    @property
    def label(self) -> str:
        """What it is called."""
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
        """Means over the runs; None where that of a run is not known."""
        costs = {key: [run.cost[key] for run in self.runs] for key in self.runs[0].cost}
        return {key: None if None in values else fmean(values) for key, values in costs.items()}


def compare(folders: Sequence[Path]) -> dict[str, Any]:
    """The comparison of two or more runs that are done: kind "comparison", schema version 1.

    runs: the error of each with Wilson's interval, on what it was scored, and what it cost. differs: settings and
    circumstances that are not the same for all, by run. groups: mean errors over seeds with Student's interval. pairs:
    each group against the first one. Errors are in percent, differences in percentage points, times in seconds; what
    is not known is None.

    Raises:
        UsageError: less than two runs, one of them twice, a folder without a run, or a run that is not done.
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
        "runs": [_run_entry(run) for run in runs],
        "differs": _differs(runs),
        "groups": [_group_entry(group) for group in groups],
        "pairs": [pair(group, groups[0]) for group in groups[1:]],
    }


def _labels(paths: Sequence[Path]) -> list[str]:
    """The last parts of the paths, as many as it takes to tell them apart."""
    for count in range(1, max(len(path.parts) for path in paths)):
        labels = [os.path.join(*path.parts[-count:]) for path in paths]
        if len(set(labels)) == len(labels):
            return labels
    return [str(path) for path in paths]


def _groups(runs: Sequence[FinishedRun]) -> list[Group]:
    """In the order of their first runs. The same seed once more is no other seed: it begins another group."""
    groups: list[Group] = []
    for run in runs:
        for group in groups:
            if group.runs[0].settings == run.settings and run.seed not in group.errors:
                group.runs.append(run)
                break
        else:
            groups.append(Group([run]))
    return groups


# ----------------------------------------------------------------------------------------------------------- entries


def _run_entry(run: FinishedRun) -> dict[str, Any]:
    return {"label": run.label, "path": str(run.path), "seed": run.seed, **run.scores, **run.cost}


def _group_entry(group: Group) -> dict[str, Any]:
    errors = list(group.errors.values())
    interval = stats.student_interval(errors)
    return {
        "label": group.label,
        "runs": [run.label for run in group.runs],
        "seeds": list(group.errors),
        "n": len(errors),
        "split": group.runs[0].scores["split"],
        "mean_error": fmean(errors),
        "mean_error_ci95": [interval.low, interval.high] if interval else None,
        "no_interval": None if interval else stats.why_no_interval(len(errors)),
        **group.cost,
    }


def _differs(runs: Sequence[FinishedRun]) -> dict[str, dict[str, Any]]:
    """What is not the same in all runs -> its value by run, None where a setting is left open."""
    known = [{**run.settings, "seed": run.seed, **run.circumstances} for run in runs]
    keys = dict.fromkeys(key for values in known for key in values)
    values = {key: [own.get(key) for own in known] for key in keys}
    return {
        key: {run.label: value for run, value in zip(runs, found, strict=True)}
        for key, found in values.items()
        if any(value != found[0] for value in found)
    }


def pair(group: Group, baseline: Group) -> dict[str, Any]:
    """A group against the baseline: over common seeds if there are two, and image by image if there is one run each."""
    common = [seed for seed in group.errors if seed in baseline.errors]
    one_each = len(group.runs) == len(baseline.runs) == 1
    paired = one_each or len(common) > 1
    a, b = ([one.errors[s] for s in common] if len(common) > 1 else [*one.errors.values()] for one in (group, baseline))
    unlike = next(
        filter(None, (incomparable_reason(run, baseline.runs[0]) for run in baseline.runs[1:] + group.runs)), None
    )
    seeds = None if unlike else (stats.paired_difference if paired else stats.independent_difference)(a, b)
    same = "difference" if paired else "error"
    no_interval = None if seeds else unlike or stats.why_no_interval(min(len(a), len(b)), same)
    return {
        "label": group.label,
        "baseline": baseline.label,
        "difference": {
            "mean": fmean(a) - fmean(b),
            "of_means": [fmean(a), fmean(b)],
            "ci95": [seeds.low, seeds.high] if seeds else None,
            "p": seeds.p if seeds else None,
            "paired": paired,
            "n": len(a),
            "baseline_n": len(b),
            "no_interval": no_interval,
        },
        "error_reduction": None if unlike else stats.error_reduction(a, b, paired=paired)._asdict(),
        "mcnemar": mcnemar(group.runs[0], baseline.runs[0]) if one_each else None,
        "cost": {
            key: _equality(group.cost[key], baseline.cost[key]) for key in ("epochs", "steps", "passes", "seconds")
        },
        "limits": list(_caveats(group, baseline, common, unlike, no_interval)),
    }


def incomparable_reason(run: FinishedRun, other: FinishedRun) -> str | None:
    """Why the predictions of two runs cannot be compared image by image; None if they can."""
    if run.dataset != other.dataset:
        return f"{run.label} is of {run.dataset}, {other.label} of {other.dataset}"
    split, other_split = run.scores["split"], other.scores["split"]
    if split != other_split:
        return f"{run.label} was scored on {split}, {other.label} on {other_split}"
    if run.predictions is None or other.predictions is None:
        one = run if run.predictions is None else other
        return f"predictions.parquet of {one.label} is not there, or not of what its report counted"
    if not np.array_equal(run.predictions.images, other.predictions.images):
        n, other_n = run.scores["n"], other.scores["n"]
        return f"{run.label} and {other.label} were scored on other images, or labels, of {split}: {n} and {other_n}"
    return None


def mcnemar(run: FinishedRun, baseline: FinishedRun) -> dict[str, Any] | None:
    """The test of two runs on their images, in words of a report; None where they were not scored on the same ones."""
    if incomparable_reason(run, baseline) or run.predictions is None or baseline.predictions is None:
        return None
    test = stats.mcnemar(run.predictions.wrong, baseline.predictions.wrong)
    return {"only_wrong": test.only_a_wrong, "baseline_only_wrong": test.only_b_wrong, "p": test.p}


def _equality(own: float | None, baseline: float | None) -> dict[str, Any]:
    verdict = "not equal"
    if own is None or baseline is None:
        verdict = "not known"
    elif own == baseline:
        verdict = "equal"
    elif max(own, baseline) <= _NEARLY * min(own, baseline):
        verdict = "nearly equal"
    ratio = own / baseline if own is not None and baseline else None
    return {"run": own, "baseline": baseline, "ratio": ratio, "verdict": verdict}


def _caveats(
    group: Group, baseline: Group, common: Sequence[int], unlike: str | None, no_interval: str | None
) -> Iterator[str]:
    """What cannot be concluded from a pair, and why."""
    if unlike:
        yield f"no test: {unlike}"
    if len(group.runs) == len(baseline.runs) == 1:
        yield f"one seed each: how much another seed would differ is not known{'' if unlike else _ONE_TEST}"
    elif no_interval and not unlike:
        yield no_interval
    if len(common) > 1:
        for one in (group, baseline):
            alone = [str(seed) for seed in one.errors if seed not in common]
            if alone:
                yield f"seeds of {one.label} that have no partner are left out of the pairs: {', '.join(alone)}"
    places = [(run.circumstances["machine"], run.circumstances["devices"]) for run in group.runs + baseline.runs]
    if len(set(places)) > 1:
        yield "seconds were taken on different machines or devices"


# ------------------------------------------------------------------------------------------------------------- words


def write(folder: Path, comparison: Mapping[str, Any]) -> None:
    """Write comparison.json and comparison.md."""
    content = json.dumps(comparison, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    (folder / "comparison.json").write_text(content, encoding="utf-8")
    (folder / "comparison.md").write_text(markdown(comparison), encoding="utf-8")


def markdown(comparison: Mapping[str, Any]) -> str:
    """The comparison as a page of markdown."""
    page = [f"# Comparison of {len(comparison['runs'])} runs", ""]
    for title, rows in tables(comparison).items():
        page += [f"## {title}", "", *markdown_table(rows)]
    for title, said in paragraphs(comparison).items():
        page += [f"## {title}", "", *(f"- {line}" for line in said), ""]
    return "\n".join(page)


def tables(comparison: Mapping[str, Any]) -> dict[str, list[dict[str, str | float | None]]]:
    """The tables that are not empty, by title; errors are top-1."""
    found = {
        "Runs": _run_rows(comparison),
        "Means over seeds": _group_rows(comparison),
        "What differs": _difference_rows(comparison),
    }
    return {title: rows for title, rows in found.items() if rows}


def paragraphs(comparison: Mapping[str, Any]) -> dict[str, list[str]]:
    """What is said of each pair, and of all numbers, by title."""
    found = {f"{pair['label']} against {pair['baseline']}": _pair_lines(pair) for pair in comparison["pairs"]}
    notes = ["an interval of a run is Wilson's: how well these images pin down this model; other seeds may differ more"]
    if _group_rows(comparison):
        notes.append("an interval of a mean is Student's: where that of very many seeds may lie, on these images")
        without = (group for group in comparison["groups"] if group["no_interval"])
        notes += [f"{group['label']} has no interval; {group['no_interval']}" for group in without]
    tests = sum(pair["mcnemar"] is not None or pair["difference"]["p"] is not None for pair in comparison["pairs"])
    if tests > 1:
        notes.append(f"each p is of one test alone; for {tests} together, look for p < {0.05 / tests:.2g} (Bonferroni)")
    return found | {"How to read this": notes}


def _run_rows(comparison: Mapping[str, Any]) -> list[dict[str, str | float | None]]:
    """The table of runs."""
    return [
        {
            "run": run["label"],
            "seed": run["seed"],
            "scored": run["split"],
            "error %": run["top1_error"],
            "95 % interval": "{:.2f} to {:.2f}".format(*run["top1_error_ci95"]),
            "wrong": f"{run['wrong']} of {run['n']}",
            **_cost_cells(run),
        }
        for run in comparison["runs"]
    ]


def _group_rows(comparison: Mapping[str, Any]) -> list[dict[str, str | float | None]]:
    """The table of means over seeds; empty if no setting has more than one."""
    if all(group["n"] == 1 for group in comparison["groups"]):
        return []
    return [
        {
            "runs": group["label"],
            "seeds": group["n"],
            "mean error %": group["mean_error"],
            "95 % interval": interval_words(group["mean_error_ci95"]),
            **_cost_cells(group),
        }
        for group in comparison["groups"]
    ]


def _difference_rows(comparison: Mapping[str, Any]) -> list[dict[str, str | float | None]]:
    """The table of what differs: a row per setting, a column per group."""
    return [
        {"setting": key}
        | {
            group["label"]: ", ".join(dict.fromkeys(_value(values[label]) for label in group["runs"]))
            for group in comparison["groups"]
        }
        for key, values in comparison["differs"].items()
    ]


def _pair_lines(pair: Mapping[str, Any]) -> list[str]:
    """A pair in sentences: what was found, at what cost, and what it does not say."""
    lines, images = difference_lines(pair), pair["mcnemar"]
    if images:
        lines.append(
            f"images wrong by {pair['label']} alone: {images['only_wrong']}, by {pair['baseline']} alone: "
            f"{images['baseline_only_wrong']} (McNemar's exact test: {p_words(images['p'])})"
        )
    return [*lines, cost_words(pair["cost"]), *pair["limits"]]


def difference_lines(pair: Mapping[str, Any]) -> list[str]:
    """The difference of the errors of a pair, and what share of the baseline's error that is."""
    found, reduction = pair["difference"], pair["error_reduction"]
    test = "paired t test" if found["paired"] else "Welch's t test"
    more = ""
    if found["ci95"]:
        more = f" (95 % interval {signed(found['ci95'])}; {test}, {pairs_words(found)}: {p_words(found['p'])})"
    lines = [f"difference of errors: {found['mean']:+.2f} percentage points{more}"]
    if reduction and reduction["percent"] is not None:
        interval = f" (no interval: {reduction['reason']})" if found["ci95"] else ""
        if reduction["low"] is not None:
            interval = " (95 % interval {low:.1f} to {high:.1f})".format(**reduction)
        lines.append(f"error reduction: {reduction['percent']:.1f} %{interval}")
    return lines


def _cost_cells(entry: Mapping[str, Any]) -> dict[str, str | float | None]:
    cells = {"epochs": entry["epochs"], "passes": entry["passes"], "time s": entry["seconds"]}
    return {key: None if value is None else number_words(value) for key, value in cells.items()}


def cost_words(cost: Mapping[str, Mapping[str, Any]]) -> str:
    """What of the cost of a pair is equal, and what is not."""
    said: dict[str, list[str]] = {}
    for key, both in cost.items():
        numbers = [number_words(both[of]) for of in ("run", "baseline") if both[of] is not None]
        words = " against ".join(dict.fromkeys(numbers))
        words += f" (ratio {both['ratio']:.3g})" if both["verdict"] == "not equal" and both["ratio"] is not None else ""
        said.setdefault(both["verdict"], []).append(key if both["verdict"] == "not known" else f"{key} {words}")
    order = ("equal", "nearly equal", "not equal", "not known")
    return "; ".join(f"{verdict}: {', '.join(said[verdict])}" for verdict in order if verdict in said)


def _value(setting: object) -> str:
    if isinstance(setting, float):
        return f"{setting:g}"
    return "open" if setting is None else str(setting)


def number_words(value: float) -> str:
    """A cost, with as many digits as tell something."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def interval_words(limits: Sequence[float] | None) -> str | None:
    """An interval of errors in percent."""
    return None if limits is None else f"{limits[0]:.2f} to {limits[1]:.2f}"


def signed(limits: Sequence[float]) -> str:
    """An interval of a difference."""
    return f"{limits[0]:+.2f} to {limits[1]:+.2f}"


def pairs_words(difference: Mapping[str, Any]) -> str:
    """Over how many seeds a difference is."""
    n, of_baseline, paired = (difference[key] for key in ("n", "baseline_n", "paired"))
    return f"{n} seeds in pairs" if paired else f"{n} and {of_baseline} seeds"


def p_words(value: float) -> str:
    """The p of a test."""
    return "p < 0.0001" if value < 1e-4 else f"p = {value:.2g}"


def markdown_table(rows: Sequence[Mapping[str, str | float | None]]) -> list[str]:
    """Rows as lines of markdown, with an empty one behind them."""
    lines = ["| " + " | ".join(_cell(name) for name in rows[0]) + " |", "|---" * len(rows[0]) + "|"]
    return [*lines, *("| " + " | ".join(map(_cell, row.values())) + " |" for row in rows), ""]


def _cell(value: str | float | None) -> str:
    text = "-" if value is None else f"{value:.2f}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")
