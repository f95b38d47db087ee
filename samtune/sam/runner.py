"""The two kinds of passes of Algorithm 1: one that finds the perturbation, and one whose gradient trains."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from samtune.sam.batch import Batch
from samtune.sam.losses import ScalarLoss
from samtune.sam.snapshot import BatchNormStats, batch_norms


class EagerRunner:
    """Runs forward-backward passes operation by operation; cuda_graphs.GraphRunner replays recorded ones.

    model: any. perturbed: the parameters whose gradient `ascend` computes. ranks: as `SAM.ranks`.
    """

    def __init__(self, model: nn.Module, perturbed: Sequence[nn.Parameter], ranks: Any) -> None:
        self.reason = ""
        """Why passes are not recorded as CUDA graphs, for reports."""
        self.unused: frozenset[nn.Parameter] = frozenset()
        """The perturbed parameters that the loss of the last `ascend` did not use: their gradient is zero there."""
        self._perturbed = perturbed
        self._ranks = ranks
        recomputes = any(getattr(module, "grad_checkpointing", False) for module in model.modules())
        # With recomputed activations a backward pass goes through these layers once more.
        self._recomputed_stats = BatchNormStats(batch_norms(model) if recomputes else [])

    @property
    def mode(self) -> str:
        """How passes are run, for reports."""
        return f"eager ({self.reason})" if self.reason else "eager"

    def ascend(self, loss: ScalarLoss, batch: Batch) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Loss at the present weights, and its gradient by the perturbed parameters; both detached.

        It is taken by autograd.grad, which touches neither `.grad` nor the hooks that reduce it over the ranks.
        """
        with self._ranks.no_sync():
            value = loss(*batch)
        with self._recomputed_stats.restored():
            grads = torch.autograd.grad(value, self._perturbed, allow_unused=True)
        pairs = list(zip(self._perturbed, grads, strict=True))
        self.unused = frozenset(w for w, grad in pairs if grad is None)
        return value.detach(), [torch.zeros_like(w, requires_grad=False) if g is None else g for w, g in pairs]

    def evaluate(self, loss: ScalarLoss, batch: Batch) -> torch.Tensor:
        """Loss at the present weights, detached, by a forward pass only."""
        with self._ranks.no_sync():
            return loss(*batch).detach()

    def descend(self, loss: ScalarLoss, batch: Batch, share: float, at_w: torch.Tensor | None = None) -> torch.Tensor:
        """Add the gradient of the loss, times share, to `.grad`; return the loss, detached.

        at_w: the loss at w, if the weights are perturbed. If it is not finite, the gradient becomes NaN.
        """
        value = loss(*batch)
        if at_w is not None:
            nan_unless_finite(value, at_w, share).backward()
        else:
            with self._recomputed_stats.restored():
                nan_unless_finite(value, value, share).backward()
        return value.detach()

    def release(self) -> None:
        """Free what is kept between passes: nothing."""


def nan_unless_finite(loss: torch.Tensor, at_w: torch.Tensor, share: float) -> torch.Tensor:
    """Loss x share -> (); its gradient is NaN if the loss at w is not finite."""
    at_w = at_w.detach().to(torch.promote_types(at_w.dtype, torch.float32))  # a 16-bit share would be off by 0.4 %
    return loss * torch.where(at_w.isfinite(), torch.full_like(at_w, share), math.nan)
