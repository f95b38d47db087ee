"""The checks of `samtune doctor`: packages, memory, disks, the hub; devices.py has the others.

Checks are independent: a library that cannot be loaded fails only those that use it, and is imported inside them. No
check waits forever.
"""

import importlib.metadata
import os
import platform
import re
import shutil
import tempfile
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from samtune import __version__
from samtune.config import cache_folders
from samtune.doctor import devices
from samtune.doctor.devices import Finding, Status, gib
from samtune.errors import SamtuneError, first_line

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
"""Extra of the package -> what it adds."""

_LOW_DISK, _FULL_DISK = 5 << 30, 100 << 20  # bytes
_LOW_SHARED = 1 << 30
_HUB_TIMEOUT = 5.0  # seconds


def run_all(before_check: Callable[[str], None]) -> Iterator[Finding]:
    """Run all checks in order; an error in a check is a failed finding. before_check: called with each check's name."""
    for name, check in CHECKS.items():
        before_check(name)
        try:
            yield from check()
        except Exception as error:  # the other checks still run
            hint = error.hint if isinstance(error, SamtuneError) else ""
            yield Finding(name, "failed", error.message if isinstance(error, SamtuneError) else first_line(error), hint)


def _versions() -> Iterator[Finding]:
    yield Finding("samtune", "ok", f"{__version__}, Python {platform.python_version()}, {platform.platform()}")
    needed = [requirement for extra, requirement in _requirements() if extra is None]
    if not needed:
        yield Finding("packages", "skipped", "samtune runs from a folder: its requirements are not installed with it")
        return
    installed = {requirement.name: _version(requirement.name) for requirement in needed}
    wrong = [str(requirement) for requirement in needed if not _is_satisfied(requirement)]
    versions = ", ".join(f"{name} {version}" for name, version in installed.items())
    yield Finding(
        "packages",
        "failed" if wrong else "ok",
        f"missing or too old: {', '.join(wrong)}" if wrong else versions,
        f"pip install {' '.join(map(repr, wrong))}" if wrong else "",
        {"versions": installed},
    )


def _extras() -> Iterator[Finding]:
    by_extra: dict[str, list[Any]] = {}
    for extra, requirement in _requirements():
        if extra not in (None, "test"):
            by_extra.setdefault(str(extra), []).append(requirement)
    for extra, requirements in by_extra.items():
        missing = [str(requirement) for requirement in requirements if not _is_satisfied(requirement)]
        adds = EXTRAS.get(extra, "")
        state = f"missing: {', '.join(missing)}" if missing else "installed"
        yield Finding(
            f"extra {extra}",
            "skipped" if missing else "ok",
            f"{adds}; {state}".removeprefix("; "),
            f"pip install 'samtune[{extra}]'" if missing else "",
            {"packages": {requirement.name: _version(requirement.name) for requirement in requirements}, "adds": adds},
        )


def _requirements() -> Iterator[tuple[str | None, Any]]:
    """(extra or None, packaging's Requirement) of the installed package; nothing if it is not installed."""
    from packaging.requirements import Requirement

    with suppress(importlib.metadata.PackageNotFoundError):
        for line in importlib.metadata.requires("samtune") or []:
            extra = re.search(r"""extra\s*==\s*["'](.+?)["']""", line)
            yield (extra[1] if extra else None), Requirement(line.partition(";")[0])


def _version(name: str) -> str | None:
    with suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(name)
    return None


def _is_satisfied(requirement: Any) -> bool:
    version = _version(requirement.name)
    return version is not None and requirement.specifier.contains(version, prereleases=True)


def _shared_memory() -> Iterator[Finding]:
    """Free space in /dev/shm, through which data workers pass images."""
    folder = Path("/dev/shm")
    if not folder.is_dir():
        yield Finding("shared memory", "warning", f"there is no {folder}", "--workers 0 reads images without it")
        return
    usage = shutil.disk_usage(folder)
    is_low = usage.free < _LOW_SHARED
    yield Finding(
        "shared memory",
        "ok" if os.access(folder, os.W_OK) and not is_low else "warning",
        f"{gib(usage.free)} free of {gib(usage.total)} in {folder}",
        "docker run --shm-size 8g (or --ipc host) gives more; --workers 0 needs none" if is_low else "",
        {"free_bytes": usage.free, "total_bytes": usage.total},
    )


def _disks() -> Iterator[Finding]:
    """Free space and write permission where files are written."""
    from samtune import hub
    from samtune.data.cache import decoded_folder

    yield _disk("this folder", Path.cwd(), "runs go elsewhere by --output")
    yield _disk("decoded images", decoded_folder(), "SAMTUNE_CACHE sets another folder; --cache-limit 0 needs none")
    yield _disk("hub's cache", hub.cache_folder(), "HF_HOME sets another folder")
    yield _disk("temporary files", Path(tempfile.gettempdir()), "TMPDIR sets another folder")


def _disk(name: str, folder: Path, hint: str) -> Finding:
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    details = {"folder": str(folder), "free_bytes": free, "writable": cache_folders.is_writable(folder)}
    if not details["writable"]:
        return Finding(name, "warning", f"{folder} cannot be written", hint, details)
    status: Status = "failed" if free < _FULL_DISK else "warning" if free < _LOW_DISK else "ok"
    return Finding(
        name, status, f"{gib(free)} free in {folder}", "" if status == "ok" else f"make room; {hint}", details
    )


def _hub() -> Iterator[Finding]:
    from samtune import hub

    if hub.is_offline():
        yield Finding("hub", "skipped", "not asked: HF_HUB_OFFLINE is set", "", {"reachable": None})
    else:
        problem = _connection_problem(hub.endpoint())
        hint = "what is in the cache, in packages and in folders works without it; HF_ENDPOINT names a mirror"
        yield Finding(
            "hub",
            "warning" if problem else "ok",
            f"{hub.endpoint()} {problem or 'answers'}",
            hint if problem else "",
            {"reachable": not problem},
        )
    cached = hub.cached()
    size = sum(row["bytes"] for row in cached)
    kinds = [f"{sum(row['kind'] == kind for row in cached)} {kind}s" for kind in ("model", "dataset")]
    largest = sorted(cached, key=lambda row: -row["bytes"])[:3]
    named = "".join(f"; {row['id']} {gib(row['bytes'])}" for row in largest)
    yield Finding(
        "hub's cache holds", "ok", f"{', '.join(kinds)}, {gib(size)}{named}", details={"repositories": cached}
    )


def _connection_problem(address: str) -> str:
    """Why an address does not answer, or "". The request runs in a thread, because DNS has no time limit."""
    answers: list[str] = []

    def ask() -> None:
        try:
            with urllib.request.urlopen(f"{address}/api/models?limit=1", timeout=_HUB_TIMEOUT):
                answers.append("")
        except urllib.error.HTTPError as error:
            answers.append("" if error.code < 500 else f"answers {error.code}")
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", error)
            answers.append(f"cannot be reached: {reason}")

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(_HUB_TIMEOUT + 0.5)
    return answers[0] if answers else f"does not answer in {_HUB_TIMEOUT:.0f} s"


CHECKS: dict[str, Callable[[], Iterator[Finding]]] = {
    "versions": _versions,
    "CPU": devices.cpu,
    "GPU": devices.gpus,
    "channels-last": devices.channels_last,
    "SAM step": devices.sam_step,
    "collectives": devices.collectives,
    "shared memory": _shared_memory,
    "disks": _disks,
    "hub": _hub,
    "extras": _extras,
}
"""Name -> check. An error in a check is reported under its name."""
