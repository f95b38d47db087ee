"""What a step of a run costs, from its loader to its statistics: python -m tests.benchmarks.run_step

The run's own steps, of SGD and of SAM: through its loader, on pictures of random pixels that are decoded already, and
through `Trainer._step`. First operation by operation, then with the passes recorded as CUDA graphs, then compiled.
Among them, in the same process, ordinary loops whose batch waits on the device, so that they need no loader: one and
two plain forward-backward passes with one step of the run's optimizer (two are the least that SAM can cost), and
pytorch-optimizer's SAM. All have the run's model, loss, arithmetic and memory layout, and none clips.

All sides of a table take turns, and are compared by their medians. The wait for data is that of a stretch at the end
without interruption, because a side's loader fills its buffers while the others work. MFU is the operations of the
passes over the time and the device's peak; the share of bandwidth is what tests/benchmarks/traffic.py counts over the
time and the memory's nominal speed. On a CPU, and on a GPU whose speeds are not known here, both are left out.
"""

import argparse
import gc
import json
import math
import multiprocessing
import os
import platform
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch

from samtune.distributed import device
from samtune.errors import first_line
from samtune.models.training import train_mode
from samtune.train.setup import Setup
from tests.benchmarks import cost, traffic
from tests.support import single_steps
from tests.support.time_limits import Ended, OutOfTime, raising, time_limit

CLASSES = 102
RHO = 0.05
FLOOR, PLAIN, PUBLISHED = "two plain passes + SGD", "plain SGD", "pytorch-optimizer's SAM"
OURS = {"samtune SGD": 0.0, "samtune SAM": RHO}
# How the passes run: name, the settings it needs.
KINDS: dict[str, dict[str, Any]] = {
    "eager": {"graphs": "off"},
    "graphs": {"graphs": "on"},
    "compiled": {"graphs": "off", "compile": True},
}
WARM_UP = 5  # steps; the third is recorded as CUDA graphs
STRETCH = 0.3  # share of the time of a table, for what is not interrupted


@dataclass(frozen=True)
class Case:
    """A timm model, the size of its images in pixels, images of a step."""

    model: str
    img_size: int
    batch_size: int


@dataclass(frozen=True)
class Effort:
    """Seconds of a side's turn, at least and at most so many rounds, most seconds of a stretch."""

    turn: float
    fewest: int
    most: int
    stretch: float


CASES = [
    Case("efficientnet_b0", 224, 16),
    Case("efficientnet_b7", 600, 16),
    Case("efficientnet_b0", 224, 64),
    Case("efficientnet_b0", 224, 256),
]
EFFORT = Effort(turn=0.4, fewest=5, most=200, stretch=6.0)
SMOKE_CASES, SMOKE_KINDS = [Case("test_efficientnet", 64, 4)], ("eager", "graphs")  # a CPU compiles for a minute
SMOKE_EFFORT = Effort(turn=0.0, fewest=2, most=2, stretch=0.0)


# --------------------------------------------------------------------------------------------------------------- sides


@dataclass
class Side:
    """One way to take steps. run: takes so many. peak: bytes of GPU memory that it takes; None on a CPU."""

    run: Callable[[int], None]
    peak: int | None = None
    steps: single_steps.SingleSteps | None = None  # of a run


class Table:
    """The sides of a case, one kind of passes."""

    def __init__(self, case: Case, kind: str, folder: Path) -> None:
        self.case, self.kind, self.folder = case, kind, folder
        self.errors: dict[str, str] = {}
        self.sides: dict[str, Side] = {}
        self.target = device.select_device()
        images = math.ceil(2.5 * case.batch_size)
        self.data = folder / f"{case.batch_size}"
        self.decode = single_steps.write_pictures(self.data, max(images, CLASSES), CLASSES)

    def build(self) -> None:
        """Build and warm up all sides; one that fails is an error in the table."""
        makers: dict[str, Callable[[], Side]] = {name: lambda rho=rho: self.ours(rho) for name, rho in OURS.items()}
        makers |= {FLOOR: lambda: self.plain(2), PLAIN: lambda: self.plain(1)}
        if self.kind == "eager":
            makers[PUBLISHED] = self.published
        for name, make in makers.items():
            try:
                self.sides[name] = self.warmed_up(make)
            except Exception as error:
                self.errors[name] = first_line(error)

    def warmed_up(self, make: Callable[[], Side]) -> Side:
        """A side after its first steps, which are slower, with the memory that the next one takes."""
        device.free_memory()
        is_gpu = self.target.type == "cuda"
        # Reserved, not allocated: what the passes use stays with their recording, but counts as free between replays.
        before = torch.cuda.memory_reserved(self.target) if is_gpu else 0
        side = make()
        side.run(WARM_UP)
        if is_gpu:
            self.synchronize()
            device.free_memory()
            torch.cuda.reset_peak_memory_stats(self.target)
            side.run(1)
            self.synchronize()
            side.peak = torch.cuda.max_memory_reserved(self.target) - before
        return side

    def setup(self, rho: float, **settings: Any) -> Setup:
        case = self.case
        sizes = {"model": case.model, "img_size": case.img_size, "batch_size": case.batch_size}
        return single_steps.prepare(self.data, self.decode, **sizes, rho=rho, clip_grad=0.0, **settings)

    def ours(self, rho: float) -> Side:
        steps = single_steps.start(self.setup(rho, **KINDS[self.kind]), self.folder)

        def run(count: int) -> None:
            for _ in range(count):
                steps()

        return Side(run, steps=steps)

    def parts(self) -> tuple[Setup, Callable[[], torch.Tensor]]:
        """A run's model and optimizer, and its loss on one batch that lies on the device."""
        setup = self.setup(0.0, **KINDS["eager"])
        train_mode(setup.model, freeze_bn=True)
        images = torch.randn(self.case.batch_size, 3, self.case.img_size, self.case.img_size, device=self.target)
        images = images.contiguous(memory_format=torch.channels_last)
        labels = torch.arange(self.case.batch_size, device=self.target) % CLASSES

        def loss() -> torch.Tensor:
            with setup.update.autocast():
                return setup.update.loss(setup.model(images), labels)

        return setup, loss

    def plain(self, passes: int) -> Side:
        setup, loss = self.parts()

        def run(count: int) -> None:
            for _ in range(count):
                for _ in range(passes):
                    setup.optimizer.zero_grad()
                    loss().backward()
                setup.optimizer.step()

        return Side(run)

    def published(self) -> Side:
        from pytorch_optimizer import SAM  # may be missing on a machine with a GPU

        setup, loss = self.parts()
        options = {"lr": 1e-4, "momentum": 0.9, "nesterov": True}
        optimizer = SAM(setup.model.parameters(), torch.optim.SGD, rho=RHO, **options)

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            value = loss()
            value.backward()
            return value

        def run(count: int) -> None:
            for _ in range(count):
                closure()
                optimizer.step(closure)

        return Side(run)

    # ------------------------------------------------------------------------------------------------------- measuring

    def synchronize(self) -> None:
        if self.target.type == "cuda":
            torch.cuda.synchronize(self.target)

    def seconds(self, side: Side, count: int) -> float:
        """Of a step, when so many follow each other."""
        started = time.perf_counter()
        side.run(count)
        self.synchronize()
        return (time.perf_counter() - started) / count

    def measure(self, seconds: float, effort: Effort) -> Iterator[dict[str, Any]]:
        """One row for each side, in about so many seconds."""
        counts = {name: max(1, round(effort.turn / self.seconds(side, 2))) for name, side in self.sides.items()}
        taken: dict[str, list[float]] = {name: [] for name in self.sides}
        order, shuffle = list(self.sides), random.Random(0).shuffle
        end, rounds = time.perf_counter() + (1 - STRETCH) * seconds, 0
        while rounds < effort.fewest or (rounds < effort.most and time.perf_counter() < end):
            shuffle(order)
            for name in order:
                taken[name].append(self.seconds(self.sides[name], counts[name]))
            rounds += 1
        medians = {name: statistics.median(times) for name, times in taken.items()}
        runs = sum(side.steps is not None for side in self.sides.values())
        stretch = min(effort.stretch, STRETCH * seconds / max(1, runs))
        for name, side in self.sides.items():
            reference = PLAIN if name in (PLAIN, "samtune SGD") else FLOOR
            yield {
                "side": name,
                "ms": 1000 * medians[name],
                "images_per_second": self.case.batch_size / medians[name],
                "reference": reference,
                "ratio": medians[name] / medians[reference] if reference in medians else None,
                "rounds": rounds,
                "steps_per_turn": counts[name],
                "peak_mib": None if side.peak is None else side.peak / 2**20,
                **(self.stretch(side, stretch) if side.steps is not None else {}),
                "error": None,
            }
        yield from ({"side": name, "error": error} for name, error in self.errors.items())

    def stretch(self, side: Side, seconds: float) -> dict[str, Any]:
        """Steps of a run without interruption: images/s and share of the wait for data in the second half."""
        assert side.steps is not None
        stats, sam = side.steps.trainer.state.epoch, side.steps.setup.update.sam
        for _ in range(2):
            waiting, n, started = stats.waiting, stats.n, time.perf_counter()
            while stats.n == n or time.perf_counter() - started < seconds / 2:
                side.run(1)
            self.synchronize()
            passed = time.perf_counter() - started
        return {
            "stretch_images_per_second": (stats.n - n) / passed,
            "data_wait": (stats.waiting - waiting) / passed,
            "micro_batch": sam.micro_batch,  # not null where memory ran out
            "passes": sam.runner.mode,
        }


# -------------------------------------------------------------------------------------------------------------- shares


def on_paper(case: Case) -> dict[str, int]:
    """Operations of one image's forward pass, and bytes of a step of SGD and of SAM."""
    _, flops = cost.counts(case.model, case.img_size, CLASSES)
    sizes = (case.model, case.img_size, case.batch_size, CLASSES)
    return {"flops": flops, "sgd": traffic.count(*sizes, rho=0.0).bytes, "sam": traffic.count(*sizes, rho=RHO).bytes}


def shares(row: dict[str, Any], case: Case, paper: dict[str, int], speed: tuple[float, float]) -> dict[str, float]:
    """MFU and the share of the bandwidth; speed: FLOP/s and bytes/s of the device."""
    seconds, is_sgd = row["ms"] / 1000, row["side"] in (PLAIN, "samtune SGD")
    flops = cost.step_flops(paper["flops"], case.batch_size, 1 if is_sgd else cost.PASSES)
    return {
        "mfu": flops / seconds / speed[0],
        "bandwidth_share": paper["sgd" if is_sgd else "sam"] / seconds / speed[1],
    }


# ---------------------------------------------------------------------------------------------------------------- main


def measure_all(
    cases: list[Case], kinds: Iterable[str], minutes: float, effort: Effort, result: dict[str, Any]
) -> None:
    """Fill result["tables"], one for each case and kind; what there is no time for gets an error.

    A table may take three times its share of what is left: to compile a large model may take longer than all the rest.
    """
    tasks = [(case, kind) for kind in kinds for case in cases]
    tables = [{"kind": kind, **vars(case), "error": "no time left", "rows": []} for case, kind in tasks]
    result["tables"] = tables
    end = time.perf_counter() + 60 * minutes
    with suppress(Ended), tempfile.TemporaryDirectory() as folder, raising(signal.SIGTERM, Ended):
        for number, ((case, kind), told) in enumerate(zip(tasks, tables, strict=True)):
            left = end - time.perf_counter()
            share = left / (len(tasks) - number)
            limit = min(left, 3 * share)
            if limit <= 0:
                return
            try:
                with time_limit(limit):
                    told["rows"] = fill(Table(case, kind, Path(folder) / str(number)), share, effort)
                told["error"] = None
            except (Exception, OutOfTime) as error:
                told["error"] = first_line(error) if isinstance(error, Exception) else f"ended after {limit:.0f} s"
            if KINDS[kind].get("compile"):
                torch.compiler.reset()
            gc.collect()
            device.free_memory()


def fill(table: Table, seconds: float, effort: Effort) -> list[dict[str, Any]]:
    """The rows of a table, built and measured in about so many seconds."""
    started = time.perf_counter()
    table.build()
    return list(table.measure(max(0.0, seconds - (time.perf_counter() - started)), effort))


def show(result: dict[str, Any]) -> None:
    print(", ".join(f"{key} {result[key]}" for key in ("device", "torch", "timm", "python", "dtype")))
    for table in result["tables"]:
        why = f": {table['error']}" if table["error"] else ""
        print(f"\n{table['model']}, {table['img_size']} px, batch {table['batch_size']}, {table['kind']}{why}")
        for row in table["rows"]:
            if row["error"]:
                print(f"  {row['side']:<26}{row['error']}")
                continue
            line = f"  {row['side']:<26}{row['ms']:9.2f} ms {row['images_per_second']:9.0f} images/s"
            line += f"  x {row['ratio']:.3f}" if row["ratio"] else ""
            line += f"  {row['peak_mib']:.0f} MiB" if row["peak_mib"] else ""
            line += f"  waits {100 * row['data_wait']:.1f} %" if "data_wait" in row else ""
            line += f"  MFU {row['mfu']:.3f}, bandwidth {row['bandwidth_share']:.2f}" if row["mfu"] else ""
            print(line)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=6.0, help="time of the whole; default: %(default)s")
    parser.add_argument("--smoke", action="store_true", help="a few steps of a tiny model: whether this still works")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()

    target = device.select_device()
    result: dict[str, Any] = {
        "device": device.describe(target),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "python": platform.python_version(),
        "dtype": device.best_dtype(target)[0],
        "smoke": options.smoke,
    }
    speed = cost.speed(result["device"])
    cases = SMOKE_CASES if options.smoke else CASES
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(4, len(os.sched_getaffinity(0))), context) as pool:
        papers: list[Future[dict[str, int]]] = [pool.submit(on_paper, case) for case in cases if speed is not None]
        kinds, effort = (SMOKE_KINDS, SMOKE_EFFORT) if options.smoke else (KINDS, EFFORT)
        measure_all(cases, kinds, options.minutes, effort, result)
        for table in result["tables"]:
            case = Case(table["model"], table["img_size"], table["batch_size"])
            for row in table["rows"]:
                if row["error"] is None:
                    empty = {"mfu": None, "bandwidth_share": None}
                    row |= shares(row, case, papers[cases.index(case)].result(), speed) if speed else empty
    if options.json:
        json.dump(result, sys.stdout, indent=2)
        print()
    else:
        show(result)


if __name__ == "__main__":
    main()
