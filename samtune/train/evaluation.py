"""Exact metrics of one pass over a split: counts first, one division at the end."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial, reduce
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import nn

from samtune import console
from samtune.config.run_config import RunConfig
from samtune.data import source
from samtune.data.cache import Images, drop_undecodable, raise_if_undecodable, undecodable_rows
from samtune.data.decode import DecodeRule
from samtune.data.labels import some
from samtune.data.loader import eval_batches
from samtune.data.source import LabelledDataset, Split
from samtune.data.split_roles import DataSelection
from samtune.data.splits import Indices, RunSplits, open_run_splits
from samtune.data.transforms import eval_transform, normalize
from samtune.distributed import collectives, device
from samtune.distributed.signals import Interrupted
from samtune.errors import DataError, Diverged, UsageError
from samtune.models import pretrained
from samtune.report.stats import wilson_interval
from samtune.runs import checkpoint
from samtune.runs.folder import read_provenance
from samtune.train.run_data import decode_splits, decode_train

Progress = Callable[[str, int, int], None]  # split, images done, images in all


@dataclass(frozen=True)
class Evaluation:
    """What a model said about every image of a split, in the split's order; all metrics follow from it.

    rows: (n,) index into the split. labels, predictions: (n,) int64. probability: (n,) of the predicted class.
    in_top5: (n,) bool. nats: (n,) the cross-entropy of each image, without label smoothing. batch_size: images that
    passed through the model at once, as many as memory had room for. logits: (n, classes), where they were asked for.
    """

    split: str
    rows: Indices
    labels: npt.NDArray[np.int64]
    predictions: npt.NDArray[np.int64]
    probability: npt.NDArray[np.float32]
    in_top5: npt.NDArray[np.bool_]
    nats: npt.NDArray[np.float32]
    batch_size: int
    logits: npt.NDArray[np.float32] | None = None

    @property
    def wrong(self) -> int:
        """Images whose most probable class is not their label."""
        return int((self.labels != self.predictions).sum())

    @property
    def top1_error(self) -> float:
        """In percent."""
        return 100 * self.wrong / len(self.labels)

    def summary(self) -> dict[str, Any]:
        """The entry of a report: errors in percent, the interval is Wilson's at 95 %, loss in nats."""
        n = len(self.labels)
        per_class = [(self.predictions[self.labels == label] != label).mean() for label in np.unique(self.labels)]
        return {
            "split": self.split,
            "n": n,
            "wrong": self.wrong,
            "top1_error": self.top1_error,
            "top1_error_ci95": [100 * bound for bound in wilson_interval(self.wrong, n)],
            "top5_error": 100 * int((~self.in_top5).sum()) / n,
            "mean_per_class_error": 100 * float(np.mean(per_class)),
            "loss": float(self.nats.mean(dtype=np.float64)),
        }


def evaluate(
    model: nn.Module,
    images: Images,
    rows: Indices,
    name: str,
    config: RunConfig,
    data_config: Mapping[str, Any],
    progress: Progress,
    batch_size: int | None = None,
    stop_requested: Callable[[], bool] = bool,
    keep_logits: bool = False,
) -> Evaluation:
    """Score every one of these rows once, the ranks in turns. Puts the model into evaluation mode.

    The batches are those of one rank alone, dealt out, and what was said of all images is brought together once: the
    same result for any number of ranks.

    config gives workers, memory layout and arithmetic; data_config the size, crop and normalisation of the weights.
    batch_size: images at once, such as the `batch_size` of an evaluation before; None: twice those of training. Where
    memory runs out, on any rank, it is halved and the pass begins again: what is said of an image does not depend on
    the others. stop_requested: whether somebody wants this rank to end. keep_logits: whether the result has them.

    Raises:
        Diverged: NaN or inf.
        Interrupted: a rank was asked to end.
        OutOfMemory: one image does not fit.
    """
    model.eval()
    target_device = next(model.parameters()).device
    autocast = device.autocast(target_device, config.amp_dtype)

    n, world = len(rows), collectives.world_size()
    is_sharded = collectives.is_sharded(model)

    @torch.inference_mode()
    def attempt(size: int) -> Evaluation:
        starts = range(0, n, size)
        own = starts[collectives.rank() :: world]
        batches = eval_batches(
            images,
            np.concatenate([rows[i : i + size] for i in own]) if own else rows[:0],
            eval_transform(data_config),
            batch_size=size,
            workers=config.workers or 0,
            pin_memory=target_device.type == "cuda",
        )
        # label, prediction, its probability, whether among the first 5, nats; of the images of other ranks 0
        found = torch.zeros((5, n), dtype=torch.float64, device=target_device)
        kept: torch.Tensor | None = None

        def score(start: int) -> None:
            nonlocal kept
            batch, labels = next(batches)
            with autocast():
                logits = model(to_device(batch, target_device, data_config, config.channels_last))
            logits = logits.float()  # (batch, classes)
            target = labels.to(target_device)
            probability, prediction = logits.softmax(1).max(1)
            in_top5 = (logits.topk(min(5, logits.shape[1]), dim=1).indices == target[:, None]).any(1)
            nats = F.cross_entropy(logits, target, reduction="none")
            if keep_logits:
                kept = torch.zeros((n, logits.shape[1]), device=target_device) if kept is None else kept
                kept[start : start + size] = logits
            for row, values in zip(found, (target, prediction, probability, in_top5, nats), strict=True):
                row[start : start + size] = values

        for turn in range(math.ceil(len(starts) / world)):
            failed: Exception | None = None
            try:
                if turn < len(own):
                    score(own[turn])
                elif is_sharded:  # the others compute with the parts that are here
                    model(torch.zeros((1, *data_config["input_size"]), device=target_device))
            except Exception as error:
                if world == 1 or is_sharded or not device.is_out_of_memory(error):
                    raise
                failed = error
            progress(name, min(n, (turn + 1) * world * size), n)
            asked, no_memory = collectives.any_rank_true(stop_requested(), failed is not None)
            if no_memory:
                raise failed or MemoryError("memory ran out on another rank")
            if asked:
                raise Interrupted
        if keep_logits:
            classes = max(collectives.all_gather_object(0 if kept is None else kept.shape[1]))
            kept = torch.zeros((n, classes), device=target_device) if kept is None else kept
            kept = collectives.all_reduce_sum(kept).cpu()
        label, predicted, of_it, among_5, nats = collectives.all_reduce_sum(found).cpu().numpy()
        return Evaluation(
            split=name,
            rows=rows,
            labels=label.astype(np.int64),
            predictions=predicted.astype(np.int64),
            probability=of_it.astype(np.float32),
            in_top5=among_5 > 0,
            nats=nats.astype(np.float32),
            batch_size=size,
            logits=None if kept is None else kept.numpy(),
        )

    # Twice those of training: without gradients that fits where training does.
    scored = device.retry_with_smaller_batch(attempt, batch_size or 2 * config.batch_size, data_config["input_size"])
    if not np.isfinite(scored.nats).all():
        raise Diverged(
            f"the model's output on {name} is not finite",
            f"{int((~np.isfinite(scored.nats)).sum())} of {len(rows)} images",
            "lower --lr or --rho, or clip with --clip-grad 1",
        )
    return scored


def to_device(
    images: torch.Tensor, target: torch.device, data_config: Mapping[str, Any], channels_last: bool
) -> torch.Tensor:
    """A batch of uint8 images, moved, normalised and laid out: what the model takes, in training as in evaluation."""
    moved = normalize(images.to(target, non_blocking=True), data_config)
    return moved.contiguous(memory_format=torch.channels_last) if channels_last else moved


def evaluate_checkpoint(
    path: Path,
    *,
    name: str | None,
    split: str | None,
    dataset: str | None,
    wanted: DataSelection | None = None,
    progress: Progress,
    ema: bool = False,
    gpus: str = "auto",
    processes: int | None = None,
    keep_logits: bool = False,
) -> tuple[Evaluation, dict[str, Any]]:
    """Score a run's checkpoint, or a checkpoint folder, on a split: (evaluation, what was scored).

    name: "last" or "best" of a run; None takes the one that the run's report scored. ema: score the averaged weights.
    gpus, processes: as in a run. keep_logits: as in `evaluate`.
    The same images, arithmetic and batches as in the run: the same numbers.

    On the run's own data, which `dataset` may have found elsewhere, split "val" is the part that the run validated on,
    "train" the part it trained on, "test" (the default) the part it was scored on, and any other name a whole split. On
    other data a split is whole: each picture is scored once whose class the model knows, by the names of the classes.
    There the default is the test split, or all splits where there is none. wanted: columns and splits of
    other data.

    Raises:
        CheckpointError: no such run or checkpoint, or a damaged one.
        DataError: the run's data set is gone or is another one now, or none of the classes of other data are known.
        UsageError: the data set has no such split.
    """
    folder = checkpoint.locate(path, name)
    manifest = checkpoint.verify(folder)
    config = checkpoint.run_config(manifest)
    weights = checkpoint.weights(folder, config, ema=ema)
    target = device.select_device(gpus, processes)
    collectives.init(target)
    with collectives.local_main_process_first():
        model, data_config = pretrained.load_checkpoint(weights)
        chosen = _choose(folder, config, manifest, split, dataset, wanted)
        for note in chosen.notes:
            console.info(note)
        images = chosen.look()
        if chosen.on_bad_image == "error":
            raise_if_undecodable(undecodable_rows(images, chosen.rows))
    layout = torch.channels_last if config.channels_last else torch.contiguous_format
    model = model.to(device=target, memory_format=layout)  # type: ignore[call-overload]
    rows = drop_undecodable(images, chosen.rows)
    evaluation = evaluate(model, images, rows, chosen.name, config, data_config, progress, keep_logits=keep_logits)
    about = {"checkpoint": str(folder), "step": manifest["step"], "ema": ema, "dataset": chosen.origin}
    return evaluation, about | {"unknown_classes": dict(chosen.split.unknown)}


@dataclass(frozen=True)
class _Chosen:
    """The rows that are scored. name: of the split, for the result. look: decodes them into the cache."""

    name: str
    origin: str
    split: Split
    rows: Indices
    look: Callable[[], Images]
    on_bad_image: str
    notes: tuple[str, ...] = ()


def _choose(
    folder: Path,
    config: RunConfig,
    manifest: Mapping[str, Any],
    split: str | None,
    dataset: str | None,
    wanted: DataSelection | None,
) -> _Chosen:
    """The run's own data, wherever they are now, or others. folder: the checkpoint's."""
    if dataset is None:
        _check_there(config, folder)
        own = open_run_splits(config, classes=manifest["class_names"])
        if manifest.get("dataset", own.data.fingerprint) != own.data.fingerprint:
            raise DataError(
                f"data set {config.dataset} is not the one that the run was made with",
                f"its pictures or labels are others than those of {folder}",
                f"--dataset PATH says where the run's own is now; --dataset {config.dataset} scores this one as others",
            )
        return _choose_own(config, manifest, split or "test", own)
    try:
        parts = open_run_splits(config, dataset, manifest["class_names"])
    except (DataError, UsageError):
        parts = None
    if (
        parts is not None
        and wanted is None
        and manifest.get("dataset", parts.data.fingerprint) == parts.data.fingerprint
    ):
        return _choose_own(config, manifest, split or "test", parts)
    return _choose_other(config, manifest, split, source.open_source(dataset, wanted, manifest["class_names"]), wanted)


def _check_there(config: RunConfig, folder: Path) -> None:
    """Raise DataError where the run's data set was a path, and nothing is there any more: it is no name on the hub."""
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


def _choose_own(config: RunConfig, manifest: Mapping[str, Any], split: str, parts: RunSplits) -> _Chosen:
    data, rule = parts.data, checkpoint.decode_rule(manifest)
    if split == "val" and not config.val:
        raise UsageError(
            "--split val: this run held nothing out", "--no-val: it trained on its validation images", "--split test"
        )
    if split == "train":
        look = partial(decode_train, config, parts, rule)
        return _Chosen(split, data.origin, parts.train, parts.train_rows, look, config.on_bad_image)
    if split == "val":
        chosen, rows = parts.val, parts.val_rows
    elif split == "test" and parts.test is not None:
        chosen, rows = parts.test, parts.test_rows
    elif split in data.splits:
        chosen, rows = data.splits[split], data.splits[split].labelled
    else:
        raise _no_split(data, split, ["val"])
    return _Chosen(split, data.origin, chosen, rows, _looking(config, chosen, rows, rule), config.on_bad_image)


def _choose_other(
    config: RunConfig,
    manifest: Mapping[str, Any],
    split: str | None,
    data: LabelledDataset,
    wanted: DataSelection | None,
) -> _Chosen:
    if not data.splits:
        raise DataError(f"data set {data.origin} has no labelled pictures", "; ".join(data.notes))
    role = {"val": "validation"}.get(split or "test", split or "test")
    others = [other for other in data.splits if other != role]
    said = ""
    if split is None and others and role not in data.splits:
        # Nothing says which pictures are meant: each is scored once.
        name = "all" if len(others) == 1 else "+".join(others)
        chosen = reduce(source.concat_splits, data.splits.values())
        said = f"scored: all splits of {data.name}, {name}; --split takes one" if len(others) > 1 else ""
    elif role in data.splits:
        name, chosen = split or role, data.splits[role]
        if split is None and others:
            said = f"scored: split test of {data.name}; --split takes another: {', '.join(others)}"
    else:
        raise _no_split(data, role, [])
    rows = chosen.labelled
    if len(rows) == 0:
        raise DataError(
            f"no picture of split {name} of {data.origin} is of a class that the model knows",
            f"its classes: {some(list(chosen.unknown)) or 'none'}; the model's: {some(manifest['class_names'])}",
            "classes are matched by their names: name the folders or labels as the model does",
        )
    on_bad_image = wanted.on_bad_image if wanted is not None else config.on_bad_image
    look = _looking(config, chosen, rows, checkpoint.decode_rule(manifest))
    return _Chosen(name, data.origin, chosen, rows, look, on_bad_image, (*data.notes, said) if said else data.notes)


def _looking(config: RunConfig, split: Split, rows: Indices, rule: DecodeRule) -> Callable[[], Images]:
    return lambda: decode_splits(config, [(split, rows)], rule)[0]


def _no_split(data: LabelledDataset, split: str, more: list[str]) -> UsageError:
    return UsageError(
        f"data set {data.name} has no split {split!r}",
        hint="--split " + ", or one of: ".join([*more, ", ".join(data.splits)]),
    )
