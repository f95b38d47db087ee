"""The classifier of a model: its modules, how a new one starts, its inputs."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from samtune.errors import ModelError, first_line


def head_names(model: nn.Module) -> tuple[str, ...]:
    """Names of the classifier's modules; none for a model without one."""
    config: Any = model.pretrained_cfg
    names = config.get("classifier") or ()
    return (names,) if isinstance(names, str) else tuple(names)


def head_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of the classifier."""
    return [p for name in head_names(model) for p in model.get_submodule(name).parameters()]


def has_classifier(model: nn.Module) -> bool:
    """Whether the model has a classifier with parameters."""
    try:
        return bool(head_parameters(model))
    except AttributeError:  # timm names a module that this variant lacks
        return False


def zero_head(model: nn.Module) -> None:
    """Set the classifier to zero: the first prediction is uniform, and the first loss ln(classes).

    timm's own fresh head starts above that, and with frozen statistics the model then collapses.
    """
    with torch.no_grad():
        for parameter in head_parameters(model):
            parameter.zero_()


def reset_head(model: nn.Module) -> None:
    """Draw the classifier's linear layers as torch does: timm's range for EfficientNets suits 1,000 classes."""
    for name in head_names(model):
        for module in model.get_submodule(name).modules():
            if isinstance(module, nn.Linear):
                module.reset_parameters()


def describe_replaced_head(model: nn.Module, state_dict: Mapping[str, torch.Tensor]) -> str:
    """The head that weights have, and that a new one replaces, for a message."""
    outputs = [len(state_dict[f"{name}.weight"]) for name in head_names(model) if f"{name}.weight" in state_dict]
    return f"has a head of {outputs[0]} outputs, which is left out" if outputs else "has no head"


def features_and_logits(model: nn.Module, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The input and the output of a timm model's classifier: (batch, features), (batch, classes).

    These are the two halves of the model's own forward pass. Raises ModelError for a model that is not made of them.
    """
    try:
        maps = model.forward_features(images)  # type: ignore[operator]
        pooled: torch.Tensor = model.forward_head(maps, pre_logits=True)  # type: ignore[operator]
        logits: torch.Tensor = model.forward_head(maps)  # type: ignore[operator]
    except (AttributeError, TypeError) as error:
        raise ModelError(f"model {type(model).__name__} gives no pooled features", first_line(error)) from None
    return pooled.flatten(1), logits
