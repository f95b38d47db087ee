"""Weights as safetensors itself writes them, and errors that torch.save would hide."""

import errno
import hashlib
import io

import pytest
import safetensors.torch
import torch

from samtune.runs.hashed_file import _DTYPES, HashedFile, write_safetensors

WEIGHTS = {
    **{f"of.{dtype}": torch.arange(15).reshape(3, 5).to(dtype) for dtype in _DTYPES},
    "scalar": torch.tensor(3.0),
    "empty": torch.zeros(0, 4),
    'a "quoted" näme': torch.randn(7).bfloat16(),
}


def written(weights):
    buffer = io.BytesIO()
    file = HashedFile(buffer)
    write_safetensors(weights, file)
    return file, buffer.getvalue()


@pytest.mark.parametrize("weights", [WEIGHTS, {"a": WEIGHTS["scalar"]}, {}], ids=["all", "one", "none"])
def test_the_bytes_are_those_of_the_library(weights):
    file, content = written(weights)
    assert content == safetensors.torch.save(weights)
    assert (file.sha256(), file.size) == (hashlib.sha256(content).hexdigest(), len(content))


def test_the_order_of_memory_and_what_shares_it_do_not_matter():
    image = torch.randn(2, 3, 4, 5)
    given = {
        "last": image.to(memory_format=torch.channels_last),
        "tied": image,
        "part": image[1],
        "column": image[0, 0, :, 0],
    }
    assert written(given)[1] == safetensors.torch.save(
        {name: value.clone().contiguous() for name, value in given.items()}
    )


class Full(io.BytesIO):
    """Room for 1000 bytes."""

    refused = 0

    def write(self, content):
        if self.tell() + len(content) > 1000:
            self.refused += 1
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(content)


@pytest.mark.parametrize(
    "write", [lambda file: torch.save(WEIGHTS, file), lambda file: write_safetensors(WEIGHTS, file)]
)
def test_an_error_of_the_disk_is_kept_and_what_comes_after_it_is_dropped(write):
    disk = Full()
    file = HashedFile(disk)
    write(file)
    assert file.error is not None
    assert file.error.errno == errno.ENOSPC
    assert disk.refused == 1
