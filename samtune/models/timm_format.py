"""timm's description of a model: read for a name, a folder or a file of weights; written beside a checkpoint."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import timm.data
from timm.models._hub import load_model_config_from_hf, load_model_config_from_path
from torch import nn

from samtune import hub
from samtune.errors import CheckpointError, ModelError, first_line
from samtune.models.names import nearest, resolve
from samtune.models.weights import WeightsFile, locate

# Keys of timm's pretrained_cfg: how the weights need their images, and the parts of the architecture.
_OF_WEIGHTS = ("mean", "std", "interpolation", "crop_pct", "crop_mode", "input_size", "test_input_size")
PARTS = ("first_conv", "classifier", "pool_size", "fixed_input_size", "min_input_size")


@dataclass(frozen=True)
class ModelSource:
    """A model's name and its weights, before anything is built.

    resolved: the name for timm.create_model. config: timm's configuration of the weights (input size, mean, classifier,
    ...). model_args: what the architecture is built with besides. weights: the file, if one is given.
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
        config = _with_tuples(timm.data.resolve_data_config(pretrained_cfg=dict(self.config)))
        return config | ({} if img_size is None else {"input_size": (3, img_size, img_size)})


@dataclass(frozen=True)
class ModelInfo:
    """A model that was built: its requested and its resolved name, where its weights come from and what they have seen.

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


def look_up(name: str, weights: Path | None = None) -> ModelSource:
    """The source of a model: a name of timm, an alias, hf-hub:USER/NAME or local-dir:FOLDER.

    weights: a file, a run or a checkpoint; its normalisation and crop take precedence.
    Raises ModelError for an unknown name, CheckpointError for weights that are missing or of another architecture.
    """
    resolved = resolve(name)
    kind, _, rest = resolved.partition(":")
    model_args: Mapping[str, Any] = {}
    file = None if weights is None else locate(weights)
    if kind == "local-dir":
        with _config_errors(rest):
            config, architecture, model_args = _read_config(load_model_config_from_path, rest)
        file = file or locate(Path(rest))
    elif kind == "hf-hub":
        repository = hub.Repository(rest, "model", f"model {rest}", "give a folder by --model local-dir:FOLDER")
        config, architecture, model_args = hub.load(repository, lambda _: _read_config(load_model_config_from_hf, rest))
    else:
        pretrained_cfg = timm.get_pretrained_cfg(resolved)
        if pretrained_cfg is None:
            raise ModelError(f"model {resolved} is no image classifier", hint=nearest(resolved))
        config, architecture = pretrained_cfg.to_dict(), resolved.partition(".")[0]
    config = {**config, "architecture": architecture}
    if file is not None and file.config:
        if str(file.config["architecture"]).partition(".")[0] != architecture:
            raise CheckpointError(
                f"weights {weights} are of {file.config['architecture']}, and --model is {name}",
                hint=f"give --model {file.config['architecture']}, or weights of {architecture}",
            )
        of_file = file.config.get("pretrained_cfg") or file.config  # older files have one level
        with _config_errors(str(file.path.parent)):
            config |= {key: of_file[key] for key in _OF_WEIGHTS if of_file.get(key) is not None}
            _check_config(config)
    return ModelSource(resolved, config, model_args, file)


def _read_config(read: Callable[[str], Any], source: str) -> tuple[dict[str, Any], str, Mapping[str, Any]]:
    """(pretrained_cfg, architecture, model_args); timm's own values for the architecture fill what is missing."""
    config, architecture, model_args = read(source)
    architecture = architecture.partition(".")[0]
    if not timm.is_model(architecture):
        raise ValueError(f"timm has no architecture {architecture!r}")
    default = timm.get_pretrained_cfg(architecture)
    filled = {} if default is None else {k: v for k, v in default.to_dict().items() if k in (*_OF_WEIGHTS, *PARTS)}
    filled |= {key: value for key, value in config.items() if value is not None}
    _check_config(filled)
    # Its number of classes is that of the head that is replaced.
    return filled, architecture, {k: v for k, v in (model_args or {}).items() if k != "num_classes"}


@contextmanager
def _config_errors(folder: str) -> Iterator[None]:
    """Raise CheckpointError for a config.json of the folder that lacks something or is wrong."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        lacks = isinstance(error, KeyError) and error.args == ("architecture",)
        raise CheckpointError(
            f"{Path(folder) / 'config.json'} is not what timm writes",
            "it names no `architecture`; that of transformers is another one" if lacks else first_line(error),
            "give a folder of timm, or only the file with the weights: --model NAME --weights FILE",
        ) from None


def _check_config(config: Mapping[str, Any]) -> None:
    """Raise ValueError for a size or a normalisation that no image can have."""
    size = config.get("input_size", (3, 1, 1))
    if not (isinstance(size, list | tuple) and len(size) == 3 and all(isinstance(n, int) and n > 0 for n in size)):
        raise ValueError(f"input_size is {size!r}, and not channels, height and width")
    for key in ("mean", "std"):
        value = config.get(key, (0.5,) * 3)
        if not (isinstance(value, list | tuple) and len(value) == 3 and all(isinstance(n, int | float) for n in value)):
            raise ValueError(f"{key} is {value!r}, and not three numbers")


def _with_tuples(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in config.items()}


def timm_config(model: nn.Module, info: ModelInfo, class_names: tuple[str, ...]) -> dict[str, Any]:
    """The config.json beside model.safetensors: all that timm.create_model("local-dir:FOLDER") needs."""
    source: Any = model.pretrained_cfg
    kept = ("tag", *PARTS, "license")
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
    return model.eval(), _with_tuples(timm.data.resolve_model_data_config(model))
