"""The networks for CIFAR: their definitions against independent ones, and that timm takes them for its own."""

import math

import pytest
import timm
import timm.models
import timm.optim
import torch
import torch.nn.functional as F
from torch import nn

from samtune.errors import ModelError
from samtune.models.build import build_model
from samtune.models.cifar_resnet import PreActivationBlock, pad_channels, pool_and_pad
from samtune.models.head import features_and_logits
from samtune.models.listing import find
from samtune.models.names import from_scratch, pretraining_data, resolve
from samtune.models.training import checkpoint_activations, parameter_groups
from samtune.sam.filters import select_parameters

# Parameters with 10 classes -> millions in the paper of each network, and by how many of them ours may differ:
# Zagoruyko and Komodakis count the convolutions of their shortcuts, Han et al. the widths before they are rounded.
COUNTS = {
    "wrn28_10": (36_220_634, 36.5, 0.3),
    "wrn40_10": (55_583_194, 55.8, 0.3),
    "wrn16_8": (10_795_482, 11.0, 0.25),
    "wrn40_2": (2_232_794, 2.2, 0.05),
    "wrn40_10_nonorm": (55_569_738, None, None),
    "wrn16_2_nonorm": (680_010, None, None),
    "resnet20": (269_722, 0.27, 0.005),
    "resnet32": (464_154, 0.46, 0.005),
    "resnet56": (853_018, 0.85, 0.005),
    "resnet32_wide": (29_442_378, None, None),
    "shake26_2x96d": (26_192_922, 26.2, 0.05),
    "pyramidnet272_a200": (26_210_842, 26.0, 0.25),
    "pyramidnet272_a200_shakedrop": (26_210_842, 26.0, 0.25),
}
# The same networks with fewer and narrower blocks.
SMALL = {
    "wrn28_10": {"blocks": 2, "widths": (8, 12, 16), "stem": 6},
    "wrn40_10_nonorm": {"blocks": 2, "widths": (8, 12, 16), "stem": 6},
    "resnet20": {"blocks": 2, "widths": (4, 6, 8)},
    "resnet32_wide": {"blocks": 2, "widths": (8, 12, 16), "stem": 6},
    # torch 2.14's CPU kernels of strided 1x1 convolutions corrupt memory for less than 8 channels that come last.
    "shake26_2x96d": {"blocks": 2, "width": 8},
    "pyramidnet272_a200": {"blocks": 2, "alpha": 10},
    "pyramidnet272_a200_shakedrop": {"blocks": 2, "alpha": 10},
}


def small(name, **options):
    torch.manual_seed(0)
    return timm.create_model(name, **SMALL[name] | options)


def parameters(model):
    return sum(w.numel() for w in model.parameters())


def images(n=4, size=32, dtype=torch.float32, channels=3):
    return torch.randn(n, channels, size, size, generator=torch.Generator().manual_seed(1), dtype=dtype)


# ---------------------------------------------------------------------------------------------------------- definitions


@pytest.mark.parametrize("name", COUNTS)
def test_parameters_are_as_many_as_in_the_papers(name):
    exact, published, tolerance = COUNTS[name]
    with torch.device("meta"):
        assert parameters(timm.create_model(name)) == exact
    assert published is None or exact / 1e6 == pytest.approx(published, abs=tolerance)


# On the meta device torch takes seconds for so many layers; the slow lane has them.
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if "pyramid" in name else []) for name in COUNTS]
)
def test_pictures_of_32_and_of_64_pixels_pass(name):
    with torch.device("meta"), torch.no_grad():
        model = timm.create_model(name).eval()
        for size in (32, 64):
            maps = model.forward_features(torch.empty(1, 3, size, size))
            assert maps.shape == (1, model.num_features, size // 4, size // 4)
            assert model.forward_head(maps).shape == (1, 10)


def test_the_table_holds_every_network_and_none_has_a_name_of_timms():
    assert COUNTS.keys() == set(from_scratch())
    assert [name for name in COUNTS if hasattr(timm.models, name)] == []


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("size", [1, 7, 30])
def test_pictures_of_any_size_pass(name, size):
    with torch.no_grad():
        assert small(name).eval()(images(2, size)).shape == (2, 10)


def randomize(model):
    """Norm layers that do something, so that a wrong order of layers shows."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                nn.init.uniform_(tensor, 0.2, 1)
    return model.double()


def copy_layers(ours, theirs):
    """Copy layers in their order, which is the same in both."""
    kinds = nn.Conv2d | nn.BatchNorm2d | nn.Linear
    pairs = [[module for module in model.modules() if isinstance(module, kinds)] for model in (ours, theirs)]
    for a, b in zip(*pairs, strict=True):
        b.load_state_dict(a.state_dict())


class OnSum(nn.Module):
    """A unit of pytorchcv in which the shortcut is a function of the unit's input."""

    def __init__(self, unit, shortcut):
        super().__init__()
        self.body, self.shortcut, self.activ = unit.body, shortcut, getattr(unit, "activ", nn.Identity())

    def forward(self, x):
        out = self.body(x)
        out = out[0] if isinstance(out, tuple) else out  # a pre-activation unit gives its activation too
        return self.activ(out + self.shortcut(x))


def padded(x, channels):
    return torch.cat([x, x.new_zeros(len(x), channels - x.shape[1], *x.shape[2:])], dim=1)


def mean_of_four(x):
    return (x[:, :, ::2, ::2] + x[:, :, 1::2, ::2] + x[:, :, ::2, 1::2] + x[:, :, 1::2, 1::2]) / 4


def wide_oracle():
    """Pytorchcv has convolutions as shortcuts where the shape changes, which start from the first ReLU.

    So does ours in the first unit; in the others, as in Google's code, the shortcut starts from the unit's input.
    """
    wrn = pytest.importorskip("pytorchcv.models.wrn_cifar")
    model = wrn.CIFARWRN([[8, 8], [12, 12], [16, 16]], 6)
    first = model.features.stage1.unit1
    first.identity_conv = nn.Identity()
    first.identity_conv.forward = lambda x: padded(x, 8)
    for stage, width in ((model.features.stage2, 12), (model.features.stage3, 16)):
        stage.unit1 = OnSum(stage.unit1, lambda x, width=width: padded(mean_of_four(x), width))
    return model


def thin_oracle():
    """Pytorchcv has option B of He et al.: convolutions as shortcuts. Ours, and the paper's on CIFAR, is option A."""
    resnet = pytest.importorskip("pytorchcv.models.resnet_cifar")
    model = resnet.CIFARResNet([[4, 4], [6, 6], [8, 8]], 4, bottleneck=False)
    for stage, width in ((model.features.stage2, 6), (model.features.stage3, 8)):
        stage.unit1 = OnSum(stage.unit1, lambda x, width=width: padded(x[:, :, ::2, ::2], width))
    return model


def shake_oracle():
    """Pytorchcv has the ReLU after the sum, so that the shortcuts too carry what it leaves, and shifts backwards.

    Gastaldi's figure and Google's code have it at the start of each branch and before pooling.
    """
    shake = pytest.importorskip("pytorchcv.models.shakeshakeresnet_cifar")
    model = shake.CIFARShakeShakeResNet([[8, 8], [16, 16], [32, 32]], 16, bottleneck=False)
    features = model.features
    features.init_block.activ = nn.Identity()
    features.final_pool = nn.Sequential(nn.ReLU(), features.final_pool)
    for unit in (unit for stage in (features.stage1, features.stage2, features.stage3) for unit in stage):
        unit.activ = nn.Identity()
        unit.branch1, unit.branch2 = (nn.Sequential(nn.ReLU(), branch) for branch in (unit.branch1, unit.branch2))
        if unit.resize_identity:
            shortcut = unit.identity_branch

            def forward(x, shortcut=shortcut):
                further = torch.roll(x, (-1, -1), (2, 3))
                further[:, :, -1] = further[:, :, :, -1] = 0
                halves = shortcut.conv1(shortcut.pool(x)), shortcut.conv2(shortcut.pool(further))
                return shortcut.bn(torch.cat(halves, dim=1))

            shortcut.forward = forward
    return model


def pyramid_oracle():
    """The same definition, rounding too."""
    pyramid = pytest.importorskip("pytorchcv.models.pyramidnet_cifar")
    channels = [[4 * round(16 + 10 * block / 6) for block in stage] for stage in ((1, 2), (3, 4), (5, 6))]
    return pyramid.CIFARPyramidNet(channels, 16, bottleneck=True)


def shakedrop_oracle():
    """PyramidNet, in evaluation mode with branches times 1 - 0.5 l / L."""
    model = pyramid_oracle()
    units = [unit for stage in (model.features.stage1, model.features.stage2, model.features.stage3) for unit in stage]
    for block, unit in enumerate(units, start=1):
        unit.bn.register_forward_hook(lambda _module, _inputs, out, block=block: out * (1 - 0.5 * block / 6))
    return model


ORACLES = {
    "wrn28_10": wide_oracle,
    "resnet32_wide": wide_oracle,  # the same units, others in number and width
    "resnet20": thin_oracle,
    "shake26_2x96d": shake_oracle,
    "pyramidnet272_a200": pyramid_oracle,
    "pyramidnet272_a200_shakedrop": shakedrop_oracle,
}


@pytest.mark.parametrize("name", ORACLES)
def test_logits_are_those_of_an_independent_network_with_the_same_weights(name):
    ours, theirs = randomize(small(name)), ORACLES[name]().double()
    copy_layers(ours, theirs)
    x = images(dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=1e-12, atol=1e-12)
        if "shake" not in name:
            torch.testing.assert_close(ours.train()(x), theirs.train()(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "module", "build"),
    [
        ("wrn28_10", "wrn_cifar", lambda m: m.wrn28_10_cifar10()),
        ("resnet20", "resnet_cifar", lambda m: m.resnet20_cifar10()),
        ("resnet56", "resnet_cifar", lambda m: m.resnet56_cifar10()),
        ("shake26_2x96d", "shakeshakeresnet_cifar", lambda m: m.get_shakeshakeresnet_cifar(10, 26, False, 96)),
        ("pyramidnet272_a200", "pyramidnet_cifar", lambda m: m.pyramidnet272_a200_bn_cifar10()),
    ],
)
def test_counts_are_those_of_an_independent_network_without_convolutions_as_shortcuts(name, module, build):
    with torch.device("meta"):
        theirs = build(pytest.importorskip(f"pytorchcv.models.{module}"))
    assert COUNTS[name][0] == sum(w.numel() for key, w in theirs.named_parameters() if "identity_conv" not in key)


def test_shortcuts_round_sizes_up_as_convolutions_do_and_add_zeros_behind():
    x = torch.arange(9.0).view(1, 1, 3, 3)
    out = pool_and_pad(x, 3, 2)
    assert out[0, 0].tolist() == [[2, 3.5], [6.5, 8]]  # at the edge the mean of the pixels that are there
    assert out.shape == (1, 3, 2, 2)
    assert not out[0, 1:].any()
    assert pad_channels(x, 1) is x


# ------------------------------------------------------------------------------------------------------- initialisation


@pytest.mark.parametrize("name", ["resnet20", "wrn40_2"])
def test_convolutions_start_with_variance_2_over_fan_out(name):
    torch.manual_seed(0)
    for key, w in timm.create_model(name).named_parameters():
        if w.ndim == 4:
            n, expected = w.numel(), 2 / (w.shape[0] * 9)
            error = expected * math.sqrt(2 / n)  # the standard deviation of a variance
            assert w.var().item() == pytest.approx(expected, abs=5 * error), key
            assert abs(w.mean().item()) < 5 * math.sqrt(expected / n), key


@pytest.mark.parametrize("classes", [10, 100])
def test_a_classifier_starts_uniform_by_its_classes_whoever_draws_it_last(classes):
    torch.manual_seed(0)
    built, _ = build_model("wrn16_8", classes=classes, pretrained=False)
    reset = timm.create_model("wrn16_8")
    reset.reset_classifier(classes)
    for fc in (built.fc, reset.fc):
        assert 0.99 * classes**-0.5 < fc.weight.abs().max() <= classes**-0.5
        assert fc.weight.var().item() == pytest.approx(1 / classes / 3, rel=0.1)
        assert not fc.bias.any()


def test_without_norm_branches_start_smaller_so_that_variance_stays():
    torch.manual_seed(0)
    model = timm.create_model("wrn40_10_nonorm", widths=(32, 64, 128))
    for stage in model.stages:
        for block in stage:
            assert isinstance(block, PreActivationBlock)
            expected = 2 / (9 * block.out_chs) / 18
            assert block.conv2.weight.var().item() == pytest.approx(expected, rel=0.1)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    assert all(module.bias is not None for module in model.modules() if isinstance(module, nn.Conv2d))
    with torch.no_grad():
        assert 0.01 < model.forward_features(images(2, 16)).var() < 1
        for stage in model.stages:
            for block in stage:
                block.conv2.weight *= math.sqrt(18)
        assert model.forward_features(images(2, 16)).var() > 1000


def test_batch_norm_has_torchs_momentum_and_eps():
    norms = [module for module in small("shake26_2x96d").modules() if isinstance(module, nn.BatchNorm2d)]
    assert {(module.momentum, module.eps) for module in norms} == {(0.1, 1e-5)}


# ----------------------------------------------------------------------------------------------------- as timm's models


@pytest.mark.parametrize("name", SMALL)
def test_a_network_is_built_and_taken_apart_as_timms_own(name):
    model = small(name, num_classes=7, in_chans=1, drop_rate=0.5).eval()
    x = images(channels=1)
    features, logits = features_and_logits(model, x)
    assert features.shape == (4, model.num_features)
    assert torch.equal(logits, model(x))
    assert torch.equal(model.get_classifier()(features), logits)
    config = model.pretrained_cfg
    assert model.get_submodule(config["first_conv"]).in_channels == 1
    assert model.get_submodule(config["classifier"]) is model.fc
    assert (config["input_size"], config["crop_pct"], config["num_classes"]) == ((3, 32, 32), 1.0, 10)
    dropped = model.train().forward_head(torch.ones(1, model.num_features, 2, 2), pre_logits=True)
    assert set(dropped.unique().tolist()) == {0, 2}
    model.reset_classifier(0)
    assert torch.equal(model.eval()(x), features)
    model.reset_classifier(0, "")
    assert model(x).shape == (4, model.num_features, 8, 8)


@pytest.mark.parametrize("name", SMALL)
def test_groups_filters_and_layers_hold_the_parameters(name):
    model = small(name)
    groups = parameter_groups(model, lr=0.1, head_lr=0.1, weight_decay=0.1)
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    norm = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    if norm:
        assert len(select_parameters(model, "norm")) == 2 * len(norm)
    layers = timm.optim.param_groups_layer_decay(model, layer_decay=0.5)
    assert len({group["lr_scale"] for group in layers}) == 6 + 2  # blocks, stem and head
    coarse = timm.models.group_parameters(model, model.group_matcher(coarse=True))
    assert len(coarse) >= 4


@pytest.mark.parametrize("name", SMALL)
def test_recomputed_activations_give_the_same_gradient(name):
    grads = []
    for recompute in (False, True):
        model = small(name).double().train()
        if recompute:
            checkpoint_activations(model)
        torch.manual_seed(2)
        F.cross_entropy(model(images(dtype=torch.float64)), torch.arange(4)).backward()
        grads.append([w.grad for w in model.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", SMALL)
def test_channels_last_stays_so(name):
    model = small(name).to(memory_format=torch.channels_last).train()
    maps = model.forward_features(images().to(memory_format=torch.channels_last))
    assert maps.is_contiguous(memory_format=torch.channels_last)


def test_names_are_listed_and_found_without_weights():
    assert resolve("wrn28_10") == "wrn28_10"
    assert pretraining_data("wrn28_10") == "nothing"
    assert set(find("wrn")) == {name for name in COUNTS if name.startswith("wrn")}
    with pytest.raises(ModelError) as error:
        resolve("wrn28_1")
    assert "nearest without weights: wrn28_10" in error.value.hint
    with pytest.raises(ModelError, match="no pretrained weights") as error:
        build_model("wrn28_10", classes=3)
    assert error.value.hint == "start at random with --no-pretrained, or give --weights PATH"
