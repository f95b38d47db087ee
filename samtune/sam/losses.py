"""The training loss, and losses of other loops."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F

Loss = Callable[..., Any]  # returns a scalar tensor, or an object that has one as `.loss` or under the key "loss"
ScalarLoss = Callable[..., torch.Tensor]


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor, smoothing: float = 0.0) -> torch.Tensor:
    """Mean cross-entropy in nats, computed in float32: logits (batch, classes) -> ().

    labels: (batch,) classes, or (batch, classes) shares of mixed images. smoothing: the share of each target that is
    spread evenly over all classes (Szegedy et al. 2016, eq. 3).
    """
    return F.cross_entropy(logits.float(), labels, label_smoothing=smoothing)


def l2_penalty(weights: Sequence[torch.Tensor], strength: float) -> torch.Tensor:
    """Weight decay as a term of the loss, strength / 2 * ||weights||_2^2 -> (), as in Google's code for the paper."""
    penalty: torch.Tensor = _L2Penalty.apply(strength, *weights)
    return penalty


class _L2Penalty(torch.autograd.Function):
    """`l2_penalty` in a few operations over all weights, where autograd would go through them one by one."""

    @staticmethod
    def forward(ctx: Any, strength: float, *weights: torch.Tensor) -> torch.Tensor:
        ctx.strength = strength
        ctx.save_for_backward(*weights)
        norm: torch.Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(weights, 2)))
        return 0.5 * strength * norm.square()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        scaled = torch._foreach_mul(ctx.saved_tensors, grads[0] * ctx.strength)
        return None, *scaled


def as_scalar(loss: Loss) -> ScalarLoss:
    """The loss as a function that returns a tensor of shape (), or raises TypeError or ValueError."""

    def scalar(*batch: Any) -> torch.Tensor:
        value = loss(*batch)
        if isinstance(value, Mapping) and "loss" in value:
            value = value["loss"]
        value = getattr(value, "loss", value)
        if value is None:
            raise TypeError("the loss is None: a model's output has one if it is given the labels")
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"the loss is a {type(value).__name__}: return a scalar tensor, or an output with `.loss`")
        if value.numel() != 1:
            raise ValueError(f"the loss has the shape {tuple(value.shape)}: return its mean over the samples")
        if not value.requires_grad:
            raise ValueError("the loss has no gradient: it is detached, or backward is called under torch.no_grad()")
        return value if value.ndim == 0 else value.reshape(())

    return scalar


@contextmanager
def explain_second_backward() -> Iterator[None]:
    """Turn torch's error for a loss that calls backward itself, as closures for other SAMs do, into a ValueError."""
    try:
        yield
    except RuntimeError as error:
        if "backward through the graph a second time" in str(error):
            raise ValueError("the loss calls backward itself: return it, and sam.backward does the rest") from error
        raise
