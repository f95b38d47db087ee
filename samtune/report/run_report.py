"""The report of a run, report.json and report.md, from the files of its folder."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from samtune.errors import CheckpointError, UsageError, plural
from samtune.report import html
from samtune.runs.folder import BOOTSTRAP, holds_run, read_provenance, read_report, read_settings
from samtune.runs.metrics import best_key, collapse_warning, epoch_means, read_metrics

SCHEMA_VERSION = 1
Row = Mapping[str, Any]
_SCORES = ("split", "n", "wrong", "top1_error", "top1_error_ci95", "top5_error", "mean_per_class_error", "loss")


def seen_warning(count: int) -> str:
    """The warning for test images that train has too."""
    images = "images are" if count > 1 else "image is"
    return f"{count} test {images} in train too, byte for byte: the test error is too low (see `samtune data check`)"


def write(folder: Path, report: Mapping[str, Any]) -> None:
    """Write report.json and report.md. Raises OSError."""
    html.write_json(folder / "report.json", report)
    html.write(folder / "report.md", "run.md", content(report))


def content(report: Mapping[str, Any]) -> dict[str, Any]:
    """Report, title, summary and the checkpoint that was scored, for report.md and report.html."""
    return {
        "report": report,
        "title": f"{report['model']['resolved']} on {report['dataset']['name']}",
        "summary": summary(report),
        "checkpoint": scored_checkpoint(report),
    }


def scored_checkpoint(report: Mapping[str, Any]) -> str:
    """Which checkpoint the scores are of."""
    if report["selected"] == "last":
        return "the last checkpoint"
    if report["selected"] == "average":
        return f"the average of the weights at the end of the run ({average_words(report['ema'])})"
    return f"the checkpoint that was best on validation (epoch {report['best_epoch']})"


def rebuild(folder: Path) -> dict[str, Any]:
    """The report of a run folder, in whatever state the run is.

    Raises UsageError where there is no run, CheckpointError where its files are damaged.
    """
    if not holds_run(folder):
        raise UsageError(f"there is no run in {folder}", hint="give a folder that `samtune run` made")
    try:
        return build(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"the record of run {folder} cannot be read",
            f"{type(error).__name__}: {error}",
            "config.toml and provenance.json must be as the run wrote them",
        ) from None


def build(folder: Path) -> dict[str, Any]:
    """Build the report of a run folder whose steps are done, schema version 1.

    Errors are in percent, intervals are Wilson's at 95 %, times in seconds. train_seconds is the time from the first
    step to the last, with validations and checkpoints, without pauses; images_per_second counts training only.
    test and predictions.parquet are of the selected weights. test_by_checkpoint has the scores and steps of "last" and
    "best", as far as they were scored; both are the same where the last step was the best on validation. ema is of the
    averaged weights: their scores, and their kind, "exponential" or "tail" (the mean over `steps` steps after step
    `start`).
    cost.sgd_equivalents is the number of forward-backward passes over that of plain SGD for as many steps, a pass over
    a part of the network counted by its multiplications. cost.seconds_against_sgd is the same of measured time, where
    the run has rows of plain steps to compare with, and one training. With
    --bootstrap, passes and train_seconds are those of both trainings; cost.bootstrap_passes and cost.bootstrap_seconds
    are those of the first. Values that missing rows of metrics leave open are null.
    """
    config, _ = read_settings(folder)
    first = read_report(folder / BOOTSTRAP) if config.get("bootstrap") else None
    provenance = read_provenance(folder)
    rows = read_metrics(folder)
    train = [row for row in rows if row["split"] == "train"]
    val, test, val_ema, test_ema = (
        [row for row in rows if row["split"] == split] for split in ("val", "test", "val_ema", "test_ema")
    )
    best = min(val, key=best_key) if val else None
    selected = "best" if config["select"] == "best" else "last"
    chosen = best if selected == "best" else (val[-1] if val else None)
    average = _average(config, provenance)
    if average is not None:
        # As it was, after a rollback or with another length of the run than planned.
        averaged = [row["averaged_steps"] for row in (*val_ema, *test_ema) if "averaged_steps" in row]
        average |= {"steps": averaged[-1]} if averaged else {}
        # The tail of a run is whole only at its end.
        of_average = val[-1] if val and average["kind"] == "tail" else chosen
        average |= {
            "test": _scores(test_ema[-1]) if test_ema else None,
            "val": next((_scores(row) for row in val_ema if of_average and row["step"] == of_average["step"]), None),
        }

    images = sum(row["n"] for row in train)
    seconds = sum(row["n"] / row["images_per_second"] for row in train)
    steps = max((row["step"] for row in rows), default=0)
    tested = _by_checkpoint(test, selected, steps, best)
    scored = {"test": _scores(tested[selected]) if selected in tested else None, "val": chosen and _scores(chosen)}
    if average is not None and config["select"] == "average":
        scored = {split: average[split] and average[split] | {"split": split} for split in scored}
    whole_record = 0 < steps == sum(row["steps"] for row in train)
    passes = sum(row["passes"] for row in train) if whole_record else None
    train_seconds = train[-1]["seconds"] if train else None
    cost = {}
    if first is not None:
        first_passes, first_seconds = first["cost"]["forward_backward_passes"], first["train_seconds"]
        passes, train_seconds = _sum(passes, first_passes), _sum(train_seconds, first_seconds)
        cost = {"bootstrap_passes": first_passes, "bootstrap_seconds": first_seconds}
    classes = provenance["dataset"]["classes"]
    per_epoch = provenance["steps_per_epoch"]
    errors = epoch_means(train, "top1_error")
    warnings = [
        collapse_warning(epoch, loss, errors[epoch], classes)
        for epoch, loss in epoch_means(train).items()
        if epoch * per_epoch <= steps
    ]
    return {
        "schema_version": SCHEMA_VERSION,
        "model": provenance["model"],
        "dataset": provenance["dataset"],
        "sam": provenance["sam"],
        "optimizer": provenance["optimizer"],
        "epochs": steps / per_epoch if steps % per_epoch else steps // per_epoch,
        "steps": steps,
        "skipped_steps": sum(row["skipped"] for row in train),
        "seed": config["seed"],
        "devices": provenance["devices"],
        "world_size": provenance.get("world_size", 1),
        "precision": config["amp_dtype"],
        "test": scored["test"],
        "test_by_checkpoint": {name: _scores(row) | {"step": row["step"]} for name, row in tested.items()},
        "val": scored["val"],
        "ema": average,
        "selected": config["select"],
        "best_epoch": best["epoch"] if best else None,
        "train_seconds": train_seconds,
        "images_per_second": images / seconds if train else None,
        "data_wait": sum(row["data_wait"] * row["n"] for row in train) / images if train else None,
        "peak_memory_bytes": max((row["peak_memory_bytes"] for row in train), default=None),
        "cost": {
            "forward_backward_passes": passes,
            "sgd_equivalents": passes / steps if passes is not None else None,
            "seconds_against_sgd": None if cost else _seconds_against_sgd(train),
            **cost,
        },
        "checkpoints": [f"checkpoints/{name}" for name in ("last", "best") if (folder / "checkpoints" / name).exists()],
        "warnings": provenance["warnings"]
        + ([] if whole_record else ["rows of metrics.jsonl are missing: what was to be counted from them is not known"])
        + [warning for warning in warnings if warning],
        "rollbacks": [{"step": row["step"], "to": row["to_step"]} for row in rows if row["split"] == "rollback"],
        "resumed": provenance.get("resumed", []),
        "bad_images": provenance["bad_images"],
        "versions": provenance["versions"],
        "machine": provenance["machine"],
        "started": provenance["started"],
        "command": provenance["command"],
    }


def _seconds_against_sgd(train: Sequence[Row]) -> float | None:
    """Seconds of all steps over what they would have taken without SAM, by the rows of plain steps; None without any.

    Medians leave out the first steps, which are slow.
    """
    with_sam, plain = ([row for row in train if bool(row["sam"]) is has_sam] for has_sam in (True, False))
    if not with_sam or not plain:
        return None
    share = float(sum(row["n"] for row in with_sam) / sum(row["n"] for row in train))
    return 1 + share * (_median_seconds(with_sam) / _median_seconds(plain) - 1)


def _median_seconds(train: Sequence[Row]) -> float:
    """Seconds for an image, over rows of metrics."""
    return float(statistics.median(1 / row["images_per_second"] for row in train))


def _average(config: Row, provenance: Mapping[str, Any]) -> dict[str, Any] | None:
    """Which average of its weights a run has, with its decay or its length. Older runs have only the exponential."""
    if "average" in provenance:
        return None if provenance["average"] is None else dict(provenance["average"])
    return {"kind": "exponential", "decay": config["model_ema_decay"]} if config["model_ema"] else None


def average_words(average: Mapping[str, Any]) -> str:
    """What the averaged weights are. average: as in provenance and report."""
    if average.get("kind") == "tail":
        return f"mean over the last {plural(average['steps'], 'step')}"
    return f"exponential, decay {average['decay']:g}"


def _sum(*numbers: float | None) -> float | None:
    """The sum, or None if one of the numbers is not known."""
    known = [number for number in numbers if number is not None]
    return sum(known) if len(known) == len(numbers) else None


def score_line(scores: Mapping[str, Any]) -> str:
    """One result as text: error, interval, counts."""
    low, high = scores["top1_error_ci95"]
    counts = f"{scores['wrong']} of {scores['n']} wrong"
    return f"{scores['top1_error']:.2f} % (95 % interval {low:.2f} to {high:.2f}; {counts})"


def summary(report: Mapping[str, Any]) -> dict[str, str]:
    """The main results of a run, by name."""
    rows = {"test top-1 error": score_line(report["test"])} if report["test"] else {}
    for name, words in tested_checkpoints(report).items():
        rows[f"test top-1 error, {words}"] = score_line(report["test_by_checkpoint"][name])
    rows |= {"val top-1 error": score_line(report["val"])} if report["val"] else {}
    model, sam, cost = report["model"], report["sam"], report["cost"]
    time = count = "not known: rows of metrics.jsonl are missing"
    if report["train_seconds"] is not None:
        speed = f"{report['images_per_second']:.0f} images/s, data wait {100 * report['data_wait']:.0f} %"
        time = f"{report['train_seconds']:.0f} s, {speed}"
    if cost["sgd_equivalents"] is not None:
        count = f"{cost['forward_backward_passes']:.0f} passes, {cost['sgd_equivalents']:.3g} times plain SGD's"
        measured = cost.get("seconds_against_sgd")
        count += "" if measured is None else f" ({measured:.2f} times its seconds)"
        if "bootstrap_passes" in cost:
            count += f"; {cost['bootstrap_passes']:.0f} of them, and {cost['bootstrap_seconds']:.0f} s, in the first "
            count += "training (bootstrap)"
    scored = report["test"] or report["val"]
    if scored:
        rows["top-5, mean per class"] = (
            f"{scored['top5_error']:.2f} %, {scored['mean_per_class_error']:.2f} % ({scored['split']})"
        )
    is_result = report["selected"] == "average"
    for split in ("test", "val") if report["ema"] and not is_result else ():
        if report["ema"][split]:
            rows[f"{split}, averaged weights"] = score_line(report["ema"][split])
    if report["ema"]:
        rows["averaged weights"] = average_words(report["ema"])
    if "label_noise" in report["dataset"]:
        clean = "validation and test are" if report["dataset"]["val"] else "test is"
        rows["label noise"] = f"{noise_words(report['dataset']['label_noise'])}; {clean} clean"
    rows |= {
        "model": f"{model['resolved']}, pretrained on {model['pretraining']}, {model['img_size']} px",
        "data": "{name}: train {train}, val {val}, test {test}, {classes} classes".format(**report["dataset"]),
        "SAM": sam_words(sam, report["steps"]),
        "time": time,
        "cost": count,
    }
    return rows


def noise_words(noise: Mapping[str, Any]) -> str:
    """How many training labels are changed, and by what."""
    origin = noise["source"] if noise["seed"] is None else f"{noise['kind']}, seed {noise['seed']}"
    words = f"{noise['flipped']} of {noise['n']} training labels changed, {100 * noise['fraction']:.3g} % ({origin})"
    if "first_training" in noise:
        before = noise["first_training"]
        words += f"; in the first training, {noise_words(before) if before else 'none changed'}"
    return words


def sam_words(sam: Mapping[str, Any], steps: int) -> str:
    """The settings of SAM in a run of `steps` steps: rho, p, m, and what is not the default."""
    if not sam["enabled"]:
        return "no SAM (rho 0)"
    options = {
        f"adaptive (eta {sam['eta']:g})": sam["adaptive"],
        f"perturbs {sam['perturb']}": sam["perturb"] != "all",
        f"perturbs from {sam.get('perturb_from')} on": sam.get("perturb_from") is not None,
        f"head x {sam['head_rho_factor']:g}": sam["head_rho_factor"] != 1,
        f"{sam['schedule']}": sam["schedule"] != "constant",
        f"from step {sam['start']} on": sam["start"] > 0,
        f"until step {sam['end']}": sam["end"] < steps,
        f"every {sam['every']} steps": sam["every"] > 1,
        f"{sam['ascent_steps']} ascent steps": sam["ascent_steps"] > 1,
        "random direction": sam.get("ascent") == "random",
        "along the momentum": sam.get("ascent") == "momentum",
        "along the previous gradient": sam.get("ascent") == "previous",
        f"where {sam.get('when')} says so": sam.get("when") is not None,
        "second-order": sam.get("second_order", False),
        f"on {100 * sam['ascent_fraction']:g} % of the batch": sam["ascent_fraction"] < 1,
    }
    parts = [f"SAM rho {sam['rho']:g}", f"p {float(sam['p']):g}", f"m {sam['m']}"]
    return ", ".join(parts + [text for text, is_set in options.items() if is_set])


def tested_checkpoints(report: Mapping[str, Any]) -> dict[str, str]:
    """Key in test_by_checkpoint -> its name in tables; {} where it is the result itself, and for older runs.

    It is where the last checkpoint is the best, unless the result is that of the averaged weights.
    """
    scored = report.get("test_by_checkpoint", {})
    if len({scores["step"] for scores in scored.values()}) < 2:
        if report["selected"] != "average":
            return {}
        scored = {name: scores for name, scores in scored.items() if name == "last"}
    words = {"last": "last epoch", "best": "best epoch on validation"}
    return {name: f"{words[name]} ({scores['epoch']})" for name, scores in scored.items()}


def _by_checkpoint(test: Sequence[Row], selected: str, steps: int, best: Row | None) -> dict[str, Row]:
    """The rows of test by "last" and "best". A row of an older run belongs to the selected checkpoint.

    Both have the same row where the last step was the best on validation. best: the row of the best validation.
    """
    rows = {str(row.get("checkpoint", selected)): row for row in test}
    if len(rows) == 1 and best is not None and best["step"] == steps:
        return dict.fromkeys(("last", "best"), *rows.values())
    return {name: rows[name] for name in ("last", "best") if name in rows}


def _scores(row: Row) -> dict[str, Any]:
    return {key: row[key] for key in _SCORES} | {"epoch": row["epoch"]}


def evaluation_summary(scores: Mapping[str, Any]) -> dict[str, str]:
    """The main results of an evaluation, by name."""
    others = f"{scores['top5_error']:.2f} %, {scores['mean_per_class_error']:.2f} %"
    rows = {f"{scores['split']} top-1 error": score_line(scores), "top-5, mean per class": others}
    if scores["unknown_classes"]:
        rows["classes left out"] = ", ".join(f"{name} ({n})" for name, n in scores["unknown_classes"].items())
    if "temperature" in scores:
        rows |= _temperature_summary(scores["temperature"])
    return rows | {key: str(scores[key]) for key in ("checkpoint", "step", "ema", "dataset")}


def _temperature_summary(fitted: Mapping[str, Any]) -> dict[str, str]:
    return {
        "temperature": f"{fitted['temperature']:.4g}, fitted on {plural(fitted['n'], 'image')} of {fitted['split']}",
        "NLL": f"{fitted['nll_before']:.4f} before, {fitted['nll_after']:.4f} after (nats)",
        "calibration error": f"{100 * fitted['ece_before']:.2f} % before, {100 * fitted['ece_after']:.2f} % after",
        "stored in": fitted["file"],
    }
