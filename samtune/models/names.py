"""Names of pretrained models: aliases, tags of weights, the nearest names to an unknown one."""

from pathlib import Path

import timm

from samtune.errors import CheckpointError, ModelError, similar_names
from samtune.models.weights import locate

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

# Part of a tag of timm -> the data that such weights were trained on.
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


def resolve(name: str) -> str:
    """A name as timm.create_model takes it, with the tag of its weights. Raises ModelError with the nearest names."""
    kind, separator, rest = name.partition(":")
    if separator and kind.replace("_", "-") == "hf-hub":
        return f"hf-hub:{rest}"
    if separator and kind == "local-dir":
        try:
            folder = locate(Path(rest)).path.parent
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


def from_scratch() -> list[str]:
    """The networks that samtune adds to those of timm; they have no pretrained weights."""
    names: list[str] = timm.list_models(module=["cifar_resnet", "shaken"])
    return names


def nearest(architecture: str) -> str:
    """A hint: the pretrained names and the networks of samtune most like this one, or how to list all of them."""
    names = list(ALIASES) + [full.partition(".")[0] for full in timm.list_pretrained()]
    near = similar_names(architecture, names, 4, cutoff=0.5)
    own = similar_names(architecture, from_scratch(), 2, cutoff=0.7)
    if not near and not own:
        return "`samtune models --all` lists all names, `samtune models PART` those with a part"
    hints = [f"nearest without weights: {', '.join(own)}"] if own else []
    pretrained = [f"{name} ({ALIASES[name]})" if name in ALIASES else name for name in near]
    return "; ".join(hints + ([f"nearest pretrained: {', '.join(pretrained)}"] if near else []))


def pretraining_data(resolved: str) -> str:
    """The data that weights were trained on, by the tag of their name; "not stated", or "nothing" without weights."""
    if resolved in from_scratch():
        return "nothing"
    tag = resolved.partition(".")[2]
    data = [name for part in tag.split("_") for start, name in _PRETRAINING.items() if part.startswith(start)]
    return " + ".join(dict.fromkeys(data)) or "not stated"
