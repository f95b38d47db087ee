"""What a pass changes besides gradients, to have it as it was: random generators and batch-norm statistics."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

Statistics = list[tuple[torch.Tensor, torch.Tensor]]


def generator_states(device: torch.device) -> list[torch.Tensor]:
    """Where torch's generators stand that a model on this device draws from."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return states


def set_generator_states(states: list[torch.Tensor], device: torch.device) -> None:
    """Draw the same random numbers again."""
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)


def batch_norms(model: nn.Module) -> list[_BatchNorm]:
    """All batch-norm layers, whether they update now or not."""
    return [module for module in model.modules() if isinstance(module, _BatchNorm)]


def bn_in_train_mode(norms: Sequence[_BatchNorm]) -> list[_BatchNorm]:
    """Those of these batch-norm layers whose statistics the next training pass would change."""
    return [module for module in norms if module.training and module.track_running_stats]


def bn_stats(norms: Sequence[_BatchNorm]) -> Statistics:
    """What the next training pass would change in these batch-norm layers, with a copy of each buffer."""
    return [(buffer, buffer.clone()) for module in bn_in_train_mode(norms) for buffer in module.buffers(recurse=False)]


def restore_bn_stats(kept: Statistics) -> None:
    """Batch-norm statistics as they were when `statistics` copied them, in their own storage."""
    for buffer, value in kept:
        buffer.copy_(value)


@contextmanager
def rollback_on_error(kept: Statistics, device: torch.device) -> Iterator[None]:
    """Where the block fails, generators are as they were before it, and batch-norm statistics as they were kept."""
    generators = generator_states(device)
    try:
        yield
    except BaseException:
        restore_bn_stats(kept)
        set_generator_states(generators, device)
        raise
