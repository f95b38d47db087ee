"""Run folder -> report.html: what report.json, metrics.jsonl and predictions.parquet say, drawn."""

import json
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from markupsafe import Markup

from samtune.errors import CheckpointError
from samtune.report import html, run_charts, run_report
from samtune.report.html import Column, Table, number
from samtune.report.run_charts import SPLITS
from samtune.report.svg_charts import Span
from samtune.runs import listing
from samtune.runs.folder import read_provenance, read_settings, read_status, resolve_checkpoint, result_folder
from samtune.runs.metrics import read_metrics
from samtune.runs.predictions import Predictions, read
from samtune.text import plural

_SCORES = {
    **{"test": "test", "val": "validation"},
    **{"ema.test": "test, averaged weights", "ema.val": "validation, averaged weights"},
}


def write_report_page(folder: Path, output: Path, refresh: float | None = None) -> tuple[dict[str, Any], Path]:
    """Write report.json, report.md and report.html of a run folder into another, or the same: (report, the page).

    refresh: seconds after which a browser loads the page again.

    Raises MachineError where they cannot be written, and what `report.recollect` raises.
    """
    result = run_report.rebuild(folder)
    drawn = output / "report.html"
    with result_folder(output):
        run_report.write(output, result)
        write(drawn, folder, result, refresh=refresh)
    return result, drawn


def write(
    path: Path,
    folder: Path,
    result: Mapping[str, Any],
    opened: run_charts.Opened | None = None,
    refresh: float | None = None,
) -> None:
    """Write the page of a run folder and its report. opened: its splits by name, where they are at hand.

    refresh: seconds after which a browser loads the page again. Raises OSError.
    """
    shown = content(folder, result, opened)
    html.write(path, "run.html", shown | {"refresh": refresh and math.ceil(refresh)})


def follow(folder: Path, output: Path, seconds: float, say: Callable[[str], None]) -> None:
    """Publish a run again whenever it has measured more, until no process writes it; the page is named once.

    seconds: between two looks, and after which a browser loads the page again. Raises what `publish` raises.
    """
    seen, said = None, False
    while listing.is_running(folder):
        rows = len(read_metrics(folder))
        if rows != seen:
            _, drawn = write_report_page(folder, output, refresh=seconds)
            if not said:
                say(f"page: {drawn}; it is drawn again whenever the run has measured more, until it ends or Ctrl-C")
            seen, said = rows, True
        time.sleep(seconds)


def content(folder: Path, result: Mapping[str, Any], opened: run_charts.Opened | None = None) -> dict[str, Any]:
    """What templates/run.html shows of a run. opened: its splits by name, where they are at hand."""
    scored = next((split for split in SPLITS if result[split]), None)
    found = _predictions(folder, result, scored)
    sections = {"result": "Result", "curves": "Learning curves", "cost": "Cost"}
    if isinstance(found, Predictions):
        names = _class_names(folder, result)
        settings, _ = read_settings(folder)
        about = (
            run_charts.by_class(found, names)
            | run_charts.calibration(
                found, classes=len(names), smoothing=settings["smoothing"], has_val=settings["val"]
            )
            | run_charts.mistakes(folder, found, names, opened)
        )
        sections |= {"errors": "Errors by class", "calibration": "Calibration", "mistakes": "Mistakes"}
    else:
        about = {"predictions_missing": found}
        sections["errors"] = "Errors"
    sections |= {"settings": "Settings", "provenance": "Provenance"}
    return {
        "report": result,
        "title": f"{result['model']['resolved']} on {result['dataset']['name']}",
        "subtitle": f"Run {folder.resolve().name}: {run_report.sam_words(result['sam'], result['steps'])}; "
        f"{_length(result)}, seed {result['seed']}; started {result['started'].replace('T', ' ').rstrip('Z')} UTC.",
        "sections": sections,
        "scored": scored,
        "score_paths": dict(_score_paths(result)),
        "reading": _reading(result, scored),
        "warnings": state(folder) + _incidents(result) + list(result["warnings"]),
        "cost": _cost(result),
        "settings": _settings(folder),
        "provenance": _provenance(result),
        "provenance_tables": _incident_tables(result),
        "predictions_missing": None,
        **_curves(folder, result),
        **about,
    }


def _score_paths(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    there = {"test": result["test"], "val": result["val"]}
    there |= {f"ema.{split}": scores for split, scores in (result["ema"] or {}).items() if split in SPLITS}
    return [(name, path) for path, name in _SCORES.items() if there.get(path)]


# ---------------------------------------------------------------------------------------------------------- the result


def _reading(result: Mapping[str, Any], scored: str | None) -> list[str]:
    """What the headline does say, and what it does not."""
    if scored is None:
        return ["No image was held out of training, or none is scored yet: how good this model is, is not known."]
    which = "the last checkpoint"
    if result["selected"] == "best":
        which = f"the checkpoint that was best on validation (epoch {result['best_epoch']})"
    said = [
        f"Scored is {which}. The interval is Wilson's: how well {result[scored]['n']} images pin down the error of "
        "this one model. It does not say what another seed would give. This is one run, with seed "
        f"{result['seed']}: it cannot show that its settings are better than others; several seeds of each, compared "
        "in pairs, can."
    ]
    if scored == "val":
        said.append(
            "No test split was scored. Where settings, or the checkpoint, were chosen on these validation images, "
            "their error is too low."
        )
    return said


def state(folder: Path) -> list[str]:
    """What there is to say of a run that is not done, or lost files of its own; nothing of others."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        status = read_status(folder)
        said = []
        if status["state"] != "done":
            said.append(
                f"This run is not done (state: {status['state']}, step {status['step']} of {status['total_steps']}): "
                "what follows is what it has measured until then."
            )
        if status["degraded"]:
            said.append("Some files of this run could not be written while it went on; log.txt may tell which.")
        return said
    return ["How this run ended is not known: status.json cannot be read."]


def _incidents(result: Mapping[str, Any]) -> list[str]:
    said = [
        f"Step {row['step']}: a value was not finite; the run went back to the weights of step {row['to']}."
        for row in result["rollbacks"]
    ]
    if result["skipped_steps"]:
        said.append(f"Steps skipped because loss or gradient was not finite: {result['skipped_steps']}.")
    return said


def _length(result: Mapping[str, Any]) -> str:
    epochs = f"{result['epochs']:.4g}"
    return f"{plural(epochs, 'epoch')}, {plural(result['steps'], 'step')}"


def _cost(result: Mapping[str, Any]) -> list[tuple[str, Markup]]:
    def line(text: str, path: str, form: str, factor: float = 1) -> Markup:
        return Markup(text).format(number(result, path, form, factor))

    return [
        ("passes", line("{} forward-backward passes", "cost.forward_backward_passes", ",.0f")),
        ("against plain SGD", line("{} times the passes of as many steps", "cost.sgd_equivalents", ".3g")),
        ("time", line("{} s, validation and checkpoints included, pauses left out", "train_seconds", ",.1f")),
        ("speed", line("{} images/s in training", "images_per_second", ",.1f")),
        ("waiting for data", line("{} % of the time of training", "data_wait", ".1f", 100)),
        ("peak memory", line("{} GiB", "peak_memory_bytes", ".2f", 2**-30)),
    ]


# ------------------------------------------------------------------------------------------------------ learning curves


def _curves(folder: Path, result: Mapping[str, Any]) -> dict[str, Any]:
    """Charts of loss and error over epochs, at the weights w themselves."""
    rows = read_metrics(folder)
    per_epoch = read_provenance(folder)["steps_per_epoch"]
    sam, spans, note = result["sam"], [], ""
    if sam["enabled"] and (sam["start"] > 0 or sam["end"] < result["steps"]):
        spans = [Span("SAM", sam["start"] / per_epoch, min(sam["end"], result["steps"]) / per_epoch)]
        note = f" The shaded part is trained with SAM, steps {sam['start']} to {sam['end']}; the rest without."
    return {
        "curves": run_charts.curves(rows, per_epoch, spans),
        "curves_note": "Everything is measured at the weights w, not at the perturbed ones. Train is the mean over an "
        "epoch while it was trained, with augmentation, dropout and label smoothing, so that it may lie above "
        f"validation, which has none of them.{note} A gap is a value that was not finite.",
    }


# ---------------------------------------------------------------------------------------------------------- predictions


def _predictions(folder: Path, result: Mapping[str, Any], scored: str | None) -> Predictions | str:
    """Those that the headline counts, or why there are none."""
    lost = "errors by class, calibration and the most confident mistakes cannot be shown."
    if scored is None:
        return f"Nothing was scored: {lost}"
    try:
        found = read(folder / "predictions.parquet", result["dataset"]["classes"])
    except CheckpointError as error:
        why = f" ({error.cause})" if error.cause else ""
        return f"{error.message}{why}: {lost}".replace(str(folder), folder.resolve().name)
    n, wrong = len(found.rows), int((~found.correct).sum())
    if (found.split, n, wrong) != (scored, result[scored]["n"], result[scored]["wrong"]):
        return f"predictions.parquet is not of the result above ({wrong} of {n} images of {found.split} wrong): {lost}"
    return found


def _class_names(folder: Path, result: Mapping[str, Any]) -> list[str]:
    """As a checkpoint has them; by number where none can be read."""
    classes = result["dataset"]["classes"]
    steps = sorted(path.name for path in (folder / "checkpoints").glob("step-*"))
    for name in (result["selected"], "last", "best", *steps):
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
    rows = [
        (key, "open" if key not in stored else _word(stored[key]), origin)
        for key, origin in origins.items()
        if key != "output"
    ]
    columns = [Column("setting"), Column("value"), Column("origin")]
    chosen = [row for row in rows if row[2] != "default"]
    return {
        "chosen": Table("settings that are not the default", columns, chosen),
        "all": Table("all settings", columns, rows),
    }


def _words(values: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{key} ({_words(value)})" if isinstance(value, dict) else f"{key} {_word(value)}"
        for key, value in values.items()
    )


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _provenance(result: Mapping[str, Any]) -> list[tuple[str, str | Markup]]:
    model, data = result["model"], result["dataset"]
    devices = Counter(result["devices"])
    pairs: list[tuple[str, str | Markup]] = [
        ("model", f"{model['requested']} → {model['resolved']}, {model['img_size']} px"),
        ("parameters", number(result, "model.parameters", ",d")),
        ("weights", f"{model['weights']}, pretrained on {model['pretraining']}"),
        ("data", f"{data['name']} ({data['source']})"),
        (
            "images",
            Markup("train {}, validation {}, test {}").format(
                *(number(result, f"dataset.{split}", "d") for split in ("train", "val", "test"))
            ),
        ),
        ("classes", number(result, "dataset.classes", "d")),
        ("split hash", data["split_hash"]),
    ]
    if "label_noise" in data:
        pairs.append(("label noise", run_report.noise_words(data["label_noise"])))
    pairs += [
        ("update", run_report.sam_words(result["sam"], result["steps"])),
        ("optimizer", _words(result["optimizer"])),
        ("machine", result["machine"]),
        ("devices", ", ".join(f"{count} x {name}" for name, count in devices.items())),
        ("ranks", number(result, "world_size", "d")),
        ("precision", result["precision"]),
        ("versions", ", ".join(f"{name} {version}" for name, version in result["versions"].items())),
        ("started", result["started"]),
        ("checkpoints", ", ".join(result["checkpoints"]) or "none"),
    ]
    return pairs


def _incident_tables(result: Mapping[str, Any]) -> list[Table]:
    resumes = [
        (
            row["step"],
            row["started"],
            "; ".join(f"{key}: {' → '.join(values)}" for key, values in row.get("changed", {}).items()) or None,
        )
        for row in result["resumed"]
    ]
    bad = [(row["where"], row["reason"]) for row in result["bad_images"]]
    return [
        table
        for table in (
            Table("resumed", [Column("from step", "d"), Column("at"), Column("changed settings")], resumes),
            Table("images that cannot be decoded and were left out", [Column("image"), Column("reason")], bad),
        )
        if table.rows
    ]
