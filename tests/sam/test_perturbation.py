"""The perturbation and its undoing, in both forms."""

import itertools
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from samtune.sam.perturbation import Perturbation, dual

RHO = 0.05
NORMS = [1, 1.05, 4 / 3, 2, 4, math.inf]
SHAPES = [(4, 3, 3, 3), (7,), (), (5, 2)]


def gradients(scale=1.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return [scale * torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in SHAPES]


def weights(dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    made = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in SHAPES]
    made[0] = made[0].to(memory_format=torch.channels_last)
    return made


def flat(tensors):
    return torch.cat([t.reshape(-1) for t in tensors])


def plain(g, rho=RHO, **options):
    """e, tensor by tensor."""
    return Perturbation([torch.zeros_like(x) for x in g], **options).plain(g, rho)


def fused(g, rho=RHO, **options):
    """e, as the step makes it: what parameters at zero become."""
    params = [torch.zeros_like(x) for x in g]
    with Perturbation(params, **options).perturbed(g, rho):
        return [w.clone() for w in params]


both_forms = pytest.mark.parametrize("form", [plain, fused])
all_norms = pytest.mark.parametrize("p", NORMS)


def conjugate(p):
    return {1: math.inf, math.inf: 1}.get(p) or p / (p - 1)


@both_forms
@all_norms
def test_the_perturbation_has_length_rho_and_gains_rho_times_the_dual_norm(form, p):
    g, e = flat(gradients()), flat(form(gradients(), p=p))
    assert torch.linalg.vector_norm(e, p).item() == pytest.approx(RHO, rel=1e-12)
    dual_norm = torch.linalg.vector_norm(g, conjugate(p)).item()
    assert (g @ e).item() == pytest.approx(RHO * dual_norm, rel=1e-12)


@both_forms
@all_norms
def test_no_point_of_the_sphere_gains_more_than_the_perturbation(form, p):
    g, best = flat(gradients()), flat(form(gradients(), p=p))
    other = torch.randn(1000, len(g), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    other[500:] = best + 0.01 * RHO * other[500:]  # near neighbours too
    other = RHO * other / torch.linalg.vector_norm(other, p, dim=1, keepdim=True)
    assert (other @ g).max() <= best @ g * (1 + 1e-12)


@pytest.mark.parametrize("adaptive", [None, [True, False, False, True]])
@pytest.mark.parametrize("factors", [None, [1.0, 0.5, 2.0, 0.0]])
@all_norms
def test_the_fused_form_is_the_plain_form(p, factors, adaptive):
    params = weights()
    ball = Perturbation(params, p=p, factors=factors, adaptive=adaptive)
    expected = [w + e for w, e in zip(params, ball.plain(gradients(), RHO), strict=True)]
    with ball.perturbed(gradients(), RHO):
        torch.testing.assert_close(params, expected, rtol=0, atol=1e-14)


@both_forms
@all_norms
@pytest.mark.parametrize("exponent", [-30, -20, -3, 3, 20, 30])
def test_the_perturbation_does_not_depend_on_the_scale_of_float32_gradients(form, p, exponent):
    expected = flat(form(gradients(dtype=torch.float32), p=p))
    scaled = flat(form([g * 10.0**exponent for g in gradients(dtype=torch.float32)], p=p))
    torch.testing.assert_close(scaled, expected, rtol=2e-5, atol=1e-12)


@both_forms
@all_norms
def test_one_tensor_in_seven_pieces_gives_the_same_perturbation(form, p):
    whole = torch.randn(60, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    cuts = [0, 7, 31, 32, 32 + 9, 50, 51, 60]
    pieces = [whole[a:b].clone() for a, b in itertools.pairwise(cuts)]
    pieces[1], pieces[2], pieces[3] = pieces[1].reshape(4, 6), pieces[2].reshape(()), pieces[3].reshape(3, 1, 3)
    torch.testing.assert_close(flat(form(pieces, p=p)), form([whole], p=p)[0], rtol=1e-12, atol=1e-15)


@both_forms
@all_norms
def test_zero_gradients_do_not_perturb(form, p):
    assert not flat(form([torch.zeros(3), torch.zeros(2, 2)], p=p)).any()


@both_forms
@all_norms
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_gradient_that_is_not_finite_makes_all_of_the_perturbation_nan(form, p, bad):
    g = gradients()
    g[1][3] = bad
    assert flat(form(g, p=p)).isnan().all()


@both_forms
def test_with_p_1_all_of_rho_falls_on_the_first_of_equally_large_gradients(form):
    g = [torch.tensor([1.0, -3.0]), torch.tensor([[3.0, 0.0], [-3.0, 2.0]])]
    assert flat(form(g, rho=0.5, p=1)).tolist() == [0, -0.5, 0, 0, 0, 0]


@both_forms
def test_with_p_inf_each_weight_moves_by_rho_but_not_where_the_gradient_is_zero(form):
    g = [torch.tensor([1e-8, -3.0, 0.0])]
    torch.testing.assert_close(form(g, rho=0.5, p=math.inf)[0], torch.tensor([0.5, -0.5, 0.0]))


@both_forms
def test_gradients_are_left_as_they_were_even_where_two_parameters_share_one(form):
    shared = torch.ones(3)
    e = form([shared, shared], rho=1.0)
    assert torch.equal(shared, torch.ones(3))
    assert flat(e).norm().item() == pytest.approx(1.0)


@all_norms
def test_groups_share_a_weighted_ball_and_a_factor_of_zero_leaves_the_norm(p):
    g, factors = gradients(), [1.0, 0.25, 3.0, 0.0]
    e = fused(g, p=p, factors=factors)
    measured = flat([x / f for x, f in zip(e[:3], factors[:3], strict=True)])
    assert torch.linalg.vector_norm(measured, p).item() == pytest.approx(RHO, rel=1e-12)
    assert not e[3].any()
    g[3] *= 1e6
    assert torch.equal(flat(fused(g, p=p, factors=factors)), flat(e))


@all_norms
def test_adaptive_perturbations_ignore_a_rescaling_of_two_layers(p):
    """x -> W2 W1 x is the same function with c W1 and W2 / c, and its adaptive neighbourhood too (Kwon et al. 2021)."""
    generator = torch.Generator().manual_seed(0)
    w1, w2 = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in [(4, 3), (2, 4)])
    x = torch.randn(3, 5, generator=generator, dtype=torch.float64)

    def loss_at_e(c):
        layers = [(c * w1).requires_grad_(), (w2 / c).requires_grad_()]
        g = torch.autograd.grad((layers[1] @ layers[0] @ x).square().sum(), layers)
        with Perturbation(layers, p=p, adaptive=[True, True], eta=0).perturbed(g, RHO):
            return (layers[1] @ layers[0] @ x).square().sum().item()

    assert loss_at_e(10.0) == pytest.approx(loss_at_e(1.0), rel=1e-12)


@pytest.mark.parametrize("p", [2, 4])
def test_further_ascent_measures_the_ball_at_the_unperturbed_weights(p):
    params = weights()
    ball = Perturbation(params, p=p, adaptive=[True] * 4)
    first, second = gradients(), [g.flip(0) if g.ndim else -g for g in gradients()]
    steps = zip(params, ball.plain(first, RHO), ball.plain(second, RHO), strict=True)
    expected = [w + e1 + e2 for w, e1, e2 in steps]
    with ball.perturbed(first, RHO):
        ball.add_(second, RHO)
        torch.testing.assert_close(params, expected, rtol=0, atol=1e-14)


VARIANTS = {f"p={p:.3g}": {"p": p} for p in NORMS}
VARIANTS |= {"adaptive": {"adaptive": [True] * 4}, "factors": {"factors": [1.0, 0.5, 0.0, 2.0]}}


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_nothing_is_read_back_from_an_accelerator(options):
    """Tensors without data, as those of a device that is still at work, have nothing to be read."""
    params, grads = ([torch.empty(shape, device="meta") for shape in SHAPES] for _ in range(2))
    with Perturbation(params, **options).perturbed(grads, RHO):
        pass
    with pytest.raises(RuntimeError):
        Perturbation(params, **options).plain(grads, RHO)[0].sum().item()


class Calls(TorchDispatchMode):
    """Counts the operations that Python asks for."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", sorted(VARIANTS.keys() - {"p=1"}))  # which takes a view of each tensor, in C++
def test_python_does_not_loop_over_tensors(name):
    options = VARIANTS[name]

    def operations(times):
        params, grads = weights() * times, gradients() * times
        many = {name: value * times if isinstance(value, list) else value for name, value in options.items()}
        ball = Perturbation([w.clone() for w in params], **many)
        ball.allocate_backup()
        with Calls() as calls, ball.perturbed(grads, RHO):
            pass
        return calls.count

    assert operations(1) == operations(25)


def test_the_dual_of_a_vector_by_hand():
    assert dual([torch.tensor([3.0, 4.0])], 2)[0].tolist() == pytest.approx([0.6, 0.8])
    # q = 3/2: |h|^(1/2) sign(h) / (1^1.5 + 4^1.5)^(1/3)
    assert dual([torch.tensor([1.0, -4.0])], 3)[0].tolist() == pytest.approx([9 ** (-1 / 3), -2 * 9 ** (-1 / 3)])


# ----------------------------------------------------------------------------------------------------------- restoring


@pytest.mark.parametrize("p", [1, 2, 4])
@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_weights_come_back_bit_for_bit_in_their_own_storage(error, p):
    params = weights(torch.float32)
    before = [w.clone() for w in params]
    places = [w.data_ptr() for w in params]

    def perturb_and_fail():
        with Perturbation(params, p=p).perturbed(gradients(dtype=torch.float32), RHO):
            assert not torch.equal(flat(params), flat(before))
            if error is not None:
                raise error

    if error is None:
        perturb_and_fail()
    else:
        with pytest.raises(error):
            perturb_and_fail()
    assert all(torch.equal(w, b) for w, b in zip(params, before, strict=True))
    assert [w.data_ptr() for w in params] == places


def test_weights_come_back_even_from_a_perturbation_that_is_not_finite():
    params = weights(torch.float32)
    before = [w.clone() for w in params]
    with Perturbation(params).perturbed([torch.full_like(w, math.nan) for w in params], RHO):
        assert flat(params).isnan().all()
    assert all(torch.equal(w, b) for w, b in zip(params, before, strict=True))


def test_the_copy_of_the_weights_is_made_once_and_kept():
    ball = Perturbation(weights())
    places = set()
    for _ in range(3):
        with ball.perturbed(gradients(), RHO):
            places.add(tuple(w.data_ptr() for w in ball._backup))
    assert len(places) == 1


@pytest.mark.parametrize(
    ("params", "options", "message"),
    [
        (weights(), {"p": 0.5}, "p 0.5"),
        (weights(), {"p": math.nan}, "p nan"),
        (weights(), {"eta": -1.0}, "eta"),
        (weights(), {"factors": [1.0, -1.0, 1.0, 1.0]}, "factors"),
        (weights(torch.bfloat16), {}, "float32"),
        ([], {}, "no parameters"),
    ],
)
def test_invalid_arguments_raise_an_error_that_names_them(params, options, message):
    with pytest.raises(ValueError, match=message):
        Perturbation(params, **options)
