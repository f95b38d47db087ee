"""The page of a run, report.html: report.json, metrics.jsonl and predictions.parquet, drawn."""

import json
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from markupsafe import Markup

from samtune.errors import CheckpointError, plural
from samtune.report import html, learning_curves, run_charts, run_report
from samtune.report.html import Column, Table, number
from samtune.report.run_charts import SPLIT_NAMES
from samtune.report.svg_charts import Span
from samtune.runs import listing
from samtune.runs.folder import read_provenance, read_settings, read_status, resolve_checkpoint, result_folder
from samtune.runs.metrics import read_metrics
from samtune.runs.predictions import Predictions, read

Report = Mapping[str, Any]
_SCORES = {**SPLIT_NAMES, **{f"ema.{split}": f"{name}, averaged weights" for split, name in SPLIT_NAMES.items()}}


def write_report_page(folder: Path, output: Path, refresh: float | None = None) -> tuple[dict[str, Any], Path]:
    """Write report.json, report.md and report.html of a run folder into another, or the same: (report, the page).

    refresh: seconds after which a browser loads the page again.

    Raises MachineError where they cannot be written, and what `run_report.rebuild` raises.
    """
    report = run_report.rebuild(folder)
    page = output / "report.html"
    with result_folder(output):
        run_report.write(output, report)
        write(page, folder, report, refresh=refresh)
    return report, page


def write(
    path: Path, folder: Path, report: Report, splits: run_charts.Splits | None = None, refresh: float | None = None
) -> None:
    """Write the page of a run folder and its report. Raises OSError.

    splits: the splits by name; by default they are opened. refresh: seconds after which a browser loads the page again.
    """
    shown = content(folder, report, splits)
    html.write(path, "run.html", shown | {"refresh": refresh and math.ceil(refresh)})


def follow(folder: Path, output: Path, seconds: float, say: Callable[[str], None]) -> None:
    """Write the page of a run again whenever it has measured more, until no process writes it; name the page once.

    seconds: time between two checks, and between two loads in a browser. Raises what `write_report_page` raises.
    """
    drawn_rows = None
    while listing.is_running(folder):
        rows = len(read_metrics(folder))
        if rows != drawn_rows:
            _, page = write_report_page(folder, output, refresh=seconds)
            if drawn_rows is None:
                say(f"page: {page}; it is drawn again whenever the run has measured more, until it ends or Ctrl-C")
            drawn_rows = rows
        time.sleep(seconds)


def content(folder: Path, report: Report, splits: run_charts.Splits | None = None) -> dict[str, Any]:
    """The content of templates/run.html. splits: the splits by name; by default they are opened."""
    scored = next((split for split in SPLIT_NAMES if report[split]), None)
    predictions = _predictions(folder, report, scored)
    sections = {"result": "Result", "curves": "Learning curves", "cost": "Cost"}
    if isinstance(predictions, Predictions):
        names = _class_names(folder, report)
        settings, _ = read_settings(folder)
        smoothing, has_val = settings["smoothing"], settings["val"]
        details = run_charts.by_class(predictions, names) | run_charts.mistakes(folder, predictions, names, splits)
        details |= run_charts.calibration(predictions, classes=len(names), smoothing=smoothing, has_val=has_val)
        sections |= {"errors": "Errors by class", "calibration": "Calibration", "mistakes": "Mistakes"}
    else:
        details = {"predictions_missing": predictions}
        sections["errors"] = "Errors"
    sections |= {"settings": "Settings", "provenance": "Provenance"}
    scores = dict(report)
    if report["ema"] and report["selected"] != "average":  # else they are the result itself
        scores |= {f"ema.{split}": found for split, found in report["ema"].items()}
    tested = run_report.tested_checkpoints(report)
    epochs = f"{report['epochs']:.4g} epoch{'' if report['epochs'] == 1 else 's'}"
    started = report["started"].replace("T", " ").rstrip("Z")
    return {
        **run_report.content(report),
        "subtitle": f"Run {folder.resolve().name}: {run_report.sam_words(report['sam'], report['steps'])}; "
        f"{epochs}, {plural(report['steps'], 'step')}, seed {report['seed']}; started {started} UTC.",
        "sections": sections,
        "scored": scored,
        "score_paths": {name: path for path, name in _SCORES.items() if scores.get(path)}
        | {f"test, {words}": f"test_by_checkpoint.{name}" for name, words in tested.items()},
        "reading": _reading(report, scored),
        "warnings": state(folder) + _incidents(report) + list(report["warnings"]),
        "cost": _cost(report),
        "settings": _settings(folder),
        "provenance": _provenance(report),
        "provenance_tables": _incident_tables(report),
        "predictions_missing": None,
        **_curves(folder, report),
        **details,
    }


# ---------------------------------------------------------------------------------------------------------- the result


def _reading(report: Report, scored: str | None) -> list[str]:
    """What the headline means, and what it does not show."""
    if scored is None:
        return ["No image was held out of training, or none is scored yet: how good this model is, is not known."]
    sentences = [
        f"Scored is {run_report.scored_checkpoint(report)}. The interval is Wilson's: how well {report[scored]['n']} "
        "images pin down the error of this one model. It does not say what another seed would give. This is one run, "
        f"with seed {report['seed']}: it cannot show that its settings are better than others; several seeds of each, "
        "compared in pairs, can."
    ]
    if scored == "val":
        sentences.append(
            "No test split was scored. Where settings, or the checkpoint, were chosen on these validation images, "
            "their error is too low."
        )
    return sentences


def state(folder: Path) -> list[str]:
    """Warnings about a run that is not done, or could not write some of its files."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        status = read_status(folder)
        warnings = []
        if status["state"] != "done":
            warnings.append(
                f"This run is not done (state: {status['state']}, step {status['step']} of {status['total_steps']}): "
                "what follows is what it has measured until then."
            )
        if status["degraded"]:
            warnings.append("Some files of this run could not be written while it went on; log.txt may tell which.")
        return warnings
    return ["How this run ended is not known: status.json cannot be read."]


def _incidents(report: Report) -> list[str]:
    incidents = [
        f"Step {row['step']}: a value was not finite; the run went back to the weights of step {row['to']}."
        for row in report["rollbacks"]
    ]
    if report["skipped_steps"]:
        incidents.append(f"{report['skipped_steps']} steps were skipped: their loss or gradient was not finite.")
    return incidents


def _cost(report: Report) -> list[tuple[str, Markup]]:
    def line(text: str, path: str, form: str, factor: float = 1) -> Markup:
        return Markup(text).format(number(report, path, form, factor))

    rows = [
        ("passes", line("{} forward-backward passes", "cost.forward_backward_passes", ",.0f")),
        ("against plain SGD", line("{} times the passes of as many steps", "cost.sgd_equivalents", ".3g")),
        ("time", line("{} s, validation and checkpoints included, pauses left out", "train_seconds", ",.1f")),
        ("speed", line("{} images/s in training", "images_per_second", ",.1f")),
        ("waiting for data", line("{} % of the time of training", "data_wait", ".1f", 100)),
        ("peak memory", line("{} GiB", "peak_memory_bytes", ".2f", 2**-30)),
    ]
    if report["cost"].get("seconds_against_sgd") is not None:
        measured = line("{} times the seconds of as many plain steps", "cost.seconds_against_sgd", ".2f")
        rows.insert(2, ("measured", measured))
    if "bootstrap_passes" in report["cost"]:
        first = "{} of these passes, on the labels as they were"
        rows.insert(1, ("first training", line(first, "cost.bootstrap_passes", ",.0f")))
    return rows


# ------------------------------------------------------------------------------------------------------ learning curves


def _curves(folder: Path, report: Report) -> dict[str, Any]:
    """Charts of loss and error over epochs, at the weights w."""
    rows = read_metrics(folder)
    per_epoch = read_provenance(folder)["steps_per_epoch"]
    sam, spans, note = report["sam"], [], ""
    if sam["enabled"] and (sam["start"] > 0 or sam["end"] < report["steps"]):
        spans = [Span("SAM", sam["start"] / per_epoch, min(sam["end"], report["steps"]) / per_epoch)]
        note = f" The shaded part is trained with SAM, steps {sam['start']} to {sam['end']}; the rest without."
    if sam["enabled"] and sam.get("ascent") in ("momentum", "previous"):
        where = "Train is measured at the perturbed weights, validation at the weights w."
    else:
        where = "Everything is measured at the weights w, not at the perturbed ones."
    return {
        "curves": learning_curves.run_charts(rows, per_epoch, spans),
        "curves_note": f"{where} Train is the mean over an epoch while it was trained, with augmentation, dropout and "
        "label smoothing, so that it may lie above validation, which has none of them."
        f"{note} A gap is a value that was not finite.",
    }


# ---------------------------------------------------------------------------------------------------------- predictions


def _predictions(folder: Path, report: Report, scored: str | None) -> Predictions | str:
    """The predictions that the headline counts, or the reason why there are none."""
    lost = "errors by class, calibration and the most confident mistakes cannot be shown."
    if scored is None:
        return f"Nothing was scored: {lost}"
    try:
        predictions = read(folder / "predictions.parquet", report["dataset"]["classes"])
    except CheckpointError as error:
        cause = f" ({error.cause})" if error.cause else ""
        return f"{error.message}{cause}: {lost}".replace(str(folder), folder.resolve().name)
    n, wrong = len(predictions.rows), int((~predictions.correct).sum())
    if (predictions.split, n, wrong) != (scored, report[scored]["n"], report[scored]["wrong"]):
        counted = f"{wrong} of {n} images of {predictions.split} wrong"
        return f"predictions.parquet is not of the result above ({counted}): {lost}"
    return predictions


def _class_names(folder: Path, report: Report) -> list[str]:
    """The names in a checkpoint; by number where none can be read."""
    classes = report["dataset"]["classes"]
    steps = sorted(path.name for path in (folder / "checkpoints").glob("step-*"))
    for name in (report["selected"], "last", "best", *steps):
        with suppress(OSError, ValueError, KeyError, TypeError):
            checkpoint = resolve_checkpoint(folder / "checkpoints", name)
            manifest = json.loads((checkpoint / "manifest.json").read_text(encoding="utf-8"))
            names = [str(one) for one in manifest["class_names"]]
            if len(names) == classes:
                return names
    return [f"class {i}" for i in range(classes)]


# ------------------------------------------------------------------------------------------------- where it came from


def _settings(folder: Path) -> dict[str, Table]:
    stored, origins = read_settings(folder)
    values = {key: "open" if key not in stored else _format_value(stored[key]) for key in origins if key != "output"}
    rows = [(key, value, origins[key]) for key, value in values.items()]
    columns = [Column("setting"), Column("value"), Column("origin")]
    chosen = Table("settings that are not the default", columns, [row for row in rows if row[2] != "default"])
    return {"chosen": chosen, "all": Table("all settings", columns, rows)}


def _format_values(values: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{key} ({_format_values(value)})" if isinstance(value, dict) else f"{key} {_format_value(value)}"
        for key, value in values.items()
    )


def _format_value(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _provenance(report: Report) -> list[tuple[str, str | Markup]]:
    model, data = report["model"], report["dataset"]
    devices: Counter[str] = Counter(report["devices"])
    images = (number(report, f"dataset.{split}", "d") for split in ("train", "val", "test"))
    pairs: list[tuple[str, str | Markup]] = [
        ("model", f"{model['requested']} → {model['resolved']}, {model['img_size']} px"),
        ("parameters", number(report, "model.parameters", ",d")),
        ("weights", f"{model['weights']}, pretrained on {model['pretraining']}"),
        ("data", f"{data['name']} ({data['source']})"),
        ("images", Markup("train {}, validation {}, test {}").format(*images)),
        ("classes", number(report, "dataset.classes", "d")),
        ("split hash", data["split_hash"]),
    ]
    if "label_noise" in data:
        pairs.append(("label noise", run_report.noise_words(data["label_noise"])))
    pairs += [
        ("update", run_report.sam_words(report["sam"], report["steps"])),
        ("optimizer", _format_values(report["optimizer"])),
        *([("averaged weights", run_report.average_words(report["ema"]))] if report["ema"] else []),
        ("machine", report["machine"]),
        ("devices", ", ".join(f"{count} x {name}" for name, count in devices.items())),
        ("ranks", number(report, "world_size", "d")),
        ("precision", report["precision"]),
        ("versions", ", ".join(f"{name} {version}" for name, version in report["versions"].items())),
        ("started", report["started"]),
        ("checkpoints", ", ".join(report["checkpoints"]) or "none"),
    ]
    return pairs


def _incident_tables(report: Report) -> list[Table]:
    def changed(row: Mapping[str, Any]) -> str | None:
        return "; ".join(f"{key}: {' → '.join(values)}" for key, values in row.get("changed", {}).items()) or None

    resumes = [(row["step"], row["started"], changed(row)) for row in report["resumed"]]
    bad = [(row["where"], row["reason"]) for row in report["bad_images"]]
    tables = (
        Table("resumed", [Column("from step", "d"), Column("at"), Column("changed settings")], resumes),
        Table("images that cannot be decoded and were left out", [Column("image"), Column("reason")], bad),
    )
    return [table for table in tables if table.rows]
