"""The count of a step's bytes, against sums worked by hand."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.benchmarks import traffic

IN, OUT, N = 64, 32, 8


def watched(work):
    with FakeTensorMode(), traffic.Watch() as watch:
        work()
    return watch.bytes, watch.operations


def test_views_and_empty_tensors_move_nothing():
    def work():
        view = torch.empty(8, 4).view(4, 8).t()[1:].expand(3, 7, 4).detach()
        torch.ops.aten._unsafe_view(torch.empty(view.shape), (7, 12))

    assert watched(work) == (0, 0)


@pytest.mark.parametrize(
    ("work", "size"),
    [
        (lambda x: x + x, 12),
        (lambda x: x.add_(x), 12),
        (lambda x: x.copy_(x.half()), 4 + 2 + 2 + 4),
        (lambda x: x.zero_(), 4),
        (lambda x: torch._foreach_mul_([x, x], 2.0), 2 * 8),
        (lambda x: x + x[:1].expand(100), 4 + 4 + 0.04),  # what is expanded is read once
    ],
)
def test_an_operation_reads_its_inputs_and_writes_its_outputs(work, size):
    assert watched(lambda: work(torch.empty(100)))[0] == pytest.approx(100 * size)


def network_bytes(passes: int) -> float:
    """A linear layer without bias under autocast, cross-entropy in float32, SGD; all by hand, in bytes."""
    w, x, y = IN * OUT, IN * N, OUT * N
    scalar, labels = 4, 8 * N
    forward = 6 * (w + x) + 2 * (x + w + y)  # casts to bf16; product
    forward += 6 * y + 2 * 4 * y + (4 * y + labels + 2 * scalar)  # cast to float32; log-softmax; nll and its weight
    backward = (scalar + 4 * y + labels + scalar + 4 * y) + 3 * 4 * y + 6 * y  # nll; log-softmax; cast
    backward += 2 * (y + x + w) + 6 * w  # gradient of the weights, cast to float32
    norm, clip = 4 * w, 8 * w
    sgd = (12 + 8 + 12 + 12 + 12) * w  # decay, momentum times 0.9, plus the gradient, Nesterov, w
    perturbation = (4 + 8 + 12 + 8) * w if passes == 2 else 0  # norm, copy, add, restore
    return passes * (forward + backward) + norm + clip + sgd + perturbation


@pytest.mark.parametrize(("rho", "passes"), [(0.0, 1), (0.05, 2)])
def test_a_small_network_is_counted_as_by_hand(rho, passes):
    """But for scalars: losses, norms, scales."""
    with FakeTensorMode():
        batch = torch.randn(N, IN), torch.zeros(N, dtype=torch.int64)
        counted = traffic.count_step(nn.Linear(IN, OUT, bias=False), batch, rho)
    assert counted.bytes == pytest.approx(network_bytes(passes), abs=400)


def test_backward_kernels_of_a_convolution_read_their_input_twice():
    conv = nn.Conv2d(3, 4, 3, padding=1, bias=False)
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.randn(2, 3, 8, 8, requires_grad=True)
        y = conv(x)
        with traffic.Watch() as watch:
            torch.autograd.grad(y, [x, conv.weight], torch.randn(y.shape))
    sizes = {name: 4 * t.numel() for name, t in (("x", x), ("y", y), ("w", conv.weight))}
    assert watch.bytes == 2 * sizes["y"] + 2 * sizes["x"] + 2 * sizes["w"] + sizes["y"]  # the last: randn


def test_a_step_grows_by_the_same_bytes_with_every_image():
    size = {n: traffic.count("test_efficientnet", 64, n, 10).bytes for n in (1, 2, 4)}
    assert size[4] - size[2] == 2 * (size[2] - size[1])
    assert 1.7 < size[4] / traffic.count("test_efficientnet", 64, 4, 10, rho=0.0).bytes < 2.3
