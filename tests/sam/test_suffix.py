"""SAM on the last part of a network: the front computed once equals the front computed twice."""

import copy
import gc
from typing import NamedTuple

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import samtune.models  # registers the networks for CIFAR
from samtune import SAM
from samtune.models.training import train_mode
from samtune.sam.step import Step
from tests.conftest import SmallNet
from tests.support.rank_processes import Ranks

assert samtune.models
# Model and what it is built with -> its cuts.
NETWORKS = {
    "test_efficientnet": ({"drop_rate": 0.2, "drop_path_rate": 0.2}, ("blocks.1", "blocks.2", "blocks.3", "conv_head")),
    "test_resnet": ({"drop_rate": 0.2}, ("layer2", "layer3", "layer4", "fc")),
    "test_convnext": ({"drop_rate": 0.2, "drop_path_rate": 0.2}, ("stages.1", "stages.2", "stages.3", "head")),
    "test_vit": ({"drop_rate": 0.2, "drop_path_rate": 0.2, "pos_drop_rate": 0.1}, ("blocks.1", "blocks.3", "norm")),
    "test_mambaout": ({}, ("stages.1", "stages.2", "head")),
    "mobilenetv3_small_050": ({"drop_rate": 0.2}, ("blocks.1", "blocks.3", "blocks.5", "conv_head")),
    "resnet20": ({"drop_rate": 0.2}, ("stages.1", "stages.2", "stages.1.1", "norm", "fc")),
}
CASES = [(name, cut) for name, (_, cuts) in NETWORKS.items() for cut in cuts]


def build(name, size=32):
    torch.manual_seed(0)
    settings, _ = NETWORKS[name]
    extra = {"img_size": size} if "vit" in name else {}
    model = timm.create_model(name, num_classes=5, **settings, **extra).double()
    nn.init.normal_(model.get_classifier().weight, std=0.1)
    return model


def batch(n=6, size=32):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, 3, size, size, generator=generator, dtype=torch.float64), torch.arange(n) % 5


def gradients(model, *, freeze_bn, plain=False, seed=3, **options):
    """Gradients by name, the loss at w and the buffers after a step. plain: the front is computed in each pass."""
    train_mode(model, freeze_bn=freeze_bn)
    sam = SAM(model, 0.1, **options)
    if plain:
        sam._cut = None
    torch.manual_seed(seed)
    value = sam.backward(lambda x, y: F.cross_entropy(model(x), y), *batch())
    drawn = torch.rand(3)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    return {name: w.grad for name, w in model.named_parameters()}, value, buffers, drawn


def assert_equal(ours, oracle, rel=1e-12):
    for name, grad in oracle[0].items():
        assert (ours[0][name] is None) == (grad is None), name
        if grad is not None:
            scale = float(grad.abs().max())
            assert float((ours[0][name] - grad).abs().max()) <= rel * max(scale, 1e-3), name
    assert float(ours[1]) == pytest.approx(float(oracle[1]), rel=1e-12)
    assert all(torch.allclose(ours[2][name], buffer, rtol=1e-12) for name, buffer in oracle[2].items())
    assert torch.equal(ours[3], oracle[3])  # the generator is where it would be


@pytest.mark.parametrize("freeze_bn", [True, False])
@pytest.mark.parametrize(("name", "cut"), CASES)
def test_the_gradient_is_that_of_sam_on_the_suffix_alone(name, cut, freeze_bn):
    model = build(name)
    ours = gradients(copy.deepcopy(model), freeze_bn=freeze_bn, perturb_from=cut)
    oracle = gradients(copy.deepcopy(model), freeze_bn=freeze_bn, perturb_from=cut, plain=True)
    assert_equal(ours, oracle)
    sgd = gradients(copy.deepcopy(model), freeze_bn=freeze_bn, perturb="$^|.", plain=True)
    assert any(not torch.allclose(ours[0][key], grad) for key, grad in sgd[0].items() if grad is not None)


@pytest.mark.parametrize(
    "options",
    [
        {"p": float("inf")},
        {"adaptive": True},
        {"ascent_steps": 3},
        {"ascent": "random"},
        {"m": 2},
        {"m": 4},
        {"perturb": "norm"},
        {"micro_batch": 2},
        {"ascent_fraction": 0.5},
    ],
    ids=str,
)
def test_every_other_option_means_the_same(options):
    model = build("test_resnet")
    ours = gradients(copy.deepcopy(model), freeze_bn=True, perturb_from="layer3", **options)
    oracle = gradients(copy.deepcopy(model), freeze_bn=True, perturb_from="layer3", plain=True, **options)
    assert_equal(ours, oracle)


def test_twenty_steps_in_float32_stay_within_its_rounding():
    weights = []
    for plain in (False, True):
        torch.manual_seed(0)
        model = timm.create_model("tf_efficientnet_lite0", num_classes=5, drop_rate=0.2)
        train_mode(model, freeze_bn=True)
        sam = SAM(model, 0.05, perturb_from="blocks.5")
        if plain:
            sam._cut = None
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        images, labels = batch()
        for step in range(20):
            torch.manual_seed(step)
            optimizer.zero_grad()
            sam.backward(lambda x, y, model=model: F.cross_entropy(model(x), y), images.float(), labels)
            optimizer.step()
        weights.append(torch.cat([w.detach().flatten() for w in model.parameters()]))
    assert float((weights[0] - weights[1]).abs().max()) < 1e-5
    assert float((weights[0] - weights[1]).norm() / weights[1].norm()) < 1e-6


def test_the_front_costs_one_pass_and_the_suffix_two():
    """Multiplications by torch's counter: SAM's are the plain pass's and those of pass 1 over the suffix."""
    model = build("test_resnet")
    train_mode(model, freeze_bn=True)

    def loss(x, y):
        return F.cross_entropy(model(x), y)

    def count(work):
        counter = FlopCounterMode(display=False)
        with counter:
            work()
        return counter.get_total_flops()

    z = {}
    hook = model.layer3.register_forward_pre_hook(lambda _, x: z.update(x=x[0].detach()))
    plain = count(lambda: loss(*batch()).backward())
    hook.remove()
    later = nn.Sequential(model.layer3, model.layer4, model.global_pool, model.fc)
    suffix = list(later.parameters())
    alone = count(lambda: torch.autograd.grad(F.cross_entropy(later(z["x"]), batch()[1]), suffix))
    sam = SAM(model, 0.05, perturb_from="layer3")
    assert count(lambda: sam.backward(loss, *batch())) == plain + alone
    assert 0.05 * plain < alone < 0.2 * plain


def test_weights_and_modules_are_as_before_also_after_an_error():
    model = build("test_resnet")
    train_mode(model, freeze_bn=True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    sam = SAM(model, 0.1, perturb_from="layer3")
    calls = 0

    def loss(x, y):
        nonlocal calls
        calls += 1
        value = F.cross_entropy(model(x), y)
        if calls == 2:
            raise KeyboardInterrupt
        return value

    with pytest.raises(KeyboardInterrupt):
        sam.backward(loss, *batch())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any("forward" in vars(module) for module in model.modules())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    sam.backward(loss, *batch())
    gc.collect()
    assert sam._cut._z is None


@pytest.mark.parametrize(
    ("name", "cut", "message"),
    [
        ("test_resnet", "layer9", "there is none of this name"),
        ("test_resnet", "conv1", "nothing comes before it"),
        ("test_resnet", "global_pool", ""),
        ("test_vit", "blocks.1.attn", "past it"),
        ("test_resnet", "layer3.0.conv2", "past it"),
    ],
)
def test_a_place_that_data_pass_by_is_refused(name, cut, message):
    model = build(name)
    train_mode(model, freeze_bn=True)
    if not message:  # a module without parameters is a place like others
        SAM(model, 0.1, perturb_from=cut).backward(lambda x, y: F.cross_entropy(model(x), y), *batch())
        return
    with pytest.raises(ValueError, match=message):
        SAM(model, 0.1, perturb_from=cut).backward(lambda x, y: F.cross_entropy(model(x), y), *batch())


def test_infinite_values_in_either_pass_make_the_whole_gradient_nan():
    model = SmallNet().double()
    sam = SAM(model, 0.1, perturb_from="fc")
    for broken in (1, 2):
        calls = 0

        def loss(x, y, broken=broken):
            nonlocal calls
            calls += 1
            return F.cross_entropy(model(x), y) * (float("inf") if calls == broken else 1)

        model.zero_grad()
        images = torch.randn(4, 3, 6, 6, dtype=torch.float64)
        sam.backward(loss, images, torch.arange(4) % 3)
        assert all(w.grad.isnan().all() for w in model.parameters())


def on_rank():
    from samtune.distributed import collectives, ddp

    torch.manual_seed(0)
    model = SmallNet(drop=0.0).double()
    wrapped = ddp.data_parallel(model, torch.device("cpu"))
    images = torch.randn(8, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    own = images[collectives.rank() :: 2]
    labels = (torch.arange(8) % 3)[collectives.rank() :: 2]
    results = []
    for plain in (False, True):
        sam = SAM(wrapped, 0.1, perturb_from="fc")
        if plain:
            sam._cut = None
        model.zero_grad()
        calls, sent = collectives.traffic.calls, collectives.traffic.bytes
        sam.backward(lambda x, y: F.cross_entropy(wrapped(x), y), own, labels)
        counted = (collectives.traffic.calls - calls, collectives.traffic.bytes - sent)
        results.append(([w.grad.clone() for w in model.parameters()], counted))
    return results


def test_two_ranks_reduce_the_gradient_once(tmp_path):
    with Ranks(2, tmp_path) as ranks:
        for (ours, traffic), (oracle, of_oracle) in ranks(on_rank):
            assert all(torch.allclose(a, b, rtol=1e-12) for a, b in zip(ours, oracle, strict=True))
            assert traffic == of_oracle == (1, 8 * sum(w.numel() for w in ours))


class Front(nn.Module):
    """A network whose front can do more than lead to its suffix."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.act = nn.LeakyReLU(inplace=kind == "changes its input")
        self.fc = nn.Linear(4 + 3 * (kind == "a second way"), 5)

    def forward(self, x):
        pooled = self.pool(x).flatten(1)
        z = self.act(self.conv(x)).mean((2, 3))
        return self.fc(torch.cat([z, pooled], 1) if self.kind == "a second way" else z)


def test_data_that_reach_the_suffix_beside_the_cut_keep_their_values_and_a_change_in_place_is_refused():
    images, labels = torch.randn(4, 3, 8, 8), torch.arange(4)
    for kind in ("plain", "a second way"):
        torch.manual_seed(0)
        model = Front(kind)
        grads = []
        for plain in (False, True):
            sam = SAM(model, 0.1, perturb_from="act")
            sam._cut = None if plain else sam._cut
            model.zero_grad()
            sam.backward(lambda x, y, model=model: F.cross_entropy(model(x), y), images, labels)
            grads.append([w.grad.clone() for w in model.parameters()])
        assert all(torch.allclose(a, b, rtol=1e-5) for a, b in zip(*grads, strict=True)), kind
    model = Front("changes its input")
    with pytest.raises(ValueError, match="changed in place"):
        SAM(model, 0.1, perturb_from="act").backward(lambda x, y: F.cross_entropy(model(x), y), images, labels)


def test_a_front_that_changes_between_passes_is_refused_and_named_tuples_are_kept():
    class Pair(NamedTuple):
        left: torch.Tensor
        right: torch.Tensor

    class Split(nn.Module):
        def forward(self, x):
            return Pair(x[:, :2], x[:, 2:])

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.split, self.fc = nn.Conv2d(3, 4, 32), Split(), nn.Linear(4, 5)
            self.calls, self.changes = 0, False

        def forward(self, x):
            self.calls += 1
            x = (
                self.conv(x)
                if not (self.changes and self.calls % 2 == 0)
                else self.conv(self.conv(x).repeat(1, 1, 32, 32)[:, :3])
            )
            pair = self.split(x.flatten(1))
            return self.fc(torch.cat([pair.left, pair.right], 1))

    torch.manual_seed(0)
    model = Net().double()
    ours = gradients(copy.deepcopy(model), freeze_bn=True, perturb_from="fc")
    assert_equal(ours, gradients(copy.deepcopy(model), freeze_bn=True, perturb_from="fc", plain=True))
    model.changes = True
    with pytest.raises(ValueError, match="differs between passes"):
        gradients(model, freeze_bn=True, perturb_from="fc")
    assert "forward" not in vars(model.conv)


def test_two_parts_of_ones_own_make_a_sequence_that_can_be_cut():
    class Rest(nn.Module):  # more than a sequence: it has a way around
        def __init__(self):
            super().__init__()
            self.wide, self.fc = nn.Linear(8, 8), nn.Linear(8, 5)

        def forward(self, z):
            return self.fc(z + F.dropout(self.wide(z).tanh(), 0.3, self.training))

    torch.manual_seed(0)
    front = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = nn.Sequential(front, Rest()).double()
    ours = gradients(copy.deepcopy(model), freeze_bn=True, perturb_from="1")
    assert_equal(ours, gradients(copy.deepcopy(model), freeze_bn=True, perturb_from="1", plain=True))
    sam = SAM.split(*model.train(), 0.1)
    torch.manual_seed(3)
    sam.backward(lambda x, y: F.cross_entropy(sam.model(x), y), *batch())
    assert sam.shares_front
    assert all(torch.equal(w.grad, ours[0][name]) for name, w in sam.model.named_parameters())


def test_a_front_that_does_not_train_is_shared_too():
    model = build("test_resnet")
    for name, w in model.named_parameters():
        w.requires_grad_(name.startswith(("layer4", "fc")))
    ours = gradients(copy.deepcopy(model), freeze_bn=True, perturb_from="layer4")
    assert_equal(ours, gradients(copy.deepcopy(model), freeze_bn=True, perturb_from="layer4", plain=True))


@pytest.mark.parametrize(
    ("options", "n", "shares"),
    [
        ({}, 6, True),
        ({"micro_batch": 6}, 6, True),
        ({"micro_batch": 2}, 6, False),
        ({"micro_batch": 2, "m": 2}, 6, True),
        ({"ascent_fraction": 0.5}, 6, False),
    ],
)
def test_whether_the_front_is_shared_and_what_a_step_then_costs(options, n, shares):
    model = build("test_resnet")
    train_mode(model, freeze_bn=True)
    sam = SAM(model, 0.1, perturb_from="layer3", **options)
    sam.suffix_share = 0.25
    sam.backward(lambda x, y: F.cross_entropy(model(x), y), *batch(n))
    assert sam.shares_front == shares
    assert sam.passes == 1 + options.get("ascent_fraction", 1) * (0.25 if shares else 1)
    if hasattr(model, "set_grad_checkpointing"):
        model.set_grad_checkpointing(True)
        assert not sam.shares_front


def test_under_autocast_the_gradient_is_that_of_the_plain_form():
    grads = []
    for plain in (False, True):
        model = build("test_resnet").float()
        train_mode(model, freeze_bn=True)
        sam = SAM(model, 0.1, perturb_from="layer3")
        if plain:
            sam._cut = None

        def loss(x, y, model=model):
            with torch.autocast("cpu", torch.bfloat16):
                return 1024 * F.cross_entropy(model(x), y)  # scaled, as for float16

        images, labels = batch()
        sam.backward(loss, images.float(), labels)
        grads.append(torch.cat([w.grad.flatten() for w in model.parameters()]) / 1024)
    assert torch.equal(*grads)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch's own, when it compiles
def test_a_compiled_model_computes_its_front_in_each_pass():
    model = build("test_resnet")
    ours = copy.deepcopy(model)
    ours.layer2.compile(backend="eager")
    found = gradients(ours, freeze_bn=True, perturb_from="layer3")
    assert not SAM(ours, 0.1, perturb_from="layer3").shares_front
    assert_equal(found, gradients(model, freeze_bn=True, perturb_from="layer3", plain=True))


@pytest.mark.parametrize("full_in", ["pass 1", "pass 2"])
def test_when_memory_runs_out_a_step_goes_on_in_smaller_parts_and_frees_the_front(full_in):
    results = {}
    for kind in ("full", "small from the start", "plain"):
        model = build("test_resnet")
        train_mode(model, freeze_bn=True)
        sam = SAM(model, 0.1, perturb_from="layer3", micro_batch=None if kind == "full" else 3)
        if kind == "plain":
            sam._cut = None

        def objective(logits, labels, sam=sam, kind=kind):
            if kind == "full" and len(labels) == 6 and sam.perturbed == (full_in == "pass 2"):
                raise MemoryError
            return F.cross_entropy(logits, labels)

        torch.manual_seed(0)
        step = Step(sam, torch.optim.SGD(model.parameters(), lr=0.1), objective)
        assert step(*batch()).applied
        assert sam.effective_micro_batch(6) == 3
        assert not sam.shares_front
        assert sam._cut is None or sam._cut._z is None
        results[kind] = torch.cat([w.detach().flatten() for w in model.parameters()])
    assert torch.equal(results["full"], results["small from the start"])
    assert torch.allclose(results["full"], results["plain"], atol=1e-12)


def test_the_share_of_the_gradient_says_how_radii_compare():
    model = build("test_resnet")
    train_mode(model, freeze_bn=True)
    sam = SAM(model, 0.1, perturb_from="layer3")
    assert sam.gradient_share() is None
    sam.backward(lambda x, y: F.cross_entropy(model(x), y), *batch())
    squares = {name: float(w.grad.square().sum()) for name, w in model.named_parameters()}
    suffix = sum(square for name, square in squares.items() if name.startswith(("layer3", "layer4", "fc")))
    assert sam.gradient_share() == pytest.approx((suffix / sum(squares.values())) ** 0.5, rel=1e-12)


def test_the_second_order_term_is_refused():
    with pytest.raises(ValueError, match="second_order: not with perturb_from"):
        SAM(build("test_resnet"), 0.1, perturb_from="layer3", second_order=True)
