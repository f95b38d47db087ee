"""Which folders are splits and which are classes: layouts as people have them, and what cannot be told."""

import errno
import json
import os
import re
import shutil
import unicodedata

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image, features

from samtune.data.decode import decode
from samtune.data.formats import register_plugins
from samtune.data.image_folder import read_folder
from samtune.data.split_roles import DataSelection
from samtune.errors import DataError, UsageError
from samtune.files import natural_key
from tests.conftest import image_bytes
from tests.support.data_sets import read, sizes

PICTURE = image_bytes(0)


def write(root, *paths):
    """A picture at each path; a name such as cat/3 is three pictures of it, anything with an ending one file."""
    for path in paths:
        folder, _, count = path.rpartition("/")
        names = [f"{i}.png" for i in range(int(count))] if count.isdigit() else [count]
        (root / folder).mkdir(parents=True, exist_ok=True)
        for name in names:
            (root / folder / name).write_bytes(PICTURE)
    return root


TRAIN = "train/cat/3, train/dog/3"
# Files -> splits with their sizes, a part of the note, if there is one, and classes other than cat and dog.
LAYOUTS = {
    "a folder around the data set": (
        "data/train/cat/3, data/train/dog/3, data/test/cat/1, data/test/dog/1",
        {"train": 6, "test": 2},
    ),
    "many folders around the data set": (
        "a/b/c/train/cat/3, a/b/c/train/dog/3, a/b/c/val/dog/1",
        {"train": 6, "validation": 1},
    ),
    "folders around classes": ("photos/all/cat/3, photos/all/dog/3", {"train": 6}),
    "Kaggle's names": (
        "training_set/training_set/cat/3, training_set/training_set/dog/3, test_set/test_set/cat/2",
        {"train": 6, "test": 2},
    ),
    "Intel's names, and pictures to predict": (
        "seg_train/seg_train/sea/3, seg_train/seg_train/ice/3, seg_test/seg_test/sea/2, seg_pred/seg_pred/5",
        {"train": 6, "test": 2},
        "seg_pred is left out: 5 pictures without a label",
        "ice sea",
    ),
    "images and annotations": (
        "images/train/cat/3, images/train/dog/3, images/val/cat/1, labels/train/cat/0.txt",
        {"train": 6, "validation": 1},
    ),
    "years, cases, signs": (
        "Train2017/cat/3, Train2017/dog/3, VAL-2017/cat/1, test images/dog/1",
        {"train": 6, "validation": 1, "test": 1},
    ),
    "one word before all splits": (
        "flowers_train/rose/3, flowers_train/tulip/3, flowers_test/rose/1",
        {"train": 6, "test": 1},
        "",
        "rose tulip",
    ),
    "one such folder alone": ("asl_train/a/3, asl_train/b/3", {"train": 6}, "", "a b"),
    "a container inside each split": (
        "train/images/cat/3, train/images/dog/3, test/images/cat/2",
        {"train": 6, "test": 2},
    ),
    "classes first": ("cat/train/3, cat/test/1, dog/train/3, dog/Test/2", {"train": 6, "test": 3}),
    "a lone val beside classes": ("cat/3, dog/3, val/cat/1, val/dog/1", {"train": 6, "validation": 2}),
    "a lone test beside classes": ("cat/3, dog/3, test/dog/2", {"train": 6, "test": 2}),
    "a lone test beside a folder that has its classes": (
        "images/cat/3, images/dog/3, test/dog/2",
        {"train": 6, "test": 2},
        "folder images is taken as train",
    ),
    "pictures right in test": (f"{TRAIN}, test/4", {"train": 6}, "test is left out: 4 pictures without a label"),
    "pictures in test/unknown": (
        f"{TRAIN}, test/unknown/4",
        {"train": 6},
        "test is left out: 4 pictures without a label",
    ),
    "pictures right in test, beside classes": (
        "cat/3, dog/3, test1/test1/4",
        {"train": 6},
        r"test1 is left out: 4 pictures without a label \(--train-split \. makes it a class\)",
    ),
    "classes right beside test, which may be one": (
        "control/3, test/3, placebo/3",
        {"train": 6},
        r"test is left out: 3 pictures without a label \(--train-split \. makes it a class\)",
        "control placebo",
    ),
    "classes first, and a container below": (
        "cat/train/images/3, cat/test/images/1, dog/train/images/3, dog/test/images/2",
        {"train": 6, "test": 3},
    ),
    "classes first, and a container between": (
        "cat/images/train/3, cat/images/test/1, dog/images/train/3",
        {"train": 6, "test": 1},
    ),
    "a second train": (f"{TRAIN}, train2/cat/2", {"train": 6, "train2": 2}, "split train2 is not used: 2 rows"),
    "a second test, without classes": (
        f"{TRAIN}, test/cat/1, test_2/3",
        {"train": 6, "test": 1},
        "test_2 is left out: 3 pictures",
    ),
    "a second train, without classes": (f"{TRAIN}, train_2/3", {"train": 6}, "train_2 is left out: 3 pictures"),
    "more of train under another name": (
        f"{TRAIN}, test/cat/1, train-extra/cat/2, train-extra/dog/2",
        {"train": 6, "test": 1},
        "folder train-extra is left out: 4 pictures",
    ),
    "a class whose name means no label elsewhere": (
        "train/-1/2, train/0/2, train/1/2, test/-1/1",
        {"train": 6, "test": 1},
        "",
        "0 1 -1",
    ),
    "classes with folders of other names": ("cat/day/1, cat/night/1, dog/day/2", {"train": 4}, "belong"),
    "a folder that is no split": (f"{TRAIN}, extra/cat/4", {"train": 6}, "folder extra is left out: 4 pictures"),
    "a picture beside the splits": (f"{TRAIN}, sample.png", {"train": 6}, "1 picture right in .* left out"),
    "a class called train": ("train/3, plane/3, bus/3", {"train": 9}, "", "bus plane train"),
    "classes called valid and invalid": ("valid/3, invalid/3", {"train": 6}, "", "invalid valid"),
    "folders inside classes": (
        "train/cat/day1/3, train/cat/day2/1, train/dog/day1/2, train/dog/1",
        {"train": 7},
        "folders in a class folder belong to the class",
    ),
    "what systems leave": (f"{TRAIN}, __MACOSX/train/cat/2, train/cat/@eaDir/2, train/.cache/cat/2", {"train": 6}),
    "usual names": (
        "training/cat/3, training/dog/3, valid/cat/1, testing/cat/2",
        {"train": 6, "validation": 1, "test": 2},
    ),
    "dev": ("Train/cat/3, Train/dog/3, dev/cat/1", {"train": 6, "validation": 1}, "split dev is used as validation"),
    "eval": (f"{TRAIN}, eval/cat/1", {"train": 6, "validation": 1}),
    "a class called train in each split": (
        "train/train/3, train/plane/3, test/train/2, test/plane/2",
        {"train": 6, "test": 4},
        "",
        "plane train",
    ),
    "two classes, one called test": ("test/3, plane/3", {"train": 6}, "", "plane test"),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_splits_and_classes_are_found_where_people_have_them(name, tmp_path):
    paths, found, note, classes = LAYOUTS[name] + ("", "cat dog")[len(LAYOUTS[name]) - 2 :]
    data = read(write(tmp_path, *paths.split(", ")))
    assert sizes(data) == found
    assert " ".join(data.class_names) == classes
    assert len(data.notes) == (1 if note else 0)
    assert re.search(note, " ".join(data.notes)), data.notes


# Files -> what is said, and what settles it: flags -> splits.
UNCLEAR = {
    "two data sets in one folder": (
        ("a/train/cat/2", "a/train/dog/2", "b/train/cat/2", "b/train/dog/2"),
        "a/train has the name of a split",
        ({"train_split": "a/train", "test_split": "b/train"}, {"train": 4, "test": 4}),
    ),
    "a data set beside other pictures": (
        ("data/train/cat/2", "data/train/dog/2", "data/test/cat/1", "docs/3"),
        "data/test has the name of a split",
        ({"train_split": "data/train"}, {"train": 4, "test": 1}),
    ),
    "val with other folders than its siblings": (
        ("cat/2", "dog/2", "val/day1/2"),
        "val may be a split or a class",
        ({"train_split": "."}, {"train": 6}),
    ),
    "pictures right in val, beside classes": (
        ("cat/2", "dog/2", "val/2"),
        "val may be a split or a class",
        ({"train_split": "."}, {"train": 6}),
    ),
    "several data sets beside each other": (
        ("f1_train/cat/2", "f1_test/cat/2", "f2_train/cat/2", "f2_train/dog/1", "f2_test/cat/2"),
        "f1_test and f2_test may both be test",
        ({"train_split": "f2_train", "test_split": "f2_test"}, {"train": 3, "test": 2}),
    ),
    "folds of the same classes": (
        ("fold1/cat/2", "fold1/dog/2", "fold2/cat/2", "fold2/dog/2", "fold3/cat/2", "fold3/dog/2"),
        "fold1, fold2, fold3 hold folders of the same names, cat, dog",
        ({"train_split": "fold1+fold2", "test_split": "fold3"}, {"train": 8, "test": 4}),
    ),
    "splits named in another language, one without a class": (
        ("prueba/cat/2", "prueba/dog/2", "entrenamiento/cat/2", "entrenamiento/dog/2", "entrenamiento/owl/2", "leer/1"),
        "entrenamiento, prueba hold folders of the same names, cat, dog, owl",
        ({"train_split": "entrenamiento", "test_split": "prueba"}, {"train": 6, "test": 4}),
    ),
    "places of the same classes, with a container": (
        ("amazon/images/cat/2", "amazon/images/dog/2", "webcam/images/cat/2", "webcam/images/dog/2"),
        "amazon, webcam hold folders of the same names",
        ({"train_split": "amazon", "test_split": "webcam"}, {"train": 4, "test": 4}),
    ),
    "years of the same classes, below one more folder": (
        ("2019/all/cat/2", "2019/all/dog/2", "2020/new/cat/2", "2020/new/dog/2"),
        "2019, 2020 hold folders of the same names, cat, dog",
        ({"train_split": "2019/all", "test_split": "2020/new"}, {"train": 4, "test": 4}),
    ),
    "vehicles, one of them a train": (
        ("bus/seq1/2", "bus/seq2/2", "train/seq1/2", "train/seq2/2"),
        "train may be a split or a class: bus, train hold folders of the same names",
        ({"train_split": "."}, {"train": 8}),
    ),
    "classes in classes, one of them called train": (
        ("road/train/2", "road/bus/2", "air/plane/2"),
        "road/train has the name of a split",
        ({"train_split": ".", "class_folders": "deepest"}, {"train": 6}),
    ),
}


@pytest.mark.parametrize("name", UNCLEAR)
def test_what_cannot_be_told_is_refused_with_its_tree_and_settled_by_flags(name, tmp_path):
    paths, said, (flags, found) = UNCLEAR[name]
    write(tmp_path, *paths)
    with pytest.raises(DataError, match="it cannot be told which folders are splits") as error:
        read(tmp_path)
    assert said in error.value.cause
    assert f"{paths[0].split('/')[0]}/  " in error.value.cause  # the tree
    assert "--train-split" in error.value.hint
    assert sizes(read(tmp_path, **flags)) == found


def test_flags_take_folders_of_any_name_and_their_siblings_keep_their_roles(tmp_path):
    write(tmp_path, "one/cat/3", "one/dog/3", "two/cat/1", "test/dog/2")
    assert sizes(read(tmp_path, train_split="one", val_split="two")) == {"train": 6, "validation": 1, "test": 2}
    assert sizes(read(tmp_path, train_split="one+two")) == {"train": 7, "test": 2}
    assert read(tmp_path, train_split="one").notes[0].startswith("folder two is left out: 1 picture")


def test_a_flag_may_leave_one_folder_out_of_the_classes(tmp_path):
    data = read(write(tmp_path, "cat/3", "dog/3", "seen/cat/1"), test_split="seen")
    assert sizes(data) == {"train": 6, "test": 1}
    assert data.class_names == ("cat", "dog")


def test_a_split_that_is_not_there_is_answered_with_those_that_are(tmp_path):
    with pytest.raises(UsageError, match="no split 'trian'") as error:
        read(write(tmp_path, "train/cat/1", "train/dog/1"), train_split="trian")
    assert "it has: train" in error.value.hint


def test_the_deepest_folders_are_classes_where_that_is_asked_for(tmp_path):
    data = read(write(tmp_path, "train/bird/owl/2", "train/bird/hen/2", "train/cat/2"), class_folders="deepest")
    assert data.class_names == ("bird/hen", "bird/owl", "cat")


def test_pictures_without_class_folders_are_answered_with_the_list_that_lies_there(tmp_path):
    write(tmp_path, "train/4")
    with pytest.raises(DataError, match="lie in no class folders"):
        read(tmp_path)
    (tmp_path / "labels.csv").write_text("id,breed\n")
    with pytest.raises(DataError, match="lie in no class folders") as error:
        read(tmp_path)
    assert str(tmp_path / "labels.csv") in error.value.hint


def test_a_class_folder_that_train_writes_otherwise_is_named_with_its_likeness(tmp_path):
    write(tmp_path, "train/Cat/0.png", "train/Dog/0.png", "test/cat/0.png", "test/Dog/0.png")
    with pytest.raises(DataError) as raised:
        read(tmp_path)
    assert raised.value.message == "class folder cat of split test is no class of train"
    assert raised.value.cause == "train has 2 classes: Cat, Dog; Cat is written otherwise"


def test_a_data_set_with_nothing_but_unlabelled_pictures_says_so(tmp_path):
    with pytest.raises(DataError, match="no labelled pictures") as error:
        read(write(tmp_path, "test/3"))
    assert "without a label" in error.value.cause


@pytest.mark.skipif(os.getuid() == 0, reason="root may read everything")
def test_a_folder_that_may_not_be_read_is_named(tmp_path):
    write(tmp_path, "train/cat/1", "train/dog/1")
    (tmp_path / "train" / "dog").chmod(0)
    with pytest.raises(DataError, match="dog cannot be read"):
        read(tmp_path)


@pytest.mark.parametrize("folder", [".", "train", "train/dog"])
def test_a_folder_that_the_system_refuses_is_named(folder, tmp_path, monkeypatch):
    """Also root sees this."""
    write(tmp_path, "train/cat/1", "train/dog/1")
    scandir = os.scandir

    def refuse(path):
        if os.path.samefile(path, tmp_path / folder):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match=r"folder .* cannot be read") as error:
        read(tmp_path)
    assert error.value.cause == "Permission denied"


def test_a_path_that_the_system_refuses_is_named(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        read(tmp_path / ("a" * 300))


# ------------------------------------------------------------------------------------------------------- beside tables


def metadata(root, name, column, prefix=""):
    """A file that tells something of four pictures: in each class of each of its two values one."""
    values = {f"{prefix}{kind}/{i}.png": i for kind in ("cat", "dog") for i in range(2)}
    csv = [f"file_name,{column}", *(f"{path},{value}" for path, value in values.items())]
    jsonl = [json.dumps({"file_name": path, column: value}) for path, value in values.items()]
    (root / name).write_text("\n".join(csv if name.endswith("csv") else jsonl))


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl"])
@pytest.mark.parametrize("place", [".", "train"])
def test_metadata_without_a_label_leaves_the_classes_to_the_folders(name, place, tmp_path):
    write(tmp_path, "train/cat/2", "train/dog/2")
    metadata(tmp_path / place, name, "width", "train/" if place == "." else "")
    data = read(tmp_path)
    assert data.class_names == ("cat", "dog")
    assert f"{name} is not read: no column" in data.notes[0]


@pytest.mark.parametrize(("column", "flags"), [("label", {}), ("width", {"label_key": "width"})])
def test_metadata_with_a_label_tells_the_classes(column, flags, tmp_path):
    metadata(write(tmp_path, "train/cat/2", "train/dog/2") / "train", "metadata.jsonl", column)
    assert read(tmp_path, **flags).class_names == ("0", "1")


# ---------------------------------------------------------------------------------------------------------------- names


def test_class_folders_that_are_numbers_are_ordered_as_numbers_and_as_a_list_has_them(tmp_path):
    write(tmp_path, *(f"train/{i}/2" for i in range(12)))
    rows = [f"train/{i}/{j}.png,{i}" for i in range(12) for j in range(2)]
    (tmp_path / "list.csv").write_text("\n".join(["path,label", *rows]))
    names = tuple(str(i) for i in range(12))
    folder, listed = read(tmp_path), read(tmp_path / "list.csv")
    assert folder.class_names == listed.class_names == names
    order = [folder.class_names[label] for label in folder.splits["train"].labels]
    assert [os.path.basename(os.path.dirname(folder.splits["train"].path(i))) for i in range(24)] == order


@pytest.mark.parametrize(
    ("names", "order"),
    [
        (["10", "9", "1"], ["1", "9", "10"]),
        (["class10", "class9", "class"], ["class", "class9", "class10"]),
        (["007", "8", "6"], ["6", "007", "8"]),
        (["b", "a10b2", "a10b1", "a9"], ["a9", "a10b1", "a10b2", "b"]),
        (["1" * 5000, "2"], ["2", "1" * 5000]),
    ],
)
def test_digits_inside_names_count_as_numbers(names, order):
    assert sorted(names, key=natural_key) == order


def test_names_that_are_not_utf8_are_readable_and_their_pictures_are_read(tmp_path):
    write(tmp_path, "train/dog/3")
    root = os.fsencode(tmp_path) + b"/train/"
    os.mkdir(root + b"caf\xe9")  # Latin-1
    for name in (b"\xe9t\xe9.png", b"0.png"):
        with open(root + b"caf\xe9/" + name, "wb") as file:
            file.write(PICTURE)
    data = read(tmp_path)
    assert data.class_names == ("café", "dog")
    assert data.splits["train"].image_bytes(0) == PICTURE
    assert data.splits["train"].where(1).endswith("café/été.png)")


def test_the_two_unicode_forms_of_a_name_are_one_class(tmp_path):
    for form in ("NFC", "NFD"):
        write(tmp_path, f"{unicodedata.normalize(form, 'train/café')}/2", "train/dog/2")
    data = read(tmp_path)
    assert data.class_names == ("café", "dog")
    assert sizes(data) == {"train": 6}


# -------------------------------------------------------------------------------------------------------------- formats


def test_a_class_that_would_vanish_is_named_with_what_reads_its_pictures(tmp_path, monkeypatch):
    monkeypatch.setattr("samtune.data.formats._is_installed", lambda ending: False)
    write(tmp_path, "train/cat/2", "train/dog/2", "train/owl/1.HEIC", "train/cat/3.jxl", "train/hen/1.dng")
    with pytest.raises(DataError, match=r"class owl of train: none of its 1 picture \(\.heic\)|class hen") as error:
        read(tmp_path)
    (tmp_path / "train" / "hen" / "1.dng").unlink()
    with pytest.raises(DataError, match="class owl of train") as error:
        read(tmp_path)
    assert "pip install 'samtune[heif]'" in error.value.hint
    data = read(tmp_path, on_bad_image="skip")
    assert data.class_names == ("cat", "dog")
    assert any("class owl of train" in note for note in data.notes)
    assert any("samtune[jxl]" in note for note in data.notes)


ABSENT = {
    "an empty folder": (lambda root: (root / "train/owl").mkdir(), "class owl of train is left out: it is empty"),
    "a link to nothing": (lambda root: (root / "train/owl").symlink_to("/nowhere"), "train/owl is left out: a link"),
    "a link to itself": (lambda root: (root / "train/owl").symlink_to("owl"), "train/owl is left out: a link"),
    "films": (
        lambda root: ((root / "train/owl").mkdir(), (root / "train/owl/a.mp4").write_bytes(b"\0\0\0 ftyp")),
        r"class owl of train is left out: no file is a picture by its ending, as .*a\.mp4",
    ),
    "a split that is empty": (lambda root: (root / "val").mkdir(), "folder val is left out: it is empty"),
    "a split that is a link to nothing": (
        lambda root: (root / "val").symlink_to("/nowhere"),
        "val is left out: a link",
    ),
}


@pytest.mark.parametrize("name", ABSENT)
def test_a_class_or_split_without_pictures_is_named(name, tmp_path):
    make, note = ABSENT[name]
    make(write(tmp_path, "train/cat/2", "train/dog/2", "test/cat/1"))
    data = read(tmp_path)
    assert sizes(data) == {"train": 4, "test": 1}
    assert len(data.notes) == 1
    assert re.search(note, data.notes[0])


def test_the_error_for_one_class_alone_says_what_became_of_the_other(tmp_path):
    write(tmp_path, "train/cat/2")
    (tmp_path / "train" / "owl").mkdir()
    with pytest.raises(DataError, match="only one class: cat") as error:
        read(tmp_path)
    assert "class owl of train is left out: it is empty" in error.value.cause


@pytest.mark.parametrize("path", ["train/owl/1", "train/owl/1.npy", "train/owl/x/1.jpg_large", "val/cat/1"])
def test_pictures_without_such_an_ending_do_not_vanish(path, tmp_path):
    folder, _, name = path.rpartition("/")
    write(tmp_path, "train/cat/2", "train/dog/2", f"{folder}/0.png")
    (tmp_path / folder / "0.png").rename(tmp_path / folder / name)
    with pytest.raises(DataError, match="pictures, but not by their ending"):
        read(tmp_path)
    assert sizes(read(tmp_path, on_bad_image="skip")) == {"train": 4}
    shutil.rmtree(tmp_path / "train")
    with pytest.raises(DataError, match="but not by their ending" if "val" in path else "is not there|cannot be read"):
        read(tmp_path)


@pytest.mark.parametrize("ending", ["tga", "JPE", "pbm", "j2k", "dib", "pcx", "sgi", "ppm", "tiff", "webp"])
def test_what_pillow_reads_is_a_picture(ending, tmp_path):
    write(tmp_path, "cat/1")
    (tmp_path / "owl").mkdir()
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "owl" / f"0.{ending}")
    train = read(tmp_path).splits["train"]
    assert [decode(train.image_bytes(row), str).shape[0] for row in range(2)] == [3, 3]


def test_a_folder_of_nothing_but_such_pictures_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr("samtune.data.formats._is_installed", lambda ending: False)
    with pytest.raises(DataError, match=r"none of its 2 pictures \(\.heic\)"):
        read(write(tmp_path, "train/cat/1.heic", "train/dog/1.heic"))


@pytest.mark.parametrize(("ending", "module"), [("heic", "pillow_heif"), ("jxl", "pillow_jxl"), ("avif", "")])
def test_with_what_reads_them_they_are_pictures_like_any_other(ending, module, tmp_path):
    if module:
        pytest.importorskip(module, reason=f"{module} is not installed (extra: test)")
    elif not features.check("avif"):
        pytest.skip("Pillow was built without AVIF")
    register_plugins()
    image = Image.fromarray(np.full((20, 30, 3), (200, 30, 60), np.uint8))
    for i, name in enumerate(("cat", "owl")):
        write(tmp_path, f"train/{name}/2")
        image.save(tmp_path / "train" / name / f"{i}.{ending}")
    train = read(tmp_path).splits["train"]
    assert len(train) == 6
    rows = [row for row in range(6) if train.path(row).endswith(ending)]
    assert len(rows) == 2
    pixels = decode(train.image_bytes(rows[0]), str)
    assert pixels.shape == (3, 20, 30)
    assert (pixels.float().mean((1, 2)) - torch.tensor([200.0, 30.0, 60.0])).abs().max() < 6


def test_an_archive_counts_as_a_folder_in_its_place(tmp_path):
    write(tmp_path / "content", "train/cat/2", "train/dog/2", "test/cat/1")
    (tmp_path / "set").mkdir()
    shutil.make_archive(str(tmp_path / "set" / "pictures"), "zip", tmp_path / "content")
    assert sizes(read(tmp_path / "set")) == {"train": 4, "test": 1}
    for split in ("train", "test"):
        shutil.make_archive(str(tmp_path / "two" / split), "gztar", tmp_path / "content" / split)
    assert sizes(read(tmp_path / "two")) == {"train": 4, "test": 1}


PACKED = {
    "a class": (("cat/2", "bird/2"), "dog.zip"),
    "a class, which another program unpacks": (("cat/2", "bird/2"), "dog.rar"),
    "a class below": (("a/b/cat/2", "a/b/bird/2"), "a/b/dog.tar.xz"),
    "a class of train": (("train/cat/2", "train/bird/2"), "train/dog.tgz"),
    "a class of test": (("train/cat/2", "train/bird/2", "test/cat/1"), "test/bird.zip"),
    "a class beside a container": (("train/images/cat/2", "train/images/bird/2"), "train/dog.zip"),
    "a class in its folder": (("train/cat/2", "train/bird/2"), "train/dog/all.zip"),
    "a class, before splits": (("cat/train/2", "bird/train/2"), "dog.zip"),
    "a split below a class": (("cat/train/2", "bird/train/2"), "cat/test.zip"),
    "the second class": (("cat/2",), "dog.zip"),
    "test": (("train/cat/2", "train/dog/2"), "test.zip"),
    "test in its folder": (("train/cat/2", "train/dog/2"), "test/test.zip"),
    "test beside a folder of classes": (("photos/cat/2", "photos/dog/2"), "Test_Set.ZIP"),
    "train": (("test/cat/2", "test/dog/2"), "train.tar.bz2"),
}


@pytest.mark.parametrize("name", PACKED)
def test_an_archive_that_may_be_a_class_or_a_split_is_not_dropped(name, tmp_path):
    paths, archive = PACKED[name]
    write(tmp_path, *paths, archive)  # it is not opened
    with pytest.raises(DataError, match=f"archive {archive} lies beside") as error:
        read(tmp_path)
    assert "unpack it" in error.value.hint


@pytest.mark.parametrize(
    "archive", ["data.zip", "archive.zip", "train.zip", "pets.tar.gz", "train/images.zip", "train/cat/x.zip", "docs.7z"]
)
def test_an_archive_of_what_is_unpacked_is_named(archive, tmp_path):
    root = write(tmp_path / "pets", "train/cat/2", "train/dog/2", "test/cat/1", archive)
    data = read(root)
    assert sizes(data) == {"train": 4, "test": 1}
    assert data.notes == (f"archive {archive} not read: beside folders of pictures archives are not unpacked",)


def pack(root, archive, *paths):
    """An archive of these pictures, and of texts where a path has another ending."""
    content = write(root.parent / "content", *paths)
    form = "zip" if archive.endswith(".zip") else "gztar"
    made = shutil.make_archive(str(root.parent / "made"), form, content)
    shutil.rmtree(content)
    shutil.move(made, root / archive)


@pytest.mark.parametrize(
    ("archive", "content"),
    [
        ("backup-2023.zip", "pets/cat/0.png pets/dog/0.png"),
        ("annotations.zip", "cat/0.xml dog/0.xml"),
        ("model.tar.gz", "weights.bin config.json"),
        ("archive (1).zip", "bird/0.png"),
        ("cat (2).zip", "0.png"),
    ],
)
def test_an_archive_without_pictures_or_with_those_that_are_there_stops_nothing(archive, content, tmp_path):
    pack(write(tmp_path / "pets", "cat/2", "dog/2"), archive, *content.split())
    data = read(tmp_path / "pets")
    assert sizes(data) == {"train": 4}
    assert data.notes == (f"archive {archive} not read: beside folders of pictures archives are not unpacked",)


@pytest.mark.parametrize(
    ("archive", "content"), [("bird.zip", "0.png"), ("bird.tar.gz", "bird/0.png"), ("test.zip", "cat/0.png dog/0.png")]
)
def test_an_archive_with_pictures_that_are_not_there_stops_the_run(archive, content, tmp_path):
    pack(write(tmp_path / "pets", "cat/2", "dog/2"), archive, *content.split())
    with pytest.raises(DataError, match=f"archive {archive} lies beside"):
        read(tmp_path / "pets")


@pytest.mark.parametrize("form", ["zip", "gztar"])
@pytest.mark.parametrize("damage", ["a page of the web", "cut off", "changed"])
def test_an_archive_that_cannot_be_unpacked_is_named_each_time(form, damage, tmp_path):
    content = write(tmp_path / "content", "cat/9", "dog/9")
    path = shutil.make_archive(str(tmp_path / "set" / "all"), form, content)
    with open(path, "rb") as file:
        whole = file.read()
    middle = len(whole) // 2
    damaged = whole[:middle] + (b"" if damage == "cut off" else bytes(50) + whole[middle + 50 :])
    with open(path, "wb") as file:
        file.write(b"<!DOCTYPE html>" if damage == "a page of the web" else damaged)
    for _ in range(2):  # nothing half unpacked is left for the second time
        with pytest.raises(DataError, match=r"archive .*all.* cannot be (opened|unpacked)") as error:
            read(tmp_path / "set")
        assert "download it again" in error.value.hint


@pytest.mark.parametrize("archives", ["train test", "images"])
def test_archives_beside_a_list_are_answered_with_the_command_that_unpacks_them(archives, tmp_path):
    root = tmp_path / "set"
    root.mkdir()
    for name in archives.split():
        pack(root, f"{name}.zip", "a.png", "b.png")
    table(root, "train.csv", "id,label", "a,x", "b,y")
    with pytest.raises(DataError, match="is not there") as error:
        read(root)
    for name in archives.split():
        assert f"`unzip {name}.zip -d {name}`" in error.value.hint


def test_a_packed_train_beside_a_test_without_labels_is_answered_with_the_command(tmp_path):
    pack(write(tmp_path / "set", "test/2"), "train.zip", "cat/1", "dog/1")
    with pytest.raises(DataError, match="has no labelled pictures") as error:
        read(tmp_path / "set")
    assert "`unzip train.zip -d train`" in error.value.hint


@pytest.mark.parametrize("form", ["zip", "gztar", "bztar", "xztar"])
def test_archives_of_all_usual_kinds_are_read(form, tmp_path):
    for split in ("train", "test"):
        write(tmp_path / split, "cat/2", "dog/2")
        shutil.make_archive(str(tmp_path / "set" / split), "zip" if split == "test" else form, tmp_path / split)
    assert sizes(read(tmp_path / "set")) == {"train": 4, "test": 4}


def test_a_picture_beside_archives_is_a_logo(tmp_path):
    write(tmp_path, "set/logo.png", "train/cat/2", "train/dog/2", "test/cat/2")
    for split in ("train", "test"):
        shutil.make_archive(str(tmp_path / "set" / split), "zip", tmp_path / split)
    data = read(tmp_path / "set")
    assert sizes(data) == {"train": 4, "test": 2}
    assert "1 picture right in" in data.notes[0]


def test_archives_that_are_not_read_are_answered_with_the_command_that_unpacks_them(tmp_path):
    for name, command in (("a.zip", "unzip"), ("b.tar.gz", "tar -xf"), ("c.7z", "7z x"), ("d.rar", "unrar x")):
        write(tmp_path, f"files/{name}")
        with pytest.raises(DataError, match="is an archive") as error:
            read(tmp_path / "files" / name)
        assert command in error.value.hint
    write(tmp_path, "foreign/pets.7z")
    with pytest.raises(DataError, match=r"pets\.7z .* cannot be read here"):
        read(tmp_path / "foreign")
    for form in ("zip", "gztar"):
        shutil.make_archive(str(tmp_path / "twice" / "train"), form, write(tmp_path / "content", "cat/1", "dog/1"))
    with pytest.raises(DataError, match="has the name of another beside it"):
        read(tmp_path / "twice")


def test_rows_lie_in_the_order_of_their_paths(tmp_path):
    """It decides splits and batches: it must not change."""
    write(tmp_path, "train/10/2", "train/9/2", "train/b/x/1", "train/b/1", "test/9/1")
    paths, labels = read_folder(tmp_path, DataSelection()).splits["train"]
    assert [os.path.relpath(path, tmp_path / "train") for path in paths] == [
        *("10/0.png", "10/1.png", "9/0.png", "9/1.png", "b/0.png", "b/x/0.png")
    ]
    assert labels == ["10", "10", "9", "9", "b", "b"]


# ------------------------------------------------------------------------------------------------- lists beside folders


def table(root, name, *lines):
    """A list: a header and rows; as parquet where its name says so."""
    if name.endswith(".parquet"):
        header, *rows = (line.split(",") for line in lines)
        pq.write_table(pa.table(dict(zip(header, map(list, zip(*rows, strict=True)), strict=True))), root / name)
    else:
        (root / name).write_text("".join(line + "\n" for line in lines))


# Pictures, list, its lines, what --train-split says where the folders are meant, if not ".".
OTHER_LABELS = {
    "parts of a download": (
        ("H_part_1/a.jpg", "H_part_1/b.jpg", "H_part_2/c.jpg", "H_part_2/d.jpg"),
        "H_metadata.csv",
        ("lesion_id,image_id,dx,age", "1,a,nv,3", "2,b,bkl,4", "3,c,nv,5", "4,d,bkl,5"),
    ),
    "parts with a folder in each, and a column of an unusual name": (
        ("images_1/images/a.png", "images_1/images/b.png", "images_2/images/c.png"),
        "Data_Entry_2017.csv",
        ("Image Index,Finding Labels,Patient Age", "a.png,Hernia,3", "b.png,Mass|Hernia,3", "c.png,Mass,4"),
    ),
    "a table": (
        ("part0/a.png", "part0/b.png", "part1/c.png"),
        "rows.parquet",
        ("path,label", "part0/a.png,x", "part0/b.png,y", "part1/c.png,x"),
    ),
    "numbered folders": (
        ("images/0/00a.png", "images/0/00b.png", "images/1/11a.png"),
        "train.csv",
        ("id,cat,dog", "00a,1,0", "00b,0,1", "11a,1,0"),
    ),
    "train and extra": (
        ("train/a.png", "train/b.png", "extra/c.png", "extra/d.png"),
        "train.csv",
        ("id,label", "a,x", "b,y"),
    ),
    "splits of folders": (
        ("train/p1/a.png", "train/p1/b.png", "train/p2/c.png", "test/p1/d.png"),
        "labels.jsonl",
        ('{"id": "a", "label": "x"}', '{"id": "b", "label": "y"}', '{"id": "c", "label": "y"}'),
        "train",
    ),
}


@pytest.mark.parametrize("name", OTHER_LABELS)
def test_folders_are_no_classes_where_a_list_tells_other_labels_of_their_pictures(name, tmp_path):
    paths, listed, lines, train = (*OTHER_LABELS[name], ".")[:4]
    table(write(tmp_path, *paths), listed, *lines)
    with pytest.raises(DataError, match=f"list .*{listed} tells other labels than the folders") as error:
        read(tmp_path)
    assert f"--dataset {tmp_path / listed}" in error.value.hint
    assert error.value.hint.endswith(f"take it away, or say --train-split {train}")
    data = read(tmp_path, train_split=train)
    assert len(data.class_names) == 2
    assert sum(sizes(data).values()) == len(paths)


SAME_LABELS = {
    "names": ("path,label", "cat/0.png,cat", "cat/1.png,cat", "dog/0.png,Dog", "dog/1.png,dog"),
    "numbers": (",path,label", "0,cat/0.png,7", "1,cat/1.png,7", "2,dog/0.png,8", "3,dog/1.png,8"),
    "columns": ("path,cat,dog", "cat/0.png,1,0", "cat/1.png,1,0", "dog/0.png,0,1", "dog/1.png,0,1"),
    "names beside more": ("path,label,class", "cat/0.png,x,cat", "cat/1.png,y,cat", "dog/0.png,x,dog"),
    "no labels": ("path,age,city", "cat/0.png,3,x", "cat/1.png,4,y", "dog/0.png,3,x", "dog/1.png,5,y"),
    "flags": ("path,flipped,flash", "cat/0.png,1,1", "cat/1.png,0,0", "dog/0.png,1,0", "dog/1.png,0,1"),
    "other pictures": ("path,label", "bird/5.png,x", "bird/6.png,y", "bird/7.png,x"),
}


@pytest.mark.parametrize("name", SAME_LABELS)
def test_a_list_that_says_the_same_as_the_folders_or_nothing_of_labels_stops_nothing(name, tmp_path):
    table(write(tmp_path, "cat/2", "dog/2"), "about.csv", *SAME_LABELS[name])
    assert read(tmp_path).class_names == ("cat", "dog")


def test_lists_of_a_split_are_compared_with_the_pictures_of_that_split(tmp_path):
    write(tmp_path, "train/cat/a.png", "train/dog/b.png", "test/c.png")
    table(tmp_path, "test.csv", "id,label", "a,x", "b,x")
    assert read(tmp_path).class_names == ("cat", "dog")


COPIES = {
    "below the name of the data set": ("yes/2", "no/2", "brain_tumor_dataset/yes/2", "brain_tumor_dataset/no/2"),
    "of some of the classes": ("cat/2", "dog/2", "owl/2", "augmented/cat/2", "augmented/dog/2"),
    "one folder deeper": ("cat/2", "dog/2", "more/set/cat/2", "more/set/dog/2"),
    "in train": ("train/cat/2", "train/dog/2", "train/train/cat/2", "train/train/dog/2"),
    "beside a split": ("cat/2", "dog/2", "copy/cat/2", "copy/dog/2", "test/cat/2"),
}


@pytest.mark.parametrize("name", COPIES)
def test_a_copy_of_the_classes_among_them_is_no_class(name, tmp_path):
    with pytest.raises(DataError, match="it cannot be told") as error:
        read(write(tmp_path, *COPIES[name]))
    assert "may be a class or a copy of those beside it: it holds" in error.value.cause
    assert f"{COPIES[name][0].split('/')[0]}/  " in error.value.cause
    data = read(tmp_path, train_split="train" if name == "in train" else ".")
    assert len(data.class_names) >= 3


@pytest.mark.parametrize(("link", "to"), [("val", "test"), ("test", "train")])
def test_two_splits_that_are_one_folder_are_refused(link, to, tmp_path):
    write(tmp_path, "train/cat/2", "train/dog/2", f"{to}/cat/2", f"{to}/dog/2")
    (tmp_path / link).symlink_to(tmp_path / to)
    with pytest.raises(DataError, match=r"splits .* are the same folder"):
        read(tmp_path)


def test_a_class_folder_that_two_splits_share_by_a_link_is_told(tmp_path):
    write(tmp_path, "train/cat/2", "train/dog/2", "test/dog/3")
    (tmp_path / "test/cat").symlink_to(tmp_path / "train/cat")
    (note,) = read(tmp_path).notes
    assert note.startswith("2 pictures of train in test, too")
