"""Small networks for CIFAR learn 200 images by heart; the benchmark `learning` does it with 1,000 and larger ones."""

import pytest
import timm
import torch
import torch.nn.functional as F

from tests.benchmarks.learning import NETWORKS, learn, read

SMALLER = {
    "resnet20": {"blocks": 1},
    "resnet32_wide": {"blocks": 1, "widths": (16, 32, 64), "stem": 8},
    "wrn28_10": {"blocks": 1, "widths": (16, 32, 64)},
    "wrn40_10_nonorm": {"blocks": 2, "widths": (16, 32, 64)},
    "shake26_2x96d": {"blocks": 1, "width": 12},
    "pyramidnet272_a200": {"blocks": 1, "alpha": 25},
    "pyramidnet272_a200_shakedrop": {"blocks": 1, "alpha": 25},
}


@pytest.mark.slow
@pytest.mark.parametrize("with_sam", [False, True])
@pytest.mark.parametrize("name", SMALLER)
def test_a_network_learns_from_scratch_with_sgd_and_with_sam(name, with_sam, shared_data):
    images, labels = read(shared_data / "cifar10", 200)
    lr, rho, _ = NETWORKS[name]
    torch.manual_seed(0)
    model = timm.create_model(name, **SMALLER[name])
    images = F.interpolate(images, size=(8, 8), mode="area")
    assert learn(model, images, labels, lr=lr, rho=rho if with_sam else 0.0, most_steps=400) is not None
