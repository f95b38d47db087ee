"""Evaluation: one pass over the rows of a split, and exact metrics of it."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import nn

from samtune.config.run_config import RunConfig
from samtune.data.cache import Images
from samtune.data.loader import eval_batches
from samtune.data.prefetch import prefetch
from samtune.data.splits import Indices
from samtune.data.transforms import EvalTransform, model_input
from samtune.distributed import collectives, device
from samtune.distributed.signals import Interrupted
from samtune.errors import Diverged
from samtune.report.stats import wilson_interval

Progress = Callable[[str, int, int], None]  # split, images done, images in all


@dataclass(frozen=True)
class Evaluation:
    """A model's predictions for every image of a split, in the split's order; all metrics follow from them.

    rows: (n,) index into the split. labels, predictions: (n,) int64. probability: (n,) of the predicted class.
    in_top5: (n,) bool. nats: (n,) cross-entropy of each image, without label smoothing. batch_size: images that passed
    through the model at once. logits: (n, classes) if they were asked for.
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
    """Score each of these rows once. Puts the model into evaluation mode.

    Ranks take turns with the batches that one rank would have, and gather all predictions once: the result does not
    depend on the number of ranks.

    config gives workers, memory layout and arithmetic; data_config the size, crop and normalisation of the weights.
    batch_size: images at once, such as the `batch_size` of an earlier evaluation; None: twice those of training. If
    memory runs out on any rank it is halved and the pass starts again. stop_requested: whether this rank was asked to
    stop. keep_logits: whether the result has logits.

    Raises:
        Diverged: NaN or inf.
        Interrupted: a rank was asked to end.
        OutOfMemory: one image does not fit.
    """
    model.eval()
    target_device = next(model.parameters()).device
    autocast = device.autocast(target_device, config.amp_dtype)
    device.set_float32_arithmetic(target_device, config.amp_dtype)

    n, world = len(rows), collectives.world_size()
    is_sharded = collectives.is_sharded(model)

    @torch.inference_mode()
    def attempt(size: int) -> Evaluation:
        starts = range(0, n, size)
        own = starts[collectives.rank() :: world]
        loaded = eval_batches(
            images,
            np.concatenate([rows[i : i + size] for i in own]) if own else rows[:0],
            EvalTransform(data_config),
            batch_size=size,
            workers=config.workers or 0,
            pin_memory=target_device.type == "cuda",
        )
        batches = prefetch(loaded, target_device)
        # Rows: label, prediction, its probability, in top 5, nats. Columns of other ranks' images stay 0.
        results = torch.zeros((5, n), dtype=torch.float64, device=target_device)
        kept: torch.Tensor | None = None

        def score(start: int) -> None:
            nonlocal kept
            batch, labels = next(batches)
            with autocast():
                logits = model(to_device(batch, target_device, data_config, config.channels_last))
            logits = logits.float()  # (batch, classes)
            target = labels.to(target_device, non_blocking=True)
            probability, prediction = logits.softmax(1).max(1)
            in_top5 = (logits.topk(min(5, logits.shape[1]), dim=1).indices == target[:, None]).any(1)
            nats = F.cross_entropy(logits, target, reduction="none")
            if keep_logits:
                kept = torch.zeros((n, logits.shape[1]), device=target_device) if kept is None else kept
                kept[start : start + size] = logits
            for row, values in zip(results, (target, prediction, probability, in_top5, nats), strict=True):
                row[start : start + size] = values

        for turn in range(math.ceil(len(starts) / world)):
            failed: Exception | None = None
            try:
                if turn < len(own):
                    score(own[turn])
                elif is_sharded:  # other ranks need this rank's part of the weights
                    model(torch.zeros((1, *data_config["input_size"]), device=target_device))
            except Exception as error:
                if world == 1 or is_sharded or not device.may_be_out_of_memory(error):
                    raise
                failed = error
            progress(name, min(n, (turn + 1) * world * size), n)
            stop, no_memory = collectives.any_rank_true(stop_requested(), failed is not None)
            if no_memory:
                raise failed or MemoryError("memory ran out on another rank")
            if stop:
                raise Interrupted
        if keep_logits:
            classes = max(collectives.all_gather_object(0 if kept is None else kept.shape[1]))
            kept = torch.zeros((n, classes), device=target_device) if kept is None else kept
            kept = collectives.all_reduce_sum(kept).cpu()
        label, predicted, probability, in_top5, nats = collectives.all_reduce_sum(results).cpu().numpy()
        return Evaluation(
            split=name,
            rows=rows,
            labels=label.astype(np.int64),
            predictions=predicted.astype(np.int64),
            probability=probability.astype(np.float32),
            in_top5=in_top5 > 0,
            nats=nats.astype(np.float32),
            batch_size=size,
            logits=None if kept is None else kept.numpy(),
        )

    # Without gradients, twice the batch of training fits where training does.
    most = batch_size or 2 * config.device_batch
    # The last batch has a size of its own, for which no kernels are worth to be tried or compiled.
    with device.cudnn_benchmark(False), device.uncompiled():
        scored = device.retry_with_smaller_batch(attempt, most, data_config["input_size"])
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
    """Move a batch of uint8 images to the device, normalise it, and set its memory layout."""
    return model_input(images.to(target, non_blocking=True), data_config, channels_last)
