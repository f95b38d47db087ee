"""Small runs that break off and go on, through the command line in processes of their own."""

import json
from collections.abc import Sequence
from pathlib import Path

from tests.conftest import samtune

SETTINGS = (
    *("--model", "test_resnet", "--no-pretrained", "--img-size", "32", "--epochs", "3", "--lr", "0.01"),
    *("--batch-size", "8", "--workers", "0", "--model-ema", "--save-every", "2 steps"),
    *("--drop", "0.2"),  # random numbers of the steps, which a resumed run repeats
)  # 15 steps, validated after 5, 10 and 15


def run(data: Path, folder: Path, *more: object, faults: Sequence[dict] = (), **options):
    """`samtune run` with these settings, in which faults happen (tests/support/fault_injection.py)."""
    return samtune("run", *SETTINGS, "--dataset", data, "--output", folder, *more, faults=faults, **options)


def resume(folder: Path, *more: object, faults: Sequence[dict] = (), **options):
    """`samtune run --resume --output FOLDER`."""
    return samtune("run", "--resume", "--output", folder, *more, faults=faults, **options)


def step_of(folder: Path) -> int:
    """The step of a run's last checkpoint."""
    return int((folder / "checkpoints" / "last").resolve().name.removeprefix("step-"))


def status(folder: Path) -> dict:
    return json.loads((folder / "status.json").read_text())
