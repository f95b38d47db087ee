"""m-sharpness: how much the loss of m samples rises in a ball around the weights (Foret et al. 2021, section 4.1)."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from samtune.sam.batch import Batch, num_samples, split
from samtune.sam.losses import Loss, as_scalar
from samtune.sam.perturbation import Perturbation


@dataclass(frozen=True)
class GroupSharpness:
    """The rise of one group's loss, in the unit of the loss.

    samples: m, or what was left for the last group. loss: at w. one_step: L(w + e) - L(w) for the e of SAM's step;
    negative where the loss falls there. maximum: the largest rise that was found; at least 0 and at least one_step.
    gap: <g, s - e>, where e is the place of the maximum, g the gradient at w + e and s the point of the ball that gains
    most along g. It is 0 at a local maximum, and elsewhere what the linear model still gains; nan if unknown.
    """

    samples: int
    loss: float
    one_step: float
    maximum: float
    gap: float

    @property
    def is_converged(self) -> bool:
        """Whether the linear model at the maximum gains no more than 1 % of it."""
        return self.gap <= 0.01 * self.maximum


def group_sharpness(
    loss: Loss,
    perturbation: Perturbation,
    group: Batch,
    rho: float,
    *,
    steps: int = 20,
    starts: Sequence[Sequence[torch.Tensor]] = (),
    micro_batch: int | None = None,
    progress: Callable[[], None] = lambda: None,
) -> GroupSharpness:
    """Max over ||e||_p <= rho of L(w + e) - L(w), where L is the mean loss of the group.

    The one-step value has the perturbation of SAM's step. The search is that of Frank and Wolfe: it moves from e
    towards s, the point of the ball that gains most along the gradient at w + e, the whole way at first. Where the loss
    falls it goes back, and half as far from then on; where it rises, twice as far. So e never leaves the ball, whatever
    its norm, and no step counts that falls. For a convex loss the whole way always rises; for a quadratic one it is the
    power method. The first search starts at e = 0, so that its first step is SAM's; each further one on the sphere, at
    the dual of a given direction. The weights are restored after each pass, bit for bit.

    Args:
        loss: (*batch) -> (), the mean over the samples it is given; the model in evaluation mode.
        perturbation: the parameters and their ball.
        group: the samples.
        rho: radius in weight units.
        steps: number of passes of each search, besides that at w.
        starts: directions of further searches, each with a tensor for each parameter.
        micro_batch: the most samples that pass through the model at once; None: the whole group.
        progress: called after each forward-backward pass over the group.
    """
    scalar_loss = as_scalar(loss)
    n = num_samples(group) or 1
    parts = [(part, (num_samples(part) or n) / n) for part in split(group, micro_batch or n)]

    def loss_and_gradient(e: Sequence[torch.Tensor]) -> tuple[float, list[torch.Tensor]]:
        """L(w + e) and its gradient."""
        total, sums = 0.0, [torch.zeros_like(w) for w in perturbation.params]
        with perturbation.restored():
            with torch.no_grad():
                torch._foreach_add_(perturbation.params, list(e))
            for part, share in parts:
                value = scalar_loss(*part)
                grads = torch.autograd.grad(value, perturbation.params, materialize_grads=True)
                torch._foreach_add_(sums, list(grads), alpha=share)
                total += share * float(value.detach())
        progress()
        return total, sums

    def ascend(
        e: list[torch.Tensor], rise: float, gradient: list[torch.Tensor], steps: int
    ) -> tuple[float, float, float]:
        """Search from e, where the loss is higher than at w by `rise`: the largest rise, its gap, the first one."""
        first, fraction = math.nan, 1.0
        for step in range(steps):
            ahead = torch._foreach_lerp(e, perturbation.plain(gradient, rho), fraction)
            value, gradient_ahead = loss_and_gradient(ahead)
            first = value - at_w if step == 0 else first
            if value - at_w >= rise:
                e, gradient, rise, fraction = list(ahead), gradient_ahead, value - at_w, min(1.0, 2 * fraction)
            else:
                fraction /= 2
        s = perturbation.plain(gradient, rho)
        gap = math.fsum(float((g * (b - a)).sum()) for g, a, b in zip(gradient, e, s, strict=True))
        return rise, gap, first

    zero = [torch.zeros_like(w) for w in perturbation.params]
    at_w, gradient = loss_and_gradient(zero)
    maximum, gap, one_step = ascend(zero, 0.0, gradient, steps)
    for start in starts:
        e = perturbation.plain(list(start), rho)
        value, gradient = loss_and_gradient(e)
        rise, gap_there, _ = ascend(e, value - at_w, gradient, steps - 1)
        if rise > maximum:
            maximum, gap = rise, gap_there
    return GroupSharpness(n, at_w, one_step, maximum, gap)


@dataclass(frozen=True)
class MSharpness:
    """The m-sharpness of a data set: means over its groups of m samples, weighted by their samples.

    not_converged: share of the groups whose search has not converged.
    """

    m: int
    groups: int
    loss: float
    one_step: float
    maximum: float
    not_converged: float


def mean_over_groups(m: int, groups: Sequence[GroupSharpness]) -> MSharpness:
    """The m-sharpness of a data set from that of its groups."""
    total = sum(group.samples for group in groups)

    def mean(values: Sequence[float]) -> float:
        return sum(group.samples * value for group, value in zip(groups, values, strict=True)) / total

    return MSharpness(
        m=m,
        groups=len(groups),
        loss=mean([group.loss for group in groups]),
        one_step=mean([group.one_step for group in groups]),
        maximum=mean([group.maximum for group in groups]),
        not_converged=sum(not group.is_converged for group in groups) / len(groups),
    )
