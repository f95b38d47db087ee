"""Weights from files: timm's, those of training runs and tools, those of the first PyTorch EfficientNets."""

import argparse
import hashlib
import json
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

from samtune import console
from samtune.errors import CheckpointError, first_line
from samtune.runs import checkpoint

StateDict = dict[str, torch.Tensor]

# Keys of the weights in checkpoints of training tools; averaged weights first, as in timm.
_WEIGHTS_KEYS = (
    *("state_dict_ema", "model_ema", "ema_state_dict", "ema", "state_dict", "model_state_dict", "model_state"),
    *("model", "net", "weights", "params", "network"),
)
# Files of a folder in timm's layout, in the order in which timm looks for them.
_FILES = ("model.safetensors", "pytorch_model.bin", "pytorch_model.pth", "model.pth")


@dataclass(frozen=True)
class WeightsFile:
    """A file of weights. config: the content of config.json in its folder; {} without one."""

    path: Path
    config: Mapping[str, Any]


def locate(given: Path) -> WeightsFile:
    """Find the weights of a path: a file, a run, a checkpoint of a run, or a folder that timm could load.

    Raises CheckpointError where there are none, or damaged ones.
    """
    if given.is_file():
        return WeightsFile(given, {})
    if not given.is_dir():
        raise CheckpointError(f"weights {given} are not there", hint="check the path of --weights")
    folder = given
    if (given / "checkpoints").is_dir():
        folder = checkpoint.open_weights(given).weights  # verified
    elif (given / "manifest.json").is_file():
        checkpoint.verify(given)
    path = next((folder / name for name in _FILES if (folder / name).is_file()), None)
    if path is None:
        raise CheckpointError(
            f"folder {given} holds no weights", f"none of {', '.join(_FILES)}", "give a file, a run or a checkpoint"
        )
    try:
        text = (folder / "config.json").read_text(encoding="utf-8") if (folder / "config.json").is_file() else "{}"
        config = json.loads(text)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / 'config.json'} cannot be read", first_line(error)) from None
    return WeightsFile(path, config if isinstance(config, dict) and "architecture" in config else {})


def read(path: Path, model: nn.Module) -> StateDict:
    """Read the weights of a file under the model's names, and tell the user about each conversion.

    Raises CheckpointError for a file that is damaged or holds code.
    """
    content, changes = _unwrap(_load(path))
    state_dict = {key.replace("_orig_mod.", ""): value for key, value in content.items()}  # torch.compile's prefix
    changes += ["prefix `_orig_mod.` taken off"] if state_dict.keys() != content.keys() else []
    names = list(model.state_dict())
    if any(key.endswith("_conv_stem.weight") for key in state_dict):
        names = ["_conv_stem.weight"]
    prefix = _prefix(state_dict, names)
    if prefix:
        count = len(state_dict)
        state_dict = {key.removeprefix(prefix): v for key, v in state_dict.items() if key.startswith(prefix)}
        left_out = count - len(state_dict)
        changes.append(f"prefix `{prefix}` taken off" + (f", {left_out} other tensors left out" if left_out else ""))
    if "_conv_stem.weight" in state_dict:
        state_dict = timm_names(state_dict, model)
        changes.append("names of the first PyTorch EfficientNets turned into timm's")
    if changes:
        console.info(f"{path}: {'; '.join(changes)}")
    return state_dict


def _load(path: Path) -> Any:
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):  # the options in timm's checkpoints
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # each format has its own family of errors for damage
        pickled = "weights_only" in str(error)  # torch's message advises a load that runs code
        raise CheckpointError(
            f"weights {path} cannot be read",
            "it holds objects that may run code, or is damaged" if pickled else first_line(error),
            "give a .safetensors file, or a .pth file that holds tensors only",
        ) from None


def _unwrap(content: Any) -> tuple[StateDict, list[str]]:
    """The tensors of a checkpoint, which may be nested, and the keys that were entered, for a message."""
    changes = []
    while isinstance(content, Mapping) and (key := next((key for key in _WEIGHTS_KEYS if _holds(content, key)), None)):
        content = content[key]
        changes.append(f"`{key}` of it taken")
    tensors = content.items() if isinstance(content, Mapping) else ()
    return {str(key): value for key, value in tensors if isinstance(value, torch.Tensor)}, changes


def _holds(content: Mapping[str, Any], key: str) -> bool:
    return isinstance(content.get(key), Mapping) and len(content[key]) > 0


def _prefix(state_dict: Mapping[str, Any], names: list[str]) -> str:
    """The prefix of most names in a state dict, such as `module.`, or ""."""
    expected = set(names)
    counts: Counter[str] = Counter()
    for key in state_dict:
        parts = key.split(".")
        for start in range(len(parts)):
            if ".".join(parts[start:]) in expected:
                counts[".".join([*parts[:start], ""])] += 1
    best = max(counts, key=lambda prefix: (counts[prefix], not prefix), default="")
    return best if 2 * counts[best] > len(names) else ""  # a few names agree by chance


def read_lite(path: Path, model: nn.Module) -> StateDict:
    """Read the weights of a lite package. The file's name ends with the start of its sha256."""
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if not digest.startswith(path.stem.rpartition("-")[2]):
        raise CheckpointError(f"weights {path} are damaged", f"sha256 is {digest}", "install the package again")
    return timm_names(_unwrap(_load(path))[0], model)


def timm_names(published: Mapping[str, torch.Tensor], model: nn.Module) -> StateDict:
    """Rename the weights of the first PyTorch EfficientNets, lite packages included, to timm's names.

    The published blocks are numbered through (`_blocks.7`), those of timm by stage (`blocks.3.1`). A block with an
    expansion has three convolutions, the first block two. Raises CheckpointError for a model that is no EfficientNet.
    """
    top = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
    squeeze = {"_se_reduce": "se.conv_reduce", "_se_expand": "se.conv_expand"}
    expanded = squeeze | {"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2"}
    expanded |= {"_project_conv": "conv_pwl", "_bn2": "bn3"}
    plain = squeeze | {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
    stages: Any = getattr(model, "blocks", ())
    block_names = [f"blocks.{s}.{b}" for s, stage in enumerate(stages) for b in range(len(stage))]
    with_expansion = {int(key.split(".")[1]) for key in published if "_expand_conv" in key}
    state_dict = {}
    try:
        for key, value in published.items():
            parts = key.split(".")
            if parts[0] == "_blocks":
                block = int(parts[1])
                names = expanded if block in with_expansion else plain
                parts = [block_names[block], names[parts[2]], *parts[3:]]
            else:
                parts[0] = top[parts[0]]
            state_dict[".".join(parts)] = value
    except (LookupError, ValueError):
        raise CheckpointError(
            "the weights are those of an EfficientNet, and do not fit the model",
            f"its tensor {key} has no counterpart in {type(model).__name__}",
            "give their --model, as tf_efficientnet_b0",
        ) from None
    return state_dict


def load(model: nn.Module, state_dict: StateDict, *, head: tuple[str, ...], origin: str) -> None:
    """Load all weights except those of the head (names of its modules). Nothing else may be missing or extra.

    timm's own function resamples position embeddings of another size. Raises CheckpointError that names the first
    tensors that do not fit.
    """
    new = tuple(f"{name}." for name in head)
    expected = {k: tuple(v.shape) for k, v in model.state_dict().items() if not (new and k.startswith(new))}
    body = {key: value for key, value in state_dict.items() if not (new and key.startswith(new))}
    if _differences(expected, body):
        body = _convert(model, body, expected, new)
    wrong = _differences(expected, body)
    if wrong:
        raise CheckpointError(
            f"weights {origin} do not fit the model",
            f"{len(wrong)} of {len(expected)} tensors differ, first: {'; '.join(wrong[:3])}",
            "give weights of this architecture, for images of 3 channels, or their --model",
        )
    model.load_state_dict(body, strict=False)


def _differences(expected: Mapping[str, tuple[int, ...]], body: StateDict) -> list[str]:
    shapes = {key: tuple(value.shape) for key, value in body.items()}
    return [
        f"{key} is {shapes.get(key, 'missing')}, needed {expected.get(key, 'nowhere')}"
        for key in dict.fromkeys((*expected, *shapes))
        if shapes.get(key) != expected.get(key) and not (key.endswith("num_batches_tracked") and key not in shapes)
    ]


def _convert(
    model: nn.Module, body: StateDict, expected: Mapping[str, tuple[int, ...]], new: tuple[str, ...]
) -> StateDict:
    """Convert by the function of timm's module for the architecture; without one, return body unchanged."""
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if convert is None:
        return body
    try:
        converted: StateDict = convert(dict(body), model)
    except Exception:  # other weights: the caller names the first tensors that differ
        return body
    converted = {key: value for key, value in converted.items() if not (new and key.startswith(new))}
    if not _differences(expected, converted):
        changed = [key for key in body if key in converted and body[key].shape != converted[key].shape]
        resampled = [f"{key} {tuple(body[key].shape)} -> {tuple(converted[key].shape)}" for key in changed]
        if resampled:
            console.info(f"resampled to the size of the input: {'; '.join(resampled[:3])}")
    return converted
