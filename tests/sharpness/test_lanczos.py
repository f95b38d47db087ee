"""Lanczos against matrices whose spectrum is known, without a network."""

import numpy as np
import pytest
import torch

from samtune.sharpness.lanczos import Lanczos, spectrum, top_eigenpairs


def draw(n, seed=0):
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def diagonal(n):
    values = torch.arange(1, n + 1, dtype=torch.float64)
    return lambda v: values * v


def symmetric(eigenvalues, seed=0):
    q, _ = torch.linalg.qr(torch.stack([draw(len(eigenvalues), seed + i) for i in range(len(eigenvalues))]))
    return q @ torch.diag(torch.tensor(eigenvalues, dtype=torch.float64)) @ q.T


def test_the_largest_eigenvalues_of_diag_1_to_n_are_n_and_those_below_it():
    found = top_eigenpairs(diagonal(200), draw(200), 5, tolerance=1e-10, max_steps=200)
    assert found.values == pytest.approx([200, 199, 198, 197, 196], abs=1e-8)
    assert found.converged


def test_all_steps_give_the_whole_spectrum_once_and_no_copies():
    process = Lanczos(diagonal(60), draw(60))
    while not process.is_exhausted:
        process.step()
    assert len(process) == 60
    assert process.ritz()[0] == pytest.approx(np.arange(1, 61), abs=1e-8)


def test_vectors_have_norm_1_and_the_residuals_that_are_stated():
    a = symmetric([-3.0, -1.0, 0.0, 0.5, 2.0, 7.0])
    found = top_eigenpairs(a.mv, draw(6, 9), 3, tolerance=1e-12)
    assert found.values == pytest.approx([7, 2, 0.5], abs=1e-10)
    for value, v, residual in zip(found.values, found.vectors, found.residuals, strict=True):
        assert float(v.norm()) == pytest.approx(1)
        assert float((a @ v - value * v).norm()) == pytest.approx(residual, abs=1e-12)


def test_the_largest_are_those_with_their_sign_and_not_those_of_largest_size():
    assert top_eigenpairs(symmetric([-9.0, -1.0, 2.0, 3.0]).mv, draw(4, 5), 1).values == pytest.approx([3])


def test_what_has_not_converged_says_so_and_its_residual_bounds_the_error():
    found = top_eigenpairs(diagonal(500), draw(500), 1, tolerance=1e-9, max_steps=10)
    assert not found.converged
    assert found.steps == 10
    assert 0 < 500 - found.values[0] <= found.residuals[0] * 10


def test_an_invariant_space_ends_the_process():
    start = torch.zeros(10, dtype=torch.float64)
    start[2] = start[5] = 1.0
    found = top_eigenpairs(diagonal(10), start, 5)
    assert found.steps == 2
    assert found.values == pytest.approx([6, 3])


def test_a_density_integrates_to_1_and_has_the_moments_of_the_matrix():
    n = 300
    found = spectrum(diagonal(n), [draw(n, seed) for seed in range(12)], 50)
    exact = np.arange(1, n + 1)
    for power in (1, 2):
        mean, error = found.moment(power)
        assert abs(mean - (exact**power).mean()) < 4 * error
    at = found.grid(4000, margin=0.2)
    assert np.trapezoid(found.density(at, 5.0), at, axis=1) == pytest.approx(np.ones(12), abs=1e-3)


def test_the_quadrature_is_exact_for_a_probe_and_polynomials_up_to_twice_its_steps():
    a = symmetric([-2.0, -1.0, 0.0, 1.0, 3.0, 4.0, 5.0, 8.0])
    probe = draw(8, 3)
    found = spectrum(a.mv, [probe], 4)
    v = probe / probe.norm()
    for power in range(8):
        exact = float(v @ torch.linalg.matrix_power(a, power) @ v)
        assert found.moment(power)[0] == pytest.approx(exact, rel=1e-9)


def test_one_eigenvalue_is_a_peak_of_the_width_that_was_asked_for():
    found = spectrum(lambda v: 3 * v, [draw(20)], 10)
    at = np.array([2.0, 3.0, 4.0])
    height = 1 / (0.5 * np.sqrt(2 * np.pi))
    assert found.density(at, 0.5)[0] == pytest.approx([height * np.exp(-2), height, height * np.exp(-2)])
