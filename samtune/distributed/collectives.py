"""Collectives, process groups and joint decisions of ranks; without torch.distributed they return at once."""

import itertools
import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeAlias, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous as torch_rendezvous

from samtune import console
from samtune.distributed import environment
from samtune.errors import LOST, ORPHANED, MachineError, SamtuneError, WorkerLost, first_line

Group: TypeAlias = "dist.ProcessGroup | None"  # None: all ranks
T = TypeVar("T")

_NO_TIMEOUT = timedelta(days=365)  # the watchdog, which knows how long a step takes, ends what hangs
_STORE_TIMEOUT = timedelta(minutes=10)  # for ranks that have not started yet
_POLL_SECONDS = 0.05
_AGENT_STORE = "TORCHELASTIC_USE_AGENT_STORE"  # set where torch's agent, which started the ranks, has a store
_WARN_AFTER = 15.0  # seconds of waiting for ranks that perhaps nobody started
_LOSS_TEXTS = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer", "Broken pipe")


@dataclass
class Traffic:
    """The reductions in which this rank took part: their number, and the bytes that it sent."""

    calls: int = 0
    bytes: int = 0

    def count(self, tensor: torch.Tensor) -> None:
        """Count a reduction of this tensor."""
        self.calls += 1
        self.bytes += tensor.numel() * tensor.element_size()


traffic = Traffic()
_block_numbers = itertools.count()


# ------------------------------------------------------------------------------------------------------- process groups


def init(device: torch.device) -> None:
    """Join the process group of the ranks that a launcher started, if there is one. Libraries use this GPU by default.

    Raises MachineError if the others cannot be reached.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)  # of this thread; each has its own
    info = environment.rank_info()
    if info is None or dist.is_initialized():
        return
    if os.environ.get(_AGENT_STORE) != "True":
        hint = f"; or, if there are no other ranks, run {environment.command_without_launcher()}"
        environment.check_host("MASTER_ADDR=", os.environ["MASTER_ADDR"], hint)
    rendezvous = _Rendezvous(info, device)
    rendezvous.start()
    warn_at = time.monotonic() + _WARN_AFTER
    while not rendezvous.done.wait(_POLL_SECONDS):  # Python handles signals here, but not in torch's code
        if time.monotonic() >= warn_at:
            warn_at = math.inf
            console.warn(
                f"rank {info.rank} of {info.world_size} waits for {_rank_names(rendezvous.missing())}\n"
                f"  cause: {environment.launcher_variables()} says that this process is one of {info.world_size}\n"
                "  hint:  start the same command for all ranks at about the same time; or, if there are no others, "
                f"stop this one and run {environment.command_without_launcher()}",
                on_any_rank=True,
            )
    if rendezvous.error is not None:
        if not isinstance(rendezvous.error, dist.DistError | RuntimeError | ValueError):
            raise rendezvous.error
        raise MachineError(
            f"rank {info.rank} cannot reach the others at {rendezvous.address}",
            first_line(rendezvous.error),
            "start the same command for all ranks at about the same time; the port must be free on the first machine",
        )


class _Rendezvous(threading.Thread):
    """Initializes the process group by a store of rank 0, or of torch's agent if that started the ranks."""

    def __init__(self, info: environment.RankInfo, device: torch.device) -> None:
        super().__init__(name="rendezvous", daemon=True)
        self._info, self._device = info, device
        self._store: Any = None  # torch.distributed.Store
        self.address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        self.error: Exception | None = None
        self.done = threading.Event()

    def run(self) -> None:
        info, backend = self._info, "cpu:gloo"
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
            backend += ",cuda:nccl"
        try:
            store = self._open_store()
            store.set(f"samtune/joined/{info.rank}", "")
            self._store = store.clone()  # a store in which torch waits serves no other thread
            rank, size = info.rank, info.world_size
            # No device_id: with one, the mesh of a sharded model splits this group, and torch had releases that cannot
            # split a group of two backends (pytorch/pytorch#159200). NCCL connects where the model goes to the ranks.
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=_NO_TIMEOUT)
        except Exception as error:
            self.error = error
        finally:
            self.done.set()

    def _open_store(self) -> Any:
        if os.environ.get(_AGENT_STORE) == "True":
            return next(torch_rendezvous("env://", timeout=_STORE_TIMEOUT))[0]
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        size, first = self._info.world_size, self._info.rank == 0
        # It does not wait for the others: a store can tell which ranks are missing.
        return TCPStore(host, port, size, first, _STORE_TIMEOUT, wait_for_workers=False, multi_tenant=True)

    def missing(self) -> list[int]:
        """The ranks that have not opened the store; rank 0 if there is no store yet."""
        store = self._store
        if store is None:
            return [0]
        return [rank for rank in range(self._info.world_size) if not store.check([f"samtune/joined/{rank}"])]


def _rank_names(ranks: Sequence[int]) -> str:
    numbers = ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")
    return f"rank{'s' if len(ranks) > 1 else ''} {numbers}" if ranks else "the others"


def shutdown() -> None:
    """Leave the process group. Do not call it where another rank may be lost: it would wait for that."""
    if is_initialized():
        dist.destroy_process_group()


def is_initialized() -> bool:
    """Whether this process is in a process group."""
    return dist.is_available() and dist.is_initialized()


def world_size(group: Group = None) -> int:
    """Number of ranks in a group, 1 without torch.distributed."""
    return dist.get_world_size(group) if is_initialized() else 1


def is_sharded(model: nn.Module) -> bool:
    """Whether each rank holds only a part of the model (samtune.distributed.fsdp)."""
    if not is_initialized():
        return False
    from torch.distributed.tensor import DTensor

    return any(isinstance(w, DTensor) for w in model.parameters())


@dataclass(frozen=True)
class World:
    """Number of ranks, and of those on this machine."""

    size: int
    local_size: int


def world() -> World:
    """The ranks that are running."""
    return World(world_size(), local_world_size())


def local_world_size() -> int:
    """Number of ranks on this machine."""
    info = environment.rank_info()
    return info.local_world_size if info is not None and is_initialized() else 1


def rank(group: Group = None) -> int:
    """The rank of this process in the group, 0 without torch.distributed."""
    return dist.get_rank(group) if is_initialized() else 0


def new_subgroup(size: int) -> dist.ProcessGroup:
    """Divide the ranks into groups of `size` consecutive ones; the group of this rank. Every rank calls it."""
    group: dist.ProcessGroup = dist.new_subgroups(size)[0]
    return group


@contextmanager
def connection_errors() -> Iterator[None]:
    """Turn torch's errors for a lost connection to another rank into WorkerLost."""
    try:
        yield
    except (dist.DistError, RuntimeError) as error:
        is_loss = isinstance(error, dist.DistError) or any(text in str(error) for text in _LOSS_TEXTS)
        if not (is_initialized() and is_loss):
            raise
        raise WorkerLost(
            ORPHANED if environment.is_orphan() else LOST,
            first_line(error),
            "its own error says why it ended; go on with --resume",
        ) from None


# -------------------------------------------------------------------------------------------------- objects, decisions


def broadcast_from_rank0(make: Callable[[], T]) -> T:
    """Call make() on rank 0 and return its result on all ranks. Its SamtuneError is raised on all of them."""
    if world_size() == 1:
        return make()
    result: list[Any] = [None]
    if rank() == 0:
        try:
            result = [make()]
        except SamtuneError as error:
            result = [error]
    dist.broadcast_object_list(result, device=torch.device("cpu"))
    if isinstance(result[0], SamtuneError):
        raise result[0]
    made: T = result[0]
    return made


def all_gather_object(value: T) -> list[T]:
    """The values of all ranks, in order of the ranks."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def barrier() -> None:
    """Wait until all ranks have called it."""
    any_rank_true(False)


def seed_this_rank(seed: int, step: int) -> None:
    """Seed each of several ranks by (seed, step, rank): masks differ, and a checkpoint need not store generators."""
    if world_size() > 1:
        torch.manual_seed(int(np.random.SeedSequence([seed, step, rank()]).generate_state(1, np.uint64)[0]))


def any_rank_true(*flags: bool) -> list[bool]:
    """For each flag, whether it is set on any rank. All ranks call it."""
    if world_size() == 1:
        return list(flags)
    counts = all_reduce_sum(torch.tensor(flags, dtype=torch.int32))
    return [count > 0 for count in counts.tolist()]


@contextmanager
def local_main_process_first() -> Iterator[None]:
    """Local rank 0 of each machine runs the block before the others, which then find what it downloaded or decoded."""
    info = environment.rank_info()
    if info is None or world_size() == 1 or info.local_world_size == 1:
        yield
        return
    store = dist.distributed_c10d._get_default_store()
    key = f"samtune/machine-{info.machine}/{next(_block_numbers)}"
    while info.local_rank > 0 and not store.check([key]):
        time.sleep(_POLL_SECONDS)  # not store.wait, in which Python handles no signal
    if info.local_rank > 0 and store.get(key) != b"done":
        raise WorkerLost(LOST, "the first rank of this machine has failed", "its own error says why")
    outcome = "failed"
    try:
        yield
        outcome = "done"
    finally:
        if info.local_rank == 0:
            store.set(key, outcome)


def find_absent_ranks(timeout: float) -> list[int]:
    """The ranks that do not answer in `timeout` seconds; else those that the others wait for in a reduction.

    A rank that has waited too long calls it. Each rank tells how many reductions it has begun.
    """
    store = dist.distributed_c10d._get_default_store().clone()  # the main thread may be using the original
    store.set_timeout(timedelta(seconds=timeout))
    begun: dict[int, int] = {}
    store.set(f"samtune/stuck/{rank()}", str(traffic.calls))
    for other in range(world_size()):
        with suppress(dist.DistError, RuntimeError):
            begun[other] = int(store.get(f"samtune/stuck/{other}"))
    silent = [other for other in range(world_size()) if other not in begun]
    most = max(begun.values(), default=0)
    return silent or [other for other, count in begun.items() if count < most]


# ---------------------------------------------------------------------------------------------------------- reductions


def all_reduce_sum(tensor: torch.Tensor, group: Group = None) -> torch.Tensor:
    """Sum over the group's ranks, in place, with the same bits on each of them."""
    if world_size(group) > 1:
        traffic.count(tensor)
        dist.all_reduce(tensor, group=group)
    return tensor


def all_reduce_sum_lists(
    tensors: list[torch.Tensor], group: Group = None, *, like: Sequence[torch.Tensor] | None = None
) -> list[torch.Tensor]:
    """Sum each tensor over the group's ranks, in a single reduction; all of one dtype.

    like: tensors of the same shapes, whose layout in memory the sums get, by default that of `tensors`. Operations on
    lists of tensors need one layout: otherwise they go through them one by one.
    """
    if world_size(group) == 1:
        return tensors
    flat = tensors[0].new_empty(sum(t.numel() for t in tensors))
    sums = flat_views(flat, like or tensors)
    torch._foreach_copy_(sums, tensors)
    all_reduce_sum(flat, group)
    return sums


def flat_views(flat: torch.Tensor, like: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Consecutive parts of a one-dimensional tensor, each with the shape and layout of one of these tensors."""
    views, start = [], int(flat.storage_offset())
    for t in like:
        extent = 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
        stride = t.stride() if extent == t.numel() else torch.empty(t.shape, device="meta").stride()  # not dense
        views.append(flat.as_strided(t.shape, stride, start))
        start += t.numel()
    return views


def all_gather(values: torch.Tensor, group: Group = None) -> torch.Tensor:
    """The values of all ranks of the group: values (...) -> (ranks, ...)."""
    if world_size(group) == 1:
        return values[None]
    traffic.count(values)
    parts = [torch.empty_like(values) for _ in range(world_size(group))]
    dist.all_gather(parts, values, group=group)
    return torch.stack(parts)
