"""Killed and asked to stop: the run that goes on is the uninterrupted one, bit for bit (rows 1 to 4)."""

import json
import os
import signal
import subprocess
import sys

import pytest

from tests.conftest import samtune
from tests.support.fault_matrix import row
from tests.support.fingerprint import fingerprint
from tests.support.small_run import SETTINGS, resume, run, status, step_of

PERTURBED = {"at": "perturb", "when": "after"}
KILLED = {
    "while_weights_are_perturbed": PERTURBED | {"call": 10},  # a save in the second epoch, of steps 6 to 10, is done
    "in_the_middle_of_an_update": {"at": "optimizer update", "call": 4 * 6 + 2},
    "before_the_first_checkpoint": PERTURBED | {"call": 1},
    "in_validation": {"at": "evaluate", "call": 3},
    "in_validation_of_averaged_weights": {"at": "evaluate", "call": 4},
    "in_the_test": {"at": "evaluate", "call": 7},
    "before_the_report": {"at": "build report", "call": 1},
    "before_the_settings_are_written": {"at": "write run file", "call": 2},
}


@row(1)
@pytest.mark.parametrize("moment", KILLED)
def test_a_killed_run_goes_on_to_the_same_end_by_the_same_command(moment, photos, uninterrupted, tmp_path):
    died = run(photos, tmp_path / "r", faults=[KILLED[moment] | {"do": "SIGKILL"}])
    assert died.returncode == -signal.SIGKILL
    done = run(photos, tmp_path / "r", "--resume")
    assert done.returncode == 0, done.stderr
    assert fingerprint(tmp_path / "r") == fingerprint(uninterrupted)
    assert fingerprint(tmp_path / "r", "best") == fingerprint(uninterrupted, "best")


KINDS = {
    "adamw_mixup_cutmix": ("--opt", "adamw", "--mixup", "0.4", "--cutmix", "1"),
    "float16": ("--amp-dtype", "float16"),
    "batch_norm_in_pieces": ("--no-freeze-bn", "--m", "4", "--drop-path", "0.2", "--momentum", "0"),
    "processes_load": ("--aa", "rand", "--color-jitter", "0.2", "--reprob", "0.3", "--workers", "2"),
    "late_sam_in_micro_batches": ("--sam-start", "40%", "--sam-every", "2", "--micro-batch", "3", "--select", "best"),
    "fewer_images_than_a_batch": ("--max-train", "7", "--label-noise", "0.3", "--no-test"),
}


@row(1)
@pytest.mark.parametrize("kind", KINDS)
def test_runs_of_all_kinds_go_on_to_the_same_end(kind, photos, tmp_path):
    steps = ["--epochs", "15 steps", "--eval-every", "5 steps"]
    assert run(photos, tmp_path / "whole", *steps, *KINDS[kind]).returncode == 0
    fault = {"at": "step", "call": 8, "when": "after", "do": "SIGKILL"}
    assert run(photos, tmp_path / "r", *steps, *KINDS[kind], faults=[fault]).returncode == -signal.SIGKILL
    done = resume(tmp_path / "r")
    assert done.returncode == 0, done.stderr
    assert fingerprint(tmp_path / "r") == fingerprint(tmp_path / "whole")


WRITE, FILES = "write checkpoint file", 6
SAVING = {
    "before_the_first_file": {"at": WRITE, "call": 2 * FILES + 1},
    "between_two_files": {"at": WRITE, "call": 2 * FILES + 3},
    "before_the_manifest": {"at": WRITE, "call": 3 * FILES},
    "before_the_rename": {"at": "verify checkpoint", "call": 3},
    "before_last_moves": {"at": "update link", "call": 3},
    "before_best_moves": {"at": "update link", "call": 4},
    "before_older_ones_go": {"at": "prune checkpoints", "call": 3},
}


@row(2)
@pytest.mark.parametrize("moment", SAVING)
def test_a_save_that_is_cut_off_leaves_the_checkpoint_before(moment, photos, uninterrupted, tmp_path):
    died = run(photos, tmp_path / "r", faults=[SAVING[moment] | {"do": "SIGKILL"}])
    assert died.returncode == -signal.SIGKILL
    done = resume(tmp_path / "r")
    assert done.returncode == 0, done.stderr
    assert fingerprint(tmp_path / "r") == fingerprint(uninterrupted)
    assert fingerprint(tmp_path / "r", "best") == fingerprint(uninterrupted, "best")
    cut_off = moment not in ("before_last_moves", "before_best_moves", "before_older_ones_go")
    assert ("a save was cut off" in done.stderr) == cut_off
    assert not list((tmp_path / "r" / "checkpoints").glob(".*"))


@row(2)
@pytest.mark.parametrize("file", [1, FILES])
def test_a_run_that_is_killed_in_a_step_while_a_checkpoint_is_written_goes_on_from_the_one_before(
    file, photos, uninterrupted, tmp_path
):
    hangs = {"at": WRITE, "call": 3 * FILES + file, "do": "hang"}  # after step 6
    died = run(photos, tmp_path / "r", faults=[hangs, PERTURBED | {"call": 8, "do": "SIGKILL"}])
    assert died.returncode == -signal.SIGKILL
    assert step_of(tmp_path / "r") == 5
    done = resume(tmp_path / "r")
    assert done.returncode == 0, done.stderr
    assert "a save was cut off: .step-000006.part is removed" in done.stderr
    assert "resume  step-000005" in done.stderr
    assert fingerprint(tmp_path / "r") == fingerprint(uninterrupted)
    assert fingerprint(tmp_path / "r", "best") == fingerprint(uninterrupted, "best")


@row(3)
@pytest.mark.parametrize("sent", ["SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP"])
def test_a_signal_lets_the_step_end_saves_and_the_run_goes_on_to_the_same_end(sent, photos, uninterrupted, tmp_path):
    fault = PERTURBED | {"call": 8, "do": sent}
    ended = run(photos, tmp_path / "r", "--save-every", "1000 steps", faults=[fault])
    assert ended.returncode == 75, ended.stderr
    assert "--resume" in ended.stderr
    assert (status(tmp_path / "r")["state"], status(tmp_path / "r")["exit_code"]) == ("stopped", 75)
    assert step_of(tmp_path / "r") == 8
    done = resume(tmp_path / "r")
    assert done.returncode == 0, done.stderr
    assert fingerprint(tmp_path / "r") == fingerprint(uninterrupted)


def undisturbed() -> dict:
    """A job in the background ignores Ctrl-C, and so would its children: here they hear it."""

    def hear() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)

    return {"preexec_fn": hear}


@row(3)
def test_a_run_that_goes_on_scores_what_is_missing_and_nothing_twice(photos, tmp_path):
    """Stopped between the best checkpoint and the last, then killed when both are scored."""
    often = ("--eval-every", "1 steps", "--lr", "0.3", "--model-ema-decay", "0.9")
    second_test = {"at": "evaluate", "call": 2 * 15 + 2, "do": "SIGTERM"}  # after 15 validations of two models each
    ended = run(photos, tmp_path / "r", *often, faults=[second_test])
    assert ended.returncode == 75, ended.stderr
    third = {"at": "evaluate", "call": 3, "do": "SIGKILL"}  # the last checkpoint, its averaged weights, and no more
    killed = resume(tmp_path / "r", faults=[third, {"at": "build report", "call": 1, "do": "SIGKILL"}])
    assert killed.returncode == -signal.SIGKILL
    assert (tmp_path / "r" / "predictions.parquet").is_file()
    done = resume(tmp_path / "r", "--json", faults=[{"at": "evaluate", "call": 1, "do": "SIGKILL"}])
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()]
    scored = [(row["split"], row["checkpoint"]) for row in rows if row["split"].startswith("test")]
    assert scored == [("test", "best"), ("test", "last"), ("test_ema", "last")]
    for name, scores in json.loads(done.stdout)["test_by_checkpoint"].items():
        again = json.loads(samtune("eval", tmp_path / "r", "--checkpoint", name, "--json").stdout)
        assert {key: again[key] for key in ("wrong", "loss", "step")} == {
            key: scores[key] for key in ("wrong", "loss", "step")
        }


@row(3)
@pytest.mark.parametrize(("evaluation", "saved"), [(3, 10), (4, 10), (7, 15)])
def test_a_signal_ends_an_evaluation_too(evaluation, saved, photos, uninterrupted, tmp_path):
    """The validation after step 10 of the last weights, of the averaged ones, and the test."""
    fault = {"at": "evaluate", "call": evaluation, "do": "SIGTERM"}
    ended = run(photos, tmp_path / "r", "--save-every", "1000 steps", faults=[fault])
    assert ended.returncode == 75, ended.stderr
    assert step_of(tmp_path / "r") == saved
    done = resume(tmp_path / "r")
    assert done.returncode == 0, done.stderr
    assert fingerprint(tmp_path / "r") == fingerprint(uninterrupted)


@row(3)
def test_a_terminal_that_closes_may_send_its_signal_twice(photos, tmp_path):
    faults = [PERTURBED | {"call": 8, "do": "SIGHUP"}, {"at": "optimizer update", "call": 4 * 7 + 2, "do": "SIGHUP"}]
    ended = run(photos, tmp_path / "r", faults=faults)
    assert ended.returncode == 75, ended.stderr
    assert step_of(tmp_path / "r") == 8


@row(3)
def test_a_signal_while_a_run_is_prepared_ends_it_at_once_and_a_resumed_one_keeps_its_checkpoint(photos, tmp_path):
    fault = {"at": "build model", "call": 1, "do": "SIGTERM"}
    ended = run(photos, tmp_path / "r", faults=[fault])
    assert ended.returncode == 128 + signal.SIGTERM
    assert not (tmp_path / "r").exists()
    assert run(photos, tmp_path / "r", faults=[PERTURBED | {"call": 3, "do": "SIGTERM"}]).returncode == 75
    assert resume(tmp_path / "r", faults=[fault]).returncode == 75
    early = {"at": "preflight", "call": 1, "do": "SIGUSR1"}
    assert run(photos, tmp_path / "other", faults=[early]).returncode == 128 + signal.SIGUSR1
    assert resume(tmp_path / "r", faults=[early]).returncode == 75


@row(3)
@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_to_the_whole_group_of_processes_is_answered_by_the_run_alone(sent, photos, tmp_path):
    """As a terminal or a batch system sends it: to the processes that load data, too."""
    command = [sys.executable, "-m", "samtune", "run", *SETTINGS, "--dataset", photos, "--output", tmp_path / "r"]
    command += ["--aa", "rand", "--workers", "1", "--epochs", "10000"]
    with subprocess.Popen(
        list(map(str, command)), stderr=subprocess.PIPE, text=True, start_new_session=True, **undisturbed()
    ) as process:
        assert process.stderr is not None
        said = next(line for line in process.stderr if line.startswith("epoch"))
        os.killpg(process.pid, sent)
        said += process.stderr.read()
    assert process.returncode == 75, said
    assert "Traceback" not in said
    assert samtune("eval", tmp_path / "r", "--split", "val").returncode == 0


@row(4)
@pytest.mark.parametrize(("first", "second", "code"), [("SIGTERM",) * 2 + (143,), ("SIGINT",) * 2 + (130,)])
def test_a_second_signal_ends_at_once_and_the_last_checkpoint_loads(
    first, second, code, photos, uninterrupted, tmp_path
):
    faults = [PERTURBED | {"call": 8, "do": first}, {"at": "optimizer update", "call": 4 * 7 + 2, "do": second}]
    ended = run(photos, tmp_path / "r", faults=faults)
    assert ended.returncode == code, ended.stderr
    assert "Traceback" not in ended.stderr
    assert (status(tmp_path / "r")["state"], status(tmp_path / "r")["exit_code"]) == ("stopped", code)
    assert step_of(tmp_path / "r") in (5, 6)  # that of step 6 may still have been written
    assert resume(tmp_path / "r").returncode == 0
    assert fingerprint(tmp_path / "r") == fingerprint(uninterrupted)


@row(4)
def test_a_second_signal_within_the_save_that_the_first_one_asked_for_leaves_the_checkpoint_before(photos, tmp_path):
    faults = [PERTURBED | {"call": 7, "do": "SIGTERM"}, {"at": WRITE, "call": 4 * FILES + 2, "do": "SIGTERM"}]
    ended = run(photos, tmp_path / "r", faults=faults)
    assert ended.returncode == 143, ended.stderr
    assert step_of(tmp_path / "r") == 6
    assert samtune("eval", tmp_path / "r", "--split", "val").returncode == 0


@row(13)
def test_a_step_that_does_not_end_is_named_and_ends_the_run_with_9(photos, uninterrupted, tmp_path):
    hang = PERTURBED | {"call": 8, "do": "hang"}
    ended = run(photos, tmp_path / "r", "--step-timeout", "0.05", faults=[hang])
    assert ended.returncode == 9, ended.stderr
    assert "after step 7 nothing has moved" in ended.stderr
    assert "fault_injection.py" in (tmp_path / "r" / "log.txt").read_text()
    found = status(tmp_path / "r")
    assert (found["state"], found["exit_code"]) == ("failed", 9)
    assert json.dumps(found["error"]).count("--resume") == 1
    assert resume(tmp_path / "r").returncode == 0
    assert fingerprint(tmp_path / "r") == fingerprint(uninterrupted)
