"""The variants of SAM: m, filters, radii, ascent, L2 in the loss."""

import math

import numpy as np
import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

from samtune import SAM
from samtune.sam.losses import l2_penalty
from tests.support.small_models import (
    A,
    Quadratic,
    cross_entropy_of,
    gradient,
    make_step,
    quadratic_loss,
    record_weights,
    sgd,
    state,
)


def test_pieces_have_their_own_perturbations_and_their_mean_gradient(plain_net, batch):
    loss = cross_entropy_of(plain_net)
    pieces = [tuple(t[i : i + 3] for t in batch) for i in (0, 3, 6)]  # 3, 3 and 2 of 8
    expected = sum(len(piece[0]) / 8 * gradient(plain_net, loss, *piece) for piece in pieces)
    torch.testing.assert_close(gradient(plain_net, loss, *batch, m=3), expected, rtol=1e-12, atol=1e-14)
    assert not torch.allclose(gradient(plain_net, loss, *batch), expected, rtol=1e-4)


def test_without_sam_pieces_are_gradient_accumulation(plain_net, batch):
    loss = cross_entropy_of(plain_net)
    whole, accumulated = (gradient(plain_net, loss, *batch, rho=0.0, m=m) for m in ("device", 3))
    torch.testing.assert_close(accumulated, whole, rtol=1e-12, atol=1e-14)


def test_a_fraction_of_the_batch_chooses_the_perturbation_and_the_whole_batch_descends(plain_net, batch):
    loss = cross_entropy_of(plain_net)
    params = list(plain_net.parameters())
    g1 = torch.autograd.grad(loss(batch[0][:3], batch[1][:3]), params)
    norm = torch.cat([g.reshape(-1) for g in g1]).norm()
    with torch.no_grad():
        before = [w.clone() for w in params]
        for w, g in zip(params, g1, strict=True):
            w += 0.1 * g / norm
    g2 = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss(*batch), params)])
    with torch.no_grad():
        for w, b in zip(params, before, strict=True):
            w.copy_(b)
    torch.testing.assert_close(gradient(plain_net, loss, *batch, ascent_fraction=0.3), g2, rtol=1e-12, atol=1e-14)
    result = make_step(plain_net, sgd(plain_net), ascent_fraction=0.3)(*batch)
    assert result.n == 3
    assert result.passes == pytest.approx(1.3)


def test_ascent_steps_follow_the_dual_gradient_and_stay_in_the_ball():
    model, rho, steps = Quadratic(), 0.4, 4
    w = model.w.detach().numpy().copy()
    e = 0 * w
    for _ in range(steps):
        g = A @ (w + e)
        e = e + rho / steps * g / np.linalg.norm(g)
    seen = []

    def loss(x):
        seen.append(model.w.detach().numpy().copy())
        return quadratic_loss(model(x), None)

    g2 = gradient(model, loss, torch.zeros(1, 3), rho=rho, ascent_steps=steps)
    np.testing.assert_allclose(g2.numpy(), A @ (w + e), rtol=1e-12)
    assert all(np.linalg.norm(at - w) <= rho * (1 + 1e-12) for at in seen)
    assert len(seen) == steps + 1


@pytest.mark.parametrize(
    ("perturb", "moved"),
    [
        ("all", {"conv.weight", "bn.weight", "bn.bias", "fc.weight", "fc.bias"}),
        ("norm", {"bn.weight", "bn.bias"}),
        ("no-norm", {"conv.weight", "fc.weight", "fc.bias"}),
        (r"^fc\.|conv", {"conv.weight", "fc.weight", "fc.bias"}),
    ],
)
def test_a_filter_chooses_what_is_perturbed_and_all_of_it_trains(small_net, batch, perturb, moved):
    before, seen = state(small_net), record_weights(small_net)
    make_step(small_net, sgd(small_net), perturb=perturb)(*batch)
    assert {name for name, w in seen[1].items() if not torch.equal(w, before[name])} == moved
    assert all(not torch.equal(w, before[name]) for name, w in small_net.named_parameters())


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224", "efficientnet_b0", "convnext_atto"])
def test_norm_parameters_of_timm_models_are_found(name):
    model = timm.create_model(name, num_classes=2)
    kinds = (torch.nn.modules.batchnorm._BatchNorm, torch.nn.LayerNorm)
    expected = {id(w) for module in model.modules() if isinstance(module, kinds) for w in module.parameters()}
    assert {id(w) for w in SAM(model, 0.1, perturb="norm")._params} == expected
    assert len(expected) > 20


def test_perturbing_norm_parameters_computes_no_convolution_weight_gradients_in_pass_1():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.Conv2d(8, 8, 3))
    images = torch.randn(4, 3, 12, 12)

    def work(function, *arguments):
        with FlopCounterMode(display=False) as counter:
            function(*arguments)
        return counter.get_total_flops()

    def step(perturb):
        return work(SAM(model, 0.1, perturb=perturb).backward, lambda x: model(x).square().mean(), images)

    # The gradient of a convolution's weights is as much work as the convolution.
    assert step("all") - step("norm") == work(model, images)


def test_groups_of_parameters_have_radii_of_their_own(small_net, batch):
    before, seen = state(small_net), record_weights(small_net)
    make_step(small_net, sgd(small_net), rho=0.2, rho_factors={"^fc": 0.5, "fc|bn": 0.0})(*batch)
    e = {name: (w - before[name]).norm() for name, w in seen[1].items()}
    assert e["bn.weight"] == e["bn.bias"] == 0
    head = (e["fc.weight"] ** 2 + e["fc.bias"] ** 2).sqrt() / 0.1
    assert (head**2 + (e["conv.weight"] / 0.2) ** 2).item() == pytest.approx(1, rel=1e-9)


def test_the_adaptive_radius_spares_biases_and_norm_parameters(small_net):
    adaptive = SAM(small_net, adaptive=True)._perturbation.adaptive
    names = [name for name, _ in small_net.named_parameters()]
    assert {name for name, scaled in zip(names, adaptive, strict=True) if scaled} == {"conv.weight", "fc.weight"}


def test_the_l2_term_enters_both_passes_but_not_the_reported_loss():
    """On a quadratic, the term adds strength * w to the gradient in each."""
    model, strength, rho = Quadratic(), 0.3, 0.1
    step = make_step(
        model,
        sgd(model, lr=1.0, momentum=0, nesterov=False),
        rho=rho,
        loss=quadratic_loss,
        penalty=lambda: l2_penalty([model.w], strength),
    )
    w = model.w.detach().numpy().copy()
    result = step(torch.zeros(1, 3), torch.zeros(1, dtype=torch.long))
    g = A @ w + strength * w
    e = rho * g / np.linalg.norm(g)
    np.testing.assert_allclose(model.w.detach().numpy(), w - (A + strength * np.eye(3)) @ (w + e), rtol=1e-12)
    assert result.loss == pytest.approx(w @ A @ w / 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rho": -0.1}, "rho"),
        ({"rho": math.nan}, "rho"),
        ({"p": 0.9}, "p 0.9"),
        ({"perturb": "nothing_of_this_name"}, "matches none"),
        ({"m": 0}, "m 0"),
        ({"m": "rank"}, "rank"),
        ({"m": None}, "None"),
        ({"ascent_fraction": 0.0}, "ascent_fraction"),
        ({"ascent_steps": 0}, "ascent_steps"),
        ({"micro_batch": 0}, "micro_batch 0"),
        ({"rho_factors": {"fc": -1.0}}, "factors"),
    ],
)
def test_invalid_arguments_raise_an_error_that_names_them(small_net, options, message):
    with pytest.raises(ValueError, match=message):
        SAM(small_net, **options)


def test_an_empty_batch_is_refused(small_net, batch):
    with pytest.raises(ValueError, match="empty"):
        SAM(small_net).backward(cross_entropy_of(small_net), batch[0][:0], batch[1][:0])
