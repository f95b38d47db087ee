"""Sweep folder -> report.html: what its report says, and the curves of its runs, drawn."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from samtune.files import write_atomic
from samtune.report import html, learning_curves, svg_charts
from samtune.report.html import Chart, Column, Table
from samtune.report.svg_charts import Series, Words
from samtune.sweep import ledger, tables, verdict

_Report = Mapping[str, Any]
_UNKNOWN = (None, None)  # limits of an interval that there is not
_BOUNDS = {"from": ".2f", "to": ".2f"}


def write(path: Path, folder: Path, report: _Report) -> None:
    """Write the page of a sweep whose report is `report`; several processes may do so. Raises OSError."""
    write_atomic(path, html.render("sweep.html", content(folder, report)))


def content(folder: Path, report: _Report) -> dict[str, Any]:
    """What templates/sweep.html shows of a sweep."""
    chosen = list(_choices(report))
    cost, curves = list(_costs(report)), list(_curves(folder, report))
    sections = {"result": "Result"}
    sections |= {"arms": "Arms on test"} if any(entry["n"] for entry in report["final"]) else {}
    sections |= {"comparisons": "Comparisons"} if report["comparisons"] else {}
    sections |= {"cost": "Cost"} if cost else {}
    sections |= {"choice": "Choice on validation"} if chosen else {}
    sections |= {"curves": "Learning curves"} if curves else {}
    sections |= {"runs": "Runs", "settings": "Recipe", "provenance": "Provenance"}
    made = report["made_of"]
    return {
        "report": report,
        "title": tables.title(report),
        "subtitle": f"{tables.asked_words(report['asked'])}.",
        "sections": sections,
        "budgets": report["asked"]["budgets"] != [None],
        "differences": _difference_paths(report),
        "spread": _spread(report) if "arms" in sections else None,
        "forest": _forest(report) if "comparisons" in sections else None,
        "pairs": [(verdict.pair_title(pair), verdict.pair_lines(pair)) for pair in report["comparisons"]],
        "images": _images(report),
        "costs": cost,
        "pays": [verdict.pays_words(entry) for entry in report["pays"]],
        "chosen": chosen,
        "curves": curves,
        "progress": tables.progress_words(report["progress"]),
        "incidents": list(_incidents(report)),
        "notes": verdict.notes(report),
        "recipe": (folder / "sweep.toml").read_text(encoding="utf-8"),
        "provenance": list(tables.made_of_words(made).items()) if made else [],
    }


def _name(report: _Report, entry: _Report) -> str:
    """Of an arm in a chart."""
    return f"{entry['arm']}, {entry['budget']}" if entry["budget"] else str(entry["arm"])


def _table(
    report: _Report, caption: str, columns: Sequence[Column], rows: Iterable[tuple[_Report, Sequence[Any]]]
) -> Table:
    """Rows as (what a row is of, its cells); with budgets, they come first."""
    if report["asked"]["budgets"] == [None]:
        return Table(caption, columns, [cells for _, cells in rows])
    return Table(caption, [Column("budget"), *columns], [(entry["budget"], *cells) for entry, cells in rows])


def _columns(forms: Mapping[str, str | None]) -> list[Column]:
    return [Column(name.rstrip(), form) for name, form in forms.items()]


# ----------------------------------------------------------------------------------------------------------- last fits


def _difference_paths(report: _Report) -> dict[str, Any]:
    """For the table of arms: against which arm, and the number of the comparison of each last fit."""
    baseline = tables.baseline(report)
    places = {
        (pair["budget"], pair["label"]): i
        for i, pair in enumerate(report["comparisons"])
        if pair["baseline"] == baseline
    }
    return {
        "baseline": baseline,
        "places": [places.get((entry["budget"], entry["arm"])) for entry in report["final"]],
    }


def _spread(report: _Report) -> Chart:
    there = [entry for entry in report["final"] if entry["n"]]
    best = min(there, key=lambda entry: entry["mean_error"])
    words = Words(
        "spread", "Test error by arm", f"Lowest mean: {_name(report, best)}, {best['mean_error']:.2f} percent."
    )
    svg = svg_charts.intervals(
        words,
        [_name(report, entry) for entry in there],
        [entry["mean_error"] for entry in there],
        [entry["mean_error_ci95"] for entry in there],
        x_label="test error (%)",
        dots=[entry["test_errors"] for entry in there],
        zero="anywhere",
    )
    table = _table(
        report,
        "test error of each last fit",
        _columns({"arm": None, "seed": "d", "error (%)": ".2f", "wrong": "d", "images": "d"}),
        (
            (entry, (entry["arm"], seed, error, wrong, entry["images"]))
            for entry in there
            for seed, error, wrong in zip(entry["seeds"], entry["test_errors"], entry["wrong"], strict=True)
        ),
    )
    caption = "Test error: the mean over seeds with Student's 95 % interval, and below it a small dot for each seed."
    return Chart(svg, caption, table)


def _forest(report: _Report) -> Chart:
    pairs = report["comparisons"]
    found = [pair["difference"] for pair in pairs]
    clear = sum(bool(one["ci95"]) and not one["ci95"][0] <= 0 <= one["ci95"][1] for one in found)
    svg = svg_charts.intervals(
        Words("forest", "Differences of test errors", f"{clear} of {len(pairs)} intervals exclude zero."),
        [verdict.pair_title(pair).replace(" against ", " \N{MINUS SIGN} ") for pair in pairs],
        [one["mean"] for one in found],
        [one["ci95"] for one in found],
        x_label="difference (points)",
        zero="line",
    )
    interval, reduction = {"from": "+.2f", "to": "+.2f"}, {"from ": ".1f", "to ": ".1f"}
    columns = {"arm": None, "against": None, "difference": "+.2f", **interval, "p": ".2g", "n": "d"}
    table = _table(
        report,
        "differences of test errors, and error reductions",
        _columns(columns | {"reduction (%)": ".1f"} | reduction),
        ((pair, _pair_cells(pair)) for pair in pairs),
    )
    caption = (
        "Difference of mean test errors in percentage points, with its 95 % interval: left of the line, the first arm "
        "has less error. A point without an interval tells nothing of other seeds."
    )
    return Chart(svg, caption, table)


def _pair_cells(pair: _Report) -> list[Any]:
    found, reduction = pair["difference"], pair["error_reduction"] or {}
    cells = [pair["label"], pair["baseline"], found["mean"], *(found["ci95"] or _UNKNOWN), found["p"], found["n"]]
    return [*cells, *(reduction.get(key) for key in ("percent", "low", "high"))]


def _images(report: _Report) -> Table | None:
    rows = [
        (
            pair,
            (pair["label"], pair["baseline"], test["seed"], test["only_wrong"], test["baseline_only_wrong"], test["p"]),
        )
        for pair in report["comparisons"]
        for test in pair["mcnemar"]
    ]
    columns = {
        "arm": None,
        "against": None,
        "seed": "d",
        "wrong by it alone": "d",
        "by the other alone": "d",
        "p": ".2g",
    }
    caption = "images that one of two models alone has wrong, McNemar's exact test"
    return _table(report, caption, _columns(columns), rows) if rows else None


# ---------------------------------------------------------------------------------------------------------------- cost


def _costs(report: _Report) -> Iterator[Chart]:
    for key, name in (("passes", "forward-backward passes"), ("seconds", "seconds of training")):
        there = [entry for entry in report["final"] if entry["n"] and entry[key] is not None]
        if not there:
            continue
        series = []
        for arm in dict.fromkeys(entry["arm"] for entry in there):
            own = sorted((entry for entry in there if entry["arm"] == arm), key=lambda entry: float(entry[key]))
            bounds = [entry["mean_error_ci95"] or _UNKNOWN for entry in own]
            x, y = [entry[key] for entry in own], [entry["mean_error"] for entry in own]
            series.append(Series(arm, x, y, [low for low, _ in bounds], [high for _, high in bounds]))
        best = min(there, key=lambda entry: float(entry["mean_error"]))
        words = Words(
            f"cost-{key}",
            f"Test error against {name}",
            f"Lowest: {_name(report, best)}, {best['mean_error']:.2f} percent after {best[key]:.0f} {key}.",
        )
        svg = svg_charts.lines(words, series, x_label=name, y_label="test error (%)", bars=True)
        table = _table(
            report,
            f"test error against {name}",
            _columns({"arm": None, name: ",.3f" if key == "seconds" else ",.0f", "error (%)": ".2f", **_BOUNDS}),
            (
                (entry, (entry["arm"], entry[key], entry["mean_error"], *(entry["mean_error_ci95"] or _UNKNOWN)))
                for entry in there
            ),
        )
        caption = f"Test error against the {name} of a run: means over seeds, with Student's 95 % intervals."
        yield Chart(svg, caption, table)


# -------------------------------------------------------------------------------------------------------------- choice


def _choices(report: _Report) -> Iterator[Chart]:
    for i, entry in enumerate(report["choices"], start=1):
        points = [
            point for point in report["selection"] if (point["budget"], point["arm"]) == (entry["budget"], entry["arm"])
        ]
        if any(point["mean_error"] is not None for point in points):
            yield _choice(f"choice-{i}", entry, points)


def _choice(name: str, entry: _Report, points: Sequence[_Report]) -> Chart:
    """Validation error over the setting that has most values; a line for each combination of the others."""
    values = {key: list(dict.fromkeys(str(point["point"][key]) for point in points)) for key in points[0]["point"]}
    across = max(values, key=lambda key: len(values[key]))
    done = [point for point in points if point["mean_error"] is not None]
    lines: dict[str, list[_Report]] = {}
    for point in done:
        rest = (f"{key} {value}" for key, value in point["point"].items() if key != across and len(values[key]) > 1)
        lines.setdefault(", ".join(rest) or entry["arm"], []).append(point)
    series = [
        Series(
            title,
            [values[across].index(str(point["point"][across])) for point in own],
            [point["mean_error"] for point in own],
            [point["wilson_ci95"][0] for point in own],
            [point["wilson_ci95"][1] for point in own],
            [place for place, point in enumerate(own) if point["chosen"]],
        )
        for title, own in lines.items()
    ]
    where = verdict.where(entry)
    description = f"Chosen: {entry['label']}." if entry["label"] else "Nothing is chosen yet."
    words = Words(name, f"Validation error of {where} by {across}", description)
    svg = svg_charts.lines(
        words, series, x_label=across, y_label="validation error (%)", bars=True, ticks=values[across]
    )
    columns = {"point": None, "state": None, "error (%)": ".2f", "Wilson, from": ".2f", "to": ".2f"}
    columns |= {
        "Student, from": ".2f",
        "to ": ".2f",
        "by seed": None,
        "loss": ".4f",
        "passes": ",.0f",
        "seconds": ",.1f",
    }
    out = [point["label"] for point in points if point["state"] == "diverged"]
    said = [verdict.choice_words(entry) or f"{where}: nothing is chosen yet."]
    said += [f"Diverged, and so out: {verdict.listed(out)}."] if out else []
    caption = f"{' '.join(said)} The ring marks the chosen point; the bars are Wilson's 95 % intervals."
    table = Table(f"validation error of {where}", _columns(columns), [_point_cells(point) for point in points])
    return Chart(svg, caption, table)


def _point_cells(point: _Report) -> list[Any]:
    return [
        point["label"],
        "chosen" if point["chosen"] else point["state"],
        point["mean_error"],
        *(point["wilson_ci95"] or _UNKNOWN),
        *(point["mean_error_ci95"] or _UNKNOWN),
        " ".join(f"{error:.2f}" for error in point["val_errors"]) or None,
        *(point[key] for key in ("mean_loss", "passes", "seconds")),
    ]


# -------------------------------------------------------------------------------------------------------------- curves


def _curves(folder: Path, report: _Report) -> Iterator[Chart]:
    for i, budget in enumerate(report["asked"]["budgets"], start=1):
        about = f"at {budget}" if budget else ""
        tried = [point for point in report["selection"] if point["budget"] == budget and point["chosen"]]
        final = [entry for entry in report["final"] if entry["budget"] == budget]
        stages: list[tuple[Literal["val", "train"], list[_Report]]] = [("val", tried), ("train", final)]
        for split, entries in stages:
            groups = {entry["arm"]: [ledger.run_folder(folder, run) for run in entry["runs"]] for entry in entries}
            runs = "chosen points" if split == "val" else "last fits"
            drawn = learning_curves.curve(f"curve-{split}-{i}", groups, split, " ".join(filter(None, (runs, about))))
            if drawn:
                yield drawn


# ---------------------------------------------------------------------------------------------------------------- runs


def _incidents(report: _Report) -> Iterator[Table]:
    progress = report["progress"]
    columns = [Column("run"), Column("why"), Column("log")]
    for key, caption in (("failed", "failed"), ("diverged", "diverged: their points are out")):
        if progress[key]:
            yield Table(
                f"runs that {caption}", columns, [(run["run"], run["why"], run["log"]) for run in progress[key]]
            )
    if progress["missing"]:
        missing = [(run["run"], run["state"]) for run in progress["missing"]]
        yield Table("runs that are missing", [Column("run"), Column("state")], missing)
