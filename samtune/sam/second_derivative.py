"""The derivative of a gradient along vectors: products with the Hessian, without the matrix (Pearlmutter 1994)."""

from collections.abc import Sequence

import torch
from torch import nn

HESSIAN_PASSES = 3
"""A product with the Hessian in forward-backward passes, each of which is three forward passes' work.

It goes forward (1), backward (2), and backward through both (6).
"""


def differentiable_gradient(
    loss: torch.Tensor, params: Sequence[nn.Parameter], vectors: Sequence[torch.Tensor]
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The gradient of a loss () by the parameters, to be differentiated again, and the vectors that belong to it.

    vectors: one for each parameter. A gradient that is constant, such as that of a linear loss, or of a parameter that
    the loss does not use, has no derivative: it is left out of both lists, which may be empty.
    """
    grads = torch.autograd.grad(loss, params, create_graph=True, materialize_grads=True)
    kept = [(g, v) for g, v in zip(grads, vectors, strict=True) if g.requires_grad]
    return [g for g, _ in kept], [v for _, v in kept]
