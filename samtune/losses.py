"""The training loss."""

import torch
import torch.nn.functional as F


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor, smoothing: float = 0.0) -> torch.Tensor:
    """Mean cross-entropy in nats, computed in float32: logits (batch, classes), labels (batch,) -> ().

    smoothing spreads that share of each target evenly over all classes (Szegedy et al. 2016, eq. 3).
    """
    return F.cross_entropy(logits.float(), labels, label_smoothing=smoothing)
