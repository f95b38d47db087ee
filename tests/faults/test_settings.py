"""Going on with other settings, and with a run that is done (rows 24 and 25)."""

import json
import shutil

import pytest

from tests.conftest import samtune, write_image_folder
from tests.support.fault_matrix import row
from tests.support.fingerprint import fingerprint
from tests.support.small_run import SETTINGS, resume, run, status


@row(24)
@pytest.mark.parametrize(
    ("setting", "value"),
    [("lr", 0.02), ("batch_size", 16), ("model", "resnet18"), ("dataset", "./elsewhere"), ("seed", 1), ("rho", 0.1)],
)
def test_another_setting_is_refused_with_5_and_a_table(setting, value, broken_off):
    refused = samtune("run", "--resume", "--output", broken_off, "--" + setting.replace("_", "-"), value, "-j", 1)
    assert refused.returncode == 5
    table = [line.split() for line in refused.stderr.splitlines()]
    changed = next(line for line in table if setting in line[:1])
    assert changed[2] == str(value)
    assert changed[3:] in (["cannot", "change"], ["--allow-change", setting, "lets", "it"])
    assert ["workers", "0", "1", "allowed"] in table
    assert "Traceback" not in refused.stderr


@row(24)
def test_what_changes_no_number_may_differ_and_what_is_allowed_does(broken_off, photos, uninterrupted):
    same = resume(broken_off, "--workers", 1, "--save-every", "1 epochs", "--keep-checkpoints", 1, "--cache-limit", 0)
    assert same.returncode == 0, same.stderr
    assert fingerprint(broken_off) == fingerprint(uninterrupted)


@row(24)
def test_an_allowed_change_takes_effect_and_is_written_down(broken_off, uninterrupted):
    done = resume(
        broken_off, "--lr", 0.002, "--epochs", 4, "--allow-change", "lr", "--allow-change", "epochs", "--json"
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["steps"] == 20
    assert result["optimizer"]["lr"] == 0.002
    assert result["resumed"][0]["changed"] == {"lr": ["0.01", "0.002"], "epochs": ["3 epochs", "4 epochs"]}
    assert "lr = 0.002 " in (broken_off / "config.toml").read_text()
    assert fingerprint(broken_off)["weights"] != fingerprint(uninterrupted)["weights"]


@row(24)
def test_a_length_that_is_passed_already_is_refused_and_nothing_is_changed(broken_off):
    before = (broken_off / "config.toml").read_text()
    refused = resume(broken_off, "--epochs", "5 steps", "--allow-change", "epochs")
    assert refused.returncode == 5
    assert "7 steps already" in refused.stderr
    assert (broken_off / "config.toml").read_text() == before


@row(24)
def test_arithmetic_may_be_allowed_to_change(broken_off):
    done = resume(broken_off, "--amp-dtype", "float16", "--allow-change", "amp_dtype", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["precision"] == "float16"


@row(24)
def test_the_data_may_have_moved_but_not_changed(broken_off, photos, tmp_path, uninterrupted):
    shutil.copytree(photos, tmp_path / "moved" / "pets")
    other = write_image_folder(tmp_path / "other", {"train": 25, "test": 8})
    allowed = ["--allow-change", "dataset"]
    changed = resume(broken_off, "--dataset", other, *allowed)
    assert changed.returncode == 5
    assert "not what it was" in changed.stderr
    moved = resume(broken_off, "--dataset", tmp_path / "moved" / "pets", *allowed)
    assert moved.returncode == 0, moved.stderr
    assert fingerprint(broken_off) == fingerprint(uninterrupted)


@row(24)
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--resume"], "--output"),
        (["--allow-change", "lr"], "--resume"),
        (["--resume", "--output", "{run}", "--allow-change", "batch_size"], "cannot change within a run"),
        (["--resume", "--output", "{run}", "--allow-change", "learning_rat"], "no such setting"),
    ],
)
def test_what_cannot_be_meant_is_refused_with_2(arguments, said, broken_off):
    refused = samtune("run", *(argument.format(run=broken_off) for argument in arguments))
    assert refused.returncode == 2
    assert said in refused.stderr


@row(24)
def test_resume_where_no_run_is_yet_begins_one(photos, tmp_path, uninterrupted):
    done = run(photos, tmp_path / "r", "--resume")
    assert done.returncode == 0, done.stderr
    assert "a new one begins" in done.stderr
    assert fingerprint(tmp_path / "r") == fingerprint(uninterrupted)


@row(25)
def test_a_run_that_is_done_says_so_and_prints_its_result(uninterrupted, photos):
    before = {path: path.stat().st_mtime_ns for path in uninterrupted.rglob("*")}
    again = samtune("run", *SETTINGS, "--dataset", photos, "--output", uninterrupted, "--resume", "-j", 1, "--json")
    assert again.returncode == 0
    assert "is done" in again.stderr
    written = json.loads((uninterrupted / "report.json").read_text())
    assert json.loads(again.stdout) == {"folder": str(uninterrupted), **written}
    assert {path: path.stat().st_mtime_ns for path in uninterrupted.rglob("*")} == before
    assert status(uninterrupted)["state"] == "done"
