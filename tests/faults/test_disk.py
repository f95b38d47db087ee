"""Damaged checkpoints, full disks, folders that cannot be written (rows 5 to 9 and 26)."""

import hashlib
import json
import os
import signal
import subprocess
import sys

import pytest
import torch

from samtune.runs.metrics import read_metrics
from samtune.runs.run_log import RunLog
from tests.conftest import Bomb, samtune
from tests.runs.test_checkpoint import flip
from tests.support.fault_matrix import row
from tests.support.fingerprint import fingerprint
from tests.support.small_run import resume, run, status, step_of

WRITE, FILES = "write checkpoint file", 6


def newest(run_folder):
    return run_folder / "checkpoints" / "step-000007"


DAMAGE = {
    "weights_with_a_flipped_bit": lambda folder: flip(folder / "model.safetensors"),
    "averaged_weights_with_a_flipped_bit": lambda folder: flip(folder / "ema" / "model.safetensors"),
    "state_with_a_flipped_bit": lambda folder: flip(folder / "state.pt"),
    "truncated_weights": lambda folder: os.truncate(folder / "model.safetensors", 1000),
    "empty_state": lambda folder: (folder / "state.pt").write_bytes(b""),
    "no_weights": lambda folder: (folder / "model.safetensors").unlink(),
    "no_manifest": lambda folder: (folder / "manifest.json").unlink(),
    "empty_manifest": lambda folder: (folder / "manifest.json").write_bytes(b""),
}


@row(5)
@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_leads_to_the_same_end(kind, broken_off, uninterrupted):
    DAMAGE[kind](newest(broken_off))
    done = resume(broken_off)
    assert done.returncode == 0, done.stderr
    assert "step-000007" in done.stderr
    assert "going on from step-000006" in done.stderr
    assert fingerprint(broken_off) == fingerprint(uninterrupted)


@row(5)
def test_where_no_valid_checkpoint_is_left_all_are_named_and_the_code_is_5(broken_off):
    for folder in (broken_off / "checkpoints").glob("step-*"):
        (folder / "state.pt").unlink()
    done = resume(broken_off)
    assert done.returncode == 5
    assert all(name in done.stderr for name in ("step-000005", "step-000006", "step-000007", "state.pt"))
    assert "Traceback" not in done.stderr


@row(5)
@pytest.mark.parametrize("lost", ["provenance.json", "metrics.jsonl", "status.json"])
def test_a_run_that_lost_a_record_goes_on_and_says_what_it_lacks(lost, broken_off, uninterrupted):
    (broken_off / lost).unlink()
    done = resume(broken_off, "--json")
    assert done.returncode == 0, done.stderr
    passes = json.loads(done.stdout)["cost"]["forward_backward_passes"]
    assert passes == (None if lost == "metrics.jsonl" else 30)
    assert (lost in done.stderr) == (lost != "status.json")  # which is written anew
    assert fingerprint(broken_off)["weights"] == fingerprint(uninterrupted)["weights"]
    assert status(broken_off)["degraded"] == (lost == "metrics.jsonl")


@row(5)
def test_a_run_that_lost_its_settings_is_told_where_they_are(broken_off):
    (broken_off / "config.toml").unlink()
    refused = resume(broken_off)
    assert refused.returncode == 5
    assert "manifest.json" in refused.stderr


@row(6)
def test_the_newest_checkpoint_is_that_of_the_latest_step_whatever_links_and_clocks_say(broken_off, uninterrupted):
    for step, time in ((5, 2_000_000_000), (6, 1_000_000_000), (7, 1)):
        os.utime(broken_off / "checkpoints" / f"step-{step:06d}", (time, time))
    (broken_off / "checkpoints" / "last").unlink()
    (broken_off / "checkpoints" / "last").symlink_to("step-000099")
    done = resume(broken_off)
    assert done.returncode == 0, done.stderr
    assert "resume  step-000007" in done.stderr
    assert fingerprint(broken_off) == fingerprint(uninterrupted)


@pytest.fixture
def disk(tmp_path, request):
    """A disk in memory; its options are the parameter."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", request.param, "tmpfs", place]
    mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"no disk can be mounted here: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", "--lazy", place], check=True)


# A checkpoint of the small run has 5 MB.
with_room = pytest.mark.parametrize("disk", ["size=300m"], indirect=True)


@row(7)
@with_room
def test_where_the_disk_is_full_older_checkpoints_make_room(disk, photos, uninterrupted):
    fault = {"at": WRITE, "call": 8 * FILES + 2, "do": f"fill {disk / 'filler'}"}  # in the last save
    done = run(photos, disk / "r", faults=[fault])
    assert done.returncode == 0, done.stderr
    assert "removed to make room" in done.stderr
    assert fingerprint(disk / "r") == fingerprint(uninterrupted)


@row(7)
@with_room
def test_where_it_stays_full_the_run_ends_with_8_and_goes_on_when_there_is_room(disk, photos, uninterrupted):
    fault = {"at": WRITE, "call": 3 * FILES + 2, "do": f"fill {disk / 'filler'}", "again": True}
    ended = run(photos, disk / "r", faults=[fault])
    assert ended.returncode == 8, ended.stderr
    assert "No space left on device" in ended.stderr
    assert "is intact" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert not list((disk / "r" / "checkpoints").glob(".*"))
    assert samtune("eval", disk / "r", "--split", "val").returncode == 0
    (disk / "filler").unlink()
    assert resume(disk / "r").returncode == 0
    assert fingerprint(disk / "r") == fingerprint(uninterrupted)


@row(7)
def test_a_limit_on_the_size_of_files_ends_the_run_with_8_and_the_last_checkpoint_stays(photos, tmp_path):
    fault = {"at": WRITE, "call": 4 * FILES + 1, "do": "limit 1000000"}
    ended = run(photos, tmp_path / "r", faults=[fault])
    assert ended.returncode == 8, ended.stderr
    assert "File too large" in ended.stderr
    assert (status(tmp_path / "r")["state"], status(tmp_path / "r")["exit_code"]) == ("failed", 8)
    assert step_of(tmp_path / "r") == 6  # after steps 2, 4, 5 and 6 it had been saved
    assert samtune("eval", tmp_path / "r", "--split", "val").returncode == 0


@row(7)
@pytest.mark.parametrize("disk", ["size=4m"], indirect=True)
def test_a_disk_without_room_for_the_checkpoints_is_refused_before_training(disk, photos):
    refused = run(photos, disk / "r")
    assert refused.returncode == 8
    assert "checkpoints need" in refused.stderr
    assert list(disk.iterdir()) == []


@row(8)
def test_a_log_that_cannot_be_written_degrades_the_run_and_does_not_end_it(broken_off, uninterrupted):
    (broken_off / "log.txt").unlink()
    (broken_off / "log.txt").symlink_to("/dev/full")
    (broken_off / "report.md").mkdir()
    done = resume(broken_off)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("No space left on device") == 1
    assert status(broken_off)["degraded"]
    assert status(broken_off)["state"] == "done"
    assert fingerprint(broken_off) == fingerprint(uninterrupted)


@row(8)
def test_rows_of_metrics_wait_for_room(tmp_path):
    log = RunLog.create(tmp_path / "r", "", {}, total_steps=3)
    log.metrics(step=1, epoch=1, split="train")
    (tmp_path / "r" / "metrics.jsonl").rename(tmp_path / "kept")
    (tmp_path / "r" / "metrics.jsonl").symlink_to("/dev/full")
    log.metrics(step=2, epoch=1, split="train")
    assert log.degraded
    (tmp_path / "kept").rename(tmp_path / "r" / "metrics.jsonl")
    log.metrics(step=3, epoch=1, split="train")
    log.close()
    assert [found["step"] for found in read_metrics(tmp_path / "r")] == [1, 2, 3]


@row(8)
@pytest.mark.parametrize("disk", ["size=64k"], indirect=True)
def test_half_a_row_for_which_there_was_no_room_is_cut_off_and_written_whole_later(disk):
    log = RunLog.create(disk / "r", "", {}, total_steps=9)
    (disk / "filler").write_bytes(bytes(32 * 1024))
    steps = 0
    while not log.degraded:
        steps += 1
        log.metrics(step=steps, epoch=1, split="train", note="x" * 3000)
    assert log.synced_metrics_bytes() < (disk / "r" / "metrics.jsonl").stat().st_size  # which ends within a row
    (disk / "filler").unlink()
    log.metrics(step=steps + 1, epoch=1, split="train")
    log.close()
    assert [found["step"] for found in read_metrics(disk / "r")] == list(range(1, steps + 2))
    assert log.synced_metrics_bytes() == (disk / "r" / "metrics.jsonl").stat().st_size


@row(9)
@pytest.mark.parametrize("disk", ["ro"], indirect=True)
def test_a_folder_on_a_disk_that_cannot_be_written_is_refused_with_8(disk, photos):
    refused = run(photos, disk / "r")
    assert refused.returncode == 8
    assert "not a writable folder" in refused.stderr


@row(9)
def test_the_folder_of_another_run_is_refused_with_2(photos, uninterrupted):
    refused = run(photos, uninterrupted)
    assert refused.returncode == 2
    assert "--resume" in refused.stderr


@row(9)
@pytest.mark.parametrize("how", ["new", "--resume"])
def test_a_folder_that_another_process_uses_is_refused_with_8_and_the_pid(how, broken_off, photos):
    hold = (
        "import sys; from samtune.runs import lock; from pathlib import Path; held = lock.acquire(Path(sys.argv[1]));"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", hold + "print(flush=True); sys.stdin.read()", broken_off],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert other.stdout is not None
    other.stdout.readline()
    refused = resume(broken_off) if how == "--resume" else run(photos, broken_off)
    other.communicate()
    assert refused.returncode == 8
    assert f"process {other.pid}" in refused.stderr


@row(8)
def test_what_breaks_in_a_validation_does_not_cost_the_steps_before_it(photos, uninterrupted, tmp_path):
    fault = {"at": "evaluate", "call": 3, "do": "EIO"}
    ended = run(photos, tmp_path / "r", "--save-every", "1000 steps", faults=[fault])
    assert ended.returncode == 8, ended.stderr
    assert "Input/output error" in ended.stderr
    assert step_of(tmp_path / "r") == 10
    assert resume(tmp_path / "r").returncode == 0
    assert fingerprint(tmp_path / "r") == fingerprint(uninterrupted)


@row(9)
def test_a_run_that_was_killed_does_not_keep_its_folder(photos, tmp_path):
    """Even while a process that loaded its data is still there."""
    fault = {"at": "perturb", "call": 7, "do": "SIGKILL"}
    died = run(photos, tmp_path / "r", "--aa", "rand", "--workers", "1", faults=[fault])
    assert died.returncode == -signal.SIGKILL
    assert resume(tmp_path / "r").returncode == 0


@row(26)
def test_a_checkpoint_that_holds_code_is_refused_with_5_and_nothing_is_executed(broken_off, tmp_path):
    for folder in (broken_off / "checkpoints").glob("step-*"):
        torch.save({"position": Bomb(tmp_path / "executed")}, folder / "state.pt")
        manifest = json.loads((folder / "manifest.json").read_text())
        content = (folder / "state.pt").read_bytes()
        manifest["files"]["state.pt"] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}
        (folder / "manifest.json").write_text(json.dumps(manifest))
    refused = resume(broken_off)
    assert refused.returncode == 5
    assert "nothing of it was executed" in refused.stderr
    assert not (tmp_path / "executed").exists()
