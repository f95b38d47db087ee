"""The loss along lines and planes through the weights (Li et al. 2018)."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn


def filter_normalised_direction(model: nn.Module, seed: int) -> dict[str, torch.Tensor]:
    """A direction from N(0, I), scaled filter by filter to the norm of the weights: parameter name -> tensor.

    A filter is the part of a weight that computes one output: one index of its first dimension. Biases and the
    parameters of norm layers, which have fewer than two dimensions, do not move (Li et al. 2018, section 4). So a slice
    does not change if a filter is scaled and the normalisation after it undoes the scale. With one seed, models of one
    architecture have the same directions before scaling.
    """
    generator = torch.Generator().manual_seed(seed)
    direction = {}
    for name, w in model.named_parameters():
        d = torch.randn(w.shape, generator=generator, dtype=torch.float64).to(w)
        if w.ndim < 2:
            direction[name] = torch.zeros_like(w)
            continue
        dims = tuple(range(1, w.ndim))
        norms = torch.linalg.vector_norm(w.detach(), dim=dims, keepdim=True)
        direction[name] = d * norms / torch.linalg.vector_norm(d, dim=dims, keepdim=True)
    return direction


def line_to(model: nn.Module, other: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The direction from a model's weights and buffers to those of another model of its architecture: name -> tensor.

    Integer buffers, such as counters, do not move. Raises KeyError for a name that the other does not have.
    """
    own = model.state_dict()
    return {name: other[name].to(w) - w for name, w in own.items() if w.is_floating_point()}


@contextmanager
def moved(model: nn.Module, directions: Sequence[Mapping[str, torch.Tensor]], at: Sequence[float]) -> Iterator[None]:
    """Inside the block the model is at w + sum_i at_i direction_i; afterwards it is at w again, bit for bit."""
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    names = list(dict.fromkeys(name for direction in directions for name in direction))
    kept = {name: tensors[name].detach().clone() for name in names}
    try:
        with torch.no_grad():
            for direction, distance in zip(directions, at, strict=True):
                for name, d in direction.items():
                    tensors[name].add_(d, alpha=distance)
        yield
    finally:
        with torch.no_grad():
            for name, w in kept.items():
                tensors[name].copy_(w)
