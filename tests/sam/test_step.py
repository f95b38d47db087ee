"""One update, against closed forms, a naive version and a published one."""

import copy
import gc
import math

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F

from samtune.models.training import train_mode
from tests.conftest import SmallNet
from tests.support.reference_sam import naive_sam_gradient
from tests.support.small_models import A, Quadratic, assert_same, make_step, quadratic_loss, sgd, state


def by_hand(kind, w, g, state, t, *, lr=0.01, momentum=0.9, decay=0.1):
    """The base optimizers' steps at w, from their papers."""
    if kind == "adamw":
        m, v = state.get("m", 0 * w), state.get("v", 0 * w)
        state["m"], state["v"] = m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        return w - lr * decay * w - lr * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
    if kind == "sgd":
        return w - lr * g
    if kind == "decay":
        return w - lr * (g + decay * w)
    v = state["v"] = momentum * state.get("v", 0 * w) + g
    return w - lr * (g + momentum * v if kind == "nesterov" else v)


BASES = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.01),
    "momentum": lambda params: torch.optim.SGD(params, lr=0.01, momentum=0.9),
    "nesterov": lambda params: torch.optim.SGD(params, lr=0.01, momentum=0.9, nesterov=True),
    "decay": lambda params: torch.optim.SGD(params, lr=0.01, weight_decay=0.1),
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.01, weight_decay=0.1),
}


@pytest.mark.parametrize("kind", BASES)
def test_on_a_quadratic_the_steps_are_those_worked_by_hand(kind):
    model, rho = Quadratic(), 0.1
    step = make_step(model, BASES[kind](model.parameters()), rho=rho, loss=quadratic_loss)
    w, kept = model.w.detach().numpy().copy(), {}
    for t in range(1, 51):
        step(torch.zeros(1, 3), torch.zeros(1, dtype=torch.long))
        g1 = A @ w
        w = by_hand(kind, w, A @ (w + rho * g1 / np.linalg.norm(g1)), kept, t)
        if t in (1, 50):
            np.testing.assert_allclose(model.w.detach().numpy(), w, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("freeze_bn", [True, False])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_hundred_steps_equal_a_naive_loop(small_net, batch, freeze_bn, optimizer):
    def make(model):
        if optimizer == "sgd":
            return sgd(model, weight_decay=1e-2)
        return torch.optim.AdamW(model.parameters(), lr=1e-2)

    naive = copy.deepcopy(small_net)
    train_mode(small_net, freeze_bn=freeze_bn)
    train_mode(naive, freeze_bn=freeze_bn)
    step, naive_optimizer = make_step(small_net, make(small_net)), make(naive)
    for i in range(100):
        torch.manual_seed(i)
        step(*batch)
        torch.manual_seed(i)
        for p, g in zip(naive.parameters(), naive_sam_gradient(naive, *batch, rho=0.1), strict=True):
            p.grad = g
        naive_optimizer.step()
    for name, value in naive.state_dict().items():
        torch.testing.assert_close(small_net.state_dict()[name], value, rtol=1e-11, atol=1e-11, msg=name)


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_twenty_steps_equal_those_of_a_published_sam(batch, optimizer, adaptive, monkeypatch):
    """The published ASAM has no eta and scales every parameter, so the net has no biases."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)  # it would round its norm to float32
    torch.manual_seed(0)
    ours = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3, bias=False),
        torch.nn.Tanh(),
        torch.nn.Flatten(),
        torch.nn.Linear(64, 3, bias=False),
    ).double()
    theirs = copy.deepcopy(ours)
    options = {"lr": 0.05, "momentum": 0.9} if optimizer == "sgd" else {"lr": 0.01, "weight_decay": 0.1}
    base = torch.optim.SGD if optimizer == "sgd" else torch.optim.AdamW
    step = make_step(ours, base(ours.parameters(), **options), rho=0.2, adaptive=adaptive, eta=0.0)
    published = pytest.importorskip("pytorch_optimizer").SAM(
        theirs.parameters(), base, rho=0.2, adaptive=adaptive, perturb_eps=0.0, foreach=False, **options
    )

    def closure():
        published.zero_grad()
        loss = F.cross_entropy(theirs(batch[0]), batch[1])
        loss.backward()
        return loss

    for _ in range(20):
        step(*batch)
        closure()
        published.step(closure)
    for w, v in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(w, v, rtol=1e-12, atol=1e-12)


def test_rho_zero_is_the_base_optimizer_bit_for_bit_with_batch_norm_and_dropout(small_net, batch):
    plain = copy.deepcopy(small_net)
    step, optimizer = make_step(small_net, sgd(small_net), rho=0.0), sgd(plain)
    for i in range(5):
        torch.manual_seed(i)
        step(*batch)
        torch.manual_seed(i)
        optimizer.zero_grad()
        F.cross_entropy(plain(batch[0]), batch[1]).backward()
        optimizer.step()
    assert_same(state(small_net), state(plain))
    assert step.sam.passes == 1


def test_statistics_and_generator_after_a_sam_step_are_those_after_one_plain_forward(small_net, batch):
    plain = copy.deepcopy(small_net)
    torch.manual_seed(3)
    make_step(small_net, sgd(small_net))(*batch)
    after_sam = torch.get_rng_state()
    torch.manual_seed(3)
    plain(batch[0])
    assert torch.equal(after_sam, torch.get_rng_state())
    for name, buffer in plain.named_buffers():
        assert torch.equal(small_net.get_buffer(name), buffer), name


@pytest.mark.parametrize("ascent_steps", [1, 3])
def test_all_passes_see_the_same_dropout_and_drop_path_masks(batch, ascent_steps):
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), timm.layers.DropPath(0.5), torch.nn.Flatten(), torch.nn.Dropout(0.5)
    )
    model.append(torch.nn.Linear(64, 3)).double()
    masks = {1: [], 3: []}
    for layer, seen in masks.items():
        model[layer].register_forward_hook(lambda module, inputs, output, seen=seen: seen.append(output != 0))
    make_step(model, sgd(model), ascent_steps=ascent_steps)(*batch)
    for seen in masks.values():
        assert len(seen) == 1 + ascent_steps
        assert all(torch.equal(mask, seen[0]) for mask in seen)
        assert 0 < seen[0].sum() < seen[0].numel()


def test_a_step_that_is_not_finite_leaves_statistics_as_they_were(small_net, batch):
    before = state(small_net)
    result = make_step(small_net, sgd(small_net))(batch[0] * math.inf, batch[1])
    assert not result.applied
    assert_same(state(small_net), before)


def test_frozen_statistics_stay_while_gamma_and_beta_train(small_net, batch):
    train_mode(small_net, freeze_bn=True)
    before = state(small_net)
    make_step(small_net, sgd(small_net))(*batch)
    for name, buffer in small_net.named_buffers():
        assert torch.equal(buffer, before[name]), name
    assert not torch.equal(small_net.bn.weight, before["bn.weight"])
    assert not torch.equal(small_net.bn.bias, before["bn.bias"])


def test_loss_and_error_are_those_at_w(plain_net, batch):
    with torch.no_grad():
        logits = plain_net(batch[0])
    result = make_step(plain_net, sgd(plain_net), rho=0.5)(*batch)
    assert result.loss == pytest.approx(F.cross_entropy(logits, batch[1]).item(), rel=1e-12)
    assert result.wrong == (logits.argmax(1) != batch[1]).sum()


def test_the_final_gradient_is_clipped_once_and_its_norm_is_reported_before(plain_net, batch):
    before = [p.detach().clone() for p in plain_net.parameters()]
    g = naive_sam_gradient(plain_net, *batch, rho=0.1)
    norm = torch.cat([x.reshape(-1) for x in g]).norm()
    result = make_step(plain_net, sgd(plain_net, lr=1.0, momentum=0, nesterov=False), clip_grad=1e-3)(*batch)
    moved = torch.cat([(w - p.detach()).reshape(-1) for w, p in zip(before, plain_net.parameters(), strict=True)])
    assert result.grad_norm == pytest.approx(norm.item(), rel=1e-9)
    assert moved.norm().item() == pytest.approx(1e-3, rel=1e-2)


def test_beyond_the_first_pass_no_copy_but_the_backup_is_alive(small_net, batch):
    """Gradient and perturbation of pass 1 are gone before pass 2 needs the memory."""
    alive = []

    def count(*_):
        gc.collect()
        tensors = {id(o): o for o in gc.get_objects() if issubclass(type(o), torch.Tensor)}.values()
        alive.append(sum(t.numel() for t in tensors if t.dtype == torch.float64))

    small_net.register_forward_pre_hook(count)
    step = make_step(small_net, sgd(small_net, momentum=0, nesterov=False))
    step(*batch)
    weights = sum(p.numel() for p in small_net.parameters())
    assert alive[1] - alive[0] < weights / 2


def test_parameters_without_a_gradient_are_not_perturbed(small_net, batch):
    small_net.unused = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    make_step(small_net, sgd(small_net))(*batch)
    assert torch.equal(small_net.unused, torch.ones(3))


def test_under_autocast_the_second_pass_uses_the_perturbed_weights(batch):
    """A cache of cast weights that outlives pass 1 would make pass 2 a copy of it."""
    torch.manual_seed(0)
    model = SmallNet(drop=0.0)
    images, labels = batch[0].float(), batch[1]
    train_mode(model, freeze_bn=True)
    seen = []
    model.fc.register_forward_hook(lambda module, inputs, output: seen.append(output.detach().clone()))
    step = make_step(model, sgd(model), rho=1.0, autocast=lambda: torch.autocast("cpu", dtype=torch.bfloat16))
    step(images, labels)
    assert seen[0].dtype == torch.bfloat16
    assert not torch.equal(seen[0], seen[1])
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in model.parameters())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_masks_replay_and_weights_return(batch):
    torch.manual_seed(0)
    model = SmallNet().cuda()
    images, labels = batch[0].float().cuda(), batch[1].cuda()
    masks = []
    model.drop.register_forward_hook(lambda module, inputs, output: masks.append(output != 0))
    before = state(model)
    make_step(model, sgd(model, lr=0.0), autocast=lambda: torch.autocast("cuda", dtype=torch.bfloat16))(images, labels)
    assert torch.equal(masks[0] & masks[1], masks[0])
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]), name
