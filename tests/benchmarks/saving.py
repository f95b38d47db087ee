"""What checkpoints cost: how long a save holds the training up, its share of a run, and the time until a run resumes.

    python -m tests.benchmarks.saving

First EfficientNet-Lite0 and B7 with SGD, two ways in turn in one process: a save on the thread that trains, and one
that a thread of its own writes. Held: the time until the next step can begin. On disk: until the links have moved.
Lost: what a save adds to the time of steps that go on beside it, and use the same cores on a CPU. Then whole runs of
EfficientNet-Lite0 with its ImageNet weights on digits (extra: demo): the share is that of the saver's calls in the time
from the first step to the last, at the default interval.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from samtune.config import loading
from samtune.distributed import device
from samtune.runs.run_log import RunLog
from samtune.train import checkpointing, loop
from samtune.train.checkpointing import CheckpointSaver
from samtune.train.setup import Setup, build_setup
from samtune.train.state import TrainState
from tests.conftest import write_image_folder

SETTINGS = {"model": "tf_efficientnet_lite0", "dataset": "mnist5k", "img_size": 64, "epochs": "1 epochs"}
# Steps whose time a save is compared with: enough that it is written within them.
STEPS = {"tf_efficientnet_lite0": 4, "tf_efficientnet_b7": 1}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=20, help="rounds, and saves in a run that saves after each step")
    parser.add_argument("--no-runs", action="store_true", help="leave out the whole runs")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    given = parser.parse_args()
    result: dict[str, Any] = {"torch": torch.__version__, "repeat": given.repeat, "models": {}}
    with tempfile.TemporaryDirectory(prefix="samtune-saving-") as scratch:
        data = write_image_folder(Path(scratch) / "pets", {"train": 8, "test": 2})
        for model, steps in STEPS.items():
            setup = build_setup(loading.load(None, _settings(model, data)))
            result["device"] = device.describe(setup.device)
            result["models"][model] = two_ways(setup, Path(scratch) / model, steps, given.repeat)
        if not given.no_runs:
            result["runs"] = whole_runs(Path(scratch), given.repeat)
    print(json.dumps(result, indent=2)) if given.json else show(result)


def _settings(model: str, data: Path) -> dict[str, Any]:
    return {"model": model, "dataset": str(data), "pretrained": False, "img_size": 64, "batch_size": 2, "workers": 0}


def two_ways(setup: Setup, folder: Path, steps: int, repeat: int) -> dict[str, float]:
    """Medians of milliseconds, after one round that does not count."""
    images = torch.randn(2, 3, 64, 64, device=setup.device).contiguous(memory_format=torch.channels_last)
    labels = torch.zeros(2, dtype=torch.long, device=setup.device)

    def train() -> None:
        for _ in range(steps):
            setup.update(images, labels)

    seconds: dict[str, list[float]] = {}

    def timed(name: str, function: Callable[[], object], since: float | None = None) -> None:
        began = time.perf_counter() if since is None else since
        function()
        if setup.device.type == "cuda":
            torch.cuda.synchronize(setup.device)
        seconds.setdefault(name, []).append(time.perf_counter() - began)

    train()  # gives the optimizer its state
    log = RunLog.create(folder, "", {}, setup.total_steps)
    state = TrainState()
    with CheckpointSaver(setup, log, None) as saver:

        def save_and_wait() -> None:
            state.step += 1
            whole = checkpointing.content(setup, state)
            saver._write(state.step, None, whole)

        for _ in range(repeat + 1):
            timed("quiet", train)
            began = time.perf_counter()
            timed("same_thread_held", save_and_wait)
            timed("same_thread_steps", train, began)
            state.step += 1
            began = time.perf_counter()
            timed("held", lambda: saver.save(state))
            timed("steps", train, began)
            saver.wait()
            state.step += 1
            began = time.perf_counter()
            saver.save(state)
            timed("on_disk", saver.wait, began)
    log.close()
    median = {name: 1000 * statistics.median(values[1:]) for name, values in seconds.items()}
    first = {name: 1000 * values[0] for name, values in seconds.items()}
    return {
        "same_thread_held_ms": median["same_thread_held"],
        "held_ms": median["held"],
        "held_ratio": median["same_thread_held"] / median["held"],
        "first_held_ms": first["held"],
        "on_disk_ms": median["on_disk"],
        "on_disk_ratio": median["on_disk"] / median["same_thread_held"],
        "steps_ms": median["quiet"],
        "same_thread_lost_ms": median["same_thread_steps"] - median["quiet"],
        "lost_ms": median["steps"] - median["quiet"],
    }


def whole_runs(scratch: Path, repeat: int) -> dict[str, float]:
    """The saver's share of a run, a checkpoint's size, and the time that a resumed run needs."""
    calls: dict[str, list[float]] = {}
    for name in ("save", "wait", "check"):
        _time_calls(name, calls.setdefault(name, []))
    report = loop.run(loading.load(None, SETTINGS | {"output": str(scratch / "run")}))
    assert report is not None
    share, saves = sum(map(sum, calls.values())) / report["train_seconds"], len(calls["save"])
    often = SETTINGS | {"output": str(scratch / "often"), "epochs": f"{repeat} steps"}
    loop.run(loading.load(None, often | {"save_every": "1 steps", "test": False, "model_ema": True}))
    folder = scratch / "often" / "checkpoints" / "last"
    written = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    state = torch.load(folder / "state.pt", weights_only=True)
    momentum = sum(slot["momentum_buffer"].nbytes for slot in state["optimizer"].values())
    weights = sum((folder / name).stat().st_size for name in ("model.safetensors", "ema/model.safetensors"))
    return {
        "share_of_run": share,
        "saves_in_run": saves,
        "train_seconds": report["train_seconds"],
        "checkpoint_bytes": written,
        "over_weights_optimizer_average": written / (weights + momentum),
        "resume_seconds_to_first_step": statistics.median(first_step(scratch / "often") for _ in range(3)),
    }


def _time_calls(name: str, seconds: list[float]) -> None:
    """Add the time of each call of this method from the loop, and not of one method from another."""
    method = getattr(CheckpointSaver, name)

    def timed(self: CheckpointSaver, *arguments: object) -> None:
        began = time.perf_counter()
        method(self, *arguments)
        if sys._getframe(1).f_globals["__name__"] == loop.__name__:
            seconds.append(time.perf_counter() - began)

    setattr(CheckpointSaver, name, timed)


def show(result: dict[str, Any]) -> None:
    print(", ".join(f"{key} {result[key]}" for key in ("device", "torch", "repeat")))
    for model, found in result["models"].items():
        print(f"\n{model}, SGD: a save holds the training up for {found['held_ms']:.0f} ms;", end=" ")
        print(f"on the thread that trains for {found['same_thread_held_ms']:.0f} ms ({found['held_ratio']:.1f} x)")
        print(f"  the first one {found['first_held_ms']:.0f} ms; on disk after {found['on_disk_ms']:.0f} ms", end=" ")
        print(f"({found['on_disk_ratio']:.2f} x)")
        print(f"  lost to steps beside it {found['lost_ms']:.0f} ms, to steps after it", end=" ")
        print(f"{found['same_thread_lost_ms']:.0f} ms; the steps take {found['steps_ms']:.0f} ms")
    if runs := result.get("runs"):
        print(f"\nsaving: {100 * runs['share_of_run']:.2f} % of a run of {runs['train_seconds']:.0f} s", end=" ")
        print(f"({runs['saves_in_run']} saves at the default)")
        print(f"a checkpoint with averaged weights: {runs['checkpoint_bytes'] / 2**20:.1f} MiB,", end=" ")
        print(f"{runs['over_weights_optimizer_average']:.4f} x (weights + optimizer + average)")
        print(f"a resumed run has done its first step after {runs['resume_seconds_to_first_step']:.1f} s")


def first_step(folder: Path) -> float:
    """Seconds from the start of `samtune run --resume` until its first step is done; there it is killed."""
    at_second = json.dumps([{"at": "train step", "call": 2, "do": "SIGKILL"}])
    longer = ["run", "--resume", "--epochs", "1000", "--allow-change", "epochs", "--output", str(folder)]
    command = [sys.executable, "-m", "tests.support.fault_injection", at_second, *longer]
    began = time.perf_counter()
    code = subprocess.run(command, capture_output=True, check=False).returncode
    if code != -9:
        raise RuntimeError(f"the run ended with {code} before its second step")
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
