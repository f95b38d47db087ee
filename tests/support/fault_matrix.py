"""What may break, numbered, and the mark of the tests that break it.

A test that proves a row carries `@row(number)`, and is in the lane `python -m pytest -m fault` then;
tests/faults/test_matrix.py sees to it that no row goes without one.
"""

import pytest

ROWS = {
    1: "SIGKILL in the middle of a step",
    2: "SIGKILL inside a save, or in a step beside it",
    3: "SIGTERM",
    4: "a second SIGTERM or SIGINT",
    5: "checkpoint truncated, empty, changed, or a file of it missing",
    6: "pointer to nowhere; a clock that moved",
    7: "disk full in a save",
    8: "disk full for logs or plots",
    9: "run folder read-only, not empty, or in use",
    10: "NaN or inf in loss or gradient",
    11: "out of memory",
    12: "a rank killed, or the launcher",
    13: "a step that does not end",
    14: "a loader worker killed",
    15: "image truncated, empty, no image, with a wrong extension, or a decompression bomb",
    16: "images of odd modes, depths, frames, rotations and sizes",
    17: "labels missing, out of range, NaN, text or negative",
    18: "a class that a split lacks, another order of classes, no test split",
    19: "data set smaller than a batch; a last batch of one image",
    20: "the same image in train and in test",
    21: "model name misspelt; model without pretrained weights",
    22: "weights with another head, for other channels, of another architecture",
    23: "hub offline, refusing, busy or silent; a damaged file in its cache",
    24: "resume with other settings",
    25: "resume of a finished run",
    26: "code in a checkpoint or in weights",
    27: "settings of unknown name, wrong type or impossible value",
    28: "no GPU, or no driver",
    29: "a tracker that is down, raises or does not answer",
    30: "no terminal, an odd one, or a closed one",
    31: "a run of a sweep fails; the sweep is killed, stopped, or there twice",
}


def row(*numbers: int) -> pytest.MarkDecorator:
    """Mark a test with the rows that it proves. Raises ValueError for none, and for a number that is no row."""
    unknown = sorted(set(numbers) - ROWS.keys())
    if unknown or not numbers:
        raise ValueError(f"no row of the matrix: {unknown}" if unknown else "which row does the test prove?")
    return pytest.mark.fault(*numbers)
