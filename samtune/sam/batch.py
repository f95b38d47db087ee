"""Batches of any form: tensors of one first dimension, the samples, or dictionaries and lists of such tensors."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

Batch = tuple[Any, ...]


def num_samples(batch: Batch) -> int | None:
    """Number of samples in a batch; None for no batch. Raises ValueError if it is empty or its tensors disagree."""
    sizes = {len(t) for t in _tensors(batch)}
    if batch and not sizes:
        raise ValueError("the batch holds no tensor: sam.backward(loss, images, labels)")
    if len(sizes) > 1:
        counts = " and ".join(map(str, sorted(sizes)))
        raise ValueError(f"the tensors of a batch have {counts} samples: they need one first dimension")
    if 0 in sizes:
        raise ValueError("the batch is empty")
    return sizes.pop() if sizes else None


def check_divisible(batch: Batch, n: int | None) -> None:
    """Raise ValueError unless all n samples of the batch are in tensors. n: None for no batch."""
    if n is None:
        raise ValueError(
            "m, micro_batch and ascent_fraction divide the batch, and backward was given none: "
            "pass the tensors, sam.backward(loss, images, labels), in place of a closure over them"
        )
    for values in _lists(batch):
        if len(values) == n and not _tensors(values):
            raise ValueError(
                f"m, micro_batch and ascent_fraction divide the batch, and it holds a list of {n} "
                f"{type(values[0]).__name__}: give a tensor"
            )


def head(batch: Batch, n: int) -> Batch:
    """The first n samples."""
    first: Batch = _map(lambda t: t[:n], batch)
    return first


def split(batch: Batch, size: int) -> list[Batch]:
    """Chunks of `size` samples, the last one smaller; the batch itself if it has no more."""
    n = num_samples(batch)
    return [batch] if n is None or size >= n else _divide(batch, lambda t: t.split(size))


def chunk(batch: Batch, count: int) -> list[Batch]:
    """`count` chunks whose sizes differ by at most one."""
    return _divide(batch, lambda t: t.tensor_split(count))


def _divide(batch: Batch, divide: Callable[[torch.Tensor], Sequence[torch.Tensor]]) -> list[Batch]:
    chunks = [divide(t) for t in _tensors(batch)]
    divided = []
    for parts in zip(*chunks, strict=True):
        remaining = iter(parts)
        divided.append(_map(lambda _, r=remaining: next(r), batch))  # type: ignore[misc]
    return divided


def _tensors(content: Any) -> list[torch.Tensor]:
    """The tensors of samples, in the order in which `_map` visits them."""
    if isinstance(content, Mapping | list | tuple):
        values = content.values() if isinstance(content, Mapping) else content
        return [tensor for value in values for tensor in _tensors(value)]
    return [content] if isinstance(content, torch.Tensor) and content.ndim > 0 else []


def _map(change: Callable[[torch.Tensor], torch.Tensor], content: Any) -> Any:
    """Apply `change` to each tensor of samples inside the content; a mapping of any kind becomes a dict."""
    if isinstance(content, torch.Tensor) and content.ndim > 0:
        return change(content)
    if isinstance(content, Mapping):
        return {key: _map(change, value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        changed = [_map(change, value) for value in content]
        if hasattr(content, "_fields"):  # a named tuple
            return type(content)(*changed)
        return changed if isinstance(content, list) else tuple(changed)
    return content


def _lists(content: Any) -> Iterator[Sequence[Any]]:
    """The lists inside a batch."""
    for value in content.values() if isinstance(content, Mapping) else content:
        if isinstance(value, list | tuple):
            yield value
        if isinstance(value, list | tuple | Mapping):
            yield from _lists(value)
