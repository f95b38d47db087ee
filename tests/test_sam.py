"""The perturbation and its undoing."""

import pytest
import torch

from samtune.sam import Weights, perturbation

RHO = 0.05


def gradients(scale=1.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = [(4, 3, 3, 3), (7,), (), (5, 2)]
    return [scale * torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def flat(tensors):
    return torch.cat([t.reshape(-1) for t in tensors])


def test_perturbation_has_length_rho_and_the_direction_of_the_gradient():
    g = gradients()
    e = flat(perturbation(g, RHO))
    assert e.norm().item() == pytest.approx(RHO, rel=1e-12)
    assert (flat(g) @ e).item() == pytest.approx(RHO * flat(g).norm().item(), rel=1e-12)


def test_no_point_of_the_sphere_gains_more_than_the_perturbation():
    g, best = flat(gradients()), flat(perturbation(gradients(), RHO))
    other = torch.randn(1000, len(g), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    other = RHO * other / other.norm(dim=1, keepdim=True)
    assert (other @ g).max() < best @ g


@pytest.mark.parametrize("exponent", [-30, -20, -3, 3, 20, 30])
def test_perturbation_does_not_depend_on_the_scale_of_float32_gradients(exponent):
    expected = flat(perturbation(gradients(dtype=torch.float32), RHO))
    scaled = flat(perturbation([g * 10.0**exponent for g in gradients(dtype=torch.float32)], RHO))
    torch.testing.assert_close(scaled, expected, rtol=1e-5, atol=0)


def test_one_tensor_in_pieces_gives_the_same_perturbation():
    whole = torch.randn(60, dtype=torch.float64)
    pieces = [
        whole[:7].clone(),
        whole[7:31].reshape(4, 6).clone(),
        whole[31:32].reshape(()).clone(),
        whole[32:].clone(),
    ]
    torch.testing.assert_close(flat(perturbation(pieces, RHO)), perturbation([whole], RHO)[0], rtol=1e-13, atol=0)


def test_zero_gradients_do_not_perturb():
    assert not flat(perturbation([torch.zeros(3), torch.zeros(2, 2)], RHO)).any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_gradients_that_are_not_finite_show_in_the_perturbation(bad):
    g = gradients()
    g[1][3] = bad
    assert flat(perturbation(g, RHO)).isnan().any()


def test_gradients_are_left_as_they_were_even_where_two_parameters_share_one():
    shared = torch.ones(3)
    e = perturbation([shared, shared], rho=1.0)
    assert torch.equal(shared, torch.ones(3))
    assert flat(e).norm().item() == pytest.approx(1.0)


@pytest.fixture
def params():
    torch.manual_seed(0)
    shapes = [(4, 3, 3, 3), (7,), (), (5, 2)]
    made = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    made[0].data = made[0].data.to(memory_format=torch.channels_last)
    return made


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_weights_come_back_bit_for_bit_in_their_own_storage(params, error):
    before = [p.detach().clone() for p in params]
    places = [p.data_ptr() for p in params]
    e = [torch.full_like(p, 1e-3) for p in params]

    def perturb_and_fail():
        with Weights(params).perturbed(e):
            for p, w in zip(params, before, strict=True):
                assert torch.equal(p, w + 1e-3)
            if error is not None:
                raise error

    if error is None:
        perturb_and_fail()
    else:
        with pytest.raises(error):
            perturb_and_fail()
    assert all(torch.equal(p, w) for p, w in zip(params, before, strict=True))
    assert [p.data_ptr() for p in params] == places


def test_weights_come_back_even_from_a_perturbation_that_is_not_finite(params):
    before = [p.detach().clone() for p in params]
    with Weights(params).perturbed([torch.full_like(p, float("nan")) for p in params]):
        pass
    assert all(torch.equal(p, w) for p, w in zip(params, before, strict=True))


def test_sixteen_bit_weights_are_refused():
    with pytest.raises(ValueError, match="float32"):
        Weights([torch.nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))])
