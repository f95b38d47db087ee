"""The loss along lines and planes through the weights (Li et al. 2018)."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from samtune.sharpness.directions import random_directions


def filter_normalised_direction(model: nn.Module, seed: int) -> dict[str, torch.Tensor]:
    """A direction from N(0, I), scaled filter by filter to the norm of the weights: parameter name -> tensor.

    A filter is the part of a weight that computes one output: one index of its first dimension. Biases and the
    parameters of norm layers, which have fewer than two dimensions, do not move (Li et al. 2018, section 4). So a slice
    does not change if a filter is scaled and the normalisation after it undoes the scale. With one seed, models of one
    architecture have the same directions before scaling.
    """
    named = dict(model.named_parameters())
    direction = {}
    for (name, w), d in zip(named.items(), random_directions([*named.values()], seed), strict=True):
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
    kept = model.state_dict().keys()  # a buffer may not be stored
    return {
        name: other[name].to(w) - w for name, w in _tensors(model).items() if name in kept and w.is_floating_point()
    }


@contextmanager
def moved(model: nn.Module, directions: Sequence[Mapping[str, torch.Tensor]], at: Sequence[float]) -> Iterator[None]:
    """Inside the block the model is at w + sum_i at_i direction_i; afterwards it is at w again, bit for bit."""
    tensors = _tensors(model)
    names = list(dict.fromkeys(name for direction in directions for name in direction))
    kept = {name: tensors[name].detach().clone() for name in names}
    try:
        with torch.no_grad():
            for direction, distance in zip(directions, at, strict=True):
                for name, d in direction.items():
                    tensors[name].add_(d, alpha=distance)
            for name in names:
                if name.endswith("running_var"):  # beyond the end of a line it would be negative
                    tensors[name].clamp_(min=0)
        yield
    finally:
        with torch.no_grad():
            for name, w in kept.items():
                tensors[name].copy_(w)


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers by name, those that are shared under their first one."""
    return dict(model.named_parameters()) | dict(model.named_buffers())
