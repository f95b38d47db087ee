"""Run folders written by hand: what a run would leave, without a run."""

import json
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from samtune.config import loading
from samtune.report import run_report
from samtune.report.stats import wilson_interval
from samtune.runs.metrics import best_key
from samtune.sweep import arms, ledger
from samtune.sweep.ledger import Run
from samtune.sweep.plan import Plan
from samtune.sweep.run import check
from samtune.sweep.spec import load as load_recipe

STEPS_PER_EPOCH = 5
_COLUMNS = ("step", "epoch", "split", "loss", "top1_error", "lr", "rho", "sam", "grad_norm", "images_per_second")


def write_run(
    folder: Path,
    *,
    classes: Sequence[str] = ("cat", "dog", "owl"),
    epochs: int = 3,
    images: int = 60,
    val: bool = True,
    test: bool = True,
    ema: bool = False,
    both: bool = False,
    sam_start: int = 0,
    not_finite: Sequence[int] = (),
    right: float = 0.7,
    wrong: Collection[int] | None = None,
    passes: float = 10.0,
    dataset: str = "./nowhere",
    seed: int = 0,
    status: dict[str, Any] | None = None,
    provenance: dict[str, Any] | None = None,
    **flags: Any,
) -> Path:
    """The folder of a run that is done. images: of each scored split. not_finite: epochs without a finite train loss.

    both: the last and the best checkpoint are scored on test, as in runs with validation; else the selected one, as in
    older runs.

    right: share of right predictions; wrong: which images, at the end, are wrong. passes: of an epoch. status,
    provenance: fields of these files that differ. flags: settings.
    """
    (folder / "checkpoints" / "last").mkdir(parents=True)
    steps = epochs * STEPS_PER_EPOCH
    settings = loading.load(None, {"model": "resnet10t", "dataset": dataset, "seed": seed, "model_ema": ema} | flags)
    (folder / "config.toml").write_text(settings.to_toml(), encoding="utf-8")
    _write_json(folder / "checkpoints" / "last" / "manifest.json", {"class_names": list(classes), "step": steps})
    done = {"state": "done", "exit_code": 0, "step": steps, "total_steps": steps, "degraded": False, "error": None}
    _write_json(folder / "status.json", done | (status or {}))
    sizes = {"train": 40, "val": images if val else 0, "test": images if test else 0}
    _write_json(folder / "provenance.json", _provenance(classes, sizes, sam_start, steps) | (provenance or {}))

    draw = np.random.default_rng(seed)
    rows = []
    for epoch in range(1, epochs + 1):
        step = epoch * STEPS_PER_EPOCH
        loss = None if epoch in not_finite else 1.5 / epoch
        rows.append(
            {"step": step, "epoch": epoch, "split": "train", "loss": loss, "top1_error": 60 / epoch, "n": 40}
            | {"images_per_second": 50.5, "data_wait": 0.0123, "steps": STEPS_PER_EPOCH, "passes": passes, "skipped": 0}
            | {"peak_memory_bytes": 3 * 2**29, "rho": 0.05, "sam": step > sam_start}
        )
        if val:
            rows += [
                {"step": step, "epoch": epoch} | _scores(split, *_predict(draw, len(classes), images, right))
                for split in ("val", "val_ema")[: 1 + ema]
            ]
    scored = "test" if test else "val"
    labels, predicted = _predict(draw, len(classes), images, right)
    if wrong is not None:
        predicted = np.where(np.isin(np.arange(images), list(wrong)), (labels + 1) % len(classes), labels)
    if test:
        best = min((row for row in rows if row["split"] == "val"), key=best_key) if both else None
        if best is not None and best["step"] != steps:
            scores = _scores("test", *_predict(draw, len(classes), images, right))
            rows.append({"step": best["step"], "epoch": best["epoch"], "checkpoint": "best"} | scores)
        name = {"checkpoint": "last"} if both else {}
        rows.append({"step": steps, "epoch": epochs} | name | _scores("test", labels, predicted))
    elif val:  # what is scored at last is the last validation again
        rows[-1 - ema] |= _scores("val", labels, predicted)
    lines = (json.dumps(dict.fromkeys(_COLUMNS) | row | {"seconds": float(i + 1)}) for i, row in enumerate(rows))
    (folder / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    if test or val:
        probability = draw.uniform(1 / len(classes), 1, images).astype(np.float32)
        write_predictions(folder / "predictions.parquet", scored, labels, predicted, probability)
    return folder


def write_sweep(
    folder: Path, recipe: str, wrong: Callable[[Run], Collection[int] | int | None], *, images: int = 60
) -> Path:
    """The folder of a sweep with this table [sweep], whose budgets are passes.

    wrong: which of the images of a run are wrong at its end; None: it has not begun; a number: it failed, with this
    code.
    """
    (folder / "logs").mkdir(parents=True)
    head = f'model = "resnet10t"\ndataset = "{folder}"\nbatch_size = 8\nepochs = 4\n\n[sweep]\n'
    (folder / "sweep.toml").write_text(head + recipe, encoding="utf-8")
    loaded = load_recipe(folder / "sweep.toml", {})
    (folder / "sweep.toml").write_text(loaded.to_toml(), encoding="utf-8")
    plan = Plan(loaded, lambda config: 40)
    runs: list[Run] = []
    chosen = []

    def write(run: Run) -> ledger.Outcome:
        runs.append(run)
        _write_run_of(folder, run, wrong(run), images)
        return ledger.outcome(folder, run.id)

    for budget, arm in plan.arms():
        tried = [{run.seed: write(run) for run in by_seed} for by_seed in plan.selections(budget, arm, {})]
        best = ledger.choose(tried) if tried else 0
        point = None if best is None else arms.points(loaded, arm)[best]
        chosen.append({"budget": budget and str(budget), "arm": arm, "point": point, "by": "validation"})
        for run in [] if point is None else plan.finals(budget, arm, point, {}):
            write(run)
    outcomes = {run.id: ledger.outcome(folder, run.id) for run in runs}
    ledger.write(folder, runs, outcomes, chosen, len(check(plan)))
    return folder


def _write_run_of(folder: Path, run: Run, wrong: Collection[int] | int | None, images: int) -> None:
    if wrong is None:
        return
    made: dict[str, Any] = {"epochs": max(1, run.steps // STEPS_PER_EPOCH), "images": images, "seed": run.seed}
    made |= {"val": run.settings["val"], "test": run.stage == "final"}
    made["both"] = made["val"] and made["test"]
    made |= {key: value for key, value in run.settings.items() if key not in (*made, "epochs", "sam_start")}
    output = ledger.run_folder(folder, run.id)
    if isinstance(wrong, int):
        failed = {"state": "failed", "exit_code": wrong, "error": {"what": "it went wrong"}}
        write_run(output, status=failed, **made)
        ledger.log_folder(folder, run.id).mkdir()
        ledger.write_exit_code(folder, run.id, wrong)
        return
    write_run(output, wrong=wrong, passes=run.passes / made["epochs"], **made)
    run_report.write(output, run_report.build(output))


def write_predictions(path: Path, split: str, labels: Any, predicted: Any, probability: Any) -> None:
    """As a run writes them."""
    columns = {"index": np.arange(len(labels)), "label": labels, "prediction": predicted, "probability": probability}
    pq.write_table(pa.table(columns).replace_schema_metadata({"split": split}), path)


def _predict(draw: np.random.Generator, classes: int, images: int, right: float) -> tuple[Any, Any]:
    labels = np.arange(images) % classes
    other = (labels + draw.integers(1, classes, images)) % classes
    return labels, np.where(draw.uniform(size=images) < right, labels, other)


def _scores(split: str, labels: Any, predicted: Any) -> dict[str, Any]:
    n, wrong = len(labels), int((labels != predicted).sum())
    by_class = [100 * (predicted[labels == label] != label).mean() for label in np.unique(labels)]
    return {
        **{"split": split, "n": n, "wrong": wrong, "top1_error": 100 * wrong / n, "loss": 0.7 + wrong / n},
        "top1_error_ci95": [100 * bound for bound in wilson_interval(wrong, n)],
        **{"top5_error": 0.0, "mean_per_class_error": float(np.mean(by_class))},
    }


def _provenance(classes: Sequence[str], sizes: dict[str, int], sam_start: int, steps: int) -> dict[str, Any]:
    return {
        "command": "samtune run --model resnet10t --dataset 'my <photos>'",
        "started": "2026-01-02T03:04:05Z",
        "versions": {"python": "3.11.7", "samtune": "0.1.0", "torch": "2.15.0"},
        "machine": "Linux x86_64, 2 cores",
        "devices": ["cpu (2 threads)"],
        "world_size": 1,
        "model": {"requested": "resnet10t", "resolved": "resnet10t.c3_in1k", "weights": "random"}
        | {"pretraining": "none", "parameters": 4923514, "img_size": 32},
        "dataset": {"name": "photos", "source": "./nowhere", "classes": len(classes), "split_hash": "e8840c06d8a85b10"}
        | sizes,
        "optimizer": {"name": "sgd", "lr": 0.01, "nesterov": True},
        "sam": {"enabled": True, "rho": 0.05, "p": 2.0, "adaptive": False, "eta": 0.01, "m": "device", "m_images": 8}
        | {"perturb": "all", "head_rho_factor": 1.0, "start": sam_start, "end": steps, "every": 1}
        | {"schedule": "constant", "final": 0.0, "warmup_steps": 3, "ascent_fraction": 1.0, "ascent_steps": 1},
        "bad_images": [],
        "warnings": [],
        "steps_per_epoch": STEPS_PER_EPOCH,
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
