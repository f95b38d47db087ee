"""The time and size of decoding a data set, estimated from a few of its images."""

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from samtune import console
from samtune.config.run_config import RunConfig
from samtune.data import cache
from samtune.data.cache import Images
from samtune.data.decode import DecodeRule
from samtune.data.source import Split
from samtune.data.splits import Indices

_FEW = 32  # images for the first, rough estimate
_MANY = 512  # most images to decode
_SECONDS = 4.0  # time for these
_READ = 2**30  # bytes of tables that are read to find out whether they are in the cache


@dataclass(frozen=True)
class Decoding:
    """The decoding of one part of the data.

    state: "kept" in the cache already; to be decoded "once"; or "every epoch", as the cache has no room for them or is
    off. seconds: for all of them before the first step. seconds_per_image: None where none was decoded. pixel_bytes:
    size of all, decoded.
    """

    images: int
    state: Literal["kept", "once", "every epoch"]
    seconds: float
    seconds_per_image: float | None
    pixel_bytes: int


@dataclass
class Sampler:
    """Decodes a few images of each part into a cache of its own, and estimates the decoding of all.

    root: an empty folder for that cache; nothing else is written. threads: number of decoding threads of a run.
    spent: seconds that sampling took.
    """

    root: Path
    threads: int
    found: list[Decoding] = field(default_factory=list)
    spent: float = 0.0

    def look(self, config: RunConfig, parts: Iterable[tuple[Split, Indices]], rule: DecodeRule) -> list[Images]:
        """The images of each (split, rows): all decoded if the run's cache has them, else some."""
        with console.RunProgress() as progress:
            return [self._look(config, split, np.unique(rows), rule, progress.count) for split, rows in parts]

    def _look(
        self, config: RunConfig, split: Split, rows: Indices, rule: DecodeRule, progress: cache.Progress
    ) -> Images:
        started = time.perf_counter()
        limit, always = int(config.cache_limit * 2**30), config.on_bad_image == "skip"
        if len(rows) == 0:
            return Images(split, rule)
        size = cache.estimated_bytes(split, rows, rule)
        fits = limit > 0 and size <= limit
        images, seconds, each = Images(split, rule), 0.0, None
        is_kept = fits and cache.is_cached(split, rows, rule, self.threads, progress, _READ)
        if is_kept:
            began = time.perf_counter()
            images = cache.decode_into_cache(
                split, rows, rule=rule, limit=limit, threads=self.threads, progress=progress
            )
            seconds = time.perf_counter() - began
        elif fits or always:
            images, each = self._sampled(split, rows, rule, _FEW, progress, fits)
            more = min(len(rows), _MANY, int(_SECONDS / each))
            if more > min(len(rows), _FEW):
                images, each = self._sampled(split, rows, rule, more, progress, fits)
            seconds = each * len(rows)
        state: Literal["kept", "once", "every epoch"] = "kept" if is_kept else "once" if fits else "every epoch"
        self.found.append(Decoding(len(rows), state, seconds, each, size))
        self.spent += time.perf_counter() - started
        return images

    def _sampled(
        self, split: Split, rows: Indices, rule: DecodeRule, count: int, progress: cache.Progress, fits: bool
    ) -> tuple[Images, float]:
        """Decode some of the rows, evenly spread; return the images and the seconds per image."""
        some = rows[np.unique(np.linspace(0, len(rows) - 1, min(count, len(rows))).round().astype(int))]
        started = time.perf_counter()
        images = cache.decode_into_cache(
            split,
            some,
            rule=rule,
            limit=2**62 if fits else 0,
            threads=self.threads,
            progress=progress,
            always=True,
            root=self.root,
        )
        return images, (time.perf_counter() - started) / len(some)


def rows_with_pixels(images: Images, rows: Indices) -> Indices:
    """The rows whose pixels are decoded; all rows if images are decoded in every epoch."""
    if images.pixels is None:
        return rows
    decoded: Indices = rows[np.isin(rows, list(images.slot_of))]
    return decoded
