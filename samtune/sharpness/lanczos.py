"""Eigenvalues and spectral density of a symmetric operator, from products with vectors only (Lanczos 1950).

The code knows no networks: an operator is a function v -> A v for vectors of shape (dim,).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

Matvec = Callable[[torch.Tensor], torch.Tensor]  # (dim,) -> (dim,)
Floats = npt.NDArray[np.float64]


class Lanczos:
    """The Lanczos process: an orthonormal basis q_1, ..., q_k of the Krylov space of a start vector, in which the
    operator is the tridiagonal matrix T with diagonal alpha and off-diagonal beta.

    Each new vector is orthogonalised twice against all earlier ones, since rounding would otherwise bring converged
    eigenvalues back as copies ("full reorthogonalisation"). Memory: one vector for each step.

    matvec: the operator. start: (dim,), not zero; the basis has its dtype and device.
    """

    def __init__(self, matvec: Matvec, start: torch.Tensor) -> None:
        self.matvec, self.dim = matvec, len(start)
        self._next = start / torch.linalg.vector_norm(start)
        self._basis: list[torch.Tensor] = []
        self.alpha: list[float] = []
        self.beta: list[float] = []
        """beta[j] couples step j to step j + 1: the norm of A q_j after orthogonalisation."""
        self.is_exhausted = False
        """Whether the Krylov space is invariant: the eigenvalues of T are then exactly the eigenvalues of the operator
        whose eigenvectors the start vector has a part in."""

    def __len__(self) -> int:
        """Number of steps taken."""
        return len(self.alpha)

    def step(self) -> None:
        """Take one step: one product with the operator."""
        q = self._next
        self._basis.append(q)
        w = self.matvec(q)
        self.alpha.append(float(w @ q))
        for _ in range(2):
            for other in self._basis:
                w = w - (w @ other) * other
        self.beta.append(float(torch.linalg.vector_norm(w)))
        # Below this the rest is rounding, and a direction made of it would be arbitrary.
        scale = max(map(abs, self.alpha + self.beta))
        self.is_exhausted = self.beta[-1] <= 10 * torch.finfo(w.dtype).eps * scale or len(self) == len(w)
        if not self.is_exhausted:
            self._next = w / self.beta[-1]

    def ritz(self) -> tuple[Floats, Floats]:
        """Eigenvalues of T in ascending order, (k,), and its eigenvectors in the columns of (k, k)."""
        values, vectors = np.linalg.eigh(np.diag(self.alpha) + np.diag(self.beta[:-1], 1) + np.diag(self.beta[:-1], -1))
        return values, vectors

    def vector(self, coefficients: Floats) -> torch.Tensor:
        """The vector with these coefficients in the basis: (k,) -> (dim,)."""
        total = torch.zeros_like(self._next)
        for coefficient, q in zip(coefficients.tolist(), self._basis, strict=True):
            total.add_(q, alpha=coefficient)
        return total


@dataclass(frozen=True)
class Eigenpairs:
    """The largest eigenvalues of an operator, the largest first.

    values: (k,). vectors: k of shape (dim,), of norm 1. residuals: (k,) ||A v - value v||; the operator has an
    eigenvalue within this distance of the value. steps: number of Lanczos steps, without the products for the
    residuals. converged: whether every residual is at most twice the tolerance.
    """

    values: list[float]
    vectors: list[torch.Tensor]
    residuals: list[float]
    steps: int
    converged: bool


def top_eigenpairs(
    matvec: Matvec, start: torch.Tensor, k: int, *, tolerance: float = 1e-3, max_steps: int = 100
) -> Eigenpairs:
    """The k algebraically largest eigenvalues, with vectors and residuals.

    start: (dim,), a random vector. tolerance: of a residual, in units of the largest |eigenvalue|. max_steps: the most
    Lanczos steps, each one product; k further products measure the residuals.

    A multiple eigenvalue is found once: a Krylov space holds one of its eigenvectors.
    """
    return continued_to_top(Lanczos(matvec, start), k, tolerance=tolerance, max_steps=max_steps)


def continued_to_top(process: Lanczos, k: int, *, tolerance: float, max_steps: int) -> Eigenpairs:
    """`top_eigenpairs` by a process that may have taken some steps already."""
    matvec, k = process.matvec, min(k, process.dim)
    while len(process) < max_steps and not process.is_exhausted:
        process.step()
        if len(process) >= k:
            values, vectors = process.ritz()
            # ||A v - theta v|| = |beta_k s_k|, where s is the eigenvector of T.
            estimates = abs(process.beta[-1] * vectors[-1, -k:])
            if (estimates <= tolerance * abs(values).max()).all():
                break
    values, vectors = process.ritz()
    found = range(len(values) - 1, max(-1, len(values) - 1 - k), -1)
    pairs = [(float(values[i]), process.vector(vectors[:, i])) for i in found]
    residuals = [float(torch.linalg.vector_norm(matvec(v) - value * v)) for value, v in pairs]
    limit = tolerance * float(abs(values).max())
    return Eigenpairs(
        values=[value for value, _ in pairs],
        vectors=[v for _, v in pairs],
        residuals=residuals,
        steps=len(process),
        converged=all(residual <= 2 * limit for residual in residuals),
    )


@dataclass(frozen=True)
class Spectrum:
    """The spectral density of an operator by stochastic Lanczos quadrature (Ghorbani, Krishnan and Xiao 2019).

    A probe v, a random vector of norm 1, gives nodes and weights with sum_i weight_i f(node_i) = v' f(A) v for every
    polynomial f up to degree 2 steps - 1; the mean over probes estimates trace(f(A)) / dim.

    nodes, weights: for each probe (steps,); the weights of a probe sum to 1.
    """

    nodes: list[Floats]
    weights: list[Floats]

    def moment(self, power: int) -> tuple[float, float]:
        """Estimate of trace(A^power) / dim, and its standard error over probes (nan for a single one)."""
        each = np.array([float(w @ x**power) for x, w in zip(self.nodes, self.weights, strict=True)])
        error = float(each.std(ddof=1) / math.sqrt(len(each))) if len(each) > 1 else math.nan
        return float(each.mean()), error

    def grid(self, points: int = 400, margin: float = 0.05) -> Floats:
        """Points from below the smallest node to above the largest: (points,)."""
        low, high = min(map(np.min, self.nodes)), max(map(np.max, self.nodes))
        room = margin * max(high - low, 1e-12)
        return np.linspace(low - room, high + room, points)

    def density(self, at: Floats, width: float) -> Floats:
        """Density at these eigenvalues for each probe, smoothed by a Gaussian: (probes, len(at)).

        width: standard deviation of the Gaussian, in units of eigenvalues.
        """
        curves = []
        for nodes, weights in zip(self.nodes, self.weights, strict=True):
            kernel = np.exp(-0.5 * ((at[:, None] - nodes) / width) ** 2) / (width * math.sqrt(2 * math.pi))
            curves.append(kernel @ weights)
        return np.stack(curves)


def spectrum(matvec: Matvec, probes: Sequence[torch.Tensor], steps: int) -> Spectrum:
    """The spectral density of an operator, from probes of shape (dim,) drawn from N(0, I).

    Takes len(probes) x steps products.
    """
    return spectrum_of([take_steps(Lanczos(matvec, probe), steps) for probe in probes])


def take_steps(process: Lanczos, steps: int) -> Lanczos:
    """The process after this number of steps, or fewer if its space is exhausted."""
    while len(process) < steps and not process.is_exhausted:
        process.step()
    return process


def spectrum_of(processes: Sequence[Lanczos]) -> Spectrum:
    """The spectral density from processes that have taken their steps from random probes."""
    ritz = [process.ritz() for process in processes]
    return Spectrum([values for values, _ in ritz], [vectors[0] ** 2 for _, vectors in ritz])
