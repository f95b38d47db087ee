"""Wrong training labels on purpose: exactly so many, the same ones every time, and in training alone."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from samtune.config import loading
from samtune.data import noise, source
from samtune.data.encoded import FileImages
from samtune.data.source import Split
from samtune.data.splits import train_and_validation
from samtune.errors import DataError
from samtune.report import finished_run
from samtune.train.run_data import load_run_data
from tests.conftest import samtune, write_image_folder
from tests.support.run_folders import write_run

TEN = tuple("abcdefghij")
SMALL = ("--model", "test_resnet", "--no-pretrained", "--img-size", 32, "--epochs", 1, "--lr", 0.01, "--workers", 0)


def a_split(labels):
    return Split("train", FileImages([""] * len(labels)), np.asarray(labels, dtype=np.int64))


def flip(train, rows=None, classes=TEN, fraction=0.2, kind="symmetric", seed=0):
    rows = np.arange(len(train)) if rows is None else rows
    return noise.flip(train, rows, classes, fraction=fraction, kind=kind, seed=seed)


# ------------------------------------------------------------------------------------------------------------- flipping


@pytest.mark.parametrize("kind", ["symmetric", "pair"])
@pytest.mark.parametrize("fraction", [0.001, 0.2, 0.333, 0.8, 1.0])
def test_exactly_the_share_is_flipped_and_never_to_the_label_itself(kind, fraction):
    clean = a_split(np.arange(997) % 10)
    noisy, changes = flip(clean, fraction=fraction, kind=kind)
    differ = np.flatnonzero(noisy.labels != clean.labels)
    assert len(differ) == round(fraction * 997)
    assert changes.rows.tolist() == differ.tolist()
    assert changes.labels.tolist() == clean.labels[differ].tolist()
    assert changes.noisy_labels.tolist() == noisy.labels[differ].tolist()
    assert noisy.labels.min() >= 0
    assert noisy.labels.max() <= 9
    assert changes.about["flipped"] == len(differ)


def test_symmetric_noise_goes_to_every_other_class_alike():
    noisy, _ = flip(a_split(np.full(90_000, 3)), fraction=1.0)
    counts = np.bincount(noisy.labels, minlength=10)
    assert counts[3] == 0
    assert np.abs(np.delete(counts, 3) - 10_000).max() < 5 * np.sqrt(10_000)


def test_pair_noise_goes_to_the_next_class_and_from_the_last_to_the_first():
    noisy, _ = flip(a_split([0, 1, 9]), fraction=1.0, kind="pair")
    assert noisy.labels.tolist() == [1, 2, 0]


def test_the_seed_alone_decides_and_a_larger_share_keeps_the_flips_of_a_smaller_one():
    clean = a_split(np.arange(500) % 10)
    first, again, other = (flip(clean, seed=seed)[0].labels for seed in (0, 0, 1))
    assert first.tolist() == again.tolist() != other.tolist()
    more, _ = flip(clean, fraction=0.6)
    flipped = first != clean.labels
    assert (more.labels[flipped] == first[flipped]).all()


def test_rows_that_are_not_trained_on_keep_their_labels_and_the_clean_split_stays_as_it_was():
    clean = a_split(np.arange(100) % 10)
    before = clean.labels.copy()
    rows = np.arange(0, 100, 2)
    noisy, changes = flip(clean, rows, fraction=1.0)
    assert changes.n == changes.about["flipped"] == 50
    assert (noisy.labels[1::2] == before[1::2]).all()
    assert (clean.labels == before).all()


def test_one_class_has_no_other_to_flip_to():
    with pytest.raises(DataError, match="two classes"):
        flip(a_split([0, 0]), classes=("a",))


# ----------------------------------------------------------------------------------------------------- labels of a file


def write_labels(path, columns):
    if path.suffix == ".parquet":
        pq.write_table(pa.table(columns), path)
    elif path.suffix == ".csv":
        rows = zip(*columns.values(), strict=True)
        lines = [",".join(columns), *(",".join("" if v is None else str(v) for v in row) for row in rows)]
        path.write_text("\n".join(lines) + "\n")
    else:
        rows = zip(*columns.values(), strict=True)
        path.write_text("".join(json.dumps(dict(zip(columns, row, strict=True))) + "\n" for row in rows))
    return path


def labels_of(path, classes=TEN, labels=(0, 1, 2, 3), rows=(0, 1, 2, 3), key="label"):
    return noise.from_file(a_split(labels), np.asarray(rows), classes, path=path, key=key)


@pytest.mark.parametrize("kind", ["parquet", "csv", "jsonl"])
@pytest.mark.parametrize("given", [[0, 9, 2, 8], ["a", "j", "c", "i"]])
def test_every_kind_of_file_gives_numbers_or_names(tmp_path, kind, given):
    noisy, changes = labels_of(write_labels(tmp_path / f"l.{kind}", {"label": given}))
    assert noisy.labels.tolist() == [0, 9, 2, 8]
    assert changes.rows.tolist() == [1, 3]
    assert changes.about == {
        **{"kind": "file", "fraction": 0.5, "flipped": 2, "n": 4, "seed": None},
        "source": f"{tmp_path / f'l.{kind}'}, column label",
    }


def test_a_column_index_gives_the_row(tmp_path):
    path = write_labels(tmp_path / "l.csv", {"index": [3, 0, 2, 1], "worse": [9, 0, 2, 5]})
    assert labels_of(path, key="worse")[0].labels.tolist() == [0, 5, 2, 9]
    path = write_labels(tmp_path / "l.csv", {"index": [3, 0, 2, 2], "worse": [9, 0, 2, 5]})
    with pytest.raises(DataError, match="not each row of split train once"):
        labels_of(path, key="worse")


def test_classes_that_are_named_by_numbers_are_meant_by_their_names(tmp_path):
    path = write_labels(tmp_path / "l.csv", {"label": [1, 3, 4, 0]})
    noisy, _ = labels_of(path, classes=("0", "1", "3", "4"))
    assert noisy.labels.tolist() == [1, 2, 3, 0]


def test_rows_that_are_held_out_keep_their_own_labels(tmp_path):
    path = write_labels(tmp_path / "l.csv", {"label": [9, 9, 9, 9]})
    noisy, changes = labels_of(path, rows=[0, 2])
    assert noisy.labels.tolist() == [9, 1, 9, 3]
    assert changes.n == 2


def test_rows_that_are_not_trained_on_need_no_label(tmp_path):
    path = write_labels(tmp_path / "l.parquet", {"index": [3, 2, 1, 0], "label": ["a", None, "c", "d"]})
    noisy, _ = labels_of(path, rows=[0, 1, 3])
    assert noisy.labels.tolist() == [3, 2, 2, 0]
    with pytest.raises(DataError, match=r"row 1 of .* has the label None"):
        labels_of(path, rows=[1, 2])


def test_a_file_has_labels_for_validation_too_where_that_is_trained_on(tmp_path):
    train, rows = a_split([0, 1, 2, 3]), np.arange(4)
    for given, expected in (([9, 8], [9, 8, 2, 3]), ([9, 8, 7, 6], [9, 8, 7, 6])):
        path = write_labels(tmp_path / "l.csv", {"label": given})
        noisy, _ = noise.from_file(train, rows, TEN, path=path, key="label", labelled=2)
        assert noisy.labels.tolist() == expected


@pytest.mark.parametrize(
    ("name", "columns", "said"),
    [
        ("l.csv", {"label": [0, 1, 2]}, "has 3 rows, and split train has 4"),
        ("l.csv", {"label": [0, 1, 10, 3]}, "row 2 of .* has the label 10"),
        ("l.csv", {"label": [0, -1, 1, 3]}, "row 1 of .* has the label -1"),
        ("l.jsonl", {"label": [0, None, 1, 3]}, "row 1 of .* has the label None"),
        ("l.parquet", {"label": [0.0, 1.0, 2.0, 3.0]}, "row 0 of .* has the label 0.0"),
        ("l.parquet", {"label": [[0], [1], [2], [3]]}, "row 0 of .* has the label"),
        ("l.csv", {"label": ["a", "b", "c", "zebra"]}, "row 3 of .* has the label 'zebra'"),
        ("l.csv", {"lable": [0, 1, 2, 3]}, "has no column 'label'"),
    ],
)
def test_a_file_that_does_not_fit_names_what_is_wrong(tmp_path, name, columns, said):
    with pytest.raises(DataError, match=said):
        labels_of(write_labels(tmp_path / name, columns))


def test_a_file_that_cannot_be_read_is_a_data_error(tmp_path):
    for name in ("l.parquet", "l.jsonl", "l.csv"):
        (tmp_path / name).write_bytes(b"")
        with pytest.raises(DataError, match="cannot be read"):
            labels_of(tmp_path / name)
    with pytest.raises(DataError, match="unknown kind"):
        labels_of(tmp_path / "l.txt")


def test_the_human_labels_of_cifar10n_are_wrong_as_often_as_published(shared_data):
    train = source.open_source(str(shared_data / "cifar10")).splits["train"]
    path = shared_data / "cifar10n" / "data" / "train-00000-of-00001.parquet"
    names = tuple("abcdefghij")
    for key, wrong in (("clean_label", 0), ("aggre_label", 0.090), ("worse_label", 0.409)):
        _, changes = noise.from_file(train, np.arange(len(train)), names, path=path, key=key)
        assert changes.about["fraction"] == pytest.approx(wrong, abs=0.001)


# ----------------------------------------------------------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def folder_data(tmp_path_factory):
    return write_image_folder(tmp_path_factory.mktemp("data") / "pets", {"train": 20, "test": 8})


@pytest.fixture(scope="module")
def noisy_run(tmp_path_factory, folder_data):
    folder = tmp_path_factory.mktemp("runs") / "r"
    noise_flags = ("--label-noise", 0.4, "--noise-seed", 3, "--val-fraction", 0.2)
    done = samtune("run", *SMALL, "--dataset", folder_data, "--output", folder, *noise_flags, "--json")
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout), done.stderr


def test_a_run_with_noise_stores_the_flips_and_reports_them(noisy_run, folder_data):
    folder, result, said = noisy_run
    about = {"kind": "symmetric", "fraction": 13 / 32, "flipped": 13, "n": 32, "seed": 3, "source": "random"}
    assert result["dataset"]["label_noise"] == about
    stored = pq.read_table(folder / "label_noise.parquet").to_pydict()
    data = source.open_source(str(folder_data))
    train, rows, _, held_out = train_and_validation(data, 0.2, 0)
    assert set(stored["index"]) <= set(rows.tolist())
    assert not set(stored["index"]) & set(held_out.tolist())
    assert stored["label"] == train.labels[stored["index"]].tolist()
    assert stored["noisy_label"] == [1 - label for label in stored["label"]]
    assert "13 of 32 training labels changed" in said
    assert "13 of 32 training labels changed" in (folder / "report.md").read_text()
    assert "a stratified 20 % of train" in said


def test_auto_noise_follows_the_seed_also_where_a_stored_recipe_is_repeated_with_another(tmp_path, folder_data):
    flags = {"model": "test_resnet", "dataset": str(folder_data), "label_noise": 0.4}

    def changed(recipe=None, **more):
        return load_run_data(loading.load(recipe, flags | more)).noise

    by_seed = [changed(noise_seed="auto", seed=seed) for seed in (3, 4)]
    assert by_seed[0].rows.tolist() == changed(noise_seed=3, seed=9).rows.tolist()
    assert by_seed[0].rows.tolist() != by_seed[1].rows.tolist()
    assert [noise.about["seed"] for noise in by_seed] == [3, 4]
    assert changed(seed=3).rows.tolist() == changed(seed=4).rows.tolist()  # by default all runs have the same
    recipe = tmp_path / "config.toml"
    recipe.write_text(loading.load(None, flags | {"noise_seed": "auto", "seed": 3}).to_toml())
    assert changed(recipe).rows.tolist() == by_seed[0].rows.tolist()
    assert changed(recipe, seed=4).rows.tolist() == by_seed[1].rows.tolist()


def test_runs_whose_noise_follows_the_seed_are_repetitions_of_one_setting(tmp_path):
    flags = {"label_noise": 0.4, "noise_seed": "auto"}
    runs = [write_run(tmp_path / f"r{seed}", seed=seed, **flags) for seed in (0, 1)]
    first, second = (finished_run.read(run, run.name) for run in runs)
    assert first.settings == second.settings


def test_validation_test_and_eval_see_clean_labels(noisy_run, folder_data):
    folder, _, _ = noisy_run
    predictions = pq.read_table(folder / "predictions.parquet").to_pydict()
    assert predictions["label"] == source.open_source(str(folder_data)).splits["test"].labels.tolist()
    from samtune.train.eval_checkpoint import evaluate_checkpoint

    train = source.open_source(str(folder_data)).splits["train"]
    for split in ("train", "val"):
        scored, _ = evaluate_checkpoint(folder, name=None, split=split, dataset=None, progress=lambda *_: None)
        assert scored.labels.tolist() == train.labels[scored.rows].tolist()


def test_a_run_learns_the_noisy_labels_and_not_the_clean_ones(folder_data, tmp_path):
    """With every label of two classes flipped, what is learnt is the opposite."""
    from samtune.train import setup

    given = {"model": "test_resnet", "pretrained": False, "dataset": str(folder_data), "img_size": 32}
    clean = setup.build_setup(loading.load(None, given))
    flipped = setup.build_setup(loading.load(None, given | {"label_noise": 1.0}))
    rows = flipped.train_rows
    assert (flipped.train.split.labels[rows] == 1 - clean.train.split.labels[rows]).all()
    assert (flipped.val.split.labels == clean.val.split.labels).all()
    assert clean.noise is None


def test_both_passes_of_sam_see_the_same_mixture_of_the_noisy_labels(folder_data):
    """The shares of mixup with its neighbour add up to the labels of the batch, class by class."""
    from samtune.train import loop, setup

    given = {"model": "test_resnet", "pretrained": False, "dataset": str(folder_data), "img_size": 32, "drop": 0.0}
    given |= {"mixup": 8.0, "label_noise": 0.4, "rho": 0.1, "batch_size": 16, "val_fraction": 0.2}
    run = setup.build_setup(loading.load(None, given))
    images = torch.stack([run.train[row] for row in run.train_rows[:16]])
    images = torch.nn.functional.interpolate(images.float(), 32).to(torch.uint8)
    labels = torch.from_numpy(run.train.split.labels[run.train_rows[:16]])
    clean = torch.from_numpy(source.open_source(str(folder_data)).splits["train"].labels[run.train_rows[:16]])
    assert not torch.equal(labels, clean)
    inputs, targets, seen = *loop.to_update_inputs(run, images, labels, step=1), []
    loss = run.update.loss
    run.update.loss = lambda logits, shares: seen.append(shares.clone()) or loss(logits, shares)
    pictures = []
    run.model.register_forward_pre_hook(lambda _, args: pictures.append(args[0].clone()))
    run.update.sam.rho = 0.1
    assert run.update(inputs, targets).passes == 2
    assert len(seen) == len(pictures) == 2
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(pictures[0], pictures[1])
    assert ((seen[0] > 0).sum(1) == 2).any()
    torch.testing.assert_close(seen[0].sum(0), torch.bincount(labels, minlength=2).float())


def test_a_run_without_noise_says_nothing_of_it_and_one_with_a_file_names_it(folder_data, tmp_path):
    done = samtune("run", *SMALL, "--dataset", folder_data, "--output", tmp_path / "plain", "--json")
    assert "label_noise" not in json.loads(done.stdout)["dataset"]
    assert not (tmp_path / "plain" / "label_noise.parquet").exists()
    labels = write_labels(tmp_path / "human.csv", {"said": ["dog"] * 20 + ["cat"] * 5 + ["dog"] * 15})
    given = ("--train-labels", labels, "--train-labels-key", "said")
    done = samtune("run", *SMALL, "--dataset", folder_data, "--output", tmp_path / "r", *given, "--json")
    assert done.returncode == 0, done.stderr
    about = json.loads(done.stdout)["dataset"]["label_noise"]
    assert (about["kind"], about["seed"], about["source"]) == ("file", None, f"{labels}, column said")
    stored = pq.read_table(tmp_path / "r" / "label_noise.parquet").to_pydict()
    assert about["flipped"] == len(stored["index"]) > 15
