"""Small runs that break off and go on, through the command line in processes of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.conftest import ROOT

SETTINGS = (
    *("--model", "resnet10t", "--no-pretrained", "--img-size", "32", "--epochs", "3", "--lr", "0.01"),
    *("--batch-size", "8", "--workers", "0", "--model-ema", "--save-every", "2 steps"),
)  # 15 steps, validated after 5, 10 and 15


def run(data: Path, folder: Path, *more: object, faults: list[dict] | None = None, **options):
    """`samtune run` with these settings, in which faults happen (tests/broken.py)."""
    arguments = ["run", *SETTINGS, "--dataset", data, "--output", folder, *more]
    return _call(["-m", "tests.broken", json.dumps(faults or []), *map(str, arguments)], **options)


def resume(folder: Path, *more: object, faults: list[dict] | None = None, **options):
    """`samtune run --resume --output FOLDER`."""
    arguments = ["run", "--resume", "--output", folder, *more]
    return _call(["-m", "tests.broken", json.dumps(faults or []), *map(str, arguments)], **options)


def _call(arguments: list[str], **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | options.pop("env", {}),
        timeout=300,
        check=False,
        **options,
    )


def step_of(folder: Path) -> int:
    """The step of a run's last checkpoint."""
    return int((folder / "checkpoints" / "last").resolve().name.removeprefix("step-"))


def status(folder: Path) -> dict:
    return json.loads((folder / "status.json").read_text())
