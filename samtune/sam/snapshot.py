"""State that a pass changes besides gradients, kept and restored: random generators and batch-norm statistics."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


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


class BatchNormStats:
    """Running statistics of batch-norm layers, with one buffer for a copy of them, which every step uses again."""

    def __init__(self, norms: Sequence[_BatchNorm]) -> None:
        self._norms = norms
        self._buffers: list[list[torch.Tensor]] = []  # one list per dtype: torch copies such a list at once
        self._copies: list[list[torch.Tensor]] = []

    @property
    def will_change(self) -> bool:
        """Whether the next training pass would change statistics."""
        return bool(_updating(self._norms))

    @torch.no_grad()
    def keep(self) -> None:
        """Copy the statistics that the next training pass would change."""
        by_dtype: dict[torch.dtype, list[torch.Tensor]] = {}
        for module in _updating(self._norms):
            for buffer in module.buffers(recurse=False):
                by_dtype.setdefault(buffer.dtype, []).append(buffer)
        buffers = list(by_dtype.values())
        if list(map(len, buffers)) != list(map(len, self._copies)):
            self._copies = [[torch.empty_like(buffer) for buffer in group] for group in buffers]
        self._buffers = buffers
        for group, copies in zip(self._buffers, self._copies, strict=True):
            torch._foreach_copy_(copies, group)

    @torch.no_grad()
    def restore(self) -> None:
        """Copy what was kept back into its own storage."""
        for group, copies in zip(self._buffers, self._copies, strict=True):
            torch._foreach_copy_(group, copies)

    def kept_floats(self) -> list[torch.Tensor]:
        """The buffers that were kept, without the counters of batches."""
        return [buffer for group in self._buffers for buffer in group if buffer.is_floating_point()]

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Restore the statistics after the block."""
        self.keep()
        yield
        self.restore()


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
def rollback_on_error(stats: BatchNormStats, device: torch.device) -> Iterator[None]:
    """If the block fails, restore the generators to their state before it, and the statistics that were kept."""
    generators = generator_states(device)
    try:
        yield
    except BaseException:
        stats.restore()
        set_generator_states(generators, device)
        raise
