"""The page of a comparison, comparison.html: comparison.json and the learning curves of its runs, drawn."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from samtune.report import comparison as texts
from samtune.report import html, learning_curves, svg_charts
from samtune.report.html import Chart, Column, Table
from samtune.report.svg_charts import Heading

_COST = [Column("epochs", ".4g"), Column("passes", ",.0f"), Column("time (s)", ",.1f")]


def write(path: Path, comparison: Mapping[str, Any]) -> None:
    """Write the page of what `samtune.report.comparison.compare` returned. Raises OSError."""
    html.write(path, "comparison.html", content(comparison))


def content(comparison: Mapping[str, Any]) -> dict[str, Any]:
    """The content of templates/comparison.html."""
    shown = texts.content(comparison)
    *pairs, (notes_title, notes) = shown["paragraphs"].items()
    curves = _curves(comparison)
    sections = {"result": "Result", "pairs": "Paired tests"}
    sections |= {"curves": "Learning curves"} if curves else {}
    sections |= {"differs": "What differs"} if comparison["differs"] else {}
    differs = shown["tables"].get("What differs", [])
    columns = [Column(name) for name in differs[0]] if differs else []
    return shown | {
        "comparison": comparison,
        "sections": sections,
        "errors": _errors(comparison),
        "groups": _groups(comparison),
        "forest": _forest(comparison),
        "pairs": pairs,
        "notes_title": notes_title,
        "notes": notes,
        "curves": curves,
        "differs": Table("settings and circumstances that differ", columns, [[*row.values()] for row in differs]),
    }


def _errors(comparison: Mapping[str, Any]) -> Chart:
    runs = comparison["runs"]
    best = min(runs, key=lambda run: float(run["top1_error"]))
    svg = svg_charts.intervals(
        Heading("errors", "Error of each run", f"Lowest: {best['label']}, {best['top1_error']:.2f} percent."),
        [run["label"] for run in runs],
        [run["top1_error"] for run in runs],
        [run["top1_error_ci95"] for run in runs],
        x_label="error (%)",
        zero="anywhere",
    )
    columns = [Column("run"), Column("seed", "d"), Column("scored"), Column("error (%)", ".2f"), Column("from", ".2f")]
    columns += [Column("to", ".2f"), Column("wrong", "d"), Column("images", "d"), *_COST]
    keys = ("label", "seed", "split", "top1_error", "ci95.0", "ci95.1", "wrong", "n", "epochs", "passes", "seconds")
    flat = [run | {f"ci95.{i}": bound for i, bound in enumerate(run["top1_error_ci95"])} for run in runs]
    rows = [[run[key] for key in keys] for run in flat]
    return Chart(svg, "Top-1 error of each run with Wilson's 95 % interval.", Table("runs", columns, rows))


def _groups(comparison: Mapping[str, Any]) -> Table | None:
    groups = comparison["groups"]
    if all(group["n"] == 1 for group in groups):
        return None
    columns = [Column("runs"), Column("seeds", "d"), Column("mean error (%)", ".2f"), Column("from", ".2f")]
    columns += [Column("to", ".2f"), *_COST]
    bounds = [group["mean_error_ci95"] or (None, None) for group in groups]
    rows = [
        [group["label"], group["n"], group["mean_error"], *interval, group["epochs"], group["passes"], group["seconds"]]
        for group, interval in zip(groups, bounds, strict=True)
    ]
    return Table("means over seeds, with Student's 95 % intervals", columns, rows)


def _forest(comparison: Mapping[str, Any]) -> Chart | None:
    """Differences over seeds; None if none has an interval."""
    pairs = comparison["pairs"]
    differences = [pair["difference"] for pair in pairs]
    if not any(difference["ci95"] for difference in differences):
        return None
    svg = svg_charts.intervals(
        Heading("forest", "Differences of errors", f"Of {len(pairs)} against {pairs[0]['baseline']}."),
        [pair["label"] for pair in pairs],
        [one["mean"] for one in differences],
        [one["ci95"] for one in differences],
        x_label="difference (points)",
        zero="line",
    )
    columns = [Column("runs"), Column("difference", "+.2f"), Column("from", "+.2f"), Column("to", "+.2f")]
    rows = [
        [pair["label"], one["mean"], *(one["ci95"] or (None, None)), one["p"]]
        for pair, one in zip(pairs, differences, strict=True)
    ]
    caption = "Difference of mean errors in points, with its 95 % interval over seeds; left of the line, less error."
    return Chart(svg, caption, Table("differences of errors", [*columns, Column("p", ".2g")], rows))


def _curves(comparison: Mapping[str, Any]) -> list[Chart]:
    paths = {run["label"]: Path(run["path"]) for run in comparison["runs"]}
    groups = {group["label"]: [paths[label] for label in group["runs"]] for group in comparison["groups"]}
    charts = (learning_curves.group_chart(f"curve-{split}", groups, split) for split in ("val", "train"))
    return [chart for chart in charts if chart]
