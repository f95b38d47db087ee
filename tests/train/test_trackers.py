"""Trackers show what metrics.jsonl says, and none of them costs a run."""

import json
import re
import socket
import struct
import sys
import threading

import numpy as np
import pytest
import wandb
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto.wandb_internal_pb2 import Record

from samtune.cli.main import app
from samtune.config import loading
from samtune.errors import UsageError
from samtune.runs.metrics import read_metrics
from samtune.runs.run_log import RunLog
from samtune.train import trackers
from samtune.train.trackers import Trackers
from tests.conftest import samtune
from tests.support.fault_matrix import row
from tests.support.fingerprint import fingerprint
from tests.support.small_run import SETTINGS, resume, run, status

BOTH = ("--track", "tensorboard,wandb")


def numbers(metrics):
    """What a tracker is to show of a row of metrics."""
    kept = {key: value for key, value in metrics.items() if type(value) in (int, float) and key != "step"}
    return {f"{metrics['split']}/{key}": value for key, value in kept.items()}


def events(folder):
    """All that TensorBoard reads there."""
    read = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0})
    return read.Reload()


def points(read):
    """name -> (step, value)s of scalars, which TensorBoard keeps in single precision."""
    return {name: [(event.step, event.value) for event in read.Scalars(name)] for name in read.Tags()["scalars"]}


def text(read, name):
    return read.Tensors(f"{name}/text_summary")[-1].tensor_proto.string_val[0].decode()


def wandb_records(folder):
    """What `wandb sync` would send: a log in LevelDB's format (blocks of 32 KiB; W&B's own header of 7 bytes)."""
    (path,) = (folder / "wandb").glob("offline-run-*/*.wandb")
    content, at, parts, records = path.read_bytes(), 7, [], []
    while at < len(content):
        room = 2**15 - at % 2**15
        if room < 7:
            at += room
            continue
        _, length, kind = struct.unpack("<IHB", content[at : at + 7])
        parts.append(content[at + 7 : at + 7 + length])
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part of one
            records.append(Record.FromString(b"".join(parts)))
            parts = []
    return records


def wandb_rows(records):
    rows = []
    for record in records:
        if record.WhichOneof("record_type") == "history":
            named = {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
            rows.append({name: value for name, value in named.items() if not name.startswith("_")})
    return rows


def assert_shown(folder):
    """Both trackers have the rows of metrics.jsonl: all, once, in their order."""
    rows = read_metrics(folder)
    expected = {}
    for metrics in rows:
        for name, value in numbers(metrics).items():
            expected.setdefault(name, []).append((metrics["step"], float(np.float32(value))))
    assert expected
    assert points(events(folder)) == expected
    assert wandb_rows(wandb_records(folder)) == [numbers(metrics) | {"step": metrics["step"]} for metrics in rows]


# ------------------------------------------------------------------------------------------------------------ real runs


@pytest.fixture(scope="module")
def tracked(tmp_path_factory, photos):
    """A run whose best checkpoint, scored last, is not of its last step."""
    folder = tmp_path_factory.mktemp("runs") / "tracked"
    done = samtune("run", *SETTINGS, "--dataset", photos, "--output", folder, *BOTH, "--select", "best", "--json")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("wandb") == 0
    return folder, json.loads(done.stdout)


def test_both_trackers_show_the_rows_of_metrics(tracked):
    folder, _ = tracked
    assert_shown(folder)
    assert {"train/loss", "val/top1_error", "val_ema/loss", "test/loss", "train/rho"} <= points(events(folder)).keys()
    assert not status(folder)["degraded"]


def test_tensorboard_has_the_settings_the_result_and_the_time_of_each_row(tracked):
    folder, result = tracked
    read = events(folder)
    settings = [line.removeprefix("    ") for line in text(read, "config").splitlines()]
    assert settings == (folder / "config.toml").read_text().splitlines()
    assert f"{result['test']['wrong']} of {result['test']['n']} wrong" in text(read, "report")
    seconds = [metrics["seconds"] for metrics in read_metrics(folder) if metrics["split"] == "val"]
    times = [event.wall_time for event in read.Scalars("val/loss")]
    assert np.allclose(np.diff(times), np.diff(seconds), atol=1e-4)


def test_wandb_has_the_settings_and_the_result_under_the_name_of_the_run_folder(tracked):
    folder, result = tracked
    records = wandb_records(folder)
    (begun,) = (record.run for record in records if record.WhichOneof("record_type") == "run")
    assert (begun.display_name, begun.project) == ("tracked", "samtune")
    settings = {item.key: json.loads(item.value_json) for item in begun.config.update}
    assert (settings["rho"], settings["epochs"], settings["output"]) == (0.05, "3 epochs", str(folder))
    summaries = [item for record in records for item in record.summary.update if item.key == "report"]
    assert json.loads(summaries[-1].value_json)["test"] == result["test"]
    assert records[-1].exit.exit_code == 0


# ----------------------------------------------------------------------------------------------- without a run around


def settings(**more):
    return loading.load(None, {"model": "test_resnet", "dataset": "mnist5k", "track": "tensorboard,wandb"} | more)


def log_rows(log, steps):
    for step in steps:
        log.metrics(step=step, epoch=1, split="train", loss=1 / step)


def reopen(folder, held, step, metrics_bytes):
    return RunLog.reopen(folder, held, 9, step=step, seconds=1.0, metrics_bytes=metrics_bytes)


def test_a_run_that_goes_on_is_the_same_run_without_missing_or_double_rows(tmp_path):
    """Also those of a part without trackers."""
    folder = tmp_path / "r"
    log = RunLog.create(folder, "", {}, total_steps=9)
    log_rows(log, [1])
    with Trackers(settings(), log):
        log_rows(log, [2])
        saved = log.synced_metrics_bytes()
        log_rows(log, [3, 4])
    wandb.teardown()  # as at a process's end, for which W&B writes on
    assert_shown(folder)
    name = (folder / "wandb" / "run-id.txt").read_text()
    log = reopen(folder, log._lock, 2, saved)
    with Trackers(settings(), log):
        log_rows(log, [3, 5])
    wandb.teardown()
    log.close()
    assert [metrics["step"] for metrics in read_metrics(folder)] == [1, 2, 3, 5]
    assert_shown(folder)
    assert [path.name.rpartition("-")[2] for path in (folder / "wandb").glob("offline-run-*")] == [name]
    assert not log.degraded


class Fake(trackers._Tracker):
    """Remembers its calls, and breaks in one of them."""

    package = "json"
    breaks_in, breaks = "", None

    def __init__(self, folder, config, started):
        self.called("start", "start")

    def log_row(self, index, row):
        self.called("row", (index, row["step"]))

    def finish(self, result):
        self.called("finish", result)

    def called(self, name, call):
        self.calls.append(call)
        if name == self.breaks_in:
            self.breaks()


def fail():
    raise RuntimeError("no route to host\nand much more")


@pytest.fixture
def run_with(tmp_path, monkeypatch):
    """Two steps with a tracker that breaks, and one that does not; returns the log, and the calls of both."""

    def track(breaks_in, breaks):
        broken = type("Broken", (Fake,), {"calls": [], "breaks_in": breaks_in, "breaks": lambda self: breaks()})
        whole = type("Whole", (Fake,), {"calls": []})
        monkeypatch.setattr(trackers, "_TRACKERS", {"tensorboard": broken, "wandb": whole})
        log = RunLog.create(tmp_path / "r", "", {}, total_steps=9)
        with Trackers(settings(), log) as both:
            log_rows(log, [1, 2])
            both.result = "report"
        log.close()
        assert log.degraded
        assert "tracker tensorboard" in log.notes.read_text()
        return broken.calls, whole.calls

    return track


@pytest.mark.parametrize("breaks", [fail, sys.exit], ids=["raises", "exits"])
@pytest.mark.parametrize(
    ("breaks_in", "calls"),
    [("start", ["start"]), ("row", ["start", (0, 1)]), ("finish", ["start", (0, 1), (1, 2), "report"])],
)
def test_a_tracker_that_fails_is_left_out_with_one_warning_and_the_other_stays(
    breaks_in, calls, breaks, run_with, capsys
):
    assert run_with(breaks_in, breaks) == (calls, ["start", (0, 1), (1, 2), "report"])
    stderr = capsys.readouterr().err
    assert stderr.count("warning") == 1
    assert "tracker tensorboard is left out" in stderr
    assert ("no route to host" in stderr) == (breaks is fail)
    assert "much more" not in stderr


def test_a_tracker_that_hangs_at_its_end_is_left_out_and_the_other_ends(run_with, monkeypatch, capsys):
    monkeypatch.setattr(trackers, "_END_TIMEOUT", 0.5)
    released = threading.Event()
    _, whole = run_with("finish", released.wait)
    released.set()
    assert whole == ["start", (0, 1), (1, 2), "report"]
    stderr = capsys.readouterr().err
    assert stderr.count("warning") == stderr.count("tracker tensorboard is left out: it does not answer") == 1


def test_only_rank_0_has_trackers(tmp_path, monkeypatch):
    monkeypatch.setattr(trackers.environment, "is_rank0", lambda: False)
    log = RunLog.create(tmp_path / "r", "", {}, total_steps=9)
    with Trackers(settings(), log):
        log_rows(log, [1])
    log.close()
    assert not {"tensorboard", "wandb"} & {path.name for path in (tmp_path / "r").iterdir()}


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_tracker_whose_package_is_missing_is_refused_before_the_run_begins(name, photos, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, trackers._TRACKERS[name].package, None)
    arguments = ["run", *SETTINGS, "--dataset", str(photos), "--output", str(tmp_path / "r"), "--track", name]
    with pytest.raises(UsageError, match=re.escape("pip install 'samtune[track]'")):
        app(arguments, standalone_mode=False)
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("track", ["none", "tensorboard", "wandb", "tensorboard,wandb", "wandb,tensorboard"])
def test_trackers_are_a_text_or_a_list_and_come_back_from_the_resolved_settings(track, tmp_path):
    given = settings(track=track)
    assert given.track == settings(track=track.split(",")).track == track
    (tmp_path / "config.toml").write_text(given.to_toml())
    assert loading.load(tmp_path / "config.toml").track == track
    assert trackers._names(track) == [name for name in track.split(",") if name in trackers._TRACKERS]


@pytest.mark.parametrize("track", ["", "mlflow", "none,wandb", "wandb,wandb", ["wandb", 1], [], 1, None])
def test_what_is_no_tracker_is_refused(track):
    with pytest.raises(UsageError, match=r'"none", "tensorboard", "wandb"'):
        settings(track=track)


# ---------------------------------------------------------------------------------- row 29: what may go wrong in a run


@row(29)
def test_a_run_with_trackers_that_is_killed_and_goes_on_equals_one_without(photos, uninterrupted, tmp_path):
    fault = {"at": "perturb", "call": 12, "do": "SIGKILL"}
    assert run(photos, tmp_path / "r", *BOTH, faults=[fault]).returncode == -9
    assert resume(tmp_path / "r").returncode == 0
    assert fingerprint(tmp_path / "r") == fingerprint(uninterrupted)
    assert_shown(tmp_path / "r")


@row(29)
def test_trackers_may_join_and_leave_when_a_run_goes_on(broken_off, uninterrupted):
    fault = {"at": "perturb", "call": 5, "do": "SIGTERM"}
    assert resume(broken_off, *BOTH, faults=[fault]).returncode == 75
    assert_shown(broken_off)
    rows = len(read_metrics(broken_off))
    assert resume(broken_off, "--track", "none").returncode == 0
    assert len(wandb_rows(wandb_records(broken_off))) == rows < len(read_metrics(broken_off))
    assert fingerprint(broken_off) == fingerprint(uninterrupted)


@row(29)
@pytest.mark.parametrize("at", ["start TensorBoard", "TensorBoard row", "end TensorBoard"])
def test_a_tracker_whose_disk_is_full_costs_a_warning_and_not_the_run(at, photos, uninterrupted, tmp_path):
    fault = {"at": at, "call": 1, "do": "ENOSPC"}
    done = run(photos, tmp_path / "r", *BOTH, faults=[fault])
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("is left out") == done.stderr.count("No space left on device") == 1
    assert (status(tmp_path / "r")["state"], status(tmp_path / "r")["degraded"]) == ("done", True)
    assert fingerprint(tmp_path / "r") == fingerprint(uninterrupted)
    assert len(wandb_rows(wandb_records(tmp_path / "r"))) == len(read_metrics(tmp_path / "r"))


@row(29)
def test_a_server_that_does_not_answer_costs_a_warning_and_not_the_run(photos, uninterrupted, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        network = {"WANDB_MODE": "online", "WANDB_BASE_URL": address, "WANDB_API_KEY": "0" * 40}
        done = run(photos, tmp_path / "r", *BOTH, env=network)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("tracker wandb is left out") == done.stderr.count("is left out") == 1
    assert "Traceback" not in done.stderr
    assert (status(tmp_path / "r")["state"], status(tmp_path / "r")["degraded"]) == ("done", True)
    assert fingerprint(tmp_path / "r") == fingerprint(uninterrupted)


@row(29)
def test_a_tracker_that_hangs_does_not_keep_the_ranks_from_ending(photos, tmp_path):
    fault = {"at": "end TensorBoard", "call": 1, "do": "hang", "rank": 0}
    done = run(photos, tmp_path / "r", *BOTH, "--processes", 2, faults=[fault])
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("tracker tensorboard is left out: it does not answer") == 1
    assert status(tmp_path / "r")["degraded"]
    assert len(list((tmp_path / "r" / "tensorboard").iterdir())) == 1
    assert_shown(tmp_path / "r")
