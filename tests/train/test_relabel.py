"""`samtune relabel`: what a model says of its training images, as a file of labels to train on."""

import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest

from samtune import Predictor
from samtune.config import loading
from samtune.data import source
from samtune.data.splits import open_run_splits
from samtune.errors import DataError
from samtune.train.eval_checkpoint import evaluate_checkpoint
from samtune.train.run_data import load_run_data
from tests.conftest import SMALL_MODEL, samtune, write_image_folder

NAMES = ["cat", "dog", "owl"]
SMALL = (*SMALL_MODEL, "--epochs", 1, "--lr", 0.01, "--batch-size", 8, "--no-html")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_image_folder(tmp_path_factory.mktemp("data") / "pets", {"train": 12, "test": 2}, tuple(NAMES))


@pytest.fixture(scope="module")
def noisy_run(tmp_path_factory, data):
    """A run with wrong labels that validates on a part of train, and leaves some of it out."""
    folder = tmp_path_factory.mktemp("runs") / "r"
    given = ("--label-noise", 0.4, "--val-fraction", 0.25, "--max-train", 22, "--model-ema")
    done = samtune("run", *SMALL, "--dataset", data, "--output", folder, *given)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def relabelled(tmp_path_factory, noisy_run):
    """(labels.parquet, its columns, the summary)."""
    file = tmp_path_factory.mktemp("labels") / "new folder" / "labels.parquet"
    done = samtune("relabel", noisy_run, "--output", file, "--probabilities", "--json")
    assert done.returncode == 0, done.stderr
    return file, pq.read_table(file).to_pydict(), json.loads(done.stdout)


def scored(run, split, **options):
    return evaluate_checkpoint(run, name=None, split=split, dataset=None, progress=lambda *_: None, **options)[0]


def test_every_row_of_train_has_the_class_that_predict_gives_its_image(relabelled, noisy_run, data):
    _, columns, _ = relabelled
    assert columns["index"] == list(range(36))
    train = source.open_source(str(data)).splits["train"]
    predictions = Predictor(noisy_run)([train.path(row) for row in range(36)])
    assert columns["label"] == [one.class_name for one in predictions]
    assert columns["probability"] == pytest.approx([one.probability for one in predictions], abs=1e-6)
    every = np.array([one.probabilities for one in predictions])
    assert np.array(columns["probabilities"]) == pytest.approx(every, abs=1e-6)
    assert pq.read_schema(relabelled[0]).field("probabilities").type.list_size == 3


@pytest.mark.parametrize("split", ["train", "val"])
def test_the_labels_are_those_that_eval_finds(split, relabelled, noisy_run):
    _, columns, _ = relabelled
    again = scored(noisy_run, split)
    assert [NAMES.index(columns["label"][row]) for row in again.rows] == again.predictions.tolist()
    assert [columns["probability"][row] for row in again.rows] == again.probability.tolist()


def test_the_file_says_which_labels_are_the_data_sets_and_which_were_trained_on(relabelled, noisy_run):
    _, columns, _ = relabelled
    assert columns["dataset_label"] == [name for name in NAMES for _ in range(12)]
    changed = pq.read_table(noisy_run / "label_noise.parquet").to_pydict()
    noisy = dict(zip(changed["index"], changed["noisy_label"], strict=True))
    trained = set(scored(noisy_run, "train").rows.tolist())
    assert len(trained) == 22
    for row, label in enumerate(columns["trained_label"]):
        own = columns["dataset_label"][row]
        assert label == (None if row not in trained else NAMES[noisy[row]] if row in noisy else own)


def test_the_summary_counts_what_was_mended_and_what_was_spoiled(relabelled, noisy_run):
    file, columns, result = relabelled
    triples = list(zip(columns["dataset_label"], columns["trained_label"], columns["label"], strict=True))
    trained = [(own, noisy, now) for own, noisy, now in triples if noisy is not None]
    assert result["label_noise"] == {
        "wrong": sum(own != noisy for own, noisy, _ in trained),
        "mended": sum(own != noisy and now == own for own, noisy, now in trained),
        "right": sum(own == noisy for own, noisy, _ in trained),
        "spoiled": sum(own == noisy and now != own for own, noisy, now in trained),
    }
    assert result["label_noise"]["wrong"] == 9  # 40 % of 22
    assert (result["rows"], result["images"], result["trained"]) == (36, 36, 22)
    assert result["differ"] == sum(own != now for own, _, now in triples)
    shown = samtune("relabel", noisy_run, "--output", file.with_name("again.parquet"), "--ema")
    assert "of 9 wrong labels" in " ".join(shown.stdout.split()).replace(" │", "").replace("│ ", "")


def test_a_run_trains_on_the_file_as_it_is_and_validates_on_clean_labels(relabelled, data):
    file, columns, _ = relabelled
    given = {"model": "test_resnet", "pretrained": False, "dataset": str(data), "train_labels": str(file)}
    read = load_run_data(loading.load(None, given))
    labels = read.train.split.labels[read.train_rows].tolist()
    assert labels == [NAMES.index(columns["label"][row]) for row in read.train_rows]
    assert read.val.split.labels.tolist() == [i // 12 for i in range(36)]


def test_of_a_run_without_validation_all_that_it_was_trained_on_is_relabelled(tmp_path):
    data = write_image_folder(tmp_path / "pets", {"train": 4, "val": 3, "test": 2})
    shared = ("--dataset", data, "--no-val")
    assert samtune("run", *SMALL, *shared, "--output", tmp_path / "r").returncode == 0
    file = tmp_path / "labels.parquet"
    result = json.loads(samtune("relabel", tmp_path / "r", "--output", file, "--json").stdout)
    assert (result["images"], result["trained"], result["label_noise"]) == (14, 14, None)
    given = {"model": "test_resnet", "dataset": str(data), "train_labels": str(file)}
    names = pq.read_table(file).to_pydict()["label"]
    read = load_run_data(loading.load(None, given | {"val": False}))
    assert [["cat", "dog"][label] for label in read.train.split.labels] == names
    with pytest.raises(DataError, match="has 14 rows, and split train has 8"):
        load_run_data(loading.load(None, given))


def test_what_cannot_be_done_is_said_in_one_line(noisy_run, tmp_path, data):
    there = tmp_path / "there.parquet"
    there.write_bytes(b"mine")
    moved = shutil.copytree(noisy_run, tmp_path / "moved", symlinks=True)
    (moved / "label_noise.parquet").unlink()
    other = write_image_folder(tmp_path / "other", {"train": 3, "test": 2}, tuple(NAMES))
    new = tmp_path / "new.parquet"
    for code, words, said in (
        (2, (noisy_run, "--output", tmp_path / "labels.csv"), "must end in .parquet"),
        (2, (noisy_run, "--output", there), "is there already"),
        (2, (noisy_run, "--output", noisy_run / "label_noise.parquet", "--force"), "a file of a run"),
        (3, (noisy_run, "--output", new, "--dataset", other), "is not the one that the run was made with"),
        (5, (moved, "--output", new), "the labels that the run was trained on"),
        (5, (tmp_path / "nothing", "--output", new), "there is no run or checkpoint"),
    ):
        done = samtune("relabel", *words)
        assert (done.returncode, said in done.stderr) == (code, True), done.stderr
    assert there.read_bytes() == b"mine"
    assert not new.exists()
    done = samtune("relabel", noisy_run, "--output", there, "--force", "--dataset", data)
    assert done.returncode == 0, done.stderr
    assert len(pq.read_table(there)) == 36


@pytest.mark.slow
def test_images_without_a_label_or_that_cannot_be_decoded_get_none(tmp_path):
    data = write_image_folder(tmp_path / "pets", {"train": 6, "test": 2})
    (data / "train" / "cat" / "2.png").write_bytes(b"no image")
    bad = ("--on-bad-image", "skip", "--dataset", data)
    assert samtune("run", *SMALL, *bad, "--output", tmp_path / "r").returncode == 0
    file = tmp_path / "labels.parquet"
    assert samtune("relabel", tmp_path / "r", "--output", file).returncode == 0
    assert [row for row, name in enumerate(pq.read_table(file).to_pydict()["label"]) if name is None] == [2]
    given = {"model": "test_resnet", "dataset": str(data), "train_labels": str(file), "on_bad_image": "skip"}
    config = loading.load(None, given)
    assert load_run_data(config).noise.n == len(open_run_splits(config).train_rows) - 1


@pytest.mark.slow
def test_two_ranks_write_the_same_file(relabelled, noisy_run, tmp_path):
    done = samtune("relabel", noisy_run, "--output", tmp_path / "two.parquet", "--probabilities", "--processes", 2)
    assert done.returncode == 0, done.stderr
    assert pq.read_table(tmp_path / "two.parquet").to_pydict() == relabelled[1]
