"""Small models and steps that the tests of the SAM engine share."""

import contextlib

import numpy as np
import torch
import torch.nn.functional as F

from samtune import SAM
from samtune.sam.known_direction import ONE_PASS
from samtune.sam.step import Step


def make_step(
    model,
    optimizer,
    *,
    rho=0.1,
    clip_grad=0.0,
    loss=F.cross_entropy,
    autocast=contextlib.nullcontext,
    scaler=None,
    penalty=None,
    **sam,
):
    if sam.get("ascent") in ONE_PASS:
        sam["optimizer"] = optimizer
    own = {"clip_grad": clip_grad, "autocast": autocast, "scaler": scaler, "penalty": penalty}
    return Step(SAM(model, rho, **sam), optimizer, loss, **own)


def sgd(model, **options):
    return torch.optim.SGD(model.parameters(), **({"lr": 0.1, "momentum": 0.9, "nesterov": True} | options))


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def record_weights(model):
    """A list to which each forward pass from now on adds the weights."""
    seen = []
    model.register_forward_hook(lambda *_: seen.append({n: w.detach().clone() for n, w in model.named_parameters()}))
    return seen


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def gradient(model, loss, *batch, rho=0.1, **options):
    """SAM's gradient as one vector."""
    model.zero_grad()
    SAM(model, rho, **options).backward(loss, *batch)
    return torch.cat([w.grad.reshape(-1) for w in model.parameters() if w.grad is not None])


def cross_entropy_of(model):
    return lambda images, labels: F.cross_entropy(model(images), labels)


A = np.diag([1.0, 4.0, 9.0]) + 0.5


class Quadratic(torch.nn.Module):
    """w, for the loss w'Aw / 2."""

    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64))

    def forward(self, x):
        return self.w.expand(len(x), 3)


def quadratic_loss(out, _):
    return out[0] @ torch.from_numpy(A) @ out[0] / 2
