"""Rows -> batches.

Order and augmentation depend on (seed, epoch, row) alone, not on the number of workers.
"""

import signal
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from samtune.data.decode import decode
from samtune.data.source import Split
from samtune.data.splits import Indices
from samtune.data.transforms import Transform
from samtune.errors import DataError

Batch = tuple[torch.Tensor, torch.Tensor]  # images (batch, 3, size, size) uint8, labels (batch,) int64


def steps_per_epoch(rows: int, batch_size: int) -> int:
    """Full batches in an epoch; the rest of a permutation is left out, and another rest in the next epoch.

    A data set smaller than one batch is one (smaller) batch.
    """
    return max(1, rows // batch_size)


def train_batches(
    split: Split,
    rows: Indices,
    transform: Transform,
    *,
    batch_size: int,
    seed: int,
    total_steps: int,
    workers: int,
    pin_memory: bool,
) -> Iterator[Batch]:
    """One batch for each of total_steps steps, through as many epochs as that takes.

    One loader serves all epochs, so that workers prepare the next epoch while the last one is validated.
    Raises DataError from the image that caused it.
    """
    per_epoch = steps_per_epoch(len(rows), batch_size)

    def plan() -> Iterator[list[tuple[int, int]]]:
        for step in range(total_steps):
            epoch, batch = divmod(step, per_epoch)
            if batch == 0:
                order = np.random.default_rng([seed, epoch]).permutation(rows)
            yield [(epoch, int(row)) for row in order[batch * batch_size : (batch + 1) * batch_size]]

    return _load(_Images(split, transform, seed), plan(), workers, pin_memory)


def eval_batches(
    split: Split, rows: Indices, transform: Transform, *, batch_size: int, workers: int, pin_memory: bool
) -> Iterator[Batch]:
    """Every row once, in order; the last batch may be smaller."""
    plan = ([(0, int(row)) for row in rows[i : i + batch_size]] for i in range(0, len(rows), batch_size))
    return _load(_Images(split, transform, seed=0), plan, workers, pin_memory)


class _Images(torch.utils.data.Dataset[tuple[torch.Tensor, int] | DataError]):
    """(epoch, row) -> (augmented image, label), with a generator seeded by (seed, epoch, row)."""

    def __init__(self, split: Split, transform: Transform, seed: int) -> None:
        self.split, self.transform, self.seed = split, transform, seed

    def __getitem__(self, key: tuple[int, int]) -> tuple[torch.Tensor, int] | DataError:
        epoch, row = key
        try:
            image = decode(self.split.image_bytes(row), lambda: self.split.where(row))
        except DataError as error:
            return error  # raised by `_load`: a worker would wrap it in its traceback
        # torchvision's transforms draw from the global generator; in the main process dropout draws from it too.
        state = torch.get_rng_state()
        try:
            draw = np.random.SeedSequence([self.seed, epoch, row]).generate_state(1, np.uint64)[0]
            torch.default_generator.manual_seed(int(draw))
            return self.transform(image), int(self.split.labels[row])
        finally:
            torch.set_rng_state(state)


def _collate(items: list[tuple[torch.Tensor, int] | DataError]) -> Batch | DataError:
    images, labels = [], []
    for item in items:
        if isinstance(item, DataError):
            return item
        images.append(item[0])
        labels.append(item[1])
    return torch.stack(images), torch.tensor(labels)


def leave_signals_to_the_main_process(worker: int) -> None:
    """Ctrl-C and a job's end reach every process of the group: the main one decides, and then ends the workers.

    It may do so while it takes a batch over, at which multiprocessing's own thread in the worker would print a
    traceback. What goes wrong with data comes back as an error of the batch, not this way.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    sys.excepthook = lambda *_: None


def _load(dataset: _Images, plan: Iterator[list[tuple[int, int]]], workers: int, pin_memory: bool) -> Iterator[Batch]:
    loader: DataLoader[Any] = DataLoader(
        dataset,
        batch_sampler=plan,
        num_workers=workers,
        pin_memory=pin_memory,
        collate_fn=_collate,
        worker_init_fn=leave_signals_to_the_main_process,
        generator=torch.Generator(),  # else it would draw a seed from the global one, which dropout uses
    )
    for batch in loader:
        if isinstance(batch, DataError):
            raise batch
        yield batch
