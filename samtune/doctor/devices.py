"""What a check finds, and the checks of devices: CPU, GPUs, memory layout, the arithmetic of SAM, collectives."""

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from samtune.errors import plural

Status = Literal["ok", "warning", "failed", "skipped"]
_RANKS_TIMEOUT = 60.0  # seconds
_TOLERANCE = 1e-12  # in float64, whose rounding leaves 1e-16
_BATCH, _ROUNDS = 16, 7  # of the passes that time a memory layout
_LAYOUT_SECONDS = 2.0  # time limit for each layout


@dataclass(frozen=True)
class Finding:
    """One result. value: one line of text. hint: how to fix what is broken. details: for programs."""

    name: str
    status: Status
    value: str
    hint: str = ""
    details: dict[str, Any] = field(default_factory=dict)


def gib(size: int) -> str:
    """A number of bytes in GiB."""
    return f"{size / (1 << 30):.1f} GiB"


def cpu() -> Iterator[Finding]:
    """Cores, threads, memory and precision of the CPU."""
    import torch

    from samtune.distributed import device

    on_cpu = torch.device("cpu")
    total, free = device.memory_bytes(on_cpu), device.free_memory_bytes(on_cpu)
    cores = device.available_cpus()
    yield Finding(
        "CPU",
        "ok",
        f"{plural(cores, 'core')}, {plural(torch.get_num_threads(), 'thread')}; "
        f"memory {gib(free)} free of {gib(total)}; best precision {device.best_dtype(on_cpu)[0]}",
        details={"cores": cores, "memory_bytes": total, "memory_free_bytes": free},
    )


def gpus() -> Iterator[Finding]:
    """Driver, memory and precision of each GPU."""
    import torch

    from samtune.distributed import device

    driver = _driver()
    if not torch.cuda.is_available():
        reason = device.no_gpu()
        if driver is None or os.environ.get("CUDA_VISIBLE_DEVICES") == "":
            yield Finding("GPU", "skipped", f"none: {reason}")
        else:
            hint = "install the torch that fits the driver: pytorch.org/get-started"
            yield Finding("GPU", "failed", f"driver {driver} is loaded, and torch sees no GPU: {reason}", hint)
        return
    for number in range(torch.cuda.device_count()):
        gpu = torch.device("cuda", number)
        free, total = torch.cuda.mem_get_info(gpu)
        about = torch.cuda.get_device_properties(gpu)
        yield Finding(
            f"GPU {number}",
            "ok" if torch.ones(8, device=gpu).sum().item() == 8 else "failed",
            f"{about.name}, memory {gib(free)} free of {gib(total)}, compute capability {about.major}.{about.minor}; "
            f"driver {driver}, CUDA {torch.version.cuda}; best precision {device.best_dtype(gpu)[0]}",
            details={"memory_bytes": total, "memory_free_bytes": free, "driver": driver, "cuda": torch.version.cuda},
        )


def _driver() -> str | None:
    with suppress(OSError):
        found = re.search(r"Kernel Module.*?(\d+\.[\d.]+)", Path("/proc/driver/nvidia/version").read_text())
        return found[1] if found else "unknown"
    return None


def channels_last() -> Iterator[Finding]:
    """The memory layout in which a small convolutional net trains faster."""
    import torch
    from torch import nn

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    net = nn.Sequential(
        nn.Conv2d(3, 32, 3, stride=2), nn.BatchNorm2d(32), nn.SiLU(), nn.Conv2d(32, 96, 1), nn.SiLU(),
        nn.Conv2d(96, 96, 3, groups=96), nn.SiLU(), nn.Conv2d(96, 32, 1), nn.AdaptiveAvgPool2d(1),
    ).to(device)  # fmt: skip
    side = 256 if device.type == "cuda" else 64  # pixels
    images = torch.randn(_BATCH, 3, side, side, device=device)

    def seconds(layout: torch.memory_format) -> float:
        net.to(memory_format=layout)
        given = images.contiguous(memory_format=layout)
        best, first = float("inf"), time.perf_counter()
        for done in range(_ROUNDS):  # the best time: the first rounds choose algorithms
            started = time.perf_counter()
            if done > 1 and started - first > _LAYOUT_SECONDS:
                break
            net(given).sum().backward()
            if device.type == "cuda":
                torch.cuda.synchronize()
            best = min(best, time.perf_counter() - started)
        return best

    plain, last = seconds(torch.contiguous_format), seconds(torch.channels_last)
    yield Finding(
        "channels-last",
        "ok",
        f"{plain / last:.2f} times the speed of the other layout on {device.type} ({1000 * last:.1f} and "
        f"{1000 * plain:.1f} ms, a small net)",
        "" if last <= 1.1 * plain else "--no-channels-last may be faster here",
        {"channels_last_seconds": last, "contiguous_seconds": plain, "device": device.type},
    )


def sam_step() -> Iterator[Finding]:
    """Compare samtune's gradient with the plain form of Foret et al. 2021, equations 2 and 3, on CPU and GPU."""
    import torch

    for device in ("cpu", "cuda")[: 1 + torch.cuda.is_available()]:
        largest = sam_difference(torch.device(device))
        ok = largest <= _TOLERANCE
        yield Finding(
            f"SAM step, {device}",
            "ok" if ok else "failed",
            f"differs from the plain form by {largest:.1e} of the gradient's size, in float64",
            "" if ok else "torch computes something else here: try another version of it, or another device",
            {"difference": largest},
        )


def sam_difference(device: Any) -> float:
    """Largest difference of samtune's gradient from the plain form's, in units of the largest gradient; in float64."""
    import torch
    from torch import nn
    from torch.nn import functional as F

    from samtune import SAM

    generator = torch.Generator().manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.Tanh(), nn.Flatten(), nn.Linear(8 * 36, 5)).double()
    with torch.no_grad():
        for w in net.parameters():
            w.copy_(0.3 * torch.randn(w.shape, generator=generator, dtype=torch.float64))
    net = net.to(device)
    images = torch.randn(6, 3, 8, 8, generator=generator, dtype=torch.float64).to(device)
    labels = torch.arange(6, device=device) % 5
    weights, rho = list(net.parameters()), 0.05

    def gradient() -> list[torch.Tensor]:
        return list(torch.autograd.grad(F.cross_entropy(net(images), labels), weights))

    at_w = gradient()
    norm = torch.sqrt(sum(((g**2).sum() for g in at_w), start=torch.zeros((), dtype=torch.float64, device=device)))
    backup = [w.detach().clone() for w in weights]
    with torch.no_grad():
        for w, g in zip(weights, at_w, strict=True):
            w.add_(rho * g / norm)
    plain = gradient()
    with torch.no_grad():
        for w, before in zip(weights, backup, strict=True):
            w.copy_(before)

    SAM(net, rho=rho).backward(lambda x, y: F.cross_entropy(net(x), y), images, labels)
    pairs = [(w.grad, g) for w, g in zip(weights, plain, strict=True)]
    size = max(float(g.abs().max()) for g in plain)
    return max(float((torch.zeros_like(g) if ours is None else ours - g).abs().max()) for ours, g in pairs) / size


def collectives() -> Iterator[Finding]:
    """A sum over two ranks: gloo on the CPU, nccl where each rank has a GPU."""
    yield _sum_over_ranks("gloo", "cpu")
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count < 2:
        yield Finding("nccl", "skipped", f"{'one GPU' if count else 'no GPU'} here: two ranks would need two")
    else:
        yield _sum_over_ranks("nccl", "cuda")


def _sum_over_ranks(backend: str, device: str) -> Finding:
    """Start two processes as the ranks of a run, and let them add their numbers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    started = time.monotonic()
    ranks = []
    try:
        for rank in range(2):
            env = os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            command, pipe = [sys.executable, "-c", _RANK, device], subprocess.PIPE
            ranks.append(subprocess.Popen(command, env=env, stdout=pipe, stderr=pipe, text=True))
        outputs = [rank.communicate(timeout=_RANKS_TIMEOUT) for rank in ranks]
    except subprocess.TimeoutExpired:
        return Finding(
            backend,
            "failed",
            f"two ranks have not added two numbers in {_RANKS_TIMEOUT:.0f} s",
            "see that processes may connect to each other on 127.0.0.1; GLOO_SOCKET_IFNAME or NCCL_DEBUG=INFO",
        )
    finally:
        for process in ranks:
            with process:
                if process.poll() is None:
                    process.kill()
    sums = [out.strip() for out, _ in outputs]
    if sums == ["3.0", "3.0"]:
        return Finding(backend, "ok", f"two ranks add 1 and 2 to 3 ({time.monotonic() - started:.1f} s with the start)")
    last = next((line for _, err in outputs for line in reversed(err.splitlines()) if line.strip()), "no output")
    return Finding(
        backend,
        "failed",
        f"two ranks do not add two numbers: {last.strip()}",
        "see that processes may connect to each other on 127.0.0.1",
    )


_RANK = """
import sys
import torch
from samtune.distributed import collectives, environment
device = torch.device(sys.argv[1], environment.rank_info().local_rank if sys.argv[1] == "cuda" else 0)
collectives.init(device)
value = torch.tensor([1.0 + collectives.rank()], device=device)
print(collectives.all_reduce_sum(value).item(), flush=True)
collectives.shutdown()
"""
