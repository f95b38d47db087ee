"""What needs a CUDA GPU, in one go: the tests marked gpu, and what a step of a run costs. tests/gpu.sh calls it.

Prints one JSON object to stdout, and all else to stderr. Each part is a process with a time limit: one that fails,
hangs or cannot even begin is an error in the JSON, and the others go on. Exits with 1 if there is no GPU, if a test
failed or none passed, or if a part did.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
SECONDS = 500  # of all parts; the benchmark has what the others leave
GRACE = 10  # seconds from the request to end to the kill
WAITS = "tests/train/test_sync_debug.py"

_ABOUT = """
import importlib.metadata as m, json, platform, sys, torch
names = [n for n in sys.argv[1:] if any(True for d in m.distributions(name=n))]
found = {n: m.version(n) for n in names} | {"python": platform.python_version(), "cuda": torch.version.cuda}
is_there = torch.cuda.is_available()
found["cudnn"] = torch.backends.cudnn.version()
name = torch.cuda.get_device_name(0) if is_there else None
print(json.dumps({"device": name, "versions": found}))
"""
_PACKAGES = (
    *("torch", "torchvision", "timm", "numpy", "datasets", "pydantic", "filelock", "simplejpeg", "pytorch-optimizer"),
    *("triton", "nvidia-ml-py"),
)


def run(command: Sequence[str], seconds: float, stop: signal.Signals) -> tuple[str, str]:
    """Run Python with these arguments; returns its stdout, and what went wrong, or "".

    After so many seconds it gets the signal, to end by itself with what it has.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a job in the background ignores, with its children
    with tempfile.TemporaryFile("w+", encoding="utf-8") as out:
        # A session of its own, so that what it started ends with it.
        process = subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=out, start_new_session=True)
        error = ""
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            error = f"ended after {seconds:.0f} s"
            process.send_signal(stop)
            try:
                code = process.wait(GRACE)
            except subprocess.TimeoutExpired:
                code = -signal.SIGKILL
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        out.seek(0)
        return out.read(), error or (f"exit code {code}" if code else "")


def run_tests(arguments: Sequence[str], seconds: float) -> dict[str, Any]:
    """Counts of the tests that pytest runs, names and reasons of the failures, and the error of the part, or None."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "junit.xml"
        # Warnings are no errors: the libraries' versions are not those that the tests are kept free of warnings with.
        options = ["-n", "0", "-m", "gpu", "-W", "default", "-p", "no:cacheprovider", f"--junitxml={file}"]
        options.append("--continue-on-collection-errors")
        said, error = run(["-m", "pytest", *options, *arguments], seconds, signal.SIGINT)
        print(said, file=sys.stderr)
        if not file.exists():
            last = said.strip().splitlines()[-1:]
            return {"error": f"{error or 'no result'}: {''.join(last)}"}
        cases = list(ET.parse(file).iter("testcase"))
    bad = [(case, child) for case in cases for child in case if child.tag in ("failure", "error")]
    skipped = sum(case.find("skipped") is not None for case in cases)
    return {
        "passed": sum(all(child.tag not in ("failure", "error", "skipped") for child in case) for case in cases),
        "failed": len({id(case) for case, _ in bad}),
        "skipped": skipped,
        "failures": {
            f"{case.get('classname')}::{case.get('name')}": f"{child.get('message')}"[:300]
            + f" ... {child.text}"[-300:]
            for case, child in bad
        },
        "error": None if error in ("", "exit code 1") else error,  # 1: some tests failed
    }


def run_json(command: Sequence[str], seconds: float) -> dict[str, Any]:
    """The JSON object that a command prints; {"error": reason} without one."""
    said, error = run(command, seconds, signal.SIGTERM)
    try:
        result: dict[str, Any] = json.loads(said)
    except ValueError:
        return {"error": error or f"no JSON: {said[-200:]!r}"}
    return result | ({"error": error} if error else {})


def marked() -> list[str]:
    """The files that have tests marked gpu: others may import what a machine with a GPU lacks."""
    files = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("tests/**/test_*.py"))
    return [file for file in files if "mark.gpu" in (ROOT / file).read_text(encoding="utf-8")]


def is_good(report: dict[str, Any]) -> bool:
    """Whether every part has run, and all tests passed."""
    parts = [report[name] for name in ("sync_debug", "tests", "benchmark")]
    tests = parts[:2]
    return not any(part.get("error") for part in parts) and all(
        part["failed"] == 0 and part["passed"] > 0 for part in tests
    )


def main() -> int:
    """Run all parts, print the report, return the exit code."""
    started = time.monotonic()
    report = run_json(["-c", _ABOUT, *_PACKAGES], 60)
    if report.get("device") is None:
        report.setdefault("error", "no GPU: torch.cuda.is_available() is false")
        print(json.dumps(report, indent=2))
        return 1
    report["sync_debug"] = run_tests([WAITS], 80)
    report["tests"] = run_tests([file for file in marked() if file != WAITS], 140)
    left = SECONDS - (time.monotonic() - started)
    benchmark = ["-m", "tests.benchmarks.run_step", "--json", "--minutes", str((left - 25) / 60)]
    report["benchmark"] = run_json(benchmark, left)
    report["seconds"] = time.monotonic() - started
    print(json.dumps(report, indent=2))
    return 0 if is_good(report) else 1


if __name__ == "__main__":
    sys.exit(main())
