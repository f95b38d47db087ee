"""What is measured of a model and its images: parts in order, equal over ranks and micro-batches, nothing changed."""

import contextlib
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from samtune.distributed import collectives, signals
from samtune.sharpness.measure import Measures, Subject, measure, measure_line
from tests.support.rank_processes import Ranks

ALL = Measures(m=(1, 4), rho=0.05, ascent_steps=3, top=3, max_steps=30, probes=2, lanczos_steps=8, slices=1, points=5)
PLAIN = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}


def subject(seed=0, n=8):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2), nn.Tanh(), nn.Flatten(), nn.Linear(8, 3))
    images = torch.randint(0, 256, (n, 3, 4, 4), dtype=torch.uint8)
    for _ in range(5):
        model(torch.randn(8, 3, 4, 4))  # running statistics that are not 0 and 1
    return Subject(model.double().eval(), images, torch.arange(n) % 3, PLAIN, channels_last=False)


def entries(parts):
    found = {}
    for part in parts:
        for key, value in part.items():
            found[key] = value
    return found


def test_everything_is_measured_and_the_model_is_as_before():
    one = subject()
    before = {name: value.clone() for name, value in one.model.state_dict().items()}
    found = entries(measure(one, ALL))
    assert [entry["m"] for entry in found["m_sharpness"]] == [1, 4]
    assert found["m_sharpness"][0]["maximum"] >= found["m_sharpness"][1]["maximum"] > 0
    assert found["hessian"]["eigenvalues"] == sorted(found["hessian"]["eigenvalues"], reverse=True)
    first, second = map(len, found["density"]["nodes"])  # the first probe's steps serve the eigenvalues, too
    assert first >= second == 8
    assert first == found["hessian"]["products"] - 3
    assert found["slices"]["at"] == [-1.0, -0.5, 0.0, 0.5, 1.0]
    assert found["slices"]["loss"][2] == pytest.approx(found["loss"], rel=1e-12)
    logits = one.model((one.images.double() / 255 - 0.5) / 0.25)
    assert found["loss"] == pytest.approx(float(F.cross_entropy(logits, one.labels).detach()), rel=1e-6)
    assert all(torch.equal(value, before[name]) for name, value in one.model.state_dict().items())
    assert not one.model.training


@pytest.mark.parametrize("size", [3, 8])
def test_micro_batches_change_nothing(size):
    whole, parts = (entries(measure(subject(), dataclasses.replace(ALL, micro_batch=n))) for n in (32, size))
    assert parts["hessian"]["eigenvalues"] == pytest.approx(whole["hessian"]["eigenvalues"], rel=1e-6)
    assert parts["slices"]["loss"] == pytest.approx(whole["slices"]["loss"], rel=1e-9)
    for a, b in zip(parts["m_sharpness"], whole["m_sharpness"], strict=True):
        assert a["maximum"] == pytest.approx(b["maximum"], rel=1e-9)


def of_rank():
    return entries(measure(subject(), dataclasses.replace(ALL, micro_batch=2)))


def test_two_ranks_find_what_one_finds(tmp_path):
    alone = of_rank()
    with Ranks(2, tmp_path) as ranks:
        first, second = ranks(of_rank)
    assert first == second
    assert first["loss"] == pytest.approx(alone["loss"], rel=1e-12)
    assert first["hessian"]["eigenvalues"] == pytest.approx(alone["hessian"]["eigenvalues"], rel=1e-9)
    assert first["m_sharpness"][1]["maximum"] == pytest.approx(alone["m_sharpness"][1]["maximum"], rel=1e-9)
    assert first["density"]["moment_1"]["mean"] == pytest.approx(alone["density"]["moment_1"]["mean"], rel=1e-9)
    assert first["slices"]["loss"] == pytest.approx(alone["slices"]["loss"], rel=1e-12)


def test_a_plane_holds_the_line_along_its_second_direction_in_its_middle_row():
    plane = entries(measure(subject(), Measures(slices=2, points=3)))["slices"]
    assert len(plane["loss"]) == len(plane["loss"][0]) == 3
    line = entries(measure(subject(), Measures(slices=1, points=3, seed=1)))["slices"]  # the plane's seeds are 0 and 1
    assert plane["loss"][1] == pytest.approx(line["loss"], rel=1e-12)


def test_more_images_in_a_group_than_there_are_is_all_of_them():
    found = entries(measure(subject(), Measures(m=(4, 8, 100), ascent_steps=2)))
    assert [(entry["m"], entry["groups"]) for entry in found["m_sharpness"]] == [(4, 2), (8, 1)]


@pytest.mark.parametrize("points", [3, 9, 11])
def test_a_line_to_another_model_has_its_loss_at_1(points):
    one, other = subject(0), subject(1)
    line = measure_line(one, other.model.state_dict(), Measures(points=points))
    of_other = Subject(other.model, one.images, one.labels, PLAIN, channels_last=False)
    assert line["loss"][line["at"].index(0.0)] == pytest.approx(entries(measure(one, Measures()))["loss"], rel=1e-9)
    assert line["loss"][line["at"].index(1.0)] == pytest.approx(
        entries(measure(of_other, Measures()))["loss"], rel=1e-6
    )


@pytest.mark.parametrize(
    ("at", "found_before"),
    [
        ("m-sharpness", {"loss", "top1_error"}),
        ("Hessian", {"loss", "top1_error", "m_sharpness"}),
        ("slices", {"loss", "top1_error", "m_sharpness", "hessian", "density"}),
    ],
)
def test_what_was_found_before_a_stop_is_there_and_the_weights_are_as_before(at, found_before):
    one = subject()
    before = {name: value.clone() for name, value in one.model.state_dict().items()}
    reached = ""

    def progress(what, images):
        nonlocal reached
        reached = what

    def check_stop():
        if reached.startswith(at):
            raise signals.Interrupted

    found = {}
    with contextlib.suppress(signals.Interrupted):
        for part in measure(one, ALL, progress, check_stop):
            found |= part
    assert found.keys() == found_before
    assert all(torch.equal(value, before[name]) for name, value in one.model.state_dict().items())


def test_progress_counts_no_more_than_was_announced():
    counted, line = [], []
    entries(measure(subject(), ALL, lambda what, images: counted.append(images)))
    assert 0.3 * ALL.work(8) < sum(counted) <= ALL.work(8)
    measure_line(subject(), subject(1).model.state_dict(), ALL, lambda what, images: line.append(images))
    assert sum(line) == pytest.approx(ALL.line_work(8), abs=8)
    assert collectives.world_size() == 1
