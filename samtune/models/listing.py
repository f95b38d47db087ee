"""The lists and the descriptions of `samtune models`, made without weights."""

import csv
import fnmatch
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from samtune import hub
from samtune.errors import DataError, ModelError, first_line
from samtune.models.build import build_on_meta, multiply_accumulates, weights_origin
from samtune.models.head import head_names
from samtune.models.names import ALIASES, from_scratch, nearest, pretraining_data
from samtune.models.timm_format import ModelSource, look_up
from samtune.sam import filters

MOST = 50
"""Models whose parameters are counted in one list: each takes about 0.2 s."""

FIRST_CHOICES = sorted({"tf_efficientnet_lite0", *(f"efficientnet_b{n}" for n in range(6)), *ALIASES})
"""The names of the short list."""

# Only a checkout of timm has this file.
_TABLE = Path(timm.__file__).parents[1] / "results" / "results-imagenet.csv"
_LARGE_PART = 0.8  # share of the body's parameters


def top1(table: Path | None = None) -> dict[str, float]:
    """Top-1 accuracy on ImageNet in %, by full name, from timm's results-imagenet.csv; {} without one.

    table: another file than that of timm's checkout. Raises DataError for one that is not timm's.
    """
    if table is None and not _TABLE.is_file():
        return {}
    path = table or _TABLE
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return {row["model"]: float(row["top1"]) for row in csv.DictReader(file)}
    except (OSError, ValueError, KeyError, csv.Error) as error:
        raise DataError(
            f"{path} is no table of timm's", first_line(error), "give its results/results-imagenet.csv"
        ) from None


def find(pattern: str) -> list[str]:
    """The names in `all_names` that match a pattern: a glob over the whole name, or a part of it.

    A name whose alias is in the list is left out. Raises ModelError with the nearest names where none matches.
    """
    glob = pattern if any(sign in pattern for sign in "*?[") else f"*{pattern}*"
    matches = [
        name
        for name in all_names()
        if fnmatch.fnmatchcase(name, glob) or fnmatch.fnmatchcase(name.partition(".")[0], glob)
    ]
    if not matches:
        raise ModelError(f"no model's name matches {pattern!r}", hint=nearest(pattern.strip("*")))
    with_alias = {ALIASES[name] for name in matches if name in ALIASES}
    return [name for name in matches if name not in with_alias]


def all_names() -> list[str]:
    """All aliases, all names that timm has pretrained weights for, and the networks that samtune adds to timm."""
    return [*ALIASES, *timm.list_pretrained(), *from_scratch()]


def rows(names: Sequence[str], accuracy: Mapping[str, float], *, count: bool) -> list[dict[str, Any]]:
    """A row for each model. count: count its parameters on the meta device.

    name, alias (or None), parameters (with the head of the weights; None where not counted), img_size (side in pixels),
    pretraining, top1 (%, or None), weights (package, cache, file, hub, url or "none"), licence.
    """
    return [
        {
            "name": source.resolved,
            "alias": name if name in ALIASES else None,
            "parameters": _count_parameters(source) if count else None,
            "img_size": source.data_config(None)["input_size"][1],
            "pretraining": pretraining_data(source.resolved),
            "top1": accuracy.get(source.resolved),
            "weights": weights_location(weights_origin(source)),
            "licence": source.config.get("license"),
        }
        for name, source in zip(names, map(look_up, names), strict=True)
    ]


def _count_parameters(source: ModelSource) -> int | None:
    try:
        return _size(build_on_meta(source))
    except ModelError:
        return None


def _size(module: nn.Module) -> int:
    return sum(w.numel() for w in module.parameters())


def weights_location(origin: str) -> str:
    """An origin of weights -> package, file, cache (of the hub), hub, url, or none."""
    kind, _, rest = origin.partition(":")
    if kind == "hub" and hub.Repository(rest, "model", rest, "").is_cached:
        return "cache"
    return kind or "none"


def table(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, str | float | None]]:
    """Rows for the terminal, without empty columns."""
    lines = []
    for row in rows:
        count = row["parameters"]
        line: dict[str, str | float | None] = {"model": row["name"]}
        line["params"] = None if count is None else f"{count / 1e6:.1f} M"
        line |= {"px": row["img_size"], "pretrained on": row["pretraining"].replace("ImageNet", "IN")}
        line |= {"top-1": row["top1"], "where": row["weights"]}
        lines.append(line)
    empty = {key for key in ("params", "top-1") if all(line[key] is None for line in lines)}
    return [{key: value for key, value in line.items() if key not in empty} for line in lines]


def describe(name: str, accuracy: Mapping[str, float]) -> dict[str, Any]:
    """Describe one model without its weights.

    macs: multiply-accumulates of one image; None where the model cannot run on the meta device. stages: name,
    parameters and output (shape without the batch) in the model's order. perturb: tensors and parameters that each
    filter selects. Raises ModelError for an unknown name or a hub that does not answer.
    """
    source = look_up(name)
    model = build_on_meta(source)
    origin = weights_origin(source)
    config = source.data_config(None)
    outputs, macs = _output_shapes(model, config["input_size"])
    return {
        "requested": name,
        "name": source.resolved,
        "architecture": source.architecture,
        "weights": origin or None,
        "where": weights_location(origin),
        "pretraining": pretraining_data(source.resolved),
        "licence": source.config.get("license"),
        "top1": accuracy.get(source.resolved),
        "parameters": _size(model),
        "macs": macs,
        "data_config": config,
        "classifier": list(head_names(model)),
        "stages": [
            {"name": stage, "parameters": _size(model.get_submodule(stage)), "output": outputs.get(stage)}
            for stage in stages(model)
        ],
        "perturb": {filter_: _filter_counts(model, filter_) for filter_ in ("all", "norm", "no-norm")},
    }


def stages(model: nn.Module) -> list[str]:
    """Names of a model's parts that have parameters; a list of blocks that is most of the model is split."""
    children = {name: child for name, child in model.named_children() if _size(child)}
    heads = {head.partition(".")[0] for head in head_names(model)}
    body = sum(_size(child) for name, child in children.items() if name not in heads)
    names = []
    for name, child in children.items():
        if isinstance(child, nn.Sequential | nn.ModuleList) and _size(child) > _LARGE_PART * body:
            names += [f"{name}.{part}" for part, _ in child.named_children()]
        else:
            names.append(name)
    return names


def _output_shapes(model: nn.Module, input_size: Sequence[int]) -> tuple[dict[str, list[int]], int | None]:
    """Output shapes of the stages for one image, and its multiply-accumulates."""
    shapes: dict[str, list[int]] = {}

    def keep(name: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if isinstance(output, torch.Tensor):
                shapes[name] = list(output.shape[1:])

        return hook

    hooks = [model.get_submodule(name).register_forward_hook(keep(name)) for name in stages(model)]
    try:
        return shapes, multiply_accumulates(model, input_size)
    except (RuntimeError, NotImplementedError, TypeError, ValueError, AssertionError):  # code that reads values
        return shapes, None
    finally:
        for hook in hooks:
            hook.remove()


def _filter_counts(model: nn.Module, perturb: str) -> dict[str, int]:
    try:
        chosen = filters.select_parameters(model, perturb)
    except ValueError:  # none
        return {"tensors": 0, "parameters": 0}
    return {"tensors": len(chosen), "parameters": sum(w.numel() for w in chosen.values())}


def description_rows(about: Mapping[str, Any]) -> dict[str, str]:
    """A description without its stages, for the terminal."""
    data = about["data_config"]
    rows = {
        "weights": f"{about['weights'] or 'none'}" + (" (in the cache)" if about["where"] == "cache" else ""),
        "pretrained on": about["pretraining"],
        "licence of the weights": about["licence"] or "not stated",
        "ImageNet top-1": "" if about["top1"] is None else f"{about['top1']:.2f} % (timm's table)",
        "parameters": f"{about['parameters']:,}",
        "multiply-accumulates": "" if about["macs"] is None else f"{about['macs'] / 1e9:.2f} G an image",
        "input": " x ".join(map(str, data["input_size"])),
        "mean, std": "; ".join(", ".join(f"{value:.4g}" for value in data[key]) for key in ("mean", "std")),
        "evaluation": f"{data['interpolation']}, crop {data['crop_pct']:g} ({data['crop_mode']})",
        "classifier": ", ".join(about["classifier"]),
    }
    rows |= {
        f"--perturb {name}": f"{counts['parameters']:,} in {counts['tensors']:,} tensors"
        for name, counts in about["perturb"].items()
    }
    return {key: value for key, value in rows.items() if value}


def stage_rows(about: Mapping[str, Any]) -> list[dict[str, str | float | None]]:
    """The stages, for the terminal."""
    return [
        {
            "stage": stage["name"],
            "parameters": f"{stage['parameters']:,}",
            "output": " x ".join(map(str, stage["output"])) if stage["output"] else None,
        }
        for stage in about["stages"]
    ]


def example(about: Mapping[str, Any]) -> str:
    """How to perturb only one stage, by the example of the last one before the classifier."""
    heads = {head.partition(".")[0] for head in about["classifier"]}
    body = [stage["name"] for stage in about["stages"] if stage["name"].partition(".")[0] not in heads]
    parts = [name for name in body if "." in name] or body  # of a list of blocks, if there is one
    name = parts[-1].replace(".", r"\.")
    return rf"--perturb '^{name}\.' perturbs only that stage: a regular expression is searched for in parameter names"
