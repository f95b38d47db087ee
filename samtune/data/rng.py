"""Random numbers that belong to an image of an epoch, whoever asks for them, in whatever order."""

from typing import Any

import numpy as np
import numpy.typing as npt

from samtune.data.splits import Indices

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def uniform(seed: int, epoch: int, rows: Indices, count: int) -> npt.NDArray[np.float64]:
    """(n, count) numbers in [0, 1) for n rows: a function of (seed, epoch, row, place) alone.

    The counter-based form of SplitMix64 (Steele, Lea and Flood 2014): a whole batch in a few array operations, where a
    generator for each image would cost more than cropping it.
    """
    with np.errstate(over="ignore"):  # arithmetic modulo 2^64 is meant
        key = _mix(_mix(np.uint64(seed) * _GOLDEN + np.uint64(1)) + np.uint64(epoch) * _GOLDEN)
        of_row = _mix(key + rows.astype(np.uint64) * _GOLDEN)
        bits = _mix(of_row[:, None] + np.arange(1, count + 1, dtype=np.uint64) * _GOLDEN)
    drawn: npt.NDArray[np.float64] = (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return drawn


def _mix(x: Any) -> Any:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
