"""The average of the weights over the steps: what it is, where it is scored, what it never sees."""

import json

import pytest
import safetensors.torch
import torch
from timm.utils import ModelEmaV3

from samtune.models.training import WeightAverage
from tests.conftest import samtune
from tests.support.small_run import run


@pytest.fixture(scope="module")
def averaged(tmp_path_factory, photos):
    """A run that keeps the checkpoint of each of its 6 steps, with a radius large enough to be seen."""
    folder = tmp_path_factory.mktemp("runs") / "averaged"
    every = ["--save-every", "1 steps", "--keep-checkpoints", 6, "--epochs", "6 steps", "--rho", 5]
    done = run(photos, folder, *every, "--model-ema-decay", 0.5, "--json")
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout)


def test_the_average_is_that_of_the_weights_after_each_step_with_a_decay_that_rises(averaged):
    """By hand from the checkpoints: a perturbed w would be far off at this radius."""
    folder, _ = averaged
    expected = None
    for step in range(1, 7):
        checkpoint = folder / "checkpoints" / f"step-{step:06d}"
        weights = safetensors.torch.load_file(checkpoint / "model.safetensors")
        found = safetensors.torch.load_file(checkpoint / "ema" / "model.safetensors")
        decay = min(0.5, 1 - step ** (-2 / 3))
        before = weights if expected is None else expected
        expected = {
            name: decay * before[name].double() + (1 - decay) * w.double() if w.is_floating_point() else w
            for name, w in weights.items()
        }
        for name, value in found.items():
            torch.testing.assert_close(value.double(), expected[name].double(), rtol=1e-5, atol=1e-6)


def test_it_is_scored_beside_the_last_weights_and_eval_agrees(averaged):
    folder, result = averaged
    assert result["ema"]["decay"] == 0.5
    for split in ("test", "val"):
        again = json.loads(samtune("eval", folder, "--ema", "--split", split, "--json").stdout)
        for key in ("n", "wrong", "top1_error", "loss"):
            assert again[key] == result["ema"][split][key]
        assert result["ema"][split]["loss"] != result[split]["loss"]


def test_a_run_without_an_average_has_none_to_score(photos, tmp_path):
    done = run(photos, tmp_path / "r", "--no-model-ema", "--epochs", "1 steps", "--json")
    assert json.loads(done.stdout)["ema"] is None
    refused = samtune("eval", tmp_path / "r", "--ema")
    assert refused.returncode == 2
    assert "--model-ema" in refused.stderr


def test_averaging_leaves_the_run_itself_as_it_is(averaged, photos, tmp_path):
    folder, _ = averaged
    done = run(photos, tmp_path / "r", "--no-model-ema", "--epochs", "6 steps", "--rho", 5)
    assert done.returncode == 0, done.stderr
    weights = [(path / "checkpoints" / "last" / "model.safetensors").read_bytes() for path in (folder, tmp_path / "r")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("decay", [0.9998, 0.5])
def test_it_is_timms_average_with_warm_up_bit_for_bit(small_net, decay):
    """Buffers included; timm lists all tensors in every step, this one only once."""
    ours, theirs = WeightAverage(small_net, decay), ModelEmaV3(small_net, decay=decay, use_warmup=True)
    for step in range(1, 6):
        with torch.no_grad():
            for value in small_net.state_dict().values():
                value += step
        ours.update(small_net, step)
        theirs.update(small_net, step=step)
        for name, value in theirs.module.state_dict().items():
            assert torch.equal(ours.module.state_dict()[name], value), name
    assert not ours.module.training
