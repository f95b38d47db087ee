"""A run's predictions for its training images, as a file of labels to train on: `samtune relabel`, --bootstrap."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from samtune.data.splits import Indices, RunSplits
from samtune.distributed import collectives
from samtune.errors import MachineError
from samtune.files import replacing
from samtune.runs import checkpoint
from samtune.train.eval_checkpoint import OpenedCheckpoint, Selected, decoder, open_own_data, rows_of_run
from samtune.train.evaluation import Evaluation, Progress


def relabel(
    path: Path,
    output: Path,
    *,
    name: str | None,
    progress: Progress,
    ema: bool | None = None,
    dataset: str | None = None,
    probabilities: bool = False,
    trained_only: bool = False,
    gpus: str = "auto",
    processes: int | None = None,
    stop_requested: Callable[[], bool] = bool,
) -> dict[str, Any]:
    """Predict the classes of a run's training images, in evaluation mode and without augmentation, and write them.

    The parquet file has a row for each row of the train split, in its order: index, label (the predicted class),
    probability, dataset_label, and trained_label, which the run was trained on. Classes are names. Images without a
    label, and images that cannot be decoded, have no predicted class. Images that the run was not trained on, such as
    those held out for validation, have no trained_label. With --no-val, the rows of validation follow.

    path, name, ema, gpus, processes: as in `evaluate_checkpoint`. dataset: where the run's data are now.
    probabilities: also write those of all classes, a list for each row. trained_only: predict only images that the run
    was trained on. stop_requested: as in `evaluate`. Rank 0 writes, and all ranks return the summary.

    Raises what `evaluate_checkpoint` raises, CheckpointError if the labels of the run are not known any more, and
    MachineError where the file cannot be written.
    """
    opened = OpenedCheckpoint.of(path, name, ema=ema)
    found: list[RunSplits] = []

    def select() -> list[Selected]:
        found.append(open_own_data(opened.folder, opened.config, opened.manifest, dataset))
        return [*_selections(opened, found[0], trained_only)]

    _, evaluations = opened.score(
        select, progress, gpus=gpus, processes=processes, keep_logits=probabilities, stop_requested=stop_requested
    )
    (parts,) = found
    own = parts.train.labels
    rows = np.concatenate([scored.rows for scored in evaluations])
    predicted = np.full(len(own), -1)
    predicted[rows] = np.concatenate([scored.predictions for scored in evaluations])
    trained_rows = evaluations[0].rows

    def write() -> dict[str, Any]:
        trained = np.full(len(own), -1)
        trained[trained_rows] = opened.trained_labels(own)[trained_rows]
        table = _table(opened.manifest["class_names"], own, trained, predicted, rows, evaluations, probabilities)
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
            with replacing(output) as part:
                pq.write_table(table, part)
        except OSError as error:
            raise MachineError(f"{output} cannot be written", error.strerror or str(error), "write elsewhere") from None
        counts = _mended(own[trained_rows], trained[trained_rows], predicted[trained_rows])
        images = {"output": str(output), "rows": len(own), "images": len(rows), "trained": len(trained_rows)}
        noisy = None if opened.label_changes() is None else counts
        differ = int((predicted[rows] != own[rows]).sum())
        return images | {"differ": differ, "label_noise": noisy, "dataset": parts.data.origin} | opened.about

    return collectives.broadcast_from_rank0(write)


def _selections(opened: OpenedCheckpoint, parts: RunSplits, trained_only: bool) -> Iterator[Selected]:
    """The images that the run was trained on, then those it validated on if they are of train, then the others."""
    config, manifest = opened.config, opened.manifest
    trained = rows_of_run(config, manifest, "train", parts)
    yield trained
    if trained_only:
        return
    used = [trained.rows]
    if config.val and parts.val is parts.train:
        held_out = rows_of_run(config, manifest, "val", parts)
        yield held_out
        used.append(held_out.rows)
    others = np.setdiff1d(parts.train.labelled, np.concatenate(used))
    if len(others):
        decode = decoder(config, parts.train, others, checkpoint.decode_rule(manifest))
        yield Selected("train, not used", trained.origin, parts.train, others, decode, config.on_bad_image)


def _table(
    class_names: list[str],
    own: Indices,
    trained: Indices,
    predicted: Indices,
    rows: Indices,
    evaluations: list[Evaluation],
    probabilities: bool,
) -> pa.Table:
    names = pa.array(class_names)
    unknown = np.ones(len(own), dtype=bool)
    unknown[rows] = False

    def classes(labels: Indices) -> pa.Array:
        return pa.DictionaryArray.from_arrays(pa.array(labels, mask=labels < 0), names)

    probability = np.zeros(len(own), dtype=np.float32)
    probability[rows] = np.concatenate([scored.probability for scored in evaluations])
    columns = {
        "index": np.arange(len(own)),
        "label": classes(predicted),
        "probability": pa.array(probability, mask=unknown),
        "dataset_label": classes(own),
        "trained_label": classes(trained),
    }
    if probabilities:
        every: npt.NDArray[np.float32] = np.zeros((len(own), len(class_names)), dtype=np.float32)
        for scored in evaluations:
            every[scored.rows] = torch.from_numpy(scored.logits).softmax(1).numpy()
        columns["probabilities"] = pa.FixedSizeListArray.from_arrays(
            pa.array(every.ravel()), len(class_names), mask=pa.array(unknown)
        )
    return pa.table(columns)


def _mended(own: Indices, trained: Indices, predicted: Indices) -> dict[str, int]:
    """How many wrong training labels are right in the predictions, and how many right ones are wrong."""
    was_wrong, is_wrong = trained != own, predicted != own
    return {
        "wrong": int(was_wrong.sum()),
        "mended": int((was_wrong & ~is_wrong).sum()),
        "right": int((~was_wrong).sum()),
        "spoiled": int((~was_wrong & is_wrong).sum()),
    }


def summary(result: Mapping[str, Any]) -> dict[str, str]:
    """The result of `relabel` as text, by name."""
    share = 100 * result["differ"] / result["images"]
    rows = {
        "written": f"{result['output']}: {result['images']} of {result['rows']} rows of train have a predicted class",
        "differ": f"{result['differ']} ({share:.3g} %) from the data set's labels",
    }
    if result["label_noise"] is not None:
        rows["label noise"] = noise_words(result["label_noise"])
    return rows | {key: str(result[key]) for key in ("checkpoint", "step", "ema", "dataset")}


def noise_words(counts: Mapping[str, int]) -> str:
    """How the predictions compare with the labels that the run was trained on."""
    return "of {wrong} wrong labels {mended} are right now; of {right} right ones {spoiled} are wrong now".format(
        **counts
    )
