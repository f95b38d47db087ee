"""What checkpoints cost: time and room of a save, its share of a run, and the time until a resumed run goes on.

    python -m tests.benchmarks.saving

EfficientNet-Lite0 with its ImageNet weights on digits (extra: demo). The share is measured in a real run, at the
default interval: time inside `Saver.save` over the time from the first step to the last.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from samtune.config import loading
from samtune.train import loop
from samtune.train.checkpointing import CheckpointSaver

SETTINGS = {"model": "tf_efficientnet_lite0", "dataset": "mnist5k", "img_size": 64, "epochs": "1 epochs"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=20, help="saves that are timed one by one")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    given = parser.parse_args()
    seconds: list[float] = []
    save = CheckpointSaver.save

    def timed(self: CheckpointSaver, *arguments: object, **named: object) -> None:
        began = time.perf_counter()
        save(self, *arguments, **named)  # type: ignore[arg-type]
        seconds.append(time.perf_counter() - began)

    CheckpointSaver.save = timed  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory(prefix="samtune-saving-") as scratch:
        run = Path(scratch) / "run"
        report = loop.run(loading.load(None, SETTINGS | {"output": str(run)}))
        share = sum(seconds) / report["train_seconds"]
        saves = len(seconds)
        seconds.clear()
        often = SETTINGS | {"output": str(Path(scratch) / "often"), "epochs": f"{given.repeat} steps"}
        loop.run(loading.load(None, often | {"save_every": "1 steps", "test": False, "model_ema": True}))
        folder = Path(scratch) / "often" / "checkpoints" / "last"
        written = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        state = torch.load(folder / "state.pt", weights_only=True)
        momentum = sum(slot["momentum_buffer"].nbytes for slot in state["optimizer"].values())
        weights = sum((folder / name).stat().st_size for name in ("model.safetensors", "ema/model.safetensors"))
        resumed = [first_step(Path(scratch) / "often") for _ in range(3)]
    result = {
        "share_of_run": share,
        "saves_in_run": saves,
        "train_seconds": report["train_seconds"],
        "save_ms": 1000 * statistics.median(seconds),
        "checkpoint_bytes": written,
        "over_weights_optimizer_average": written / (weights + momentum),
        "resume_seconds_to_first_step": statistics.median(resumed),
    }
    if given.json:
        print(json.dumps(result, indent=2))
        return
    print(f"saving: {100 * share:.2f} % of a run of {report['train_seconds']:.0f} s ({saves} saves at the default)")
    print(f"a save with averaged weights: {result['save_ms']:.0f} ms, {written / 2**20:.1f} MiB,", end=" ")
    print(f"{result['over_weights_optimizer_average']:.4f} x (weights + optimizer + average)")
    print(f"a resumed run has done its first step after {result['resume_seconds_to_first_step']:.1f} s")


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
