"""The device that is there, and what it does best."""

import os
import resource
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial

import torch

from samtune.errors import OutOfMemory, first_line

Autocast = Callable[[], AbstractContextManager[None]]


def pick() -> torch.device:
    """The GPU if there is one (CUDA_VISIBLE_DEVICES chooses which), else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def describe(device: torch.device) -> str:
    """Its name, as a report gives it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({torch.get_num_threads()} threads)"


def best_dtype(device: torch.device) -> str:
    """The arithmetic of --amp-dtype auto. On CPUs bfloat16 is slower: depthwise convolutions lack a fast form."""
    fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bfloat16" if fast else "float32"


def autocast(device: torch.device, dtype: str) -> Autocast:
    """Makes the context of a forward pass. A new one for each pass: its cache of cast weights must not outlive them."""
    kind = torch.float16 if dtype == "float16" else torch.bfloat16
    return partial(torch.autocast, device.type, dtype=kind, enabled=dtype in ("bfloat16", "float16"))


def loss_scaler(device: torch.device, dtype: str) -> torch.amp.GradScaler | None:
    """Keeps small gradients in float16's range; other arithmetic needs none."""
    return torch.amp.GradScaler(device.type) if dtype == "float16" else None


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory in use since the start: allocated on the GPU, or resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@contextmanager
def room_for(what: str) -> Iterator[None]:
    """Turn the device's out-of-memory error into OutOfMemory that names what did not fit."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise OutOfMemory(
            f"no memory on {describe(pick())} for {what}", first_line(error), "lower --batch-size or --img-size"
        ) from None


def cores() -> int:
    """Processor cores that this process may use, as Slurm or taskset granted them."""
    return len(os.sched_getaffinity(0))
