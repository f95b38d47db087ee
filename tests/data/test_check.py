"""What is wrong with a data set is named, and what is not wrong is not."""

import json

import numpy as np
import pytest
from PIL import Image

from samtune.config import loading
from samtune.data.check import check, duplicates, scan
from tests.conftest import encode, image_bytes, samtune, write_image_folder
from tests.support.data_sets import table, write_tables

needs_imagehash = pytest.mark.skipif(not scan.can_see_likeness(), reason="imagehash is not installed (extra: check)")


def look(folder, workers=0):
    settings = loading.load(None, {"model": "", "dataset": str(folder)})
    return check.check(settings, workers=workers, progress=lambda *_: None)


def landscape(seed, size=(96, 80)):
    """Something smooth, as photographs are, in colour."""
    small = np.random.default_rng(seed).integers(0, 256, (6, 7, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


def odd_images():
    """One of each kind that is met in the wild: (file name, bytes)."""
    sixteen = np.random.default_rng(1).integers(0, 65536, (20, 24), dtype=np.uint16)
    turned = Image.Exif()
    turned[0x0112] = 6
    frames = [landscape(seed, (24, 20)).convert("P") for seed in (2, 3)]
    return {
        "cmyk.jpg": encode(landscape(4).convert("CMYK"), "JPEG"),
        "sixteen.png": encode(Image.fromarray(sixteen)),
        "turned.jpg": encode(landscape(5), "JPEG", exif=turned),
        "palette.png": encode(landscape(6).convert("P")),
        "moving.gif": encode(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "clear.png": encode(landscape(7).convert("RGBA")),
        "grey.png": encode(landscape(8).convert("L")),
    }


BROKEN = {
    "cut.jpg": encode(landscape(9, (400, 300)), "JPEG")[:3000],
    "text.jpg": b"this is no picture\n",
    "empty.jpg": b"",
}


@pytest.fixture(scope="module")
def odd_folder(tmp_path_factory):
    folder = write_image_folder(tmp_path_factory.mktemp("data") / "odd", {"train": 4, "test": 2})
    for name, content in (odd_images() | BROKEN).items():
        (folder / "train" / "cat" / name).write_bytes(content)
    return folder


@pytest.mark.parametrize("workers", [0, 2])
def test_the_truncated_the_text_and_the_empty_file_are_unreadable_and_no_other(odd_folder, workers):
    result = look(odd_folder, workers)
    reasons = {image["path"].rpartition("/")[2]: image["reason"] for image in result["unreadable"]}
    assert reasons.keys() == BROKEN.keys()
    assert "truncated" in reasons["cut.jpg"]
    assert reasons["text.jpg"] == "it is no image"
    assert reasons["empty.jpg"] == "it is empty"
    assert {(image["split"], image["label"]) for image in result["unreadable"]} == {("train", "cat")}


def test_modes_sizes_frames_and_rotations_are_counted(odd_folder):
    train = look(odd_folder)["splits"]["train"]
    assert train["images"] == 8 + 7 + 3
    assert train["modes"] == {"RGB": 9, "palette": 2, "CMYK": 1, "16-bit": 1, "RGBA": 1, "grey": 1}
    assert (train["animated"], train["exif_turned"]) == (1, 1)
    assert train["width"] == {"min": 24, "median": 24, "max": 96}
    assert train["height"] == {"min": 20, "median": 20, "max": 96}  # the turned one stands upright
    assert train["class_counts"] == {"cat": 14, "dog": 4}


def test_the_command_names_them_and_exits_with_3(odd_folder):
    done = samtune("data", "check", odd_folder, "--workers", 1)
    assert done.returncode == 3
    lines = [line for line in done.stdout.splitlines() if line.startswith("unreadable: ")]
    assert len(lines) == 3
    assert any(f"{odd_folder / 'train' / 'cat' / 'text.jpg'}: it is no image" in line for line in lines)
    assert "error: 3 of 22 images cannot be read" in done.stderr
    assert "checking 22 images" in done.stderr
    as_json = samtune("data", "check", odd_folder, "-j", 0, "--json")
    assert as_json.returncode == 3
    assert len(json.loads(as_json.stdout)["unreadable"]) == 3


def test_a_good_folder_has_nothing_to_be_said(tmp_path):
    data = write_image_folder(tmp_path / "data", {"train": 4})
    done = samtune("data", "check", data)
    assert done.returncode == 0, done.stderr
    assert "unreadable" in done.stdout
    result = look(data)
    assert (result["unreadable"], result["duplicates"], result["oddities"]) == ([], [], [])


def test_a_data_set_that_is_not_there_is_refused():
    assert samtune("data", "check", "./nowhere").returncode == 3


# ---------------------------------------------------------------------------------------------------------- duplicates


def names(group):
    return {f"{image['split']}/{image['path'].rpartition('/')[2]}" for image in group["images"]}


def test_equal_files_are_found_across_splits_and_with_different_labels(tmp_path):
    data = write_image_folder(tmp_path / "data", {"train": 3})
    write_image_folder(tmp_path / "data", {"test": 0})
    (data / "test" / "cat" / "again.png").write_bytes((data / "train" / "cat" / "0.png").read_bytes())
    (data / "test" / "dog" / "other.png").write_bytes(image_bytes(77))
    (data / "train" / "dog" / "a_cat.png").write_bytes((data / "train" / "cat" / "1.png").read_bytes())
    groups = [group for group in look(data)["duplicates"] if group["kind"] == "exact"]
    assert [names(group) for group in groups] == [{"train/1.png", "train/a_cat.png"}, {"train/0.png", "test/again.png"}]
    assert [(group["across_splits"], group["labels_differ"]) for group in groups] == [(False, True), (True, False)]
    said = samtune("data", "check", data)
    assert said.returncode == 0
    assert "exact duplicates WITH DIFFERENT LABELS: train" in said.stdout
    assert "exact duplicates across splits: train" in said.stdout


@needs_imagehash
def test_a_picture_that_was_scaled_or_compressed_or_turned_by_its_tag_is_found_and_others_are_not(tmp_path):
    data = write_image_folder(tmp_path / "data", {"train": 0, "test": 0})
    for seed in range(12):
        picture = encode(landscape(seed))
        (data / "train" / ("cat" if seed % 2 else "dog") / f"{seed}.png").write_bytes(picture)
    turned = Image.Exif()
    turned[0x0112] = 3
    copies = {
        "small.png": encode(landscape(0).resize((48, 40))),
        "poor.jpg": encode(landscape(1), "JPEG", quality=40),
        "turned.jpg": encode(landscape(2).rotate(180), "JPEG", exif=turned),
        "new.png": encode(landscape(99)),
    }
    for name, content in copies.items():
        (data / "test" / "cat" / name).write_bytes(content)
    (data / "test" / "dog" / "new.png").write_bytes(encode(landscape(98)))
    groups = look(data)["duplicates"]
    assert {group["kind"] for group in groups} == {"near"}
    assert sorted(map(sorted, map(names, groups))) == [
        ["test/poor.jpg", "train/1.png"],
        ["test/small.png", "train/0.png"],
        ["test/turned.jpg", "train/2.png"],
    ]
    assert [group["labels_differ"] for group in groups] == [True, True, False]  # the doubtful ones first


@needs_imagehash
def test_images_without_contrast_are_not_alike(tmp_path):
    data = write_image_folder(tmp_path / "data", {"train": 0})
    for i, grey in enumerate((0, 60, 120, 180)):
        picture = encode(Image.new("L", (20 + i, 20), grey))
        (data / "train" / ("cat" if i % 2 else "dog") / f"{i}.png").write_bytes(picture)
    assert look(data)["duplicates"] == []


def test_without_imagehash_equal_files_are_still_found_and_the_mend_is_said(tmp_path, monkeypatch, capsys):
    data = write_image_folder(tmp_path / "data", {"train": 3})
    (data / "train" / "dog" / "copy.png").write_bytes((data / "train" / "cat" / "0.png").read_bytes())
    (data / "train" / "dog" / "like.jpg").write_bytes(encode(landscape(0), "JPEG"))
    (data / "train" / "dog" / "like.png").write_bytes(encode(landscape(0)))
    monkeypatch.setattr(scan, "can_see_likeness", lambda: False)
    result = look(data)
    assert [group["kind"] for group in result["duplicates"]] == ["exact"]
    assert not result["near_duplicates"]
    assert "pip install imagehash" in capsys.readouterr().err
    assert "not looked for" in check.summary(result)["near duplicates"]


def test_close_pairs_are_those_of_a_comparison_of_all():
    generator = np.random.default_rng(0)
    hashes = generator.integers(0, 2**64, 300, dtype=np.uint64)
    for i in range(150):  # neighbours at every distance from 0 to 8, some in one bit of each band
        flips = generator.choice(64, i % 9, replace=False)
        hashes[150 + i] = hashes[i] ^ np.bitwise_or.reduce(np.uint64(1) << flips.astype(np.uint64), initial=0)
    for distance in (0, 4, 7):
        apart = np.bitwise_count(hashes[:, None] ^ hashes[None, :])
        expected = [(i, j) for i in range(300) for j in range(i + 1, 300) if apart[i, j] <= distance]
        assert [tuple(pair) for pair in duplicates.close_pairs(hashes, distance).tolist()] == expected
    assert duplicates.close_pairs(hashes[:0], 4).shape == (0, 2)


def test_a_pair_among_a_hundred_thousand_hashes_is_found():
    """Which a comparison of all pairs would take hours for."""
    hashes = np.random.default_rng(0).integers(0, 2**64, 100_000, dtype=np.uint64)
    hashes[70_000] = hashes[3] ^ np.uint64(0b1011)
    assert duplicates.close_pairs(hashes, 4).tolist() == [[3, 70_000]]


@pytest.mark.slow
def test_the_picture_that_stanford_cars_has_under_two_labels_is_found(shared_data):
    done = samtune("data", "check", shared_data / "stanford_cars", "--json")
    assert done.returncode == 0, done.stderr
    group = next(group for group in json.loads(done.stdout)["duplicates"] if group["labels_differ"])
    assert names(group) == {"test/02641.jpg", "test/07765.jpg"}
    assert {image["label"] for image in group["images"]} == {"Audi A5 Coupe 2012", "Audi TTS Coupe 2012"}


@pytest.mark.slow
@needs_imagehash
def test_the_near_duplicate_across_the_splits_of_cifar10_is_found(shared_data):
    result = look(shared_data / "cifar10")
    assert result["unreadable"] == []
    assert any(names(group) == {"train/train_34116.png", "test/test_00673.png"} for group in result["duplicates"])


# --------------------------------------------------------------------------------------------------------- odd labels


def test_odd_labels_are_said_and_are_no_error(tmp_path):
    names_of = ["Oak", "oak ", "elm", "ash", "yew"]
    labels = [0] * 2 + [1] * 2 + [2] * 20 + [3]
    write_tables(tmp_path, train=table(labels, names_of), test=table([0, 2], names_of, first=100))
    result = look(tmp_path)
    assert result["splits"]["test"]["missing_classes"] == ["oak ", "ash", "yew"]
    assert result["oddities"] == [
        "classes differ by case or blanks alone: 'Oak', 'oak '",
        "train has only one image of ash",
        "train is imbalanced: 1 to 20 images a class",
        "train has no image of yew",
        "test has no image of oak , ash, yew",
    ]
    check.raise_if_unreadable(result)
    assert samtune("data", "check", tmp_path).returncode == 0


def test_of_many_findings_the_first_are_printed_and_the_rest_is_counted(tmp_path):
    data = write_image_folder(tmp_path / "data", {"train": 2})
    for i in range(30):
        (data / "train" / "cat" / f"broken{i}.png").write_bytes(b"no image")
    lines = check.findings(look(data))
    assert len([line for line in lines if line.startswith("unreadable")]) == 20
    assert "... and 10 more such (--json lists all)" in lines
