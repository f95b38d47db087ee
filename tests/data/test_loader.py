"""Rows to augmented batches."""

import multiprocessing
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter
from torchvision.transforms import v2

from samtune.config import loading
from samtune.data import transforms
from samtune.data.cache import Images, decode_into_cache
from samtune.data.decode import decode
from samtune.data.loader import eval_batches, steps_per_epoch, train_batches
from samtune.data.transforms import EvalTransform, TrainTransform
from samtune.errors import DataError, WorkerLost
from tests.conftest import image_bytes, write_image_folder
from tests.support.data_sets import train_of
from tests.support.fault_matrix import row

DATA_CONFIG = {
    "input_size": (3, 16, 16),
    "interpolation": "bicubic",
    "crop_pct": 0.875,
    "crop_mode": "center",
    "mean": (0.5, 0.4, 0.3),
    "std": (0.2, 0.3, 0.4),
}


@pytest.fixture
def train_split(tmp_path):
    return train_of(write_image_folder(tmp_path, {"train": 10}))


def collect(split, **options):
    arguments = {"batch_size": 4, "seed": 0, "total_steps": 12, "workers": 0, "pin_memory": False} | options
    transform = arguments.pop("transform", TrainTransform((16, 16), "bicubic", (0.5, 0.4, 0.3), scale=0.3))
    images = arguments.pop("images", Images(split))
    return list(train_batches(images, np.arange(len(split)), transform, **arguments))


def assert_equal_batches(a, b):
    assert len(a) == len(b)
    for (images, labels), (other_images, other_labels) in zip(a, b, strict=True):
        assert torch.equal(images, other_images)
        assert torch.equal(labels, other_labels)


def test_batches_do_not_depend_on_the_number_of_workers_or_the_global_generator(train_split):
    expected = collect(train_split)
    torch.manual_seed(99)
    assert_equal_batches(collect(train_split), expected)
    assert_equal_batches(collect(train_split, workers=2), expected)


ARITHMETIC = """
import sys
import numpy as np
import torch
from samtune.data import source
from samtune.data.cache import Images, decode_into_cache
from samtune.data.loader import train_batches
from samtune.data.transforms import TrainTransform

split = source.open_source(sys.argv[1]).splits["train"]
images = decode_into_cache(split, np.arange(20), limit=10**9, threads=2, progress=lambda *_: None)
transform = TrainTransform((16, 16), "bicubic", (0.5, 0.5, 0.5))
options = {"batch_size": 4, "seed": 0, "total_steps": 5, "workers": 2, "pin_memory": False}
list(train_batches(images, np.arange(20), transform, **options))
print(torch.get_num_threads())
"""


def test_loading_in_threads_leaves_the_main_thread_its_threads_of_arithmetic(tmp_path):
    folder = write_image_folder(tmp_path / "data", {"train": 10})
    env = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"} | {"SAMTUNE_CACHE": str(tmp_path / "cache")}

    def printed(code):
        command = [sys.executable, "-c", code, folder]
        return subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout

    assert printed(ARITHMETIC) == printed("import torch; print(torch.get_num_threads())")


def test_seeds_and_epochs_differ_in_order_and_augmentation(train_split):
    first = collect(train_split)
    assert not torch.equal(first[0][0], collect(train_split, seed=1)[0][0])
    assert not torch.equal(first[0][0], first[5][0])


def test_loading_in_the_main_process_leaves_the_global_generator_alone(train_split):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    collect(train_split)
    assert torch.equal(before, torch.get_rng_state())


def test_an_epoch_has_full_batches_and_a_small_data_set_is_one():
    assert steps_per_epoch(20, 4) == 5
    assert steps_per_epoch(23, 4) == 5
    assert steps_per_epoch(3, 4) == 1


def test_evaluation_sees_every_row_once_in_order(train_split):
    rows = np.array([3, 1, 19, 7, 7])
    plain = EvalTransform(DATA_CONFIG)
    batches = eval_batches(Images(train_split), rows, plain, batch_size=2, workers=0, pin_memory=False)
    labels = torch.cat([labels for _, labels in batches])
    assert labels.tolist() == train_split.labels[rows].tolist()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_image_ends_the_stream_with_its_place_and_no_traceback(tmp_path, workers):
    folder = write_image_folder(tmp_path, {"train": 10})
    (folder / "train" / "cat" / "3.png").write_bytes(b"broken")
    split = train_of(folder)
    with pytest.raises(DataError, match=r"cat/3\.png.* cannot be decoded") as error:
        collect(split, workers=workers)
    assert "Traceback" not in str(error.value)


# -------------------------------------------------------------------------------------------------------- augmentation


AUGMENTATIONS = {
    "plain": {},
    "pad": {"crop": "pad"},
    "policy": {"aa": "trivial", "color_jitter": 0.3, "erase": 0.5},
    "cutout": {"cutout": 0.5},
}


@pytest.mark.parametrize("options", AUGMENTATIONS.values(), ids=AUGMENTATIONS)
def test_what_happens_to_an_image_depends_on_seed_epoch_and_row_alone(train_split, options, tmp_path, monkeypatch):
    """Not on workers, on the cache, on its neighbours in the batch, or on the global generator."""
    monkeypatch.setenv("SAMTUNE_CACHE", str(tmp_path / "cache"))
    transform = TrainTransform((16, 16), "bicubic", (0.5, 0.4, 0.3), **options)
    expected = collect(train_split, transform=transform)
    torch.manual_seed(99)
    assert_equal_batches(collect(train_split, transform=transform, workers=2), expected)
    cached = decode_into_cache(train_split, np.arange(20), limit=10**9, threads=1, progress=lambda *_: None)
    assert cached.pixels is not None
    assert_equal_batches(collect(train_split, transform=transform, images=cached), expected)
    images, rows = [cached[row] for row in range(6)], np.arange(6)
    together = transform(images, 3, 2, rows)
    assert together.dtype == torch.uint8
    assert together.is_contiguous(memory_format=torch.channels_last)
    for place in range(6):
        assert torch.equal(transform([images[place]], 3, 2, rows[place : place + 1])[0], together[place])
    assert not torch.equal(transform(images, 3, 3, rows), together)


def test_draws_are_even_and_independent_of_their_order():
    u = transforms.uniform(1, 2, np.arange(2000), 50)
    assert 0 <= u.min() < u.max() < 1
    counts, _ = np.histogram(u, bins=100, range=(0, 1))
    assert np.abs(counts - 1000).max() < 5 * np.sqrt(1000)
    assert np.abs(np.corrcoef(u[:, :10].T) - np.eye(10)).max() < 0.1
    assert np.array_equal(transforms.uniform(1, 2, np.array([7, 3]), 50), u[[7, 3]])
    for other in (transforms.uniform(2, 2, np.arange(2000), 50), transforms.uniform(1, 3, np.arange(2000), 50)):
        assert not (other == u).any()


def test_crops_have_the_areas_and_ratios_of_torchvisions():
    """Two samples of one distribution: means and extremes of 4,000 crops agree."""
    shapes = np.tile([[90, 140]], (4000, 1))
    boxes = transforms.resized_crop_boxes(shapes, transforms.uniform(0, 0, np.arange(4000), 40), scale=0.3)
    torch.manual_seed(0)
    reference = v2.RandomResizedCrop(16, scale=(0.3, 1.0))
    blank = torch.empty(3, 90, 140)
    drawn = [reference.make_params([blank]) for _ in range(4000)]
    theirs = np.array([[d["top"], d["left"], d["height"], d["width"]] for d in drawn])
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, 2:] >= 1).all()
    assert (boxes[:, 0] + boxes[:, 2] <= 90).all()
    assert (boxes[:, 1] + boxes[:, 3] <= 140).all()
    for ours, other in ((boxes, theirs), (boxes[:, 2] * boxes[:, 3], theirs[:, 2] * theirs[:, 3])):
        deviation = np.sqrt(ours.var(0) / 4000 + other.var(0) / 4000)
        assert (np.abs(ours.mean(0) - other.mean(0)) < 5 * deviation).all()


def test_an_image_in_which_no_crop_fits_gives_its_middle():
    boxes = transforms.resized_crop_boxes(np.array([[10, 1000], [1000, 10]]), np.full((2, 40), 0.999), scale=0.99)
    assert boxes.tolist() == [[0, 493, 10, 13], [493, 0, 13, 10]]


def test_a_crop_of_the_whole_image_is_its_resize():
    picture = decode(image_bytes(0, size=(40, 30)), str)
    transform = TrainTransform((30, 40), "bicubic", (0.5,) * 3, scale=1.0, hflip=0.0, crop="resized")
    found = transform([picture], 0, 0, np.zeros(1, np.int64))[0]
    draws = transforms.uniform(0, 0, np.zeros(1, np.int64), 46)[:, :40]
    box = transforms.resized_crop_boxes(np.array([[30, 40]]), draws, 1.0)[0].tolist()
    expected = v2.functional.resized_crop(picture, *box, [30, 40], v2.InterpolationMode.BICUBIC, antialias=True)
    assert (found.int() - expected.int()).abs().max() <= 1


def test_the_padded_crop_moves_the_image_by_at_most_an_eighth_and_fills_with_the_mean():
    picture = torch.randint(1, 255, (3, 32, 32), dtype=torch.uint8)
    transform = TrainTransform((32, 32), "bicubic", (0.0, 0.0, 0.0), crop="pad", hflip=0.0)
    seen = set()
    for place in range(300):
        moved = transform([picture], 0, 0, np.array([place]))[0]
        room = torch.zeros(3, 40, 40, dtype=torch.uint8)
        room[:, 4:36, 4:36] = picture
        places = ((y, x) for y in range(9) for x in range(9))
        found = [(y, x) for y, x in places if torch.equal(room[:, y : y + 32, x : x + 32], moved)]
        assert len(found) == 1
        seen |= set(found)
    assert {y for y, _ in seen} == {x for _, x in seen} == set(range(9))


def test_cutout_erases_a_square_to_what_normalisation_makes_zero():
    mean = (100 / 255, 50 / 255, 200 / 255)
    transform = TrainTransform((32, 32), "bilinear", mean, scale=1.0, hflip=0.0, crop="pad", cutout=0.5)
    batch = transform([torch.zeros(3, 32, 32, dtype=torch.uint8) + 7] * 50, 0, 0, np.arange(50))
    erased = (batch == torch.tensor([100, 50, 200], dtype=torch.uint8).view(3, 1, 1)).all(1).sum((1, 2))
    assert erased.max() <= 16 * 16 + 32 * 8  # the square, and the edge that the crop padded
    assert erased.float().mean() > 100


@pytest.mark.parametrize("policy", transforms.POLICIES)
def test_every_policy_keeps_shape_and_type(policy):
    transform = TrainTransform((16, 16), "bicubic", (0.5,) * 3, aa=policy)
    batch = transform([decode(image_bytes(i), str) for i in range(4)], 0, 0, np.arange(4))
    assert batch.shape == (4, 3, 16, 16)
    assert batch.dtype == torch.uint8


def test_flips_come_as_often_as_asked_for():
    picture = torch.arange(16 * 16 * 3, dtype=torch.int32).remainder(251).to(torch.uint8).view(3, 16, 16)
    transform = TrainTransform((16, 16), "bicubic", (0.5,) * 3, hflip=0.3, crop="pad")
    plain = TrainTransform((16, 16), "bicubic", (0.5,) * 3, hflip=0.0, crop="pad")
    rows = np.arange(1000)
    flipped = (transform([picture] * 1000, 0, 0, rows) != plain([picture] * 1000, 0, 0, rows)).flatten(1).any(1)
    assert 250 < flipped.sum() < 350


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.5, 0.0), (0.0, 1.0), (0.5, 1.0)])
def test_mixed_batches_have_shares_that_add_up_and_depend_on_seed_and_step_alone(mixup, cutmix):
    images, labels = torch.randn(6, 3, 8, 8), torch.arange(6) % 3
    state = torch.get_rng_state()
    mixed, shares = transforms.mix(images, labels, 3, mixup=mixup, cutmix=cutmix, seed=1, step=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert shares.shape == (6, 3)
    torch.testing.assert_close(shares.sum(1), torch.ones(6))
    again, _ = transforms.mix(images, labels, 3, mixup=mixup, cutmix=cutmix, seed=1, step=2)
    other, _ = transforms.mix(images, labels, 3, mixup=mixup, cutmix=cutmix, seed=1, step=3)
    assert torch.equal(mixed, again)
    assert not torch.equal(mixed, other)


@pytest.mark.parametrize("alpha", [8.0, 32.0])
def test_the_shares_of_mixup_have_the_spread_of_the_beta_distribution(alpha):
    """Zhang et al. 2018: shares are Beta(alpha, alpha), with mean 1/2 and variance 1 / (8 alpha + 4)."""
    images, labels = torch.zeros(2, 3, 1, 1), torch.arange(2)
    mixed = (transforms.mix(images, labels, 2, mixup=alpha, cutmix=0.0, seed=0, step=step) for step in range(500))
    drawn = np.array([float(shares[0, 0]) for _, shares in mixed])
    assert abs(drawn.mean() - 0.5) < 5 * drawn.std() / np.sqrt(500)
    assert drawn.var() == pytest.approx(1 / (8 * alpha + 4), rel=0.2)


def test_without_mixing_a_batch_is_left_alone():
    images, labels = torch.randn(2, 3, 4, 4), torch.arange(2)
    assert transforms.mix(images, labels, 2, mixup=0.0, cutmix=0.0, seed=0, step=0) == (images, labels)


def test_the_settings_of_a_run_become_its_augmentation():
    settings = {"aa": "rand", "color_jitter": 0.1, "cutout": 0.2, "reprob": 0.3, "crop": "pad", "scale": 0.4}
    given = loading.load(None, {"model": "m", "dataset": "cifar10", "hflip": 0.1} | settings)
    assert transforms.train_transform(DATA_CONFIG, given) == TrainTransform(
        (16, 16), "bicubic", (0.5, 0.4, 0.3), "pad", 0.4, 0.1, "rand", 0.1, 0.2, 0.3
    )


# -------------------------------------------------------------------------------------------------------------- faults


IN_PROCESSES = TrainTransform((16, 16), "bicubic", (0.5, 0.4, 0.3), color_jitter=0.3)


@pytest.fixture
def impatient(monkeypatch):
    """The loader looks after its workers ten times a second, not every five."""
    monkeypatch.setattr(_MultiProcessingDataLoaderIter._try_get_data, "__defaults__", (0.1,))


def stream(split, **options):
    arguments = {"batch_size": 4, "seed": 0, "total_steps": 40, "workers": 2, "pin_memory": False} | options
    return train_batches(Images(split), np.arange(len(split)), IN_PROCESSES, **arguments)


def loaders():
    return [child for child in multiprocessing.active_children() if child.daemon]


def kill_one():
    """Of the loading processes, and wait until it is dead."""
    victim = loaders()[0]
    os.kill(victim.pid, signal.SIGKILL)
    os.waitid(os.P_PID, victim.pid, os.WEXITED | os.WNOWAIT)
    return victim.pid


@row(14)
@pytest.mark.parametrize("delivered", [1, 2, 7])
def test_a_killed_worker_is_replaced_and_the_batches_are_the_same(train_split, impatient, capsys, delivered):
    expected = list(stream(train_split))
    assert capsys.readouterr().err == ""
    batches = stream(train_split)
    found = [next(batches) for _ in range(delivered)]
    victim = kill_one()
    assert_equal_batches(found + list(batches), expected)
    said = capsys.readouterr().err
    assert said.count("warning:") == 1
    assert f"process {victim}, which loads images, was ended by SIGKILL" in said
    assert loaders() == []


@row(14)
def test_a_workers_death_does_not_disturb_what_the_main_process_does_meanwhile(train_split, impatient):
    handler = signal.getsignal(signal.SIGCHLD)
    batches = stream(train_split)
    found = [next(batches)]
    kill_one()
    for _ in range(1000):  # a signal's handler would run between two of these
        torch.ones(3).sum()
    assert signal.getsignal(signal.SIGCHLD) is handler
    assert len(found + list(batches)) == 40


@row(14)
def test_the_second_death_of_a_worker_ends_the_run_with_what_to_do(train_split, impatient, capsys):
    batches = stream(train_split)
    next(batches)
    kill_one()
    while "warning:" not in capsys.readouterr().err:
        next(batches)
    victim = kill_one()
    with pytest.raises(WorkerLost) as error:
        list(batches)
    assert error.value.exit_code == 9
    assert f"process {victim}" in error.value.message
    assert "/dev/shm" in error.value.cause
    assert "--workers 0" in error.value.hint
    assert loaders() == []


@row(14)
def test_a_worker_that_dies_on_the_same_batch_again_ends_the_run(train_split, impatient, monkeypatch):
    """As the one does that needs more memory than there is."""
    main = os.getpid()
    take = Images.take

    def dies(self, rows):
        if os.getpid() != main and 7 in rows:
            os.kill(os.getpid(), signal.SIGKILL)
        return take(self, rows)

    monkeypatch.setattr(Images, "take", dies)
    with pytest.raises(WorkerLost):
        list(stream(train_split))


@row(14)
def test_a_defect_in_a_worker_is_not_taken_for_its_death(train_split, impatient, monkeypatch, capsys):
    def breaks(self, rows):
        raise RuntimeError("a defect")

    monkeypatch.setattr(Images, "take", breaks)
    with pytest.raises(RuntimeError, match="a defect"):
        list(stream(train_split))
    assert "warning" not in capsys.readouterr().err


BROKEN_OFF = """
import sys
import numpy as np
from samtune.data import source
from samtune.data.cache import Images
from samtune.data.loader import train_batches
from samtune.data.transforms import TrainTransform

split = source.open_source(sys.argv[1]).splits["train"]
transform = TrainTransform((16, 16), "bicubic", (0.5, 0.5, 0.5), color_jitter=0.3)
options = {"batch_size": 4, "seed": 0, "total_steps": 500, "workers": 2, "pin_memory": False}
for batch in train_batches(Images(split), np.arange(20), transform, **options):
    raise RuntimeError("a defect")
"""


@row(14)
def test_a_process_that_ends_with_a_traceback_ends_its_workers(tmp_path):
    folder = write_image_folder(tmp_path, {"train": 10})
    command = [sys.executable, "-c", BROKEN_OFF, folder]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    assert done.stderr.endswith("RuntimeError: a defect\n")


@row(14)
def test_slurms_warning_signal_does_not_end_workers(train_split, impatient, capsys):
    batches = stream(train_split)
    found = [next(batches)]
    for child in loaders():
        os.kill(child.pid, signal.SIGUSR1)
    assert_equal_batches(found + list(batches), list(stream(train_split)))
    assert capsys.readouterr().err == ""
