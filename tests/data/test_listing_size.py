"""Folders of very many pictures, as ImageNet: what is done for each picture before the first step is little."""

import builtins
import io
import os
import tracemalloc
from collections import Counter

import pytest

from samtune.config import loading
from samtune.data import folder_tree, path_source, tables
from samtune.data.loader import train_batches
from samtune.data.splits import open_run_splits
from samtune.data.transforms import TrainTransform
from samtune.train.run_data import load_run_data
from tests.benchmarks.listing import make_folder

CLASSES = 20
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two folders in the layout of ImageNet: pictures of train -> path."""
    made = {}
    for per_class in (150, 250):
        root = tmp_path_factory.mktemp(f"of-{per_class}")
        make_folder(root, CLASSES, per_class, 15)
        made[CLASSES * per_class] = root
    return made


def settings(root, **more):
    base = {"model": "resnet50", "pretrained": False, "dataset": str(root), "test_split": "val", "batch_size": 8}
    return loading.load(None, base | {"cache_limit": 1e-6, "workers": 0} | more)


@pytest.fixture
def opened(monkeypatch):
    """The pictures that are opened."""
    paths = []
    for module in (builtins, io):

        def opening(file, *arguments, original=module.open, **options):
            if str(file).endswith(".JPEG"):
                paths.append(os.path.basename(file))
            return original(file, *arguments, **options)

        monkeypatch.setattr(module, "open", opening)
    return paths


def test_the_validation_split_of_imagenet_is_test_and_validation_is_held_out_of_train(folders):
    (rows, root), *_ = folders.items()
    parts = open_run_splits(settings(root))
    assert parts.data.parts == {"train": ("train",), "test": ("val",)}
    assert len(parts.data.class_names) == CLASSES
    assert len(parts.test_rows) == CLASSES * 15
    assert parts.val is parts.train
    assert len(parts.val_rows) == CLASSES * 15  # 10 % of each class
    assert sorted([*parts.train_rows, *parts.val_rows]) == list(range(rows))
    assert parts.test.path(0).endswith("val/n01440764/ILSVRC2012_val_00000000.JPEG")


def test_a_run_opens_a_sample_of_the_pictures_before_its_first_step_and_no_more_of_a_larger_folder(folders, opened):
    counts = []
    for root in folders.values():
        opened.clear()
        data = load_run_data(settings(root))
        counts.append(len(opened))
        transform = TrainTransform((32, 32), "bicubic", MEAN)
        batches = train_batches(
            data.train, data.train_rows, transform, batch_size=8, seed=0, total_steps=9, workers=0, pin_memory=False
        )
        next(batches)
        assert len(opened) == counts[-1] + 8
        assert data.train.pixels is None
        assert data.bad_images == data.one_colour == []
    assert counts[1] == counts[0] < 2000  # a look at 256 of each split, for its depth and for its size


def test_reading_a_folder_opens_no_picture_at_all(folders, opened):
    open_run_splits(settings(folders[CLASSES * 150]))
    assert opened == []


def test_reading_a_folder_takes_less_than_300_bytes_a_picture(folders):
    """So 1.33 million take less than 0.4 GB, on top of some 0.8 GB that torch and its libraries take."""
    peaks = []
    for root in folders.values():
        open_run_splits(settings(root))  # what is loaded once is loaded
        tracemalloc.start()
        open_run_splits(settings(root))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    (few, many), (peak, larger_peak) = folders, peaks
    assert (larger_peak - peak) / (many - few) < 300


def test_a_class_folder_is_listed_once(folders, monkeypatch):
    """Whether it holds tables, its first entries tell."""
    root, listed, plain = folders[CLASSES * 150], Counter(), folder_tree.sorted_entries

    def listing(folder):
        listed[os.path.relpath(folder, root)] += 1
        return plain(folder)

    for module in (folder_tree, path_source, tables):
        monkeypatch.setattr(module, "sorted_entries", listing)
    open_run_splits(settings(root))
    classes = [str(folder.relative_to(root)) for folder in (root / "train").iterdir()]
    assert [listed[folder] for folder in classes] == [1] * CLASSES
