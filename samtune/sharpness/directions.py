"""Random directions in the space of a model's parameters."""

from collections.abc import Sequence

import torch


def random_directions(params: Sequence[torch.Tensor], seed: int) -> list[torch.Tensor]:
    """A direction from N(0, I), one tensor for each parameter; a seed gives the same on every rank and device."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(w.shape, generator=generator, dtype=torch.float64).to(w) for w in params]
