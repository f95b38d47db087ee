"""What happens to all ranks when something happens to one, or to their launcher."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from samtune.errors import WorkerLost
from samtune.runs import run_log
from tests.conftest import ROOT, samtune
from tests.support.fault_matrix import row
from tests.support.fingerprint import fingerprint
from tests.support.small_run import SETTINGS, resume, run, status, step_of

TWO = ("--processes", "2", "--batch-size", "4")
PERTURBED = {"at": "perturb", "when": "after", "call": 8}


@pytest.fixture(scope="module")
def whole(photos, tmp_path_factory):
    """The run of two ranks that those which break off must equal."""
    folder = tmp_path_factory.mktemp("ranks") / "whole"
    done = run(photos, folder, *TWO)
    assert done.returncode == 0, done.stderr
    return folder


def goes_on_to_the_end_of(folder, whole, *more):
    done = resume(folder, *more)
    assert done.returncode == 0, done.stderr
    assert fingerprint(folder) == fingerprint(whole)


def at_work_on(folder):
    """The processes of a run: launcher, ranks and their workers. Each has a command line that names its folder.

    Not those of the launcher's session: torch gives each rank one of its own.
    """
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            if os.fsencode(folder) in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
    return found


def until(holds, seconds=60):
    """Wait for something that another process does."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.05)


# ------------------------------------------------------------------------------------------------------------- signals


@row(3)
@pytest.mark.parametrize(
    ("rank", "do"), [(0, "SIGTERM"), (1, "SIGTERM"), (1, "SIGUSR1"), (0, "parent SIGTERM"), (1, "parent SIGINT")]
)
def test_a_signal_to_any_rank_or_to_the_launcher_saves_and_ends_all(rank, do, photos, whole, tmp_path):
    ended = run(photos, tmp_path / "r", *TWO, faults=[PERTURBED | {"do": do, "rank": rank}])
    assert ended.returncode == 75, ended.stderr
    assert "Traceback" not in ended.stderr
    assert ended.stderr.count("stopped by") == 1
    found = status(tmp_path / "r")
    assert (found["state"], found["exit_code"]) == ("stopped", 75)
    assert step_of(tmp_path / "r") == found["step"] >= 8
    goes_on_to_the_end_of(tmp_path / "r", whole)


@row(3)
@pytest.mark.parametrize("evaluation", [3, 7])
def test_a_signal_to_one_rank_ends_an_evaluation_on_all(evaluation, photos, whole, tmp_path):
    """A validation, and the test."""
    fault = {"at": "evaluate", "call": evaluation, "do": "SIGTERM", "rank": 1}
    ended = run(photos, tmp_path / "r", *TWO, "--save-every", "1000 steps", faults=[fault])
    assert ended.returncode == 75, ended.stderr
    goes_on_to_the_end_of(tmp_path / "r", whole)


@row(3)
def test_a_signal_to_all_processes_of_a_run_is_one_signal(photos, tmp_path):
    """As Slurm sends SIGTERM: to the launcher and to the ranks, and the launcher hands it on."""
    for sent in (signal.SIGINT, signal.SIGTERM):
        folder = tmp_path / sent.name
        with started(photos, folder, "--epochs", "10000") as process:
            for pid in at_work_on(folder):
                with suppress(ProcessLookupError):
                    os.kill(pid, sent)
            said = process.stderr.read()
        assert process.returncode == 75, said
        assert "Traceback" not in said
        assert samtune("eval", folder, "--split", "val").returncode == 0


@row(3)
def test_a_signal_that_reaches_a_rank_after_its_end_changes_nothing(photos, whole, tmp_path):
    """As on a busy machine: the launcher has heard it, all ranks have ended, and then it comes to each."""
    late = {"at": "write rank status", "call": 2, "do": "SIGINT", "when": "after"}
    folder = tmp_path / "r"
    with started(photos, folder, faults=[PERTURBED | {"do": "parent SIGINT", "rank": 1}, late]) as process:
        said = process.stderr.read()
    assert process.returncode == 75, said
    assert "Traceback" not in said
    goes_on_to_the_end_of(folder, whole)
    done = run(photos, tmp_path / "done", *TWO, faults=[late])
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr


@contextmanager
def started(photos, folder, *more, faults=()):
    """A command that has told of its first epoch; when it has ended, no process of the run is left after 10 seconds."""
    command = ["run", *SETTINGS, "--dataset", photos, "--output", folder, *TWO, *more]
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.support.fault_injection", json.dumps(list(faults)), *map(str, command)],
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        start_new_session=True,
    )
    assert process.stderr is not None
    try:
        said = "".join(iter_until(process.stderr, "epoch"))
        assert "epoch" in said, said
        yield process
        process.wait(timeout=60)
        until(lambda: not at_work_on(folder), seconds=10)
    finally:
        for pid in at_work_on(folder):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()
        process.stderr.close()


def iter_until(lines, start):
    for line in lines:
        yield line
        if line.startswith(start):
            return


@row(4)
def test_a_second_signal_to_the_launcher_ends_all_at_once(photos, whole, tmp_path):
    """The first one asks politely, of a rank that does not hear."""
    faults = [PERTURBED | {"do": do, "rank": 1} for do in ("parent SIGTERM", "hang")]
    with started(photos, tmp_path / "r", faults=faults) as process:
        said = "".join(iter_until(process.stderr, "SIGTERM: the ranks end after their step"))
        process.send_signal(signal.SIGTERM)
        said += process.stderr.read()
    assert process.returncode == 143, said
    assert "Traceback" not in said
    goes_on_to_the_end_of(tmp_path / "r", whole)


# ---------------------------------------------------------------------------------------------------------- lost ranks


@row(12)
@pytest.mark.parametrize("rank", [0, 1])
def test_where_a_rank_is_killed_all_end_and_the_cause_is_named(rank, photos, whole, tmp_path):
    with started(photos, tmp_path / "r", faults=[PERTURBED | {"do": "SIGKILL", "rank": rank}]) as process:
        said = process.stderr.read()
    assert process.returncode == 9, said
    assert re.search(rf"error: rank {rank} \(process \d+\) was ended by SIGKILL", said)
    assert "Traceback" not in said
    found = status(tmp_path / "r")
    assert (found["state"], found["exit_code"]) == ("failed", 9)
    assert found["error"]["what"].startswith(f"rank {rank}")
    goes_on_to_the_end_of(tmp_path / "r", whole)


@row(12)
def test_a_run_whose_end_is_written_is_not_said_to_run_by_a_step_that_was_under_way(tmp_path, monkeypatch):
    monkeypatch.setattr(run_log, "_HEARTBEAT", 0.0)
    log = run_log.RunLog.create(tmp_path / "r", "", {}, total_steps=9)
    log.heartbeat(3)
    log.status("failed", 9, WorkerLost("the launcher is gone"))  # from the thread that watches it
    log.heartbeat(4)
    log.close()
    assert (status(tmp_path / "r")["state"], status(tmp_path / "r")["step"]) == ("failed", 3)


@row(12)
def test_where_the_launcher_is_killed_the_ranks_end_and_say_so(photos, whole, tmp_path):
    with started(photos, tmp_path / "r", faults=[PERTURBED | {"do": "parent SIGKILL", "rank": 1}]) as process:
        assert process.wait(timeout=60) == -signal.SIGKILL
        assert at_work_on(tmp_path / "r")  # the ranks have not seen it yet
    found = status(tmp_path / "r")
    assert (found["state"], found["exit_code"]) == ("failed", 9)
    assert found["error"]["what"] == "the launcher is gone"
    goes_on_to_the_end_of(tmp_path / "r", whole)


@row(12)
@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_that_begin_again_come_to_the_same_end(rank, photos, whole, tmp_path):
    kill = PERTURBED | {"do": "SIGKILL", "rank": rank}
    done = run(photos, tmp_path / "r", *TWO, "--max-restarts", "1", faults=[kill])
    assert done.returncode == 0, done.stderr
    assert f"rank {rank}" in done.stderr
    assert "all ranks begin again" in done.stderr
    # If it was rank 0, it may still have been writing the one of step 6.
    assert re.search("resume  step-00000[56]" if rank == 0 else "resume  step-000006", done.stderr)
    assert fingerprint(tmp_path / "r") == fingerprint(whole)


@row(12)
def test_what_a_restart_would_not_mend_is_not_tried_again(photos, tmp_path):
    bad = {"at": "each loss", "call": 15, "do": "nan", "rank": 1}
    done = run(photos, tmp_path / "r", *TWO, "--max-restarts", "3", faults=[bad | {"at": "train loss"}])
    assert done.returncode == 7, done.stderr
    assert "resume  " not in done.stderr
    assert done.stderr.count("error:") == 1


@row(12)
def test_three_ranks_go_on_to_the_same_end(photos, tmp_path):
    """Sums of three numbers depend on their order: torch arranges its reductions anew after the first step."""
    three = ("--processes", "3", "--batch-size", "3", "--epochs", "10 steps")
    assert run(photos, tmp_path / "whole", *three).returncode == 0
    died = run(photos, tmp_path / "r", *three, faults=[PERTURBED | {"do": "SIGKILL", "rank": 2}])
    assert died.returncode == 9, died.stderr
    goes_on_to_the_end_of(tmp_path / "r", tmp_path / "whole")


@row(12)
def test_a_sharded_run_goes_on_to_the_same_end(photos, tmp_path):
    sharded = (*TWO, "--shard", "--epochs", "10 steps")
    assert run(photos, tmp_path / "whole", *sharded).returncode == 0
    died = run(photos, tmp_path / "r", *sharded, faults=[PERTURBED | {"do": "SIGKILL", "rank": 1}])
    assert died.returncode == 9, died.stderr
    goes_on_to_the_end_of(tmp_path / "r", tmp_path / "whole")


@row(12)
def test_an_error_of_one_rank_is_said_once_and_before_what_follows_from_it(photos, tmp_path):
    fault = {"at": "read images", "call": 9, "do": "EIO", "rank": 1}
    done = run(photos, tmp_path / "r", *TWO, faults=[fault])
    assert done.returncode == 8, done.stderr
    assert done.stderr.count("error:") == 1
    assert "error: rank 1: " in done.stderr
    assert status(tmp_path / "r")["exit_code"] == 8


@row(13)
@pytest.mark.parametrize(("rank", "do"), [(1, "hang"), (1, "SIGSTOP"), (0, "SIGSTOP")])
def test_a_rank_that_does_not_answer_is_named(rank, do, photos, whole, tmp_path):
    """Also if it is the one through which they ask each other."""
    fault = PERTURBED | {"do": do, "rank": rank}
    with started(photos, tmp_path / "r", "--step-timeout", "0.05", faults=[fault]) as process:
        said = process.stderr.read()
    assert process.returncode == 9, said
    assert f"error: rank {rank} is stuck: after step 7 nothing has moved" in said
    assert status(tmp_path / "r")["error"]["what"].startswith(f"rank {rank} is stuck")
    goes_on_to_the_end_of(tmp_path / "r", whole)


# ---------------------------------------------------------------------------------------------------- joint decisions


@row(10)
@pytest.mark.parametrize("call", [15, 16])
def test_a_value_that_is_not_finite_on_one_rank_skips_the_step_on_all(call, photos, tmp_path):
    """In pass 1 and in pass 2 of a step; the first call of all arranges the reductions."""
    fault = {"at": "train loss", "call": call, "do": "nan", "rank": 1}
    done = run(photos, tmp_path / "r", *TWO, "--on-nan", "skip", "--json", faults=[fault])
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["skipped_steps"] == 1


@row(11)
@pytest.mark.parametrize(
    "at",
    [
        "perturb",
        "backward",
        "train loss",
    ],
)
def test_memory_that_runs_out_on_one_rank_halves_the_images_of_all(at, photos, tmp_path):
    fault = {"at": at, "call": 8, "do": "oom", "rank": 1}
    done = run(photos, tmp_path / "r", *TWO, "--json", faults=[fault])
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("no memory for 4 images at once; from now on 2") == 1
    assert json.loads(done.stdout)["steps"] == 15


@row(11)
def test_memory_that_does_not_suffice_for_one_image_ends_all(photos, tmp_path):
    fault = {"at": "perturb", "call": 8, "do": "oom", "rank": 1, "again": True}
    done = run(photos, tmp_path / "r", *TWO, faults=[fault])
    assert done.returncode == 6, done.stderr
    assert done.stderr.count("error:") == 1
    assert "one image" in done.stderr


# ------------------------------------------------------------------------------------------------------------- devices


@row(28)
@pytest.mark.parametrize("command", ["run", "eval"])
def test_gpus_that_are_not_there_are_refused_with_what_was_found(command, photos, whole, tmp_path):
    own = ["run", *SETTINGS, "--dataset", photos, "--output", tmp_path / "r"] if command == "run" else ["eval", whole]
    for gpus, said in (("8", "no GPUs"), ("all", "no GPUs"), ("0,2", "no GPUs")):
        done = samtune(*own, "--gpus", gpus, env={"CUDA_VISIBLE_DEVICES": ""})
        assert done.returncode == 8, done.stderr
        assert said in done.stderr
        assert "CUDA_VISIBLE_DEVICES is empty" in done.stderr
    assert not (tmp_path / "r").exists()


@row(28)
@pytest.mark.parametrize("gpus", ["auto", "0"])
def test_without_a_gpu_the_cpu_computes_and_says_so(gpus, photos, tmp_path):
    more = ("--gpus", gpus, "--epochs", "1")
    done = run(photos, tmp_path / "r", *more, env={"CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 0, done.stderr
    assert "device  cpu" in done.stderr


@row(24)
def test_another_number_of_ranks_is_another_run_unless_it_is_allowed(photos, tmp_path):
    fixed = ("--processes", "2", "--global-batch-size", "8", "--batch-size", "4")
    assert run(photos, tmp_path / "r", *fixed, faults=[PERTURBED | {"do": "SIGTERM", "rank": 0}]).returncode == 75
    refused = resume(tmp_path / "r", "--processes", "1")
    assert refused.returncode == 5, refused.stderr
    assert "started with 2 devices" in refused.stderr
    done = resume(tmp_path / "r", "--processes", "1", "--allow-change", "gpus")
    assert done.returncode == 0, done.stderr
    assert "8 images (4 per device x 1 device x 2 micro-batches = 8)" in done.stderr
    assert run(photos, tmp_path / "o", *TWO, faults=[PERTURBED | {"do": "SIGTERM", "rank": 0}]).returncode == 75
    refused = resume(tmp_path / "o", "--processes", "1", "--allow-change", "gpus")
    assert refused.returncode == 5, refused.stderr
    assert "--global-batch-size" in refused.stderr


@row(4)
def test_a_second_ctrl_c_ends_ranks_that_are_well(photos, tmp_path):
    """They may have ended by the first one already: at any moment it is one of the two, and nobody is left."""
    with started(photos, tmp_path / "r", "--epochs", "10000") as process:
        process.send_signal(signal.SIGINT)
        said = "".join(iter_until(process.stderr, "SIGINT: the ranks end after their step"))
        process.send_signal(signal.SIGINT)
        said += process.stderr.read()
    assert process.returncode in (75, 130), said
    assert "Traceback" not in said


@row(12)
def test_a_rank_that_is_lost_while_the_others_prepare_begins_again_too(photos, whole, tmp_path):
    fault = {"at": "build model", "call": 1, "do": "SIGKILL", "rank": 0}
    done = run(photos, tmp_path / "r", *TWO, "--max-restarts", "1", faults=[fault])
    assert done.returncode == 0, done.stderr
    assert fingerprint(tmp_path / "r") == fingerprint(whole)


@row(12)
@pytest.mark.parametrize("at", ["exit with launcher", "build model"])
def test_where_the_launcher_is_killed_while_ranks_begin_none_is_left(at, photos, tmp_path):
    fault = {"at": at, "call": 1, "do": "parent SIGKILL", "rank": 0}
    command = ["run", *SETTINGS, "--dataset", photos, "--output", tmp_path / "r", *TWO, "--epochs", "10000"]
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.support.fault_injection", json.dumps([fault]), *map(str, command)],
        stderr=subprocess.DEVNULL,
        cwd=ROOT,
        start_new_session=True,
    )
    try:
        assert process.wait(timeout=60) == -signal.SIGKILL
        until(lambda: not at_work_on(tmp_path / "r"), seconds=20)
    finally:
        for pid in at_work_on(tmp_path / "r"):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
