"""A run that stands before its first step: its trainer, whose steps the caller takes, on random pictures.

Nothing is decoded: the pixels lie in one file, as in the cache of decoded images.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from samtune import console
from samtune.config import loading
from samtune.config.run_config import RunConfig
from samtune.data.cache import Images
from samtune.data.decode import DecodeRule
from samtune.data.pixels import Pixels
from samtune.data.source import Split
from samtune.data.splits import Indices
from samtune.distributed.signals import StopRequest
from samtune.runs.run_log import NullLog
from samtune.train import loop
from samtune.train.checkpointing import CheckpointSaver
from samtune.train.setup import Setup, build_setup
from samtune.train.state import TrainState
from samtune.train.watchdog import Watchdog

_SIDES = ((375, 500), (500, 375))  # height and width in pixels, in turn: as photographs in a data set have them
_STORED = 256  # different pictures at most


class _FirstStep(Exception):
    """args: what the first step is called with."""


class _UpToTheFirstStep(loop.Trainer):
    def _step(self, *given: Any) -> None:
        raise _FirstStep(*given)


@dataclass(frozen=True)
class SingleSteps:
    """The trainer of a run, and what it gives to each step. Calling it takes the next step."""

    trainer: loop.Trainer
    given: tuple[Any, ...]

    @property
    def setup(self) -> Setup:
        return self.trainer.setup

    def __call__(self) -> None:
        loop.Trainer._step(self.trainer, *self.given)


def write_pictures(folder: Path, images: int, classes: int) -> Callable[..., list[Images]]:
    """A data set of so many images to train on; returns what decodes it for `build_setup`.

    The files of the data set are only counted. Each row's pixels are one of a few random pictures.
    """
    for split, count in (("train", images), ("validation", classes)):
        for number in range(count):
            path = folder / split / f"class{number % classes:03}" / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (1, 1)).save(path)
    rng, stored = np.random.default_rng(0), min(images, _STORED)
    shapes = np.array([_SIDES[i % 2] for i in range(stored)])
    file = folder.parent / f"{folder.name}.pixels"
    with file.open("wb") as out:
        for height, width in shapes.tolist():
            out.write(rng.integers(0, 256, (height, width, 3), dtype=np.uint8).data)
    pixels = Pixels(file, np.arange(stored) * int(shapes[0].prod()) * 3, shapes)

    def decode(config: RunConfig, parts: Iterable[tuple[Split, Indices]], rule: DecodeRule) -> list[Images]:
        slots = [(split, {row: row % stored for row in rows.tolist()}) for split, rows in parts]
        return [Images(split, rule, pixels, slot_of) for split, slot_of in slots]

    return decode


def prepare(folder: Path, decode: Callable[..., list[Images]], **settings: Any) -> Setup:
    """A run that never ends, from random weights with frozen batch norm, on the data set in the folder."""
    always = {"pretrained": False, "freeze_bn": True, "epochs": "1000000 steps", "warmup_epochs": 0, "lr": 1e-4}
    always |= {"drop": 0.2, "smoothing": 0.1, "clip_grad": 1.0}  # as for pretrained weights
    config = loading.load(flags={"dataset": str(folder), **always, **settings})
    return build_setup(config, decode=decode)


def start(setup: Setup, folder: Path) -> SingleSteps:
    """The run as it is when `Trainer.train` calls its first step, with its loader at work; it writes nothing."""
    log, state = NullLog(folder, 0, setup.total_steps), TrainState()
    watchdog = Watchdog(0, lambda *_: None, lambda *_: None)
    parts = (CheckpointSaver(setup, log, None), StopRequest(), console.RunProgress(setup.total_steps), watchdog)
    try:
        _UpToTheFirstStep(setup, state, log, *parts).train()
    except _FirstStep as reached:
        return SingleSteps(loop.Trainer(setup, state, log, *parts), reached.args)
    raise AssertionError("a run without a step")
