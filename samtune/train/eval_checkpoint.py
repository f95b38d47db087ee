"""Score a checkpoint of a run on the run's own data, or on other data."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from pathlib import Path
from typing import Any

import torch
from torch import nn

from samtune import console
from samtune.config.run_config import RunConfig
from samtune.data import noise, source
from samtune.data.cache import Images, drop_undecodable, raise_if_undecodable, undecodable_rows
from samtune.data.decode import DecodeRule
from samtune.data.source import LabelledDataset, Split
from samtune.data.split_roles import DataSelection
from samtune.data.splits import Indices, RunSplits, open_run_splits
from samtune.distributed import collectives, device
from samtune.errors import DataError, UsageError, shorten
from samtune.models.timm_format import load_checkpoint
from samtune.runs import checkpoint, run_log
from samtune.runs.folder import read_provenance
from samtune.train.evaluation import Evaluation, Progress, evaluate
from samtune.train.run_data import decode_splits, decode_train


def evaluate_checkpoint(
    path: Path,
    *,
    name: str | None,
    split: str | None,
    dataset: str | None,
    selection: DataSelection | None = None,
    progress: Progress,
    ema: bool | None = None,
    gpus: str = "auto",
    processes: int | None = None,
    keep_logits: bool = False,
) -> tuple[Evaluation, dict[str, Any]]:
    """Score a checkpoint folder, or a checkpoint of a run, on a split: (evaluation, what was scored).

    name: "last" or "best" of a run; None takes the one that the run's report scored. ema: score the averaged weights;
    None scores those that the report scored.
    selection: columns and splits of other data. gpus, processes, keep_logits: as in a run and in `evaluate`. Images,
    arithmetic and batches are those of the run, and so are the numbers.

    On the run's own data, which may now be at `dataset`, "val" is the part that the run validated on, "train" the part
    it trained on, "test" (the default) the part it was scored on, and any other name a whole split. On other data each
    image is scored once whose class name the model knows; the default is the test split, or all splits if there is
    none.

    Raises:
        CheckpointError: no such run or checkpoint, or a damaged one.
        DataError: the run's data set is gone or is another one now, or none of the classes of other data are known.
        UsageError: the data set has no such split.
    """
    opened = OpenedCheckpoint.of(path, name, ema=ema)
    selected, evaluations = opened.score(
        lambda: [_select(opened.folder, opened.config, opened.manifest, split, dataset, selection)],
        progress,
        gpus=gpus,
        processes=processes,
        keep_logits=keep_logits,
    )
    about = {"dataset": selected[0].origin, "unknown_classes": dict(selected[0].split.unknown)}
    return evaluations[0], opened.about | about


def _notes(manifest: Mapping[str, Any]) -> Iterator[str]:
    """Why the numbers may not be those of the run's report. manifest: the checkpoint's."""
    if manifest.get("versions", {}).get("evaluation") != run_log.EVALUATION_VERSION:
        yield "this run was made when evaluation resized pictures by another rule: its own scores may differ a little"


@dataclass(frozen=True)
class Selected:
    """The rows that are scored. name: of the split, for the result. decode: decodes them into the cache."""

    name: str
    origin: str
    split: Split
    rows: Indices
    decode: Callable[[], Images]
    on_bad_image: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class OpenedCheckpoint(checkpoint.Opened):
    """A checkpoint that was verified, and what a run did with its data."""

    @classmethod
    def of(cls, path: Path, name: str | None, *, ema: bool | None) -> "OpenedCheckpoint":
        """The checkpoint that a path and a name mean, as in `evaluate_checkpoint`. Raises CheckpointError."""
        return cls(**vars(checkpoint.open_weights(path, name, ema=ema)))

    @property
    def about(self) -> dict[str, Any]:
        """The entries of a result that say which checkpoint it is of."""
        return {"checkpoint": str(self.folder), "step": self.manifest["step"], "ema": self.ema}

    def label_changes(self) -> tuple[Indices, Indices] | None:
        """(rows, labels) of the training labels that the run had changed; None for a run without label noise.

        Raises CheckpointError where the run did not leave them.
        """
        config = self.config
        if not (config.label_noise > 0 or config.train_labels is not None or config.bootstrap):
            return None
        return noise.read_changes(self.folder.resolve().parents[1] / "label_noise.parquet")

    def trained_labels(self, labels: Indices) -> Indices:
        """The train split's labels as the run was trained on them. labels: the data set's. Raises CheckpointError."""
        changes = self.label_changes()
        if changes is None:
            return labels
        trained = labels.copy()
        trained[changes[0]] = changes[1]
        return trained

    def score(
        self,
        select: Callable[[], Sequence[Selected]],
        progress: Progress,
        *,
        gpus: str,
        processes: int | None,
        keep_logits: bool = False,
        stop_requested: Callable[[], bool] = bool,
    ) -> tuple[Sequence[Selected], list[Evaluation]]:
        """Load the model and images as `load` does, and score each selection. All ranks call it.

        keep_logits, stop_requested: as in `evaluate`.
        """
        loaded = self.load(select, gpus=gpus, processes=processes)
        evaluations = [
            evaluate(
                loaded.model,
                images,
                rows,
                selected.name,
                self.config,
                loaded.data_config,
                progress,
                stop_requested=stop_requested,
                keep_logits=keep_logits,
            )
            for selected, images, rows in zip(loaded.selections, loaded.images, loaded.rows, strict=True)
        ]
        return loaded.selections, evaluations

    def load(self, select: Callable[[], Sequence[Selected]], *, gpus: str, processes: int | None) -> "LoadedCheckpoint":
        """Load the model, select rows and decode their images. All ranks call it.

        select: reads the data set and returns the rows to score. gpus, processes: as in a run.
        """
        config = self.config
        target = device.select_device(gpus, processes)
        collectives.init(target)
        with collectives.local_main_process_first():
            model, data_config = load_checkpoint(self.weights)
            selections = select()
            notes = dict.fromkeys(note for selected in selections for note in selected.notes)
            for note in (*notes, *_notes(self.manifest)):
                console.info(note)
            decoded = [selected.decode() for selected in selections]
            for selected, images in zip(selections, decoded, strict=True):
                if selected.on_bad_image == "error":
                    raise_if_undecodable(undecodable_rows(images, selected.rows))
        layout = torch.channels_last if config.channels_last else torch.contiguous_format
        model = model.to(device=target, memory_format=layout)  # type: ignore[call-overload]
        rows = [drop_undecodable(images, selected.rows) for selected, images in zip(selections, decoded, strict=True)]
        return LoadedCheckpoint(model, data_config, selections, decoded, rows)


@dataclass(frozen=True)
class LoadedCheckpoint:
    """A model in evaluation mode on its device, and for each selection its images and the rows that can be decoded."""

    model: nn.Module
    data_config: Mapping[str, Any]
    selections: Sequence[Selected]
    images: Sequence[Images]
    rows: Sequence[Indices]


def _select(
    folder: Path,
    config: RunConfig,
    manifest: Mapping[str, Any],
    split: str | None,
    dataset: str | None,
    selection: DataSelection | None,
) -> Selected:
    """Rows of the run's own data, wherever they are now, or of other data. folder: the checkpoint's."""
    if dataset is None:
        others = f"; --dataset {config.dataset} scores this one as others"
        return rows_of_run(config, manifest, split or "test", open_own_data(folder, config, manifest, hint=others))
    try:
        parts = open_run_splits(config, dataset, manifest["class_names"])
    except (DataError, UsageError):
        parts = None
    if (
        parts is not None
        and selection is None
        and manifest.get("dataset", parts.data.fingerprint) == parts.data.fingerprint
    ):
        return rows_of_run(config, manifest, split or "test", parts)
    return _rows_of_other(
        config, manifest, split, source.open_source(dataset, selection, manifest["class_names"]), selection
    )


def open_own_data(
    folder: Path, config: RunConfig, manifest: Mapping[str, Any], dataset: str | None = None, hint: str = ""
) -> RunSplits:
    """The data of the run that made a checkpoint, with its rows. folder: of the checkpoint.

    dataset: where it is now, if it has moved. hint: added to the error for data that have changed. Raises DataError.
    """
    if dataset is None:
        _check_dataset_exists(config, folder)
    own = open_run_splits(config, dataset, manifest["class_names"])
    if manifest.get("dataset", own.data.fingerprint) != own.data.fingerprint:
        raise DataError(
            f"data set {dataset or config.dataset} is not the one that the run was made with",
            f"its pictures or labels are others than those of {folder}",
            f"--dataset PATH says where the run's own is now{hint}",
        )
    return own


def _check_dataset_exists(config: RunConfig, folder: Path) -> None:
    """Raise DataError if the run's data set was a path that does not exist any more."""
    try:
        origin = str(read_provenance(folder.resolve().parents[1])["dataset"]["source"])
    except (OSError, ValueError, LookupError, TypeError):
        return  # a checkpoint without its run
    if origin == config.dataset and not Path(origin).exists():
        raise DataError(
            f"data set {origin} of the run is not there",
            f"the path is read from {Path.cwd()}" if not Path(origin).is_absolute() else "",
            "--dataset PATH says where it is now",
        )


def rows_of_run(config: RunConfig, manifest: Mapping[str, Any], split: str, parts: RunSplits) -> Selected:
    """The rows of a split as the run took it. parts: the run's data. Raises UsageError."""
    data, rule = parts.data, checkpoint.decode_rule(manifest)
    if split == "val" and not config.val:
        raise UsageError(
            "--split val: this run held nothing out", "--no-val: it trained on its validation images", "--split test"
        )
    if split == "train":
        decode = partial(decode_train, config, parts, rule)
        return Selected(split, data.origin, parts.train, parts.train_rows, decode, config.on_bad_image)
    if split == "val":
        selected, rows = parts.val, parts.val_rows
    elif split == "test" and parts.test is not None:
        selected, rows = parts.test, parts.test_rows
    elif split in data.splits:
        selected, rows = data.splits[split], data.splits[split].labelled
    else:
        raise _no_split(data, split, ["val"])
    return Selected(split, data.origin, selected, rows, decoder(config, selected, rows, rule), config.on_bad_image)


def _rows_of_other(
    config: RunConfig,
    manifest: Mapping[str, Any],
    split: str | None,
    data: LabelledDataset,
    selection: DataSelection | None,
) -> Selected:
    if not data.splits:
        raise DataError(f"data set {data.origin} has no labelled pictures", "; ".join(data.notes))
    role = {"val": "validation"}.get(split or "test", split or "test")
    others = [other for other in data.splits if other != role]
    note = ""
    if split is None and others and role not in data.splits:
        # No split is named: each image is scored once.
        name = "all" if len(others) == 1 else "+".join(others)
        selected = reduce(source.concat_splits, data.splits.values())
        note = f"scored: all splits of {data.name}, {name}; --split takes one" if len(others) > 1 else ""
    elif role in data.splits:
        name, selected = split or role, data.splits[role]
        if split is None and others:
            note = f"scored: split test of {data.name}; --split takes another: {', '.join(others)}"
    else:
        raise _no_split(data, role, [])
    rows = selected.labelled
    if len(rows) == 0:
        raise DataError(
            f"no picture of split {name} of {data.origin} is of a class that the model knows",
            f"its classes: {shorten([*selected.unknown]) or 'none'}; the model's: {shorten(manifest['class_names'])}",
            "classes are matched by their names: name the folders or labels as the model does",
        )
    on_bad_image = selection.on_bad_image if selection is not None else config.on_bad_image
    decode = decoder(config, selected, rows, checkpoint.decode_rule(manifest))
    return Selected(
        name, data.origin, selected, rows, decode, on_bad_image, (*data.notes, note) if note else data.notes
    )


def decoder(config: RunConfig, split: Split, rows: Indices, rule: DecodeRule) -> Callable[[], Images]:
    """A function that decodes these rows of a split into the cache."""
    return lambda: decode_splits(config, [(split, rows)], rule)[0]


def _no_split(data: LabelledDataset, split: str, more: list[str]) -> UsageError:
    return UsageError(
        f"data set {data.name} has no split {split!r}",
        hint="--split " + ", or one of: ".join([*more, ", ".join(data.splits)]),
    )
