"""What surrounds the step: weights that come back, saving, schedulers, averages, loss scales, and where it leads."""

import contextlib
import copy
import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from timm.utils import ModelEmaV3

from samtune import SAM
from samtune.models.training import train_mode
from tests.conftest import SmallNet
from tests.support.small_models import assert_same, gradient, make_step, record_weights, sgd, state


def test_parameters_of_every_kind_come_back_in_their_own_storage(batch):
    """Used in one pass only, frozen, tied, 0-dim, channels_last; after an exception too."""

    class Odd(SmallNet):
        def __init__(self):
            super().__init__(drop=0.0)
            self.scale = torch.nn.Parameter(torch.tensor(2.0))
            self.first = torch.nn.Parameter(torch.ones(3))
            self.second = torch.nn.Parameter(torch.ones(3))
            self.tied = self.fc.bias
            self.conv.weight.data = self.conv.weight.data.to(memory_format=torch.channels_last)
            self.bn.bias.requires_grad_(False)
            self.calls = 0

        def forward(self, x):
            self.calls += 1
            return super().forward(x) * self.scale + (self.first if self.calls % 2 else self.second)

    torch.manual_seed(0)
    model = Odd().double()
    sam = SAM(model, 0.1)
    before, places = state(model), [w.data_ptr() for w in model.parameters()]
    seen = record_weights(model)
    for error in (None, KeyboardInterrupt):

        def loss(images, labels, error=error):
            value = F.cross_entropy(model(images), labels)
            if error and sam.perturbed:
                raise error
            return value

        with pytest.raises(error) if error else contextlib.nullcontext():
            sam.backward(loss, *batch)
        assert_same({n: w.detach() for n, w in model.named_parameters()}, {n: before[n] for n in dict(seen[0])})
        assert [w.data_ptr() for w in model.parameters()] == places
        assert not sam.perturbed
    moved = {name for name, w in seen[1].items() if not torch.equal(w, before[name])}
    assert moved == {"conv.weight", "bn.weight", "fc.weight", "tied", "scale", "first"}
    assert model.bn.training
    assert model.bn.track_running_stats


def test_a_model_refuses_to_be_saved_while_it_is_perturbed(small_net, batch):
    refused = []

    def loss(images, labels):
        if sam.perturbed:
            with pytest.raises(RuntimeError, match="perturbed"):
                small_net.state_dict()
            refused.append(True)
        return F.cross_entropy(small_net(images), labels)

    sam = SAM(small_net, 0.1)
    sam.backward(loss, *batch)
    assert refused
    small_net.state_dict()


TEN_STEPS = """
import sys, torch
from tests.sam.test_lifecycle import ten_steps
folder = sys.argv[1]
for begin in range(1, 10):
    torch.save(ten_steps(begin, torch.load(f"{folder}/{begin}.pt")), f"{folder}/from-{begin}.pt")
"""


def ten_steps(begin=0, saved=None, save_to=None):
    """An ordinary loop, saved and loaded as any other: model, optimizer, scheduler, generator."""
    torch.manual_seed(0)
    model = SmallNet().double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    step = make_step(model, optimizer, rho=0.1)
    if saved is not None:
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        scheduler.load_state_dict(saved["scheduler"])
        torch.set_rng_state(saved["generator"])
    images = torch.randn(10, 8, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for i in range(begin, 10):
        step(images[i], torch.arange(8) % 3)
        scheduler.step()
        if save_to is not None:
            torch.save(kept(model, optimizer, scheduler), save_to / f"{i + 1}.pt")
    return kept(model, optimizer, scheduler)


def kept(model, optimizer, scheduler):
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
        "generator": torch.get_rng_state(),
    }


def test_a_loop_resumed_after_any_step_in_a_new_process_ends_as_the_uninterrupted_one(tmp_path):
    end = ten_steps(save_to=tmp_path)
    subprocess.run([sys.executable, "-c", TEN_STEPS, tmp_path], check=True)
    for begin in range(1, 10):
        resumed = torch.load(tmp_path / f"from-{begin}.pt")
        assert_same(resumed["model"], end["model"])
        for key, value in end["optimizer"]["state"].items():
            assert_same(resumed["optimizer"]["state"][key], value)
        assert resumed["optimizer"]["param_groups"] == end["optimizer"]["param_groups"]
        assert torch.equal(resumed["generator"], end["generator"])


SCHEDULERS = {
    "LambdaLR": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda t: 0.9**t),
    "MultiplicativeLR": lambda o: torch.optim.lr_scheduler.MultiplicativeLR(o, lambda t: 0.9),
    "StepLR": lambda o: torch.optim.lr_scheduler.StepLR(o, 2),
    "MultiStepLR": lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [2, 5]),
    "ConstantLR": lambda o: torch.optim.lr_scheduler.ConstantLR(o),
    "LinearLR": lambda o: torch.optim.lr_scheduler.LinearLR(o),
    "ExponentialLR": lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.9),
    "CosineAnnealingLR": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 10),
    "PolynomialLR": lambda o: torch.optim.lr_scheduler.PolynomialLR(o, 10),
    "CosineAnnealingWarmRestarts": lambda o: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "CyclicLR": lambda o: torch.optim.lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=3),
    "OneCycleLR": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=12),
    "ReduceLROnPlateau": lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=0),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_drives_the_base_optimizer_before_and_after_a_load(name, small_net, batch):
    def train(model, optimizer, scheduler, steps):
        step = make_step(model, optimizer)
        rates = []
        for _ in range(steps):
            before = {n: w.detach().clone() for n, w in model.named_parameters()}
            step(*batch)
            scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))
            rates.append(optimizer.param_groups[0]["lr"])
            assert any(not torch.equal(w, before[n]) for n, w in model.named_parameters())
        return rates

    whole_net = copy.deepcopy(small_net)
    optimizer = sgd(whole_net)
    torch.manual_seed(1)
    whole = train(whole_net, optimizer, SCHEDULERS[name](optimizer), 8)

    optimizer = sgd(small_net)
    scheduler = SCHEDULERS[name](optimizer)
    torch.manual_seed(1)
    first = train(small_net, optimizer, scheduler, 4)
    again = copy.deepcopy(small_net)
    loaded = sgd(again)
    loaded_scheduler = SCHEDULERS[name](loaded)
    loaded.load_state_dict(optimizer.state_dict())
    loaded_scheduler.load_state_dict(scheduler.state_dict())
    assert first + train(again, loaded, loaded_scheduler, 4) == whole
    assert_same(state(again), state(whole_net))


def test_a_moving_average_never_sees_the_perturbed_weights(small_net, batch):
    step = make_step(small_net, sgd(small_net), rho=10.0)
    average = ModelEmaV3(small_net, decay=0.5)
    expected = state(small_net)
    for _ in range(5):
        step(*batch)
        average.update(small_net)
        for name, value in small_net.named_parameters():
            expected[name] = 0.5 * expected[name] + 0.5 * value.detach()
    for name, value in average.module.named_parameters():
        torch.testing.assert_close(value, expected[name], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("options", [{}, {"ascent_steps": 3}, {"micro_batch": 3}])
def test_an_autocast_around_all_passes_is_no_trap(batch, options):
    """It keeps 16-bit copies of the weights: pass 2 would see those of w, or of where the ascent was before."""
    torch.manual_seed(0)
    model = SmallNet(drop=0.0)
    images, labels = batch[0].float(), batch[1]

    def plain(x, y):
        return F.cross_entropy(model(x).float(), y)

    def with_autocast(x, y):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return plain(x, y)

    inside = gradient(model, with_autocast, images, labels, rho=1.0, **options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outside = gradient(model, plain, images, labels, rho=1.0, **options)
    assert torch.equal(inside, outside)


# ------------------------------------------------------------------------------------------------- values out of range


def inject(model, bad_passes, value=math.inf):
    """A loss whose value or gradient is not finite in some of its calls (counted from 0)."""
    calls = []

    def loss(logits, labels):
        calls.append(1)
        result = F.cross_entropy(logits, labels)
        return result * value if len(calls) - 1 in bad_passes else result

    return loss


@pytest.mark.parametrize("bad_passes", [{2}, {3}, {2, 3}], ids=["first pass", "second pass", "both"])
@pytest.mark.parametrize("scaled", [False, True])
def test_a_value_that_is_not_finite_skips_the_update_and_halves_the_scale_once(small_net, batch, bad_passes, scaled):
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0) if scaled else None
    optimizer = sgd(small_net)
    train_mode(small_net, freeze_bn=True)
    step = make_step(small_net, optimizer, loss=inject(small_net, bad_passes), scaler=scaler)
    assert step(*batch).applied
    before, momentum = state(small_net), copy.deepcopy(optimizer.state_dict()["state"])
    assert not step(*batch).applied
    assert_same(state(small_net), before)
    for key, value in optimizer.state_dict()["state"].items():
        assert torch.equal(value["momentum_buffer"], momentum[key]["momentum_buffer"])
    if scaler is not None:
        assert scaler.get_scale() == 512.0
    assert step(*batch).applied


@pytest.mark.parametrize("rho", [0.0, 0.1])
def test_a_loss_at_w_that_is_not_finite_skips_the_update_though_its_gradient_is(small_net, batch, rho):
    before = state(small_net)
    train_mode(small_net, freeze_bn=True)

    def loss(logits, labels):
        return F.cross_entropy(logits, labels) + (0.0 if step.sam.perturbed else math.inf)

    step = make_step(small_net, sgd(small_net), rho=rho, loss=loss)
    assert not step(*batch).applied
    assert_same(state(small_net), before)


def test_the_update_does_not_depend_on_the_loss_scale(plain_net, batch):
    scaled = copy.deepcopy(plain_net)
    plain = make_step(plain_net, sgd(plain_net), clip_grad=0.1)
    step = make_step(scaled, sgd(scaled), clip_grad=0.1, scaler=torch.amp.GradScaler("cpu", init_scale=2.0**12))
    for _ in range(5):
        assert plain(*batch).grad_norm == pytest.approx(step(*batch).grad_norm, rel=1e-12)
    for (name, w), v in zip(plain_net.named_parameters(), scaled.parameters(), strict=True):
        torch.testing.assert_close(v, w, rtol=1e-12, atol=1e-14, msg=name)


def test_an_ordinary_loop_with_a_grad_scaler_skips_and_halves_too(small_net, batch):
    scaler, optimizer = torch.amp.GradScaler("cpu", init_scale=1024.0), sgd(small_net)
    sam = SAM(small_net, 0.1)
    before = [w.detach().clone() for w in small_net.parameters()]
    for factor in (math.inf, 1.0):
        optimizer.zero_grad()
        sam.backward(lambda x, y, f=factor: scaler.scale(f * F.cross_entropy(small_net(x), y)), *batch)
        scaler.step(optimizer)
        scaler.update()
        moved = any(not torch.equal(w, b) for w, b in zip(small_net.parameters(), before, strict=True))
        assert moved == (factor == 1.0)
    assert scaler.get_scale() == 512.0


# ----------------------------------------------------------------------------------------------------- where it leads


def test_between_a_sharp_and_a_flat_well_sam_ends_in_the_flat_one_and_sgd_does_not():
    """Two wells of equal depth, at (-1, 0) and (1, 0); the left one is narrow."""

    def loss(w):
        narrow = 1 - torch.exp(-((w[0] + 1) ** 2 + w[1] ** 2) / (2 * 0.2**2))
        wide = 1 - torch.exp(-((w[0] - 1) ** 2 + w[1] ** 2) / (2 * 1.0**2))
        return narrow * wide

    def end(rho, start):
        model = torch.nn.Module()
        model.w = torch.nn.Parameter(start.clone())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        sam = SAM(model, rho)
        for _ in range(300):
            optimizer.zero_grad()
            sam.backward(lambda _: loss(model.w), torch.zeros(1))
            optimizer.step()
        return model.w.detach()

    generator = torch.Generator().manual_seed(0)
    starts = torch.tensor([-1.0, 0.0]) + 0.05 * torch.randn(20, 2, generator=generator)
    assert all(end(0.0, start)[0] < -0.8 for start in starts)
    assert all(end(0.3, start)[0] > 0.5 for start in starts)
