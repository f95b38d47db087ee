"""Sums over ranks; with samtune.shard the only user of torch.distributed. With one rank nothing is communicated."""

from typing import TypeAlias

import torch
import torch.distributed as dist

Group: TypeAlias = "dist.ProcessGroup | None"  # None: all ranks


def in_use() -> bool:
    """Whether this process has joined others."""
    return dist.is_available() and dist.is_initialized()


def world_size(group: Group = None) -> int:
    """Ranks of a group, 1 where torch.distributed is not in use."""
    return dist.get_world_size(group) if in_use() else 1


def sum_over_ranks(tensor: torch.Tensor, group: Group = None) -> torch.Tensor:
    """The sum over the group's ranks, the same on each of them, in place."""
    if world_size(group) > 1:
        dist.all_reduce(tensor, group=group)
    return tensor


def sum_lists_over_ranks(tensors: list[torch.Tensor], group: Group = None) -> list[torch.Tensor]:
    """The sum of each tensor over the group's ranks, in a single reduction; all of one dtype."""
    if world_size(group) == 1:
        return tensors
    flat = sum_over_ranks(torch._utils._flatten_dense_tensors(tensors), group)
    return list(torch._utils._unflatten_dense_tensors(flat, tensors))


def gathered(values: torch.Tensor, group: Group = None) -> torch.Tensor:
    """A few numbers of each rank of the group, the same on all of them: values (...) -> (ranks, ...)."""
    if world_size(group) == 1:
        return values[None]
    parts = [torch.empty_like(values) for _ in range(world_size(group))]
    dist.all_gather(parts, values, group=group)
    return torch.stack(parts)


def rank(group: Group = None) -> int:
    """The place of this process in the group, 0 where torch.distributed is not in use."""
    return dist.get_rank(group) if in_use() else 0
