"""What samtune says of itself: help on one screen, the first words to a newcomer, and what a shell completes."""

import os
import pty
import subprocess
import sys

import pytest
import timm

from samtune.cli.completion import datasets, models, recipes, runs
from samtune.cli.main import _Samtune
from samtune.data.catalog import CATALOG
from tests.conftest import ROOT, samtune, write_image_folder

COMMANDS = {name: about for commands in _Samtune.topics.values() for name, about in commands.items()}


def test_help_lists_every_command_with_its_line():
    said = " ".join(samtune("--help", env={"COLUMNS": "120"}).stdout.split())
    for name, (_, _, line) in COMMANDS.items():
        assert f" {name} {line}" in said


def test_the_help_of_a_run_shows_on_one_screen_what_people_set_and_all_of_it_when_asked():
    short = samtune("run", "--help", env={"COLUMNS": "80"}).stdout
    assert len(short.splitlines()) <= 60
    shown = {word for word in short.split() if word.startswith("--")} - {"--help", "--help-all", "--json"}
    for flag in ("--model", "--dataset", "--rho", "--epochs", "--batch-size", "--lr", "--resume", "--output"):
        assert flag in shown
    assert "--ascent-steps" not in short
    assert "more options" in short
    whole = samtune("run", "--help-all", env={"COLUMNS": "80"}).stdout
    assert "--ascent-steps" in whole
    assert "more options" not in whole


@pytest.mark.parametrize("columns", [60, 80])
def test_lines_of_help_break_at_spaces_and_fit_the_terminal(columns):
    lines = samtune("sweep", "--help-all", env={"COLUMNS": str(columns)}).stdout.splitlines()
    assert max(map(len, lines)) <= columns
    words = set(samtune("sweep", "--help-all", env={"COLUMNS": "120"}).stdout.split())
    assert {word for line in lines for word in line.split()} == words


@pytest.mark.parametrize(
    ("typed", "meant"), [("rnu", "run"), ("reprot", "report"), ("swep", "sweep"), ("dataset", "datasets")]
)
def test_a_misspelt_command_names_the_nearest(typed, meant):
    done = samtune(typed)
    assert done.returncode == 2
    assert f"Did you mean {meant}?" in done.stderr


def test_samtune_alone_says_what_to_begin_with_and_where_one_is(tmp_path):
    write_image_folder(tmp_path / "photos", {"train": 2})
    said = samtune(cwd=tmp_path)
    assert said.returncode == 0
    assert "samtune run" in said.stdout
    assert "no runs here yet" in said.stdout
    assert "--dataset photos" in " ".join(said.stdout.split())
    stopped = tmp_path / "runs" / "r1"
    stopped.mkdir(parents=True)
    (stopped / "status.json").write_text('{"state": "stopped", "exit_code": 75, "step": 3, "total_steps": 9}')
    said = " ".join(samtune(cwd=tmp_path).stdout.split())
    assert "1 stopped" in said
    assert "samtune run --resume --output runs/r1" in said


def test_a_run_without_settings_says_on_a_terminal_what_works_here(tmp_path):
    write_image_folder(tmp_path / "photos", {"train": 2})
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "samtune", "run"]
    env = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "400"}
    done = subprocess.run(command, stderr=theirs, cwd=tmp_path, env=env, check=False)
    said = os.read(ours, 10_000).decode()
    assert done.returncode == 2
    assert "--dataset photos" in said
    assert "no model is given" in samtune("run", cwd=tmp_path).stderr  # a script is told what it lacks


def test_models_are_completed_as_timm_has_them_without_importing_it():
    for beginning in ("efficientnet_b", "resnet1", "vit_tiny"):
        assert models(beginning) == sorted(name for name in timm.list_models() if name.startswith(beginning))
    assert models("resnet18.") == sorted(timm.list_pretrained("resnet18.*"))
    code = "import sys; from samtune.cli.completion import models; models('r'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_data_sets_recipes_and_runs_are_completed_by_name_and_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for run in ("runs/a1", "runs/b2"):
        (tmp_path / run).mkdir(parents=True)
        (tmp_path / run / "status.json").touch()
    (tmp_path / "flowers").mkdir()
    (tmp_path / "flowers.csv").touch()
    (tmp_path / "mine.toml").touch()
    (tmp_path / ".hidden").mkdir()
    assert datasets("flow") == [*(name for name in CATALOG if name.startswith("flow")), "flowers/", "flowers.csv"]
    assert recipes("mine") == ["mine.toml"]
    assert recipes("mini/") == [f"mini/{path.stem}" for path in sorted((ROOT / "recipes" / "mini").glob("*.toml"))]
    assert runs("a") == ["runs/a1"]
    assert runs("runs/") == ["runs/a1", "runs/b2"]
    assert "runs/a1" in runs("")
    assert not any("hidden" in path for path in runs(""))


def test_a_shell_gets_its_completions_from_the_command(tmp_path):
    def complete(line: str) -> list[str]:
        asked = {"_SAMTUNE_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(line.count(" "))}
        return samtune(env=asked, cwd=tmp_path).stdout.split()

    assert complete("samtune re") == ["recipes", "report", "relabel"]
    assert complete("samtune run --model efficientnet_b7") == ["efficientnet_b7"]
    assert "flowers102" in complete("samtune run --dataset flow")
    assert "--rho" in complete("samtune run --rh")
