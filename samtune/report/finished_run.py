"""A run folder that is done, as comparisons need it: settings, scores, cost, and what was said of each image."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from samtune.config.run_config import RunConfig
from samtune.errors import CheckpointError, UsageError, first_line
from samtune.report import run_report
from samtune.runs import resume
from samtune.runs.folder import check_done, read_report, read_settings


@dataclass(frozen=True, eq=False)
class Predictions:
    """What a model said of the images of a split. images: (n, 2) index and label, by index. wrong: (n,) of bool."""

    images: npt.NDArray[np.int64]
    wrong: npt.NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class FinishedRun:
    """A run folder as it was read.

    settings: what decides the result, but for the seed. circumstances: what else may matter. scores: the report's entry
    of test, or of validation where test was not scored. predictions: of that split; None where they are not there, or
    are not what the report counted.
    """

    label: str
    path: Path
    dataset: str
    seed: int
    settings: Mapping[str, Any]
    circumstances: Mapping[str, Any]
    scores: Mapping[str, Any]
    cost: Mapping[str, Any]
    predictions: Predictions | None


def read(folder: Path, label: str) -> FinishedRun:
    """Read report.json, or make it from the other files where it is missing, with config.toml and predictions.parquet.

    Raises:
        UsageError: no run in this folder, or one that is not done or was scored on nothing.
        CheckpointError: a file that cannot be read.
    """
    check_done(folder)
    try:
        about = read_report(folder) if (folder / "report.json").is_file() else run_report.rebuild(folder)
        stored = read_settings(folder)[0]
        scores = about["test"] or about["val"]
        if scores is None:
            raise UsageError(f"run {folder} was scored on nothing", "it has neither test nor validation images")
        # Settings that are younger than the run had their default.
        settings = RunConfig(model="", dataset="").model_dump(mode="json") | stored
        return FinishedRun(
            label=label,
            path=folder,
            dataset=about["dataset"]["name"],
            seed=about["seed"],
            settings={key: value for key, value in settings.items() if key not in {"seed", *resume.RUNTIME_ONLY}}
            | {"world_size": about["world_size"]},
            circumstances={
                "weights used": about["model"]["weights"],
                "machine": about["machine"],
                "devices": ", ".join(about["devices"]),
                **{f"{package} version": version for package, version in about["versions"].items()},
            },
            scores={key: scores[key] for key in ("split", "n", "wrong", "top1_error", "top1_error_ci95")},
            cost={
                "epochs": about["epochs"],
                "steps": about["steps"],
                "passes": about["cost"]["forward_backward_passes"],
                "seconds": about["train_seconds"],
                "images_per_second": about["images_per_second"],
            },
            predictions=_read_predictions(folder / "predictions.parquet", scores),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"the record of run {folder} is damaged",
            first_line(error),
            "remove report.json, which is then made from the other files, or predictions.parquet, which tests alone "
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
