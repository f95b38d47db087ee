"""--bootstrap: a run that trains twice, the second time on the labels that the first training predicts."""

import hashlib
import json
import shutil
import signal
import tomllib

import pyarrow.parquet as pq
import pytest

from tests.conftest import SMALL_MODEL, samtune
from tests.support.fault_matrix import row
from tests.support.fingerprint import fingerprint
from tests.support.small_sweep import sweep, write_recipe

SMALL = (*SMALL_MODEL, "--epochs", "6 steps", "--lr", 0.01, "--batch-size", 8, "--val-fraction", 0.2)
SMALL += ("--save-every", "2 steps", "--eval-every", "3 steps", "--no-html")
NOISE = ("--label-noise", 0.4)


def start(data, folder, *more, **options):
    return samtune("run", *SMALL, *NOISE, "--bootstrap", "--dataset", data, "--output", folder, *more, **options)


@pytest.fixture(scope="module")
def whole(photos, tmp_path_factory):
    """A run that nothing interrupts."""
    folder = tmp_path_factory.mktemp("bootstrap") / "whole"
    done = start(photos, folder)
    assert done.returncode == 0, done.stderr
    return folder


def report(folder):
    return json.loads((folder / "report.json").read_text())


def weights(folder, name="last"):
    return hashlib.sha256((folder / "checkpoints" / name / "model.safetensors").read_bytes()).hexdigest()


def test_it_is_what_three_commands_do(whole, photos, tmp_path):
    first, labels, second = tmp_path / "first", tmp_path / "labels.parquet", tmp_path / "second"
    given = (*SMALL, "--dataset", photos)
    assert samtune("run", *given, *NOISE, "--output", first, "--no-test").returncode == 0
    assert samtune("relabel", first, "--output", labels).returncode == 0
    assert samtune("run", *given, "--train-labels", labels, "--output", second).returncode == 0
    assert weights(whole / "bootstrap") == weights(first)
    assert fingerprint(whole) == fingerprint(second)
    assert weights(whole) != weights(first)


def test_the_report_counts_both_trainings_and_names_the_labels_of_each(whole):
    result, first = report(whole), report(whole / "bootstrap")
    assert result["steps"] == first["steps"] == 6
    assert result["cost"] == {
        **{"forward_backward_passes": 24, "sgd_equivalents": 4, "seconds_against_sgd": None, "bootstrap_passes": 12},
        "bootstrap_seconds": first["train_seconds"],
    }
    assert result["train_seconds"] > first["train_seconds"] > 0
    noise = result["dataset"]["label_noise"]
    assert noise["kind"] == "bootstrap"
    assert noise["first_training"] == first["dataset"]["label_noise"]
    assert noise["first_training"]["flipped"] == 15  # 40 % of 38
    columns = pq.read_table(whole / "bootstrap" / "labels.parquet").to_pydict()
    pairs = zip(columns["label"], columns["dataset_label"], strict=True)
    assert noise["flipped"] == sum(now is not None and now != own for now, own in pairs)
    assert "24 passes" in (whole / "report.md").read_text()
    assert "in the first training, 15 of 38" in (whole / "report.md").read_text()


def test_only_the_second_training_scores_test_and_both_validate_on_the_same_clean_images(whole):
    result, first = report(whole), report(whole / "bootstrap")
    assert first["test"] is None
    assert result["test"]["n"] == 16
    assert '"test"' not in (whole / "bootstrap" / "metrics.jsonl").read_text()
    scored = pq.read_table(whole / "bootstrap" / "predictions.parquet").to_pydict()
    columns = pq.read_table(whole / "bootstrap" / "labels.parquet").to_pydict()
    held_out = [row for row, label in enumerate(columns["label"]) if label is None]
    assert scored["index"] == held_out
    assert [["cat", "dog"][label] for label in scored["label"]] == [columns["dataset_label"][row] for row in held_out]
    assert result["val"]["n"] == first["val"]["n"] == len(held_out)
    assert tomllib.loads((whole / "config.toml").read_text())["bootstrap"] is True


@pytest.mark.slow
def test_the_settings_of_the_run_repeat_it(whole, tmp_path):
    done = samtune("run", whole / "config.toml", "--output", tmp_path / "again")
    assert done.returncode == 0, done.stderr
    assert fingerprint(tmp_path / "again") == fingerprint(whole)


def test_a_finished_run_is_not_repeated_and_one_training_of_it_is_no_run_of_its_own(whole):
    assert "is done already" in samtune("run", "--resume", "--output", whole).stderr
    refused = samtune("run", "--resume", "--output", whole, "--no-bootstrap")
    assert refused.returncode == 5
    assert "bootstrap" in refused.stderr


def test_a_misspelt_name_leaves_nothing_behind(photos, tmp_path):
    done = samtune("run", *SMALL, "--bootstrap", "--dataset", tmp_path / "photso", "--output", tmp_path / "r")
    assert done.returncode == 3
    wrong = ("--train-labels", tmp_path / "l.csv")
    (tmp_path / "l.csv").write_text("label\ncat\n")
    done = samtune("run", *SMALL, "--bootstrap", "--dataset", photos, *wrong, "--output", tmp_path / "r")
    assert done.returncode == 3, done.stderr
    assert [path.name for path in (tmp_path / "r").iterdir()] == [".lock"]


INTERRUPTED = {
    "in the first training": {"at": "perturb", "call": 4},
    "in the first validation": {"at": "evaluate", "call": 1},
    "while labels are predicted": {"at": "predict labels", "call": 1},
    "in the second training": {"at": "perturb", "call": 10},
}


def goes_on(folder, whole, *more):
    done = samtune("run", *more, "--resume", "--output", folder)
    assert done.returncode == 0, done.stderr
    assert fingerprint(folder) == fingerprint(whole)
    assert fingerprint(folder / "bootstrap") == fingerprint(whole / "bootstrap")
    assert report(folder)["cost"]["forward_backward_passes"] == 24


@row(3)
@pytest.mark.parametrize("moment", INTERRUPTED)
def test_a_stopped_run_goes_on_in_the_training_that_was_stopped(moment, photos, whole, tmp_path):
    folder = tmp_path / "r"
    done = start(photos, folder, faults=[INTERRUPTED[moment] | {"do": "SIGTERM"}])
    assert done.returncode == 75, done.stderr
    assert json.loads((folder / "status.json").read_text())["state"] == "stopped"
    (listed,) = json.loads(samtune("runs", tmp_path, "--json").stdout)
    assert listed["next"] == f"samtune run --resume --output {folder}"
    assert listed["total_steps"] == 6
    goes_on(folder, whole)


@row(3)
@pytest.mark.parametrize("validation", ["--val", "--no-val"])
def test_a_stopped_run_of_a_recipe_with_variants_goes_on(validation, photos, tmp_path):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text("[variants.arm.plain]\n[variants.arm.twice]\nbootstrap = true\nlabel_noise = 0.4\n")
    given = ("run", recipe, "--variant", "twice", *SMALL, "--dataset", photos, validation)
    assert samtune(*given, "--output", tmp_path / "whole").returncode == 0
    fault = INTERRUPTED["in the first training"] | {"do": "SIGTERM"}
    assert samtune(*given, "--output", tmp_path / "r", faults=[fault]).returncode == 75
    done = samtune("run", "--resume", "--output", tmp_path / "r")
    assert done.returncode == 0, done.stderr
    assert fingerprint(tmp_path / "r") == fingerprint(tmp_path / "whole")


@row(3)
def test_a_second_training_without_its_provenance_goes_on(photos, whole, tmp_path):
    fault = INTERRUPTED["in the second training"] | {"do": "SIGTERM"}
    assert start(photos, tmp_path / "r", faults=[fault]).returncode == 75
    (tmp_path / "r" / "provenance.json").unlink()
    done = samtune("run", "--resume", "--output", tmp_path / "r")
    assert done.returncode == 0, done.stderr
    assert weights(tmp_path / "r") == weights(whole)


@row(1)
@pytest.mark.parametrize("moment", INTERRUPTED)
def test_a_killed_run_goes_on_by_the_same_command(moment, photos, whole, tmp_path):
    done = start(photos, tmp_path / "r", faults=[INTERRUPTED[moment] | {"do": "SIGKILL"}])
    assert done.returncode == -signal.SIGKILL
    goes_on(tmp_path / "r", whole, *SMALL, *NOISE, "--bootstrap", "--dataset", photos)


@row(24)
def test_other_settings_are_refused_in_the_first_training_and_can_be_allowed(photos, tmp_path):
    fault = INTERRUPTED["in the first training"] | {"do": "SIGTERM"}
    assert start(photos, tmp_path / "r", faults=[fault]).returncode == 75
    refused = samtune("run", "--resume", "--output", tmp_path / "r", "--lr", 0.02)
    assert refused.returncode == 5
    allowed = ("--lr", 0.02, "--allow-change", "lr", "--keep-checkpoints", 1)
    done = samtune("run", "--resume", "--output", tmp_path / "r", *allowed)
    assert done.returncode == 0, done.stderr
    for folder in (tmp_path / "r", tmp_path / "r" / "bootstrap"):
        assert report(folder)["optimizer"]["lr"] == 0.02


@pytest.mark.slow
def test_two_ranks_do_both_trainings(photos, tmp_path):
    done = start(photos, tmp_path / "r", "--processes", 2)
    assert done.returncode == 0, done.stderr
    result = report(tmp_path / "r")
    assert (result["world_size"], result["cost"]["forward_backward_passes"]) == (2, 24)
    assert result["dataset"]["label_noise"]["kind"] == "bootstrap"


@row(3)
def test_two_ranks_that_are_stopped_in_the_first_training_go_on_to_the_same_end(photos, tmp_path):
    two = ("--processes", 2)
    assert start(photos, tmp_path / "whole", *two).returncode == 0
    fault = INTERRUPTED["in the first training"] | {"do": "parent SIGTERM", "rank": 0}
    stopped = start(photos, tmp_path / "r", *two, faults=[fault])
    assert stopped.returncode == 75, stopped.stderr
    goes_on(tmp_path / "r", tmp_path / "whole")


@pytest.mark.slow
def test_a_sweep_has_it_as_a_setting_of_an_arm_and_counts_both_trainings(photos, tmp_path):
    recipe = write_recipe(
        *(tmp_path / "sweep.toml", photos),
        arms=("sam", "sgd"),
        grid="rho = [0.05]\nlabel_noise = [0.4]",
        more="\n[sweep.sam]\nbootstrap = [true, false]\n",
    )
    planned = json.loads(samtune("sweep", recipe, "--dry-run", "--json").stdout)
    assert [(stage["stage"], stage["arm"], stage["passes"]) for stage in planned] == [
        ("select", "sam", "8 to 16"),
        ("final", "sam", "16"),
        ("final", "sgd", "4"),
    ]
    done = sweep(recipe, tmp_path / "s")
    assert done.returncode == 0, done.stderr
    ledger = json.loads((tmp_path / "s" / "ledger.json").read_text())
    for run in ledger["runs"]:
        folder = tmp_path / "s" / run["folder"]
        assert report(folder)["cost"]["forward_backward_passes"] == run["passes"]
        kept = run["stage"] == "final"
        assert (folder / "checkpoints").exists() == kept
        is_twice = run["settings"].get("bootstrap", False)
        assert (folder / "bootstrap" / "checkpoints").exists() == (kept and is_twice)
        assert (folder / "bootstrap" / "report.json").exists() == is_twice


@pytest.mark.slow
def test_a_plan_counts_both_trainings(photos):
    given = ("--dataset", photos, *NOISE)
    once, twice = (
        json.loads(samtune("plan", *SMALL, *given, *more, "--json").stdout) for more in ((), ("--bootstrap",))
    )
    assert twice["length"]["passes"] == 2 * once["length"]["passes"] == 24
    assert twice["length"]["steps"] == once["length"]["steps"] == 6
    assert twice["disk"]["kept"] == 2 * once["disk"]["kept"]
    parts = {key: value for key, value in twice["time"].items() if not key.startswith(("total", "train"))}
    assert twice["time"]["total"] == pytest.approx(sum(parts.values()))
    assert twice["time"]["first_training"] > parts["steps"]
    assert "first_training" not in once["time"]


@pytest.mark.slow
def test_without_validation_the_first_training_is_scored_on_nothing(photos, tmp_path):
    done = start(photos, tmp_path / "r", "--no-val")
    assert done.returncode == 0, done.stderr
    first = report(tmp_path / "r" / "bootstrap")
    assert (first["test"], first["val"]) == (None, None)
    assert report(tmp_path / "r")["dataset"]["label_noise"]["n"] == 48
    shutil.rmtree(tmp_path / "r" / "bootstrap" / "checkpoints")  # which the run needs no more
    assert samtune("report", tmp_path / "r").returncode == 0
