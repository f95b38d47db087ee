"""Rows -> batches.

Order and augmentation depend only on (seed, epoch, row), not on the number of workers.
"""

import itertools
import multiprocessing.connection
import multiprocessing.util
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from samtune import console
from samtune.data.cache import Images
from samtune.data.splits import Indices
from samtune.data.transforms import Pictures, TrainTransform, Transform
from samtune.errors import DataError, WorkerLost

Batch = tuple[torch.Tensor, torch.Tensor]  # images (batch, 3, size, size) uint8, labels (batch,) int64


def steps_per_epoch(rows: int, batch_size: int) -> int:
    """Full batches in an epoch; the rest of a permutation is left out, and another rest in the next epoch.

    A data set smaller than one batch is one (smaller) batch.
    """
    return max(1, rows // batch_size)


def train_batches(
    images: Images,
    rows: Indices,
    transform: TrainTransform,
    *,
    batch_size: int,
    seed: int,
    total_steps: int,
    workers: int,
    pin_memory: bool,
    done: int = 0,
    share: Callable[[Indices], Indices] = lambda rows: rows,
) -> Iterator[Batch]:
    """One batch for each of total_steps steps, through as many epochs as that takes; the first `done` are left out.

    share: of the rows of a step, those that this rank computes.

    One loader serves all epochs, so that workers prepare the next epoch while the last one is validated.
    Raises DataError from the image that caused it.
    """
    per_epoch = steps_per_epoch(len(rows), batch_size)

    def augmented(pictures: Pictures, epoch: int, chosen: Indices) -> torch.Tensor:
        return transform(pictures, seed, epoch, chosen)

    def plan() -> Iterator[_Key]:
        for step in range(done, total_steps):
            epoch, batch = divmod(step, per_epoch)
            if batch == 0 or step == done:
                order = _order(rows, seed, epoch)
            yield epoch, share(order[batch * batch_size : (batch + 1) * batch_size])

    # Cropping and copying release Python's lock, so that threads do; their batches need not be sent anywhere.
    load = _load if transform.photometric or workers == 0 else _load_in_threads
    return load(_Batches(images, augmented), plan(), workers, pin_memory)


def rows_of_step(rows: Indices, batch_size: int, seed: int, step: int) -> Indices:
    """The rows of the batch of a step, from 0."""
    epoch, batch = divmod(step, steps_per_epoch(len(rows), batch_size))
    return _order(rows, seed, epoch)[batch * batch_size : (batch + 1) * batch_size]


def _order(rows: Indices, seed: int, epoch: int) -> Indices:
    order: Indices = np.random.default_rng([seed, epoch]).permutation(rows)
    return order


def eval_batches(
    images: Images, rows: Indices, transform: Transform, *, batch_size: int, workers: int, pin_memory: bool
) -> Iterator[Batch]:
    """Every row once, in order; the last batch may be smaller."""

    def plain(pictures: Pictures, epoch: int, chosen: Indices) -> torch.Tensor:
        return torch.stack([transform(image) for image in pictures])

    plan = ((0, rows[i : i + batch_size]) for i in range(0, len(rows), batch_size))
    # Never in processes: to fork one while training's threads are at work may copy a lock that they hold.
    load = _load if workers == 0 else _load_in_threads
    return load(_Batches(images, plain), plan, workers, pin_memory)


_Key = tuple[int, Indices]  # epoch, rows of a batch


class _Batches(torch.utils.data.Dataset[Batch | DataError]):
    """(epoch, rows) -> (images, labels): a batch at a time, since most of what is done to images is done to a batch."""

    def __init__(self, images: Images, transform: Callable[[Pictures, int, Indices], torch.Tensor]) -> None:
        self.images, self.transform = images, transform

    def __getitem__(self, key: _Key) -> Batch | DataError:
        epoch, rows = key
        try:
            batch = self._batch(epoch, rows)
        except DataError as error:
            return error  # raised by `_load`: a worker would wrap it in its traceback
        return batch, torch.from_numpy(self.images.split.labels[rows])

    def _batch(self, epoch: int, rows: Indices) -> torch.Tensor:
        if self.images.pixels is not None:
            return self.transform(self.images.take(rows), epoch, rows)
        # One by one: decoded photographs of a whole batch would fill the memory.
        one = np.split(rows, len(rows))
        return torch.cat([self.transform(self.images.take(row), epoch, row) for row in one])


def _unchanged(batch: Any) -> Any:
    return batch


def leave_signals_to_the_main_process(worker: int) -> None:
    """Ctrl-C and a job's end reach every process of the group: the main one decides, and then ends the workers.

    It may do so while it takes a batch over, at which multiprocessing's own thread in the worker would print a
    traceback. What goes wrong with data comes back as an error of the batch, not this way.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):  # the last is Slurm's warning
        signal.signal(number, signal.SIG_IGN)
    sys.excepthook = lambda *_: None


def _load_in_threads(dataset: _Batches, plan: Iterator[_Key], workers: int, pin_memory: bool) -> Iterator[Batch]:
    # One thread of arithmetic each: they are as many as there shall be. This thread must have asked for its own number
    # before they set theirs, or it would take theirs.
    torch.get_num_threads()
    with ThreadPoolExecutor(workers, "loader", torch.set_num_threads, (1,)) as pool:
        try:
            ahead = deque(pool.submit(dataset.__getitem__, key) for key in itertools.islice(plan, 2 * workers))
            while ahead:
                batch = ahead.popleft().result()
                ahead.extend(pool.submit(dataset.__getitem__, key) for key in itertools.islice(plan, 1))
                if isinstance(batch, DataError):
                    raise batch
                yield (batch[0].pin_memory(), batch[1].pin_memory()) if pin_memory else batch
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _load(dataset: _Batches, plan: Iterator[_Key], workers: int, pin_memory: bool) -> Iterator[Batch]:
    """Load batches in worker processes. After the first death of a worker, its missing batches are loaded again.

    A batch is a function of its key, so it is the same again. Raises WorkerLost at the second death.
    """
    requested: deque[_Key] = deque()  # and not delivered

    def recorded(keys: Iterator[_Key]) -> Iterator[_Key]:
        for key in keys:
            requested.append(key)
            yield key

    batches = _start(dataset, recorded(plan), workers, pin_memory)
    restarted = False
    while True:
        try:
            batch = next(batches, None)
        except Exception as error:
            death = _end_if_one_died(batches)
            if death is None:
                raise
            if restarted:
                why = "it is the second one; probably the memory does not suffice, of the machine or of /dev/shm"
                raise WorkerLost(death, why, f"--workers 0, or fewer than {workers}") from error
            console.warn(f"{death}; a new one loads its images again")
            restarted, again = True, list(requested)
            requested.clear()
            del error  # its traceback keeps the old processes' queues
            batches = _start(dataset, recorded(itertools.chain(again, plan)), workers, pin_memory)
            continue
        if batch is None:
            return
        requested.popleft()
        if isinstance(batch, DataError):
            raise batch
        yield batch


def _start(dataset: _Batches, keys: Iterator[_Key], workers: int, pin_memory: bool) -> Iterator[Batch | DataError]:
    loader: DataLoader[Any] = DataLoader(
        dataset,
        batch_size=None,  # an item is a batch already
        sampler=keys,
        num_workers=workers,
        pin_memory=pin_memory,
        collate_fn=_unchanged,
        worker_init_fn=leave_signals_to_the_main_process,
        generator=torch.Generator(),  # else it would draw a seed from the global one, which dropout uses
    )
    # To make it installs a handler that raises when a worker dies, wherever the main thread is: in the middle of an
    # optimizer's step, say. Without it `next` finds out, which looks after the workers when a batch is late.
    handler = signal.getsignal(signal.SIGCHLD)
    batches = iter(loader)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, handler)
    # They ignore the SIGTERM by which Python ends them at its own end, if a traceback still holds the iterator then.
    multiprocessing.util.Finalize(batches, _kill, (getattr(batches, "_workers", ()),), exitpriority=1)
    return batches


def _kill(workers: Iterable[Any]) -> None:
    for worker in workers:
        worker.kill()


def _end_if_one_died(batches: Iterator[Batch | DataError]) -> str | None:
    """How a worker ended, after which the others are ended too; None if all are at work."""
    workers: list[Any] = getattr(batches, "_workers", [])
    # A batch may fail to arrive a moment before the system says that its worker has died.
    multiprocessing.connection.wait([worker.sentinel for worker in workers], timeout=1)
    ended = [worker for worker in workers if worker.exitcode is not None]
    if not ended:
        return None
    _kill(workers)  # they may wait for a lock that died with the other
    for worker in workers:
        worker.join()
    code = ended[0].exitcode
    how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
    return f"process {ended[0].pid}, which loads images, was ended {how}"
