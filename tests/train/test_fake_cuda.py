"""What a step and an evaluation ask of a GPU, seen without one: tests/support/fake_cuda.py emulates them.

`python -m tests.support.fake_cuda` prints what is seen; with --record it prints OPERATIONS, which belongs here.
"""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import DynamicOutputShapeException

from samtune.sam.perturbation import Perturbation
from tests.support import fake_cuda
from tests.support.device_watch import STAGED, DeviceWatch, Seen, why_per_tensor
from tests.support.fake_cuda import CUDA, SETTINGS, Emulated

QUICK = ("default", "micro-batches", "statistics move, average")  # in the default lane
RECORDED_WITH = "2.14"  # the version of torch
# Operations of a step; 5 % more or fewer are not noticed.
OPERATIONS = {
    "default": 438,
    "rho 0": 229,
    "no clipping": 432,
    "smoothing 0": 394,
    "p 1": 446,
    "p 4": 471,
    "p inf": 470,
    "adaptive": 443,
    "norm alone": 414,
    "head rho": 443,
    "ascent in 2 steps": 645,
    "ascent on half": 438,
    "momentum": 250,
    "previous gradient": 250,
    "m in pieces": 903,
    "micro-batches": 889,
    "accumulation": 903,
    "mixup, cutmix": 423,
    "average": 440,
    "statistics move": 453,
    "statistics move, average": 455,
    "float16": 455,
    "float32": 340,
    "adamw": 442,
    "l2 in loss": 494,
    "drop path": 438,
    "checkpointing": 556,
    "checkpointing, statistics move": 586,
    "not channels last": 434,
    "two ranks": 438,
    "two ranks, m global": 439,
    "two ranks, statistics move": 457,
}
_TOLERANCE = 0.05


@pytest.fixture(scope="module", autouse=True)
def possible():
    reason = fake_cuda.why_impossible()
    if reason is not None and not torch.__version__.startswith(RECORDED_WITH):
        pytest.skip(reason)
    assert reason is None


@functools.cache
def emulated(name: str) -> Emulated:
    return fake_cuda.emulate(**SETTINGS[name])


in_all_settings = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.fakecuda) for name in SETTINGS]
)


# -------------------------------------------------------------------------------------------------------------- checks


def check_devices(seen: Seen) -> None:
    assert not seen.mixed, f"tensors of two devices meet: {dict(seen.mixed)}"


def check_waits(seen: Seen, *, place: str, what: str) -> None:
    """One wait, there, and for that."""
    waits = dict(seen.waits)
    assert list(waits.values()) == [1], f"not one wait: {waits}"
    (text,) = waits
    assert text.startswith(place), f"a wait elsewhere: {text}"
    assert what in text


def check_fused(seen: Seen) -> None:
    assert not seen.per_tensor, f"torch goes through a list tensor by tensor: {dict(seen.per_tensor)}"


def check_operations(seen: Seen, stored: int) -> None:
    limit = _TOLERANCE * stored
    assert abs(seen.total - stored) <= limit, f"{seen.total} operations, stored are {stored}: {seen.by_part()}"


# -------------------------------------------------------------------------------------------------------------- claims


@in_all_settings
def test_no_operation_mixes_devices(name):
    for seen in (emulated(name).step, *emulated(name).evaluations):
        check_devices(seen)


@in_all_settings
def test_a_step_waits_for_the_gpu_once(name):
    """Where it reads what it decides by."""
    check_waits(emulated(name).step, place="sam/step.py", what="tolist")


@in_all_settings
def test_an_evaluation_waits_for_the_gpu_once(name):
    """Where it takes all results over."""
    evaluations = emulated(name).evaluations
    assert len(evaluations) == 1 + bool(SETTINGS[name].get("model_ema"))
    for seen in evaluations:
        check_waits(seen, place="train/evaluation.py", what="float64 to cpu")


@in_all_settings
def test_lists_of_tensors_are_computed_by_fused_kernels(name):
    for seen in (emulated(name).step, *emulated(name).evaluations):
        check_fused(seen)


@in_all_settings
def test_a_step_has_the_operations_that_are_stored(name):
    check_operations(emulated(name).step, OPERATIONS[name])


# --------------------------------------------------------------------------------------------------- planted mistakes


def plant(monkeypatch, mistake) -> Seen:
    """A step in which `mistake(parameters, gradients)` happens once, where the weights are perturbed."""
    add_ = Perturbation.add_

    def add_with_mistake(self, grads, rho):
        mistake(self.params, grads)
        add_(self, grads, rho)

    monkeypatch.setattr(Perturbation, "add_", add_with_mistake)
    return fake_cuda.emulate().step


@pytest.mark.fakecuda
def test_a_read_of_a_value_is_seen(monkeypatch):
    seen = plant(monkeypatch, lambda params, grads: float(grads[0].sum()))
    with pytest.raises(AssertionError, match=r"sam/perturbation\.py:\d+ perturbed: _local_scalar_dense reads a value"):
        check_waits(seen, place="sam/step.py", what="tolist")


@pytest.mark.fakecuda
def test_a_tensor_of_the_cpu_is_seen(monkeypatch):
    seen = plant(monkeypatch, lambda params, grads: grads[0] + torch.zeros(grads[0].shape))
    with pytest.raises(AssertionError, match=r"sam/perturbation\.py:\d+ perturbed: add of .* on cuda, .* on cpu"):
        check_devices(seen)


@pytest.mark.fakecuda
def test_a_list_of_other_strides_is_seen(monkeypatch):
    seen = plant(monkeypatch, lambda params, grads: torch._foreach_mul(grads, [g.contiguous() for g in grads]))
    with pytest.raises(AssertionError, match=r"perturbed: _foreach_mul of 49 tensors: strides"):
        check_fused(seen)


@pytest.mark.fakecuda
def test_an_operation_for_each_tensor_is_seen(monkeypatch):
    seen = plant(monkeypatch, lambda params, grads: [g.mul(2) for g in grads])
    with pytest.raises(AssertionError, match="'sam/perturbation': "):
        check_operations(seen, OPERATIONS["default"])


# ------------------------------------------------------------------------------------------------------- the emulation


class Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx, factor, constant, x, name):
        ctx.factor = factor
        return factor * x + constant

    @staticmethod
    def backward(ctx, grad):
        return None, None, ctx.factor * grad, None


@pytest.mark.parametrize("perturbed", ["all", "the last"])
def test_its_backward_pass_is_that_of_torch(monkeypatch, perturbed, small_net, batch):
    """Bit for bit, of `.grad` and of autograd.grad: what is used twice, what is added to a gradient, own functions."""
    images, labels = batch
    wanted = list(small_net.parameters())[0 if perturbed == "all" else -2 :]

    def gradients() -> list[torch.Tensor]:
        torch.manual_seed(0)
        small_net.zero_grad()
        for _ in range(2):
            logits = Scale.apply(2.0, torch.ones(3), small_net(images), "logits")
            F.cross_entropy(logits * logits.detach().exp() + logits, labels).backward()
        of_loss = torch.autograd.grad(F.cross_entropy(small_net(images), labels), wanted)
        return [*(w.grad.clone() for w in small_net.parameters()), *of_loss]

    expected = gradients()
    monkeypatch.setattr(torch.autograd, "_engine_run_backward", fake_cuda.run_backward)
    for mine, theirs in zip(gradients(), expected, strict=True):
        assert torch.equal(mine, theirs)


def _set_where(values):
    x, mask = torch.zeros(3, device=CUDA), torch.ones(3, dtype=torch.bool, device=CUDA)
    x[mask] = values


def test_a_shape_that_depends_on_values_ends_the_emulation():
    with pytest.raises(DynamicOutputShapeException, match="nonzero"), fake_cuda.fake_gpu(DeviceWatch()):
        torch.zeros(3, device=CUDA)[torch.ones(3, dtype=torch.bool, device=CUDA)]


LARGE, SMALL = STAGED, STAGED // 8  # numbers of int64, whose bytes are above the driver's limit, and at it


@pytest.mark.parametrize(
    ("waits", "copy"),
    [
        (0, lambda watch: watch.pin(torch.zeros(LARGE)).to(CUDA, non_blocking=True)),
        (0, lambda watch: torch.zeros(LARGE, pin_memory=True).to(CUDA, non_blocking=True)),
        (0, lambda watch: torch.zeros(LARGE).pin_memory()[1:].to(CUDA, non_blocking=True)),
        (0, lambda watch: torch.empty(LARGE, device=CUDA).copy_(torch.zeros(LARGE).pin_memory(), non_blocking=True)),
        (0, lambda watch: torch.zeros(SMALL, dtype=torch.int64).to(CUDA, non_blocking=True)),
        (1, lambda watch: torch.zeros(SMALL + 1, dtype=torch.int64).to(CUDA, non_blocking=True)),
        (1, lambda watch: watch.pin(torch.zeros(1)).to(CUDA)),
        (1, lambda watch: torch.tensor(1.0, device=CUDA)),
        (0, lambda watch: torch.full((), 1.0, device=CUDA)),
        (1, lambda watch: torch.zeros(1, device=CUDA).cpu()),
        (0, lambda watch: torch.zeros(1, device=CUDA).to("cpu", non_blocking=True)),
        (0, lambda watch: torch.zeros(1).pin_memory().copy_(torch.ones(1, device=CUDA), non_blocking=True)),
        (1, lambda watch: torch.zeros(1).copy_(torch.ones(1, device=CUDA), non_blocking=True)),
        (1, lambda watch: torch.zeros(1).pin_memory().copy_(torch.ones(1, device=CUDA))),
        (1, lambda watch: _set_where(torch.ones(3, device=CUDA))),
        (0, lambda watch: _set_where(1.0)),
        (1, lambda watch: bool(torch.zeros((), device=CUDA) > 0)),
        (0, lambda watch: float(torch.zeros(()))),
        (1, lambda watch: torch.cuda.current_stream().record_event().synchronize()),
        (0, lambda watch: torch.cuda.current_stream().wait_stream(torch.cuda.Stream())),
    ],
)
def test_what_waits_for_the_gpu(waits, copy):
    """As torch.cuda.set_sync_debug_mode warns, and large copies of pageable memory, for which the driver waits."""
    watch = DeviceWatch()
    with fake_cuda.fake_gpu(watch), watch.record() as seen:
        copy(watch)
    assert seen.waits.total() == waits, seen.waits


def _zeros(*shape, dtype=torch.float32, device="cpu", last=False):
    layout = torch.channels_last if last else torch.contiguous_format
    return torch.zeros(shape, dtype=dtype, device=device).contiguous(memory_format=layout)


@pytest.mark.parametrize(
    ("why", "name", "arguments"),
    [
        (None, "_foreach_add_", ([_zeros(2, 3), _zeros(4)], [_zeros(2, 3), _zeros(4)])),
        (None, "_foreach_mul_", ([_zeros(2, 3), _zeros(4)], _zeros())),
        (None, "_foreach_add_", ([_zeros(8, 1, 3, 3)], [_zeros(8, 1, 3, 3).as_strided((8, 1, 3, 3), (9, 1, 3, 1))])),
        (None, "_foreach_copy_", ([_zeros(4)], [_zeros(4, dtype=torch.float16)])),
        (None, "_foreach_norm", ([_zeros(4)], float("inf"))),
        ("strides of (2, 3, 4, 4)", "_foreach_add_", ([_zeros(2, 3, 4, 4)], [_zeros(2, 3, 4, 4, last=True)])),
        ("strides of (2,)", "_foreach_abs", ([_zeros(4)[::2]],)),
        ("device or dtype", "_foreach_add_", ([_zeros(4)], [_zeros(4, dtype=torch.float64)])),
        ("device or dtype", "_foreach_abs", ([_zeros(4), _zeros(4, dtype=torch.float64)],)),
        ("device or dtype", "_foreach_copy_", ([_zeros(4)], [_zeros(4, device="meta")])),
        ("dtype of the factor", "_foreach_mul_", ([_zeros(4)], _zeros(dtype=torch.float64))),
        ("no fused norm", "_foreach_norm", ([_zeros(4)], 4)),
    ],
)
def test_which_lists_are_computed_tensor_by_tensor(why, name, arguments):
    found = why_per_tensor(name, arguments)
    assert (found is None) if why is None else (why in found), found
