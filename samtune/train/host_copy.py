"""Copies of a run's state in host memory, which further training does not change."""

from collections.abc import Mapping
from typing import Any

import torch


class HostCopy:
    """Copies nested dicts, lists and tuples with tensors, every time into the same memory.

    So a copy is valid until the next one. The memory is kept, because new memory costs far more than the copying: its
    pages are mapped one by one, and those that a GPU copies into are pinned.
    """

    def __init__(self) -> None:
        self._buffers: list[torch.Tensor] = []

    def __call__(self, value: Any) -> Any:
        """A copy on the CPU; values that are not tensors are taken as they are.

        Tensors keep their strides, and those that share memory share it in the copy. On a GPU all copies run one after
        the other, and are waited for once.
        """
        buffers: dict[tuple[int, torch.dtype], torch.Tensor] = {}
        old = iter(self._buffers)
        devices: set[torch.device] = set()

        def copied(value: Any) -> Any:
            if isinstance(value, torch.Tensor):
                return of_tensor(value.detach())
            if isinstance(value, Mapping):
                return {key: copied(part) for key, part in value.items()}
            if isinstance(value, list | tuple):
                return type(value)(copied(part) for part in value)
            return value

        def of_tensor(value: torch.Tensor) -> torch.Tensor:
            storage = value.untyped_storage()
            key = (storage._cdata, value.dtype)
            if key not in buffers:
                whole = value.as_strided((storage.nbytes() // value.element_size(),), (1,), 0)
                buffers[key] = _reused(next(old, None), whole).copy_(whole, non_blocking=True)
                devices.add(value.device)
            return buffers[key].as_strided(value.shape, value.stride(), value.storage_offset())

        with torch.no_grad():
            result = copied(value)
        for device in devices:
            if device.type == "cuda":
                torch.cuda.current_stream(device).synchronize()
        self._buffers = list(buffers.values())
        return result


def _reused(buffer: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    """The buffer if a flat tensor fits exactly, else a new one."""
    if buffer is not None and buffer.dtype == like.dtype and buffer.shape == like.shape:
        return buffer
    return torch.empty(like.shape, dtype=like.dtype, pin_memory=like.is_cuda)
