"""Ascents of one pass: along the optimizer's momentum, and along the gradient of the previous step."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from samtune import SAM
from samtune.models.training import train_mode
from tests.conftest import SmallNet
from tests.support.small_models import assert_same, cross_entropy_of, make_step, record_weights, sgd, state

ASCENTS = ("momentum", "previous")


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)


OPTIMIZERS = {"sgd": lambda model: sgd(model, weight_decay=1e-2), "adamw": adamw}


def one_pass(model, ascent, optimizer=None, **options):
    """A step of this ascent, and its optimizer."""
    optimizer = optimizer or sgd(model)
    return make_step(model, optimizer, ascent=ascent, **options), optimizer


class Naive:
    """Steps written out: torch's SGD with Nesterov momentum, or AdamW, at a gradient that is taken at w + e.

    e is made of d, which points uphill or not: -b for the momentum b of the optimizer, g for the last gradient.
    """

    def __init__(self, model, kind, ascent, rho=0.1):
        self.model, self.kind, self.ascent, self.rho, self.t = model, kind, ascent, rho, 0
        self.w = dict(model.named_parameters())
        self.b, self.v, self.g = {}, {}, {}

    @torch.no_grad()
    def step(self, images, labels):
        at_rest = {name: w.clone() for name, w in self.w.items()}
        d = {name: -b for name, b in self.b.items()} if self.ascent == "momentum" else self.g
        if d:
            norm = math.sqrt(sum(x.square().sum().item() for x in d.values()))
            for name, w in self.w.items():
                w += self.rho * d[name] / norm
        with torch.enable_grad():
            loss = F.cross_entropy(self.model(images), labels)
            self.g = dict(zip(self.w, torch.autograd.grad(loss, list(self.w.values())), strict=True))
        self.t += 1
        for name, w in self.w.items():
            w.copy_(at_rest[name])
            self._sgd(name, w) if self.kind == "sgd" else self._adamw(name, w)
        return loss.item()

    def _sgd(self, name, w, lr=0.1, momentum=0.9, decay=1e-2):
        g = self.g[name] + decay * w
        self.b[name] = momentum * self.b[name] + g if name in self.b else g
        w -= lr * (g + momentum * self.b[name])

    def _adamw(self, name, w, lr=1e-2, decay=0.1, betas=(0.9, 0.999)):
        g = self.g[name]
        self.b[name] = betas[0] * self.b.get(name, 0) + (1 - betas[0]) * g
        self.v[name] = betas[1] * self.v.get(name, 0) + (1 - betas[1]) * g * g
        m, v = self.b[name] / (1 - betas[0] ** self.t), self.v[name] / (1 - betas[1] ** self.t)
        w -= lr * decay * w + lr * m / (v.sqrt() + 1e-8)


@pytest.mark.parametrize("freeze_bn", [True, False])
@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("ascent", ASCENTS)
def test_thirty_steps_equal_a_naive_loop(ascent, kind, freeze_bn, small_net, batch):
    """Dropout and batch norm included; the loss that is reported is the one at w + e."""
    train_mode(small_net, freeze_bn=freeze_bn)
    reference = copy.deepcopy(small_net)
    step, naive = one_pass(small_net, ascent, OPTIMIZERS[kind](small_net))[0], Naive(reference, kind, ascent)
    for i in range(30):
        images, labels = batch[0].roll(i, 0) * (1 + i / 30), batch[1].roll(i, 0)
        torch.manual_seed(i)
        result = step(images, labels)
        torch.manual_seed(i)
        assert result.loss == pytest.approx(naive.step(images, labels), rel=1e-9)
        assert (result.passes, result.n) == (1, len(images))
    for name, value in reference.state_dict().items():
        torch.testing.assert_close(small_net.state_dict()[name], value, rtol=1e-10, atol=1e-11, msg=name)


def test_momentum_is_the_algorithm_of_the_paper_which_keeps_the_shifted_weights(plain_net, batch):
    """Algorithm 1 of Becker et al. 2024, with their v, and the shift removed at the end."""
    train_mode(plain_net, freeze_bn=True)
    shifted, rho, mu, eta = copy.deepcopy(plain_net), 0.3, 0.9, 0.1
    step, _ = one_pass(plain_net, "momentum", sgd(plain_net, lr=eta, momentum=mu, nesterov=False), rho=rho)
    params = list(shifted.parameters())
    v = [torch.zeros_like(w) for w in params]

    def shift():
        norm = torch.cat([x.reshape(-1) for x in v]).norm()
        return [rho * x / norm if norm > 0 else x for x in v]

    for _ in range(20):
        step(*batch)
        g = torch.autograd.grad(F.cross_entropy(shifted(batch[0]), batch[1]), params)
        with torch.no_grad():
            w = [x + y for x, y in zip(params, shift(), strict=True)]  # remove the last perturbation
            v = [mu * x + y for x, y in zip(v, g, strict=True)]
            w = [x - eta * y for x, y in zip(w, v, strict=True)]
            for x, new, moved in zip(params, w, shift(), strict=True):
                x.copy_(new - moved)
    with torch.no_grad():
        torch._foreach_add_(params, shift())
    for ours, theirs in zip(plain_net.parameters(), params, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"p": 1.0},
        {"p": 4.0},
        {"p": math.inf},
        {"adaptive": True, "eta": 0.3},
        {"rho_factors": {"^fc": 2.0, "^b": 0}},
    ],
)
@pytest.mark.parametrize("ascent", ASCENTS)
def test_the_perturbation_is_the_plain_one_of_what_the_optimizer_knows(ascent, options, small_net, batch):
    step, optimizer = one_pass(small_net, ascent, **options)
    step(*batch)
    step(*batch)
    ball = copy.deepcopy(step.sam._perturbation)
    known = [optimizer.state[w] for w in small_net.parameters()]
    direction = [-s["momentum_buffer"] if ascent == "momentum" else s["previous_gradient"] for s in known]
    expected = ball.plain(direction, 0.1)
    at_rest, seen = [w.detach().clone() for w in small_net.parameters()], record_weights(small_net)
    step.sam.backward(cross_entropy_of(small_net), *batch)
    (moved,) = seen
    for w, e, at in zip(at_rest, expected, moved.values(), strict=True):
        torch.testing.assert_close(at, w + e, rtol=1e-13, atol=1e-15)
    assert all(torch.equal(w, at) for w, at in zip(small_net.parameters(), at_rest, strict=True))


@pytest.mark.parametrize("ascent", ASCENTS)
def test_a_filter_leaves_the_other_weights_where_they_are(ascent, small_net, batch):
    step, _ = one_pass(small_net, ascent, perturb="norm")
    step(*batch)
    before, seen = state(small_net), record_weights(small_net)
    step(*batch)
    assert {name for name, w in seen[0].items() if not torch.equal(w, before[name])} == {"bn.weight", "bn.bias"}


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("ascent", ASCENTS)
def test_the_first_step_and_all_with_rho_0_are_the_base_optimizer_bit_for_bit(ascent, kind, small_net, batch):
    plain = copy.deepcopy(small_net)
    step, optimizer = one_pass(small_net, ascent, OPTIMIZERS[kind](small_net))
    base = OPTIMIZERS[kind](plain)
    for i in range(5):
        torch.manual_seed(i)
        step(*batch)
        torch.manual_seed(i)
        base.zero_grad()
        F.cross_entropy(plain(batch[0]), batch[1]).backward()
        base.step()
        assert_same(state(small_net), state(plain))
        step.sam.rho = 0.0
    for w, v in zip(small_net.parameters(), plain.parameters(), strict=True):
        for key, value in base.state[v].items():
            assert torch.equal(optimizer.state[w][key], value)


@pytest.mark.parametrize("ascent", ASCENTS)
def test_a_momentum_or_gradient_of_zero_moves_nothing(ascent, small_net, batch):
    step, optimizer = one_pass(small_net, ascent)
    step(*batch)
    for values in optimizer.state.values():
        for value in values.values():
            value.zero_()
    before, seen = state(small_net), record_weights(small_net)
    step(*batch)
    assert all(torch.equal(w, before[name]) for name, w in seen[0].items())


@pytest.mark.parametrize("micro_batch", [None, 3])
@pytest.mark.parametrize("ascent", ASCENTS)
def test_the_model_is_called_once_and_statistics_are_those_of_one_pass(ascent, micro_batch, small_net, batch):
    step, _ = one_pass(small_net, ascent, micro_batch=micro_batch)
    step(*batch)
    count, seen = small_net.bn.num_batches_tracked.item(), record_weights(small_net)
    step(*batch)
    pieces = 1 if micro_batch is None else math.ceil(len(batch[0]) / micro_batch)
    assert len(seen) == small_net.bn.num_batches_tracked - count == pieces
    assert all(torch.equal(w, seen[0][name]) for piece in seen for name, w in piece.items())  # one w + e for all


@pytest.mark.parametrize("ascent", ASCENTS)
def test_micro_batches_and_calls_that_accumulate_share_the_perturbation(ascent, plain_net, batch):
    train_mode(plain_net, freeze_bn=True)
    models = [plain_net, copy.deepcopy(plain_net), copy.deepcopy(plain_net)]
    whole, split = (
        one_pass(model, ascent, micro_batch=size)[0] for model, size in zip(models, (None, 3), strict=False)
    )
    optimizer = sgd(models[2])
    sam, loss = SAM(models[2], 0.1, ascent=ascent, optimizer=optimizer), cross_entropy_of(models[2])
    for _ in range(5):
        whole(*batch)
        split(*batch)
        optimizer.zero_grad()
        for half in (slice(0, 4), slice(4, 8)):
            sam.backward(lambda x, y: loss(x, y) / 2, batch[0][half], batch[1][half])
        optimizer.step()
    for model in models[1:]:
        for w, v in zip(plain_net.parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(v, w, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("ascent", ASCENTS)
def test_weights_optimizer_and_generator_are_all_the_state(ascent, kind, batch, tmp_path):
    def steps(step, count):
        return [step(*batch) for _ in range(count)]

    torch.manual_seed(0)
    model = SmallNet().double()
    step, optimizer = one_pass(model, ascent, OPTIMIZERS[kind](model))
    steps(step, 3)
    torch.save((model.state_dict(), optimizer.state_dict(), torch.get_rng_state()), tmp_path / "saved.pt")
    expected = steps(step, 3)
    saved = torch.load(tmp_path / "saved.pt")
    resumed = SmallNet().double()
    resumed.load_state_dict(saved[0])
    its_step, its_optimizer = one_pass(resumed, ascent, OPTIMIZERS[kind](resumed))
    its_optimizer.load_state_dict(saved[1])
    torch.set_rng_state(saved[2])
    assert steps(its_step, 3) == expected
    assert_same(resumed.state_dict(), model.state_dict())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("ascent", ASCENTS)
def test_a_step_that_is_skipped_leaves_no_trace(ascent, bad, small_net, batch):
    """Neither in the weights and statistics, nor in the direction of the next one."""
    other = copy.deepcopy(small_net)
    skipping, steady = one_pass(small_net, ascent)[0], one_pass(other, ascent)[0]
    for i in range(4):
        if i == 2:
            assert not skipping(batch[0] * bad, batch[1]).applied
        for step in (skipping, steady):
            torch.manual_seed(i)
            assert step(*batch).applied
    assert_same(state(small_net), state(other))


@pytest.mark.parametrize("ascent", ASCENTS)
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_weights_come_back_after_an_error_and_cannot_be_saved_within_the_pass(ascent, error, small_net, batch):
    step, optimizer = one_pass(small_net, ascent)
    step(*batch)
    kept = copy.deepcopy(optimizer.state_dict()["state"])
    before, pointers = state(small_net), [w.data_ptr() for w in small_net.parameters()]

    def fails(images, labels):
        assert not torch.equal(small_net.fc.weight, before["fc.weight"])
        with pytest.raises(RuntimeError, match="perturbed"):
            small_net.state_dict()
        raise error

    with pytest.raises(error):
        step.sam.backward(fails, *batch)
    assert_same(state(small_net), before)
    assert [w.data_ptr() for w in small_net.parameters()] == pointers
    for index, values in optimizer.state_dict()["state"].items():
        assert_same(values, kept[index])


@pytest.mark.parametrize("ascent", ASCENTS)
def test_a_pass_within_a_callers_autocast_sees_the_weights_that_it_is_at(ascent, batch):
    """Autocast keeps 16-bit copies of weights, from before the call and after it."""
    torch.manual_seed(0)
    model, (images, labels) = SmallNet(drop=0.0), (batch[0].float(), batch[1])
    train_mode(model, freeze_bn=True)
    step, _ = one_pass(model, ascent, rho=5.0)
    step(images, labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        at_rest = F.cross_entropy(model(images), labels).item()
        moved = step.sam.backward(cross_entropy_of(model), images, labels).item()
        again = F.cross_entropy(model(images), labels).item()
    assert moved != at_rest == again


@pytest.mark.parametrize("fused", [True, False])
def test_a_loss_scale_changes_nothing_and_an_overflow_leaves_the_previous_gradient(fused, batch):
    """A fused optimizer skips a step by itself, so that torch calls it all the same."""
    torch.manual_seed(0)
    model, (images, labels) = SmallNet(drop=0.0), (batch[0].float(), batch[1])
    scaled = copy.deepcopy(model)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-2, fused=fused) for m in (model, scaled)]
    sams = [SAM(m, 0.1, ascent="previous", optimizer=o) for m, o in zip((model, scaled), optimizers, strict=True)]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for i in range(6):
        if i != 3:
            optimizers[0].zero_grad()
            sams[0].backward(cross_entropy_of(model), images, labels)
            optimizers[0].step()
        optimizers[1].zero_grad()
        loss = cross_entropy_of(scaled)
        factor = math.inf if i == 3 else 1.0
        buffers = {name: value.clone() for name, value in scaled.named_buffers()}
        sams[1].backward(lambda x, y: scaler.scale(loss(x, y) * factor), images, labels)  # noqa: B023
        if i == 3:
            for name, value in scaled.named_buffers():
                value.copy_(buffers[name])
        scaler.step(optimizers[1])
        scaler.update()
    for w, v in zip(model.parameters(), scaled.parameters(), strict=True):
        torch.testing.assert_close(v, w, rtol=1e-5, atol=1e-6)
        assert optimizers[1].state[v]["previous_gradient"].isfinite().all()


def test_a_parameter_that_has_no_gradient_any_more_is_not_moved(small_net, batch):
    step, _ = one_pass(small_net, "previous")
    step(*batch)
    small_net.fc.weight.requires_grad_(False)
    step.optimizer.zero_grad()
    step.sam.backward(cross_entropy_of(small_net), *batch)
    step.optimizer.step()
    before, seen = state(small_net), record_weights(small_net)
    step.sam.backward(cross_entropy_of(small_net), *batch)
    assert torch.equal(seen[0]["fc.weight"], before["fc.weight"])
    assert not torch.equal(seen[0]["fc.bias"], before["fc.bias"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ascent_steps": 2}, "no pass 1"),
        ({"ascent_fraction": 0.5}, "no pass 1"),
        ({"second_order": True}, "no pass 1"),
        ({"perturb_from": "fc"}, "no pass 1"),
        ({"m": 4}, "leave m out"),
        ({"m": "global"}, "leave m out"),
        ({"optimizer": None}, "give the base optimizer"),
        ({"optimizer": sgd(SmallNet())}, "not have all perturbed"),
    ],
)
@pytest.mark.parametrize("ascent", ASCENTS)
def test_what_does_not_go_together_is_refused(ascent, options, message, small_net):
    with pytest.raises(ValueError, match=message):
        SAM(small_net, ascent=ascent, **({"optimizer": sgd(small_net)} | options))


def test_an_optimizer_without_momentum_is_refused(small_net, batch):
    plain = torch.optim.SGD(small_net.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="momentum 0"):
        SAM(small_net, ascent="momentum", optimizer=plain)
    step, _ = one_pass(small_net, "momentum", torch.optim.Adagrad(small_net.parameters()))
    with pytest.raises(ValueError, match="Adagrad keeps no momentum"):
        step(*batch)
    step, _ = one_pass(small_net, "previous", plain)
    assert step(*batch).applied


def test_the_perturbation_of_the_previous_gradient_is_an_ascent_to_first_order(plain_net, batch):
    """And that of the momentum, after one step, the opposite of it."""
    train_mode(plain_net, freeze_bn=True)
    moves = {}
    for ascent in ASCENTS:
        model = copy.deepcopy(plain_net)
        step, _ = one_pass(model, ascent, sgd(model, lr=1e-6), rho=1e-3)
        step(*batch)
        before, seen = state(model), record_weights(model)
        loss = F.cross_entropy(model(batch[0]), batch[1]).item()
        moved = step(*batch).loss
        assert (moved > loss) == (ascent == "previous")
        moves[ascent] = torch.cat([(w - before[name]).reshape(-1) for name, w in seen[1].items()])
    torch.testing.assert_close(moves["momentum"], -moves["previous"], rtol=1e-9, atol=1e-12)
