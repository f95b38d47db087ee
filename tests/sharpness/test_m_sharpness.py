"""m-sharpness against closed forms, and what must hold for every loss."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from samtune.sam.perturbation import Perturbation
from samtune.sharpness.directions import random_directions
from samtune.sharpness.m_sharpness import group_sharpness, mean_over_groups
from tests.sharpness.test_hessian import loss_of, samples, small_net

H = torch.tensor([[4.0, 1.0, 0.0], [1.0, 3.0, 1.0], [0.0, 1.0, 1.0]], dtype=torch.float64)
LARGEST = float(torch.linalg.eigvalsh(H)[-1])


def quadratic(at):
    """The loss w'Hw / 2 of any samples, and its parameter."""
    w = nn.Parameter(torch.tensor(at, dtype=torch.float64))
    return (lambda x: 0.5 * (w @ H @ w) * x.mean()), w


def ones(n=4):
    return (torch.ones(n, dtype=torch.float64),)


def test_at_the_minimum_of_a_quadratic_the_maximum_is_half_rho_squared_times_the_largest_eigenvalue():
    loss, w = quadratic([0.0, 0.0, 0.0])
    found = group_sharpness(loss, Perturbation([w]), ones(), 0.3, steps=60, starts=[random_directions([w], 1)])
    assert found.maximum == pytest.approx(0.5 * 0.3**2 * LARGEST, rel=1e-12)
    assert found.one_step == 0  # no gradient, no perturbation
    assert found.is_converged


def test_one_step_of_a_quadratic_is_worked_by_hand():
    loss, w = quadratic([1.0, -2.0, 0.5])
    e = 0.1 * (H @ w.detach()) / (H @ w.detach()).norm()
    rise = float((H @ w.detach()) @ e + 0.5 * e @ H @ e)
    assert group_sharpness(loss, Perturbation([w]), ones(), 0.1, steps=1).one_step == pytest.approx(rise, rel=1e-12)


def test_the_maximum_on_a_sphere_away_from_the_minimum_is_that_of_a_fine_search():
    loss, w = quadratic([0.3, -0.2, 0.1])
    found = group_sharpness(loss, Perturbation([w]), ones(), 0.5, steps=200)
    rng = np.random.default_rng(0)
    points = rng.normal(size=(200_000, 3))
    points *= 0.5 / np.linalg.norm(points, axis=1, keepdims=True)
    moved = points + w.detach().numpy()
    searched = (0.5 * np.einsum("ni,ij,nj->n", moved, H.numpy(), moved)).max() - found.loss
    assert found.maximum == pytest.approx(searched, rel=1e-3)
    assert found.maximum >= searched
    assert abs(found.gap) < 1e-9


def test_the_search_finds_the_largest_eigenvalue_and_not_that_of_largest_size():
    steep = torch.diag(torch.tensor([1.0, -3.0], dtype=torch.float64))
    w = nn.Parameter(torch.zeros(2, dtype=torch.float64))

    def saddle(x):
        return 0.5 * (w @ steep @ w) * x.mean()

    starts = [[torch.tensor([1.0, 1.0], dtype=torch.float64)]]
    found = group_sharpness(saddle, Perturbation([w]), ones(), 0.3, steps=40, starts=starts)
    assert found.maximum == pytest.approx(0.5 * 0.3**2, rel=1e-2)
    assert found.maximum <= 0.5 * 0.3**2


def test_a_maximum_inside_the_ball_is_found_and_no_value_is_below_zero():
    w = nn.Parameter(torch.tensor([1.0], dtype=torch.float64))

    def hill(x):
        return -0.5 * (w**2).sum() * x.mean()

    found = group_sharpness(hill, Perturbation([w]), ones(), 3.0, steps=30)
    assert found.one_step == pytest.approx(-1.5)  # SAM's step goes from 1 to -2
    assert found.maximum == pytest.approx(0.5, rel=1e-3)  # at w = 0
    assert group_sharpness(hill, Perturbation([w]), ones(), 3.0, steps=1).maximum == 0


def test_a_loss_that_is_not_finite_beyond_w_is_no_maximum_and_has_not_converged():
    w = nn.Parameter(torch.tensor([1.0], dtype=torch.float64))

    def edge(x):
        return torch.where(w < 1.05, w, math.nan).sum() * x.mean()

    found = group_sharpness(edge, Perturbation([w]), ones(), 0.1, steps=10)
    assert 0.04 < found.maximum < 0.05
    assert math.isnan(found.one_step)
    assert not found.is_converged


@pytest.mark.parametrize("p", [1.0, 2.0, math.inf])
@pytest.mark.parametrize("adaptive", [False, True])
def test_the_maximum_is_at_least_the_value_of_one_step_and_weights_come_back(p, adaptive):
    net, batch = small_net(), samples()
    params = list(net.parameters())
    before = [w.detach().clone() for w in params]
    perturbation = Perturbation(params, p=p, adaptive=[adaptive and w.ndim > 1 for w in params])
    found = group_sharpness(loss_of(net), perturbation, batch, 0.5, steps=8, starts=[random_directions(params, 0)])
    assert found.one_step > 0
    assert found.maximum > found.one_step or (p == 1 and found.maximum == found.one_step)
    assert all(torch.equal(w, old) for w, old in zip(params, before, strict=True))


def test_smaller_groups_are_at_least_as_sharp():
    net, (images, labels) = small_net(), samples(16)
    perturbation = Perturbation(list(net.parameters()))
    maxima = []
    for m in (16, 4, 1):
        groups = [
            group_sharpness(loss_of(net), perturbation, (images[i : i + m], labels[i : i + m]), 0.1, steps=30)
            for i in range(0, 16, m)
        ]
        maxima.append(mean_over_groups(m, groups).maximum)
    assert maxima == sorted(maxima)
    assert maxima[-1] > 1.5 * maxima[0]


def test_micro_batches_do_not_change_the_value():
    net, batch = small_net(), samples()
    perturbation = Perturbation(list(net.parameters()))
    whole, parts = (
        group_sharpness(loss_of(net), perturbation, batch, 0.1, steps=5, micro_batch=size) for size in (None, 5)
    )
    assert parts.maximum == pytest.approx(whole.maximum, rel=1e-10)
    assert parts.one_step == pytest.approx(whole.one_step, rel=1e-10)


def test_a_group_that_could_still_rise_is_said_not_to_have_converged():
    loss, w = quadratic([1e-9, 0.0, 0.0])
    short = group_sharpness(loss, Perturbation([w]), ones(), 0.3, steps=1)
    long = group_sharpness(loss, Perturbation([w]), ones(), 0.3, steps=60)
    assert mean_over_groups(4, [short, long]).not_converged == 0.5


def test_a_group_whose_maximum_a_random_start_finds_converges():
    loss, w = quadratic([0.0, 0.0, 0.0])  # the gradient is zero: only a random start rises
    found = group_sharpness(loss, Perturbation([w]), ones(), 0.3, steps=60, starts=[random_directions([w], 1)])
    assert found.maximum > 0
    assert abs(found.gap) < 1e-9


def test_the_mean_over_groups_weighs_them_by_their_samples():
    loss, w = quadratic([1.0, 0.0, 0.0])
    perturbation = Perturbation([w])
    groups = [group_sharpness(loss, perturbation, ones(n), rho, steps=1) for n, rho in ((3, 0.1), (1, 0.4))]
    mean = mean_over_groups(3, groups)
    assert mean.one_step == pytest.approx((3 * groups[0].one_step + groups[1].one_step) / 4)
    assert (mean.groups, mean.m) == (2, 3)


@pytest.mark.parametrize("call", [1, 2, 5])
def test_weights_come_back_if_a_pass_is_broken_off(call):
    net, batch = small_net(), samples()
    params = list(net.parameters())
    before = [w.detach().clone() for w in params]
    calls = 0

    def loss(*of):
        nonlocal calls
        calls += 1
        if calls == call:
            raise KeyboardInterrupt
        return loss_of(net)(*of)

    with pytest.raises(KeyboardInterrupt):
        group_sharpness(loss, Perturbation(params), batch, 0.1, steps=8)
    assert all(torch.equal(w, old) for w, old in zip(params, before, strict=True))
