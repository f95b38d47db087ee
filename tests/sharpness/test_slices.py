"""Directions of slices, and that a slice leaves the model as it was."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from samtune.sharpness.slices import filter_normalised_direction, line_to, moved
from tests.sharpness.test_hessian import samples, small_net


def loss_at(net, direction, distance):
    images, labels = samples()
    with torch.no_grad(), moved(net, [direction], [distance]):
        return float(F.cross_entropy(net(images), labels))


def test_each_filter_of_a_direction_has_the_norm_of_the_weights_and_vectors_stay():
    net = small_net()
    direction = filter_normalised_direction(net, 0)
    for name, w in net.named_parameters():
        if w.ndim < 2:
            assert not direction[name].any()
        else:
            assert torch.allclose(direction[name].flatten(1).norm(dim=1), w.flatten(1).norm(dim=1))


def test_a_direction_follows_from_its_seed():
    net = small_net()
    first, again, other = (filter_normalised_direction(net, seed) for seed in (0, 0, 1))
    assert torch.equal(first["0.weight"], again["0.weight"])
    assert not torch.equal(first["0.weight"], other["0.weight"])


def test_a_slice_does_not_change_if_a_filter_is_scaled_and_its_normalisation_undoes_it():
    net, scaled = small_net(), small_net()
    for model in (net, scaled):
        model[1].eps = 0.0  # which would not be scaled
    with torch.no_grad():
        scaled[0].weight[1] *= 7
        scaled[0].bias[1] *= 7
        scaled[1].running_mean[1] *= 7
        scaled[1].running_var[1] *= 49
    before, after = (filter_normalised_direction(model, 3) for model in (net, scaled))
    for distance in (-1.0, 0.0, 0.4, 1.0):
        assert loss_at(scaled, after, distance) == pytest.approx(loss_at(net, before, distance), rel=1e-12)


def test_a_line_leads_from_one_model_to_another_with_their_statistics():
    net, other = small_net(), small_net()
    with torch.no_grad():
        for value in other.state_dict().values():
            value += torch.ones_like(value) if value.is_floating_point() else 0
    line = line_to(net, other.state_dict())
    images, labels = samples()
    with torch.no_grad():
        at_other = float(F.cross_entropy(other(images), labels))
        at_net = float(F.cross_entropy(net(images), labels))
    assert loss_at(net, line, 1.0) == pytest.approx(at_other, rel=1e-9)
    assert loss_at(net, line, 0.0) == at_net


def test_beyond_the_ends_of_a_line_no_variance_is_negative():
    net, other = small_net(), small_net()
    with torch.no_grad():
        other[1].running_var.mul_(9)
    line = line_to(net, other.state_dict())
    with moved(net, [line], [-0.25]):
        assert not net[1].running_var.any()
    assert torch.isfinite(torch.tensor(loss_at(net, line, -0.25)))


@pytest.mark.parametrize("error", [None, KeyboardInterrupt])
def test_weights_and_statistics_come_back_bit_for_bit(error):
    net, other = small_net(), small_net()
    with torch.no_grad():
        for w in other.parameters():
            w.mul_(1.7)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    directions = [filter_normalised_direction(net, 0), line_to(net, other.state_dict())]
    try:
        with moved(net, directions, [0.3, -0.2]):
            assert not torch.equal(net[0].weight, before["0.weight"])
            if error:
                raise error
    except KeyboardInterrupt:
        pass
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_two_directions_add_up():
    net = nn.Linear(2, 2, bias=False).double()
    one, two = (filter_normalised_direction(net, seed) for seed in (0, 1))
    with moved(net, [one, two], [0.5, -2.0]):
        at = net.weight.detach().clone()
    assert torch.allclose(at, net.weight + 0.5 * one["weight"] - 2.0 * two["weight"])
