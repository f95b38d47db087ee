"""The files of `samtune sharpness`: sharpness.json, sharpness.md and the page sharpness.html, from one result."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from samtune.errors import plural
from samtune.report import html, svg_charts
from samtune.report.html import Chart, Column, Table
from samtune.report.svg_charts import Heading, Series

CAUTION = (
    "Sharpness is a diagnostic, and no score of quality: in fine-tuning it says little about which model generalises "
    "better (Andriushchenko et al. 2023). It also depends on how weights are scaled, so that only models of one "
    "architecture and one normalisation compare."
)


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
    found: dict[str, list[dict[str, str | float | None]]] = {
        "Models": [
            {
                "model": one["label"],
                "step": one["step"],
                "loss": one["loss"],
                "error %": one["top1_error"],
                **_first_eigenvalues(one),
            }
            for one in checkpoints
        ]
    }
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
            "trace / n": one["density"]["moment_1"]["mean"],
            "its standard error": one["density"]["moment_1"]["standard_error"],
            "||H||_F^2 / n": one["density"]["moment_2"]["mean"],
            "its error": one["density"]["moment_2"]["standard_error"],
        }
        for one in checkpoints
        if "density" in one
    ]
    correlation = [
        {key: one[key] for key in ("m", "runs", "tau")}
        | dict(zip(("from", "to"), one["ci95"] or (None, None), strict=True))
        for one in result.get("correlation", ())
    ]
    found["m-sharpness (nats)"] = sharpness
    found["Eigenvalues of the Hessian"] = eigenvalues
    found["Moments of the spectrum"] = moments
    found[
        f"m-sharpness against the gap of the errors on test and on {result['images']} training images: Kendall's tau"
    ] = correlation
    return {title: rows for title, rows in found.items() if rows}


def text_tables(result: Mapping[str, Any]) -> dict[str, list[dict[str, str | float | None]]]:
    """`tables` with each number as text of four significant digits, since their sizes differ widely."""
    return {
        title: [{key: f"{v:.4g}" if isinstance(v, float) else v for key, v in row.items()} for row in rows]
        for title, rows in tables(result).items()
    }


def _first_eigenvalues(one: Mapping[str, Any]) -> dict[str, str | float | None]:
    if "hessian" not in one:
        return {}
    return {"largest eigenvalue": one["hessian"]["eigenvalues"][0], "largest / fifth": one["hessian"]["ratio_1_to_5"]}


def notes(result: Mapping[str, Any]) -> list[str]:
    """What a reader of the numbers must know."""
    measures, n = result["measures"], result["images"]
    lines = [
        f"Of {n} images of split {result['split']} of {result['dataset']}, without label smoothing, dropout or "
        "weight decay, batch norm in evaluation mode.",
        CAUTION,
    ]
    if measures["m"]:
        ball = f"rho {measures['rho']:g}, p {float(measures['p']):g}" + (", adaptive" if measures["adaptive"] else "")
        lines.append(
            f"m-sharpness: the mean over groups of m images of the rise of their loss in the ball of {ball}. One step "
            f"is that of SAM's own perturbation; the maximum is the best of {measures['ascent_steps']} steps of ascent "
            f"from the gradient and from {plural(measures['starts'], 'random direction')}, a lower bound where it has "
            "not converged."
        )
    hessians = [one["hessian"] for one in result["checkpoints"] if "hessian" in one]
    if hessians:
        lines.append(
            f"Hessian of {hessians[0]['parameters']:,} parameters ({measures['params']}): an eigenvalue lies within "
            "its residual of the one stated."
        )
    if any(not one["converged"] for one in hessians):
        lines.append(f"Not all eigenvalues have converged in {measures['max_steps']} products: see their residuals.")
    if any("slices" in one for one in result["checkpoints"]):
        lines.append(
            "Slices: directions are drawn from N(0, 1) and scaled filter by filter to the norm of the weights; biases "
            "and norm parameters stay. All models have the same directions before they are scaled."
        )
    if result["interrupted"]:
        lines.append("The measurement was interrupted: what it had not reached is missing.")
    return lines


def content(result: Mapping[str, Any]) -> dict[str, Any]:
    """The content of templates/sharpness.html and sharpness.md."""
    sections = {"numbers": "Numbers"}
    charts = {
        "m-sharpness": _m_sharpness(result),
        "spectrum": _densities(result),
        "training": _over_training(result),
        "slices": _slices(result),
        "planes": _planes(result),
        "line": _line(result),
    }
    names = {
        "m-sharpness": "m-sharpness",
        "spectrum": "Spectrum of the Hessian",
        "training": "Over training",
        "slices": "Slices",
        "planes": "Planes",
        "line": "Between two models",
    }
    drawn = {id: chart for id, chart in charts.items() if chart is not None}
    labels = [one["label"] for one in result["checkpoints"]]
    return {
        "title": f"Sharpness of {', '.join(labels[:3])}" + (f" and {len(labels) - 3} more" if len(labels) > 3 else ""),
        "sections": sections | {id: names[id] for id in drawn},
        "tables": text_tables(result),
        "numbers": [_as_table(title, rows) for title, rows in tables(result).items()],
        "charts": [(id, names[id], chart) for id, chart in drawn.items()],
        "notes": notes(result),
        "paragraphs": {"Notes": notes(result)},
    }


def _as_table(title: str, rows: Sequence[Mapping[str, str | float | None]]) -> Table:
    columns = [
        Column(name, None if isinstance(value, str) else "d" if isinstance(value, int) else ".4g")
        for name, value in rows[0].items()
    ]
    return Table(title, columns, [[*row.values()] for row in rows])


def _m_sharpness(result: Mapping[str, Any]) -> Chart | None:
    models = [one for one in result["checkpoints"] if len(one.get("m_sharpness", ())) > 1]
    if not models:
        return None
    sizes = sorted(entry["m"] for entry in models[0]["m_sharpness"])
    series, rows = [], []
    for one in models:
        by_m = {entry["m"]: entry for entry in one["m_sharpness"]}
        series.append(
            Series(one["label"], range(len(sizes)), [by_m[m]["maximum"] if m in by_m else None for m in sizes])
        )
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


def _densities(result: Mapping[str, Any]) -> Chart | None:
    models = [one for one in result["checkpoints"] if "density" in one]
    if not models:
        return None
    floor = 1e-6  # of a density: below it is only the kernel's tail
    series = []
    for one in models:
        density = one["density"]
        mean, low, high = ([max(floor, value) for value in density[key]] for key in ("mean", "low", "high"))
        series.append(Series(one["label"], density["eigenvalues"], mean, low, high))
    svg = svg_charts.lines(
        Heading("chart-density", "Density of eigenvalues", f"Of {len(models)} models, on a logarithmic scale."),
        series,
        x_label="eigenvalue",
        y_label="density",
        from_zero=False,
        log=True,
    )
    keys = ("eigenvalues", "mean", "low", "high")
    points = {one["label"]: list(zip(*(one["density"][key] for key in keys), strict=True)) for one in models}
    rows = [[label, *values] for label, of_model in points.items() for values in of_model[::8]]
    columns = [Column("model"), *(Column(name, ".4g") for name in ("eigenvalue", "density", "lowest", "highest"))]
    caption = "Stochastic Lanczos quadrature, smoothed by a Gaussian; the band spans the probes."
    return Chart(svg, caption, Table("every eighth point of the density", columns, rows))


def _over_training(result: Mapping[str, Any]) -> Chart | None:
    """The largest eigenvalue over the steps of each run that has several checkpoints."""
    by_run: dict[str, list[Mapping[str, Any]]] = {}
    for one in result["checkpoints"]:
        if "hessian" in one:
            by_run.setdefault(one["run"], []).append(one)
    runs = {run: sorted(ones, key=lambda one: int(one["step"])) for run, ones in by_run.items() if len(ones) > 1}
    if not runs:
        return None
    series = [
        Series(run, [one["step"] for one in ones], [one["hessian"]["eigenvalues"][0] for one in ones])
        for run, ones in runs.items()
    ]
    svg = svg_charts.lines(
        Heading("chart-training", "Largest eigenvalue over training", f"Of {len(runs)} runs."),
        series,
        x_label="step",
        y_label="largest eigenvalue",
    )
    rows = [
        [run, one["step"], one["hessian"]["eigenvalues"][0], one["hessian"]["ratio_1_to_5"]]
        for run, ones in runs.items()
        for one in ones
    ]
    columns = [Column("run"), Column("step", "d"), Column("largest", ".4g"), Column("largest / fifth", ".3g")]
    return Chart(svg, "The largest eigenvalue at each checkpoint.", Table("eigenvalues over training", columns, rows))


def _sliced(result: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [one for one in result["checkpoints"] if "slices" in one]


def _slices(result: Mapping[str, Any]) -> Chart | None:
    models = [one for one in _sliced(result) if not isinstance(one["slices"]["loss"][0], list)]
    if not models:
        return None
    curves = {one["label"]: one["slices"] for one in models}
    caption = "Loss along one random direction, scaled filter by filter; 1 is the norm of the weights."
    return _curves("chart-slices", "Slices of the loss", curves, "distance", caption)


def _line(result: Mapping[str, Any]) -> Chart | None:
    line = result.get("line")
    if line is None:
        return None
    caption = f"Loss on the line from {line['from']}, at 0, to {line['to']}, at 1; batch-norm statistics move along."
    return _curves("chart-line", "Loss between two models", {"loss": line}, "position", caption)


def _curves(id: str, title: str, curves: Mapping[str, Mapping[str, Any]], x_label: str, caption: str) -> Chart:
    series = [Series(label, curve["at"], curve["loss"]) for label, curve in curves.items()]
    svg = svg_charts.lines(
        Heading(id, title, f"Of {len(curves)} curves."), series, x_label=x_label, y_label="loss (nats)", from_zero=False
    )
    rows = [
        [label, *values]
        for label, curve in curves.items()
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
        [(one["label"], one["slices"]["loss"]) for one in models],
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
