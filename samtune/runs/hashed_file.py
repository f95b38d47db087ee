"""What a checkpoint's files are written through: a file that hashes its bytes, and weights streamed in safetensors.

`safetensors.torch.save` makes the whole file in memory and holds Python's lock while it does; `save_file` replaces its
target and hashes nothing. The format: https://github.com/huggingface/safetensors#format.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import BinaryIO

import torch

# Names of the format, in its order: a file has the tensors of the last one first, which aligns all of them.
_DTYPES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int64: "I64",
}
_ORDER = {dtype: rank for rank, dtype in enumerate(_DTYPES)}


class HashedFile:
    """A file open for writing, the SHA-256 of what was written so far, and its size in bytes.

    error: the first OSError. It is kept and not raised, because torch.save puts a RuntimeError of its own in its place;
    what is written after it is dropped.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._sum = hashlib.sha256()
        self.size = 0
        self.error: OSError | None = None

    def write(self, content: bytes | memoryview) -> int:
        """Append bytes; returns their number."""
        if self.error is None:
            try:
                self._file.write(content)
            except OSError as error:
                self.error = error
        self._sum.update(content)
        self.size += len(content)
        return len(content)

    def flush(self) -> None:
        """Do nothing: torch.save asks for it."""

    def sha256(self) -> str:
        """The sum in hexadecimal digits."""
        return self._sum.hexdigest()


def write_safetensors(weights: Mapping[str, torch.Tensor], file: HashedFile) -> None:
    """Write tensors as `safetensors.torch.save_file` does, one at a time. Those that share memory are written each."""
    names = sorted(weights, key=lambda name: (-_ORDER[weights[name].dtype], name))
    header, begin = {}, 0
    for name in names:
        value = weights[name]
        end = begin + value.numel() * value.element_size()
        header[name] = {"dtype": _DTYPES[value.dtype], "shape": list(value.shape), "data_offsets": [begin, end]}
        begin = end
    encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    encoded += b" " * (-len(encoded) % 8)
    file.write(len(encoded).to_bytes(8, "little") + encoded)
    for name in names:
        content = weights[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        file.write(content.numpy().data)
