"""Kills a small real run at random moments, lets it go on each time, and compares its end with an uninterrupted run.

    python -m tests.benchmarks.soak --kills 30

EfficientNet-Lite0 with its ImageNet weights on digits (extra: demo), with averaged weights, saved every five steps. A
run that comes to its end before all kills are used is compared, and another one begins. Exit code 1 if a bit differs.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.support.fingerprint import fingerprint

RUN = (
    *("run", "--model", "tf_efficientnet_lite0", "--dataset", "mnist5k", "--img-size", "64", "--model-ema"),
    *("--max-train", "1000", "--max-eval", "100", "--epochs", "5", "--save-every", "5 steps", "--resume"),
)


def start(folder: Path, said: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "samtune", *RUN, "--output", str(folder)]
    with said.open("wb") as file:
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=file, start_new_session=True)


def moment(folder: Path, said: Path) -> str:
    """What the kill hit."""
    if any((folder / "checkpoints").glob(".*.part")):
        return "inside a save"
    return "in training, validation or test" if "output " in said.read_text() else "before the run folder was opened"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    given = parser.parse_args()
    draw = random.Random(given.seed)
    with tempfile.TemporaryDirectory(prefix="samtune-soak-") as scratch:
        whole = Path(scratch) / "whole"
        began = time.monotonic()
        if start(whole, Path(scratch) / "whole.txt").wait():
            sys.exit((Path(scratch) / "whole.txt").read_text())
        seconds = time.monotonic() - began
        expected = fingerprint(whole)
        print(f"the uninterrupted run took {seconds:.0f} s", file=sys.stderr)
        kills: dict[str, int] = {}
        equal: list[bool] = []
        while sum(kills.values()) < given.kills or not equal:
            folder, said = Path(scratch) / f"run{len(equal)}", Path(scratch) / "said.txt"
            while True:
                process = start(folder, said)
                left = given.kills - sum(kills.values())
                try:
                    # The later the first checkpoint, the longer a life has to be for the run to come to an end.
                    code = process.wait(timeout=draw.uniform(0, seconds / 4) if left > 0 else None)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
                    hit = moment(folder, said)
                    kills[hit] = kills.get(hit, 0) + 1
                    print(f"kill {sum(kills.values())}: {hit}", file=sys.stderr)
                    continue
                if code:
                    sys.exit(said.read_text())
                break
            found = fingerprint(folder)
            equal.append(found == expected)
            different = [key for key in expected if found.get(key) != expected[key]]
            print(f"run {len(equal)} is done: {different or 'equal'}", file=sys.stderr)
    result = {"kills": sum(kills.values()), "hit": kills, "runs": len(equal), "equal": sum(equal)}
    if given.json:
        print(json.dumps(result, indent=2))
    else:
        where = ", ".join(f"{count} {hit}" for hit, count in sorted(kills.items()))
        print(f"{result['kills']} kills ({where}); {result['equal']} of {result['runs']} runs equal, bit for bit")
    sys.exit(0 if all(equal) else 1)


if __name__ == "__main__":
    main()
