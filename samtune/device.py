"""The device that is there, and what it does best."""

import gc
import math
import os
import resource
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import TypeVar

import torch

from samtune.errors import OutOfMemory, first_line

Autocast = Callable[[], AbstractContextManager[None]]
T = TypeVar("T")


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


def deterministic(on: bool) -> None:
    """Let torch use operations alone whose result is the same every time, and refuse the others; or not."""
    if on:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it before its first use
    torch.use_deterministic_algorithms(on)


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory in use since the start: allocated on the GPU, or resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: that of a GPU, Python's, or torch's on a CPU, whose error has no type of its own."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    said = str(error)
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in said and "memory" in said


def halved_until_it_fits(attempt: Callable[[int], T], at_once: int, shape: Sequence[int]) -> T:
    """What `attempt(at_once)` returns; while memory runs out, it is called again with half as many images at once.

    attempt: leaves nothing behind when it fails, and may be called again. shape: of an image, for the error.

    Raises OutOfMemory where one image alone does not fit.
    """
    while True:
        try:
            return attempt(at_once)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            why = first_line(error)
        # Out here the error is gone, and with it the frames that held what did not fit: not before can memory be freed.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if at_once == 1:
            raise OutOfMemory(
                f"no memory on {describe(pick())} for one image of {' x '.join(map(str, shape))}",
                why,
                "lower --img-size, compute with --amp-dtype bfloat16, or take a smaller model",
            )
        at_once = math.ceil(at_once / 2)


@contextmanager
def room_for(what: str) -> Iterator[None]:
    """Turn the device's out-of-memory error into OutOfMemory that names what did not fit."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(
            f"no memory on {describe(pick())} for {what}", first_line(error), "lower --batch-size or --img-size"
        ) from None


def cores() -> int:
    """Processor cores that this process may use, as Slurm or taskset granted them."""
    return len(os.sched_getaffinity(0))
