"""The files of `samtune sharpness`: sharpness.json, sharpness.md and the page sharpness.html, from one result."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from samtune.errors import plural
from samtune.report import html, svg_charts
from samtune.report.html import Chart, Column, Table
from samtune.report.svg_charts import Heading, Series
from samtune.sharpness.lanczos import Spectrum

CAUTION = (
    "Sharpness is a diagnostic, and no score of quality: in fine-tuning it says little about which model generalises "
    "better (Andriushchenko et al. 2023). It also depends on how weights are scaled, so that only models of one "
    "architecture and one normalisation compare."
)
_EIGENVALUES = "Eigenvalues of the Hessian"  # on a page the table of their chart


def write(folder: Path, result: Mapping[str, Any]) -> Path:
    """Write the three files; returns the page. Raises OSError."""
    html.write_json(folder / "sharpness.json", result)
    shown = content(result)
    html.write(folder / "sharpness.md", "sharpness.md", shown)
    html.write(folder / "sharpness.html", "sharpness.html", shown)
    return folder / "sharpness.html"


def tables(result: Mapping[str, Any]) -> dict[str, list[dict[str, str | float | None]]]:
    """The main numbers: tables by title, each a list of rows by column."""
    checkpoints = result["checkpoints"]
    has_hessian = any("hessian" in one for one in checkpoints)
    models = []
    for one in checkpoints:
        row = {"model": one["label"], "step": one["step"], "loss": one["loss"], "error %": one["top1_error"]}
        if has_hessian:  # an interrupted measurement has none of the last model
            hessian = one.get("hessian", {})
            largest = hessian.get("eigenvalues", [None])[0]
            row |= {"largest eigenvalue": largest, "largest / fifth": hessian.get("ratio_1_to_5")}
        models.append(row)
    sharpness = [
        {
            "model": one["label"],
            "m": entry["m"],
            "groups": entry["groups"],
            "one step": entry["one_step"],
            "maximum": entry["maximum"],
            "not converged %": 100 * entry["not_converged"],
        }
        for one in checkpoints
        for entry in one.get("m_sharpness", ())
    ]
    eigenvalues = [
        {"model": one["label"], "number": i, "eigenvalue": value, "residual": residual}
        for one in checkpoints
        if "hessian" in one
        for i, (value, residual) in enumerate(
            zip(one["hessian"]["eigenvalues"], one["hessian"]["residuals"], strict=True), start=1
        )
    ]
    moments = [
        {
            "model": one["label"],
            "mean": one["density"]["moment_1"]["mean"],
            "error of the mean": one["density"]["moment_1"]["standard_error"],
            "mean square": one["density"]["moment_2"]["mean"],
            "error of the mean square": one["density"]["moment_2"]["standard_error"],
        }
        for one in checkpoints
        if "density" in one
    ]
    correlation = [
        {key: one[key] for key in ("m", "runs", "tau", "p_value")}
        | dict(zip(("from", "to"), one["ci95"] or (None, None), strict=True))
        for one in result.get("correlation", ())
    ]
    found = {
        "Models": models,
        "m-sharpness (nats)": sharpness,
        _EIGENVALUES: eigenvalues,
        "All eigenvalues, estimated with standard errors": moments,
        "m-sharpness against the gap of test and train error: Kendall's tau": correlation,
    }
    return {title: rows for title, rows in found.items() if rows}


def text_tables(result: Mapping[str, Any]) -> dict[str, list[dict[str, str | float | None]]]:
    """`tables` with each number as text of four significant digits, since their sizes differ widely."""
    return {
        title: [{key: f"{v:.4g}" if isinstance(v, float) else v for key, v in row.items()} for row in rows]
        for title, rows in tables(result).items()
    }


def notes(result: Mapping[str, Any]) -> list[str]:
    """What a reader of the numbers must know."""
    measures, checkpoints = result["measures"], result["checkpoints"]
    first = checkpoints[0]
    lines = [
        f"Of {plural(first['images'], 'image')} of split {result['split']} of {first['dataset']}, without label "
        "smoothing, dropout or weight decay, batch norm in evaluation mode.",
        CAUTION,
    ]
    if len({(one["dataset"], one["pixels_sha256"]) for one in checkpoints}) > 1:
        lines.append("Not all models were measured on the same images: sharpness.json has the data of each.")
    if any("m_sharpness" in one for one in checkpoints):
        ball = f"rho {measures['rho']:g}, p {float(measures['p']):g}" + (", adaptive" if measures["adaptive"] else "")
        lines.append(
            f"m-sharpness: the mean over groups of m images of the rise of their loss in the ball of {ball}. One step "
            f"is that of SAM's own perturbation. The maximum is the best of {measures['ascent_steps']} passes of a "
            f"search and of {plural(measures['restarts'], 'random restart')}, a lower bound where it has not converged."
        )
    hessians = [one["hessian"] for one in checkpoints if "hessian" in one]
    if hessians:
        lines.append(
            f"Hessian of {hessians[0]['parameters']:,} parameters ({measures['params']}): an eigenvalue lies within "
            "its residual of the one stated."
        )
    if any(not one["converged"] for one in hessians):
        lines.append("Not all eigenvalues have converged: see their residuals.")
    if any("density" in one for one in checkpoints):
        lines.append(
            f"Spectral density: stochastic Lanczos quadrature, {plural(measures['probes'], 'probe')} of "
            f"{measures['lanczos_steps']} steps."
        )
    if any("slices" in one for one in checkpoints):
        lines.append(
            "Slices: directions are drawn from N(0, 1) and scaled filter by filter to the norm of the weights; biases "
            "and norm parameters stay. All models have the same directions before they are scaled."
        )
    if result.get("gaps"):
        lines.append(
            f"Gap: a run's error on test minus that on the {first['images']} measured training images. Intervals of "
            "tau are of bootstrap samples of runs, as if these were independent, and need ten runs."
        )
    if result["interrupted"]:
        lines.append("The measurement was interrupted: what it had not reached is missing.")
    return lines


def content(result: Mapping[str, Any]) -> dict[str, Any]:
    """The content of templates/sharpness.html and sharpness.md."""
    sections = {"numbers": "Numbers"}
    charts = {
        "m-sharpness": _m_sharpness(result),
        "eigenvalues": _eigenvalues(result),
        "spectrum": _densities(result),
        "training": _over_training(result),
        "slices": _slices(result),
        "planes": _planes(result),
        "line": _line(result),
        "gaps": _gaps(result),
    }
    names = {
        "m-sharpness": "m-sharpness",
        "eigenvalues": "Largest eigenvalues of the Hessian",
        "spectrum": "Spectral density of the Hessian",
        "training": "Over training",
        "slices": "Slices",
        "planes": "Planes",
        "line": "Linear interpolation",
        "gaps": "Sharpness and generalisation",
    }
    drawn = {id: chart for id, chart in charts.items() if chart is not None}
    runs = list(dict.fromkeys(one["run"] for one in result["checkpoints"]))
    return {
        "title": f"Sharpness of {', '.join(runs[:3])}" + (f" and {len(runs) - 3} more" if len(runs) > 3 else ""),
        "sections": sections | {id: names[id] for id in drawn},
        "tables": text_tables(result),
        "numbers": [_as_table(title, rows) for title, rows in tables(result).items() if title != _EIGENVALUES],
        "charts": [(id, names[id], chart) for id, chart in drawn.items()],
        "notes": notes(result),
        "paragraphs": {"Notes": notes(result)},
    }


def short_names(models: Sequence[Mapping[str, Any]], key: str = "label") -> list[str]:
    """The labels of models for the legend of a chart, which has little room: without the words that all begin with."""
    labels = [str(one[key]) for one in models]
    common = os.path.commonprefix(labels) if len(labels) > 1 else ""  # noqa: RUF071 (of characters is what is wanted)
    start = max(common.rfind(mark) for mark in "-_/ ") + 1
    return [label[start:] for label in labels]


def _as_table(title: str, rows: Sequence[Mapping[str, str | float | None]]) -> Table:
    columns = [
        Column(name, None if isinstance(value, str) else "d" if isinstance(value, int) else ".4g")
        for name, value in rows[0].items()
    ]
    return Table(title, columns, [[*row.values()] for row in rows])


def _m_sharpness(result: Mapping[str, Any]) -> Chart | None:
    models = [one for one in result["checkpoints"] if "m_sharpness" in one]
    if not models:
        return None
    sizes = sorted({entry["m"] for one in models for entry in one["m_sharpness"]})
    series, rows = [], []
    for one, name in zip(models, short_names(models), strict=True):
        by_m = {entry["m"]: entry for entry in one["m_sharpness"]}
        series.append(Series(name, range(len(sizes)), [by_m[m]["maximum"] if m in by_m else None for m in sizes]))
        rows += [[one["label"], m, by_m[m]["one_step"], by_m[m]["maximum"]] for m in sizes if m in by_m]
    svg = svg_charts.lines(
        Heading("chart-m", "m-sharpness", f"Of {len(models)} models, for m from {sizes[0]} to {sizes[-1]}."),
        series,
        x_label="m (images that share a perturbation)",
        y_label="rise of the loss (nats)",
        ticks=[str(m) for m in sizes],
        bars=True,
    )
    columns = [Column("model"), Column("m", "d"), Column("one step", ".4g"), Column("maximum", ".4g")]
    return Chart(
        svg, "The largest rise found, in the mean over groups of m images.", Table("m-sharpness", columns, rows)
    )


def _eigenvalues(result: Mapping[str, Any]) -> Chart | None:
    models = [one for one in result["checkpoints"] if "hessian" in one]
    if not models:
        return None
    most = max(len(one["hessian"]["eigenvalues"]) for one in models)
    series, rows = [], []
    for one, name in zip(models, short_names(models), strict=True):
        values, residuals = one["hessian"]["eigenvalues"], one["hessian"]["residuals"]
        bounds = [[v + sign * r for v, r in zip(values, residuals, strict=True)] for sign in (-1, 1)]
        series.append(Series(name, range(len(values)), values, *bounds))
        rows += [[one["label"], i, *pair] for i, pair in enumerate(zip(values, residuals, strict=True), start=1)]
    svg = svg_charts.lines(
        Heading("chart-eigenvalues", "Largest eigenvalues", f"Of {len(models)} models, the {most} largest of each."),
        series,
        x_label="number of the eigenvalue",
        y_label="eigenvalue",
        ticks=[str(i) for i in range(1, most + 1)],
        bars=True,
    )
    columns = [Column("model"), Column("number", "d"), Column("eigenvalue", ".4g"), Column("residual", ".4g")]
    caption = "The largest eigenvalues; bars span their residuals, within which the Hessian has an eigenvalue."
    return Chart(svg, caption, Table("largest eigenvalues", columns, rows))


def _densities(result: Mapping[str, Any]) -> Chart | None:
    models = [one for one in result["checkpoints"] if "density" in one]
    if not models:
        return None
    spectra = [
        Spectrum(*([np.array(probe) for probe in one["density"][key]] for key in ("nodes", "weights")))
        for one in models
    ]
    # All models have one kernel: the height of a peak depends on its width.
    at = Spectrum([nodes for one in spectra for nodes in one.nodes], []).grid()
    width = (at[-1] - at[0]) / 100
    series, rows = [], []
    for one, name, spectrum in zip(models, short_names(models), spectra, strict=True):
        # A single eigenvalue stands at 0.4 / (parameters x width). Far below it is only the kernel's tail.
        curves = spectrum.density(at, width).clip(1e-2 / (one["density"]["parameters"] * width))
        drawn = [curve.tolist() for curve in (curves.mean(0), curves.min(0), curves.max(0))]
        series.append(Series(name, at.tolist(), *drawn))
        rows += [[one["label"], *values] for values in list(zip(at.tolist(), *drawn, strict=True))[::8]]
    svg = svg_charts.lines(
        Heading("chart-density", "Spectral density", f"Of {len(models)} models, on a logarithmic scale."),
        series,
        x_label="eigenvalue",
        y_label="density",
        from_zero=False,
        log=True,
    )
    columns = [Column("model"), *(Column(name, ".4g") for name in ("eigenvalue", "density", "lowest", "highest"))]
    caption = (
        f"Mean over the probes, smoothed by a Gaussian of standard deviation {width:.3g}; the band spans the probes. A "
        "peak by itself is a single eigenvalue, or a few."
    )
    return Chart(svg, caption, Table("every eighth point of the density", columns, rows))


def _over_training(result: Mapping[str, Any]) -> Chart | None:
    """The largest eigenvalue over the steps of each run that has several checkpoints."""
    by_run: dict[str, list[Mapping[str, Any]]] = {}
    for one in result["checkpoints"]:
        if "hessian" in one:
            by_run.setdefault(one["run"], []).append(one)
    runs = [sorted(ones, key=lambda one: int(one["step"])) for ones in by_run.values() if len(ones) > 1]
    if not runs:
        return None
    names = short_names([ones[0] for ones in runs], "run")
    series = [
        Series(name, [one["step"] for one in ones], [one["hessian"]["eigenvalues"][0] for one in ones])
        for name, ones in zip(names, runs, strict=True)
    ]
    svg = svg_charts.lines(
        Heading("chart-training", "Largest eigenvalue over training", f"Of {len(runs)} runs."),
        series,
        x_label="step",
        y_label="largest eigenvalue",
    )
    rows = [
        [one["run"], one["step"], one["hessian"]["eigenvalues"][0], one["hessian"]["ratio_1_to_5"]]
        for ones in runs
        for one in ones
    ]
    columns = [Column("run"), Column("step", "d"), Column("largest", ".4g"), Column("largest / fifth", ".3g")]
    return Chart(svg, "The largest eigenvalue at each checkpoint.", Table("eigenvalues over training", columns, rows))


def _gaps(result: Mapping[str, Any]) -> Chart | None:
    """The gap between test and train error against m-sharpness, a point for each run."""
    gaps = result.get("gaps")
    if not gaps:
        return None
    models = [result["checkpoints"][one["checkpoint"]] for one in gaps]
    heights = [one["gap"] for one in gaps]
    series, rows = [], []
    for i, m in enumerate(entry["m"] for entry in models[0]["m_sharpness"]):  # all have the same
        sharpness = [one["m_sharpness"][i]["maximum"] for one in models]
        series.append(Series(f"m = {m}", sharpness, heights))
        rows += [[one["label"], m, x, y] for one, x, y in zip(models, sharpness, heights, strict=True)]
    svg = svg_charts.lines(
        Heading("chart-gaps", "m-sharpness and generalisation", f"Of {len(models)} runs."),
        series,
        x_label="m-sharpness (nats)",
        y_label="test - train error (points)",
        from_zero=False,
        joined=False,
    )
    columns = [Column("run"), Column("m", "d"), Column("m-sharpness", ".4g"), Column("gap (points)", ".2f")]
    caption = "A point for each run and m: the maximum found, and the run's test error minus its train error."
    return Chart(svg, caption, Table("m-sharpness and gap", columns, rows))


def _sliced(result: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [one for one in result["checkpoints"] if "slices" in one]


def _slices(result: Mapping[str, Any]) -> Chart | None:
    models = [one for one in _sliced(result) if not isinstance(one["slices"]["loss"][0], list)]
    if not models:
        return None
    curves = [(one["label"], name, one["slices"]) for one, name in zip(models, short_names(models), strict=True)]
    caption = "Loss along one random direction, scaled filter by filter; 1 is the norm of the weights."
    return _curves("chart-slices", "Slices of the loss", curves, "distance", caption)


def _line(result: Mapping[str, Any]) -> Chart | None:
    line = result.get("line")
    if line is None:
        return None
    caption = f"Loss on the line from {line['from']}, at 0, to {line['to']}, at 1. Batch-norm statistics move along."
    return _curves("chart-line", "Loss between two models", [("line", "loss", line)], "position", caption)


def _curves(
    id: str, title: str, curves: Sequence[tuple[str, str, Mapping[str, Any]]], x_label: str, caption: str
) -> Chart:
    """curves: name in the table, name in the chart, and the values."""
    series = [Series(name, curve["at"], curve["loss"]) for _, name, curve in curves]
    svg = svg_charts.lines(
        Heading(id, title, f"Of {len(curves)} curves."), series, x_label=x_label, y_label="loss (nats)", from_zero=False
    )
    rows = [
        [label, *values]
        for label, _, curve in curves
        for values in zip(curve["at"], curve["loss"], curve["top1_error"], strict=True)
    ]
    columns = [Column("model"), Column(x_label, ".3g"), Column("loss", ".4g"), Column("error (%)", ".2f")]
    return Chart(svg, caption, Table(title.lower(), columns, rows))


def _planes(result: Mapping[str, Any]) -> Chart | None:
    models = [one for one in _sliced(result) if isinstance(one["slices"]["loss"][0], list)]
    if not models:
        return None
    at = models[0]["slices"]["at"]
    svg = svg_charts.contours(
        Heading("chart-planes", "Loss on a plane", f"Of {len(models)} models, at the same levels."),
        at,
        [(name, one["slices"]["loss"]) for one, name in zip(models, short_names(models), strict=True)],
        label="loss",
    )
    rows = [
        [one["label"], a, b, loss]
        for one in models
        for a, of_row in zip(at, one["slices"]["loss"], strict=True)
        for b, loss in zip(at, of_row, strict=True)
    ]
    columns = [Column("model"), Column("first", ".3g"), Column("second", ".3g"), Column("loss", ".4g")]
    caption = (
        "Lines of equal loss on the plane of two random directions; the point is the model. All panels have the same "
        "levels."
    )
    return Chart(svg, caption, Table("loss on the plane", columns, rows))
