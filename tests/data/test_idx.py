"""Folders of idx files, as MNIST and its successors are published, and the package of Debian that holds one."""

import gzip
import io
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from samtune.data import describe, source
from samtune.data.catalog import CATALOG
from samtune.data.decode import decode
from samtune.data.split_roles import DataSelection
from samtune.errors import DataError, UsageError
from tests.conftest import SMALL_MODEL, samtune
from tests.support.data_sets import look, read, sizes

CLOTHES = CATALOG["fashion_mnist"]
UBYTE, FLOAT = 8, 13
RNG = np.random.default_rng(0)
PICTURES = RNG.integers(0, 256, (6, 5, 4), dtype=np.uint8)
LABELS = np.array([0, 1, 2, 2, 1, 0], np.uint8)
TRAIN = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte")
TEST = ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


def idx(values, kind=UBYTE):
    """An idx file as its definition has it."""
    header = bytes([0, 0, kind, values.ndim]) + b"".join(size.to_bytes(4, "big") for size in values.shape)
    return header + values.tobytes()


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def write_set(folder, *, prefix="", ending="", pictures=PICTURES, labels=LABELS, test=True):
    """Train, and a test split of the same pictures in reverse order."""
    step = {TRAIN: 1, TEST: -1} if test else {TRAIN: 1}
    for (images_name, labels_name), order in step.items():
        write(folder / f"{prefix}{images_name}{ending}", idx(np.ascontiguousarray(pictures[::order])))
        write(folder / f"{prefix}{labels_name}{ending}", idx(labels[::order]))
    return folder


def pixels(split, row):
    return decode(split.image_bytes(row), str).numpy().transpose(1, 2, 0)


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_pictures_and_labels_are_those_of_the_files(tmp_path, ending):
    data = read(write_set(tmp_path / "digits", ending=ending))
    assert data.name == "digits"
    assert data.class_names == ("0", "1", "2")
    assert sizes(data) == {"train": 6, "test": 6}
    assert data.splits["train"].labels.tolist() == LABELS.tolist()
    assert data.splits["test"].labels.tolist() == LABELS[::-1].tolist()
    for row, picture in enumerate(PICTURES):  # grey becomes three channels
        assert (pixels(data.splits["train"], row) == picture[:, :, None]).all()
        assert (pixels(data.splits["test"], 5 - row) == picture[:, :, None]).all()


@pytest.mark.parametrize("channels", [1, 3])
def test_a_fourth_dimension_is_that_of_the_channels(tmp_path, channels):
    pictures = RNG.integers(0, 256, (6, 5, 4, channels), dtype=np.uint8)
    split = read(write_set(tmp_path, pictures=pictures)).splits["train"]
    assert all((pixels(split, row) == picture).all() for row, picture in enumerate(pictures))


def test_the_cache_has_the_pictures_as_they_are(tmp_path, monkeypatch):
    monkeypatch.setenv("SAMTUNE_CACHE", str(tmp_path / "cache"))
    split = read(write_set(tmp_path / "digits", ending=".gz")).splits["train"]
    for _ in range(2):  # decoded, then from the cache
        images = look(split)
        assert images.pixels is not None
        assert (images.take(np.arange(6)).numpy() == PICTURES[:, None]).all()


# Name of a train split's files -> what they are called.
NAMES = {
    "as yann.lecun.com": TRAIN,
    "unpacked by some": ("train-images.idx3-ubyte", "train-labels.idx1-ubyte"),
    "EMNIST": ("emnist-balanced-train-images-idx3-ubyte.gz", "emnist-balanced-train-labels-idx1-ubyte.gz"),
    "one of them packed": ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte"),
}


@pytest.mark.parametrize("names", NAMES.values(), ids=NAMES.keys())
def test_files_are_found_by_each_of_their_usual_names(tmp_path, names):
    for name, values in zip(names, (PICTURES, LABELS), strict=True):
        write(tmp_path / name, idx(values))
    assert read(tmp_path).splits["train"].labels.tolist() == LABELS.tolist()


@pytest.mark.parametrize("below", ["raw", "FashionMNIST/raw"])
def test_the_layout_of_torchvision_is_read_once_though_it_keeps_what_it_unpacked(tmp_path, below):
    write_set(tmp_path / below)
    write_set(tmp_path / below, ending=".gz")
    assert sizes(read(tmp_path)) == {"train": 6, "test": 6}


def test_of_several_sets_in_a_folder_one_is_chosen(tmp_path):
    write_set(tmp_path, prefix="emnist-digits-")
    write_set(tmp_path, prefix="emnist-letters-", labels=LABELS + 1)
    with pytest.raises(UsageError, match="2 configurations: emnist-digits, emnist-letters"):
        read(tmp_path)
    assert source.open_source(f"{tmp_path}:emnist-letters").class_names == ("1", "2", "3")
    with pytest.raises(UsageError, match="no configuration 'letters'"):
        source.open_source(f"{tmp_path}:letters")


def test_classes_have_the_names_that_lie_beside_the_labels(tmp_path):
    write_set(tmp_path)
    (tmp_path / "classes.txt").write_text("zero\none\ntwo\n")
    assert read(tmp_path).class_names == ("zero", "one", "two")
    assert read(tmp_path).splits["train"].labels.tolist() == LABELS.tolist()


def test_a_mapping_of_emnist_names_classes_by_characters_and_may_count_from_one(tmp_path):
    write_set(tmp_path, prefix="emnist-letters-", labels=LABELS + 1)
    (tmp_path / "emnist-letters-mapping.txt").write_text("1 65 97\n2 66 98\n3 67 99\n")
    data = read(tmp_path)
    assert data.class_names == ("A", "B", "C")
    assert data.splits["train"].labels.tolist() == LABELS.tolist()


def replaced(name, content):
    return lambda folder: write(folder / name, content)


# What is done to a folder -> message, cause, hint.
DAMAGE = {
    "an empty file": (replaced(TRAIN[0], b""), "is damaged", "begins with b''", "download or unpack"),
    "another kind of file": (replaced(TRAIN[0], b"<!DOCTYPE html>"), "is damaged", "begins with b'<!DO'", "download"),
    "an unknown type": (replaced(TRAIN[0], b"\0\0\7\3"), "is damaged", "a type", "download"),
    "half a header": (replaced(TRAIN[0], idx(PICTURES)[:10]), "is damaged", "within its header", "download"),
    "a file cut off": (
        *(replaced(TRAIN[0], idx(PICTURES)[:-1]), "is damaged"),
        *("6 x 5 x 4 bytes, and 119 are there", "download"),
    ),
    "a file too long": (replaced(TRAIN[0], idx(PICTURES) + b"\0"), "is damaged", "and more are there", "download"),
    "dimensions beyond all memory": (
        *(replaced(TRAIN[0], b"\0\0\x08\x04" + b"\xff" * 16), "is damaged"),
        *("4294967295 x 4294967295", "download"),
    ),
    "floating-point numbers": (
        *(replaced(TRAIN[0], idx(PICTURES.astype(">f4"), FLOAT)), "holds values of type float"),
        *("unsigned bytes", "convert it"),
    ),
    "images of two dimensions": (
        *(replaced(TRAIN[0], idx(PICTURES[:, 0])), "has 2 dimensions"),
        *("images have 3 or 4", "convert it"),
    ),
    "labels of two dimensions": (
        *(replaced(TRAIN[1], idx(LABELS[:, None])), "has 2 dimensions"),
        *("labels have 1", "convert it"),
    ),
    "two channels": (
        *(replaced(TRAIN[0], idx(np.zeros((6, 5, 4, 2), np.uint8))), "has pictures of 2 channels"),
        *("the last of four dimensions", r"1 channel \(grey\) or 3"),
    ),
    "fewer labels": (
        *(replaced(TRAIN[1], idx(LABELS[:5])), "has 6 images and 5 labels"),
        *(f"in .*{TRAIN[1]}", "from one source"),
    ),
    "no labels": (
        *(lambda folder: (folder / TRAIN[1]).unlink(), f"{TRAIN[0]} has no labels"),
        *("no file of labels", f"put {TRAIN[1]} beside it"),
    ),
    "no images": (
        *(lambda folder: (folder / TEST[0]).unlink(), f"{TEST[1]} has no images"),
        *("no file of images", f"put {TEST[0]} beside it"),
    ),
    "too few names": (
        *(replaced("classes.txt", b"zero\none\n"), f"label 2 of idx file .*{TEST[1]} has no name"),
        *("names for 0 to 1", "complete the list"),
    ),
    "names that are none": (
        *(replaced("mapping.txt", b"0 forty-eight\n"), r"names in .*mapping\.txt cannot be read"),
        *("ValueError", "a line holds"),
    ),
}


@pytest.mark.parametrize(("harm", "message", "cause", "hint"), DAMAGE.values(), ids=DAMAGE.keys())
def test_what_is_damaged_or_does_not_fit_is_named(tmp_path, harm, message, cause, hint):
    harm(write_set(tmp_path))
    with pytest.raises(DataError, match=message) as error:
        read(tmp_path)
    for part, pattern in ((error.value.cause, cause), (error.value.hint, hint)):
        assert "\n" not in part
        assert re.search(pattern, part), part


def cut_short(packed):
    return packed[: len(packed) // 2]


def with_a_wrong_sum(packed):
    return packed[:-8] + bytes(4) + packed[-4:]


@pytest.mark.parametrize("harm", [cut_short, with_a_wrong_sum, lambda packed: b"no gzip", lambda packed: b""])
def test_a_damaged_gz_is_named(tmp_path, harm):
    file = write_set(tmp_path, ending=".gz") / f"{TRAIN[0]}.gz"
    file.write_bytes(harm(file.read_bytes()))
    with pytest.raises(DataError, match=f"{TRAIN[0]}.gz is damaged"):
        read(tmp_path)


def test_a_folder_without_a_train_split_says_what_it_has(tmp_path):
    write_set(tmp_path)
    for name in TRAIN:
        (tmp_path / name).unlink()
    with pytest.raises(DataError, match="has no train split") as error:
        read(tmp_path)
    assert "it has: test" in error.value.cause


def test_a_column_cannot_be_asked_of_idx_files(tmp_path):
    with pytest.raises(UsageError, match=r"--label-key kind: .* has no such column"):
        read(write_set(tmp_path), label_key="kind")


def test_a_run_and_a_check_take_idx_files_and_end_with_3_where_they_do_not_fit(tmp_path):
    data = write_set(tmp_path / "digits", ending=".gz")
    run = ("run", *SMALL_MODEL, "--dataset", data, "--epochs", 1, "--json", "--output")
    done = samtune(*run, tmp_path / "r")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert (result["dataset"]["classes"], result["test"]["n"]) == (3, 6)
    shown = (tmp_path / "r" / "report.html").read_text().count("data:image/png")
    assert (shown > 0) == (result["test"]["wrong"] > 0)  # the pictures of mistakes
    checked = json.loads(samtune("data", "check", data, "--json").stdout)
    assert checked["splits"]["test"]["images"] == 6
    write(data / f"{TRAIN[1]}.gz", idx(LABELS[:5]))
    refused = samtune(*run, tmp_path / "s")
    assert refused.returncode == 3
    assert "6 images and 5 labels" in refused.stderr


# ------------------------------------------------------------------------------------------------- Debian's package


@pytest.fixture
def small_package(tmp_path, monkeypatch):
    """The package as it would be with six pictures."""
    folder = write_set(tmp_path / "fashion-mnist", ending=".gz")
    row = replace(CLOTHES, idx_folder=str(folder))
    monkeypatch.setattr(source, "CATALOG", CATALOG | {"fashion_mnist": row})
    return row


def test_the_package_takes_precedence_over_the_hub_and_classes_have_the_hubs_names(small_package):
    data = source.open_source("fashion_mnist")
    assert data.origin == "package:dataset-fashion-mnist"
    assert data.class_names == CLOTHES.class_names
    assert data.splits["test"].labels.tolist() == LABELS[::-1].tolist()
    about = describe.describe("fashion_mnist")
    assert about["here"]
    assert (about["source"], about["splits"]) == (data.origin, {"train": 6, "test": 6})


def test_without_the_package_it_comes_from_the_hub(tmp_path):
    row = replace(CLOTHES, idx_folder=str(tmp_path / "nothing"))
    assert row.origin == "hub:zalando-datasets/fashion_mnist"


def test_a_column_cannot_be_asked_of_the_package(small_package):
    with pytest.raises(UsageError, match="no such column"):
        source.open_source("fashion_mnist", DataSelection(image_key="picture"))


@pytest.fixture(scope="module")
def clothes():
    if not CLOTHES.is_installed:
        pytest.skip("the data set is not installed: apt-get install dataset-fashion-mnist")
    return source.open_source("fashion_mnist")


def test_the_package_holds_all_60000_and_10000_pictures_of_ten_equal_classes(clothes):
    assert sizes(clothes) == CLOTHES.counts == {"train": 60000, "test": 10000}
    assert np.bincount(clothes.splits["train"].labels).tolist() == [6000] * 10
    assert np.bincount(clothes.splits["test"].labels).tolist() == [1000] * 10


def test_every_picture_of_the_small_real_set_is_in_the_package_with_its_label(clothes, shared_data):
    for split, count in (("train", 5000), ("test", 1000)):
        images = clothes.splits[split].images.pixels
        labels = clothes.splits[split].labels.tolist()
        classes_of = {}
        for picture, label in zip(images, labels, strict=True):
            classes_of.setdefault(picture.tobytes(), set()).add(clothes.class_names[label])
        (file,) = Path(shared_data / "fashion_mnist" / "data").glob(f"{split}-*.parquet")
        table = pq.read_table(file)
        small = read(shared_data / "fashion_mnist")
        names = [small.class_names[label] for label in table["label"].to_pylist()]
        cells = table["image"].to_pylist()
        assert len(cells) == count
        for cell, name in zip(cells, names, strict=True):
            assert name in classes_of[Image.open(io.BytesIO(cell["bytes"])).tobytes()]
