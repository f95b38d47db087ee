"""Shake-Shake and ShakeDrop: their coefficients, and which of them SAM's passes multiply gradients by."""

import pytest
import timm
import torch
import torch.nn.functional as F

from samtune import SAM
from samtune.models.shaken import ShakeDrop, ShakeShake
from samtune.models.training import checkpoint_activations
from samtune.sam.shaking import shaking_modules, true_gradient
from tests.support.small_models import record_weights

NETS = {
    "shake26_2x96d": {"blocks": 1, "width": 4},
    "pyramidnet272_a200_shakedrop": {"blocks": 1, "alpha": 6},
}
IMAGES = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
LABELS = torch.arange(8) % 3


def shaken(name):
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=3, **NETS[name]).double().train()


def loss_of(model):
    return lambda images, labels: F.cross_entropy(model(images), labels)


def ratio(a, b):
    """The coefficient of each image by which b was multiplied -> (images,)."""
    return (a * b).sum((1, 2, 3)) / (b * b).sum((1, 2, 3))


def record_coefficients(model):
    """Lists of what each pass multiplies activations, and gradients, by; read off what goes in and out."""
    forward, backward = [], []

    def after_forward(module, inputs, out):
        if isinstance(module, ShakeShake):
            a, b = inputs
            forward.append(ratio(out - b, a - b).detach())
        else:
            forward.append(ratio(out, inputs[0]).detach())

    def after_backward(module, grad_inputs, grad_outputs):
        backward.append(ratio(grad_inputs[0], grad_outputs[0]))

    for module in shaking_modules(model):
        module.register_forward_hook(after_forward)
        module.register_full_backward_hook(after_backward)
    return forward, backward


def chunks(values, n):
    """The values of each pass -> (values of a pass, images)."""
    return [torch.stack(values[i : i + n]) for i in range(0, len(values), n)]


@pytest.mark.parametrize("ascent_steps", [1, 3])
@pytest.mark.parametrize("name", NETS)
def test_the_passes_of_a_step_draw_the_same_and_only_the_last_has_other_coefficients_for_gradients(name, ascent_steps):
    model = shaken(name)
    forward, backward = record_coefficients(model)
    SAM(model, 0.1, ascent_steps=ascent_steps).backward(loss_of(model), IMAGES, LABELS)
    forward, backward = chunks(forward, 3), chunks(backward, 3)
    assert len(forward) == len(backward) == ascent_steps + 1
    for alpha in forward[1:]:
        torch.testing.assert_close(alpha, forward[0])
    for beta in backward[:-1]:
        torch.testing.assert_close(beta.flip(0), forward[0])  # the last block's gradient is the first
    changed = (backward[-1].flip(0) - forward[0]).abs() > 1e-6
    assert changed.all() if name.startswith("shake") else changed.any()
    assert not any(module.true_gradient for module in shaking_modules(model))


@pytest.mark.parametrize("name", NETS)
def test_plain_sgd_has_other_coefficients_for_gradients_and_new_ones_in_each_step(name):
    model = shaken(name)
    forward, backward = record_coefficients(model)
    for _ in range(2):
        SAM(model, 0.0).backward(loss_of(model), IMAGES, LABELS)
    (first, second), (beta, _) = chunks(forward, 3), chunks(backward, 3)
    assert (first - second).abs().max() > 0.01
    assert (beta.flip(0) - first).abs().max() > 0.01


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", NETS)
def test_the_perturbation_follows_the_derivative_of_what_pass_1_computed(name, recompute):
    """The derivatives of the loss along e and along v, by finite differences, are as e'e to e'v."""
    model = shaken(name)
    if recompute:
        checkpoint_activations(model)
    weights = record_weights(model)
    state = torch.get_rng_state()
    SAM(model, 1e-3).backward(loss_of(model), IMAGES, LABELS)
    e = {key: weights[1][key] - w for key, w in weights[0].items()}

    @torch.no_grad()
    def loss_along(direction, t):
        torch.set_rng_state(state)
        moved = {key: w + t * direction[key] for key, w in weights[0].items()}
        return F.cross_entropy(torch.func.functional_call(model, moved, IMAGES), LABELS)

    def derivative(direction):
        h = 1e-6 / sum((d**2).sum() for d in direction.values()).sqrt()
        return (loss_along(direction, h) - loss_along(direction, -h)) / (2 * h)

    along_e = derivative(e)
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        v = {key: torch.randn(w.shape, generator=generator, dtype=w.dtype) for key, w in e.items()}
        expected = sum((e[key] * v[key]).sum() for key in e) / 1e-3**2 * along_e
        torch.testing.assert_close(derivative(v), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", NETS)
def test_recomputed_activations_and_micro_batches_change_no_coefficient(name):
    """The recomputed pass, within pass 1's backward pass, multiplies by the true gradient's coefficients too."""
    grads = []
    for recompute in (False, True):
        model = shaken(name)
        if recompute:
            checkpoint_activations(model)
        torch.manual_seed(5)
        SAM(model, 0.1, micro_batch=4).backward(loss_of(model), IMAGES, LABELS)
        grads.append(torch.cat([w.grad.flatten() for w in model.parameters()]))
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-12)


def test_coefficients_are_drawn_for_each_image_uniform_in_their_ranges():
    torch.manual_seed(0)
    a = torch.ones(20_000, 2, 1, 1)
    mixed = ShakeShake().train()(a, torch.zeros_like(a))
    assert torch.equal(mixed[:, 0], mixed[:, 1])
    quantiles = torch.tensor([0.01, 0.25, 0.5, 0.75, 0.99])
    torch.testing.assert_close(mixed[:, 0].flatten().quantile(quantiles), quantiles, rtol=0, atol=0.02)
    x = a.clone().requires_grad_()
    dropped = ShakeDrop(0.7).train()(x)
    dropped.sum().backward()
    kept = dropped[:, 0].flatten() == 1
    assert kept.float().mean().item() == pytest.approx(0.7, abs=0.02)
    alpha, beta = dropped[:, 0].flatten()[~kept].detach(), x.grad[:, 0].flatten()
    torch.testing.assert_close(alpha.quantile(quantiles), 2 * quantiles - 1, rtol=0, atol=0.05)
    assert bool((beta[kept] == 1).all())
    torch.testing.assert_close(beta[~kept].quantile(quantiles), quantiles, rtol=0, atol=0.03)


def test_evaluation_multiplies_by_the_mean_and_draws_nothing():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    a, b = torch.randn(2, 5, 3, 2, 2)
    torch.manual_seed(0)
    assert torch.equal(ShakeShake().eval()(a, b), (a + b) / 2)
    assert torch.equal(ShakeDrop(0.75).eval()(a), 0.75 * a)
    assert torch.equal(torch.get_rng_state(), state)
    ones = torch.ones(20_000, 1, 1, 1)
    assert ShakeDrop(0.75).train()(ones).mean().item() == pytest.approx(0.75, abs=0.02)


def test_blocks_are_kept_with_a_probability_that_falls_to_one_half():
    with torch.device("meta"):
        model = timm.create_model("pyramidnet272_a200_shakedrop")
    kept = [module.keep for module in shaking_modules(model)]
    assert kept == pytest.approx([1 - 0.5 * block / 90 for block in range(1, 91)])


def test_modules_are_as_before_after_an_error():
    model = shaken("shake26_2x96d")
    modules = shaking_modules(model)
    assert len(modules) == 3
    with true_gradient(modules):
        assert all(module.true_gradient for module in modules)
    model.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        SAM(model, 0.1).backward(loss_of(model), IMAGES, LABELS)
    assert not any(module.true_gradient for module in modules)
