"""How the images of a step are divided among devices."""

import numpy as np
import pytest

from samtune.config import loading
from samtune.errors import UsageError
from samtune.train.batch_plan import BatchPlan

BOTH = {"batch_size": 32, "global_batch_size": 256}


def plan(devices, images=10_000, **flags):
    return BatchPlan.of(loading.load(None, {"model": "resnet10t", "dataset": "x", **flags}), devices, images)


@pytest.mark.parametrize(
    ("devices", "flags", "words"),
    [
        (1, {"batch_size": 32}, "32 images"),
        (4, {"batch_size": 32}, "128 images (32 per device x 4 devices = 128)"),
        (
            4,
            {"batch_size": 32, "global_batch_size": 256},
            "256 images (32 per device x 4 devices x 2 micro-batches = 256)",
        ),
        (
            1,
            {"batch_size": 32, "global_batch_size": 256},
            "256 images (32 per device x 1 device x 8 micro-batches = 256)",
        ),
        (4, {"global_batch_size": 256}, "256 images (64 per device x 4 devices = 256)"),
        (1, {"global_batch_size": 256}, "256 images"),
    ],
)
def test_a_step_says_how_it_is_divided(devices, flags, words):
    assert plan(devices, **flags).words() == words


@pytest.mark.parametrize("devices", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("total", [1, 2, 3, 7, 8, 24])
def test_every_row_of_a_step_is_computed_once_and_weighs_the_same(devices, total):
    batch = plan(devices, images=total, batch_size=24)
    rows = np.arange(100, 100 + batch.total)
    shares = [batch.share(rows, rank) for rank in range(devices)]
    weights = [batch.weight(rank) for rank in range(devices)]
    counted = [share for share, weight in zip(shares, weights, strict=True) if weight > 0]
    assert np.concatenate(counted).tolist() == rows.tolist()
    assert all(len(share) == 1 for share, weight in zip(shares, weights, strict=True) if weight == 0)
    # The mean over the ranks of weight x mean over the rank's images is the mean over all images.
    of_row = {row: w / devices / len(s) for s, w in zip(shares, weights, strict=True) if w > 0 for row in s.tolist()}
    assert list(of_row.values()) == pytest.approx([1 / batch.total] * batch.total)


def test_the_parts_of_a_step_are_the_same_for_any_number_of_devices():
    """So that --global-batch-size with --batch-size is the same algorithm on one device and on eight."""
    rows = np.arange(64)

    def parts(devices):
        batch = plan(devices, batch_size=8, global_batch_size=64)
        return [
            share[i : i + batch.part].tolist()
            for share in (batch.share(rows, rank) for rank in range(devices))
            for i in range(0, len(share), batch.part)
        ]

    assert parts(1) == parts(2) == parts(4) == parts(8)


@pytest.mark.parametrize(
    ("m", "images"), [("device", 8), ("global", 64), ("group:2", 32), (4, 4), (16, 16), ("group:4", 64)]
)
def test_so_many_images_share_a_perturbation(m, images):
    assert plan(4, batch_size=8, global_batch_size=64).sharing(m) == images


@pytest.mark.parametrize(
    ("devices", "flags", "said"),
    [
        (3, {"global_batch_size": 256}, "evenly"),
        (4, {"global_batch_size": 256, "batch_size": 48}, "evenly"),
        (8, {"global_batch_size": 4}, "evenly"),
        (3, {"m": "group:2"}, "3 devices"),
        (2, {"m": 17, "global_batch_size": 32}, "more than"),
    ],
)
def test_what_cannot_be_divided_is_refused(devices, flags, said):
    with pytest.raises(UsageError, match=said):
        plan(devices, **flags).sharing(flags.get("m", "device"))
