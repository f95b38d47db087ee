"""The training loss."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor, smoothing: float = 0.0) -> torch.Tensor:
    """Mean cross-entropy in nats, computed in float32: logits (batch, classes) -> ().

    labels: (batch,) classes, or (batch, classes) shares of mixed images.

    smoothing spreads that share of each target evenly over all classes (Szegedy et al. 2016, eq. 3).
    """
    return F.cross_entropy(logits.float(), labels, label_smoothing=smoothing)


def l2_penalty(weights: Sequence[torch.Tensor], strength: float) -> torch.Tensor:
    """Weight decay as a term of the loss, strength / 2 * ||weights||_2^2 -> (), as in Google's code for the paper."""
    return 0.5 * strength * torch.stack([w.square().sum() for w in weights]).sum()
