"""Pretrained models: the right weights under the right name, and a head that starts well."""

import math
import pickle

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from samtune.data.transforms import EvalTransform, normalize
from samtune.errors import CheckpointError, ModelError, UsageError
from samtune.models.build import build_model, check_size
from samtune.models.names import ALIASES, pretraining_data, resolve
from samtune.models.training import parameter_groups, train_mode
from tests.conftest import Bomb

LITE0 = "tf_efficientnet_lite0"


@pytest.mark.parametrize(("alias", "full"), ALIASES.items())
def test_every_alias_means_weights_that_timm_has_for_a_name_it_has_none_for(alias, full):
    assert not timm.is_model_pretrained(alias)
    assert full in timm.list_pretrained()
    assert resolve(alias) == full


@pytest.mark.parametrize(
    ("name", "full"),
    [
        ("tf_efficientnet_b7", "tf_efficientnet_b7.ns_jft_in1k"),
        ("tf_efficientnet_b7.ra_in1k", "tf_efficientnet_b7.ra_in1k"),
        ("efficientnet_b0", "efficientnet_b0.ra_in1k"),
        (LITE0, f"{LITE0}.in1k"),
    ],
)
def test_bare_names_resolve_to_the_tag_that_timm_would_load(name, full):
    assert resolve(name) == full


def test_an_unknown_name_brings_the_nearest_pretrained_ones():
    with pytest.raises(ModelError, match="efficientnet_b77") as error:
        resolve("efficientnet_b77")
    assert "efficientnet_b7 (tf_efficientnet_b7.ra_in1k)" in error.value.hint


def test_an_unknown_tag_brings_the_tags_that_there_are():
    with pytest.raises(ModelError, match="no weights 'in2k'") as error:
        resolve("tf_efficientnet_b7.in2k")
    assert "ra_in1k" in error.value.hint


def test_a_model_without_pretrained_weights_is_never_started_at_random_in_silence():
    name = next(m for m in timm.list_models("efficientnet*") if not timm.is_model_pretrained(m) and m not in ALIASES)
    with pytest.raises(ModelError, match="no pretrained weights") as error:
        build_model(name, classes=3)
    assert "--no-pretrained" in error.value.hint


def test_without_network_or_cache_the_error_names_weights_cache_and_way_out():
    with pytest.raises(ModelError, match=r"timm/efficientnet_b0\.ra_in1k") as error:
        build_model("efficientnet_b0", classes=3)
    assert "cache" in error.value.cause
    assert "--weights" in error.value.hint


@pytest.mark.parametrize(
    ("full", "data"),
    [
        ("tf_efficientnet_b7.ra_in1k", "ImageNet-1k"),
        ("tf_efficientnet_l2.ns_jft_in1k_475", "JFT-300M + ImageNet-1k"),
        ("tf_efficientnetv2_s.in21k_ft_in1k", "ImageNet-21k + ImageNet-1k"),
        ("resnet50.fb_ssl_yfcc100m_ft_in1k", "YFCC-100M + ImageNet-1k"),
    ],
)
def test_the_tag_tells_what_the_weights_have_seen(full, data):
    assert pretraining_data(full) == data


@pytest.mark.parametrize("name", [LITE0, "resnet18", "vit_tiny_patch16_224", "convnext_atto", "densenet121"])
def test_a_new_head_predicts_uniformly_so_the_first_loss_is_ln_classes(name, tmp_path):
    torch.save(timm.create_model(name, **({"img_size": 64} if "vit" in name else {})).state_dict(), tmp_path / "w.pth")
    model, info = build_model(name, classes=102, weights=tmp_path / "w.pth", img_size=64)
    train_mode(model, freeze_bn=True)
    loss = F.cross_entropy(model(torch.randn(4, 3, 64, 64)), torch.tensor([0, 7, 50, 101]))
    assert loss.item() == pytest.approx(math.log(102), rel=1e-6)
    assert info.img_size == 64


def test_an_option_that_a_model_does_not_know_is_named():
    with pytest.raises(ModelError, match=r"cannot be built with .*drop_path_rate") as error:
        build_model("densenet121", classes=3, pretrained=False, drop_path=0.2)
    assert "--drop-path" in error.value.hint


def test_frozen_statistics_means_batch_norm_alone_in_evaluation_mode():
    model, _ = build_model(LITE0, classes=3, pretrained=False, drop=0.2)
    train_mode(model, freeze_bn=True)
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert not any(m.training for m in norms)
    assert all(m.weight.requires_grad and m.bias.requires_grad for m in norms)
    assert model.training
    train_mode(model, freeze_bn=False)
    assert all(m.training for m in norms)


def test_parameter_groups_hold_every_parameter_once_decay_weights_alone_and_know_the_head():
    model, _ = build_model(LITE0, classes=3, pretrained=False)
    groups = parameter_groups(model, lr=0.1, head_lr=1.0, weight_decay=0.5)
    assert sorted(id(p) for g in groups for p in g["params"]) == sorted(id(p) for p in model.parameters())
    for group in groups:
        assert all((p.ndim > 1) == (group["weight_decay"] == 0.5) for p in group["params"])
        assert group["lr"] == (1.0 if group["name"] == "head" else 0.1)
    head = {id(p) for g in groups if g["name"] == "head" for p in g["params"]}
    assert head == {id(model.classifier.weight), id(model.classifier.bias)}


def test_without_weight_decay_no_parameter_is_in_two_groups():
    model, _ = build_model(LITE0, classes=3, pretrained=False)
    groups = parameter_groups(model, lr=0.1, head_lr=1.0, weight_decay=0.0)
    assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))
    torch.optim.SGD(groups)


def test_lite0_from_its_package_recognises_real_photographs(lite0_package):
    """Keys alone prove nothing: wrong padding or normalisation loads in silence and costs 6 to 18 points."""
    photos = pytest.importorskip("skimage.data", reason="scikit-image brings the photographs (extra: test)")
    model, info = build_model(LITE0, classes=None)
    assert info.weights == f"package:{lite0_package}"
    expected = {
        "chelsea": {281, 282, 285},  # tabby, tiger cat, Egyptian cat
        "coffee": {504, 967},  # coffee mug, espresso
        "rocket": {657, 744, 812},  # missile, projectile, space shuttle
    }
    model.eval()
    for name, classes in expected.items():
        picture = torch.from_numpy(getattr(photos, name)()).permute(2, 0, 1)
        with torch.no_grad():
            logits = model(normalize(EvalTransform(info.data_config)(picture)[None], info.data_config))
        probability = logits.softmax(1)[0]
        assert probability.argmax().item() in classes, name
        assert probability[list(classes)].sum() > 0.5, name


def test_weights_from_a_file_equal_those_it_was_made_of_whatever_its_head(tmp_path):
    donor, _ = build_model(LITE0, classes=7, pretrained=False)
    for path, write in ((tmp_path / "w.safetensors", save_file), (tmp_path / "w.pth", torch.save)):
        write(donor.state_dict(), path)
        model, info = build_model(LITE0, classes=3, weights=path)
        assert info.weights == f"file:{path}"
        for name, value in model.state_dict().items():
            if name.startswith("classifier"):
                assert not value.any()
            else:
                assert torch.equal(value, donor.state_dict()[name]), name


def test_weights_of_another_architecture_are_refused_with_the_first_keys(tmp_path):
    donor, _ = build_model("resnet18", classes=3, pretrained=False)
    save_file(donor.state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match="do not fit") as error:
        build_model(LITE0, classes=3, weights=tmp_path / "w.safetensors")
    assert "conv_stem.weight" in error.value.cause


def test_a_pickle_that_would_run_code_is_refused_and_runs_nothing(tmp_path):
    (tmp_path / "bomb.pth").write_bytes(pickle.dumps({"state_dict": Bomb(tmp_path / "exploded")}))
    with pytest.raises(CheckpointError, match="cannot be read"):
        build_model(LITE0, classes=3, weights=tmp_path / "bomb.pth")
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("name", ["inception_v3", "csatv2", "crossvit_9_240"])
def test_a_size_that_a_model_cannot_take_is_refused_before_anything_is_built(name):
    with pytest.raises(UsageError, match=rf"--img-size 32 does not suit model {name}"):
        check_size(name, None, 32)


@pytest.mark.parametrize("name", ["test_resnet", "vit_tiny_patch16_224", "tf_efficientnet_lite0", "coat_tiny"])
def test_a_size_that_a_model_can_take_is_not(name):
    check_size(name, None, 32)
