"""Probabilities -> the most probable classes."""

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]


def ranked(probabilities: Floats, k: int) -> npt.NDArray[np.int64]:
    """(n, classes) -> (n, k): the most probable classes of each row; of equal ones the first."""
    return np.argsort(-probabilities, axis=1, kind="stable")[:, :k]
