"""Small sweeps through the command line, and what they have come to."""

import json
import re
import sys
from pathlib import Path

from tests.conftest import samtune
from tests.support.fingerprint import fingerprint

RECIPE = """
model = "test_resnet"
pretrained = false
dataset = "{data}"
img_size = 32
epochs = "4 steps"
batch_size = 8
lr = 0.01
workers = 0
save_every = "1 steps"

[sweep]
seeds = {seeds}
arms = {arms}
{more}

[sweep.grid]
{grid}
"""


def write_recipe(path: Path, data: Path, *, seeds=1, arms=("sam", "sgd"), grid="rho = [0.05, 0.1]", more="") -> Path:
    path.write_text(RECIPE.format(data=data, seeds=seeds, arms=json.dumps(arms), grid=grid, more=more))
    return path


def command(recipe: Path, folder: Path, *more: object, faults: list[dict] | None = None) -> list[str]:
    """`samtune sweep`, in whose runs faults happen (tests/support/fault_injection.py)."""
    arguments = ["sweep", recipe, "--output", folder, *more]
    return [sys.executable, "-m", "tests.support.fault_injection", json.dumps(faults or []), *map(str, arguments)]


def sweep(recipe: Path, folder: Path, *more: object, faults: list[dict] | None = None, env: dict | None = None):
    return samtune("sweep", recipe, "--output", folder, *more, faults=faults or (), env=env)


def results(folder: Path) -> dict[str, object]:
    """What each run has come to, to the last bit, without its times."""
    found: dict[str, object] = {}
    for run in sorted((folder / "runs").iterdir()):
        if run.name.startswith("final"):
            found[run.name] = fingerprint(run)
        else:
            report = json.loads((run / "report.json").read_text())
            found[run.name] = [report[key] for key in ("val", "test", "steps")]
    return found


def attempts(folder: Path) -> dict[str, int]:
    """How often each run was begun or went on."""
    logs = (folder / "logs").glob("*/output.txt")
    return {log.parent.name: len(re.findall(r"^\S+Z  .* run ", log.read_text(), re.MULTILINE)) for log in logs}
