"""Batches made ahead of their use: in how much memory, in what parts, and what worker processes get."""

import os
import pickle
import subprocess
import sys
import time
import weakref

import numpy as np
import pytest
import torch

from samtune.data import loader
from samtune.data.cache import Images
from samtune.data.loader import eval_batches, train_batches
from samtune.data.transforms import EvalTransform, TrainTransform
from tests.conftest import write_image_folder
from tests.data.test_loader import DATA_CONFIG, assert_equal_batches
from tests.support.data_sets import look, read, table, write_tables

SIZE = (16, 16)
BATCH = 8
BATCH_BYTES = BATCH * 3 * 16 * 16
TRANSFORMS = {
    "threads": TrainTransform(SIZE, "bicubic", (0.5, 0.4, 0.3)),
    "threads, pad": TrainTransform(SIZE, "bicubic", (0.5, 0.4, 0.3), crop="pad", cutout=0.5),
    "processes": TrainTransform(SIZE, "bicubic", (0.5, 0.4, 0.3), color_jitter=0.3),
}


def train(images, transform=TRANSFORMS["threads"], workers=2, pin_memory=False, steps=12):
    rows = np.arange(len(images.split))
    options = {"batch_size": BATCH, "seed": 0, "total_steps": steps, "workers": workers, "pin_memory": pin_memory}
    return train_batches(images, rows, transform, **options)


def evaluation(images, workers=2, pin_memory=False):
    options = {"batch_size": BATCH, "workers": workers, "pin_memory": pin_memory}
    return eval_batches(images, np.arange(len(images.split)), EvalTransform(DATA_CONFIG), **options)


@pytest.mark.parametrize(
    ("name", "workers"), [("threads", 2), ("threads", 3), ("threads", 5), ("threads, pad", 3), ("processes", 2)]
)
def test_a_batch_made_in_parts_is_the_batch_made_as_a_whole(split, monkeypatch, name, workers):
    """With room for two batches only, all workers share each."""
    expected = list(train(Images(split), TRANSFORMS[name], workers=0))
    monkeypatch.setattr(loader, "_AHEAD_BYTES", 1)
    assert loader._look_ahead(BATCH_BYTES, workers) == (2, workers)
    assert_equal_batches(list(train(Images(split), TRANSFORMS[name], workers)), expected)
    assert_equal_batches(list(train(look(split), TRANSFORMS[name], workers)), expected)


@torch.inference_mode()
def test_evaluation_in_parts_sees_every_row_once_in_order(split, monkeypatch):
    """As it is called, in a mode in which torch's tensors cannot be changed by other threads."""
    expected = list(evaluation(Images(split), workers=0))
    monkeypatch.setattr(loader, "_AHEAD_BYTES", 1)
    assert_equal_batches(list(evaluation(look(split), workers=3)), expected)


@pytest.fixture
def alive(monkeypatch):
    """(bytes of images of batches that exist now, the most there were at once)."""
    now, most = set(), [0]

    def empty_batch(n, size, *, pin_memory=False):
        memory = np.empty((n, *size, 3), np.uint8)
        now.add(id(memory))
        weakref.finalize(memory, now.discard, id(memory))
        most[0] = max(most[0], len(now) * BATCH_BYTES)
        return torch.from_numpy(memory).permute(0, 3, 1, 2)

    monkeypatch.setattr(loader, "empty_batch", empty_batch)
    return lambda: (len(now) * BATCH_BYTES, most[0])


@pytest.mark.parametrize(("room", "ahead"), [(0.5, 2), (1, 2), (3.9, 3), (5, 5), (1000, 8)])
def test_batches_that_wait_fit_into_their_room_and_are_at_least_two(split, monkeypatch, alive, room, ahead):
    """Four workers make no more than eight ahead; the batch in use comes on top, and goes when it was used."""
    monkeypatch.setattr(loader, "_AHEAD_BYTES", int(room * BATCH_BYTES))
    batches = train(look(split), workers=4, steps=20)
    for _ in range(8):
        batch = next(batches)
        assert alive() == ((ahead + 1) * BATCH_BYTES, (ahead + 1) * BATCH_BYTES)
        del batch
        gone = time.monotonic() + 60
        while alive()[0] > ahead * BATCH_BYTES and time.monotonic() < gone:
            os.sched_yield()  # a thread that has made a part of it is about to forget it
        assert alive()[0] == ahead * BATCH_BYTES
    batches.close()
    assert alive()[0] == 0


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_of_decoded_pixels_only_a_few_images_are_taken_at_once(split, monkeypatch, transform):
    """They are larger than what becomes of them: those of a whole batch might fill the memory."""
    expected = list(train(Images(split), transform, workers=0))
    images = look(split)
    of_one = 3 * 24 * 20
    taken = []
    take = Images.take

    def recorded(self, rows):
        taken.append(len(rows))
        return take(self, rows)

    monkeypatch.setattr(loader, "_DECODED_BYTES", 3 * of_one)
    monkeypatch.setattr(Images, "take", recorded)
    assert_equal_batches(list(train(images, transform, workers=0)), expected)
    assert set(taken) == {3, 2}
    taken.clear()
    list(train(Images(split), transform, workers=0))
    assert set(taken) == {1}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("batches", [train, evaluation])
def test_pinned_memory_is_filled_in_place(split, monkeypatch, batches, workers):
    """Nothing is copied into it by the thread that asks for batches."""
    expected = list(batches(look(split), workers=workers))
    asked, empty = [], torch.empty

    def without_a_gpu(*arguments, pin_memory=False, **options):
        asked.append(pin_memory)
        return empty(*arguments, **options)

    monkeypatch.setattr(torch, "empty", without_a_gpu)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda _: pytest.fail("copied into pinned memory"))
    assert_equal_batches(list(batches(look(split), workers=workers, pin_memory=True)), expected)
    assert asked == [True] * (2 * len(expected))  # images and labels of each batch


# ------------------------------------------------------------------------------------------------- what processes get


@pytest.mark.parametrize("source", ["folder", "tables"])
@pytest.mark.parametrize("is_cached", [False, True])
def test_what_makes_batches_can_be_sent_to_another_process(split, tmp_path, source, is_cached):
    if source == "tables":
        split = read(write_tables(tmp_path / "t", train=table(["a", "b"] * 4, ["a", "b"]))).splits["train"]
    images = look(split) if is_cached else Images(split)
    made = loader._Batches(images, TRANSFORMS["processes"], seed=3)
    key = 1, np.arange(len(split))[::-1].copy()
    assert_equal_batches([pickle.loads(pickle.dumps(made))[key]], [made[key]])


SPAWNED = """
import multiprocessing, sys
import numpy as np
import torch
from samtune.data import source
from samtune.data.cache import Images
from samtune.data.loader import train_batches
from samtune.data.transforms import TrainTransform

if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    split = source.open_source(sys.argv[1]).splits["train"]
    transform = TrainTransform((16, 16), "bicubic", (0.5, 0.5, 0.5), color_jitter=0.3)
    options = {"batch_size": 4, "seed": 0, "total_steps": 3, "pin_memory": False}
    of = [list(train_batches(Images(split), np.arange(20), transform, workers=n, **options)) for n in (0, 1)]
    for (images, labels), (others, other_labels) in zip(*of, strict=True):
        assert torch.equal(images, others) and torch.equal(labels, other_labels)
    print("the same")
"""


@pytest.mark.slow
def test_workers_that_are_spawned_and_not_forked_load_the_same_batches(tmp_path):
    folder, script = write_image_folder(tmp_path / "data", {"train": 10}), tmp_path / "script.py"
    script.write_text(SPAWNED)
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, script, folder]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "the same\n"
