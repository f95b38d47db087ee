"""What a second rank gains and what it sends: python -m tests.benchmarks.scaling

Weak scaling of a SAM step over gloo: one rank on one core without torch.distributed, against two ranks on a core each,
with as many images each. Three sides in turn, in rounds of an order of their own:

    alone       a process that never joined anything steps on the first core; both ranks wait, blocked
    together    both ranks step at the same time
    silent      both ranks step at the same time, as if each were alone: no wrapper, no reduction, no waiting

A step of two ranks takes as long as the slower one, on both sides. So what silent loses against alone is the machine's
loss by working on two cores (clock, caches, memory, whatever else runs), what together loses against silent is
samtune's by communicating; and the product of the two is the scaling efficiency. gloo's threads share the core of their
rank, so that nothing is hidden behind a backward pass as it would be on GPUs.

Then what a step gives into reductions, counted: SGD, SAM, and SAM as it is often published for
DistributedDataParallel, with a forward pass outside of no_sync.
"""

import argparse
import json
import multiprocessing
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from samtune import SAM
from samtune.distributed import collectives, ddp, device
from samtune.models.build import build_model
from samtune.models.training import train_mode
from samtune.sam.step import Step
from tests.support.rank_processes import Ranks

CPU = torch.device("cpu")
CLASSES = 102
RHO = 0.05
WARM_UP = 3  # rounds
SIDES = ("alone", "together", "silent")
PARTS = ("pass_1", "pass_2", "decision")

Traffic = dict[str, dict[str, int]]  # of each part of a step: calls, bytes


@dataclass(frozen=True)
class Settings:
    """img_size: pixels; batch_size: images of each rank; m: of the step that is timed."""

    model: str
    img_size: int
    batch_size: int
    m: Literal["device", "global"]


# ----------------------------------------------------------------------------------------- in the processes that work

_timed: dict[str, Callable[[], object]] = {}  # the steps of this process, by side


def pin(core: int) -> None:
    """Become the process that is alone."""
    os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)


@contextmanager
def switched_off() -> Iterator[None]:
    """In the block, samtune is in a process that is alone."""
    plain = collectives.is_initialized
    collectives.is_initialized = lambda: False
    try:
        yield
    finally:
        collectives.is_initialized = plain


def build(settings: Settings) -> nn.Module:
    """A model as a run has it; weights do not change what a step costs."""
    torch.manual_seed(0)
    model, _ = build_model(settings.model, classes=CLASSES, img_size=settings.img_size, drop=0.2, pretrained=False)
    model = model.to(memory_format=torch.channels_last)
    train_mode(model, freeze_bn=True)
    return ddp.data_parallel(model, CPU)


def build_step(settings: Settings, rho: float = RHO, m: str | None = None) -> Step:
    """samtune's update as a run makes it."""
    model = build(settings)
    return Step(SAM(model, rho, m=m or settings.m), sgd(model), F.cross_entropy, clip_grad=1.0)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, nesterov=True)


def random_batch(settings: Settings) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (batch, 3, h, w) and labels (batch,)."""
    images = torch.randn(settings.batch_size, 3, settings.img_size, settings.img_size)
    return images.contiguous(memory_format=torch.channels_last), torch.arange(settings.batch_size) % CLASSES


def prepare(settings: Settings) -> None:
    """Make the steps that this process will be asked for."""
    batch = random_batch(settings)

    def side(step: Step) -> Callable[[], object]:
        return lambda: step(*batch)

    if not dist.is_initialized():
        _timed["alone"] = side(build_step(settings))
        return
    _timed["together"] = side(build_step(settings))
    with switched_off():
        _timed["silent"] = side(build_step(settings))


def seconds(side: str) -> float:
    """One step's time, on this rank. Ranks begin together: whoever calls them has them wait for each other."""
    with switched_off() if side == "silent" else nullcontext():
        began = time.perf_counter()
        _timed[side]()
        return time.perf_counter() - began


class Meter:
    """What this rank gives into reductions, by the parts of a step."""

    def __init__(self) -> None:
        self.parts: Traffic = {part: {"calls": 0, "bytes": 0} for part in PARTS}
        self._seen = asdict(collectives.traffic)

    def close(self, part: str) -> None:
        """All since the last call was of this part."""
        now = asdict(collectives.traffic)
        for key, value in now.items():
            self.parts[part][key] += value - self._seen[key]
        self._seen = now


def step_traffic(step: Step, batch: tuple[torch.Tensor, ...]) -> Traffic:
    """What samtune's update reduces. The only pass of SGD is pass 2: its gradient is the final one."""
    step(*batch)  # DistributedDataParallel arranges its buckets anew after the first
    meter, plain_loss, plain_backward = Meter(), step.loss, step.sam.backward

    def loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if step.sam.perturbed:  # pass 1 is over
            meter.close("pass_1")
        return plain_loss(logits, labels)

    def backward(*arguments: Any) -> torch.Tensor:
        value = plain_backward(*arguments)
        meter.close("pass_2")
        return value

    step.loss, step.sam.backward = loss, backward  # type: ignore[method-assign]
    step(*batch)
    meter.close("decision")
    return meter.parts


def published_traffic(model: nn.Module, batch: tuple[torch.Tensor, ...]) -> Traffic:
    """What SAM reduces as it is often published: no_sync stands around the backward of pass 1 alone.

    But it is a forward pass that decides whether its backward pass synchronises.
    """
    images, labels = batch
    params, optimizer = list(model.parameters()), sgd(model)
    for _ in range(2):  # the first arranges the buckets
        meter = Meter()
        loss = F.cross_entropy(model(images), labels)
        with model.no_sync():
            loss.backward()
        meter.close("pass_1")
        with torch.no_grad():
            scale = RHO / nn.utils.get_total_norm([w.grad for w in params])
            saved = [w.clone() for w in params]
            torch._foreach_add_(params, torch._foreach_mul([w.grad for w in params], scale))
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        meter.close("pass_2")
        with torch.no_grad():
            torch._foreach_copy_(params, saved)
        optimizer.step()
        optimizer.zero_grad()
        meter.close("decision")
    return meter.parts


def all_traffic(settings: Settings) -> tuple[int, dict[str, Traffic]]:
    """Bytes of the trainable parameters, and what each kind of step reduces, whatever the batch is."""
    batch = random_batch(replace(settings, batch_size=2))
    kinds = {
        "SGD": step_traffic(build_step(settings, rho=0.0), batch),
        "SAM, m device": step_traffic(build_step(settings, m="device"), batch),
        "SAM, m global": step_traffic(build_step(settings, m="global"), batch),
        "SAM as often published": published_traffic(build(settings), batch),
    }
    return sum(w.nbytes for w in build(settings).parameters() if w.requires_grad), kinds


# ------------------------------------------------------------------------------------------ in the process that asks


def two_cores() -> tuple[int, int] | None:
    """Two cores that this process may use, of different physical ones if it can be; None where there is one only."""
    first, *others = sorted(os.sched_getaffinity(0))
    if not others:
        return None
    return first, next((core for core in others if not share_a_core(first, core)), others[0])


def share_a_core(a: int, b: int) -> bool:
    """Whether two cores, as Linux counts them, are threads of one physical core."""
    siblings = (Path(f"/sys/devices/system/cpu/cpu{core}/topology/core_cpus_list") for core in (a, b))
    told = [path.read_text() if path.is_file() else str(path) for path in siblings]
    return told[0] == told[1]


def measure(settings: Settings, rounds: int, cores: tuple[int, int]) -> dict[str, Any]:
    """All numbers, in one launch."""
    times: dict[str, list[float]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory(prefix="samtune-scaling-") as folder:
        context = multiprocessing.get_context("spawn")
        ranks = Ranks(2, Path(folder), cores)
        with ProcessPoolExecutor(1, context, initializer=pin, initargs=(cores[0],)) as alone:
            ready = alone.submit(prepare, settings)  # while the ranks start, too
            ranks(prepare, settings)
            ready.result()
            order, shuffle = list(SIDES), random.Random(0).shuffle
            for turn in range(rounds + WARM_UP):
                shuffle(order)
                for side in order:
                    took = alone.submit(seconds, side).result() if side == "alone" else max(ranks(seconds, side))
                    if turn >= WARM_UP:
                        times[side].append(took)
            parameter_bytes, traffic = ranks(all_traffic, settings)[0]
        ranks.close()
    return {
        "settings": asdict(settings),
        "rounds": rounds,
        "cores": cores,
        "threads_of_one_core": share_a_core(*cores),
        "device": device.describe(CPU),
        "torch": torch.__version__,
        "python": platform.python_version(),
        **scaling(settings.batch_size, times),
        "parameter_bytes": parameter_bytes,
        "traffic": {kind: with_sum(parts) for kind, parts in traffic.items()},
    }


def scaling(batch_size: int, times: dict[str, list[float]]) -> dict[str, Any]:
    """Seconds of steps by side, one for each round -> medians, images/s and their ratios.

    A ratio is that of the medians; its quartiles are those of the rounds' own ratios.
    """

    def ratios(alone: float, together: float, silent: float) -> dict[str, float]:
        return {
            "scaling_efficiency": alone / together,
            "machine_efficiency": alone / silent,
            "communication_share": (together - silent) / together,
        }

    t = {side: statistics.median(times[side]) for side in SIDES}
    by_round = [ratios(*of_round) for of_round in zip(*(times[side] for side in SIDES), strict=True)]
    return {
        "ms": {side: 1000 * value for side, value in t.items()},
        "images_per_s": {side: batch_size * (1 if side == "alone" else 2) / value for side, value in t.items()},
        **ratios(**t),
        "quartiles": {name: quartiles([found[name] for found in by_round]) for name in by_round[0]},
    }


def quartiles(values: list[float]) -> tuple[float, float]:
    """Half of the values lie between the two."""
    ordered, quarter = sorted(values), len(values) // 4
    return ordered[quarter], ordered[-1 - quarter]


def with_sum(parts: Traffic) -> Traffic:
    return parts | {"step": {key: sum(part[key] for part in parts.values()) for key in ("calls", "bytes")}}


def show(result: dict[str, Any]) -> None:
    used, ms, speed = result["settings"], result["ms"], result["images_per_s"]
    print(", ".join(f"{key} {result[key]}" for key in ("device", "torch", "python", "rounds")))
    threads = ", which are threads of one core" if result["threads_of_one_core"] else ""
    print(f"cores {result['cores'][0]} and {result['cores'][1]}{threads}, one thread each")
    print(f"\nSAM step, m {used['m']}, {used['model']}, {used['img_size']} px, batch {used['batch_size']} per rank")
    kinds = ("1 rank, without torch.distributed", "2 ranks", "2 ranks, communication switched off")
    for side, what in zip(SIDES, kinds, strict=True):
        print(f"  {what:<38}{ms[side]:9.1f} ms {speed[side]:9.2f} images/s")
    for name, (low, high) in result["quartiles"].items():
        print(f"  {name.replace('_', ' '):<38}{result[name]:9.3f}    (half of the rounds: {low:.3f} to {high:.3f})")
    print(f"\nwhat a rank gives into reductions in a step, calls: bytes (weights: {result['parameter_bytes']:,} bytes)")
    print(f"  {'':<24}" + "".join(f"{part.replace('_', ' '):>17}" for part in (*PARTS, "step")) + "  over SGD")
    for kind, parts in result["traffic"].items():
        cells = [f"{parts[part]['calls']}: {parts[part]['bytes']:,}" for part in (*PARTS, "step")]
        over = parts["step"]["bytes"] / result["traffic"]["SGD"]["step"]["bytes"]
        print(f"  {kind:<24}" + "".join(f"{cell:>17}" for cell in cells) + f"  x {over:.3f}")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tf_efficientnet_lite0", help="default: %(default)s")
    parser.add_argument("--img-size", type=int, default=128, help="pixels; default: %(default)s")
    parser.add_argument("--batch-size", type=int, default=16, help="images of each rank; default: %(default)s")
    parser.add_argument("--m", choices=("device", "global"), default="device", help="of the step that is timed")
    parser.add_argument("--rounds", type=int, default=30, help=f"timed rounds, after {WARM_UP} that do not count")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    given = parser.parse_args()

    cores = two_cores()
    if cores is None:
        print("scaling needs two cores: this process may use one only", file=sys.stderr)
        sys.exit(8)
    settings = Settings(given.model, given.img_size, given.batch_size, given.m)
    result = measure(settings, given.rounds, cores)
    print(json.dumps(result, indent=2)) if given.json else show(result)


if __name__ == "__main__":
    main()
