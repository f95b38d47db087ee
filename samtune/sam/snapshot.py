"""State that a pass changes besides gradients, kept and restored: random generators and batch-norm statistics."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

Statistics = list[tuple[torch.Tensor, torch.Tensor]]  # each buffer, and a copy of it


def generator_states(device: torch.device) -> list[torch.Tensor]:
    """States of torch's generators that a model on this device draws from: the CPU's, and the GPU's if it is on one."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return states


def set_generator_states(states: list[torch.Tensor], device: torch.device) -> None:
    """Set the generators back, so that they draw the same random numbers again."""
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)


def batch_norms(model: nn.Module) -> list[_BatchNorm]:
    """All batch-norm layers, whether they update now or not."""
    return [module for module in model.modules() if isinstance(module, _BatchNorm)]


def _updating(norms: Sequence[_BatchNorm]) -> list[_BatchNorm]:
    """The layers whose statistics the next training pass would change."""
    return [module for module in norms if module.training and module.track_running_stats]


def bn_stats(norms: Sequence[_BatchNorm]) -> Statistics:
    """The buffers that the next training pass would change in these batch-norm layers, each with a copy."""
    return [(buffer, buffer.clone()) for module in _updating(norms) for buffer in module.buffers(recurse=False)]


def restore_bn_stats(kept: Statistics) -> None:
    """Copy batch-norm statistics back into their own storage."""
    for buffer, value in kept:
        buffer.copy_(value)


@contextmanager
def bn_stats_kept(norms: Sequence[_BatchNorm]) -> Iterator[None]:
    """Restore batch-norm statistics after the block."""
    kept = bn_stats(norms)
    yield
    restore_bn_stats(kept)


@contextmanager
def bn_stats_frozen(norms: Sequence[_BatchNorm]) -> Iterator[None]:
    """In the block layers normalise as before, but keep running mean, variance and num_batches_tracked."""
    updating = _updating(norms)
    try:
        for module in updating:
            module.track_running_stats = False
        yield
    finally:
        for module in updating:
            module.track_running_stats = True


@contextmanager
def rollback_on_error(kept: Statistics, device: torch.device) -> Iterator[None]:
    """If the block fails, restore the generators to their state before it, and batch-norm statistics from `kept`."""
    generators = generator_states(device)
    try:
        yield
    except BaseException:
        restore_bn_stats(kept)
        set_generator_states(generators, device)
        raise
