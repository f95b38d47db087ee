"""`--no-val`: a last fit trains on what would have been validated on, too."""

import json

import numpy as np
import pytest

from samtune.config import loading
from samtune.config.run_config import flag_name
from samtune.data import cache
from samtune.data.decode import decode
from samtune.data.splits import open_run_splits, split_hash
from samtune.errors import UsageError
from samtune.train import run_data
from tests.conftest import samtune, write_image_folder
from tests.data.test_noise import write_labels
from tests.support.fault_matrix import row
from tests.support.fingerprint import fingerprint
from tests.support.small_run import resume, run

SMALL = ("--model", "test_resnet", "--no-pretrained", "--img-size", 32, "--epochs", 1, "--lr", 0.01, "--workers", 0)
SPLITS = {"held_out": {"train": 10, "test": 2}, "official": {"train": 6, "validation": 4, "test": 2}}


@pytest.fixture(params=SPLITS)
def data(request, tmp_path):
    return write_image_folder(tmp_path / "data", SPLITS[request.param])


def settings(data, **given):
    return loading.load(None, {"model": "test_resnet", "dataset": str(data)} | given)


def encoded(split, rows):
    return [split.image_bytes(row) for row in rows.tolist()]


@pytest.mark.parametrize("limits", [{}, {"max_train": 5, "max_eval": 2}, {"train_fraction": 0.5, "val_fraction": 0.4}])
def test_the_rows_are_those_of_train_and_of_validation_with_their_labels(data, limits):
    before, after = open_run_splits(settings(data, **limits)), open_run_splits(settings(data, val=False, **limits))
    apart = zip(
        encoded(before.train, before.train_rows) + encoded(before.val, before.val_rows),
        [*before.train.labels[before.train_rows], *before.val.labels[before.val_rows]],
        strict=True,
    )
    together = zip(encoded(after.train, after.train_rows), after.train.labels[after.train_rows], strict=True)
    assert sorted(together) == sorted(apart)
    assert len(after.val_rows) == 0
    assert after.test_rows.tolist() == before.test_rows.tolist()


def test_no_image_is_decoded_again_and_the_pixels_are_those_of_its_row(data, tmp_path, monkeypatch):
    monkeypatch.setenv("SAMTUNE_CACHE", str(tmp_path / "cache"))
    calls = []
    monkeypatch.setattr(cache, "decode", lambda *a: calls.append(a) or decode(*a))
    run_data.load_run_data(settings(data))
    assert len(calls) == 24
    read = run_data.load_run_data(settings(data, val=False))
    assert len(calls) == 24
    rows = np.random.default_rng(0).permutation(read.train_rows)
    expected = [decode(one, lambda: "") for one in encoded(read.train.split, rows)]
    assert all((a == b).all() for a, b in zip(read.train.take(rows), expected, strict=True))
    assert all((read.train[row] == image).all() for row, image in zip(rows.tolist(), expected, strict=True))
    assert len(calls) == 24


def test_without_a_cache_the_pixels_are_the_same(data):
    read = run_data.load_run_data(settings(data, val=False, cache_limit=0.0))
    expected = [decode(one, lambda: "") for one in encoded(read.train.split, read.train_rows)]
    assert all((a == b).all() for a, b in zip(read.train.take(read.train_rows), expected, strict=True))


def test_damaged_images_of_both_parts_are_named_by_their_rows(data):
    validation = data / "validation" if (data / "validation").is_dir() else data / "train"
    for path in (data / "train" / "cat" / "1.png", validation / "dog" / "2.png"):
        path.write_bytes(b"no image")
    read = run_data.load_run_data(settings(data, val=False, on_bad_image="skip"))
    assert sorted(item["where"].rsplit("/")[-1].rstrip(")") for item in read.bad_images) == ["1.png", "2.png"]
    assert len(read.train_rows) == 18


@pytest.mark.parametrize("data", ["official"], indirect=True)
def test_a_run_without_validation_trains_on_all_is_scored_on_test_and_says_so(data, tmp_path):
    done = samtune("run", *SMALL, "--dataset", data, "--no-val", "--model-ema", "--output", tmp_path / "r", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert (result["dataset"]["train"], result["dataset"]["val"]) == (20, 0)
    assert (result["val"], result["best_epoch"], result["ema"]["val"]) == (None, None, None)
    assert result["test"]["n"] == result["ema"]["test"]["n"] == 4
    assert result["test_by_checkpoint"] == {"last": result["test"] | {"step": result["steps"]}}
    assert "val 0 (trained on, too)" in done.stderr
    splits = [json.loads(line)["split"] for line in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()]
    assert splits == ["train", "test", "test_ema"]
    parts = open_run_splits(settings(data, val=False))
    labels = parts.train.labels[parts.train_rows]
    assert result["dataset"]["split_hash"] == split_hash(parts.train_rows, labels, parts.val_rows, parts.val_rows)
    again = samtune("eval", tmp_path / "r", "--split", "train", "--json")
    assert json.loads(again.stdout)["n"] == 20
    refused = samtune("eval", tmp_path / "r", "--split", "val")
    assert (refused.returncode, "held nothing out" in refused.stderr) == (2, True)


@pytest.mark.parametrize("other", [{"select": "best"}, {"test": False}])
def test_what_needs_a_validation_contradicts_it(data, other):
    with pytest.raises(UsageError, match="contradict") as error:
        settings(data, val=False, **other)
    assert flag_name("select" if "select" in other else "no_test") in error.value.message


def test_a_data_set_without_test_has_nothing_left_to_score(tmp_path):
    data = write_image_folder(tmp_path, {"train": 6})
    with pytest.raises(UsageError, match="no test split"):
        open_run_splits(settings(data, val=False))


def test_label_noise_falls_on_all_that_is_trained_on(data):
    read = run_data.load_run_data(settings(data, val=False, label_noise=1.0))
    clean = open_run_splits(settings(data, val=False)).train.labels
    assert (read.train.split.labels[read.train_rows] == 1 - clean[read.train_rows]).all()
    assert read.noise.about["n"] == 20


def test_labels_of_a_file_are_those_of_train_and_official_validation_keeps_its_own(data, tmp_path):
    before = open_run_splits(settings(data))
    wrong = 1 - before.train.labels
    file = write_labels(tmp_path / "labels.csv", {"label": wrong.tolist()})
    read = run_data.load_run_data(settings(data, val=False, train_labels=str(file)))
    trained_on = read.train.split.labels
    assert trained_on[: len(wrong)].tolist() == wrong.tolist()
    official = before.val.labels.tolist() if before.val is not before.train else []
    assert trained_on[len(wrong) :].tolist() == official


@row(1)
def test_a_killed_run_without_validation_goes_on_to_the_same_end(photos, tmp_path):
    assert run(photos, tmp_path / "whole", "--no-val").returncode == 0
    fault = {"at": "perturb", "call": 8, "do": "SIGKILL"}
    assert run(photos, tmp_path / "r", "--no-val", faults=[fault]).returncode == -9
    assert resume(tmp_path / "r", "--val").returncode == 5
    done = resume(tmp_path / "r")
    assert done.returncode == 0, done.stderr
    assert fingerprint(tmp_path / "r") == fingerprint(tmp_path / "whole")
