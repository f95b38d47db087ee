"""What a run has come to, in sums: for runs that must be the same to the last bit."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from samtune.runs import checkpoint
from samtune.runs.folder import resolve_checkpoint

_TIMES = ("seconds", "images_per_second", "data_wait", "peak_memory_bytes")


def fingerprint(run: Path, name: str = "last") -> dict[str, str]:
    """sha256 of weights, averaged weights, optimizer, random numbers, metrics without their times, and predictions."""
    folder = resolve_checkpoint(run / "checkpoints", name)
    checkpoint.verify(folder)
    state = checkpoint.load_state(folder)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    timeless = [{key: value for key, value in row.items() if key not in _TIMES} for row in rows]
    found = {
        "weights": (folder / "model.safetensors").read_bytes(),
        "optimizer": _flat(state["optimizer"]),
        "scaler": _flat(state["scaler"]),
        "generators": _flat(state["generators"]),
        "metrics": json.dumps(timeless).encode(),
    }
    if (folder / "ema").is_dir():
        found["ema"] = (folder / "ema" / "model.safetensors").read_bytes()
    if (run / "predictions.parquet").exists():
        found["predictions"] = (run / "predictions.parquet").read_bytes()
    return {key: hashlib.sha256(value).hexdigest() for key, value in found.items()}


def _flat(value: Any) -> bytes:
    if isinstance(value, torch.Tensor):
        return str(value.dtype).encode() + value.contiguous().numpy().tobytes()
    if isinstance(value, dict):
        return b"".join(str(key).encode() + _flat(item) for key, item in sorted(value.items(), key=str))
    if isinstance(value, list | tuple):
        return b"".join(_flat(item) for item in value)
    return repr(value).encode()
