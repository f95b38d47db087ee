"""Micro-batches bound memory and change no update; what happens when memory runs out in a step or an evaluation."""

import copy
import gc
import math
import subprocess
import sys
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from samtune import SAM
from samtune.config import loading
from samtune.data import source
from samtune.data.cache import Images
from samtune.distributed import device
from samtune.errors import MachineError, OutOfMemory, first_line
from samtune.models.training import train_mode
from samtune.train.evaluation import evaluate
from tests.conftest import ROOT, SmallNet, write_image_folder
from tests.support.fault_matrix import row
from tests.support.small_models import assert_same, cross_entropy_of, gradient, make_step, sgd, state

# -------------------------------------------------------------------------------------------------------- micro-batches


VARIANTS = {
    "device": {},
    "pieces": {"m": 5},
    "global": {"m": "global"},
    "ascent steps": {"ascent_steps": 2},
    "ascent fraction": {"ascent_fraction": 0.5},
    "all of it in pieces": {"m": 5, "ascent_steps": 2, "ascent_fraction": 0.7},
    "plain": {"rho": 0.0},
    "plain pieces": {"rho": 0.0, "m": 5},
    "adaptive": {"adaptive": True},
    "largest gradient alone": {"p": 1.0},
    "norm": {"perturb": "norm"},
}


@pytest.mark.parametrize("micro_batch", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("variant", VARIANTS)
def test_micro_batches_give_the_gradient_of_all_samples_at_once(plain_net, batch, variant, micro_batch):
    options, seen = VARIANTS[variant], []
    whole = gradient(plain_net, cross_entropy_of(plain_net), *batch, **options)
    plain_net.register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    split = gradient(plain_net, cross_entropy_of(plain_net), *batch, micro_batch=micro_batch, **options)
    assert max(seen) == min(micro_batch, options.get("m", 8) if isinstance(options.get("m"), int) else 8)
    torch.testing.assert_close(split, whole, rtol=1e-12, atol=1e-14)


def test_micro_batches_are_not_pieces_with_perturbations_of_their_own(plain_net, batch):
    loss = cross_entropy_of(plain_net)
    pieces = gradient(plain_net, loss, *batch, m=3)
    assert not torch.allclose(gradient(plain_net, loss, *batch, micro_batch=3), pieces, rtol=1e-4)


@pytest.mark.parametrize("options", [{"micro_batch": 8}, {"micro_batch": 100}, {"m": 5, "micro_batch": 5}])
@pytest.mark.parametrize("rho", [0.0, 0.1])
def test_a_micro_batch_with_room_for_all_changes_no_bit(small_net, batch, options, rho):
    def end(model, **given):
        step = make_step(model, sgd(model), rho=rho, m=options.get("m", "device"), **given)
        torch.manual_seed(0)
        return [step(*batch) for _ in range(3)], state(model)

    plain, given = end(copy.deepcopy(small_net)), end(small_net, micro_batch=options["micro_batch"])
    assert plain[0] == given[0]
    assert_same(plain[1], given[1])


@pytest.mark.parametrize("micro_batch", [3, 1])
def test_loss_and_error_of_a_step_are_those_of_all_samples(plain_net, batch, micro_batch):
    whole = make_step(copy.deepcopy(plain_net), sgd(plain_net))(*batch)
    split = make_step(plain_net, sgd(plain_net), micro_batch=micro_batch)(*batch)
    assert split.loss == pytest.approx(whole.loss, rel=1e-12)
    assert split.grad_norm == pytest.approx(whole.grad_norm, rel=1e-12)
    assert (split.wrong, split.n, split.passes) == (whole.wrong, whole.n, whole.passes)


def test_the_loss_at_w_is_the_mean_over_the_micro_batches(plain_net, batch):
    with torch.no_grad():
        expected = F.cross_entropy(plain_net(batch[0]), batch[1])
    found = SAM(plain_net, 0.5, micro_batch=3).backward(cross_entropy_of(plain_net), *batch)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("options", [{}, {"m": 5}, {"ascent_steps": 3}])
def test_each_micro_batch_has_the_same_masks_in_all_passes(small_net, batch, options):
    seen = []
    small_net.drop.p = 0.5
    small_net.drop.register_forward_hook(lambda module, inputs, output: seen.append(output != 0))
    small_net.drop.register_forward_pre_hook(lambda module, inputs: (torch.ones_like(inputs[0]),))
    torch.manual_seed(0)
    SAM(small_net, 0.1, micro_batch=2, **options).backward(lambda x, y: small_net(x).sum() * 1.0, *batch)
    pieces = [[2, 2, 1], [2, 1]] if "m" in options else [[2, 2, 2, 2]]
    for sizes in pieces:
        passes = [[seen.pop(0) for _ in sizes] for _ in range(1 + options.get("ascent_steps", 1))]
        assert [len(mask) for mask in passes[0]] == sizes
        for masks in passes[1:]:
            assert all(torch.equal(a, b) for a, b in zip(masks, passes[0], strict=True))
        assert not torch.equal(passes[0][0][:1], passes[0][1][:1])
    assert not seen


def by_hand(model, images, labels, rho, sizes):
    """The gradient with dropout: micro-batches one after the other, the generator set back in between."""
    micro_batches = list(zip(images.split(sizes), labels.split(sizes), strict=True))
    params = list(model.parameters())
    before, generator = [w.detach().clone() for w in params], torch.get_rng_state()

    def mean_gradient():
        torch.set_rng_state(generator)
        total = sum(F.cross_entropy(model(x), y, reduction="sum") for x, y in micro_batches)
        return torch.autograd.grad(total / len(images), params)

    g1 = mean_gradient()
    norm = math.sqrt(sum(float(g.square().sum()) for g in g1))
    with torch.no_grad():
        for w, g in zip(params, g1, strict=True):
            w.add_(rho * g / norm)
    g2 = mean_gradient()
    with torch.no_grad():
        for w, b in zip(params, before, strict=True):
            w.copy_(b)
    return torch.cat([g.reshape(-1) for g in g2])


def test_with_dropout_the_gradient_is_the_one_worked_by_hand(small_net, batch):
    train_mode(small_net, freeze_bn=True)
    torch.manual_seed(5)
    expected = by_hand(small_net, *batch, 0.1, [3, 3, 2])
    end = torch.get_rng_state()
    torch.manual_seed(5)
    found = gradient(small_net, cross_entropy_of(small_net), *batch, micro_batch=3)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    assert torch.equal(torch.get_rng_state(), end)


def test_statistics_are_those_after_one_plain_forward_of_each_micro_batch(small_net, batch):
    plain = copy.deepcopy(small_net)
    make_step(small_net, sgd(small_net), micro_batch=3)(*batch)
    for images in batch[0].split(3):
        plain(images)
    for name, buffer in plain.named_buffers():
        assert torch.equal(small_net.get_buffer(name), buffer), name


@pytest.mark.parametrize("bad", [0, 1, 2])
@pytest.mark.parametrize("rho", [0.0, 0.1])
def test_one_micro_batch_whose_loss_is_not_finite_makes_the_whole_gradient_nan(plain_net, batch, bad, rho):
    calls = []

    def loss(images, labels):
        calls.append(1)
        return F.cross_entropy(plain_net(images), labels) + (math.inf if len(calls) - 1 == bad else 0.0)

    found = gradient(plain_net, loss, *batch, rho=rho, micro_batch=3)
    assert found.isnan().all()


@pytest.mark.parametrize("rho", [0.0, 0.1])
def test_of_all_micro_batches_one_graph_is_alive_at_a_time(small_net, batch, rho):
    gc.collect()
    before, alive = graphs(), []
    small_net.register_forward_pre_hook(lambda *_: alive.append(graphs() - before))
    make_step(small_net, sgd(small_net), rho=rho, micro_batch=2, ascent_steps=2)(*batch)
    assert alive == [0] * (12 if rho else 4)


def graphs():
    """Tensors that hold on to what made them."""
    return sum(issubclass(type(o), torch.Tensor) and o.grad_fn is not None for o in gc.get_objects())


def test_a_micro_batch_may_be_set_between_steps_and_must_be_a_number_of_samples(small_net):
    sam = SAM(small_net, 0.1)
    assert sam.micro_batch is None
    sam.micro_batch = 2
    assert sam.micro_batch == 2
    with pytest.raises(ValueError, match="micro_batch 0"):
        sam.micro_batch = 0
    assert sam.micro_batch == 2


# -------------------------------------------------------------------------------------------- memory runs out in a step

ERRORS = {
    "GPU": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "Python": MemoryError(),
    "CPU": RuntimeError(
        "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
        "allocate 8000000 bytes. Error code 12 (Cannot allocate memory)"
    ),
    "CUDA": torch.AcceleratorError("CUDA error: out of memory"),
    "cuDNN": RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    "cuBLAS": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    "CPU of Windows": RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8000000 bytes."),
}
# What says only that something cannot be, perhaps for lack of memory.
VAGUE = {
    "engine": RuntimeError("GET was unable to find an engine to execute this computation"),
    "handle": RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
}
OTHERS = {
    "shapes": RuntimeError("mat1 and mat2 shapes cannot be multiplied (8x4 and 5x3)"),
    "allocator": RuntimeError("DefaultCPUAllocator: something else"),
    "value": ValueError("DefaultCPUAllocator: can't allocate memory"),
    "device": torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
}


def again(error):
    """An error of its own: one that is raised holds the frames that it came through, as long as it is there."""
    return copy.copy(error)


@pytest.mark.parametrize("kind", [*ERRORS, *VAGUE, *OTHERS])
def test_what_is_out_of_memory_is_told_from_other_errors(kind):
    error = (ERRORS | VAGUE | OTHERS)[kind]
    assert device.is_out_of_memory(error) == (kind in ERRORS)
    assert device.may_be_out_of_memory(error) == (kind not in OTHERS)
    with pytest.raises(OutOfMemory if kind in ERRORS else type(error)), device.oom_as_user_error("it"):
        raise again(error)


@pytest.mark.parametrize("kind", [*ERRORS, *VAGUE])
def test_a_library_that_cannot_compute_a_batch_gets_half_of_it(kind):
    tried = []

    def attempt(images):
        tried.append(images)
        if images > 3:
            raise again((ERRORS | VAGUE)[kind])
        return images

    assert device.retry_with_smaller_batch(attempt, 16, (3, 8, 8)) == 2
    assert tried == [16, 8, 4, 2]


@pytest.mark.parametrize("kind", [*ERRORS, *VAGUE])
def test_one_image_that_cannot_be_computed_ends_with_the_librarys_own_text(kind):
    error = (ERRORS | VAGUE)[kind]

    def attempt(images):
        raise again(error)

    with pytest.raises(OutOfMemory if kind in ERRORS else MachineError) as caught:
        device.retry_with_smaller_batch(attempt, 2, (3, 8, 8))
    assert caught.value.cause == first_line(error)


def test_what_the_cpu_allocator_raises_is_out_of_memory():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert device.is_out_of_memory(caught.value)


class Memory:
    """Room for so many images at once in a model's forward or backward pass, in a pass of SAM or in all."""

    def __init__(self, model, room, place="forward", only=None, error=ERRORS["GPU"]):
        self.room, self.place, self.only, self.error = room, place, only, error
        self.sam = None
        self.failures = 0
        model.register_forward_hook(self.look)

    def look(self, module, inputs, output):
        passing = {None: "evaluation", False: "first", True: "second"}[self.sam and self.sam.perturbed]
        if len(output) <= self.room or self.only not in (None, passing):
            return
        if self.place == "forward":
            self.fail()
        output.register_hook(self.fail)

    def fail(self, _=None):
        self.failures += 1
        raise again(self.error)


def steps(model, memory=None, *, freeze_bn, count=3, micro_batch=None, **options):
    """So many steps on batches of their own; their results and what they left."""
    train_mode(model, freeze_bn=freeze_bn)
    optimizer = sgd(model)
    step = make_step(model, optimizer, micro_batch=micro_batch, **options)
    if memory is not None:
        memory.sam = step.sam
    torch.manual_seed(7)
    generator = torch.Generator().manual_seed(1)
    results = []
    for _ in range(count):
        images = torch.randn(8, 3, 6, 6, generator=generator, dtype=torch.float64)
        results.append(step(images, torch.arange(8) % 3))
    momentum = {str(key): value["momentum_buffer"] for key, value in optimizer.state_dict()["state"].items()}
    return step.sam.micro_batch, results, state(model), momentum, {"generator": torch.get_rng_state()}


def assert_same_end(a, b):
    assert a[:2] == b[:2]
    for one, other in zip(a[2:], b[2:], strict=True):
        assert_same(one, other)


@row(11)
@pytest.mark.parametrize("freeze_bn", [True, False])
@pytest.mark.parametrize(
    ("place", "only", "error"),
    [
        ("forward", "first", "GPU"),
        ("forward", "second", "GPU"),
        ("backward", "first", "GPU"),
        ("backward", "second", "GPU"),
        ("forward", "first", "Python"),
        ("backward", "second", "CPU"),
    ],
)
def test_out_of_memory_in_a_pass_leaves_the_run_of_the_smaller_micro_batch(small_net, place, only, error, freeze_bn):
    """Bit for bit: weights, statistics, momentum, dropout, and the steps' results."""
    expected = steps(copy.deepcopy(small_net), freeze_bn=freeze_bn, micro_batch=2)
    memory = Memory(small_net, 3, place, only, ERRORS[error])
    assert_same_end(steps(small_net, memory, freeze_bn=freeze_bn), expected)
    assert memory.failures == 2  # 8 and 4 of the first step


@row(11)
@pytest.mark.parametrize("freeze_bn", [True, False])
@pytest.mark.parametrize("forward", range(4))
def test_what_was_done_before_memory_ran_out_is_undone(small_net, freeze_bn, forward):
    """The first or second of two micro-batches, in pass 1 or 2: sums, statistics and gradients are half made."""
    expected = steps(copy.deepcopy(small_net), freeze_bn=freeze_bn, micro_batch=2)
    calls = []

    def fail(*_):
        calls.append(1)
        if len(calls) - 1 == forward:
            raise again(ERRORS["GPU"])

    small_net.register_forward_hook(fail)
    assert_same_end(steps(small_net, freeze_bn=freeze_bn, micro_batch=4), expected)
    assert len(calls) == forward + 1 + 3 * 8


@row(11)
@pytest.mark.parametrize(
    ("options", "found", "failures"),
    [
        ({"m": 5}, 3, 1),
        ({"m": 3}, None, 0),
        ({"rho": 0.0}, 2, 2),
        ({"ascent_steps": 3}, 2, 2),
        ({"micro_batch": 7}, 2, 2),
        ({"micro_batch": 5}, 3, 1),
        ({"micro_batch": 100}, 2, 2),
    ],
)
def test_half_of_what_passed_at_once_is_tried_next(small_net, options, found, failures):
    given = options | {"micro_batch": found}
    expected = steps(copy.deepcopy(small_net), freeze_bn=False, **given)
    memory = Memory(small_net, 3)
    ended = steps(small_net, memory, freeze_bn=False, **options)
    assert ended[0] == found
    assert_same_end(ended, expected)
    assert memory.failures == failures


@row(11)
def test_a_last_batch_that_is_smaller_and_fits_changes_no_micro_batch(small_net, batch):
    step = make_step(small_net, sgd(small_net), micro_batch=4)
    Memory(small_net, 4).sam = step.sam
    step(batch[0][:2], batch[1][:2])
    assert step.sam.micro_batch == 4


@row(11)
@pytest.mark.parametrize("only", ["first", "second"])
def test_where_one_image_does_not_fit_nothing_is_updated_and_the_error_says_so(small_net, batch, only):
    optimizer = sgd(small_net)
    step = make_step(small_net, optimizer)
    step(*batch)
    before, kept, generator = state(small_net), copy.deepcopy(optimizer.state_dict()), torch.get_rng_state()
    places = [w.data_ptr() for w in small_net.parameters()]
    memory = Memory(small_net, 0, "backward", only)
    memory.sam = step.sam
    with pytest.raises(OutOfMemory, match="one image of 3 x 6 x 6") as caught:
        step(*batch)
    assert memory.failures == 4  # 8, 4, 2 and 1
    assert caught.value.exit_code == 6
    assert "2.00 GiB" in caught.value.cause
    assert "--img-size" in caught.value.hint
    assert_same(state(small_net), before)
    assert places == [w.data_ptr() for w in small_net.parameters()]
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(w.grad is None for w in small_net.parameters())
    for key, value in optimizer.state_dict()["state"].items():
        assert torch.equal(value["momentum_buffer"], kept["state"][key]["momentum_buffer"])


@row(11)
@pytest.mark.parametrize("place", ["forward", "backward"])
@pytest.mark.parametrize("only", ["first", "second"])
def test_when_a_step_begins_again_nothing_of_the_failed_attempt_is_alive(small_net, batch, place, only):
    step = make_step(small_net, sgd(small_net))
    memory = Memory(small_net, 7, place, only)
    memory.sam = step.sam
    gc.collect()
    before, alive = graphs(), []

    def look(*_):
        if memory.failures and not alive:
            alive.append((graphs() - before, [w.grad for w in small_net.parameters() if w.grad is not None]))

    small_net.register_forward_pre_hook(look)
    step(*batch)
    assert alive == [(0, [])]


@row(11)
def test_an_error_that_its_own_frame_holds_holds_no_memory_when_a_step_begins_again(small_net, batch):
    """It is a cycle, which Python frees when it likes."""
    held, alive = [], []

    def fail(module, inputs, output):
        if len(output) == 8:
            error = again(ERRORS["GPU"])
            held.append(weakref.ref(output))
            raise error
        alive.append(held[0]() is not None)

    small_net.register_forward_hook(fail)
    gc.disable()
    try:
        make_step(small_net, sgd(small_net))(*batch)
    finally:
        gc.enable()
    assert alive == [False] * 4


@row(11)
@pytest.mark.parametrize("kind", OTHERS)
def test_other_errors_of_a_step_are_not_tried_again(small_net, batch, kind):
    step = make_step(small_net, sgd(small_net))
    memory = Memory(small_net, 3, error=OTHERS[kind])
    memory.sam = step.sam
    with pytest.raises(type(OTHERS[kind])):
        step(*batch)
    assert memory.failures == 1
    assert step.sam.micro_batch is None


REAL = """
import resource
import torch
from torch.nn.functional import dropout, mse_loss
from tests.support.small_models import make_step, sgd

class Wide(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.ones(250_000))

    def forward(self, x):
        for _ in range(4):
            x = torch.tanh(x * self.w)  # 1 MB for an image
        return dropout(x.mean(1, keepdim=True))

def end(micro_batch):
    torch.manual_seed(0)
    model = Wide()
    step = make_step(model, sgd(model), loss=mse_loss, micro_batch=micro_batch)
    step(torch.arange(64.0).reshape(64, 1) / 64, torch.ones(64, 1))
    return step.sam.micro_batch, model.w.detach()

end(2)  # whatever is loaded late, is loaded now
hard = resource.getrlimit(resource.RLIMIT_AS)[1]
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 150_000_000, hard))  # less than 64 images take
micro_batch, w = end(None)
assert micro_batch is not None and 1 < micro_batch < 64, micro_batch
assert torch.equal(end(micro_batch)[1], w)
print("done")
"""


@row(11)
@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space as Linux does")
def test_a_process_that_may_have_no_more_memory_goes_on_with_what_it_has():
    done = subprocess.run(
        [sys.executable, "-c", REAL], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.stdout == "done\n", done.stderr


@pytest.mark.gpu
@row(11)
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_that_has_no_more_memory_goes_on_with_what_it_has():
    def end(micro_batch, images):
        torch.manual_seed(0)
        model = SmallNet().cuda()
        step = make_step(model, sgd(model), micro_batch=micro_batch)
        step(images, torch.arange(len(images)).cuda() % 3)
        return step.sam.micro_batch, state(model)

    images = torch.randn(64, 3, 512, 512, generator=torch.Generator().manual_seed(0)).cuda()
    end(1, images[:1])
    room = (torch.cuda.memory_allocated() + 500 * 2**20) / torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(room)
    try:
        micro_batch, ended = end(None, images)
        assert micro_batch is not None
        assert 1 < micro_batch < 64
        expected = end(micro_batch, images)[1]
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    for name, value in ended.items():  # atomic additions come in any order
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------- memory runs out in an evaluation

SIZE = {"input_size": (3, 16, 16), "interpolation": "bicubic", "crop_pct": 0.9, "crop_mode": "center"}
DATA_CONFIG = SIZE | {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)}


@pytest.fixture
def score(tmp_path):
    """Scores 14 images, by default 8 at once."""
    split = source.open_source(str(write_image_folder(tmp_path, {"train": 7}))).splits["train"]
    settings = {"model": "any", "dataset": "any", "batch_size": 4, "amp_dtype": "float32"}

    def score(model, batch_size=None, workers=0, progress=lambda *_: None):
        given = loading.load(None, settings | {"workers": workers})
        return evaluate(model, Images(split), np.arange(14), "train", given, DATA_CONFIG, progress, batch_size)

    return score


@pytest.fixture
def net():
    torch.manual_seed(0)
    return SmallNet(classes=2)


@row(11)
@pytest.mark.parametrize(("workers", "error"), [(0, "GPU"), (2, "CPU")])
def test_an_evaluation_that_runs_out_of_memory_begins_again_with_half_and_scores_every_image_once(
    net, score, error, workers
):
    whole = score(net, workers=workers)
    assert whole.batch_size == 8
    calls = []
    memory = Memory(net, 3, error=ERRORS[error])
    scored = score(net, workers=workers, progress=lambda *call: calls.append(call))
    assert (memory.failures, scored.batch_size) == (2, 2)
    assert calls == [("train", done, 14) for done in range(2, 15, 2)]
    for name in ("rows", "labels", "predictions", "in_top5"):
        np.testing.assert_array_equal(getattr(scored, name), getattr(whole, name))
    np.testing.assert_allclose(scored.nats, whole.nats, rtol=1e-5)
    np.testing.assert_allclose(scored.probability, whole.probability, rtol=1e-5)


@row(11)
def test_what_was_scored_before_memory_ran_out_is_scored_anew_but_not_twice(net, score):
    """At the second batch."""
    batches = []

    def fail(*_):
        batches.append(1)
        if len(batches) == 2:
            raise again(ERRORS["GPU"])

    net.register_forward_hook(fail)
    scored = score(net)
    assert len(batches) == 2 + 4
    assert len(scored.labels) == len(scored.nats) == 14


@row(11)
def test_the_size_that_fitted_serves_the_next_evaluation(net, score):
    memory = Memory(net, 3)
    first = score(net)
    memory.failures = 0
    again = score(net, batch_size=first.batch_size)
    assert memory.failures == 0
    np.testing.assert_array_equal(again.nats, first.nats)


@row(11)
def test_an_evaluation_without_room_for_one_image_says_so(net, score):
    Memory(net, 0)
    with pytest.raises(OutOfMemory, match="one image of 3 x 16 x 16"):
        score(net)


@row(11)
def test_when_an_evaluation_begins_again_no_output_of_the_failed_attempt_is_alive(net, score):
    outputs, alive = [], []
    memory = Memory(net, 7)
    net.conv.register_forward_hook(lambda module, inputs, output: outputs.append(weakref.ref(output)))
    net.register_forward_pre_hook(lambda *_: alive.append(sum(output() is not None for output in outputs)))
    score(net)
    assert memory.failures == 1
    assert alive == [0] * 5
