"""Sweeps on a real Ray cluster of two nodes, on this machine."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT
from tests.support.small_sweep import command, results, sweep

pytest.importorskip("ray", reason="ray is not installed (extra: ray)")
RAY = Path(sys.executable).parent / "ray"
NODE = ("--num-cpus=1", "--num-gpus=0", "--disable-usage-stats")


def ray(*arguments):
    # As many threads for each run as in the sweep that it is compared with: Ray would give it one.
    threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(torch.get_num_threads()))}
    env = os.environ | {"PYTHONPATH": str(ROOT)} | threads
    done = subprocess.run([RAY, *arguments], capture_output=True, text=True, env=env, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def cluster():
    """The address of a head and a second node, with one core each: two runs at a time."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    port = f"--port={address.rpartition(':')[2]}"
    try:
        ray("start", "--head", "--node-ip-address=127.0.0.1", port, "--include-dashboard=false", *NODE)
        ray("start", f"--address={address}", *NODE)
        yield address
    finally:
        ray("stop", "--force")


def parent_of(pid):
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("address", "gpus", "code", "said"),
    [("auto", "auto", 8, "ray start"), ("127.0.0.1:9", "auto", 8, "--address"), ("auto", "2", 2, "Ray gives each run")],
)
def test_without_a_cluster_the_error_tells_how_to_start_one(whole_sweep_recipe, tmp_path, address, gpus, code, said):
    """Before the others: none is there yet."""
    done = sweep(whole_sweep_recipe, tmp_path / "s", "--engine", "ray", "--address", address, "--gpus", gpus)
    assert done.returncode == code, done.stderr
    assert said in done.stderr
    assert not (tmp_path / "s").exists()


def begin(cluster, recipe, folder):
    """A sweep on the cluster, whose final run with SAM waits at its third step, and that run's status."""
    paused = {"at": "step", "call": 3, "do": "pause", "only": "final-sam"}
    started = subprocess.Popen(
        command(recipe, folder, "--engine", "ray", "--address", cluster, faults=[paused]),
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    status = folder / "runs" / "final-sam-seed0" / "status.json"
    while not status.exists() and started.poll() is None:
        time.sleep(0.1)
    return started, json.loads(status.read_text())


@pytest.mark.slow
def test_a_sweep_whose_worker_is_killed_ends_as_on_one_machine(cluster, whole_sweep, whole_sweep_recipe, tmp_path):
    started, run = begin(cluster, whole_sweep_recipe, tmp_path / "s")
    worker = parent_of(run["pid"])
    assert worker not in (os.getpid(), started.pid)
    os.kill(worker, signal.SIGKILL)
    said = started.communicate(timeout=300)[1]
    assert started.returncode == 0, said
    assert results(tmp_path / "s") == results(whole_sweep)
    assert (tmp_path / "s" / "logs" / "final-sam-seed0" / "output.txt").read_text().count("samtune") >= 2


@pytest.mark.slow
def test_a_signal_stops_the_runs_of_a_cluster_too(cluster, whole_sweep, whole_sweep_recipe, tmp_path):
    started, _ = begin(cluster, whole_sweep_recipe, tmp_path / "s")
    started.send_signal(signal.SIGTERM)
    said = started.communicate(timeout=300)[1]
    assert started.returncode == 75, said
    done = sweep(whole_sweep_recipe, tmp_path / "s", "--engine", "ray")  # auto: the cluster that is here
    assert done.returncode == 0, done.stderr
    assert results(tmp_path / "s") == results(whole_sweep)
