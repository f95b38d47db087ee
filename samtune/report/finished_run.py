"""Finished run folders, as comparisons read them: settings, scores, costs, predictions."""

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from samtune.config.run_config import RunConfig
from samtune.errors import CheckpointError, UsageError, first_line
from samtune.report import run_report
from samtune.runs import resume
from samtune.runs.folder import check_done, read_report


@dataclass(frozen=True, eq=False)
class Predictions:
    """Predictions of a split. images: (n, 2), index and label, sorted by index. wrong: (n,), bool."""

    images: npt.NDArray[np.int64]
    wrong: npt.NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class FinishedRun:
    """A run that is done.

    settings: all that decide the result, except the seed. circumstances: weights, machine and versions. scores: the
    report's entry of test, or of validation where test was not scored. test_errors: top-1 error on test in percent of
    the checkpoints "last" and "best", as far as they were scored. predictions: of the same split as scores; None where
    the file is missing or does not agree with the report.
    """

    label: str
    path: Path
    dataset: str
    seed: int
    settings: Mapping[str, Any]
    circumstances: Mapping[str, Any]
    scores: Mapping[str, Any]
    test_errors: Mapping[str, float]
    cost: Mapping[str, Any]
    predictions: Predictions | None


def costs(report: Mapping[str, Any]) -> dict[str, float | None]:
    """The costs that a run's report states."""
    return {
        "epochs": report["epochs"],
        "steps": report["steps"],
        "passes": report["cost"]["forward_backward_passes"],
        "seconds": report["train_seconds"],
        "images_per_second": report["images_per_second"],
    }


def mean_costs(of_runs: Sequence[Mapping[str, float | None]]) -> dict[str, float | None]:
    """Means over runs; None where the cost of a run is not known, or without runs."""
    keys = ("epochs", "steps", "passes", "seconds", "images_per_second")
    known = {key: [value for run in of_runs if (value := run[key]) is not None] for key in keys}
    return {key: fmean(values) if values and len(values) == len(of_runs) else None for key, values in known.items()}


def read(folder: Path, label: str) -> FinishedRun:
    """Read a run folder. A missing report.json is rebuilt from the other files.

    Raises:
        UsageError: no run in this folder, or one that is not done or was scored on nothing.
        CheckpointError: a file that cannot be read.
    """
    check_done(folder)
    try:
        report = read_report(folder) if (folder / "report.json").is_file() else run_report.rebuild(folder)
        stored = tomllib.loads((folder / "config.toml").read_text(encoding="utf-8"))
        scores = report["test"] or report["val"]
        if scores is None:
            raise UsageError(f"run {folder} was scored on nothing", "it has neither test nor validation images")
        # Settings that are younger than the run had their default.
        settings = RunConfig(model="", dataset="").model_dump(mode="json") | stored
        return FinishedRun(
            label=label,
            path=folder,
            dataset=report["dataset"]["name"],
            seed=report["seed"],
            settings={key: value for key, value in settings.items() if key not in {"seed", *resume.RUNTIME_ONLY}}
            | {"world_size": report["world_size"]},
            circumstances={
                "weights used": report["model"]["weights"],
                "machine": report["machine"],
                "devices": ", ".join(report["devices"]),
                **{f"{package} version": version for package, version in report["versions"].items()},
            },
            scores={key: scores[key] for key in ("split", "n", "wrong", "top1_error", "top1_error_ci95")},
            test_errors={name: of["top1_error"] for name, of in report.get("test_by_checkpoint", {}).items()},
            cost=costs(report),
            predictions=_read_predictions(folder / "predictions.parquet", scores),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"the record of run {folder} is damaged",
            first_line(error),
            "remove report.json, which is then made from the other files, or predictions.parquet, which only tests "
            "need; or repeat the run",
        ) from None


def _read_predictions(path: Path, scores: Mapping[str, Any]) -> Predictions | None:
    if not path.is_file():
        return None
    table = pq.read_table(path).sort_by("index")
    index, labels, predictions = (table[name].to_numpy() for name in ("index", "label", "prediction"))
    wrong = labels != predictions
    split = (table.schema.metadata or {}).get(b"split", b"").decode()
    if (split, len(wrong), int(wrong.sum())) != (scores["split"], scores["n"], scores["wrong"]):
        return None
    return Predictions(np.stack([index, labels], axis=1), wrong)
