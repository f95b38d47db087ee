"""Arguments: help for all of them, and one clear line for those that cannot be meant."""

import importlib.metadata
import subprocess
import sys

import pytest

from samtune.cli import main
from samtune.config.run_config import RunConfig, flag_name
from tests.conftest import samtune, write_image_folder

LITE0 = "tf_efficientnet_lite0"


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("--model", "efficientnet_b77", "--dataset", "{data}"), 4, "efficientnet_b7"),
        (("--model", LITE0, "--dataset", "{data}", "--rho", "-1"), 2, "greater than or equal to 0"),
        (("--model", LITE0, "--dataset", "{data}", "--epochs", "0"), 2, "more than 0 epochs"),
        (("--model", LITE0, "--dataset", "{data}", "--bath-size", "3"), 2, "--batch-size"),
        (("--model", LITE0, "--dataset", "{data}", "--rho", "small"), 2, "valid"),
        (("--model", LITE0, "--dataset", "./nowhere"), 3, "is not there"),
        (("--model", LITE0, "--dataset", "flower102"), 3, "flowers102"),
        (("--model", LITE0, "--dataset", "flowers102"), 4, "dpdl-benchmark/oxford_flowers102"),
        (("--model", "efficientnet_b7", "--dataset", "{data}"), 4, "timm/tf_efficientnet_b7.ra_in1k"),
        (("--model", LITE0, "--dataset", "{data}", "--weights", "nowhere.pth"), 5, "nowhere.pth"),
        (("--model", LITE0, "--dataset", "{data}", "--output", "{data}"), 2, "the folder of the data set"),
        (("--model", LITE0, "--dataset", "{data}", "--output", "/proc/run"), 8, "--output"),
        (("--model", LITE0, "--dataset", "{data}", "--train-labels", "nowhere.csv"), 3, "nowhere.csv"),
        (("--model", LITE0, "--dataset", "{data}", "--train-labels", "x.csv", "--label-noise", "0.1"), 2, "contradict"),
        (("--model", LITE0, "--dataset", "{data}", "--label-noise", "20"), 2, "less than or equal to 1"),
        (("nowhere.toml",), 2, "nowhere.toml"),
        (("--model", LITE0), 2, "--dataset"),
    ],
)
def test_what_cannot_be_meant_ends_with_its_code_the_reason_and_the_mend(tmp_path, arguments, code, said):
    data = write_image_folder(tmp_path / "data", {"train": 3})
    done = samtune("run", *(a.format(data=data) for a in arguments))
    assert done.returncode == code
    assert said in done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    errors = done.stderr[done.stderr.index("error:") :].splitlines()
    assert len(errors) <= 3
    assert any("hint:" in line for line in errors)


def test_every_setting_is_a_flag_with_help():
    help_text = samtune("run", "--help-all", env={"COLUMNS": "200"}).stdout
    for key, field in RunConfig.model_fields.items():
        assert flag_name(key) in help_text
        assert field.description
        assert field.description.split()[0] in help_text
        if field.annotation is bool:
            assert flag_name("no_" + key) in help_text
    assert "Default: 0.05" in help_text


@pytest.mark.parametrize(
    "command",
    [
        *("run", "sweep", "eval", "data", "data check", "datasets", "datasets show", "runs", "report", "doctor"),
        *("models", "recipes", "recipes ls", "recipes show", "recipes cp", "recipes validate"),
    ],
)
def test_every_command_has_an_example(command):
    assert f"Example: samtune {command}" in samtune(*command.split(), "--help", env={"COLUMNS": "200"}).stdout


@pytest.mark.parametrize("command", ["run", "sweep", "data check", "runs", "report", "doctor", "models", "recipes ls"])
def test_help_loads_nothing_heavy(command):
    check = (
        f"import sys; from samtune.cli.main import _call; _call({[*command.split(), '--help']});"
        "heavy = {'torch', 'timm', 'datasets', 'scipy', 'pyarrow', 'PIL', 'numpy', 'imagehash'} & set(sys.modules);"
        "heavy |= {'matplotlib', 'jinja2'} & set(sys.modules);"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_wrong_arguments_are_refused_before_anything_heavy_is_loaded(tmp_path):
    check = (
        "import sys; sys.argv[1:] = ['run', '--model', 'x', '--dataset', './nowhere'];"
        "from samtune.cli.main import _exit_code; code = _exit_code();"
        "heavy = {'torch', 'timm'} & set(sys.modules); sys.exit(str(heavy) if heavy else code)"
    )
    assert subprocess.run([sys.executable, "-c", check], capture_output=True, check=False).returncode == 3


def test_ctrl_c_is_answered_in_words(monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("samtune.runs.listing.list_runs", interrupted)
    monkeypatch.setattr(sys, "argv", ["samtune", "runs"])
    assert main._exit_code() == 130
    assert capsys.readouterr().err == "error: stopped by Ctrl-C\n"


def test_the_version_is_the_packages():
    assert samtune("--version").stdout == f"samtune {importlib.metadata.version('samtune')}\n"


@pytest.mark.parametrize("env", [{"TERM": "dumb"}, {"COLUMNS": "20"}, {"LANG": "C", "LC_ALL": "C"}, {"NO_COLOR": "1"}])
def test_odd_terminals_get_plain_text(env):
    done = samtune("run", "--model", "x", "--dataset", "./nowhere", env=env)
    assert done.returncode == 3
    assert "\x1b" not in done.stderr
    assert "hint" in done.stderr


def test_resume_where_no_run_is_says_so(tmp_path):
    done = samtune("run", "--resume", "--output", tmp_path / "misspelt")
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: there is no run in {tmp_path / 'misspelt'}")
