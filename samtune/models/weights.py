"""Weights from files: of timm, of a training run here or elsewhere, of the first PyTorch EfficientNets."""

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
from samtune.text import plural

StateDict = dict[str, torch.Tensor]

# What training tools call the weights in their checkpoints; averaged weights first, as timm takes them.
_WEIGHTS = (
    *("state_dict_ema", "model_ema", "ema_state_dict", "ema", "state_dict", "model_state_dict", "model_state"),
    *("model", "net", "weights", "params", "network"),
)
# Files of a folder in timm's layout, in the order in which timm looks for them.
_FILES = ("model.safetensors", "pytorch_model.bin", "pytorch_model.pth", "model.pth")


@dataclass(frozen=True)
class WeightsFile:
    """Where weights are. config: what config.json beside them says of their model; {} if there is none."""

    path: Path
    config: Mapping[str, Any]


def locate(given: Path) -> WeightsFile:
    """The weights that a path means: a file, a run, a checkpoint of a run, or a folder that timm could load.

    Raises CheckpointError where there are none, or damaged ones.
    """
    if given.is_file():
        return WeightsFile(given, {})
    if not given.is_dir():
        raise CheckpointError(f"weights {given} are not there", hint="check the path of --weights")
    folder = checkpoint.find(given) if (given / "checkpoints").is_dir() else given
    if (folder / "manifest.json").is_file():
        checkpoint.verify(folder)
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
    """The weights of a file under the names that the model has; what was taken off or converted is said.

    Raises CheckpointError for a file that is damaged or holds code.
    """
    content, taken = _unwrapped(_load(path))
    state_dict = {key.replace("_orig_mod.", ""): value for key, value in content.items()}  # put there by torch.compile
    taken += ["prefix `_orig_mod.` taken off"] if state_dict.keys() != content.keys() else []
    names = list(model.state_dict())
    if any(key.endswith("_conv_stem.weight") for key in state_dict):
        names = ["_conv_stem.weight"]
    prefix = _prefix(state_dict, names)
    if prefix:
        left_out = len(state_dict)
        state_dict = {key.removeprefix(prefix): v for key, v in state_dict.items() if key.startswith(prefix)}
        left_out -= len(state_dict)
        others = f", {plural(left_out, 'other tensor')} left out" if left_out else ""
        taken.append(f"prefix `{prefix}` taken off{others}")
    if "_conv_stem.weight" in state_dict:
        state_dict = timm_names(state_dict, model)
        taken.append("names of the first PyTorch EfficientNets turned into timm's")
    if taken:
        console.info(f"{path}: {'; '.join(taken)}")
    return state_dict


def _load(path: Path) -> Any:
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):  # timm's own checkpoints have their options
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # each format has its own family of errors for damage
        pickled = "weights_only" in str(error)  # torch goes on to advise what would run the code
        raise CheckpointError(
            f"weights {path} cannot be read",
            "it holds objects that may run code, or is damaged" if pickled else first_line(error),
            "give a .safetensors file, or a .pth file that holds tensors only",
        ) from None


def _unwrapped(content: Any) -> tuple[StateDict, list[str]]:
    """The tensors of a checkpoint, which may lie some levels deep, and what was said on the way."""
    taken = []
    while isinstance(content, Mapping) and (key := next((key for key in _WEIGHTS if _holds(content, key)), None)):
        content = content[key]
        taken.append(f"`{key}` of it taken")
    tensors = content.items() if isinstance(content, Mapping) else ()
    return {str(key): value for key, value in tensors if isinstance(value, torch.Tensor)}, taken


def _holds(content: Mapping[str, Any], key: str) -> bool:
    return isinstance(content.get(key), Mapping) and len(content[key]) > 0


def _prefix(state_dict: Mapping[str, Any], names: list[str]) -> str:
    """What most of the names have before them in a state dict: "" or one such as `module.`."""
    wanted = set(names)
    found: Counter[str] = Counter()
    for key in state_dict:
        parts = key.split(".")
        for start in range(len(parts)):
            if ".".join(parts[start:]) in wanted:
                found[".".join([*parts[:start], ""])] += 1
    best = max(found, key=lambda prefix: (found[prefix], not prefix), default="")
    return best if 2 * found[best] > len(names) else ""  # of another model, names agree by chance


# --------------------------------------------------------------------------------------------------------- other names


def read_lite(path: Path, model: nn.Module) -> StateDict:
    """The weights inside one of the lite packages, whose file name ends with the start of their sha256."""
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if not digest.startswith(path.stem.rpartition("-")[2]):
        raise CheckpointError(f"weights {path} are damaged", f"sha256 is {digest}", "install the package again")
    return timm_names(_unwrapped(_load(path))[0], model)


def timm_names(published: Mapping[str, torch.Tensor], model: nn.Module) -> StateDict:
    """The names of the first PyTorch EfficientNets, the lite packages among them -> timm's.

    The published blocks count through (`_blocks.7`); timm's are numbered by stage (`blocks.3.1`). A block with an
    expansion has three convolutions, the first block two. Raises CheckpointError for a model that is no EfficientNet.
    """
    top = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
    squeeze = {"_se_reduce": "se.conv_reduce", "_se_expand": "se.conv_expand"}
    expanded = squeeze | {
        "_expand_conv": "conv_pw",
        "_bn0": "bn1",
        "_depthwise_conv": "conv_dw",
        "_bn1": "bn2",
        "_project_conv": "conv_pwl",
        "_bn2": "bn3",
    }
    plain = squeeze | {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
    stages: Any = getattr(model, "blocks", ())
    places = [f"blocks.{s}.{b}" for s, stage in enumerate(stages) for b in range(len(stage))]
    with_expansion = {int(key.split(".")[1]) for key in published if "_expand_conv" in key}
    state_dict = {}
    try:
        for key, value in published.items():
            parts = key.split(".")
            if parts[0] == "_blocks":
                block = int(parts[1])
                names = expanded if block in with_expansion else plain
                parts = [places[block], names[parts[2]], *parts[3:]]
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


# ------------------------------------------------------------------------------------------------------------- loading


def load(model: nn.Module, state_dict: StateDict, *, head: tuple[str, ...], origin: str) -> None:
    """Load all but the head (names of modules, which are new), and let nothing else differ.

    Position embeddings of another size are resampled as timm does for its own weights. Raises CheckpointError that
    names the first tensors that do not fit.
    """
    new = tuple(f"{name}." for name in head)
    expected = {k: tuple(v.shape) for k, v in model.state_dict().items() if not (new and k.startswith(new))}
    body = {key: value for key, value in state_dict.items() if not (new and key.startswith(new))}
    if _differences(expected, body):
        body = _converted(model, body, expected, new)
    wrong = _differences(expected, body)
    if wrong:
        raise CheckpointError(
            f"weights {origin} do not fit the model",
            f"{len(wrong)} of {len(expected)} tensors differ, first: {'; '.join(wrong[:3])}",
            "give weights of this architecture, for images of 3 channels, or their --model",
        )
    model.load_state_dict(body, strict=False)


def _differences(expected: Mapping[str, tuple[int, ...]], body: StateDict) -> list[str]:
    there = {key: tuple(value.shape) for key, value in body.items()}
    return [
        f"{key} is {there.get(key, 'missing')}, needed {expected.get(key, 'nowhere')}"
        for key in dict.fromkeys((*expected, *there))
        if there.get(key) != expected.get(key) and not (key.endswith("num_batches_tracked") and key not in there)
    ]


def _converted(
    model: nn.Module, body: StateDict, expected: Mapping[str, tuple[int, ...]], new: tuple[str, ...]
) -> StateDict:
    """By the function that timm's module of an architecture has for this; as it was, where there is none."""
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if convert is None:
        return body
    try:
        converted: StateDict = convert(dict(body), model)
    except Exception:  # weights of something else; the caller names the first tensors that differ
        return body
    converted = {key: value for key, value in converted.items() if not (new and key.startswith(new))}
    if not _differences(expected, converted):
        changed = [key for key in body if key in converted and body[key].shape != converted[key].shape]
        words = [f"{key} {tuple(body[key].shape)} -> {tuple(converted[key].shape)}" for key in changed]
        if words:
            console.info(f"resampled to the size of the input: {'; '.join(words[:3])}")
    return converted
