"""Values that are not finite, and memory that runs out (rows 10 and 11)."""

import json
import signal

import pytest

from samtune.runs.metrics import read_metrics
from tests.support.fault_matrix import row
from tests.support.fingerprint import fingerprint
from tests.support.small_run import resume, run, status, step_of

PASSES = {  # of step 8
    "pass_1": {"at": "train loss", "call": 15, "do": "nan"},  # it is called in both passes
    "pass_2": {"at": "perturb", "call": 8, "do": "wreck", "when": "after"},
}


@row(10)
@pytest.mark.parametrize("where", PASSES)
def test_a_value_that_is_not_finite_stops_the_run_with_the_weights_from_before(where, photos, uninterrupted, tmp_path):
    ended = run(photos, tmp_path / "r", "--save-every", "1000 steps", faults=[PASSES[where]])
    assert ended.returncode == 7, ended.stderr
    assert "error: step 8: loss" in ended.stderr
    assert ("finite at the weights themselves" in ended.stderr) == (where == "pass_1")
    found = json.loads((tmp_path / "r" / "diagnostics.json").read_text())
    assert (found["step"], found["weights_finite"], len(found["rows"])) == (8, True, 8)
    assert (status(tmp_path / "r")["state"], status(tmp_path / "r")["exit_code"]) == ("failed", 7)
    assert step_of(tmp_path / "r") == 7
    done = resume(tmp_path / "r")  # the fault was a passing one
    assert done.returncode == 0, done.stderr
    assert fingerprint(tmp_path / "r") == fingerprint(uninterrupted)


@row(10)
@pytest.mark.parametrize("where", PASSES)
def test_skipping_leaves_one_step_out_and_goes_on(where, photos, tmp_path):
    done = run(photos, tmp_path / "r", "--on-nan", "skip", "--json", faults=[PASSES[where]])
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert (result["steps"], result["skipped_steps"]) == (15, 1)
    assert all(found["loss"] is not None for found in read_metrics(tmp_path / "r"))


@row(10)
def test_skipping_ends_after_20_steps_in_a_row(photos, tmp_path):
    fault = PASSES["pass_2"] | {"call": 3, "again": True}
    ended = run(photos, tmp_path / "r", "--on-nan", "skip", "--epochs", "40 steps", faults=[fault])
    assert ended.returncode == 7
    assert "error: step 22" in ended.stderr
    assert "20 steps in a row" in ended.stderr


@row(10)
def test_going_back_takes_the_weights_of_the_newest_checkpoint_and_the_batches_that_come_next(photos, tmp_path):
    arguments = ["--on-nan", "rollback", "--save-every", "4 steps", "--json"]
    done = run(photos, tmp_path / "r", *arguments, faults=[PASSES["pass_1"]])
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["rollbacks"] == [{"step": 8, "to": 5}]
    assert (result["steps"], result["skipped_steps"]) == (15, 1)
    assert "back to the weights of step 5" in done.stderr


@row(10)
def test_going_back_ends_after_three_times_and_needs_no_checkpoint_of_a_step(photos, tmp_path):
    fault = PASSES["pass_1"] | {"call": 1, "again": True}
    ended = run(photos, tmp_path / "r", "--on-nan", "rollback", faults=[fault])
    assert ended.returncode == 7
    assert "went back 3 times" in ended.stderr
    assert "error: step 4" in ended.stderr


@row(10)
def test_a_float16_loss_scale_may_find_its_place(photos, tmp_path):
    """A gradient that overflows while the loss is finite is no divergence there."""
    fault = {"at": "gradient norm", "call": 4, "do": "nan"}
    done = run(photos, tmp_path / "r", "--amp-dtype", "float16", "--json", faults=[fault])
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["skipped_steps"] == 1
    stopped = run(photos, tmp_path / "float32", faults=[fault])
    assert stopped.returncode == 7


@row(11)
@pytest.mark.parametrize(("where", "call"), [("pass 1", 13), ("pass 2", 14)])
def test_out_of_memory_halves_what_is_computed_at_once_and_the_run_that_goes_on_does_the_same(
    where, call, photos, tmp_path
):
    fault = {"at": "train loss", "call": call, "do": "oom"}
    done = run(photos, tmp_path / "a", faults=[fault])
    assert done.returncode == 0, done.stderr
    assert "step 7: no memory for 8 images at once; from now on 4, with the same update" in done.stderr
    died = run(photos, tmp_path / "b", faults=[fault, {"at": "evaluate", "call": 4, "do": "SIGKILL"}])
    assert died.returncode == -signal.SIGKILL
    assert resume(tmp_path / "b").returncode == 0
    assert fingerprint(tmp_path / "b") == fingerprint(tmp_path / "a")


@row(11)
def test_out_of_memory_with_one_image_ends_the_run_with_6(photos, tmp_path):
    fault = {"at": "train loss", "call": 13, "do": "oom", "again": True}
    ended = run(photos, tmp_path / "r", faults=[fault])
    assert ended.returncode == 6
    assert "no memory" in ended.stderr
    assert "--img-size" in ended.stderr
    assert step_of(tmp_path / "r") == 6


@row(11)
def test_out_of_memory_in_an_evaluation_halves_its_batch_and_scores_the_same(photos, uninterrupted, tmp_path):
    fault = {"at": "eval batch to device", "call": 6, "do": "oom"}  # after the five steps of an epoch
    done = run(photos, tmp_path / "r", faults=[fault])
    assert done.returncode == 0, done.stderr
    assert fingerprint(tmp_path / "r")["weights"] == fingerprint(uninterrupted)["weights"]
    scores = [
        [(found["split"], found["wrong"]) for found in read_metrics(folder) if found["split"] != "train"]
        for folder in (tmp_path / "r", uninterrupted)
    ]
    assert scores[0] == scores[1]
