"""What README, guide and recipes say is what the program does."""

import re
import shlex
import subprocess

import pytest
import torch
import torch.nn.functional as F

from samtune.cli.main import app
from samtune.config.run_config import RunConfig, flag_name
from samtune.runs.resume import resolve_resume
from tests.conftest import ROOT, SmallNet, samtune, write_image_folder

README = (ROOT / "README.md").read_text()
RECIPES = sorted((ROOT / "recipes").rglob("*.toml"))
SCRIPTS = sorted((ROOT / "recipes").rglob("*.sbatch"))
GUIDE = sorted((ROOT / "samtune" / "guide").glob("*.md"))
PAGES = (ROOT / "README.md", ROOT / "recipes" / "README.md", *GUIDE, *RECIPES, *SCRIPTS)
COMMAND = {".md": r"^(samtune .+)$", ".toml": r"^#     (samtune .+)$", ".sbatch": r"^[^#\n]*?(samtune [a-z]+ .+)$"}
COMMANDS = [
    command
    for page in PAGES
    for command in re.findall(COMMAND[page.suffix], page.read_text().replace("\\\n", " "), re.M)
]
EXAMPLES = {path.stem: re.findall(r"```python\n(.+?)```", path.read_text(), re.S) for path in PAGES[:1] + tuple(GUIDE)}
RUN, CHECKPOINT, *LOOPS = EXAMPLES["python"]


class Parsed(Exception):
    """The command line was understood and the work would begin."""


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_in_readme_guide_and_recipes_parses(command, monkeypatch):
    def begin(*_, **__):
        raise Parsed

    def begin_where_no_run_is(recipe, flags, allow_change):
        return resolve_resume(recipe, flags, allow_change) if recipe else begin()

    works = (
        *("train.loop.run", "train.dispatch._launch", "train.eval_checkpoint.evaluate_checkpoint", "plan.plan.plan"),
        *("distributed.launch.launch", "export.export.export", "data.inputs.find", "data.check.check.check"),
        *("data.describe.describe", "runs.listing.list_runs", "report.comparison.compare", "sweep.run.check"),
        *("train.bootstrap.run", "train.relabel.relabel", "sharpness.run.measure_or_launch"),
        *("report.run_page.write_report_page", "doctor.checks.run_all", "models.listing.describe"),
        *("models.listing.rows", "config.shipped_recipes.Recipe.about", "config.shipped_recipes.get"),
        *("cli.recipes._check", "console.print_markdown"),
    )
    for work in works:
        monkeypatch.setattr(f"samtune.{work}", begin)
    monkeypatch.setattr("samtune.train.dispatch.resolve_resume", begin_where_no_run_is)
    for check in ("train.preflight.check_before_slow_work", "train.preflight.check_inputs", "data.source.locate"):
        monkeypatch.setattr(f"samtune.{check}", lambda *_: None)
    monkeypatch.chdir(ROOT)
    words = shlex.split(command.split(">")[0], comments=True)
    with pytest.raises(Parsed):
        app(words[1:], standalone_mode=False)


def test_there_are_commands_to_check():
    assert len(COMMANDS) >= 6 + len(RECIPES) + len(SCRIPTS)


def test_no_page_has_a_gap_to_be_filled_in():
    for page in PAGES:
        assert "@@" not in page.read_text()


def test_the_front_page_is_short_and_its_links_lead_somewhere():
    assert len(README.splitlines()) <= 200
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", README):
        path, _, anchor = target.partition("#")
        assert (ROOT / path).is_file(), target
        headings = re.findall(r"^#+ (.+)$", (ROOT / path).read_text(), re.M) if anchor else []
        assert not anchor or anchor in [re.sub(r"[^\w -]", "", each).lower().replace(" ", "-") for each in headings]
    assert (ROOT / "recipes" / "report.png").stat().st_size < 150_000


def test_files_that_the_guide_names_exist():
    for page in GUIDE:
        for name in re.findall(r"(?:samtune|tests|recipes)(?:/[\w-]+)*/[\w-]+\.\w+", page.read_text()):
            assert (ROOT / name).is_file(), f"{page.name}: {name}"


def test_options_in_readme_and_guide_exist():
    known = {flag_name(key) for key in RunConfig.model_fields}
    known |= {flag_name(f"no_{key}") for key, field in RunConfig.model_fields.items() if field.annotation is bool}
    known |= {"--seeds", "--budget", "--jobs", "--engine", "--address", "--dry-run", "--all", "--force"}
    known |= {"--json", "--resume", "--allow-change", "--split", "--ema", "--help"}
    known |= {"--kills", "--repeat", "--repo-type", "--signal", "--without-pip", "--python"}  # of other programs
    known |= {"--to", "--with-preprocessing", "--top", "--tta", "--embeddings", "--temperature", "--watch"}
    known |= {"--help-all", "--install-completion", "--probabilities"}
    known |= {"--checkpoint", "--density", "--slices", "--direction-to", "--max-images", "--restarts", "--probes"}
    known |= {"--lanczos-steps", "--params", "--ascent-steps"}
    known |= {"--logdir"}  # of TensorBoard
    for page in (ROOT / "README.md", *GUIDE):
        assert set(re.findall(r"(?<![\w-])--[a-z][a-z\d-]+", page.read_text())) <= known, page


def test_continuous_integration_runs_the_readmes_test_command():
    found = subprocess.run(
        ["grep", "-m", "1", "--", "-m pytest$", ROOT / "README.md"], capture_output=True, text=True, check=True
    )
    assert found.stdout.strip().endswith(".venv/bin/python -m pytest")
    assert "grep -m 1 -- '-m pytest$' README.md" in (ROOT / ".ci" / "run").read_text()


def test_continuous_integration_runs_every_lane_and_the_readme_names_them():
    script = (ROOT / ".ci" / "run").read_text().splitlines()
    assert "set -euo pipefail" in script  # each step fails loudly
    for lane in ("fault", "slow", "browser", "fakecuda"):
        assert f".venv/bin/python -m pytest -m {lane}" in script
        assert f"`-m {lane}`" in README


def test_the_python_example_of_runs_in_the_guide_runs(tmp_path, monkeypatch):
    write_image_folder(tmp_path / "path/to/photos", {"train": 12, "test": 4})
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(RUN, names)
    assert names["scores"]["n"] == names["report"]["dataset"]["val"]
    (prediction,) = names["predictor"](["path/to/photos/test/cat/0.png"])
    assert prediction.class_name in ("cat", "dog")


def test_the_python_example_in_the_guide_runs_on_a_checkpoint(tmp_path, monkeypatch):
    data = write_image_folder(tmp_path / "data", {"train": 6})
    small = ["--model", "resnet10t", "--no-pretrained", "--img-size", 32, "--epochs", 1]
    assert samtune("run", *small, "--dataset", data, "--output", tmp_path / "runs" / "r1").returncode == 0
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(CHECKPOINT, names)
    assert names["classes"] == ["cat", "dog"]
    assert names["config"]["input_size"][1] == 32


def test_every_python_block_is_run_by_a_test():
    assert {page for page, blocks in EXAMPLES.items() if blocks} == {"README", "python", "sharpness"}
    assert EXAMPLES["README"] == LOOPS[:1]
    assert len(LOOPS) == 4
    assert all("sam.backward(" in loop for loop in LOOPS)


def test_the_python_example_of_sharpness_in_the_guide_runs():
    torch.manual_seed(0)
    (example,) = EXAMPLES["sharpness"]
    names = {"model": SmallNet(), "images": torch.randn(8, 3, 6, 6), "labels": torch.arange(8) % 3, "F": F}
    exec(example, names)
    assert names["largest"].values == sorted(names["largest"].values, reverse=True)
    assert len(names["density"].nodes) == 2
    assert names["rise"] > 0


def test_the_loops_in_the_guide_train(tmp_path):
    """One after the other, as they stand there, on a small net."""
    torch.manual_seed(0)
    model = SmallNet()
    batch = torch.randn(8, 3, 6, 6), torch.arange(8) % 3
    names = {"model": model, "loader": [batch] * 4, "device": "cpu"}
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        for loop in LOOPS:
            before = [w.detach().clone() for w in model.parameters()]
            exec(loop, names)
            assert any(not torch.equal(w, b) for w, b in zip(model.parameters(), before, strict=True))
    finally:
        torch.distributed.destroy_process_group()
