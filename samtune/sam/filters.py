"""Which parameters of a model are perturbed, and the radius of each."""

import re
from collections.abc import Mapping

from torch import nn
from torch.nn.parallel import DistributedDataParallel


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside the wrappers of DistributedDataParallel and torch.compile, with its own parameter names."""
    while isinstance(model, DistributedDataParallel) or hasattr(model, "_orig_mod"):  # the latter by torch.compile
        model = model.module if isinstance(model, DistributedDataParallel) else model._orig_mod  # type: ignore[assignment]
    return model


def select_parameters(model: nn.Module, perturb: str) -> dict[str, nn.Parameter]:
    """The trainable parameters that SAM's argument `perturb` selects, by name. Raises ValueError if there are none."""
    norm = {
        id(w)
        for module in model.modules()
        if "norm" in type(module).__name__.lower()
        for w in module.parameters(recurse=False)
    }

    def matches(name: str, w: nn.Parameter) -> bool:
        if perturb in ("norm", "no-norm"):
            return (id(w) in norm) == (perturb == "norm")
        return perturb == "all" or re.search(perturb, name) is not None

    selected = {
        name: w for name, w in model.named_parameters() if w.requires_grad and w.numel() > 0 and matches(name, w)
    }
    if not selected:
        raise ValueError(f"pattern {perturb!r} matches none of the model's trainable parameters")
    return selected


def first_match(factors: Mapping[str, float], name: str) -> float:
    """The factor of the first regular expression found in a name; 1 if there is none."""
    return next((factor for pattern, factor in factors.items() if re.search(pattern, name)), 1.0)
