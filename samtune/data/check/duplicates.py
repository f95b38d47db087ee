"""The same picture more than once: equal files, and pictures that look the same after scaling or compression."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from samtune.data.check.scan import Picture

# Two perceptual hashes this close are compared again, by their thumbnails. In six data sets of photographs, pairs that
# an eye calls the same picture had at most 4 different bits and a correlation from 0.98 on; textures and small grey
# images have many pairs as close in bits alone.
_MOST_BITS = 4
_LEAST_CORRELATION = 0.98
_PAIRS_AT_ONCE = 100_000

Hashes = npt.NDArray[np.uint64]
Pairs = npt.NDArray[np.int64]  # (pairs, 2)


def exact(pictures: Sequence[Picture]) -> list[list[Picture]]:
    """Groups of two or more images whose files are equal, byte for byte."""
    groups: dict[bytes, list[Picture]] = {}
    for picture in pictures:
        if picture.sha256:
            groups.setdefault(picture.sha256, []).append(picture)
    return [group for group in groups.values() if len(group) > 1]


def near(pictures: Sequence[Picture]) -> list[list[Picture]]:
    """Groups of images that look the same though not all of their files are equal; equal files stand in them too."""
    copies: dict[bytes, list[Picture]] = {}
    for picture in pictures:
        if picture.hash is not None:
            copies.setdefault(picture.sha256, []).append(picture)
    files = list(copies.values())
    hashes = np.array([group[0].hash for group in files], dtype=np.uint64)
    pairs = close_pairs(hashes, _MOST_BITS)
    pairs = pairs[_alike(files, pairs)]
    links = coo_array((np.ones(len(pairs), dtype=bool), (pairs[:, 0], pairs[:, 1])), shape=(len(files), len(files)))
    _, component = connected_components(links, directed=False) if files else (0, np.empty(0, dtype=int))
    groups: dict[int, list[Picture]] = {}
    for i in np.unique(pairs):
        groups.setdefault(int(component[i]), []).extend(files[i])
    return list(groups.values())


def close_pairs(hashes: Hashes, distance: int) -> Pairs:
    """All pairs i < j of hashes that differ in at most so many of their 64 bits, ascending.

    Such hashes agree in one of distance + 1 bands of bits at least, so that only hashes that share a band are compared.
    """
    edges = [64 * band // (distance + 1) for band in range(distance + 2)]
    pairs = [np.empty((0, 2), dtype=np.int64)]
    for low, high in pairwise(edges):
        band = hashes >> np.uint64(low) & np.uint64((1 << (high - low)) - 1)
        order = np.argsort(band, kind="stable")
        band, ordered = band[order], hashes[order]
        first = np.arange(len(hashes))
        for ahead in range(1, len(hashes)):  # as often as the fullest bucket has hashes
            first = first[first + ahead < len(hashes)]
            first = first[band[first] == band[first + ahead]]
            if len(first) == 0:
                break
            close = first[np.bitwise_count(ordered[first] ^ ordered[first + ahead]) <= distance]
            pairs.append(np.stack([order[close], order[close + ahead]], axis=1))
    return np.unique(np.sort(np.concatenate(pairs), axis=1), axis=0)


def _alike(files: Sequence[Sequence[Picture]], pairs: Pairs) -> npt.NDArray[np.bool_]:
    if len(pairs) == 0:
        return np.empty(0, dtype=bool)
    grey = np.stack([np.frombuffer(group[0].thumbnail, dtype=np.uint8) for group in files]).astype(np.float32)
    grey -= grey.mean(1, keepdims=True)
    grey /= np.linalg.norm(grey, axis=1, keepdims=True)
    parts = np.array_split(pairs, 1 + len(pairs) // _PAIRS_AT_ONCE)
    correlation = np.concatenate([np.einsum("ij,ij->i", grey[part[:, 0]], grey[part[:, 1]]) for part in parts])
    alike: npt.NDArray[np.bool_] = correlation >= _LEAST_CORRELATION
    return alike
