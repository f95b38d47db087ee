"""What `samtune doctor` looks at: each check says what it found, and what would fix it.

No check needs another: a library that cannot be loaded fails those that use it, and the rest goes on. Nothing heavy is
imported before a check needs it. No check waits for ever.
"""

import importlib.metadata
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from samtune import __version__
from samtune.config import cache_folders
from samtune.errors import SamtuneError, first_line
from samtune.files import first_existing_parent
from samtune.text import plural

Status = Literal["ok", "warning", "failed", "skipped"]

EXTRAS = {
    "demo": "a first run without a hub: lite0's real weights and 5,000 real digits",
    "check": "data check finds duplicates that were scaled or compressed again",
    "onnx": "samtune export --to onnx",
    "track": "--track sends curves to TensorBoard or Weights & Biases",
    "heif": "pictures of telephones (HEIF, AVIF)",
    "jxl": "JPEG XL pictures",
    "ray": "sweep --engine ray: the runs of a sweep on a cluster",
    "test": "samtune's own tests",
}
"""What each extra of the package adds."""

_GIB = 1 << 30
_LITTLE_DISK, _NO_DISK = 5 * _GIB, 100 << 20
_LITTLE_SHARED = 1 << 30
_PATIENCE_HUB, _PATIENCE_RANKS = 5.0, 60.0  # seconds
_EXACT = 1e-12  # of float64: rounding leaves 1e-16
_BATCH, _ROUNDS = 16, 7  # of the passes that time a memory layout
_TIMED = 2.0  # seconds for each layout, where passes are slow


@dataclass(frozen=True)
class Finding:
    """What a check found.

    value: in words, one line. hint: what fixes it, where something is broken. details: for programs.
    """

    name: str
    status: Status
    value: str
    hint: str = ""
    details: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """As `--json` prints it."""
        return asdict(self)


def run_all(begin: Callable[[str], None]) -> Iterator[Finding]:
    """The findings of all checks, one after the other. An error of a check is a finding, too: it failed.

    begin: is told the name of each check before it.
    """
    for name, check in CHECKS.items():
        begin(name)
        try:
            yield from check()
        except Exception as error:  # whatever is broken, the other checks go on
            hint = error.hint if isinstance(error, SamtuneError) else ""
            yield Finding(name, "failed", error.message if isinstance(error, SamtuneError) else first_line(error), hint)


# ------------------------------------------------------------------------------------------------------------ packages


def _versions() -> Iterator[Finding]:
    yield Finding("samtune", "ok", f"{__version__}, Python {platform.python_version()}, {platform.platform()}")
    needed = [wanted for extra, wanted in _requirements() if extra is None]
    if not needed:
        yield Finding("packages", "skipped", "samtune runs from a folder: its requirements are not installed with it")
        return
    found = {wanted.name: _installed(wanted.name) for wanted in needed}
    wrong = [str(w) for w in needed if not _satisfied(w)]
    yield Finding(
        "packages",
        "failed" if wrong else "ok",
        f"not here, or too old: {', '.join(wrong)}" if wrong else ", ".join(f"{n} {v}" for n, v in found.items()),
        f"pip install {' '.join(repr(w) for w in wrong)}" if wrong else "",
        {"versions": found},
    )


def _extras() -> Iterator[Finding]:
    """Optional packages, by extra."""
    by_extra: dict[str, list[Any]] = {}
    for extra, wanted in _requirements():
        if extra not in (None, "test"):
            by_extra.setdefault(str(extra), []).append(wanted)
    for extra, wanted in by_extra.items():
        missing = [str(w) for w in wanted if not _satisfied(w)]
        adds = EXTRAS.get(extra, "")
        here = f"not here: {', '.join(missing)}" if missing else "installed"
        yield Finding(
            f"extra {extra}",
            "skipped" if missing else "ok",
            f"{adds}; {here}".removeprefix("; "),
            f"pip install 'samtune[{extra}]'" if missing else "",
            {"packages": {w.name: _installed(w.name) for w in wanted}, "adds": adds},
        )


def _requirements() -> Iterator[tuple[str | None, Any]]:
    """(extra or None, packaging's Requirement) of what the installed package states; nothing if it is not installed."""
    from packaging.requirements import Requirement

    with suppress(importlib.metadata.PackageNotFoundError):
        for line in importlib.metadata.requires("samtune") or []:
            extra = re.search(r"""extra\s*==\s*["'](.+?)["']""", line)
            yield (extra[1] if extra else None), Requirement(line.partition(";")[0])


def _installed(name: str) -> str | None:
    """A package's version."""
    with suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(name)
    return None


def _satisfied(wanted: Any) -> bool:
    version = _installed(wanted.name)
    return version is not None and wanted.specifier.contains(version, prereleases=True)


# ------------------------------------------------------------------------------------------------------------- devices


def _cpu() -> Iterator[Finding]:
    import torch

    from samtune.distributed import device

    total, free = _memory()
    cores = device.available_cpus()
    yield Finding(
        "CPU",
        "ok",
        f"{plural(cores, 'core')}, {plural(torch.get_num_threads(), 'thread')}; "
        f"memory {_gib(free)} free of {_gib(total)}; best precision {device.best_dtype(torch.device('cpu'))}",
        details={"cores": cores, "memory_bytes": total, "memory_free_bytes": free},
    )


def _memory() -> tuple[int, int]:
    """(total, available) bytes of main memory, or of the part that a container may use."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    sizes = {line.split(":")[0]: 1024 * int(line.split()[1]) for line in lines}
    total, free = sizes["MemTotal"], sizes["MemAvailable"]
    with suppress(OSError, ValueError):  # "max" where there is no limit
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        total, free = min(total, limit), min(free, max(0, limit - used))
    return total, free


def _gpus() -> Iterator[Finding]:
    import torch

    from samtune.distributed import device

    driver = _driver()
    if not torch.cuda.is_available():
        broken = driver is not None and os.environ.get("CUDA_VISIBLE_DEVICES") != ""
        yield Finding(
            "GPU",
            "failed" if broken else "skipped",
            f"driver {driver} is here, and torch sees no GPU: {device.no_gpu()}"
            if broken
            else f"none: {device.no_gpu()}",
            "install the torch that fits the driver: pytorch.org/get-started" if broken else "",
        )
        return
    for number in range(torch.cuda.device_count()):
        gpu = torch.device("cuda", number)
        free, total = torch.cuda.mem_get_info(gpu)
        about = torch.cuda.get_device_properties(gpu)
        yield Finding(
            f"GPU {number}",
            "ok" if torch.ones(8, device=gpu).sum().item() == 8 else "failed",
            f"{about.name}, memory {_gib(free)} free of {_gib(total)}, compute capability {about.major}.{about.minor}; "
            f"driver {driver}, CUDA {torch.version.cuda}; best precision {device.best_dtype(gpu)}",
            details={"memory_bytes": total, "memory_free_bytes": free, "driver": driver, "cuda": torch.version.cuda},
        )


def _driver() -> str | None:
    """Version of NVIDIA's driver, if it is loaded."""
    with suppress(OSError):
        found = re.search(r"Kernel Module.*?(\d+\.[\d.]+)", Path("/proc/driver/nvidia/version").read_text())
        return found[1] if found else "unknown"
    return None


def _layout() -> Iterator[Finding]:
    """Which memory layout a small convolutional net trains faster in."""
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
        best, begun = float("inf"), time.perf_counter()
        for done in range(_ROUNDS):  # the first ones choose algorithms; the best one met no other work
            started = time.perf_counter()
            if done > 1 and started - begun > _TIMED:
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


def _sam_step() -> Iterator[Finding]:
    """The gradient of samtune beside the plain form of Foret et al. 2021, equations 2 and 3, on each kind of device."""
    import torch

    for device in ("cpu", "cuda")[: 1 + torch.cuda.is_available()]:
        largest = sam_difference(torch.device(device))
        ok = largest <= _EXACT
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
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.Tanh(), nn.Flatten(), nn.Linear(8 * 36, 5))
    net = net.double()
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
    kept = [w.detach().clone() for w in weights]
    with torch.no_grad():
        for w, g in zip(weights, at_w, strict=True):
            w.add_(rho * g / norm)
    plain = gradient()
    with torch.no_grad():
        for w, before in zip(weights, kept, strict=True):
            w.copy_(before)

    SAM(net, rho=rho).backward(lambda x, y: F.cross_entropy(net(x), y), images, labels)
    pairs = [(w.grad, g) for w, g in zip(weights, plain, strict=True)]
    size = max(float(g.abs().max()) for g in plain)
    return max(float((torch.zeros_like(g) if own is None else own - g).abs().max()) for own, g in pairs) / size


# --------------------------------------------------------------------------------------------------------- collectives


def _collectives() -> Iterator[Finding]:
    """A sum over two ranks: by gloo on the CPU, by nccl where there is a GPU for each."""
    yield _sum_over_ranks("gloo", "cpu")
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpus < 2:
        yield Finding("nccl", "skipped", f"{'one GPU' if gpus else 'no GPU'} here: two ranks would need two")
    else:
        yield _sum_over_ranks("nccl", "cuda")


def _sum_over_ranks(backend: str, device: str) -> Finding:
    """Two processes join each other as the ranks of a run do, and add their numbers."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    everywhere = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    started = time.monotonic()
    ranks = []
    try:
        for rank in range(2):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            ranks.append(
                subprocess.Popen(
                    [sys.executable, "-c", _RANK, device],
                    env=os.environ | everywhere | place,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
        said = [rank.communicate(timeout=_PATIENCE_RANKS) for rank in ranks]
    except subprocess.TimeoutExpired:
        return Finding(
            backend,
            "failed",
            f"two ranks have not added two numbers in {_PATIENCE_RANKS:.0f} s",
            "see that processes may connect to each other on 127.0.0.1; GLOO_SOCKET_IFNAME or NCCL_DEBUG=INFO",
        )
    finally:
        for process in ranks:
            with process:
                if process.poll() is None:
                    process.kill()
    sums = [out.strip() for out, _ in said]
    if sums == ["3.0", "3.0"]:
        return Finding(backend, "ok", f"two ranks add 1 and 2 to 3 ({time.monotonic() - started:.1f} s with the start)")
    last = next((line for _, err in said for line in reversed(err.splitlines()) if line.strip()), "no word")
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
here = torch.device(sys.argv[1], environment.rank_info().local_rank if sys.argv[1] == "cuda" else 0)
collectives.init(here)
mine = torch.tensor([1.0 + collectives.rank()], device=here)
print(collectives.all_reduce_sum(mine).item(), flush=True)
collectives.shutdown()
"""


# ---------------------------------------------------------------------------------------------------- memory and disks


def _shared_memory() -> Iterator[Finding]:
    """What data workers hand images over in."""
    folder = Path("/dev/shm")
    if not folder.is_dir():
        yield Finding("shared memory", "warning", f"there is no {folder}", "--workers 0 reads images without it")
        return
    usage = shutil.disk_usage(folder)
    little = usage.free < _LITTLE_SHARED
    yield Finding(
        "shared memory",
        "ok" if os.access(folder, os.W_OK) and not little else "warning",
        f"{_gib(usage.free)} free of {_gib(usage.total)} in {folder}",
        "docker run --shm-size 8g (or --ipc host) gives more; --workers 0 needs none" if little else "",
        {"free_bytes": usage.free, "total_bytes": usage.total},
    )


def _disks() -> Iterator[Finding]:
    """Room and permission where files are written."""
    from samtune.data.cache import decoded_folder

    yield _disk("this folder", Path.cwd(), "runs go elsewhere by --output")
    yield _disk("decoded images", decoded_folder(), "SAMTUNE_CACHE sets another folder; --cache-limit 0 needs none")
    yield _disk("hub's cache", _hub_cache(), "HF_HOME sets another folder")
    yield _disk("temporary files", Path(tempfile.gettempdir()), "TMPDIR sets another folder")


def _disk(name: str, folder: Path, hint: str) -> Finding:
    there = first_existing_parent(folder)
    free = shutil.disk_usage(there).free
    details = {"folder": str(folder), "free_bytes": free, "writable": cache_folders.is_writable(folder)}
    if not details["writable"]:
        return Finding(name, "warning", f"{folder} cannot be written", hint, details)
    status: Status = "failed" if free < _NO_DISK else "warning" if free < _LITTLE_DISK else "ok"
    return Finding(
        name, status, f"{_gib(free)} free in {folder}", "" if status == "ok" else f"make room; {hint}", details
    )


# ----------------------------------------------------------------------------------------------------------------- hub


def _hub_cache() -> Path:
    from samtune import hub

    return hub.cache_folder()


def _hub() -> Iterator[Finding]:
    from samtune import hub

    if hub.is_offline():
        yield Finding("hub", "skipped", "not asked: HF_HUB_OFFLINE is set", "", {"reachable": None})
    else:
        trouble = _trouble_with(hub.endpoint())
        yield Finding(
            "hub",
            "warning" if trouble else "ok",
            f"{hub.endpoint()} {trouble or 'answers'}",
            "what is in the cache, in packages and in folders works without it; HF_ENDPOINT names a mirror"
            if trouble
            else "",
            {"reachable": not trouble},
        )
    held = hub.cached()
    size = sum(row["bytes"] for row in held)
    kinds = [f"{sum(row['kind'] == kind for row in held)} {kind}s" for kind in ("model", "dataset")]
    largest = sorted(held, key=lambda row: -row["bytes"])[:3]
    named = "".join(f"; {row['id']} {_gib(row['bytes'])}" for row in largest)
    yield Finding("hub's cache holds", "ok", f"{', '.join(kinds)}, {_gib(size)}{named}", details={"repositories": held})


def _trouble_with(address: str) -> str:
    """Why an address does not answer, or "". Asked in a thread: looking up a name may take longer than any limit."""
    said: list[str] = []

    def ask() -> None:
        try:
            with urllib.request.urlopen(f"{address}/api/models?limit=1", timeout=_PATIENCE_HUB):
                said.append("")
        except urllib.error.HTTPError as error:
            said.append("" if error.code < 500 else f"answers {error.code}")
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", error)
            said.append(f"cannot be reached: {reason}")

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(_PATIENCE_HUB + 0.5)
    return said[0] if said else f"does not answer in {_PATIENCE_HUB:.0f} s"


def _gib(size: int) -> str:
    return f"{size / _GIB:.1f} GiB"


CHECKS: dict[str, Callable[[], Iterator[Finding]]] = {
    "versions": _versions,
    "CPU": _cpu,
    "GPU": _gpus,
    "channels-last": _layout,
    "SAM step": _sam_step,
    "collectives": _collectives,
    "shared memory": _shared_memory,
    "disks": _disks,
    "hub": _hub,
    "extras": _extras,
}
"""Each check, by the name that an error in it is reported under."""
