"""Passes that are recorded and replayed: when, with what inputs, and that they change nothing but the time.

On a CPU a stand-in replays a recorded function by calling it. It finds what is recorded, but not what CUDA refuses.
"""

import copy

import pytest
import torch

from samtune.errors import MachineError
from samtune.models.training import train_mode
from samtune.sam.cuda_graphs import GraphRunner
from tests.conftest import SmallNet
from tests.support.small_models import make_step, sgd


class CallingRecorder:
    """Records a function by calling it, and replays it by calling it again; the outputs stay in their place.

    A real recording computes nothing, so that what the function changes is put back after it; and a replay knows only
    what Python did while it was recorded, as whether the weights were perturbed.
    """

    def __init__(self, sam, state=(), error=None, wait=""):
        self.sam, self.state, self.error, self.wait = sam, list(state), error, wait
        self.runs = self.records = self.replays = 0

    def run(self, function):
        self.runs += 1
        return function(), self.wait

    def record(self, function):
        self.records += 1
        before = [t.clone() for t in self.state]
        generator = torch.get_rng_state()
        outputs = function()
        for t, value in zip(self.state, before, strict=True):
            t.detach().copy_(value)
        if self.error is not None:
            raise self.error
        torch.set_rng_state(generator)

        perturbed = self.sam.perturbed

        def replay():
            self.replays += 1
            self.sam.perturbed, now = perturbed, self.sam.perturbed
            results = function()
            self.sam.perturbed = now
            for own, output in zip(outputs, results, strict=True):
                if own is not None:
                    own.copy_(output)

        return replay, outputs


def graphed(step, **options):
    """The same step with passes that are replayed."""
    sam = step.sam
    recorder = CallingRecorder(sam, [*sam.model.buffers(), step._at_w], **options)
    sam.runner = GraphRunner(
        sam.model, sam._params, sam.ranks, is_perturbed=lambda: sam.perturbed, recorder=recorder, required=False
    )
    return recorder


def train(step, batch, steps=6):
    """Losses, errors and weights after steps whose batches differ, with dropout."""
    torch.manual_seed(1)
    images, labels = batch
    results = [step(images.roll(i, 0), labels.roll(i, 0)) for i in range(steps)]
    return results, {name: value.clone() for name, value in step.sam.model.state_dict().items()}


SETTINGS = {
    "SAM": {},
    "rho 0": {"rho": 0.0},
    "pieces": {"m": 3},
    "micro-batches": {"micro_batch": 3},
    "several ascent steps": {"ascent_steps": 3},
    "half of the batch": {"ascent_fraction": 0.5},
    "norm parameters": {"perturb": "norm"},
    "adaptive": {"adaptive": True},
    "random direction": {"ascent": "random"},
    "random direction, micro-batches": {"ascent": "random", "micro_batch": 3},
    "momentum": {"ascent": "momentum"},
    "previous gradient": {"ascent": "previous"},
    "previous gradient, micro-batches": {"ascent": "previous", "micro_batch": 3},
}


@pytest.mark.parametrize("freeze_bn", [True, False])
@pytest.mark.parametrize("name", SETTINGS)
def test_replayed_steps_are_eager_steps_bit_for_bit(name, freeze_bn, batch):
    """Dropout included: the masks of a replay are those that the generator gives now, in both passes."""
    torch.manual_seed(0)
    eager = SmallNet().double()
    train_mode(eager, freeze_bn=freeze_bn)
    replayed = copy.deepcopy(eager)
    expected = train(make_step(eager, sgd(eager), **SETTINGS[name]), batch)
    step = make_step(replayed, sgd(replayed), **SETTINGS[name])
    recorder = graphed(step)
    results, weights = train(step, batch)
    assert recorder.replays > recorder.records > 0
    assert step.sam.runner.mode == "CUDA graphs"
    assert results == expected[0]
    for key, value in expected[1].items():
        assert torch.equal(weights[key], value), key


def test_each_pass_is_called_twice_before_it_is_recorded(plain_net, batch):
    step = make_step(plain_net, sgd(plain_net))
    recorder = graphed(step)
    counts = []
    for _ in range(4):
        step(*batch)
        counts.append((recorder.runs, recorder.records, recorder.replays))
    assert counts == [(2, 0, 0), (4, 0, 0), (4, 2, 2), (4, 2, 4)]


def test_a_shape_that_is_seen_once_stays_eager(plain_net, batch):
    step = make_step(plain_net, sgd(plain_net))
    recorder = graphed(step)
    for _ in range(3):
        step(*batch)
    step(*(t[:3] for t in batch))
    step(*batch)
    assert (recorder.runs, recorder.records, recorder.replays) == (6, 2, 4)


def test_sam_and_the_plain_optimizer_have_recordings_of_their_own(plain_net, batch):
    """As with --sam-every 2. A pass of one must never be replayed for the other."""
    eager = copy.deepcopy(plain_net)
    steps = make_step(eager, sgd(eager)), make_step(plain_net, sgd(plain_net))
    recorder = graphed(steps[1])
    for i in range(8):
        for step in steps:
            step.sam.rho = 0.1 * (i % 2)
            step(*batch)
    assert recorder.records == 3
    for key, value in eager.state_dict().items():
        assert torch.equal(plain_net.state_dict()[key], value), key


def test_a_recording_reads_the_batch_that_it_is_given(plain_net, batch):
    """The tensors of the batch that was recorded are overwritten here, as a loader's buffers are."""
    step = make_step(plain_net, sgd(plain_net, lr=0.0))
    graphed(step)
    losses = []
    for i in range(5):
        images, labels = (t.roll(i, 0).clone() for t in batch)
        losses.append(step(images * (i + 1), labels).loss)
        images.fill_(torch.nan)
    fresh = make_step(copy.deepcopy(plain_net), sgd(plain_net, lr=0.0))
    assert losses == [fresh(batch[0].roll(i, 0) * (i + 1), batch[1].roll(i, 0)).loss for i in range(5)]


def test_a_loss_that_is_not_finite_at_w_is_seen_in_a_replay(plain_net, batch):
    step = make_step(plain_net, sgd(plain_net))
    graphed(step)
    for _ in range(3):
        assert step(*batch).applied
    before = {key: value.clone() for key, value in plain_net.state_dict().items()}
    assert not step(batch[0] * torch.nan, batch[1]).applied
    for key, value in before.items():
        assert torch.equal(plain_net.state_dict()[key], value), key
    assert step(*batch).applied


@pytest.mark.parametrize("error", ["CUDA out of memory", "operation not permitted when stream is capturing"])
def test_where_a_pass_cannot_be_recorded_it_stays_eager_and_says_why(error, plain_net, batch):
    eager = copy.deepcopy(plain_net)
    expected = train(make_step(eager, sgd(eager)), batch)
    step = make_step(plain_net, sgd(plain_net))
    recorder = graphed(step, error=RuntimeError(error))
    assert train(step, batch)[0] == expected[0]
    assert (recorder.records, recorder.replays) == (1, 0)
    assert error in step.sam.runner.mode
    assert ("no memory" in step.sam.runner.mode) == ("memory" in error)


def test_a_pass_that_waits_for_the_gpu_is_never_recorded(plain_net, batch):
    """CUDA would break the recording off, which leaves torch in disorder."""
    step = make_step(plain_net, sgd(plain_net))
    recorder = graphed(step, wait="model.py:7")
    train(step, batch)
    assert (recorder.records, recorder.replays) == (0, 0)
    assert step.sam.runner.mode == "eager (a pass waits for the GPU at model.py:7)"


@pytest.mark.parametrize("why", [{"error": RuntimeError("not permitted")}, {"wait": "model.py:7"}])
def test_where_it_must_be_recorded_it_raises(why, plain_net, batch):
    step = make_step(plain_net, sgd(plain_net))
    graphed(step, **why)
    step.sam.runner._required = True
    with pytest.raises(MachineError, match="cannot be recorded"):
        train(step, batch)


def test_the_loss_at_w_is_kept_from_later_replays(plain_net, batch):
    """Recordings share memory, and may be replayed in another order than that in which they were made."""
    step = make_step(plain_net, sgd(plain_net))
    graphed(step)
    for _ in range(3):
        step(*batch)
    loss = lambda *batch: torch.nn.functional.cross_entropy(plain_net(batch[0]), batch[1])  # noqa: E731
    for _ in range(3):
        value, _ = step.sam.runner.ascend(loss, batch)
    recordings = step.sam.runner._recordings.values()
    assert all(value.data_ptr() != recording.outputs[0].data_ptr() for recording in recordings)


def test_halving_the_batch_forgets_the_recordings(plain_net, batch):
    """Their memory is what is missing."""
    step = make_step(plain_net, sgd(plain_net))
    graphed(step)
    for _ in range(3):
        step(*batch)
    assert step.sam.runner._recordings
    room = 3

    def look(module, inputs, output):
        if len(output) > room:
            raise torch.OutOfMemoryError("CUDA out of memory")

    plain_net.register_forward_hook(look)
    step(*batch)
    assert step.sam.micro_batch <= room
    kept = [recording.inputs[0] for recording in step.sam.runner._recordings.values()]
    assert all(len(images) <= room for images in kept)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", SETTINGS)
def test_on_a_gpu_replayed_steps_are_eager_steps(name, batch):
    """The same dropout in both, so that weights differ by rounding alone."""
    torch.manual_seed(0)
    eager = SmallNet().cuda()
    train_mode(eager, freeze_bn=True)
    replayed = copy.deepcopy(eager)
    on_gpu = batch[0].float().cuda(), batch[1].cuda()
    expected = train(make_step(eager, sgd(eager), **SETTINGS[name]), on_gpu)
    step = make_step(replayed, sgd(replayed), **SETTINGS[name])
    step.sam.use_cuda_graphs(required=True)
    results, weights = train(step, on_gpu)
    assert step.sam.runner.mode == "CUDA graphs"
    assert [result.loss for result in results] == pytest.approx([result.loss for result in expected[0]], rel=1e-4)
    for key, value in expected[1].items():
        torch.testing.assert_close(weights[key], value, rtol=1e-3, atol=1e-5, msg=key)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_a_model_that_reads_a_value_stays_eager(batch):
    """Also the memory in use stays, and dropout goes on."""
    model = SmallNet().cuda()
    train_mode(model, freeze_bn=True)
    model.fc.register_forward_hook(lambda module, inputs, output: output * (1 + 0 * output.sum().item()))
    step = make_step(model, sgd(model))
    step.sam.use_cuda_graphs()
    used = []
    for _ in range(8):
        step(batch[0].float().cuda(), batch[1].cuda())
        used.append(torch.cuda.memory_allocated())
    assert "waits for the GPU" in step.sam.runner.mode
    assert used[4] == used[-1]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_both_replays_of_a_step_draw_the_same_masks(batch):
    """The masks are kept in a buffer by an operation that is recorded, too."""
    torch.manual_seed(0)
    model = SmallNet().cuda()
    train_mode(model, freeze_bn=True)
    images, labels = batch[0].float().cuda(), batch[1].cuda()
    with torch.no_grad():
        masks = [torch.zeros_like(model.drop(torch.ones(len(images), model.fc.in_features, device="cuda")))] * 2
        masks = [mask.clone() for mask in masks]
    step = make_step(model, sgd(model, lr=0.0))
    model.drop.register_forward_hook(
        lambda module, inputs, output: masks[step.sam.perturbed].copy_((output != 0) | (inputs[0] == 0))
    )
    step.sam.use_cuda_graphs(required=True)
    seen = []
    for _ in range(5):
        step(images, labels)
        assert torch.equal(masks[0], masks[1])
        seen.append(masks[0].clone())
    assert not torch.equal(seen[3], seen[4])  # and other ones in every step
