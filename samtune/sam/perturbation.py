"""The perturbation of Sharpness-Aware Minimization (Foret et al. 2021, eq. 2), and its undoing.

Each formula stands here twice: tensor by tensor, to be read (`dual`, `Perturbation.plain`), and fused, to be run
(`_dual_`, `Perturbation.add_`). The fused form works on lists of tensors (`torch._foreach_*`), without a Python loop
over the parameters and without waiting for an accelerator.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from samtune.distributed.collectives import flat_views

Tensors = list[torch.Tensor] | tuple[torch.Tensor, ...]


class Norms:
    """Norms over all tensors together. fsdp.ShardedNorms has the same methods for parts of tensors on several ranks."""

    def join(self, norm: torch.Tensor, q: float) -> torch.Tensor:
        """||.||_q of all tensors, from that of the tensors in this process -> ()."""
        return norm

    def largest(self, h: Tensors) -> torch.Tensor:
        """The largest |value| -> ()."""
        return torch.stack(torch._foreach_norm(h, math.inf)).max()

    def argmax(self, h: Tensors, sizes: torch.Tensor) -> torch.Tensor:
        """Index of the first largest value in the flat sizes |h|: (1,), or (0,) if it is in another process."""
        return sizes.argmax(keepdim=True)


@torch.no_grad()
def dual(h: Tensors, p: float) -> list[torch.Tensor]:
    """The point u of the sphere ||u||_p = 1 with the largest <h, u>, over all tensors together: shaped like h.

    With 1/p + 1/q = 1 it is sign(h) (|h| / ||h||_q)^(q-1), and <h, u> = ||h||_q. p = 2 gives h / ||h||_2, p = inf
    sign(h) with sign(0) = 0, and p = 1 only the largest |h|, one of equals. It does not depend on the scale
    of h. Zero h gives zero; one value that is not finite makes all of u NaN, so that it cannot be overlooked.
    """
    largest = float(torch.stack([x.abs().max() for x in h]).max())
    if largest == 0 or not math.isfinite(largest):
        return [torch.full_like(x, 0.0 if largest == 0 else math.nan) for x in h]
    h = [x / largest for x in h]  # powers of 1e30 and of 1e-30 would leave the range
    if p == 1:
        u = [torch.zeros_like(x) for x in h]
        first = next(i for i, x in enumerate(h) if x.abs().max() == 1)
        index = tuple((h[first].abs() == 1).nonzero()[0])
        u[first][index] = h[first][index]
        return u
    q = _conjugate(p)
    norm = sum(float(x.abs().pow(q).sum()) for x in h) ** (1 / q)
    return [x.sign() * (x.abs() / norm) ** (q - 1) for x in h]


def _dual_(h: list[torch.Tensor], p: float, norms: Norms) -> None:
    """`dual`, fused and in place; powers are taken of values in [0, 1]."""
    if p == 2:
        torch._foreach_mul_(h, _inverse(norms.join(_norm(h), 2)).to(h[0].dtype))
        return
    largest = norms.largest(h)
    visible = torch.where(largest.isfinite(), 1.0, math.nan)  # a sign forgets that it was NaN
    if p == 1:
        flat = h[0].new_empty(sum(x.numel() for x in h))
        torch._foreach_copy_(flat_views(flat, h), h)
        first = norms.argmax(h, flat.abs())
        u = torch.zeros_like(flat).scatter_(0, first, flat[first].sign()) * visible
        torch._foreach_copy_(h, flat_views(u, h))
        return
    sign = torch._foreach_sign(h)
    torch._foreach_mul_(sign, visible.to(h[0].dtype))
    q = _conjugate(p)
    torch._foreach_mul_(h, _inverse(largest))
    torch._foreach_abs_(h)
    # torch norms a list of tensors in one kernel only for the orders 1, 2 and inf.
    sums = torch._foreach_norm(h if q == 1 else torch._foreach_pow(h, q), 1)
    norm = torch.stack(sums).sum() ** (1 / q)
    torch._foreach_mul_(h, _inverse(norms.join(norm, q)).to(h[0].dtype))
    torch._foreach_pow_(h, q - 1)
    torch._foreach_mul_(h, sign)


def _conjugate(p: float) -> float:
    return 1.0 if math.isinf(p) else p / (p - 1)


def _norm(tensors: Tensors) -> torch.Tensor:
    """||.||_2 over all tensors together, whatever the scale of float32 values: their squares stay in double's range.

    An accelerator squares in double at the speed of its memory. A CPU does not, but there a value can be read without
    waiting: float32 is enough if the norm is neither huge nor tiny.
    """
    if tensors[0].is_cpu:
        norm: torch.Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(tensors, 2)))
        if 1e-12 < norm < 1e18:
            return norm
    wide: torch.Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(tensors, 2, dtype=torch.float64)))
    return wide


def _inverse(norm: torch.Tensor) -> torch.Tensor:
    """1 / norm; 1 for zero, where there is nothing to scale; NaN where the norm is not finite."""
    return torch.where(norm.isfinite(), 1 / torch.where(norm == 0, 1.0, norm), math.nan)


class Perturbation:
    """Parameters w, the ball around them, and a buffer for one copy of them, allocated once and used in every step.

    The ball is ||e / (rho_g T)||_p <= 1 over all tensors together. The perturbation e = rho_g T dual_p(rho_g T g) is
    its point that gains most along a gradient g, to first order.

    Args:
        params: w: one or more floating-point tensors on one device.
        p: the norm, in [1, inf].
        adaptive: for each parameter, whether T is |w| + eta, taken at the unperturbed w (ASAM, Kwon et al. 2021), or
            1. None is 1 for all.
        eta: keeps T away from 0, in weight units.
        factors: rho_g in units of rho for each parameter; 0 leaves it unperturbed and out of the norm. None is 1 for
            all.
        norms: how norms are taken over all tensors. None: the parameters are whole. ShardedNorms: params are one rank's
            parts of them, some perhaps empty, and all ranks perturb theirs at the same time.

    Raises:
        ValueError: no parameters, 16-bit parameters (rounding would swallow a perturbation of the usual size), p, eta
            or factors out of range.
    """

    def __init__(
        self,
        params: Sequence[torch.Tensor],
        *,
        p: float = 2.0,
        adaptive: Sequence[bool] | None = None,
        eta: float = 0.01,
        factors: Sequence[float] | None = None,
        norms: Norms | None = None,
    ) -> None:
        if not params:
            raise ValueError("there are no parameters to perturb")
        for w in params:
            if w.dtype not in (torch.float32, torch.float64):
                raise ValueError(f"weights are {w.dtype}; keep them in float32 and use autocast for 16-bit arithmetic")
        if not p >= 1:
            raise ValueError(f"p {p:g}: must be in [1, inf]")
        if not 0 <= eta < math.inf:
            raise ValueError(f"eta {eta:g}: must be finite and at least 0")
        self.params: list[torch.Tensor] = list(params)
        self.p, self.eta = p, eta
        self._norms = norms or Norms()
        self.adaptive = list(adaptive) if adaptive is not None else [False] * len(params)
        self.factors = list(factors) if factors is not None else [1.0] * len(params)
        if not all(0 <= factor < math.inf for factor in self.factors):
            raise ValueError(f"factors of rho {self.factors}: must be finite and at least 0")
        # T = |w| * slope + offset
        self._slopes = [float(a) for a in self.adaptive]
        self._offsets = [eta if a else 1.0 for a in self.adaptive]
        self._round = p == 2 and not any(self.adaptive) and all(factor == 1 for factor in self.factors)
        self._backup: list[torch.Tensor] = []

    def allocate_backup(self) -> None:
        """Allocate the buffer for the copy of w now; otherwise the first perturbation does."""
        if not self._backup:
            self._backup = [torch.empty_like(w, requires_grad=False) for w in self.params]

    @torch.no_grad()
    def plain(self, grads: Tensors, rho: float) -> list[torch.Tensor]:
        """The perturbation e of whole parameters at the present w for gradients g: new tensors, shaped like w.

        rho: radius in weight units.
        """
        s = self._half_axes(self.params, rho)
        # e = s dual_p(s g)
        u = dual([a * g for a, g in zip(s, grads, strict=True)], self.p)
        return [a * b for a, b in zip(s, u, strict=True)]

    def _half_axes(self, params: Tensors, rho: float) -> list[torch.Tensor]:
        """The half-axes s = rho_g T of the ball around these parameters."""
        return [
            rho * factor * (w.abs() + self.eta if adaptive else torch.ones_like(w))
            for w, factor, adaptive in zip(params, self.factors, self.adaptive, strict=True)
        ]

    def transposed_derivatives(
        self, grads: Tensors, vectors: Tensors, rho: float
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """(de/dg)^T v and (de/dw)^T v at the present w, for vectors v: two lists of tensors, shaped like w.

        The second is what T, which depends on w, adds; zero where the radius is not adaptive. Only for p = 2, where
        e = s (s g) / ||s g||_2. For zero g, where e has no derivative, both are zero.
        """
        g = [x.detach().requires_grad_() for x in grads]
        w = [x.detach().requires_grad_() for x in self.params]
        with torch.enable_grad():
            s = self._half_axes(w, rho)
            h = [a * b for a, b in zip(s, g, strict=True)]
            norm = torch.linalg.vector_norm(torch.cat([x.double().reshape(-1) for x in h]))
            norm = torch.where(norm == 0, math.inf, norm)
            e = [a * (b / norm).to(a.dtype) for a, b in zip(s, h, strict=True)]
        derivatives = torch.autograd.grad(e, [*g, *w], list(vectors), materialize_grads=True)
        return list(derivatives[: len(g)]), list(derivatives[len(g) :])

    @torch.no_grad()
    def add_(self, grads: Tensors, rho: float) -> None:
        """Add the perturbation to the parameters: `plain`, fused. Call it inside `perturbed`, since T is that of w."""
        if self._round:  # s = rho, so that e = rho g / ||g||_2: no temporary tensors are needed
            scale = rho * _inverse(self._norms.join(_norm(grads), 2))
            if scale.is_cpu:
                torch._foreach_add_(self.params, grads, alpha=scale.item())  # nothing to wait for on a CPU
            else:
                torch._foreach_add_(self.params, torch._foreach_mul(grads, scale.to(grads[0].dtype)))
            return
        # s = rho_g T: the half-axes of the ball
        s = torch._foreach_abs(self._backup)
        torch._foreach_mul_(s, self._slopes)
        torch._foreach_add_(s, self._offsets)
        torch._foreach_mul_(s, [rho * factor for factor in self.factors])
        # e = s dual_p(s g)
        e = list(torch._foreach_mul(s, grads))
        _dual_(e, self.p, self._norms)
        torch._foreach_mul_(e, s)
        torch._foreach_add_(self.params, e)

    @contextmanager
    def perturbed(self, grads: Tensors, rho: float) -> Iterator[None]:
        """Inside the block the parameters are w + e; afterwards they are w again, as `restored` says.

        grads: one tensor per parameter, in order. No reference to them outlives the perturbation.
        """
        with self.restored():
            self.add_(grads, rho)
            del grads
            yield

    @contextmanager
    def restored(self) -> Iterator[None]:
        """After the block the parameters are as before it, bit for bit, whatever happened.

        They are copied back into their own storage: subtracting e would lose bits, and keep a NaN for ever.
        """
        self.allocate_backup()
        with torch.no_grad():
            torch._foreach_copy_(self._backup, self.params)
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(self.params, self._backup)
