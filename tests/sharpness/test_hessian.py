"""Hessian products against the dense Hessian of torch.func, in float64."""

import gc
import re
import warnings
import weakref

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from samtune.distributed import collectives
from samtune.distributed.collectives import flat_views
from samtune.sharpness.hessian import Hessian, _SavedTensors
from samtune.sharpness.lanczos import top_eigenpairs
from tests.support.rank_processes import Ranks


def small_net():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Tanh(), nn.Flatten(), nn.Dropout(0.5), nn.Linear(12, 3)
    )
    for _ in range(3):
        net(torch.randn(8, 2, 4, 4))  # running statistics that are not 0 and 1
    return net.double().eval()


def samples(n=12):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(n, 2, 4, 4, generator=generator, dtype=torch.float64)
    return images, torch.randint(0, 3, (n,), generator=generator)


def loss_of(net):
    return lambda images, labels: F.cross_entropy(net(images), labels)


def dense(net, images, labels):
    """The Hessian as a matrix, by forward over reverse mode: another way than the operator's."""
    params = {name: w for name, w in net.named_parameters() if w.requires_grad}
    sizes = [w.numel() for w in params.values()]

    def loss(flat):
        parts = zip(params.items(), flat.split(sizes), strict=True)
        weights = {name: part.view_as(w) for (name, w), part in parts}
        return F.cross_entropy(torch.func.functional_call(net, weights, (images,)), labels)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's own, when it loads the transform
        return torch.func.hessian(loss)(torch.cat([w.detach().flatten() for w in params.values()]))


def operator(net, images, labels, sizes=(12,)):
    batches = list(zip(images.split(list(sizes)), labels.split(list(sizes)), strict=True))
    return Hessian(loss_of(net), list(net.parameters()), batches)


def depthwise_net():
    """Grouped convolutions with stride, dilation, padding and bias, and statistics without a scale of their own."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, stride=(1, 2), groups=2),
        nn.BatchNorm2d(4, affine=False),
        nn.Tanh(),
        nn.Conv2d(4, 4, (1, 2), padding=(0, 1), dilation=(1, 2), groups=4, bias=False),
        nn.BatchNorm2d(4),
        nn.Tanh(),
        nn.Conv2d(4, 4, 3, padding="same", groups=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 3),
    )
    net.train()
    for _ in range(3):
        net(torch.randn(8, 2, 4, 4))
    return net.double().eval()


@pytest.mark.parametrize("pattern", [".", "^[06]", "^3", "bias"])
def test_grouped_convolutions_and_frozen_statistics_have_their_second_derivatives(pattern):
    net = depthwise_net()
    for name, w in net.named_parameters():
        w.requires_grad_(re.search(pattern, name) is not None)
    images, labels = samples()
    matrix = dense(net, images, labels)
    hessian = Hessian(loss_of(net), [w for w in net.parameters() if w.requires_grad], [(images, labels)])
    products = torch.stack([hessian @ unit for unit in torch.eye(hessian.dim, dtype=torch.float64)])
    assert torch.allclose(products, matrix, atol=1e-12)
    assert matrix.abs().max() > 1e-3


def test_kept_graphs_change_no_product():
    net = small_net()
    batches = list(zip(*(x.split(4) for x in samples()), strict=True))
    forward_passes = []
    net.register_forward_hook(lambda *args: forward_passes.append(1))
    params = list(net.parameters())
    found = {}
    for memory in (0, 10_000, 1 << 30):  # for no graph, for one or two of the three, for all
        hessian = Hessian(loss_of(net), params, batches, memory=memory)
        forward_passes.clear()
        found[memory] = [hessian @ hessian.draw(seed) for seed in range(3)], len(forward_passes)
    products, passes = zip(*found.values(), strict=True)
    assert all(torch.equal(a, b) for other in products[1:] for a, b in zip(products[0], other, strict=True))
    assert passes[0] == 9
    assert 3 < passes[1] < 9
    assert passes[2] == 3


def test_kept_graphs_are_freed_with_their_hessian_and_when_memory_runs_out(monkeypatch):
    net = small_net()
    alive, pack = [], _SavedTensors.pack

    def watched(self, tensor):
        packed = pack(self, tensor)
        alive.append(weakref.ref(packed[0]))
        return packed

    monkeypatch.setattr(_SavedTensors, "pack", watched)
    hessian = Hessian(loss_of(net), list(net.parameters()), [samples()], memory=1 << 30)
    expected = hessian @ hessian.draw(0)
    assert any(one() is not None for one in alive)
    product, failures = hessian._product, [torch.OutOfMemoryError("CUDA out of memory")]

    def full(v):
        if failures:
            raise failures.pop()
        return product(v)

    hessian._product = full
    assert torch.equal(hessian @ hessian.draw(0), expected)
    gc.collect()
    assert all(one() is None for one in alive)
    assert not hessian._kept
    again = Hessian(loss_of(net), list(net.parameters()), [samples()], memory=1 << 30)
    _ = again @ again.draw(0)
    del again
    gc.collect()
    assert all(one() is None for one in alive)


def test_a_kept_graph_does_not_go_on_with_what_changed_in_place():
    net = small_net()
    images, labels = samples()
    hessian = Hessian(loss_of(net), list(net.parameters()), [(images, labels)], memory=1 << 30)
    _ = hessian @ hessian.draw(0)
    images.add_(1.0)
    with pytest.raises(RuntimeError, match="changed in place"):
        _ = hessian @ hessian.draw(0)


def test_a_part_of_a_data_set_counts_as_large_as_it_is():
    net = small_net()
    images, labels = samples()
    sizes = []
    for part in (images[:4], images[:4].clone()):
        hessian = Hessian(loss_of(net), list(net.parameters()), [(part, labels[:4])], memory=1 << 30)
        _ = hessian @ hessian.draw(0)
        sizes.append(hessian._sizes[0])
    assert sizes[0] == sizes[1]


def test_kept_graphs_do_not_outlive_a_change_of_the_weights():
    net = small_net()
    kept, anew = (Hessian(loss_of(net), list(net.parameters()), [samples()], memory=m) for m in (1 << 30, 0))
    before = kept @ kept.draw(0)
    with torch.no_grad():
        net[0].weight.add_(1.0)
    after = kept @ kept.draw(0)
    assert not torch.equal(after, before)
    assert torch.equal(after, anew @ anew.draw(0))


@pytest.mark.parametrize("sizes", [(12,), (5, 7)])
def test_products_are_those_of_the_dense_hessian_whatever_the_batches(sizes):
    net = small_net()
    matrix = dense(net, *samples())
    hessian = operator(net, *samples(), sizes)
    products = torch.stack([hessian @ unit for unit in torch.eye(len(matrix), dtype=torch.float64)])
    assert torch.allclose(products, matrix, atol=1e-12)
    assert hessian.products == hessian.dim == len(matrix)


def test_the_largest_eigenvalues_are_those_of_the_dense_hessian():
    net = small_net()
    hessian = operator(net, *samples(), (5, 7))
    found = top_eigenpairs(hessian.__matmul__, hessian.draw(0), 5, tolerance=1e-10)
    exact = np.linalg.eigvalsh(dense(net, *samples()).numpy())[::-1][:5]
    assert found.values == pytest.approx(exact, abs=1e-8)


def test_the_hessian_of_a_quadratic_is_its_matrix():
    a = torch.tensor([[2.0, 1.0], [1.0, 5.0]], dtype=torch.float64)
    w = nn.Parameter(torch.tensor([3.0, -1.0], dtype=torch.float64))
    hessian = Hessian(lambda x: 0.5 * (w @ a @ w) * x.mean(), [w], [(torch.ones(3, dtype=torch.float64),)])
    assert torch.equal(torch.stack([hessian @ unit for unit in torch.eye(2, dtype=torch.float64)]), a)


def test_a_parameter_that_the_loss_does_not_see_has_rows_of_zeros():
    used, unused = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))
    hessian = Hessian(lambda x: (used**3).sum() * x.mean(), [used, unused], [(torch.ones(4),)])
    assert torch.equal(hessian @ torch.ones(5), torch.tensor([6.0, 6.0, 0.0, 0.0, 0.0]))


def test_a_linear_loss_has_no_curvature():
    w = nn.Parameter(torch.ones(2))
    hessian = Hessian(lambda x: w.sum() * x.mean(), [w], [(torch.ones(4),)])
    assert torch.equal(hessian @ torch.ones(2), torch.zeros(2))


def test_products_leave_weights_gradients_and_statistics_as_they_were():
    net = small_net()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    hessian = operator(net, *samples())
    _ = hessian @ hessian.draw(0)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(w.grad is None for w in net.parameters())


def test_curvature_along_a_direction_does_not_depend_on_the_memory_layout_of_the_weights():
    torch.manual_seed(0)
    net = timm.create_model("test_resnet", num_classes=3).double().eval()
    images, labels = torch.randn(4, 3, 16, 16, dtype=torch.float64), torch.tensor([0, 1, 2, 0])
    direction = [torch.randn_like(w) for w in net.parameters()]

    def curvature():
        params = list(net.parameters())
        hessian = Hessian(loss_of(net), params, [(images, labels)])
        v = torch.empty(hessian.dim, dtype=torch.float64)
        for view, d in zip(flat_views(v, params), direction, strict=True):
            view.copy_(d)
        return float(v @ (hessian @ v))

    contiguous = curvature()
    net.to(memory_format=torch.channels_last)
    images = images.to(memory_format=torch.channels_last)
    assert curvature() == pytest.approx(contiguous, rel=1e-9)


def product_on_a_rank():
    """The product with a rank's own part of the samples: 5 on the first, 7 on the second."""
    net, (images, labels) = small_net(), samples()
    own = slice(0, 5) if collectives.rank() == 0 else slice(5, 12)
    hessian = operator(net, images[own], labels[own], (len(labels[own]),))
    return (hessian @ hessian.draw(0)).numpy()


def test_the_sum_over_ranks_is_the_product_of_one_process(tmp_path):
    net = small_net()
    hessian = operator(net, *samples())
    with Ranks(2, tmp_path) as ranks:
        first, second = ranks(product_on_a_rank)
    assert (first == second).all()
    assert first == pytest.approx((hessian @ hessian.draw(0)).numpy(), abs=1e-14)


def test_attention_has_second_derivatives():
    torch.manual_seed(0)
    net = timm.create_model("test_vit", num_classes=3, img_size=32, patch_size=16).eval()
    images, labels = torch.randn(2, 3, 32, 32), torch.tensor([0, 2])
    hessian = Hessian(loss_of(net), list(net.parameters()), [(images, labels)])
    v, w = hessian.draw(0), hessian.draw(1)
    assert float(w @ (hessian @ v)) == pytest.approx(float(v @ (hessian @ w)), rel=1e-3)
