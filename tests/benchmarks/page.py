"""What the page of a run costs: python -m tests.benchmarks.page RUN [--json]

The page of a finished run is drawn in a process that has loaded what a run has loaded, and has its data set open, as at
the end of `samtune run`: once with the libraries that draw still to be loaded, then a few times without. Beside it the
whole command `samtune report RUN`, with everything it loads, as often. Seconds of wall clock, and of the processor.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import samtune.train.loop  # noqa: F401 - what a run has loaded
from samtune.config import loading
from samtune.data.thumbnails import open_splits
from samtune.report import run_report


def _draw(folder: Path, page: Path, result: dict, opened: dict) -> dict[str, float]:
    began, used = time.perf_counter(), time.process_time()
    from samtune.report import run_page

    run_page.write(page, folder, result, opened)
    return {"seconds": time.perf_counter() - began, "processor": time.process_time() - used}


def _report(folder: Path, output: Path) -> dict[str, float]:
    began, used = time.perf_counter(), os.times()
    command = [sys.executable, "-m", "samtune", "report", str(folder), "--output", str(output)]
    subprocess.run(command, check=True, capture_output=True)
    now = os.times()
    processor = now.children_user - used.children_user + now.children_system - used.children_system
    return {"seconds": time.perf_counter() - began, "processor": processor}


def measure(folder: Path, times: int) -> dict[str, dict[str, float]]:
    """Seconds of each part; medians where there are several."""
    output = Path(tempfile.mkdtemp(prefix="samtune-page-"))
    try:
        result, opened = run_report.rebuild(folder), open_splits(loading.load(folder / "config.toml"))
        drawn = [_draw(folder, output / "report.html", result, opened) for _ in range(times + 1)]
        reported = [_report(folder, output) for _ in range(times)]
    finally:
        shutil.rmtree(output)
    median = {
        name: {key: statistics.median(one[key] for one in several) for key in several[0]}
        for name, several in (("again", drawn[1:]), ("report", reported))
    }
    return {"at the end of a run": drawn[0], **median}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    found = measure(given.run, given.times)
    if given.json:
        print(json.dumps(found, indent=2))
    else:
        for name, one in found.items():
            print(f"{name:<20}  {one['seconds']:6.2f} s, of the processor {one['processor']:.2f} s")


if __name__ == "__main__":
    main()
