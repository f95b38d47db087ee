"""Directions of a perturbation that are there before the step, in the base optimizer's state."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

ONE_PASS = ("momentum", "previous")
"""The ascents with such a direction: a step has no pass 1."""

_MOMENTUM = ("momentum_buffer", "exp_avg")  # as torch's optimizers name an average of gradients, SGD and Adam
_PREVIOUS = "previous_gradient"


class KnownDirection:
    """What takes the place of g1: minus the optimizer's momentum, or the gradient of the step before.

    ascent: one of ONE_PASS. "previous" is kept by a hook of the optimizer, in its state. params: the perturbed
    parameters. Raises ValueError for an optimizer that is missing, or has no momentum, or not all of these parameters.
    """

    def __init__(self, ascent: str, optimizer: torch.optim.Optimizer | None, params: Sequence[nn.Parameter]) -> None:
        if optimizer is None:
            raise ValueError(f"ascent {ascent}: give the base optimizer, SAM(..., optimizer=optimizer)")
        known = {id(w) for group in optimizer.param_groups for w in group["params"]}
        if not all(id(w) in known for w in params):
            raise ValueError(f"ascent {ascent}: the optimizer does not have all perturbed parameters")
        if ascent == "momentum" and all(group.get("momentum") == 0 for group in optimizer.param_groups):
            raise ValueError("ascent momentum: the optimizer has momentum 0")
        self._ascent, self._optimizer, self._params = ascent, optimizer, params
        if ascent == "previous":
            optimizer.register_step_post_hook(self._keep_gradient)

    def __call__(self) -> list[torch.Tensor]:
        """One tensor for each perturbed parameter; [] while there is nothing."""
        states = [self._optimizer.state.get(w, {}) for w in self._params]
        keys = _MOMENTUM if self._ascent == "momentum" else (_PREVIOUS,)
        stored = [next((state[key] for key in keys if state.get(key) is not None), None) for state in states]
        if all(one is None for one in stored):
            if self._ascent == "momentum" and any(states):
                raise ValueError(f"ascent momentum: {type(self._optimizer).__name__} keeps no momentum")
            return []
        direction = [torch.zeros_like(w) if one is None else one for w, one in zip(self._params, stored, strict=True)]
        return list(torch._foreach_neg(direction)) if self._ascent == "momentum" else direction

    @torch.no_grad()
    def _keep_gradient(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Keep the gradient of a step that was taken, for the next one."""
        # That of a fused optimizer which a GradScaler calls, though it is to change nothing if a value was not finite.
        found_inf = getattr(optimizer, "found_inf", None)
        kept, new = [], []
        for w in self._params:
            if w.grad is None:
                optimizer.state.get(w, {}).pop(_PREVIOUS, None)
                continue
            state = optimizer.state[w]
            if _PREVIOUS not in state:
                state[_PREVIOUS] = torch.zeros_like(w, requires_grad=False)
            kept.append(state[_PREVIOUS])
            new.append(w.grad if found_inf is None else torch.where(found_inf == 0, w.grad, state[_PREVIOUS]))
        if kept:
            torch._foreach_copy_(kept, new)
