"""Ablations of the ascent: a random direction, and the second-order term that Algorithm 1 leaves out."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from samtune import SAM
from samtune.models.training import train_mode
from samtune.sam.losses import l2_penalty
from samtune.sam.perturbation import Perturbation
from tests.conftest import SmallNet
from tests.support.small_models import (
    A,
    Quadratic,
    assert_same,
    cross_entropy_of,
    gradient,
    make_step,
    quadratic_loss,
    record_weights,
    sgd,
    state,
)

# ----------------------------------------------------------------------------------------------------- random direction


def perturbations(model, batch, calls=1, **options):
    """What each call adds to the weights, as one vector, with an object that is kept between the calls."""
    before = torch.cat([w.detach().reshape(-1) for w in model.parameters()])
    seen = record_weights(model)
    sam = SAM(model, **{"rho": 0.1, "ascent": "random"} | options)
    for _ in range(calls):
        sam.backward(cross_entropy_of(model), *batch)
    at = [torch.cat([w.reshape(-1) for w in weights.values()]) for weights in seen]
    assert all(torch.equal(at_w, before) for at_w in at[::2])
    return [moved - before for moved in at[1::2]]


def test_a_random_direction_has_the_norm_rho_and_another_one_in_each_call(small_net, batch):
    torch.manual_seed(1)
    moves = perturbations(small_net, batch, calls=20)
    assert [e.norm().item() for e in moves] == pytest.approx([0.1] * 20, rel=1e-9)
    cosines = torch.stack(moves) @ torch.stack(moves).T / 0.01 - torch.eye(20)
    assert cosines.abs().max() < 6 / math.sqrt(len(moves[0]))  # independent directions: 1 / sqrt(n) is the spread


def test_a_random_direction_is_gaussian(batch):
    """Then each half of the weights has its share of rho squared; a corner of a cube, say, would have it exactly."""
    torch.manual_seed(1)
    model = SmallNet(drop=0.0)
    z = torch.cat(perturbations(model, (batch[0].float(), batch[1]), calls=60)).double()
    z = z / z.std()
    assert abs(z.mean()) < 4 / math.sqrt(len(z))
    assert z.pow(4).mean() == pytest.approx(3, abs=4 * math.sqrt(96 / len(z)))


@pytest.mark.parametrize(
    "options", [{}, {"p": math.inf}, {"p": 4}, {"adaptive": True}, {"rho_factors": {"^fc": 2.0, "^bn": 0.0}}]
)
def test_a_random_perturbation_is_the_plain_one_for_the_numbers_that_were_drawn(small_net, batch, options):
    ball = copy.deepcopy(SAM(small_net, 0.1, **options)._perturbation)
    torch.manual_seed(5)
    expected = ball.plain([torch.randn_like(w) for w in small_net.parameters()], 0.1)
    torch.manual_seed(5)
    (e,) = perturbations(small_net, batch, **options)
    torch.testing.assert_close(e, torch.cat([x.reshape(-1) for x in expected]), rtol=1e-12, atol=1e-15)


def test_a_random_direction_moves_only_what_is_to_be_perturbed(small_net, batch):
    before, seen = state(small_net), record_weights(small_net)
    make_step(small_net, sgd(small_net), ascent="random", perturb="norm")(*batch)
    assert {name for name, w in seen[1].items() if not torch.equal(w, before[name])} == {"bn.weight", "bn.bias"}


@pytest.mark.parametrize("freeze_bn", [True, False])
def test_pass_1_of_a_random_direction_is_one_forward_pass_with_the_masks_of_pass_2(small_net, batch, freeze_bn):
    """The loss, the error and batch-norm statistics are those at w."""
    train_mode(small_net, freeze_bn=freeze_bn)
    plain, masks, backward = copy.deepcopy(small_net), [], []
    small_net.drop.register_forward_hook(lambda module, inputs, output: masks.append((output != 0) | (inputs[0] == 0)))
    small_net.fc.register_full_backward_hook(lambda *_: backward.append(1))
    torch.manual_seed(3)
    result = make_step(small_net, sgd(small_net), ascent="random")(*batch)
    after = torch.get_rng_state()
    torch.manual_seed(3)
    for w in plain.parameters():
        torch.randn_like(w)
    loss = F.cross_entropy(plain(batch[0]), batch[1])
    assert torch.equal(after, torch.get_rng_state())
    assert result.loss == pytest.approx(loss.item(), rel=1e-12)
    assert (len(masks), len(backward)) == (2, 1)
    assert torch.equal(*masks)
    for name, buffer in plain.named_buffers():
        assert torch.equal(small_net.get_buffer(name), buffer), name


def test_pieces_draw_directions_of_their_own_and_micro_batches_share_one(plain_net, batch):
    torch.manual_seed(1)
    pieces = perturbations(plain_net, batch, m=4)
    assert not torch.allclose(*pieces)
    torch.manual_seed(1)
    whole = gradient(plain_net, cross_entropy_of(plain_net), *batch, ascent="random")
    torch.manual_seed(1)
    split = gradient(plain_net, cross_entropy_of(plain_net), *batch, ascent="random", micro_batch=3)
    torch.testing.assert_close(split, whole, rtol=1e-12, atol=1e-14)


def test_weights_optimizer_and_generator_are_all_the_state_of_a_run_with_random_directions(batch):
    def steps(model, optimizer, count):
        step = make_step(model, optimizer, ascent="random", rho=0.5)
        return [step(*batch).grad_norm for _ in range(count)]

    torch.manual_seed(0)
    model = SmallNet().double()
    optimizer = sgd(model)
    steps(model, optimizer, 2)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), torch.get_rng_state()))
    expected = steps(model, optimizer, 2)
    resumed = SmallNet().double()
    resumed.load_state_dict(saved[0])
    its_optimizer = sgd(resumed)
    its_optimizer.load_state_dict(saved[1])
    torch.set_rng_state(saved[2])
    assert steps(resumed, its_optimizer, 2) == expected
    assert_same(resumed.state_dict(), model.state_dict())


def test_a_loss_at_w_that_is_not_finite_makes_the_whole_gradient_nan(plain_net, batch):
    sam = SAM(plain_net, 0.1, ascent="random")
    loss = cross_entropy_of(plain_net)
    sam.backward(lambda *batch: loss(*batch) + (0.0 if sam.perturbed else math.inf), *batch)
    assert all(w.grad.isnan().all() for w in plain_net.parameters())


# ---------------------------------------------------------------------------------------------------- second-order term


def whole_expression(model, loss, batch, rho=0.1, fraction=1.0, factors=None, adaptive=(), eta=0.01):
    """The gradient of w -> L(w + e(w)) as autograd takes it of the whole expression, with masks replayed."""
    names = [name for name, _ in model.named_parameters()]
    start, buffers = torch.get_rng_state(), {name: b.clone() for name, b in model.named_buffers()}
    w = {name: x.detach().clone().requires_grad_() for name, x in model.named_parameters()}

    def at(weights, images, labels):
        torch.set_rng_state(start)
        copies = {name: b.clone() for name, b in buffers.items()}
        return loss(torch.func.functional_call(model, {**weights, **copies}, (images,)), labels, weights)

    n = math.ceil(fraction * len(batch[0]))
    g = dict(
        zip(names, torch.autograd.grad(at(w, batch[0][:n], batch[1][:n]), w.values(), create_graph=True), strict=True)
    )
    s = {name: (factors or {}).get(name, 1.0) * (x.abs() + eta if name in adaptive else 1.0) for name, x in w.items()}
    norm = sum((s[name] * g[name]).square().sum() for name in names).sqrt()
    moved = {name: w[name] + rho * s[name] ** 2 * g[name] / norm for name in names}
    return torch.cat([x.reshape(-1) for x in torch.autograd.grad(at(moved, *batch), list(w.values()))])


def net(freeze_bn, drop):
    torch.manual_seed(0)
    model = SmallNet(drop=drop).double()
    train_mode(model, freeze_bn=freeze_bn)
    return model


CASES = {
    "plain": ({}, {}),
    "pieces": ({"m": 4}, {}),
    "a share of the batch": ({"ascent_fraction": 0.5}, {"fraction": 0.5}),
    "radii of their own": (
        {"rho_factors": {"^fc": 0.5, "^bn": 0.0}},
        {"factors": {"fc.weight": 0.5, "fc.bias": 0.5, "bn.weight": 0.0, "bn.bias": 0.0}},
    ),
    "norm": ({"perturb": "norm"}, {"factors": {"fc.weight": 0.0, "fc.bias": 0.0, "conv.weight": 0.0}}),
    "adaptive": ({"adaptive": True, "eta": 0.3}, {"adaptive": ("conv.weight", "fc.weight"), "eta": 0.3}),
}


@pytest.mark.parametrize("drop", [0.0, 0.5])
@pytest.mark.parametrize("freeze_bn", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_with_the_second_order_term_it_is_the_gradient_of_the_whole_expression(case, freeze_bn, drop, batch):
    options, same = CASES[case]
    model, torch_loss = net(freeze_bn, drop), lambda logits, labels, _: F.cross_entropy(logits, labels)
    reference = copy.deepcopy(model)
    torch.manual_seed(7)
    pieces = [tuple(t[i : i + 4] for t in batch) for i in (0, 4)] if "m" in options else [batch]
    expected = 0
    for piece in pieces:
        expected = expected + whole_expression(reference, torch_loss, piece, **same) / len(pieces)
    torch.manual_seed(7)
    found = gradient(model, cross_entropy_of(model), *batch, second_order=True, **options)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    model.zero_grad()
    torch.manual_seed(7)
    assert not torch.allclose(gradient(model, cross_entropy_of(model), *batch, **options), expected, rtol=1e-3)


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("freeze_bn", [True, False])
def test_with_the_second_order_term_it_is_the_slope_of_the_perturbed_loss(freeze_bn, adaptive, batch):
    """By finite differences of L(w + e(w)) along random directions, with `Perturbation.plain` for e.

    Without a ReLU, at whose kinks e jumps, and with no weight near 0, where |w| has its own.
    """
    torch.manual_seed(0)
    layers = (torch.nn.Conv2d(3, 4, 3, bias=False), torch.nn.BatchNorm2d(4), torch.nn.Tanh(), torch.nn.Flatten())
    model = torch.nn.Sequential(*layers, torch.nn.Linear(64, 3)).double()
    train_mode(model, freeze_bn=freeze_bn)
    params = list(model.parameters())
    with torch.no_grad():
        torch._foreach_add_(params, [w.sign() / 50 for w in params])
    ball = Perturbation(params, adaptive=[adaptive and w.ndim > 1 for w in params])
    loss = cross_entropy_of(model)

    def perturbed_loss(w):
        with torch.no_grad():
            for x, value in zip(params, w, strict=True):
                x.copy_(value)
        e = ball.plain(torch.autograd.grad(loss(*batch), params), 0.1)
        with torch.no_grad():
            torch._foreach_add_(params, e)
            return loss(*batch).item()

    at = [w.detach().clone() for w in params]
    found = gradient(model, loss, *batch, second_order=True, adaptive=adaptive)
    generator = torch.Generator().manual_seed(2)
    for _ in range(5):
        step = [torch.randn(w.shape, generator=generator, dtype=w.dtype) for w in at]
        # Five points: the error is of the fourth order.
        values = [
            k * perturbed_loss([w + h * 1e-3 * d for w, d in zip(at, step, strict=True)])
            for h, k in ((-2, 1), (-1, -8), (1, 8), (2, -1))
        ]
        slope = sum(values) / (12 * 1e-3)
        assert (found @ torch.cat([d.reshape(-1) for d in step])).item() == pytest.approx(slope, rel=1e-6)


def test_on_a_quadratic_the_second_order_gradient_is_the_one_worked_by_hand():
    """L = w'Aw / 2 has H = A, and e = rho Aw / ||Aw||."""
    model, rho = Quadratic(), 0.3
    a = torch.from_numpy(A)
    w = model.w.detach().clone()
    u = a @ w / (a @ w).norm()
    g2 = a @ (w + rho * u)
    expected = g2 + rho / (a @ w).norm() * a @ (g2 - u * (u @ g2))
    found = gradient(model, lambda x: quadratic_loss(model(x), None), torch.zeros(1, 3), rho=rho, second_order=True)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"m": 3}, {"ascent_fraction": 0.5, "adaptive": True}])
def test_micro_batches_change_nothing_in_the_second_order_gradient(plain_net, batch, options):
    loss, options = cross_entropy_of(plain_net), {"second_order": True, **options}
    whole, split = (gradient(plain_net, loss, *batch, micro_batch=size, **options) for size in (None, 2))
    torch.testing.assert_close(split, whole, rtol=1e-11, atol=1e-14)


def test_the_second_order_gradient_adds_to_what_is_there(plain_net, batch):
    sam, loss = SAM(plain_net, 0.1, second_order=True), cross_entropy_of(plain_net)
    sam.backward(loss, *batch)
    once = [w.grad.clone() for w in plain_net.parameters()]
    sam.backward(loss, *batch)
    torch.testing.assert_close([w.grad for w in plain_net.parameters()], [2 * g for g in once], rtol=1e-12, atol=0)


def test_a_part_of_the_batch_in_pass_3_leaves_the_generator_as_pass_2_does(small_net, batch):
    states = []
    for options in ({"second_order": True, "ascent_fraction": 0.5}, {}):
        torch.manual_seed(3)
        SAM(small_net, 0.1, **options).backward(cross_entropy_of(small_net), *batch)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


@pytest.mark.parametrize("fails_in", [None, 1, 2, 3])
def test_after_a_second_order_step_weights_generator_and_statistics_are_those_of_one_pass(small_net, batch, fails_in):
    plain, calls = copy.deepcopy(small_net), []
    sam = SAM(small_net, 0.1, second_order=True)
    for w in small_net.parameters():
        w.grad = torch.ones_like(w)

    def loss(images, labels):
        calls.append(sam.perturbed)
        if len(calls) == fails_in:
            raise KeyboardInterrupt
        return F.cross_entropy(small_net(images), labels)

    torch.manual_seed(3)
    if fails_in is None:
        sam.backward(loss, *batch)
        after = torch.get_rng_state()
        torch.manual_seed(3)
        plain(batch[0])
        assert torch.equal(after, torch.get_rng_state())
        assert calls == [False, True, True]
        assert_same(state(small_net), state(plain))
    else:
        with pytest.raises(KeyboardInterrupt):
            sam.backward(loss, *batch)
        weights = dict(small_net.named_parameters())
        assert all(torch.equal(w, weights[name]) for name, w in plain.named_parameters())
        assert small_net.bn.track_running_stats
        assert not sam.perturbed
        small_net.state_dict()  # may be saved again


def test_a_second_order_step_reports_loss_and_error_of_pass_1_once_and_five_passes(plain_net, batch):
    with torch.no_grad():
        logits = plain_net(batch[0])
    result = make_step(plain_net, sgd(plain_net), second_order=True)(*batch)
    assert (result.n, result.passes) == (len(batch[0]), 5)
    assert result.loss == pytest.approx(F.cross_entropy(logits, batch[1]).item(), rel=1e-12)
    assert result.wrong == (logits.argmax(1) != batch[1]).sum()


def test_the_penalty_on_weights_is_differentiated_twice_too(plain_net, batch):
    weights = [plain_net.conv.weight, plain_net.fc.weight]
    step = make_step(
        plain_net,
        sgd(plain_net, lr=1.0, momentum=0, nesterov=False),
        penalty=lambda: l2_penalty(weights, 0.3),
        second_order=True,
    )

    def loss(logits, labels, w):
        return F.cross_entropy(logits, labels) + 0.15 * (
            w["conv.weight"].square().sum() + w["fc.weight"].square().sum()
        )

    before = torch.cat([w.detach().reshape(-1) for w in plain_net.parameters()])
    expected = whole_expression(copy.deepcopy(plain_net), loss, batch)
    step(*batch)
    moved = before - torch.cat([w.detach().reshape(-1) for w in plain_net.parameters()])
    torch.testing.assert_close(moved, expected, rtol=1e-9, atol=1e-12)


def test_where_the_gradient_is_zero_the_second_order_term_is_zero():
    model = Quadratic()
    with torch.no_grad():
        model.w.zero_()
    found = gradient(model, lambda x: quadratic_loss(model(x), None), torch.zeros(1, 3), second_order=True)
    assert not found.any()


@pytest.mark.parametrize("bad_call", [1, 2, 3])
def test_a_value_that_is_not_finite_reaches_the_second_order_gradient_from_every_pass(plain_net, batch, bad_call):
    calls, loss = [], cross_entropy_of(plain_net)

    def broken(images, labels):
        calls.append(1)
        return loss(images * math.nan if len(calls) == bad_call else images, labels)

    assert not gradient(plain_net, broken, *batch, second_order=True).isfinite().all()


def test_attention_has_a_second_derivative(batch):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(2), torch.nn.MultiheadAttention(36, 2, batch_first=True)).double()
    attention, head = model[1], torch.nn.Linear(36, 3).double()
    model.append(head)
    loss = lambda x, y: F.cross_entropy(head(attention(*3 * [x.flatten(2)], need_weights=False)[0].mean(1)), y)  # noqa: E731
    params = list(model.parameters())
    at = [w.detach().clone() for w in params]
    found = gradient(model, loss, *batch, second_order=True)

    def perturbed_loss(scale):
        with torch.no_grad():
            for w, x in zip(params, at, strict=True):
                w.copy_(x + scale * x.sin())
        e = Perturbation(params).plain(torch.autograd.grad(loss(*batch), params), 0.1)
        with torch.no_grad():
            torch._foreach_add_(params, e)
            return loss(*batch).item()

    slope = sum(k * perturbed_loss(h * 1e-3) for h, k in ((-2, 1), (-1, -8), (1, 8), (2, -1))) / (12 * 1e-3)
    assert (found @ torch.cat([x.sin().reshape(-1) for x in at])).item() == pytest.approx(slope, rel=1e-6)


# ----------------------------------------------------------------------------------------------------------------- cost


def flops(model, images, **options):
    with FlopCounterMode(display=False) as counter:
        SAM(model, **options).backward(lambda x: model(x).square().mean(), images)
    return counter.get_total_flops()


@pytest.mark.parametrize(
    ("options", "passes"),
    [({"ascent": "random"}, 4 / 3), ({"second_order": True}, 5), ({"second_order": True, "ascent_fraction": 0.5}, 3)],
)
def test_the_cost_that_is_reported_is_that_of_the_arithmetic(options, passes):
    """Of a deep net; the first layer needs no gradient for its inputs, which makes a plain pass a little cheaper."""
    torch.manual_seed(0)
    layers = [layer for _ in range(15) for layer in (torch.nn.Linear(8, 8), torch.nn.Tanh())]
    model, images = torch.nn.Sequential(*layers), torch.randn(8, 8)
    plain = flops(model, images, rho=0.0)
    assert SAM(model, 0.1, **options).passes == pytest.approx(passes)
    assert flops(model, images, rho=0.1, **options) / plain == pytest.approx(passes, rel=0.04)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ascent": "uniform"}, "uniform"),
        ({"ascent": "random", "ascent_steps": 2}, "ascent random"),
        ({"ascent": "random", "second_order": True}, "ascent random"),
        ({"second_order": True, "p": 1.0}, "second_order"),
        ({"second_order": True, "ascent_steps": 2}, "second_order"),
    ],
)
def test_what_does_not_go_together_is_refused(small_net, options, message):
    with pytest.raises(ValueError, match=message):
        SAM(small_net, **options)


def test_a_second_order_gradient_is_not_recorded(small_net):
    with pytest.raises(ValueError, match="CUDA graphs"):
        SAM(small_net, second_order=True).use_cuda_graphs()
