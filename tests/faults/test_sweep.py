"""A sweep in which something breaks: what is done stays done, and the same command does the rest (row 31)."""

import json
import os
import re
import signal
import subprocess

import pytest

from samtune.sweep import ledger
from tests.conftest import ROOT, samtune
from tests.faults.test_stop import undisturbed
from tests.support.fault_matrix import row
from tests.support.small_sweep import attempts, command, results, sweep, write_recipe

STEP = {"at": "step"}


@pytest.fixture(scope="module")
def whole(whole_sweep):
    return results(whole_sweep)


@pytest.fixture
def short(photos, tmp_path):
    """One arm of the whole sweep, with nothing to choose: a single run."""
    return write_recipe(tmp_path / "short.toml", photos, arms=["sgd"], grid="rho = [0.05, 0.1]")


@row(31)
def test_a_run_that_fails_stops_no_other_is_listed_and_tried_again(photos, whole_sweep_recipe, whole, tmp_path):
    folder = tmp_path / "s"
    full = {"at": "save checkpoint", "call": 2, "do": "ENOSPC", "again": True, "only": "select-sam-rho0.1"}
    broken = sweep(whole_sweep_recipe, folder, faults=[full])
    assert broken.returncode == 8, broken.stderr
    assert "1 of 4 runs failed: select-sam-rho0.1-seed0" in broken.stderr
    assert "logs/select-sam-rho0.1-seed0/output.txt" in broken.stderr
    found = ledger.read(folder)
    assert [(run["id"], run["exit_code"]) for run in found["failed"]] == [("select-sam-rho0.1-seed0", 8)]
    assert "cannot be saved" in found["failed"][0]["why"]
    sam, sgd = found["arms"]
    assert sam["chosen"] is None
    assert sgd["final"][0]["report"] is not None
    done = sweep(whole_sweep_recipe, folder)
    assert done.returncode == 0, done.stderr
    assert results(folder) == whole
    assert attempts(folder) == dict.fromkeys(whole, 1) | {"select-sam-rho0.1-seed0": 2}
    assert ledger.read(folder)["failed"] == []


@row(31)
def test_a_run_that_fails_before_it_has_a_folder_is_listed_with_its_cause(short, tmp_path):
    fault = {"at": "build setup", "call": 1, "do": "SIGKILL", "only": "final-sgd"}
    broken = sweep(short, tmp_path / "s", faults=[fault])
    assert broken.returncode == 9
    (failed,) = ledger.read(tmp_path / "s")["failed"]
    assert (failed["exit_code"], "SIGKILL" in failed["why"]) == (-9, True)
    assert not (tmp_path / "s" / "runs" / "final-sgd-seed0").exists()


@row(31)
def test_a_point_that_diverges_is_out_and_no_failure(photos, tmp_path):
    recipe = write_recipe(tmp_path / "r.toml", photos, arms=["sgd"], grid="lr = [1e9, 0.01]", more="")
    recipe.write_text(
        recipe.read_text().replace("workers = 0", "workers = 0\nclip_grad = 0.0").replace('"4 steps"', '"20 steps"')
    )
    done = sweep(recipe, tmp_path / "s")
    assert done.returncode == 0, done.stderr
    found = ledger.read(tmp_path / "s")
    assert found["arms"][0]["chosen"] == {"lr": 0.01}
    assert [run["exit_code"] for run in found["failed"]] == [7]
    assert found["missing"] == []
    before = attempts(tmp_path / "s")
    assert sweep(recipe, tmp_path / "s").returncode == 0
    assert attempts(tmp_path / "s") == before


@row(31)
def test_a_sweep_that_is_killed_goes_on_to_the_same_end(whole_sweep_recipe, whole, tmp_path):
    fault = STEP | {"call": 3, "do": "parent SIGKILL", "only": "select-sam-rho0.1"}
    died = sweep(whole_sweep_recipe, tmp_path / "s", faults=[fault])
    assert died.returncode == -signal.SIGKILL
    done = sweep(whole_sweep_recipe, tmp_path / "s")
    assert done.returncode == 0, done.stderr
    assert results(tmp_path / "s") == whole
    assert set(attempts(tmp_path / "s").values()) <= {1, 2}


@row(31)
def test_a_run_does_not_outlive_the_sweep_that_was_killed(photos, tmp_path):
    recipe = write_recipe(tmp_path / "r.toml", photos, arms=["sgd"], grid="perturb = ['all']")
    died = sweep(
        recipe, tmp_path / "s", "--epochs", "100000 steps", faults=[STEP | {"call": 3, "do": "parent SIGKILL"}]
    )
    assert died.returncode == -signal.SIGKILL
    status = tmp_path / "s" / "runs" / "final-sgd-seed0" / "status.json"
    pid = json.loads(status.read_text())["pid"]
    while os.path.exists(f"/proc/{pid}"):
        pass
    assert json.loads(status.read_text())["exit_code"] == 75


@row(31)
@pytest.mark.parametrize("sent", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_a_signal_lets_the_runs_save_and_the_same_command_goes_on(sent, short, whole, tmp_path):
    wait = STEP | {"call": 3, "do": "pause"}  # until the sweep hands it on
    faults = [wait, STEP | {"call": 3, "do": f"parent {sent}"}]
    options = {"capture_output": True, "text": True, "cwd": ROOT, "timeout": 300, "check": False}
    stopped = subprocess.run(command(short, tmp_path / "s", faults=faults), **options, **undisturbed())
    assert stopped.returncode == 75, stopped.stderr
    assert f"{sent}: waiting for 1 run to end a step" in stopped.stderr
    assert "the same command continues" in stopped.stderr
    assert ledger.read(tmp_path / "s")["missing"] == ["final-sgd-seed0"]
    done = sweep(short, tmp_path / "s")
    assert done.returncode == 0, done.stderr
    assert results(tmp_path / "s") == {"final-sgd-seed0": whole["final-sgd-seed0"]}


@row(31)
def test_a_second_signal_ends_all_at_once(short, whole, tmp_path):
    faults = [STEP | {"call": 3, "do": "hang"}, STEP | {"call": 3, "do": "parent SIGTERM"}]
    started = subprocess.Popen(
        command(short, tmp_path / "s", faults=faults), stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    for line in started.stderr:
        if "a second one ends them at once" in line:
            break
    started.send_signal(signal.SIGTERM)
    assert started.wait(60) == 128 + signal.SIGTERM
    started.stderr.close()
    assert sweep(short, tmp_path / "s").returncode == 0
    assert results(tmp_path / "s") == {"final-sgd-seed0": whole["final-sgd-seed0"]}


@row(31)
def test_two_sweeps_on_one_folder_share_the_work(whole_sweep_recipe, whole, tmp_path):
    both = [
        subprocess.Popen(
            command(whole_sweep_recipe, tmp_path / "s"),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        for _ in range(2)
    ]
    said = [process.communicate(timeout=500) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert results(tmp_path / "s") == whole
    assert attempts(tmp_path / "s") == dict.fromkeys(whole, 1)
    begun = [set(re.findall(r"^begin  ([^:]+)", err, re.M)) for _, err in said]
    assert begun[0] | begun[1] == set(whole)
    assert not begun[0] & begun[1]
    assert ledger.read(tmp_path / "s")["totals"]["done"] == 4


@row(31)
def test_several_runs_at_a_time_come_to_the_same_end(whole_sweep_recipe, whole, tmp_path):
    cores = os.sched_getaffinity(0)
    if len(cores) < 2:
        pytest.skip("one core: runs at a time would need two")
    done = sweep(whole_sweep_recipe, tmp_path / "s", "--jobs", 2, env={"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert results(tmp_path / "s").keys() == whole.keys()
    assert re.findall(r"^(begin|done) ", done.stderr, re.M)[:3] == ["begin", "begin", "done"]


def test_a_folder_without_a_sweep_is_named(tmp_path):
    assert samtune("sweep", "nowhere.toml").returncode == 2
    with pytest.raises(Exception, match="there is no ledger"):
        ledger.read(tmp_path)
