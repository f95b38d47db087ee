"""The perturbation of Sharpness-Aware Minimization (Foret et al. 2021), and its undoing.

Both work on whole lists of tensors (`torch._foreach_*`): no Python loop over the parameters, and no value is read back
from the device.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch


@torch.no_grad()
def perturbation(grads: list[torch.Tensor] | tuple[torch.Tensor, ...], rho: float) -> list[torch.Tensor]:
    """The perturbation e = rho * g / ||g||_2 (eq. 2 for p = 2): new tensors, shaped like the gradients g.

    rho: radius in weight units, so that ||e||_2 = rho over all tensors together. e does not depend on the scale of g:
    dividing by max |g| first keeps the squares of 1e-30 and of 1e30 in range. All-zero gradients give e = 0. A
    gradient that is not finite makes e NaN, which the loss at w + e then shows.
    """
    largest = torch.stack(torch._foreach_norm(grads, float("inf"))).max()
    e = torch._foreach_div(grads, torch.where(largest == 0, 1.0, largest))
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(e, 2)))  # between 1 and sqrt(number of weights)
    torch._foreach_mul_(e, rho / torch.where(norm == 0, 1.0, norm))
    return list(e)


class Weights:
    """Parameters w with room for one copy of them, taken once and used in every step."""

    def __init__(self, params: Sequence[torch.nn.Parameter]) -> None:
        """Raises ValueError for 16-bit parameters: rounding would swallow a perturbation of the usual size."""
        for p in params:
            if p.dtype not in (torch.float32, torch.float64):
                raise ValueError(f"weights are {p.dtype}; keep them in float32 and use autocast for 16-bit arithmetic")
        self.params: list[torch.Tensor] = list(params)
        self._backup = [torch.empty_like(p, requires_grad=False) for p in self.params]

    @contextmanager
    def perturbed(self, e: list[torch.Tensor]) -> Iterator[None]:
        """Inside the block the parameters are w + e; afterwards they are w again, bit for bit, whatever happened.

        They come back by copy, in their own storage: subtracting e would lose bits, and leave a NaN for ever.
        e: one tensor per parameter, in order; the list is emptied, so that its memory is free during the second pass.
        """
        with torch.no_grad():
            torch._foreach_copy_(self._backup, self.params)
        try:
            with torch.no_grad():
                torch._foreach_add_(self.params, e)
            e.clear()
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(self.params, self._backup)
