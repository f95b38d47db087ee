"""Where a network can be cut for --perturb-from, and what the part from there on costs."""

import copy
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from samtune.errors import UsageError, shorten
from samtune.sam.suffix import Cut

AUTO = 0.25
"""The share of the suffix that "auto" looks for: a step of SAM then costs 1.25 times the multiplications of SGD's."""


@dataclass(frozen=True)
class CutPoint:
    """A module that a network can be cut before. share: multiplications from there on, of those of a forward pass."""

    name: str
    share: float


def cut_points(model: nn.Module, input_size: Sequence[int]) -> list[CutPoint]:
    """The stages of a network but the first one, and the layers after them, in order.

    model: on any device; it is counted on the meta device. input_size: (channels, height, width).
    """
    return _counted(model, input_size, _stages(model))


def find_cut(model: nn.Module, asked: str, input_size: Sequence[int]) -> CutPoint:
    """The cut that --perturb-from asks for: a module's name, a share such as "40%", or "auto" (25 %).

    For a share it is, of the stages that are places to cut, the one whose own is nearest. Raises UsageError where there
    is none.
    """
    points = cut_points(model, input_size)
    percent = re.fullmatch(r"(\d+(?:\.\d+)?)\s*%", asked)
    if percent or asked == "auto":
        share = float(percent[1]) / 100 if percent else AUTO
        nearest = sorted(points, key=lambda point: abs(point.share - share))
        found = next((point for point in nearest if _obstacle(model, point.name, input_size) is None), None)
        if found is None:
            raise UsageError(f"--perturb-from {asked}: the model has no stage that all data pass through")
        return found
    modules = dict(model.named_modules())
    why = _obstacle(model, asked, input_size) if asked in modules else "the model has no such module"
    if why is not None:
        fitting = [point.name for point in points if _obstacle(model, point.name, input_size) is None]
        hint = f"it can be cut at {shorten(fitting)}" if fitting else ""
        raise UsageError(f"--perturb-from {asked}: {why}", "", hint)
    return next(iter(_counted(model, input_size, {asked: modules[asked]})), CutPoint(asked, 1.0))


def _obstacle(model: nn.Module, name: str, input_size: Sequence[int]) -> str | None:
    """Why a network cannot be cut before a module; None if it can."""
    weights = next(model.parameters())
    try:
        cut = Cut(model, name)
        if not weights.is_meta:  # where there are no values to compare
            example = torch.linspace(-1, 1, math.prod(input_size), dtype=weights.dtype, device=weights.device)
            with torch.random.fork_rng(devices=[]):
                cut.check(example.reshape(1, *input_size))
    except ValueError as error:
        return str(error)
    return None


def _counted(model: nn.Module, input_size: Sequence[int], modules: Mapping[str, nn.Module]) -> list[CutPoint]:
    """Those of the modules before which there are multiplications, in the order of their calls."""
    on_meta: Any = copy.deepcopy(model).to("meta").eval().requires_grad_(False)
    before: dict[str, int] = {}
    counter = FlopCounterMode(display=False)

    def count(name: str) -> None:
        before.setdefault(name, counter.get_total_flops())

    head = on_meta.get_classifier()
    if isinstance(head, nn.Module):  # not counted: its size depends on the classes, which a plan may not know
        head.register_forward_pre_hook(lambda *_: count("the head"))
    for name in modules:
        on_meta.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: count(name))
    with counter, torch.no_grad():
        on_meta(torch.zeros(1, *input_size, device="meta"))
    total = before.pop("the head", counter.get_total_flops())
    return [CutPoint(name, max(0.0, 1 - done / total)) for name, done in before.items() if done > 0]


def _stages(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of the first level that have parameters; in place of a sequence of stages, each of these."""
    found: dict[str, nn.Module] = {}
    for name, child in model.named_children():
        if name in ("blocks", "stages", "layers", "features"):
            found |= {f"{name}.{part}": module for part, module in child.named_children()}
        else:
            found[name] = child
    return {name: module for name, module in found.items() if any(True for _ in module.parameters())}
