"""The benchmark of two ranks in miniature: what a step sends holds exactly, at any size."""

import json
import os
import subprocess
import sys

import pytest

from tests.benchmarks import cost, scaling
from tests.conftest import ROOT

MODEL, IMG_SIZE, BATCH = "test_efficientnet", 32, 2


@pytest.fixture(scope="module")
def result():
    """What it prints with --json, which is all that it prints."""
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("needs two cores")
    options = ["--model", MODEL, "--img-size", str(IMG_SIZE), "--batch-size", str(BATCH), "--rounds", "2", "--json"]
    command = [sys.executable, "-m", "tests.benchmarks.scaling", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_device_sam_sends_what_sgd_sends_and_nothing_in_pass_1(result):
    sgd, sam = result["traffic"]["SGD"], result["traffic"]["SAM, m device"]
    assert sam == sgd
    assert sam["pass_1"] == {"calls": 0, "bytes": 0}
    assert sam["pass_2"]["bytes"] == result["parameter_bytes"]
    assert sam["decision"] == {"calls": 1, "bytes": cost.DECISION_BYTES}


def test_global_sam_sends_the_weights_size_once_more_in_pass_1(result):
    device, together = result["traffic"]["SAM, m device"], result["traffic"]["SAM, m global"]
    assert together["pass_1"] == {"calls": 1, "bytes": result["parameter_bytes"]}
    assert together["step"]["bytes"] - device["step"]["bytes"] == result["parameter_bytes"]
    assert together["step"]["calls"] - device["step"]["calls"] == 1


def test_a_forward_pass_outside_of_no_sync_sends_its_gradients_too(result):
    published, sam = result["traffic"]["SAM as often published"], result["traffic"]["SAM, m device"]
    assert published["pass_1"] == published["pass_2"] == sam["pass_2"]
    assert published["step"]["bytes"] == 2 * result["parameter_bytes"]


def test_the_cost_on_paper_is_of_the_bytes_that_are_counted(result):
    parameters, _ = cost.counts(MODEL, IMG_SIZE, scaling.CLASSES)
    for kind, is_global in (("SAM, m device", False), ("SAM, m global", True)):
        assert result["traffic"][kind]["step"]["bytes"] == cost.bytes_per_step(parameters, is_global=is_global)


def test_efficiency_is_the_machines_times_what_communication_leaves(result):
    speed = result["images_per_s"]
    assert result["scaling_efficiency"] == pytest.approx(speed["together"] / (2 * speed["alone"]))
    assert result["machine_efficiency"] == pytest.approx(speed["silent"] / (2 * speed["alone"]))
    assert result["scaling_efficiency"] == pytest.approx(
        result["machine_efficiency"] * (1 - result["communication_share"])
    )


def test_ratios_of_known_times():
    told = scaling.scaling(4, {"alone": [1.0, 1.0, 9.0], "together": [2.0, 1.25, 1.25], "silent": [1.0, 1.0, 1.0]})
    assert told["images_per_s"] == {"alone": 4.0, "together": 6.4, "silent": 8.0}
    assert (told["scaling_efficiency"], told["machine_efficiency"]) == (0.8, 1.0)
    assert told["communication_share"] == pytest.approx(0.2)
    assert told["quartiles"]["scaling_efficiency"] == (0.5, 7.2)


def test_one_core_is_too_few(monkeypatch, capsys):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {3})
    monkeypatch.setattr(sys, "argv", ["scaling"])
    with pytest.raises(SystemExit) as stopped:
        scaling.main()
    assert stopped.value.code == 8
    assert "two cores" in capsys.readouterr().err
