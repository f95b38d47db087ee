"""What `samtune plan` says of a run's time, against the run: python -m tests.benchmarks.plan_accuracy

Of each setting first the plan, then the run, as commands with a cache of their own, so that the run has all images to
decode. Two times are compared: that of the whole command, as a clock beside it shows it, and train_seconds of the
report. Another load on the machine slows the one and not the other: it should have none. Takes about five minutes, and
so much more with --repeat.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.conftest import SHARED_DATA

# Name, and the settings; each takes about a minute on two cores.
SETTINGS = {
    "lite0, 64 px": ("--model", "tf_efficientnet_lite0", "--dataset", "mnist5k", "--img-size", 64, "--epochs", 1),
    "lite0, 128 px": (
        *("--model", "tf_efficientnet_lite0", "--dataset", SHARED_DATA / "pets_3breeds", "--img-size", 128),
        *("--epochs", 6),
    ),
    "resnet10t, 32 px": (
        *("--model", "resnet10t", "--no-pretrained", "--dataset", "mnist5k", "--img-size", 32),
        *("--batch-size", 32, "--epochs", 20, "--sam-start", "50%"),
    ),
}


def command(*arguments: object, cache: Path) -> tuple[dict[str, Any], float]:
    """What a command of samtune prints with --json, and the seconds that it took."""
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "samtune", *map(str, arguments), "--json"],
        capture_output=True,
        text=True,
        env=os.environ | {"SAMTUNE_CACHE": str(cache)},
        check=False,
    )
    if done.returncode != 0:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout), time.perf_counter() - started


def compare(name: str) -> dict[str, Any]:
    """Plan and run of one setting."""
    with tempfile.TemporaryDirectory() as folder:
        cache, output = Path(folder) / "cache", Path(folder) / "run"
        plan, plan_seconds = command("plan", *SETTINGS[name], cache=cache)
        run, seconds = command("run", *SETTINGS[name], "--output", output, cache=cache)
    estimate = plan["time"]
    return {
        "setting": name,
        "plan_took": plan_seconds,
        "estimate": estimate["total"],
        "truth": seconds,
        "ratio": estimate["total"] / seconds,
        "train_estimate": estimate["train_seconds"],
        "train_truth": run["train_seconds"],
        "train_ratio": estimate["train_seconds"] / run["train_seconds"],
        "time": estimate,
        "step": plan["step"],
        "images_per_second": run["images_per_second"],
        "steps": run["steps"],
    }


def main() -> None:
    """Compare and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=1, help="so often")
    parser.add_argument("--only", choices=SETTINGS, action="append", help="one setting; repeatable")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows = []
    for _ in range(options.repeat):
        for name in options.only or SETTINGS:
            row = compare(name)
            rows.append(row)
            print(
                f"{name:<18} whole {row['estimate']:6.1f} s of {row['truth']:6.1f} s: ratio {row['ratio']:.3f}   "
                f"train_seconds {row['train_estimate']:6.1f} of {row['train_truth']:6.1f}: {row['train_ratio']:.3f}   "
                f"(the plan took {row['plan_took']:.0f} s)",
                file=sys.stderr if options.json else sys.stdout,
                flush=True,
            )
    if options.json:
        print(json.dumps({"machine": f"{platform.machine()}, {os.cpu_count()} cores", "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
