"""samtune from Python: the runs, scores and errors of the command line."""

import json
from pathlib import Path

import pytest

import samtune
from samtune.errors import DataError, UsageError
from tests.conftest import samtune as command
from tests.conftest import write_image_folder

SMALL = {"model": "test_resnet", "pretrained": False, "img_size": 32, "workers": 0, "epochs": 1, "batch_size": 8}


@pytest.fixture
def data(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return write_image_folder(tmp_path / "data", {"train": 12, "test": 4})


def test_a_run_from_python_is_that_of_the_command(data):
    report = samtune.run(dataset=data, output=Path("r1"), **SMALL)
    command("run", "--dataset", data, "--model", "test_resnet", "--no-pretrained", "--img-size", 32, "--workers", 0,
            "--epochs", 1, "--batch-size", 8, "--output", "r2", cwd=data.parent)  # fmt: skip
    assert report["folder"] == "r1"
    written = [json.loads(Path(folder, "report.json").read_text()) for folder in ("r1", "r2")]
    assert written[0]["test"] == written[1]["test"] == report["test"]
    assert Path("r1/config.toml").read_text() == Path("r2/config.toml").read_text().replace("r2", "r1")
    assert f"{report['test']['wrong']} of 8 wrong" in report._repr_html_()


def test_an_evaluation_from_python_is_that_of_the_command(data):
    report = samtune.run(dataset=data, output="r", **SMALL)
    scores = samtune.evaluate("r")
    assert {key: report["test"][key] for key in ("n", "wrong", "loss")} == {
        k: scores[k] for k in ("n", "wrong", "loss")
    }
    assert scores == json.loads(command("eval", "r", "--json", cwd=data.parent).stdout)
    assert samtune.evaluate(Path("r"), split="val")["n"] == report["dataset"]["val"]
    assert f"{scores['top1_error']:.2f} %" in scores._repr_html_()


@pytest.mark.slow
def test_a_run_on_ranks_gives_the_same_report_from_python(data):
    report = samtune.run(dataset=data, output="r", processes=2, **SMALL | {"batch_size": 4})
    assert report["world_size"] == 2
    assert report["folder"] == "r"
    assert samtune.evaluate("r", processes=2)["wrong"] == report["test"]["wrong"]


@pytest.mark.slow
def test_a_list_of_trackers_reaches_the_ranks(data):
    samtune.run(dataset=data, output="r", processes=2, track=["tensorboard"], **SMALL | {"batch_size": 4})
    assert 'track = "tensorboard"' in Path("r/config.toml").read_text()


def test_a_recipe_that_comes_with_samtune_is_found_by_its_name(data):
    with pytest.raises(UsageError, match="nearest: demo"):
        samtune.run("demoo")
    report = samtune.run("quick/pets", dataset=data, output="r", **SMALL)
    assert report["dataset"]["classes"] == 2
    assert 'model = "test_resnet"' in Path("r/config.toml").read_text()


def test_a_notebook_shows_progress_as_one_line_and_the_report_as_a_table(data):
    """In a kernel of its own, as a notebook has it."""
    import nbformat
    from nbclient import NotebookClient

    call = f"samtune.run(dataset={str(data)!r}, output='r', **{SMALL | {'epochs': 3}})"
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(f"import samtune\n{call}")])
    NotebookClient(notebook, timeout=100, resources={"metadata": {"path": str(data.parent)}}).execute()
    shown = [output["data"] for output in notebook.cells[0].outputs if "data" in output]
    steps = [each["text/plain"] for each in shown if each["text/plain"].startswith("step ")]
    assert len(steps) == 1, steps
    done = json.loads(Path("r/status.json").read_text())["total_steps"]
    assert f"{done}/{done}" in steps[0]
    assert "\n" not in steps[0]
    assert "of 8 wrong" in shown[-1]["text/html"]


@pytest.mark.parametrize(
    ("settings", "error", "said"),
    [
        ({"rhoo": 0.05}, UsageError, "did you mean rho"),
        ({"rho": -1}, UsageError, "greater than or equal to 0"),
        ({"dataset": "nowhere/at/all"}, DataError, "is not there"),
        ({"recipe": "nowhere.toml"}, UsageError, "nowhere.toml"),
    ],
)
def test_what_cannot_be_meant_raises_the_errors_of_the_command(data, settings, error, said):
    with pytest.raises(error) as raised:
        samtune.run(**{"dataset": str(data)} | SMALL | settings)
    assert said in str(raised.value)
    assert not Path("runs").exists()


def test_settings_of_other_data_need_it(data):
    samtune.run(dataset=data, output="r", **SMALL)
    with pytest.raises(UsageError, match="without --dataset"):
        samtune.evaluate("r", label_key="species")


def test_the_package_shows_its_names_and_no_others():
    assert callable(samtune.run)
    assert {"SAM", "Predictor", "evaluate", "run"} <= set(dir(samtune))
    assert callable(samtune.evaluate)
    with pytest.raises(AttributeError):
        _ = samtune.train_everything
