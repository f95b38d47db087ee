"""Rows -> batches, made ahead of their use by threads or processes.

Order and augmentation depend only on (seed, epoch, row), not on the number of workers.
"""

import itertools
import math
import multiprocessing.connection
import multiprocessing.util
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from samtune import console
from samtune.data.cache import Images
from samtune.data.splits import Indices
from samtune.data.transforms import EvalTransform, TrainTransform, empty_batch
from samtune.errors import DataError, WorkerLost

Batch = tuple[torch.Tensor, torch.Tensor]  # images (batch, 3, size, size) uint8, labels (batch,) int64
Batches = Generator[Batch, None, None]

_AHEAD_BYTES = 256 * 2**20  # of images of batches that wait to be used
_DECODED_BYTES = 16 * 2**20  # of pixels that a worker takes from the cache at once


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
) -> Batches:
    """One batch for each of total_steps steps, through as many epochs as that takes; the first `done` are left out.

    share: of the rows of a step, those that this rank computes. pin_memory: a GPU can copy the batches by itself.

    One loader serves all epochs, so that workers prepare the next epoch while the last one is validated.
    Raises DataError from the image that caused it.
    """
    per_epoch = steps_per_epoch(len(rows), batch_size)

    def plan() -> Iterator[_Key]:
        for step in range(done, total_steps):
            epoch, batch = divmod(step, per_epoch)
            if batch == 0 or step == done:
                order = _order(rows, seed, epoch)
            yield epoch, share(order[batch * batch_size : (batch + 1) * batch_size])

    # Cropping and copying release Python's lock, so that threads do; their batches need not be sent anywhere.
    load = _load_in_processes if transform.photometric and workers > 0 else _load_in_threads
    return load(_Batches(images, transform, seed), plan(), workers, pin_memory)


def rows_of_step(rows: Indices, batch_size: int, seed: int, step: int) -> Indices:
    """The rows of the batch of a step, from 0."""
    epoch, batch = divmod(step, steps_per_epoch(len(rows), batch_size))
    return _order(rows, seed, epoch)[batch * batch_size : (batch + 1) * batch_size]


def _order(rows: Indices, seed: int, epoch: int) -> Indices:
    order: Indices = np.random.default_rng([seed, epoch]).permutation(rows)
    return order


def eval_batches(
    images: Images, rows: Indices, transform: EvalTransform, *, batch_size: int, workers: int, pin_memory: bool
) -> Batches:
    """Every row once, in order; the last batch may be smaller."""
    plan = ((0, rows[i : i + batch_size]) for i in range(0, len(rows), batch_size))
    # Never in processes: to fork one while training's threads are at work may copy a lock that they hold.
    return _load_in_threads(_Batches(images, transform), plan, workers, pin_memory)


_Key = tuple[int, Indices]  # epoch, rows of a batch


@dataclass(frozen=True)
class _Batches(torch.utils.data.Dataset[Batch | DataError]):
    """(epoch, rows) -> (images, labels): many images at a time, since most of what is done is done to all of them.

    What is done to an image depends on epoch and row alone, so that a batch may be made in parts. Worker processes get
    a pickled copy.
    """

    images: Images
    transform: TrainTransform | EvalTransform
    seed: int = 0

    def __getitem__(self, key: _Key) -> Batch | DataError:
        epoch, rows = key
        batch = self.empty(rows, pin_memory=False)
        try:
            self.fill(batch[0], epoch, rows, slice(0, len(rows)))
        except DataError as error:
            return error  # raised by `_load_in_processes`: a worker would wrap it in its traceback
        return batch

    def bytes_of(self, key: _Key) -> int:
        """Size of the images of a batch."""
        return 3 * math.prod(self.transform.size) * len(key[1])

    @torch.inference_mode(False)  # an evaluation is in that mode, and the threads that fill its batches in are not
    def empty(self, rows: Indices, *, pin_memory: bool) -> Batch:
        """A batch with its labels, and images that are still to be filled in."""
        labels = torch.empty(len(rows), dtype=torch.int64, pin_memory=pin_memory)
        labels.numpy()[:] = self.images.split.labels[rows]
        return empty_batch(len(rows), self.transform.size, pin_memory=pin_memory), labels

    def fill(self, batch: torch.Tensor, epoch: int, rows: Indices, part: slice) -> None:
        """Make a part of the images of a batch of these rows. Raises DataError."""
        at_once = self.images.within(_DECODED_BYTES)
        for start in range(part.start, part.stop, at_once):
            some = slice(start, min(part.stop, start + at_once))
            pictures, out = self.images.take(rows[some]), batch[some]
            if isinstance(self.transform, TrainTransform):
                self.transform(pictures, self.seed, epoch, rows[some], out)
            else:
                for target, picture in zip(out, pictures, strict=True):
                    target.copy_(self.transform(picture))


def _look_ahead(of_batch: int, workers: int) -> tuple[int, int]:
    """How many batches wait or are in the making, and into how many parts each is divided for the workers.

    of_batch: bytes of one. As many as keep the workers busy, two for each, but no more than fit into _AHEAD_BYTES; at
    least two, so that one is ready while the next is made. Then the workers share batches.
    """
    ahead = min(2 * workers, max(2, _AHEAD_BYTES // of_batch))
    return ahead, math.ceil(2 * workers / ahead)


def _divided(n: int, parts: int) -> list[slice]:
    """Parts of n images, as even as can be, and none without any."""
    size = math.ceil(n / parts)
    return [slice(start, min(n, start + size)) for start in range(0, n, size)]


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


def _load_in_threads(dataset: _Batches, plan: Iterator[_Key], workers: int, pin_memory: bool) -> Batches:
    """Load batches in threads, which fill in the parts of one together; without workers, in this one when asked."""
    if workers == 0:
        for epoch, rows in plan:
            batch = dataset.empty(rows, pin_memory=pin_memory)
            dataset.fill(batch[0], epoch, rows, slice(0, len(rows)))
            yield batch
        return
    first = next(plan, None)
    if first is None:
        return
    ahead, parts = _look_ahead(dataset.bytes_of(first), workers)

    def begin(key: _Key) -> tuple[Batch, list[Future[None]]]:
        epoch, rows = key
        batch = dataset.empty(rows, pin_memory=pin_memory)
        return batch, [pool.submit(dataset.fill, batch[0], epoch, rows, part) for part in _divided(len(rows), parts)]

    def delivered() -> Batch:
        batch, filling = waiting.popleft()
        for part in filling:
            part.result()
        waiting.extend(map(begin, itertools.islice(plan, 1)))
        return batch

    # One thread of arithmetic each: they are as many as there shall be. This thread must have asked for its own number
    # before they set theirs, or it would take theirs.
    torch.get_num_threads()
    with ThreadPoolExecutor(workers, "loader", torch.set_num_threads, (1,)) as pool:
        try:
            waiting = deque(map(begin, itertools.islice(itertools.chain([first], plan), ahead)))
            while waiting:
                yield delivered()  # and kept by no name here: its memory is that of another one as soon as it is used
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _load_in_processes(dataset: _Batches, plan: Iterator[_Key], workers: int, pin_memory: bool) -> Batches:
    """Load batches in worker processes. Each makes a whole one, or a part of a large one, put together here."""
    first = next(plan, None)
    if first is None:
        return
    plan = itertools.chain([first], plan)
    _, parts = _look_ahead(dataset.bytes_of(first), workers)
    if parts == 1:
        yield from _from_workers(dataset, plan, workers, pin_memory)
        return
    coming: deque[Indices] = deque()  # rows of the batches that are being made

    def in_parts() -> Iterator[_Key]:
        for epoch, rows in plan:
            coming.append(rows)
            yield from ((epoch, rows[part]) for part in _divided(len(rows), parts))

    made = _from_workers(dataset, in_parts(), workers, pin_memory=False)
    for images, _ in made:
        rows = coming.popleft()
        batch = dataset.empty(rows, pin_memory=pin_memory)
        whole = batch[0]
        whole[: len(images)] = images
        for part in _divided(len(rows), parts)[1:]:
            whole[part], _ = next(made)
        yield batch


def _from_workers(dataset: _Batches, plan: Iterator[_Key], workers: int, pin_memory: bool) -> Batches:
    """What worker processes load, in order. After the first death of one, what is missing is loaded again.

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
