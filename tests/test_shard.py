"""Models whose state is spread over ranks: the same step as one process takes, and checkpoints as it writes them."""

import math

import pytest
import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F

from samtune import SAM, shard
from samtune.models import train_mode
from tests.conftest import SmallNet
from tests.engines import assert_same, make_step, sgd, state
from tests.ranks import Ranks

RHO = 0.5
CPU = torch.device("cpu")
UNEVEN = {1: [7], 2: [4, 3], 4: [3, 2, 1, 1]}  # images of each rank


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    group = Ranks(2, tmp_path_factory.mktemp("ranks"))
    yield group
    group.close()


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    group = Ranks(4, tmp_path_factory.mktemp("ranks"))
    yield group
    group.close()


def small():
    torch.manual_seed(0)
    return SmallNet(drop=0.0).double()


def resnet():
    torch.manual_seed(0)
    return timm.create_model("resnet10t", num_classes=3, pretrained=False).double()


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=0.01)


def make(build, group=None):
    """On one rank, or in one process where there are no others."""
    model = build()
    if dist.is_initialized():
        model = shard.shard(model, CPU, group)
    train_mode(model, freeze_bn=True)
    return model


def joined_batch(world, step=0, size=16):
    generator = torch.Generator().manual_seed(step)
    n = sum(UNEVEN[world])
    return torch.randn(n, 3, size, size, generator=generator, dtype=torch.float64), torch.arange(n) % 3


def my_share(step=0, size=16):
    """This rank's images, labels, and weight."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    images, labels = (t.split(UNEVEN[world])[rank] for t in joined_batch(world, step, size))
    return images, labels, len(images) * world / sum(UNEVEN[world])


def train(build, optimizer, options, steps=3, group=None, loss=F.cross_entropy, **own):
    """So many updates; the whole weights and optimizer state (of rank 0), and what the steps said."""
    model = make(build, group)
    alone = not dist.is_initialized()
    step = make_step(
        model, optimizer(model), loss=loss, **({"rho": RHO, "m": "device" if alone else "global"} | options)
    )
    said = [step(*my_share(i)) for i in range(steps)]
    if alone:
        return model.state_dict(), step.optimizer.state_dict()["state"], said
    return shard.full_state_dict(model), shard.full_optimizer_state(step.optimizer), said


def assert_close(found, expected, tolerance=1e-10):
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=tolerance, atol=tolerance)


VARIANTS = {f"p={p:g}": {"p": p} for p in (2, 1, 4, math.inf)}
VARIANTS |= {
    "adaptive": {"adaptive": True},
    "adaptive p=4": {"adaptive": True, "p": 4},
    "norm": {"perturb": "norm"},
    "factors": {"rho_factors": {"^fc": 2.0, "^bn": 0.0}},
    "ascent": {"ascent_steps": 2, "ascent_fraction": 1.0},
    "clipped": {"clip_grad": 0.05},
    "rho=0": {"rho": 0.0},
}


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("optimizer", [sgd, adamw])
def test_a_sharded_model_takes_the_steps_of_one_process_on_the_joined_batch(pair, optimizer, options):
    expected, slots, alone = train(small, optimizer, options)
    (weights, state, said), (nothing, no_state, said_elsewhere) = pair(train, small, optimizer, options)
    assert_close(weights, expected)
    for index, values in slots.items():
        assert_close(
            {key: torch.as_tensor(x) for key, x in state[index].items()},
            {key: torch.as_tensor(x) for key, x in values.items()},
        )
    assert not nothing
    assert not no_state
    for a, b, c in zip(alone, said, said_elsewhere, strict=True):
        assert b == c
        assert (b.wrong, b.n, b.passes) == (a.wrong, a.n, a.passes)
        assert (b.loss, b.grad_norm) == (pytest.approx(a.loss, rel=1e-10), pytest.approx(a.grad_norm, rel=1e-10))


@pytest.mark.parametrize(("optimizer", "options"), [(sgd, {}), (adamw, {"p": 4, "adaptive": True}), (sgd, {"p": 1})])
def test_so_does_a_model_of_timm(pair, optimizer, options):
    expected, _, _ = train(resnet, optimizer, options)
    (weights, _, _), _ = pair(train, resnet, optimizer, options)
    assert_close(weights, expected)
