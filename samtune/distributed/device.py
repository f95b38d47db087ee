"""The device that is there, and what it does best."""

import gc
import math
import os
import resource
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch

from samtune.distributed import environment
from samtune.errors import MachineError, OutOfMemory, first_line
from samtune.text import plural

Autocast = Callable[[], AbstractContextManager[None]]
T = TypeVar("T")


def gpu_numbers(gpus: str) -> list[int]:
    """The GPUs that --gpus asks for, as torch numbers those that CUDA_VISIBLE_DEVICES lets it see.

    auto: the first one, if there is one; all; a number of them; or a list. Raises MachineError for more than there are.
    """
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpus == "auto":
        return [0][:there]
    if gpus == "all":
        found = list(range(there))
    elif gpus.isdigit():
        found = list(range(int(gpus)))
    else:
        found = [int(number) for number in gpus.split(",") if number]
    if (gpus == "all" and not found) or max(found, default=-1) >= there:
        names = ", ".join(f"{i}: {torch.cuda.get_device_name(i)}" for i in range(there))
        raise MachineError(
            f"--gpus {gpus}: there {'is' if there == 1 else 'are'} {there or 'no'} GPU{'s' if there != 1 else ''} here",
            names or no_gpu(),
            "ask for what is there; --gpus auto takes the CPU if there is none, --processes N several ranks on it",
        )
    return found


def no_gpu() -> str:
    """Why there is no GPU, in words."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        return "CUDA_VISIBLE_DEVICES is empty"
    built = torch.version.cuda
    return f"torch is built for CUDA {built}, and no driver answers" if built else "torch is built without CUDA"


def select_device(gpus: str = "auto", processes: int | None = None) -> torch.device:
    """The device of this rank: its GPU of those that are asked for, else the CPU."""
    here = environment.rank_info()
    if processes is not None or gpus == "0":
        return torch.device("cpu")
    if gpus == "auto" and here is not None and torch.cuda.is_available():  # whoever launched the ranks has chosen
        return torch.device("cuda", here.local_rank % torch.cuda.device_count())
    numbers = gpu_numbers(gpus)
    if here is not None and here.local_rank >= len(numbers) > 0:
        raise MachineError(
            f"--gpus {gpus} with {here.local_world_size} ranks on this machine", "each needs a GPU", "start fewer"
        )
    return torch.device("cuda", numbers[here.local_rank if here else 0]) if numbers else torch.device("cpu")


def describe(device: torch.device) -> str:
    """Its name, as a report gives it."""
    threads = plural(torch.get_num_threads(), "thread")
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({threads})"


def _here() -> str:
    """The device that this process computes on."""
    return describe(torch.device("cuda" if torch.cuda.is_initialized() else "cpu"))


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


def memory_bytes(device: torch.device) -> int:
    """The memory that there is: of the GPU, or of the machine, as far as its container may use it."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with suppress(OSError, ValueError):  # no limit is "max"
        there = min(there, int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="utf-8")))
    return there


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: that of a GPU, Python's, or torch's on a CPU, whose error has no type of its own."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    said = str(error)
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in said and "memory" in said


def retry_with_smaller_batch(attempt: Callable[[int], T], at_once: int, shape: Sequence[int]) -> T:
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
        free_memory()
        if at_once == 1:
            raise OutOfMemory(
                f"no memory on {_here()} for one image of {' x '.join(map(str, shape))}",
                why,
                "lower --img-size, compute with --amp-dtype bfloat16, or take a smaller model",
            )
        at_once = math.ceil(at_once / 2)


def free_memory() -> None:
    """Give back what nothing refers to any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextmanager
def oom_as_user_error(what: str) -> Iterator[None]:
    """Turn the device's out-of-memory error into OutOfMemory that names what did not fit."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(
            f"no memory on {_here()} for {what}", first_line(error), "lower --batch-size or --img-size"
        ) from None


def available_cpus() -> int:
    """Processor cores that this process may use, as Slurm or taskset granted them."""
    return len(os.sched_getaffinity(0))


def loading_workers(target: torch.device, cores_of_rank: int) -> int:
    """Threads that load images for a rank: enough for a GPU; beside a CPU, which computes itself, one."""
    return min(8, max(1, cores_of_rank // 2)) if target.type == "cuda" else 1
