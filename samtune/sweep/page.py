"""The page of a sweep, report.html: its report, and the learning curves of its runs, drawn."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from samtune.report import html, learning_curves, svg_charts
from samtune.report.comparison import Report
from samtune.report.html import Chart, Column, Table
from samtune.report.svg_charts import Heading, Series
from samtune.sweep import ledger, tables, verdict

_NO_INTERVAL = (None, None)
_MCNEMAR = ("seed", "only_wrong", "baseline_only_wrong", "p")


def write(path: Path, folder: Path, report: Report) -> None:
    """Write the page of a sweep folder and its report; several processes may do so at once. Raises OSError."""
    html.write(path, "sweep.html", content(folder, report))


def content(folder: Path, report: Report) -> dict[str, Any]:
    """The content of templates/sweep.html."""
    choices, costs, curves = list(_choices(report)), list(_costs(report)), list(_curves(folder, report))
    has_results = any(entry["n"] for entry in report["final"])
    sections = {
        "result": ("Result", True),
        "arms": ("Arms on test", has_results),
        "comparisons": ("Comparisons", report["comparisons"]),
        "cost": ("Cost", costs),
        "choice": ("Choice on validation", choices),
        "curves": ("Learning curves", curves),
        "runs": ("Runs", True),
        "settings": ("Recipe", True),
        "provenance": ("Provenance", True),
    }
    return tables.content(report) | {
        "sections": {name: title for name, (title, is_shown) in sections.items() if is_shown},
        "budgets": report["asked"]["budgets"] != [None],
        "baseline": tables.baseline_arm(report),
        "checkpoints": ["last", "best"] if tables.has_checkpoints(report) else [],
        "comparison_of": _comparison_of(report),
        "spread": _spread(report) if has_results else None,
        "forest": _forest(report) if report["comparisons"] else None,
        "image_table": _image_table(report),
        "cost_charts": costs,
        "choice_charts": choices,
        "curves": curves,
        "incidents": list(_incidents(report)),
        "recipe": (folder / "sweep.toml").read_text(encoding="utf-8"),
    }


def _name(entry: Report) -> str:
    """Name of an arm in a chart."""
    return f"{entry['arm']}, {entry['budget']}" if entry["budget"] else str(entry["arm"])


def _table(
    report: Report, caption: str, columns: Mapping[str, str | None], rows: Iterable[tuple[Report, Sequence[Any]]]
) -> Table:
    """A table with a column for the budget, if there are budgets. rows: (an entry with a budget, its other cells)."""
    named = [Column(name.rstrip(), form) for name, form in columns.items()]
    if report["asked"]["budgets"] == [None]:
        return Table(caption, named, [cells for _, cells in rows])
    return Table(caption, [Column("budget"), *named], [(entry["budget"], *cells) for entry, cells in rows])


# ---------------------------------------------------------------------------------------------------------- final runs


def _comparison_of(report: Report) -> list[int | None]:
    """For each entry of `final`, the number of its comparison with the baseline of the table."""
    pairs, baseline = enumerate(report["comparisons"]), tables.baseline_arm(report)
    numbers = {(pair["budget"], pair["label"]): i for i, pair in pairs if pair["baseline"] == baseline}
    return [numbers.get((entry["budget"], entry["arm"])) for entry in report["final"]]


def _spread(report: Report) -> Chart:
    entries = [entry for entry in report["final"] if entry["n"]]
    best = min(entries, key=lambda entry: entry["mean_error"])
    svg = svg_charts.intervals(
        Heading("spread", "Test error by arm", f"Lowest mean: {_name(best)}, {best['mean_error']:.2f} percent."),
        [_name(entry) for entry in entries],
        [entry["mean_error"] for entry in entries],
        [entry["mean_error_ci95"] for entry in entries],
        x_label="test error (%)",
        dots=[entry["test_errors"] for entry in entries],
        zero="anywhere",
    )
    rows = (
        (entry, (entry["arm"], *of_seed, entry["images"]))
        for entry in entries
        for of_seed in zip(entry["seeds"], entry["test_errors"], entry["wrong"], strict=True)
    )
    columns = {"arm": None, "seed": "d", "error (%)": ".2f", "wrong": "d", "images": "d"}
    table = _table(report, "test error of each final run", columns, rows)
    caption = "Test error: the mean over seeds with Student's 95 % interval, and below it a small dot for each seed."
    return Chart(svg, caption, table)


def _forest(report: Report) -> Chart:
    pairs = report["comparisons"]
    differences = [pair["difference"] for pair in pairs]
    intervals = [difference["ci95"] for difference in differences]
    clear = sum(bool(ci95) and not ci95[0] <= 0 <= ci95[1] for ci95 in intervals)
    svg = svg_charts.intervals(
        Heading("forest", "Differences of test errors", f"{clear} of {len(pairs)} intervals exclude zero."),
        [verdict.pair_title(pair).replace(" against ", " \N{MINUS SIGN} ") for pair in pairs],
        [difference["mean"] for difference in differences],
        intervals,
        x_label="difference (points)",
        zero="line",
    )
    columns = {"arm": None, "against": None, "difference": "+.2f", "from": "+.2f", "to": "+.2f", "p": ".2g", "n": "d"}
    columns |= {"reduction (%)": ".1f", "from ": ".1f", "to ": ".1f"}
    rows = ((pair, _pair_cells(pair)) for pair in pairs)
    table = _table(report, "differences of test errors, and error reductions", columns, rows)
    caption = (
        "Difference of mean test errors in percentage points, with its 95 % interval: left of the line, the first arm "
        "has less error. A point without an interval tells nothing of other seeds."
    )
    return Chart(svg, caption, table)


def _pair_cells(pair: Report) -> list[Any]:
    difference, reduction = pair["difference"], pair["error_reduction"] or {}
    cells = [pair["label"], pair["baseline"], difference["mean"], *(difference["ci95"] or _NO_INTERVAL)]
    return [*cells, difference["p"], difference["n"], *(reduction.get(key) for key in ("percent", "low", "high"))]


def _image_table(report: Report) -> Table | None:
    rows = [
        (pair, (pair["label"], pair["baseline"], *(test[key] for key in _MCNEMAR)))
        for pair in report["comparisons"]
        for test in pair["mcnemar"]
    ]
    columns = {"arm": None, "against": None, "seed": "d", "wrong by it alone": "d", "by the other alone": "d"}
    caption = "images that one of two models alone has wrong, McNemar's exact test"
    return _table(report, caption, columns | {"p": ".2g"}, rows) if rows else None


# ---------------------------------------------------------------------------------------------------------------- cost


def _costs(report: Report) -> Iterator[Chart]:
    for key, name in (("passes", "forward-backward passes"), ("seconds", "seconds of training")):
        entries = [entry for entry in report["final"] if entry["n"] and entry[key] is not None]
        if not entries:
            continue
        series = []
        for arm in dict.fromkeys(entry["arm"] for entry in entries):
            of_arm = sorted((entry for entry in entries if entry["arm"] == arm), key=lambda entry: float(entry[key]))
            low, high = zip(*(entry["mean_error_ci95"] or _NO_INTERVAL for entry in of_arm), strict=True)
            x, y = [entry[key] for entry in of_arm], [entry["mean_error"] for entry in of_arm]
            series.append(Series(arm, x, y, low, high))
        best = min(entries, key=lambda entry: float(entry["mean_error"]))
        about = f"Lowest: {_name(best)}, {best['mean_error']:.2f} percent after {best[key]:.0f} {key}."
        heading = Heading(f"cost-{key}", f"Test error against {name}", about)
        svg = svg_charts.lines(heading, series, x_label=name, y_label="test error (%)", bars=True)
        form = ",.3f" if key == "seconds" else ",.0f"
        columns = {"arm": None, name: form, "error (%)": ".2f", "from": ".2f", "to": ".2f"}
        rows = (
            (entry, (entry["arm"], entry[key], entry["mean_error"], *(entry["mean_error_ci95"] or _NO_INTERVAL)))
            for entry in entries
        )
        table = _table(report, f"test error against {name}", columns, rows)
        caption = f"Test error against the {name} of a run: means over seeds, with Student's 95 % intervals."
        yield Chart(svg, caption, table)


# -------------------------------------------------------------------------------------------------------------- choice


def _choices(report: Report) -> Iterator[Chart]:
    for i, choice in enumerate(report["choices"], start=1):
        arm = choice["budget"], choice["arm"]
        points = [point for point in report["selection"] if (point["budget"], point["arm"]) == arm]
        if any(point["mean_error"] is not None for point in points):
            yield _choice(f"choice-{i}", choice, points)


def _choice(name: str, choice: Report, points: Sequence[Report]) -> Chart:
    """Validation error over the setting with most values; a line for each combination of the others."""
    values = {key: list(dict.fromkeys(str(point["point"][key]) for point in points)) for key in points[0]["point"]}
    across = max(values, key=lambda key: len(values[key]))
    lines: dict[str, list[Report]] = {}
    for point in points:
        rest = (f"{key} {value}" for key, value in point["point"].items() if key != across and len(values[key]) > 1)
        if point["mean_error"] is not None:
            lines.setdefault(", ".join(rest) or choice["arm"], []).append(point)
    series = [
        Series(
            title,
            [values[across].index(str(point["point"][across])) for point in of_line],
            [point["mean_error"] for point in of_line],
            [point["wilson_ci95"][0] for point in of_line],
            [point["wilson_ci95"][1] for point in of_line],
            [i for i, point in enumerate(of_line) if point["chosen"]],
        )
        for title, of_line in lines.items()
    ]
    arm = verdict.arm_name(choice)
    description = f"Chosen: {choice['label']}." if choice["label"] else "Nothing is chosen yet."
    heading = Heading(name, f"Validation error of {arm} by {across}", description)
    svg = svg_charts.lines(
        heading, series, x_label=across, y_label="validation error (%)", bars=True, ticks=values[across]
    )
    diverged = [point["label"] for point in points if point["state"] == "diverged"]
    caption = verdict.choice_line(choice) or f"{arm}: nothing is chosen yet."
    caption += f" Diverged, and so out: {verdict.join(diverged)}." if diverged else ""
    caption += " The ring marks the chosen point; the bars are Wilson's 95 % intervals."
    columns = [Column("point"), Column("state"), Column("error (%)", ".2f")]
    columns += [Column(name, ".2f") for name in ("Wilson, from", "to", "Student, from", "to")]
    columns += [Column("by seed"), Column("loss", ".4f"), Column("passes", ",.0f"), Column("seconds", ",.1f")]
    return Chart(svg, caption, Table(f"validation error of {arm}", columns, [_point_cells(point) for point in points]))


def _point_cells(point: Report) -> list[Any]:
    return [
        point["label"],
        "chosen" if point["chosen"] else point["state"],
        point["mean_error"],
        *(point["wilson_ci95"] or _NO_INTERVAL),
        *(point["mean_error_ci95"] or _NO_INTERVAL),
        " ".join(f"{error:.2f}" for error in point["val_errors"]) or None,
        *(point[key] for key in ("mean_loss", "passes", "seconds")),
    ]


# ----------------------------------------------------------------------------------------------------- curves and runs


def _curves(folder: Path, report: Report) -> Iterator[Chart]:
    for i, budget in enumerate(report["asked"]["budgets"], start=1):
        chosen = [point for point in report["selection"] if point["budget"] == budget and point["chosen"]]
        final = [entry for entry in report["final"] if entry["budget"] == budget]
        for split, runs, entries in (("val", "chosen points", chosen), ("train", "final runs", final)):
            groups = {entry["arm"]: [ledger.run_folder(folder, run) for run in entry["runs"]] for entry in entries}
            about = f"{runs} at {budget}" if budget else runs
            if chart := learning_curves.group_chart(f"curve-{split}-{i}", groups, split, about):
                yield chart


def _incidents(report: Report) -> Iterator[Table]:
    for key, caption, names in (
        ("failed", "runs that failed", ("run", "why", "log")),
        ("diverged", "runs that diverged: their points are out", ("run", "why", "log")),
        ("missing", "runs that are missing", ("run", "state")),
    ):
        rows = [[run[name] for name in names] for run in report["progress"][key]]
        if rows:
            yield Table(caption, [Column(name) for name in names], rows)
