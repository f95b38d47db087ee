"""The device of a rank: which one, its arithmetic, its memory, and how to go on when that runs out."""

import gc
import math
import os
import resource
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch

from samtune.distributed import environment
from samtune.errors import MachineError, OutOfMemory, UsageError, first_line, plural

# What CUDA and its libraries say where memory ran out inside them, and what they say for other reasons, too.
_NO_MEMORY = ("out of memory", "CUDNN_STATUS_ALLOC_FAILED", "CUBLAS_STATUS_ALLOC_FAILED")
_MAYBE_NO_MEMORY = ("unable to find an engine to execute this computation", "CUBLAS_STATUS_NOT_INITIALIZED")

Autocast = Callable[[], AbstractContextManager[None]]
T = TypeVar("T")


def gpu_numbers(gpus: str) -> list[int]:
    """The GPUs that --gpus asks for, by torch's numbers of those that CUDA_VISIBLE_DEVICES shows.

    gpus: auto, the first one if there is one; all; how many; or a list. Raises MachineError if there are fewer.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpus == "auto":
        return [0][:count]
    if gpus == "all":
        numbers = list(range(count))
    elif gpus.isdigit():
        numbers = list(range(int(gpus)))
    else:
        numbers = [int(number) for number in gpus.split(",") if number]
    if (gpus == "all" and not numbers) or max(numbers, default=-1) >= count:
        names = ", ".join(f"{i}: {torch.cuda.get_device_name(i)}" for i in range(count))
        raise MachineError(
            f"--gpus {gpus}: there {'is' if count == 1 else 'are'} {count or 'no'} GPU{'s' if count != 1 else ''} here",
            names or no_gpu(),
            "--gpus auto takes the CPU if there is no GPU; --processes N runs several ranks on it",
        )
    return numbers


def no_gpu() -> str:
    """Why there is no GPU."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        return "CUDA_VISIBLE_DEVICES is empty"
    built = torch.version.cuda
    return f"torch is built for CUDA {built}, and no driver answers" if built else "torch is built without CUDA"


def select_device(gpus: str = "auto", processes: int | None = None) -> torch.device:
    """The device of this rank: one of the GPUs that --gpus asks for, else the CPU."""
    info = environment.rank_info()
    if processes is not None or gpus == "0":
        return torch.device("cpu")
    if gpus == "auto" and info is not None and torch.cuda.is_available():  # the launcher chose the GPUs
        return torch.device("cuda", info.local_rank % torch.cuda.device_count())
    numbers = gpu_numbers(gpus)
    if info is not None and info.local_rank >= len(numbers) > 0:
        raise MachineError(
            f"--gpus {gpus} with {info.local_world_size} ranks on this machine", "each needs a GPU", "start fewer"
        )
    return torch.device("cuda", numbers[info.local_rank if info else 0]) if numbers else torch.device("cpu")


def describe(device: torch.device) -> str:
    """The device's name for reports. Reports are compared by it, so that its form stays: "cpu (1 threads)", too."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({torch.get_num_threads()} threads)"


def _current_device() -> str:
    """The name of the device that this process computes on."""
    return describe(torch.device("cuda" if torch.cuda.is_initialized() else "cpu"))


def best_dtype(device: torch.device) -> tuple[str, str]:
    """The value of --amp-dtype auto, and why."""
    if device.type != "cuda":
        # On a CPU bfloat16 is slower: depthwise convolutions lack a fast kernel.
        return "float32", f"best on device {device.type}"
    major, minor = torch.cuda.get_device_capability(device)
    has = f"a GPU of compute capability {major}.{minor} has"
    if major >= 8:
        return "bfloat16", f"{has} it"
    if major == 7:
        return "float16", f"{has} tensor cores for it, and no bfloat16"
    return "float32", f"{has} no fast 16-bit arithmetic"


def check_dtype(device: torch.device, dtype: str) -> None:
    """Raise UsageError if a value of --amp-dtype is arithmetic that the device does not have."""
    if dtype != "tf32":
        return
    if device.type != "cuda":
        raise UsageError("--amp-dtype tf32 on a CPU", "it is arithmetic of GPUs", "give float32, or leave it out")
    if torch.cuda.get_device_capability(device) < (8, 0):
        raise UsageError(
            f"--amp-dtype tf32 on {describe(device)}", "only newer GPUs have it", "give float16 or float32"
        )


def set_float32_arithmetic(device: torch.device, dtype: str) -> None:
    """Let a GPU compute with float32 as an --amp-dtype says: "tf32" in TF32, every other one as IEEE 754 defines it.

    torch's own default is TF32 in convolutions and IEEE in matrix products.
    """
    if device.type == "cuda":
        with warnings.catch_warnings():
            # fp32_precision is the newer API, but torch refuses to tell the state to the compiler where both are used.
            warnings.filterwarnings("ignore", message=".*new API", category=UserWarning)
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = dtype == "tf32"


def arithmetic(device: torch.device, dtype: str) -> str:
    """An --amp-dtype in words, for logs: on a GPU, "float32" alone may mean TF32."""
    if device.type != "cuda":
        return dtype
    words = {"tf32": "float32 in TF32", "float32": "float32 (IEEE 754)", "float16": "float16 with a loss scale"}
    return words.get(dtype, dtype)


def library_versions(device: torch.device) -> dict[str, str]:
    """The versions of the libraries that compute on a GPU; none for a CPU."""
    if device.type != "cuda":
        return {}
    return {"cuda": str(torch.version.cuda), "cudnn": str(torch.backends.cudnn.version())}


def autocast(device: torch.device, dtype: str) -> Autocast:
    """A function that makes the context of a forward pass: a new one each time, for its cache of cast weights."""
    low = torch.float16 if dtype == "float16" else torch.bfloat16
    return partial(torch.autocast, device.type, dtype=low, enabled=dtype in ("bfloat16", "float16"))


def loss_scaler(device: torch.device, dtype: str) -> torch.amp.GradScaler | None:
    """The GradScaler that float16 needs; None for other dtypes."""
    return torch.amp.GradScaler(device.type) if dtype == "float16" else None


def deterministic(on: bool) -> None:
    """Whether torch uses only operations whose result is the same every time, and raises for others.

    Otherwise cuDNN tries its kernels on the first batch of each size, and takes the fastest: not always the same one.
    """
    if on:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS needs it before its first use
    torch.use_deterministic_algorithms(on)
    # By default that also fills every new tensor, lest memory be read that nothing was written to.
    torch.utils.deterministic.fill_uninitialized_memory = not on  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = not on


@contextmanager
def cudnn_benchmark(on: bool) -> Iterator[None]:
    """Inside the block, cuDNN tries its kernels on the first batch of each size and takes the fastest, or does not."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = on
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def uncompiled() -> AbstractContextManager[None]:
    """A context in which compiled modules run as they would without torch.compile, for what need not be fast."""
    context: AbstractContextManager[None] = nullcontext()
    if "torch._dynamo" in sys.modules:  # else nothing is compiled, and its import would take seconds
        context = torch.compiler.set_stance("force_eager")
    return context


@contextmanager
def limited_memory(device: torch.device, spare: float) -> Iterator[None]:
    """Inside the block, memory of the GPU runs out when this share of what this process could have is left."""
    free, total = torch.cuda.mem_get_info(device)
    usable = free + torch.cuda.memory_reserved(device)
    torch.cuda.set_per_process_memory_fraction((1 - spare) * usable / total, device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


def peak_memory_bytes(device: torch.device) -> int:
    """The largest memory in use since the start: allocated on the GPU, or resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def memory_bytes(device: torch.device) -> int:
    """The memory of the GPU, or of the machine, up to the limit of its container."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([total, *(limit for limit, _ in _container_memory())])


def free_memory_bytes(device: torch.device) -> int:
    """The memory that this process could still have: of the GPU, or of the machine, up to the container's limit."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    free = next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    return max(0, min([free, *(limit - used for limit, used in _container_memory())]))


def _container_memory(root: Path = Path("/")) -> Iterator[tuple[int, int]]:
    """(limit, used) bytes of each control group with a limit that this process is in, of version 2 or 1.

    Slurm and systemd set limits in groups of their own, below a container's. What the page cache could give back does
    not count as used. root: where proc and sys are.
    """
    files = {
        "": ("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
        "memory": ("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    }
    try:
        groups = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for group in groups:
        _, controller, path = group.split(":", 2)
        if controller not in files:
            continue
        mounted, limit, used, cache = files[controller]
        folder = root / mounted / path.lstrip("/")
        while folder.is_relative_to(root / mounted):
            with suppress(OSError, ValueError):  # no limit is "max", and a container does not see the groups above it
                lines = [line.split() for line in (folder / "memory.stat").read_text(encoding="utf-8").splitlines()]
                unused = sum(int(value) for key, value in lines if key == cache)
                most, taken = (int((folder / name).read_text(encoding="utf-8")) for name in (limit, used))
                yield most, taken - unused
            folder = folder.parent


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: on a GPU, inside its libraries, in Python, or in torch on a CPU.

    Only the first of these has an error class of its own; the others are RuntimeErrors with a text.
    """
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and (
        ("DefaultCPUAllocator" in text and "memory" in text) or any(part in text for part in _NO_MEMORY)
    )


def may_be_out_of_memory(error: BaseException) -> bool:
    """Whether memory may have run out: cuDNN and cuBLAS may say only that they cannot, for any reason."""
    text = str(error)
    return is_out_of_memory(error) or (
        isinstance(error, RuntimeError) and any(part in text for part in _MAYBE_NO_MEMORY)
    )


def retry_with_smaller_batch(attempt: Callable[[int], T], batch_size: int, shape: Sequence[int]) -> T:
    """Call `attempt(batch_size)` and return its result; while memory runs out, halve batch_size and call it again.

    attempt: leaves nothing behind when it fails. shape: of an image, for the error. Raises OutOfMemory if even one
    image does not fit, and MachineError if the GPU's libraries cannot compute one image and do not say why.
    """
    while True:
        try:
            return attempt(batch_size)
        except Exception as error:
            if not may_be_out_of_memory(error):
                raise
            reason, is_certain = first_line(error), is_out_of_memory(error)
        # Only here can memory be freed: the error is gone, and with it the frames that held what did not fit.
        free_memory()
        if batch_size == 1 and not is_certain:
            raise MachineError(
                f"{_current_device()} cannot compute one image of {' x '.join(map(str, shape))}",
                reason,
                "lower --img-size; or try other arithmetic, as --amp-dtype float32",
            )
        if batch_size == 1:
            raise OutOfMemory(
                f"no memory on {_current_device()} for one image of {' x '.join(map(str, shape))}",
                reason,
                "lower --img-size, compute with --amp-dtype bfloat16, or take a smaller model",
            )
        batch_size = math.ceil(batch_size / 2)


def free_memory() -> None:
    """Collect garbage, and return cached memory to the GPU."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextmanager
def oom_as_user_error(content: str, hint: str = "lower --batch-size or --img-size") -> Iterator[None]:
    """Turn the device's out-of-memory error into OutOfMemory. content: what did not fit, for the message."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(f"no memory on {_current_device()} for {content}", first_line(error), hint) from None


def available_cpus() -> int:
    """Number of CPU cores that this process may use, as Slurm or taskset granted them."""
    return len(os.sched_getaffinity(0))


def loading_workers(target: torch.device, cores_of_rank: int) -> tuple[int, str]:
    """Number of threads that load images for a rank, and why."""
    cores = plural(cores_of_rank, "core")
    if target.type != "cuda":
        return 1, f"for {cores} and device {target.type}"
    return min(16, max(1, cores_of_rank - 1)), f"for {cores}, less one that gives the GPU its work, at most 16"
