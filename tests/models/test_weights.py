"""Models and weights by the names and in the forms in which people have them."""

import argparse
import json
import shutil

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from samtune.errors import CheckpointError, ModelError
from samtune.models import build, weights
from samtune.models.build import build_model
from samtune.models.head import head_names
from samtune.models.timm_format import timm_config
from tests.conftest import samtune, write_image_folder

NAME = "resnet10t"
SMALL = ("--img-size", 32, "--epochs", "1 steps", "--workers", 0)


@pytest.fixture(scope="module")
def donor():
    torch.manual_seed(0)
    return timm.create_model(NAME, num_classes=7)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run, whose checkpoint says a normalisation of its own."""
    root = tmp_path_factory.mktemp("run")
    data = write_image_folder(root / "data", {"train": 6, "test": 2})
    done = samtune("run", "--model", NAME, "--no-pretrained", *SMALL, "--dataset", data, "--output", root / "r")
    assert done.returncode == 0, done.stderr
    return root / "r"


def body(model):
    return {key: value for key, value in model.state_dict().items() if not key.startswith("fc.")}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def prefixed(state, prefix):
    return {prefix + key: value for key, value in state.items()}


# What tools write -> what is said of it. Each holds the weights of `donor`.
FORMS = {
    "plain": (lambda state: state, ""),
    "state_dict": (lambda state: {"state_dict": state, "epoch": 3}, "`state_dict` of it taken"),
    "model_state": (lambda state: {"model_state": state}, "`model_state` of it taken"),
    "DistributedDataParallel": (lambda state: prefixed(state, "module."), "prefix `module.` taken off"),
    "torch.compile": (lambda state: prefixed(state, "_orig_mod."), "prefix `_orig_mod.` taken off"),
    "both": (lambda state: prefixed(state, "module._orig_mod."), "prefix `module.` taken off"),
    "Lightning": (
        lambda state: {"state_dict": prefixed(state, "model.") | {"loss.weight": torch.ones(3)}, "epoch": 1},
        "prefix `model.` taken off, 1 other tensors left out",
    ),
    "a backbone": (lambda state: prefixed(state, "backbone."), "prefix `backbone.` taken off"),
    "a net in a module": (lambda state: {"model": prefixed(state, "module.net.")}, "prefix `module.net.` taken off"),
    "timm's train.py": (
        lambda state: {
            "state_dict": {key: torch.zeros_like(value) for key, value in state.items()},
            "state_dict_ema": state,
            "args": argparse.Namespace(lr=0.1),
            "epoch": 3,
        },
        "`state_dict_ema` of it taken",
    ),
    "without counters": (lambda state: {key: value for key, value in state.items() if "num_batches" not in key}, ""),
}


@pytest.mark.parametrize("name", FORMS)
def test_checkpoints_of_other_tools_load_and_what_was_taken_off_is_said(name, donor, tmp_path, capsys):
    form, said = FORMS[name]
    torch.save(form(donor.state_dict()), tmp_path / "w.pth")
    model, info = build_model(NAME, classes=2, weights=tmp_path / "w.pth")
    if name == "without counters":
        model.load_state_dict({k: v for k, v in donor.state_dict().items() if "num_batches" in k}, strict=False)
    assert same(body(model), body(donor))
    assert info.weights == f"file:{tmp_path / 'w.pth'}"
    assert said in capsys.readouterr().err


def test_a_prefix_that_fits_by_chance_does_not_hide_that_the_model_is_another(tmp_path):
    torch.save(timm.create_model("resnet18").state_dict(), tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match="do not fit the model") as error:
        build_model(NAME, classes=2, weights=tmp_path / "w.pth")
    assert "conv1.0.weight is missing" in error.value.cause


def test_a_run_and_its_checkpoints_are_weights_with_their_own_normalisation(run):
    last = run / "checkpoints" / "last"
    config = json.loads((last / "config.json").read_text())
    stated = config["pretrained_cfg"] | {"mean": [0.1, 0.2, 0.3], "crop_pct": 0.5}
    copy = run.parent / "copy"
    shutil.copytree(last, copy)
    (copy / "config.json").write_text(json.dumps(config | {"pretrained_cfg": stated}))
    (copy / "manifest.json").unlink()
    for given in (run, last, copy):
        model, info = build_model(NAME, classes=5, weights=given)
        assert same(body(model), {k: v for k, v in load_file(last / "model.safetensors").items() if "fc." not in k})
        assert model.fc.out_features == 5
        assert (info.data_config["mean"] == (0.1, 0.2, 0.3)) == (given == copy)
        assert (info.data_config["crop_pct"] == 0.5) == (given == copy)
    with pytest.raises(CheckpointError, match="are of resnet10t, and --model is resnet18"):
        build_model("resnet18", classes=2, weights=run)
    with pytest.raises(CheckpointError, match="holds no weights"):
        build_model(NAME, classes=2, weights=run.parent)


def test_a_damaged_checkpoint_is_no_weights(run, tmp_path):
    shutil.copytree(run / "checkpoints" / "last", tmp_path / "c")
    with (tmp_path / "c" / "model.safetensors").open("r+b") as file:
        file.seek(5000)
        file.write(b"x")
    with pytest.raises(CheckpointError, match="is damaged"):
        weights.locate(tmp_path / "c")


@pytest.mark.parametrize("place", ["checkpoints/last", ""])
def test_a_local_folder_is_a_model_by_timms_spelling(place, run, tmp_path):
    name = f"local-dir:{run / place}"
    model, info = build_model(name, classes=3)
    stored = load_file(run / "checkpoints" / "last" / "model.safetensors")
    assert same(body(model), {key: value for key, value in stored.items() if "fc." not in key})
    assert info.weights.startswith("file:")
    assert timm_config(model, info, ("a", "b", "c"))["architecture"] == NAME
    data = write_image_folder(tmp_path / "data", {"train": 4})
    done = samtune("run", "--model", name, *SMALL, "--dataset", data, "--output", tmp_path / "again")
    assert done.returncode == 0, done.stderr
    assert timm.create_model(f"local-dir:{tmp_path / 'again/checkpoints/last'}", pretrained=True).num_classes == 2
    longer = ("--resume", "--epochs", "2 steps", "--allow-change", "epochs")
    resumed = samtune("run", *longer, "--output", tmp_path / "again")
    assert resumed.returncode == 0, resumed.stderr


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("local-dir:nowhere", "weights nowhere are not there"),
        ("hub:user/name", "unknown model"),
        ("user/name", "hf-hub:USER/NAME"),
    ],
)
def test_a_model_that_is_not_there_is_named(name, said):
    with pytest.raises(ModelError) as error:
        build_model(name, classes=2)
    assert said in str(error.value)


SAYS = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "input_size": [3, 64, 64]}


def write_folder(root, donor, config):
    save_file(donor.state_dict(), root / "model.safetensors")
    (root / "config.json").write_text(json.dumps(config))
    return root


@pytest.mark.parametrize(
    "config",
    [
        {"architecture": NAME, "num_classes": 7, "pretrained_cfg": {**SAYS, "classifier": "fc"}},
        {"architecture": NAME, "num_classes": 7, "pretrained_cfg": SAYS},
        {"architecture": NAME, "num_classes": 7, **SAYS},
        {"architecture": f"{NAME}.c3_in1k", "pretrained_cfg": SAYS},
    ],
    ids=["whole", "without a classifier", "at one level", "with a tag"],
)
def test_what_a_folder_says_holds_and_the_rest_is_as_the_architecture_has_it(config, donor, tmp_path):
    folder = write_folder(tmp_path, donor, config)
    for name, file in ((f"local-dir:{folder}", None), (NAME, folder)):
        model, info = build_model(name, classes=3, weights=file)
        assert same(body(model), body(donor))
        assert info.data_config["mean"] == (0.1, 0.2, 0.3)
        assert head_names(model) == ("fc",)
        assert info.img_size == 64


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"architectures": ["ResNetForImageClassification"], "model_type": "resnet"}, "that of transformers"),
        ({"architecture": "nosuchnet", "pretrained_cfg": SAYS}, "timm has no architecture 'nosuchnet'"),
        ({"architecture": 5, "pretrained_cfg": SAYS}, "partition"),
        ({"architecture": NAME, "pretrained_cfg": [1]}, "has no attribute"),
        ({"architecture": NAME, "pretrained_cfg": {**SAYS, "input_size": 64}}, "input_size is 64"),
        ({"architecture": NAME, "mean": [0.5]}, "mean is"),
        ([1, 2], "TypeError"),
    ],
)
def test_a_folder_of_something_else_is_refused_in_words(config, why, donor, tmp_path):
    with pytest.raises(CheckpointError, match=r"config.json is not what timm writes") as error:
        build_model(f"local-dir:{write_folder(tmp_path, donor, config)}", classes=3)
    assert why in error.value.cause


def test_models_without_a_classifier_are_refused_by_name():
    without = next(name for name in timm.list_models() if not timm.get_pretrained_cfg(name).classifier)
    with pytest.raises(ModelError, match=f"model {without}.* has no classifier"):
        build_model(without, classes=2, pretrained=False)


def test_position_embeddings_of_another_size_are_resampled_as_timm_does_for_its_own(tmp_path, capsys):
    torch.manual_seed(0)
    large = timm.create_model("test_vit", img_size=160)
    save_file(large.state_dict(), tmp_path / "w.safetensors")
    model, _ = build_model("test_vit", classes=3, weights=tmp_path / "w.safetensors", img_size=96)
    overlay = {"state_dict": large.state_dict(), "num_classes": 1000}
    options = {"img_size": 96, "num_classes": 3, "pretrained_cfg_overlay": overlay}
    expected = timm.create_model("test_vit", pretrained=True, **options)
    ours, theirs = model.state_dict(), expected.state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours if not key.startswith("head."))
    assert "pos_embed (1, 101, 64) -> (1, 37, 64)" in capsys.readouterr().err


def published(state, places, with_expansion):
    """timm's names of an EfficientNet -> those of the first PyTorch EfficientNets."""
    top = {"conv_stem": "_conv_stem", "bn1": "_bn0", "conv_head": "_conv_head", "bn2": "_bn1", "classifier": "_fc"}
    wide = {"conv_pw": "_expand_conv", "conv_dw": "_depthwise_conv", "conv_pwl": "_project_conv"}
    wide |= {"bn1": "_bn0", "bn2": "_bn1", "bn3": "_bn2"}
    plain = {"conv_dw": "_depthwise_conv", "bn1": "_bn1", "conv_pw": "_project_conv", "bn2": "_bn2"}
    squeeze = {"conv_reduce": "_se_reduce", "conv_expand": "_se_expand"}
    renamed = {}
    for key, value in state.items():
        parts = key.split(".")
        if parts[0] == "blocks":
            place = ".".join(parts[:3])
            names = wide if place in with_expansion else plain
            inner = [squeeze[parts[4]], *parts[5:]] if parts[3] == "se" else [names[parts[3]], *parts[4:]]
            renamed[".".join(["_blocks", str(places.index(place)), *inner])] = value
        else:
            renamed[".".join([top[parts[0]], *parts[1:]])] = value
    return renamed


@pytest.mark.parametrize("name", ["tf_efficientnet_lite0", "tf_efficientnet_b0"])
def test_names_of_the_first_pytorch_efficientnets_load(name, tmp_path, capsys):
    torch.manual_seed(0)
    model = timm.create_model(name)
    places = [f"blocks.{s}.{b}" for s, stage in enumerate(model.blocks) for b in range(len(stage))]
    with_expansion = {place for place in places if f"{place}.conv_pwl.weight" in model.state_dict()}
    torch.save(prefixed(published(model.state_dict(), places, with_expansion), "module."), tmp_path / "w.pth")
    loaded, _ = build_model(name, classes=2, weights=tmp_path / "w.pth")
    ours, theirs = loaded.state_dict(), model.state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours if not key.startswith("classifier."))
    assert "names of the first PyTorch EfficientNets turned into timm's" in capsys.readouterr().err
    with pytest.raises(CheckpointError):
        build_model(NAME, classes=2, weights=tmp_path / "w.pth")


def test_the_file_of_a_lite_package_is_weights(lite0_package, capsys):
    package = build._package_file("tf_efficientnet_lite0.in1k")
    by_file, _ = build_model("tf_efficientnet_lite0", classes=2, weights=package)
    by_name, _ = build_model("tf_efficientnet_lite0", classes=2)
    assert same(by_file.state_dict(), by_name.state_dict())
