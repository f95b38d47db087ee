"""Modules whose backward pass has other random coefficients than their forward pass: Shake-Shake, ShakeDrop."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn


def shaking_modules(model: nn.Module) -> list[Any]:
    """The modules with an attribute `true_gradient`: whether a backward pass takes the forward pass's coefficients."""
    return [module for module in model.modules() if hasattr(module, "true_gradient")]


@contextmanager
def true_gradient(modules: Sequence[Any]) -> Iterator[None]:
    """Inside the block, gradients are the derivatives of what the forward pass computes.

    The block must hold the backward pass too, since with --grad-checkpointing that repeats the forward pass.
    """
    try:
        for module in modules:
            module.true_gradient = True
        yield
    finally:
        for module in modules:
            module.true_gradient = False
