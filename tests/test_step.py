"""One update, against closed forms and a naive version."""

import contextlib
import copy
import gc

import pytest
import torch
import torch.nn.functional as F

from samtune.models import train_mode
from samtune.step import Step
from tests.conftest import SmallNet
from tests.reference import naive_sam_gradient


def make_step(model, optimizer, *, rho=0.1, clip_grad=0.0, loss=F.cross_entropy, autocast=contextlib.nullcontext):
    return Step(model, optimizer, loss, rho=rho, clip_grad=clip_grad, autocast=autocast)


def sgd(model, **options):
    return torch.optim.SGD(model.parameters(), **({"lr": 0.1, "momentum": 0.9, "nesterov": True} | options))


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


class Quadratic(torch.nn.Module):
    """w, for the loss w'Aw / 2."""

    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64))

    def forward(self, x):
        return self.w.expand(len(x), 3)


def test_on_a_quadratic_the_step_is_the_closed_form():
    a = torch.diag(torch.tensor([1.0, 4.0, 9.0], dtype=torch.float64))
    model, rho, lr = Quadratic(), 0.1, 0.05
    step = make_step(
        model, sgd(model, lr=lr, momentum=0, nesterov=False), rho=rho, loss=lambda out, _: out[0] @ a @ out[0] / 2
    )
    w = model.w.detach().clone()
    for _ in range(50):
        step(torch.zeros(1, 3), torch.zeros(1, dtype=torch.long))
        g = a @ w
        w = w - lr * (g + rho * a @ g / g.norm())
    torch.testing.assert_close(model.w.detach(), w, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("freeze_bn", [True, False])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_twenty_steps_equal_a_naive_loop(small_net, batch, freeze_bn, optimizer):
    def make(model):
        if optimizer == "sgd":
            return sgd(model, weight_decay=1e-2)
        return torch.optim.AdamW(model.parameters(), lr=1e-2)

    naive = copy.deepcopy(small_net)
    train_mode(small_net, freeze_bn=freeze_bn)
    train_mode(naive, freeze_bn=freeze_bn)
    step, naive_optimizer = make_step(small_net, make(small_net)), make(naive)
    for i in range(20):
        torch.manual_seed(i)
        step(*batch)
        torch.manual_seed(i)
        for p, g in zip(naive.parameters(), naive_sam_gradient(naive, *batch, rho=0.1), strict=True):
            p.grad = g
        naive_optimizer.step()
    for name, value in naive.state_dict().items():
        torch.testing.assert_close(small_net.state_dict()[name], value, rtol=1e-12, atol=1e-12, msg=name)


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
    assert step.passes == 1


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


def test_both_passes_see_the_same_dropout_mask(small_net, batch):
    masks = []
    small_net.drop.register_forward_hook(lambda module, inputs, output: masks.append(output != 0))
    make_step(small_net, sgd(small_net))(*batch)
    assert len(masks) == 2
    assert torch.equal(masks[0] & masks[1], masks[0])
    assert 0 < masks[0].sum() < masks[0].numel()


def test_frozen_statistics_stay_while_gamma_and_beta_train(small_net, batch):
    train_mode(small_net, freeze_bn=True)
    before = state(small_net)
    make_step(small_net, sgd(small_net))(*batch)
    for name, buffer in small_net.named_buffers():
        assert torch.equal(buffer, before[name]), name
    assert not torch.equal(small_net.bn.weight, before["bn.weight"])
    assert not torch.equal(small_net.bn.bias, before["bn.bias"])


def test_loss_and_error_are_those_at_w(small_net, batch):
    train_mode(small_net, freeze_bn=True)
    small_net.drop.p = 0.0
    with torch.no_grad():
        logits = small_net(batch[0])
    result = make_step(small_net, sgd(small_net), rho=0.5)(*batch)
    assert result.loss == pytest.approx(F.cross_entropy(logits, batch[1]).item(), rel=1e-12)
    assert result.wrong == (logits.argmax(1) != batch[1]).sum()


def test_the_final_gradient_is_clipped_once_and_its_norm_is_reported_before(small_net, batch):
    train_mode(small_net, freeze_bn=True)
    small_net.drop.p = 0.0
    before = [p.detach().clone() for p in small_net.parameters()]
    g = naive_sam_gradient(small_net, *batch, rho=0.1)
    norm = torch.cat([x.reshape(-1) for x in g]).norm()
    result = make_step(small_net, sgd(small_net, lr=1.0, momentum=0, nesterov=False), clip_grad=1e-3)(*batch)
    moved = torch.cat([(w - p.detach()).reshape(-1) for w, p in zip(before, small_net.parameters(), strict=True)])
    assert result.grad_norm == pytest.approx(norm.item(), rel=1e-9)
    assert moved.norm().item() == pytest.approx(1e-3, rel=1e-2)


@pytest.mark.parametrize("bad_pass", [1, 2])
def test_a_value_that_is_not_finite_leaves_weights_and_momentum_alone(small_net, batch, bad_pass):
    calls = []

    def loss(logits, labels):
        calls.append(1)
        value = F.cross_entropy(logits, labels)
        return value * float("inf") if len(calls) == 2 + bad_pass else value

    optimizer = sgd(small_net)
    step = make_step(small_net, optimizer, loss=loss)
    train_mode(small_net, freeze_bn=True)
    assert step(*batch).applied
    before, momentum = state(small_net), copy.deepcopy(optimizer.state_dict()["state"])
    assert not step(*batch).applied
    assert_same(state(small_net), before)
    for key, value in optimizer.state_dict()["state"].items():
        assert torch.equal(value["momentum_buffer"], momentum[key]["momentum_buffer"])


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
