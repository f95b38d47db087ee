"""m-sharpness: how much the loss of m samples rises in a ball around the weights (Foret et al. 2021, section 4.1)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from samtune.sam.batch import Batch, num_samples, split
from samtune.sam.losses import Loss, as_scalar
from samtune.sam.perturbation import Perturbation


@dataclass(frozen=True)
class GroupSharpness:
    """The rise of one group's loss, in the unit of the loss.

    samples: m, or what was left for the last group. loss: at w. one_step: L(w + e) - L(w) for the e of SAM's step.
    maximum: the largest rise that the ascent found; at least one_step. last_rise: what the last step of the ascent
    added to it. The maximum is a lower bound; it has converged where last_rise is small.
    """

    samples: int
    loss: float
    one_step: float
    maximum: float
    last_rise: float


def group_sharpness(
    loss: Loss,
    perturbation: Perturbation,
    group: Batch,
    rho: float,
    *,
    steps: int = 20,
    starts: Sequence[Sequence[torch.Tensor]] = (),
    micro_batch: int | None = None,
    heartbeat: Callable[[], None] = lambda: None,
) -> GroupSharpness:
    """Max over ||e||_p <= rho of L(w + e) - L(w), where L is the mean loss of the group.

    The one-step value uses e = rho dual(g) at w, by the code of the SAM step. The ascent repeats it: its next e is
    rho dual(gradient at w + e), the point of the ball that gains most along the last gradient. For a convex loss no
    such step can fall (Journee et al. 2010); for a quadratic one it is the power method. The best of all steps counts.
    The weights are restored after each, bit for bit.

    Args:
        loss: (*batch) -> (), the mean over the samples it is given; the model in evaluation mode.
        perturbation: the parameters and their ball.
        group: the samples.
        rho: radius in weight units.
        steps: number of ascent steps from each start.
        starts: further starts: directions that replace the first gradient, each with a tensor for each parameter.
        micro_batch: the most samples that pass through the model at once; None: the whole group.
        heartbeat: called after each forward-backward pass over the group.
    """
    scalar_loss = as_scalar(loss)
    n = num_samples(group) or 1
    parts = [(part, (num_samples(part) or n) / n) for part in split(group, micro_batch or n)]

    def loss_and_gradient() -> tuple[float, list[torch.Tensor]]:
        total, sums = 0.0, [torch.zeros_like(w) for w in perturbation.params]
        for part, share in parts:
            value = scalar_loss(*part)
            grads = torch.autograd.grad(value, perturbation.params, materialize_grads=True)
            torch._foreach_add_(sums, list(grads), alpha=share)
            total += share * float(value.detach())
        heartbeat()
        return total, sums

    at_w, gradient = loss_and_gradient()
    one_step = maximum = last_rise = 0.0
    leader = 0  # the start from which the maximum was found
    for number, start in enumerate([gradient, *map(list, starts)]):
        direction, best = start, 0.0  # best: the largest rise from this start
        for step in range(steps):
            with perturbation.perturbed(direction, rho):
                value, direction = loss_and_gradient()
            if number == 0 and step == 0:
                one_step = best = maximum = value - at_w
            rise = max(0.0, value - at_w - best)
            best += rise
            if best > maximum or number == leader:
                maximum, last_rise, leader = best, rise, number
    return GroupSharpness(n, at_w, one_step, maximum, last_rise)


@dataclass(frozen=True)
class MSharpness:
    """The m-sharpness of a data set: means over its groups of m samples, weighted by their samples.

    not_converged: share of the groups whose ascent still rose in its last step by more than 1 % of the maximum.
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
        not_converged=sum(group.last_rise > 0.01 * group.maximum for group in groups) / len(groups),
    )
