"""The cost of a run, measured on its setup: memory, steps, an evaluation, a checkpoint. This changes its weights."""

import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.autograd.graph import saved_tensors_hooks

from samtune.data.cache import Images
from samtune.data.loader import Batch, train_batches
from samtune.data.prefetch import prefetch
from samtune.data.splits import Indices
from samtune.data.transforms import train_transform
from samtune.distributed import device
from samtune.models.training import train_mode
from samtune.sam.snapshot import BatchNormStats, batch_norms
from samtune.train import checkpointing, loop
from samtune.train.evaluation import evaluate
from samtune.train.setup import Setup
from samtune.train.state import TrainState

Progress = Callable[[str, int, int], None]  # label, images done, images in total

_ROUNDS = 3  # each kind of step is measured once per round
_SECONDS = 4.0  # of steps of a kind in a round
_FEWEST, _MOST = 2, 200  # steps of a kind in a round
_EVALUATION_SECONDS = 4.0


@dataclass(frozen=True)
class Steps:
    """Seconds of steps of one kind, including the wait for data. first: of the first step, which is slower."""

    seconds: tuple[float, ...]
    waiting: float
    first: float

    @property
    def mean(self) -> float:
        """Mean seconds without the slowest and the fastest twentieth."""
        ordered = sorted(self.seconds)
        cut = len(ordered) // 20
        return statistics.fmean(ordered[cut : len(ordered) - cut])

    @property
    def median(self) -> float:
        """Median seconds."""
        return statistics.median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """Lower and upper quartile of the seconds."""
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return low, high

    @property
    def data_wait(self) -> float:
        """Share of the time spent waiting for data, in [0, 1]."""
        return self.waiting / sum(self.seconds)


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def memory(setup: Setup) -> dict[str, int]:
    """Bytes by part, after a step: weights, gradients, SAM's copy of the weights, and so on."""
    model, config, average = setup.model, setup.config, setup.average
    state = (value for values in setup.optimizer.state.values() for value in values.values())
    parts = {
        "weights": _bytes([*model.parameters(), *model.buffers()]),
        "gradients": _bytes(w for w in model.parameters() if w.requires_grad),
        "weights_copy": _bytes(setup.update.sam.perturbed_parameters) if config.rho > 0 else 0,
        "optimizer": _bytes(value for value in state if isinstance(value, torch.Tensor)),
        "ema": 0 if average is None else _bytes([*average.module.parameters(), *average.module.buffers()]),
        "activations": activation_bytes(setup, images_per_pass(setup)),
    }
    return parts | {"total": sum(parts.values())}


def images_per_pass(setup: Setup) -> int:
    """Images of one forward pass on each device."""
    return setup.update.sam.effective_micro_batch(min(setup.batch.per_device, setup.batch.total))


def activation_bytes(setup: Setup, images: int) -> int:
    """Bytes that a training forward pass of so many images keeps for the backward pass."""
    inputs, targets = _any_batch(setup, images)
    of_model = {t.untyped_storage().data_ptr() for t in (*setup.model.parameters(), *setup.model.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> Any:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in of_model:
            kept[storage.data_ptr()] = storage  # held, so that its address is not reused
        return None  # no backward pass follows

    stats = BatchNormStats(batch_norms(setup.model))
    with stats.restored(), saved_tensors_hooks(keep, keep), device.uncompiled(), setup.update.autocast():
        setup.update.loss(setup.model(setup.update.prepare(inputs)), targets)
    return sum(storage.nbytes() for storage in kept.values())


def _any_batch(setup: Setup, images: int) -> Batch:
    """A batch of black images as the update takes it, and labels."""
    channels, height, width = setup.info.data_config["input_size"]
    black = torch.zeros((images, height, width, channels), dtype=torch.uint8).permute(0, 3, 1, 2)
    return loop.to_update_inputs(setup, black, torch.zeros(images, dtype=torch.int64), 1)


class _Stepping:
    """Takes steps of a run, at any radius."""

    def __init__(self, setup: Setup, batches: Iterator[Batch]) -> None:
        self.setup, self.batches, self.done = setup, batches, 0
        self.base_lrs = [group["lr"] for group in setup.optimizer.param_groups]

    def __call__(self, rho: float) -> tuple[float, float]:
        """Take a step; return its seconds, and those spent waiting for data."""
        setup, started = self.setup, time.perf_counter()
        images, labels = next(self.batches)
        arrived = time.perf_counter()
        step = self.done % setup.total_steps + 1
        loop.set_learning_rates(setup, self.base_lrs, step)
        setup.update.sam.rho = rho
        result = setup.update(*loop.to_update_inputs(setup, images, labels, step))
        if setup.average is not None:
            setup.average.update(setup.model, step, applied=result.applied)
        self.done += 1
        return time.perf_counter() - started, arrived - started


def steps(setup: Setup, rows: Indices, kinds: Iterable[float], progress: Progress) -> dict[float, Steps]:
    """Measure steps of each radius in turn, on real batches of these rows; 0 is a step of the base optimizer.

    The first steps of each turn do not count, because their data was loaded during the turn before. No kind takes more
    steps than the run has, but at least six.
    """
    kinds, workers = list(kinds), setup.config.workers or 0
    most = max(_FEWEST, min(_MOST, math.ceil(setup.total_steps / _ROUNDS)))
    train_mode(setup.model, freeze_bn=setup.config.freeze_bn)
    loaded = train_batches(
        setup.train,
        np.resize(rows, max(len(rows), setup.batch.total)),  # at least one batch
        train_transform(setup.info.data_config, setup.config),
        batch_size=setup.batch.total,
        seed=setup.config.seed,
        total_steps=sys.maxsize,
        workers=workers,
        pin_memory=setup.device.type == "cuda",
        share=lambda rows: setup.batch.share(rows, 0),
    )
    batches = prefetch(loaded, setup.device)
    with closing(batches):
        step = _Stepping(setup, batches)
        firsts = {rho: step(rho)[0] for rho in kinds}
        seconds: dict[float, list[float]] = {rho: [] for rho in kinds}
        waiting = dict.fromkeys(kinds, 0.0)
        per_turn = dict.fromkeys(kinds, 0)
        for number in range(_ROUNDS):
            for rho in kinds:
                usual = [step(rho)[0]]
                while len(usual) < 2 * workers + 1 and sum(usual) < _SECONDS:
                    usual.append(step(rho)[0])
                per_turn[rho] = per_turn[rho] or min(most, max(_FEWEST, round(_SECONDS / statistics.median(usual))))
                for _ in range(per_turn[rho]):
                    duration, waited = step(rho)
                    seconds[rho].append(duration)
                    waiting[rho] += waited
                    done = sum(map(len, seconds.values()))
                    total = _ROUNDS * sum(n or per_turn[rho] for n in per_turn.values())
                    label = f"measuring steps, round {number + 1} of {_ROUNDS}"
                    progress(label, done * setup.batch.total, total * setup.batch.total)
    setup.update.sam.rho = setup.config.rho
    loop.set_learning_rates(setup, step.base_lrs, 1)
    return {rho: Steps(tuple(seconds[rho]), waiting[rho], firsts[rho]) for rho in kinds}


@dataclass(frozen=True)
class Evaluating:
    """Seconds of an evaluation. per_image: of a large one. first: what the first one takes longer."""

    per_image: float
    first: float


def evaluation(setup: Setup, images: Images, rows: Indices, whole: int, progress: Progress) -> Evaluating:
    """Score some of these rows as a run does, after a warm-up. whole: number of images of the split."""

    def score(count: int) -> float:
        started = time.perf_counter()
        scored = evaluate(
            setup.model,
            images,
            np.resize(rows, count),
            "measuring evaluation",
            setup.config,
            setup.info.data_config,
            progress,
            setup.eval_batch,
        )
        setup.eval_batch = scored.batch_size
        return time.perf_counter() - started

    size = setup.eval_batch or 2 * setup.config.device_batch
    few = min(len(rows), 2 * size)
    first, usual = score(few), score(few)
    many = min(few * max(1, round(_EVALUATION_SECONDS / usual)), max(whole, few))
    each = score(many) / many if many > few else usual / few
    train_mode(setup.model, freeze_bn=setup.config.freeze_bn)
    return Evaluating(each, max(0.0, first - usual))


def checkpoint(setup: Setup) -> tuple[int, float]:
    """Bytes of a checkpoint, and seconds to save one in the temporary folder. Raises OSError where it has no room.

    It is one of the end, which has all that a checkpoint may have.
    """
    if setup.average is not None:
        setup.average.update(setup.model, setup.total_steps)
    seconds = []
    with tempfile.TemporaryDirectory(prefix="samtune-plan-") as name:
        for _ in range(3):
            started = time.perf_counter()
            state = TrainState(step=setup.total_steps, evaluated_step=setup.total_steps)
            whole = checkpointing.content(setup, state)
            folder = checkpointing.write(setup, Path(name), setup.total_steps, whole)
            seconds.append(time.perf_counter() - started)
            if seconds[0] > 1:
                break
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return size, statistics.median(seconds)
