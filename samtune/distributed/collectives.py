"""What ranks do together; a process that is alone sends nothing.

With samtune.distributed.launch and samtune.distributed.fsdp the only user of torch.distributed.
"""

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
from torch.distributed.rendezvous import rendezvous

from samtune import console
from samtune.distributed import environment
from samtune.errors import LOST, ORPHANED, MachineError, SamtuneError, WorkerLost, first_line

Group: TypeAlias = "dist.ProcessGroup | None"  # None: all ranks
T = TypeVar("T")

_FOREVER = timedelta(days=365)  # what takes too long is for the watchdog to tell, which knows what is usual
_PATIENCE = timedelta(minutes=10)  # for ranks that have not come yet
_POLL = 0.05  # seconds
_AGENTS_STORE = "TORCHELASTIC_USE_AGENT_STORE"  # whether torch's agent, which has started the ranks, has a store
_WARNED_AFTER = 15.0  # seconds of waiting for ranks that nobody may have started
_SAID_OF_A_LOSS = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer", "Broken pipe")


@dataclass
class Traffic:
    """What this rank has given into reductions: their number, and the bytes of its tensors."""

    calls: int = 0
    bytes: int = 0

    def count(self, tensor: torch.Tensor) -> None:
        """One more."""
        self.calls += 1
        self.bytes += tensor.numel() * tensor.element_size()


traffic = Traffic()
_turns = itertools.count()


# -------------------------------------------------------------------------------------------------------- who is there


def init(device: torch.device) -> None:
    """Become one of the ranks that a launcher has started; in a process that is alone there is nothing to do.

    Raises MachineError where the others do not come.
    """
    here = environment.rank_info()
    if here is None or dist.is_initialized():
        return
    if os.environ.get(_AGENTS_STORE) != "True":
        hint = f"; or, if there are no other ranks, run {environment.command_without_launcher()}"
        environment.check_host("MASTER_ADDR=", os.environ["MASTER_ADDR"], hint)
    meeting = _Meeting(here, device)
    meeting.start()
    warned_at = time.monotonic() + _WARNED_AFTER
    while not meeting.over.wait(_POLL):  # here, and not in torch's code, a signal is heard
        if time.monotonic() >= warned_at:
            warned_at = math.inf
            console.warn(
                f"rank {here.rank} of {here.world_size} waits for {_words(meeting.missing())}\n"
                f"  cause: {environment.launcher_variables()} says that this process is one of {here.world_size}\n"
                "  hint:  start the same command for all ranks at about the same time; or, if there are no others, "
                f"stop this one and run {environment.command_without_launcher()}",
                on_any_rank=True,
            )
    if meeting.error is not None:
        if not isinstance(meeting.error, dist.DistError | RuntimeError | ValueError):
            raise meeting.error
        raise MachineError(
            f"rank {here.rank} does not find the others at {meeting.place}",
            first_line(meeting.error),
            "start the same command for all ranks at about the same time; the port must be free on the first machine",
        )


class _Meeting(threading.Thread):
    """The ranks meet: at a store of the first one, or of torch's agent, if that has started them."""

    def __init__(self, here: environment.RankInfo, device: torch.device) -> None:
        super().__init__(name="meeting", daemon=True)
        self._here, self._device = here, device
        self._store: Any = None  # torch.distributed.Store
        self.place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        self.error: Exception | None = None
        self.over = threading.Event()

    def run(self) -> None:
        here, backend = self._here, "cpu:gloo"
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
            backend += ",cuda:nccl"
        try:
            store = self._open()
            store.set(f"samtune/here/{here.rank}", "")
            self._store = store.clone()  # while torch waits in a store, that answers nobody else
            dist.init_process_group(backend, store=store, rank=here.rank, world_size=here.world_size, timeout=_FOREVER)
        except Exception as error:
            self.error = error
        finally:
            self.over.set()

    def _open(self) -> Any:
        if os.environ.get(_AGENTS_STORE) == "True":
            return next(rendezvous("env://", timeout=_PATIENCE))[0]
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        first = self._here.rank == 0
        # Not to wait in it for all others: who is missing can be told when there is a store.
        return TCPStore(host, port, self._here.world_size, first, _PATIENCE, wait_for_workers=False, multi_tenant=True)

    def missing(self) -> list[int]:
        """The ranks that have not come to the store; the first one, if there is no store yet."""
        store = self._store
        if store is None:
            return [0]
        return [rank for rank in range(self._here.world_size) if not store.check([f"samtune/here/{rank}"])]


def _words(missing: Sequence[int]) -> str:
    some = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
    return f"rank{'s' if len(missing) > 1 else ''} {some}" if missing else "the others"


def shutdown() -> None:
    """Not to be called where another rank may be lost: it would wait for it."""
    if is_initialized():
        dist.destroy_process_group()


def is_initialized() -> bool:
    """Whether this process has joined others."""
    return dist.is_available() and dist.is_initialized()


def world_size(group: Group = None) -> int:
    """Ranks of a group, 1 where torch.distributed is not in use."""
    return dist.get_world_size(group) if is_initialized() else 1


def is_sharded(model: nn.Module) -> bool:
    """Whether each rank has a part of the model alone (samtune.distributed.fsdp)."""
    if not is_initialized():
        return False
    from torch.distributed.tensor import DTensor

    return any(isinstance(w, DTensor) for w in model.parameters())


@dataclass(frozen=True)
class World:
    """How many ranks there are, and how many of them on this machine."""

    size: int
    local_size: int


def world() -> World:
    """The ranks that are running."""
    return World(world_size(), local_world_size())


def local_world_size() -> int:
    """Ranks that share this machine."""
    here = environment.rank_info()
    return here.local_world_size if here is not None and is_initialized() else 1


def rank(group: Group = None) -> int:
    """The place of this process in the group, 0 where it is alone."""
    return dist.get_rank(group) if is_initialized() else 0


def new_subgroup(size: int) -> dist.ProcessGroup:
    """The group of this rank, of so many that follow each other. All ranks call it; size divides their number."""
    group: dist.ProcessGroup = dist.new_subgroups(size)[0]
    return group


@contextmanager
def connection_errors() -> Iterator[None]:
    """Turn the errors by which torch notices that another rank is gone into WorkerLost."""
    try:
        yield
    except (dist.DistError, RuntimeError) as error:
        is_loss = isinstance(error, dist.DistError) or any(said in str(error) for said in _SAID_OF_A_LOSS)
        if not (is_initialized() and is_loss):
            raise
        raise WorkerLost(
            ORPHANED if environment.is_orphan() else LOST,
            first_line(error),
            "its own words tell why it ended; go on with --resume",
        ) from None


# ------------------------------------------------------------------------------------------------- words and decisions


def broadcast_from_rank0(make: Callable[[], T]) -> T:
    """What make() returns on rank 0, on all ranks; a SamtuneError of it is raised on all of them, too."""
    if world_size() == 1:
        return make()
    box: list[Any] = [None]
    if rank() == 0:
        try:
            box = [make()]
        except SamtuneError as error:
            box = [error]
    dist.broadcast_object_list(box, device=torch.device("cpu"))
    if isinstance(box[0], SamtuneError):
        raise box[0]
    made: T = box[0]
    return made


def all_gather_object(content: T) -> list[T]:
    """What each rank has, in order of the ranks."""
    if world_size() == 1:
        return [content]
    found: list[Any] = [None] * world_size()
    dist.all_gather_object(found, content)
    return found


def barrier() -> None:
    """No rank passes before all have come here."""
    any_rank_true(False)


def seed_this_rank(seed: int, step: int) -> None:
    """Ranks draw masks of their own, which follow from (seed, step, rank): a checkpoint need not have them."""
    if world_size() > 1:
        torch.manual_seed(int(np.random.SeedSequence([seed, step, rank()]).generate_state(1, np.uint64)[0]))


def any_rank_true(*flags: bool) -> list[bool]:
    """Of each flag, whether it is set on any rank. All ranks wait for each other here."""
    if world_size() == 1:
        return list(flags)
    decided = all_reduce_sum(torch.tensor(flags, dtype=torch.int32))
    return [count > 0 for count in decided.tolist()]


@contextmanager
def local_main_process_first() -> Iterator[None]:
    """One rank of each machine does the block before the others: what it downloads or decodes, they find there."""
    here = environment.rank_info()
    if here is None or world_size() == 1 or here.local_world_size == 1:
        yield
        return
    store = dist.distributed_c10d._get_default_store()
    key = f"samtune/machine-{here.machine}/{next(_turns)}"
    while here.local_rank > 0 and not store.check([key]):
        time.sleep(_POLL)  # and not in the store, where no signal could be heard
    if here.local_rank > 0 and store.get(key) != b"done":
        raise WorkerLost(LOST, "the first rank of this machine has failed", "its own words tell why")
    outcome = "failed"
    try:
        yield
        outcome = "done"
    finally:
        if here.local_rank == 0:
            store.set(key, outcome)


def find_absent_ranks(patience: float) -> list[int]:
    """For a rank that waits too long: those that do not wait as it does, or do not answer within so many seconds.

    Each rank tells how many reductions it has begun. Who has begun the fewest is who the others wait for.
    """
    store = dist.distributed_c10d._get_default_store().clone()  # the main thread may be using the other
    store.set_timeout(timedelta(seconds=patience))
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
    """The sum over the group's ranks, the same on each of them, in place."""
    if world_size(group) > 1:
        traffic.count(tensor)
        dist.all_reduce(tensor, group=group)
    return tensor


def all_reduce_sum_lists(tensors: list[torch.Tensor], group: Group = None) -> list[torch.Tensor]:
    """The sum of each tensor over the group's ranks, in a single reduction; all of one dtype."""
    if world_size(group) == 1:
        return tensors
    flat = all_reduce_sum(torch._utils._flatten_dense_tensors(tensors), group)
    return list(torch._utils._unflatten_dense_tensors(flat, tensors))


def all_gather(values: torch.Tensor, group: Group = None) -> torch.Tensor:
    """A few numbers of each rank of the group, the same on all of them: values (...) -> (ranks, ...)."""
    if world_size(group) == 1:
        return values[None]
    traffic.count(values)
    parts = [torch.empty_like(values) for _ in range(world_size(group))]
    dist.all_gather(parts, values, group=group)
    return torch.stack(parts)
