"""AE-SAM: SAM only where the gradient is large."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from samtune import SAM
from samtune.config import loading
from samtune.errors import UsageError
from samtune.sam.gradient_rule import GradientRule
from samtune.sam.step import Step

BASE = {"model": "test_resnet", "dataset": "cifar10"}


def small_net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.3), nn.Linear(144, 3)
    ).double()


def batches(n):
    generator = torch.Generator().manual_seed(1)
    for step in range(n):
        images = torch.randn(8, 3, 8, 8, generator=generator, dtype=torch.float64) * (1 + step % 3)
        yield images, torch.randint(0, 3, (8,), generator=generator)


def train(when, steps=30, rho=0.1):
    """The weights and buffers after these steps, which of them were of SAM, and the generator's next number."""
    net = small_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    sam, passes = SAM(net, rho, when=when), []
    for step, (images, labels) in enumerate(batches(steps)):
        torch.manual_seed(step)
        optimizer.zero_grad()
        sam.backward(lambda x, y: F.cross_entropy(net(x), y), images, labels)
        optimizer.step()
        passes.append(sam.passes)
    return [*net.state_dict().values()], [n == 2 for n in passes], torch.rand(2)


def test_thirty_steps_are_those_of_the_rule_written_out():
    net = small_net()
    params = list(net.parameters())
    optimizer = torch.optim.SGD(params, lr=0.05, momentum=0.9)
    mean, variance, perturbed = 0.0, math.exp(-10), []
    for step, (images, labels) in enumerate(batches(30)):
        torch.manual_seed(step)
        optimizer.zero_grad()
        F.cross_entropy(net(images), labels).backward()
        x = sum(float(w.grad.square().sum()) for w in params)
        mean = 0.9 * mean + 0.1 * x
        variance = 0.9 * variance + 0.1 * (x - mean) ** 2
        perturbed.append(x >= mean + 0.3 * variance**0.5)
        if perturbed[-1]:
            before = [w.detach().clone() for w in params]
            statistics = {name: buffer.clone() for name, buffer in net.named_buffers()}
            with torch.no_grad():
                for w in params:
                    w += 0.1 * w.grad / x**0.5
            torch.manual_seed(step)
            optimizer.zero_grad()
            F.cross_entropy(net(images), labels).backward()
            with torch.no_grad():
                for w, value in zip(params, before, strict=True):
                    w.copy_(value)
                for name, buffer in net.named_buffers():
                    buffer.copy_(statistics[name])
        optimizer.step()
    ours, decided, _ = train(GradientRule(0.3))
    assert decided == perturbed
    assert 5 < sum(perturbed) < 25
    assert all(torch.allclose(a, b, rtol=1e-10) for a, b in zip(ours, net.state_dict().values(), strict=True))


@pytest.mark.parametrize(("c", "rho"), [(-1e6, 0.1), (1e6, 0.0)])
def test_a_rule_that_always_or_never_holds_is_sam_or_sgd_bit_for_bit(c, rho):
    ours, decided, drawn = train(GradientRule(c))
    oracle, _, drawn_by_it = train(None, rho=rho)
    assert decided == [c < 0] * 30
    assert all(torch.equal(a, b) for a, b in zip(ours, oracle, strict=True))
    assert torch.equal(drawn, drawn_by_it)


def test_a_plain_step_leaves_alone_what_the_loss_does_not_use():
    """As SGD does: weight decay moves no parameter without a gradient."""
    net = small_net().eval()
    net.register_parameter("unused", nn.Parameter(torch.ones(2, dtype=torch.float64)))
    SAM(net, 0.1, when=GradientRule(1e6)).backward(lambda x, y: F.cross_entropy(net(x), y), *next(batches(1)))
    assert net.unused.grad is None
    assert net[0].weight.grad is not None


def test_a_gradient_is_added_to_the_one_that_is_there():
    net = small_net().eval()
    sam = SAM(net, 0.1, when=GradientRule(1e6))
    images, labels = next(batches(1))
    for _ in range(2):
        sam.backward(lambda x, y: F.cross_entropy(net(x), y), images, labels)
    twice = torch.cat([w.grad.flatten() for w in net.parameters()])
    net.zero_grad()
    F.cross_entropy(net(images), labels).backward()
    assert torch.allclose(twice, 2 * torch.cat([w.grad.flatten() for w in net.parameters()]), rtol=1e-12)


def test_a_norm_that_is_not_finite_changes_nothing():
    rule = GradientRule(1.0)
    before = rule.state
    assert rule([torch.tensor([math.nan])])
    assert rule.state == before
    net = small_net().eval()
    sam = SAM(net, 0.1, when=GradientRule(1e6))
    sam.backward(lambda x, y: F.cross_entropy(net(x), y) + math.inf, *next(batches(1)))
    assert all(w.grad.isnan().all() for w in net.parameters())


def test_a_step_that_is_not_applied_leaves_the_rule_as_it_was():
    net = small_net().eval()
    sam = SAM(net, 0.1, when=GradientRule(-1e6))
    before = sam.when.state

    def objective(logits, labels):
        return F.cross_entropy(logits, labels) * (math.inf if sam.perturbed else 1)

    assert not Step(sam, torch.optim.SGD(net.parameters(), lr=0.1), objective)(*next(batches(1))).applied
    assert sam.when.state == before


def test_when_memory_runs_out_the_rule_sees_the_step_once():
    results = []
    for full in (True, False):
        net = small_net().eval()
        sam = SAM(net, 0.1, when=GradientRule(-1e6), micro_batch=None if full else 4)

        def objective(logits, labels, sam=sam, full=full):
            if full and len(labels) == 8 and sam.perturbed:
                raise MemoryError
            return F.cross_entropy(logits, labels)

        Step(sam, torch.optim.SGD(net.parameters(), lr=0.1), objective)(*next(batches(1)))
        results.append(sam.when.state)
    assert results[0] == results[1]


@pytest.mark.parametrize(
    "options", [{"ascent": "random"}, {"ascent_fraction": 0.5}, {"perturb": "norm"}, {"second_order": True}, {"m": 4}]
)
def test_what_leaves_no_whole_gradient_is_refused(options):
    with pytest.raises(ValueError, match="when: "):
        SAM(copy.deepcopy(small_net()), 0.1, when=GradientRule(1.0), **options)


def test_its_passes_are_not_recorded():
    with pytest.raises(ValueError, match="cannot be recorded"):
        SAM(small_net(), 0.1, when=GradientRule(1.0)).use_cuda_graphs()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"sam_when": "loss:1"}, 'must be "gradient:1"'),
        ({"sam_when": "gradient:"}, 'must be "gradient:1"'),
        ({"m": 4}, "--m 4 contradict"),
        ({"perturb_from": "layer3"}, "--perturb-from contradict"),
        ({"shard": True, "m": "global"}, "--shard contradict"),
        ({"processes": 2}, "--processes 2 contradict"),
        ({"amp_dtype": "float16"}, "float16 contradict"),
    ],
)
def test_settings_that_do_not_go_with_it_are_refused_in_a_line(more, said):
    with pytest.raises(UsageError) as error:
        loading.load(None, BASE | {"sam_when": "gradient:1"} | more)
    assert said in str(error.value)


@pytest.mark.parametrize("text", ["gradient:0.00001", "gradient:-1", "gradient:123.123456"])
def test_a_rule_is_read_again_as_it_was_written(text):
    config = loading.load(None, BASE | {"sam_when": text})
    assert loading.load(None, config.model_dump(mode="json", exclude_none=True)).sam_when == text
