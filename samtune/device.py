"""The device that is there, and what it does best."""

import resource
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial

import torch

Autocast = Callable[[], AbstractContextManager[None]]


def pick() -> torch.device:
    """The GPU if there is one (CUDA_VISIBLE_DEVICES chooses which), else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def describe(device: torch.device) -> str:
    """Its name, as a report gives it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({torch.get_num_threads()} threads)"


def best_dtype(device: torch.device) -> str:
    """The arithmetic of --amp-dtype auto. On CPUs bfloat16 is slower: depthwise convolutions lack a fast form."""
    return "bfloat16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "float32"


def autocast(device: torch.device, dtype: str) -> Autocast:
    """Makes the context of a forward pass. A new one for each pass: its cache of cast weights must not outlive them."""
    return partial(torch.autocast, device.type, dtype=torch.bfloat16, enabled=dtype == "bfloat16")


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory in use since the start: allocated on the GPU, or resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
