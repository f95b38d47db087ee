"""Functions run on several ranks at once: processes joined by gloo, as a launcher would join them."""

import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def _join(counter: Any, world: int, meeting_point: str, cores: Sequence[int] | None) -> None:
    with counter.get_lock():
        rank = counter.value
        counter.value += 1
    if cores is not None:
        os.sched_setaffinity(0, {cores[rank]})  # before gloo has threads: they stay on the rank's core
    torch.set_num_threads(1)  # ranks that spin for the same core slow each other twentyfold
    dist.init_process_group("gloo", init_method=f"file://{meeting_point}", rank=rank, world_size=world)


def _call(function: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[int, Any]:
    dist.barrier()  # nobody takes a second turn before all have taken the first
    result = function(*arguments)
    dist.barrier()
    return dist.get_rank(), result


class Ranks:
    """A group of ranks that waits for functions; cores: the one that each of them is pinned to."""

    def __init__(self, world: int, folder: Path, cores: Sequence[int] | None = None) -> None:
        self.world = world
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["samtune.train.evaluation", "samtune.distributed.fsdp"])  # loaded once for all
        self._pool = ProcessPoolExecutor(
            world,
            context,
            initializer=_join,
            initargs=(context.Value("i", 0), world, str(folder / "meeting"), cores),
        )

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Call a module's function on every rank; its results in order of the ranks."""
        calls = [self._pool.submit(_call, function, arguments) for _ in range(self.world)]
        done, waiting = wait(calls, timeout=120, return_when=FIRST_EXCEPTION)
        if waiting:  # for a rank that has failed, and would do so for ever
            for process in list(self._pool._processes.values()):
                process.kill()
        results = [call.result() for call in sorted(done, key=lambda call: call.exception() is None)]
        assert not waiting, "ranks wait for each other"
        return [result for _, result in sorted(results, key=lambda pair: pair[0])]

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
