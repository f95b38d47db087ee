"""--perturb-from: SAM on the last part of a network, from the command line."""

import json

import pytest
import safetensors.torch
import timm
import torch

from samtune.errors import UsageError
from samtune.models.cuts import cut_points, find_cut
from tests.conftest import SMALL_MODEL, samtune, write_image_folder

STEPS = ("--epochs", "6 steps", "--lr", 0.01, "--batch-size", 8, "--no-html", "--workers", 0, "--drop", 0.2)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return write_image_folder(tmp_path_factory.mktemp("data") / "pets", {"train": 20, "test": 6})


def run(photos, folder, *more):
    done = samtune("run", *SMALL_MODEL, *STEPS, "--dataset", photos, "--output", folder, *more)
    assert done.returncode == 0, done.stderr
    weights = safetensors.torch.load_file(folder / "checkpoints" / "last" / "model.safetensors")
    return json.loads((folder / "report.json").read_text()), weights


def test_a_run_ends_where_one_that_computes_the_front_twice_ends_and_says_what_it_cost(photos, tmp_path):
    report, ours = run(photos, tmp_path / "a", "--perturb-from", "layer3")
    plain, oracle = run(photos, tmp_path / "b", "--perturb", r"^(layer3|layer4|fc)\.")
    for name, w in oracle.items():
        assert torch.allclose(ours[name], w, rtol=1e-4, atol=1e-6), name
    share = report["sam"]["suffix_share"]
    assert 0 < share < 0.5
    assert report["cost"]["forward_backward_passes"] == pytest.approx(6 * (1 + share))
    assert plain["cost"]["forward_backward_passes"] == 12
    assert report["sam"]["perturb_from"] == "layer3"
    assert "from layer3 on is" in (tmp_path / "a" / "log.txt").read_text()


def test_a_share_is_the_stage_that_is_nearest(photos, tmp_path):
    model = timm.create_model("test_resnet", num_classes=2)
    points = {point.name: point.share for point in cut_points(model, (3, 32, 32))}
    assert list(points.values()) == sorted(points.values(), reverse=True)
    assert "conv1" not in points
    for asked, share in (("auto", 0.25), ("60%", 0.6), ("3.5 %", 0.035)):
        found = find_cut(model, asked, (3, 32, 32))
        assert abs(found.share - share) == min(abs(other - share) for other in points.values())
    assert find_cut(model, "layer3.0", (3, 32, 32)).share == points["layer3"]
    with pytest.raises(UsageError, match="it can be cut at bn1, layer1"):
        find_cut(model, "blocks.5", (3, 32, 32))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("--perturb-from", "blocks.9"), "the model has no such module"),
        (("--perturb-from", "layer2.0.conv2"), "no place to cut"),
        (("--perturb-from", "layer3", "--perturb", r"^layer1\."), "matches no trainable parameter"),
        (("--perturb-from", "layer3", "--batch-size", "auto"), "--batch-size auto contradict"),
        (("--perturb-from", "conv1"), "nothing comes before it"),
        (("--perturb-from", "layer3", "--shard"), "--shard contradict"),
    ],
)
def test_what_cannot_be_cut_is_refused_in_a_line(photos, tmp_path, given, message):
    arguments = (*SMALL_MODEL, *STEPS, *given, "--dataset", photos, "--output", tmp_path / "r")
    done = samtune("run", *arguments)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
