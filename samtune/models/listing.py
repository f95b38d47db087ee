"""The models that there are, as `samtune models` lists them, and what is known of one before it is built."""

import csv
import fnmatch
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from samtune import hub
from samtune.errors import DataError, ModelError, first_line
from samtune.models import pretrained
from samtune.sam import filters

MOST = 50
"""Models whose parameters are counted in one list: each takes about 0.2 s."""

_FIRST = ("tf_efficientnet_lite0", *(f"efficientnet_b{n}" for n in range(6)))
# A checkout of timm has its own tables; what pip installs has not.
_TABLE = Path(timm.__file__).parents[1] / "results" / "results-imagenet.csv"
_MOST_OF_IT = 0.8  # share of the body's parameters


def top1(table: Path | None = None) -> dict[str, float]:
    """Top-1 accuracy on ImageNet in %, by full name, as timm's results-imagenet.csv says; {} where there is none.

    table: the file, if it is not that of timm's checkout. Raises DataError for one that is not timm's.
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


def first_choices() -> list[str]:
    """Names that people begin with: EfficientNets, and all aliases."""
    return sorted({*_FIRST, *pretrained.ALIASES})


def find(pattern: str) -> list[str]:
    """Aliases and pretrained names that a pattern matches: a glob over the whole name, or a part of it.

    What an alias of the list means is not in it a second time. Raises ModelError with the nearest names for none.
    """
    is_glob = any(sign in pattern for sign in "*?[")
    matching = pattern if is_glob else f"*{pattern}*"
    found = [
        name
        for name in every()
        if fnmatch.fnmatchcase(name, matching) or fnmatch.fnmatchcase(name.partition(".")[0], matching)
    ]
    if not found:
        raise ModelError(f"no pretrained model's name matches {pattern!r}", hint=pretrained.nearest(pattern.strip("*")))
    said = {pretrained.ALIASES[name] for name in found if name in pretrained.ALIASES}
    return [name for name in found if name not in said]


def every() -> list[str]:
    """All aliases, and all names that timm has pretrained weights for."""
    return [*pretrained.ALIASES, *timm.list_pretrained()]


def rows(names: Sequence[str], accuracy: Mapping[str, float], *, count: bool) -> list[dict[str, Any]]:
    """What is known of each model. count: count parameters too, by an outline of the model.

    name, alias (what --model may say in its place, or None), parameters (with the head of the weights), img_size (side
    in pixels), pretraining, top1 (%, or None), weights (package, cache, file, hub, url or "none"), licence.
    """
    return [_row(name, accuracy, count=count) for name in names]


def _row(name: str, accuracy: Mapping[str, float], *, count: bool) -> dict[str, Any]:
    source = pretrained.look_up(name)
    return {
        "name": source.resolved,
        "alias": name if name in pretrained.ALIASES else None,
        "parameters": _counted(source) if count else None,
        "img_size": source.data_config(None)["input_size"][1],
        "pretraining": pretrained.pretraining_data(source.resolved),
        "top1": accuracy.get(source.resolved),
        "weights": place(pretrained.origin(source)),
        "licence": source.config.get("license"),
    }


def _counted(source: pretrained.ModelSource) -> int | None:
    """Parameters of a model; None where it cannot be outlined."""
    try:
        return sum(w.numel() for w in pretrained.outline(source).parameters())
    except ModelError:
        return None


def place(origin: str) -> str:
    """Where weights are, in one word: package, file, cache (of the hub), hub, url, or none."""
    kind, _, where = origin.partition(":")
    if kind == "hub" and hub.Repository(where, "model", where, "").is_cached:
        return "cache"
    return kind or "none"


def table(found: Sequence[Mapping[str, Any]]) -> list[dict[str, str | float | None]]:
    """Rows as a terminal shows them; columns that would be empty are left out."""
    lines = []
    for row in found:
        count = row["parameters"]
        line: dict[str, str | float | None] = {"model": row["name"]}
        line["params"] = None if count is None else f"{count / 1e6:.1f} M"
        line |= {"px": row["img_size"], "pretrained on": row["pretraining"].replace("ImageNet", "IN")}
        line |= {"top-1": row["top1"], "where": row["weights"]}
        lines.append(line)
    empty = {key for key in ("params", "top-1") if all(line[key] is None for line in lines)}
    return [{key: value for key, value in line.items() if key not in empty} for line in lines]


def alias_lines(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """What may be said in place of a listed name."""
    return [f"--model {row['alias']} is {row['name']}" for row in found if row["alias"]]


def describe(name: str, accuracy: Mapping[str, float]) -> dict[str, Any]:
    """All that is known of one model without its weights.

    macs: multiply-accumulates of one image; None where the model cannot run on shapes alone. stages: name, parameters
    and output (shape without the batch) in the model's order. perturb: tensors and parameters that a filter of that
    name lets through. Raises ModelError for an unknown name, and what keeps the hub from answering.
    """
    source = pretrained.look_up(name)
    model = pretrained.outline(source)
    origin = pretrained.origin(source)
    config = source.data_config(None)
    outputs, macs = _passed_through(model, config["input_size"])
    return {
        "requested": name,
        "name": source.resolved,
        "architecture": source.architecture,
        "weights": origin or None,
        "where": place(origin),
        "pretraining": pretrained.pretraining_data(source.resolved),
        "licence": source.config.get("license"),
        "top1": accuracy.get(source.resolved),
        "parameters": sum(w.numel() for w in model.parameters()),
        "macs": macs,
        "data_config": config,
        "classifier": list(_heads(model)),
        "stages": [
            {
                "name": stage,
                "parameters": sum(w.numel() for w in model.get_submodule(stage).parameters()),
                "output": outputs.get(stage),
            }
            for stage in stages(model)
        ],
        "perturb": {filter_: _let_through(model, filter_) for filter_ in ("all", "norm", "no-norm")},
    }


def stages(model: nn.Module) -> list[str]:
    """Names of a model's parts that have parameters; a list of blocks that is most of the model is shown in parts."""
    children = {name: child for name, child in model.named_children() if any(True for _ in child.parameters())}
    sizes = {name: sum(w.numel() for w in child.parameters()) for name, child in children.items()}
    heads = {head.partition(".")[0] for head in _heads(model)}
    body = sum(size for name, size in sizes.items() if name not in heads)
    found = []
    for name, child in children.items():
        if isinstance(child, nn.Sequential | nn.ModuleList) and sizes[name] > _MOST_OF_IT * body:
            found += [f"{name}.{part}" for part, _ in child.named_children()]
        else:
            found.append(name)
    return found


def _heads(model: nn.Module) -> tuple[str, ...]:
    """Names of the classifier's modules; none of a model that gives features."""
    config: Any = model.pretrained_cfg
    return pretrained.head_names(model) if config.get("classifier") else ()


def _passed_through(model: nn.Module, input_size: Sequence[int]) -> tuple[dict[str, list[int]], int | None]:
    """Output shapes of the stages for one image, and the multiply-accumulates of it."""
    shapes: dict[str, list[int]] = {}

    def keep(name: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if isinstance(output, torch.Tensor):
                shapes[name] = list(output.shape[1:])

        return hook

    hooks = [model.get_submodule(name).register_forward_hook(keep(name)) for name in stages(model)]
    trainable = [w for w in model.parameters() if w.requires_grad]
    model.requires_grad_(False)  # the counter expects a graph where parameters ask for one
    try:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.empty(1, *input_size, device="meta"))
    except (RuntimeError, NotImplementedError, TypeError, ValueError, AssertionError):  # code that looks at values
        return shapes, None
    finally:
        for w in trainable:
            w.requires_grad_(True)
        for hook in hooks:
            hook.remove()
    return shapes, counter.get_total_flops() // 2


def _let_through(model: nn.Module, perturb: str) -> dict[str, int]:
    try:
        chosen = filters.select_parameters(model, perturb)
    except ValueError:  # none
        return {"tensors": 0, "parameters": 0}
    return {"tensors": len(chosen), "parameters": sum(w.numel() for w in chosen.values())}


def words(about: Mapping[str, Any]) -> dict[str, str]:
    """A description without its stages, for people."""
    data = about["data_config"]
    said = {
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
    said |= {
        f"--perturb {name}": f"{counts['parameters']:,} in {counts['tensors']:,} tensors"
        for name, counts in about["perturb"].items()
    }
    return {key: value for key, value in said.items() if value}


def stage_rows(about: Mapping[str, Any]) -> list[dict[str, str | float | None]]:
    """The stages, for people."""
    return [
        {
            "stage": stage["name"],
            "parameters": f"{stage['parameters']:,}",
            "output": " x ".join(map(str, stage["output"])) if stage["output"] else None,
        }
        for stage in about["stages"]
    ]


def example(about: Mapping[str, Any]) -> str:
    """How one stage alone is perturbed: the last one before the classifier, as most would."""
    heads = {head.partition(".")[0] for head in about["classifier"]}
    body = [stage["name"] for stage in about["stages"] if stage["name"].partition(".")[0] not in heads]
    parts = [name for name in body if "." in name] or body  # of a list of blocks, if there is one
    name = parts[-1].replace(".", r"\.")
    return rf"--perturb '^{name}\.' perturbs that stage alone: a regular expression is searched for in parameter names"
