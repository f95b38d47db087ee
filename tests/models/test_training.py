"""What training changes about a model."""

import copy

import pytest
import timm
import torch
from torch import nn

from samtune.models.training import keep_inputs_of_activations


class CountClones(torch.utils._python_dispatch.TorchDispatchMode):
    """The number of tensors that are cloned in a block."""

    clones = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.clones += func is torch.ops.aten.clone.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["test_efficientnet", "test_mambaout", "test_resnet"])
def test_activations_keep_their_input_without_a_copy_and_with_the_same_bits(name):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3).train()
    ours = copy.deepcopy(model)
    keep_inputs_of_activations(ours)
    images = torch.randn(2, 3, 64, 64)
    clones = {}
    for key, net in (("in place", model), ("ours", ours)):
        torch.manual_seed(1)
        with CountClones() as count:
            net(images).sum().backward()
        clones[key] = count.clones
    if name == "test_efficientnet":
        assert clones["in place"] - clones["ours"] == sum(isinstance(m, nn.SiLU) for m in model.modules()) > 0
    for a, b in zip(model.parameters(), ours.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


def test_activations_that_need_only_their_output_stay_in_place():
    model = nn.Sequential(nn.ReLU(inplace=True), nn.SiLU(inplace=True), nn.Hardswish(inplace=True), nn.SiLU())
    keep_inputs_of_activations(model)
    assert [module.inplace for module in model] == [True, False, False, False]
