"""Models that multiply gradients by other random coefficients than activations: Shake-Shake, ShakeDrop."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn


def shaking_modules(model: nn.Module) -> list[Any]:
    """The modules that say by an attribute `true_gradient` which coefficients their next backward pass takes."""
    return [module for module in model.modules() if hasattr(module, "true_gradient")]


@contextmanager
def true_gradient(modules: Sequence[Any]) -> Iterator[None]:
    """In the block, gradients are the derivatives of what the forward pass computes.

    The block must hold the backward pass too: with --grad-checkpointing it computes the forward pass again.
    """
    try:
        for module in modules:
            module.true_gradient = True
        yield
    finally:
        for module in modules:
            module.true_gradient = False
