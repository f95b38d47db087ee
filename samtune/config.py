"""RunConfig: everything that decides a run, from flags, a recipe and defaults, with the origin of each value.

A field here is a flag of `samtune run` and a key of a recipe, under one name (`batch_size`, `--batch-size`); its
description is the flag's help. A value is taken from the flag, else the recipe, else the data set's own row in the
catalog, else the default.
"""

import difflib
import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError

from samtune.data.catalog import CATALOG
from samtune.errors import UsageError
from samtune.fields import DurationField, Interval, NormOrder, PathField, Pattern, RunLength, Samples, SaveInterval
from samtune.schedules import Duration

_KINDS: dict[Any, str] = {float: "a number", int: "a whole number"}
_LIMITS = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}


def _option(panel: str, description: str, default: Any = ..., **limits: Any) -> Any:
    return Field(default, description=description, json_schema_extra={"panel": panel}, **limits)


class RunConfig(BaseModel):
    """One run, completely. Frozen; unknown keys, text for numbers, and numbers that are not finite are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    model: str = _option("Model", "timm model name, or an alias such as efficientnet_b7")
    weights: PathField | None = _option(
        "Model",
        "pretrained weights from a file (.safetensors, or .pth without code) instead of a package or the hub",
        None,
    )
    pretrained: bool = _option("Model", "start from pretrained weights; --no-pretrained starts at random", True)
    img_size: int | None = _option(
        "Model",
        "side of the square input in pixels; by default the size that the weights were trained for",
        None,
        ge=16,
    )
    drop: float = _option("Model", "dropout before the classifier", 0.2, ge=0, lt=1)
    drop_path: float = _option("Model", "stochastic depth (drop-connect)", 0.0, ge=0, lt=1)
    freeze_bn: bool = _option(
        "Model",
        "normalise with the pretrained batch-norm statistics and keep them; gamma and beta train either way",
        True,
    )
    channels_last: bool = _option("Model", "memory layout of images and weights; the faster one", True)

    dataset: str = _option(
        "Data",
        "a name of `samtune datasets`, the path of a folder or of a list (.csv, .jsonl), or user/name on the hub",
    )
    image_key: str | None = _option("Data", "column of the images; by default it is found", None)
    label_key: str | None = _option("Data", "column of the labels; by default it is found", None)
    train_split: str | None = _option(
        "Data", 'split to train on, or several, as "train+validation"; by default it is found by its name', None
    )
    val_split: str | None = _option(
        "Data", "split to choose on, never the test split; by default validation, else a part of train", None
    )
    test_split: str | None = _option("Data", "split to score once, at the end; by default test", None)
    train_fraction: float = _option(
        "Data", "share of the training images that is used, every class in proportion", 1.0, gt=0, le=1
    )
    max_train: int | None = _option(
        "Data", "at most so many training images, every class in proportion: for smoke runs", None, ge=1
    )
    max_eval: int | None = _option(
        "Data",
        "at most so many images of validation, and of test, every class in proportion: for smoke runs",
        None,
        ge=1,
    )
    batch_size: int = _option("Data", "images per step", 16, ge=1)
    micro_batch: int | None = _option(
        "Data",
        "images that pass through the model at once, which changes memory and time but not the algorithm; by default "
        "the batch, and less where memory runs out",
        None,
        ge=1,
    )
    workers: int | None = _option(
        "Data",
        "data-loading threads (processes with --aa, --color-jitter or --reprob); 0 loads between steps; by default 1, "
        "with a GPU half of the cores up to 8",
        None,
        ge=0,
    )
    val_fraction: float = _option(
        "Data",
        "share of train that is held out for validation where the data set has no validation split",
        0.1,
        gt=0,
        lt=1,
    )
    split_seed: int = _option(
        "Data", "seed of that split and of subsets; it does not follow --seed, so that runs compare", 0, ge=0
    )
    scale: float = _option(
        "Data", "random resized crop: least share of the image's area (1 takes nearly all of it)", 0.35, gt=0, le=1
    )
    hflip: float = _option("Data", "chance of a horizontal flip", 0.5, ge=0, le=1)
    crop: Literal["resized", "pad"] = _option(
        "Data", "resized: random resized crop; pad: pad by an eighth and crop at random, as usual for CIFAR", "resized"
    )
    aa: Literal["none", "imagenet", "cifar10", "svhn", "rand", "trivial"] = _option(
        "Data", "AutoAugment with the policy of a data set, RandAugment, or TrivialAugment", "none"
    )
    color_jitter: float = _option("Data", "strength of random brightness, contrast and saturation", 0.0, ge=0, le=1)
    cutout: float = _option(
        "Data", "side of an erased square as a share of the image (0.5 for CIFAR-10)", 0.0, ge=0, le=1
    )
    reprob: float = _option("Data", "chance that a random rectangle is erased", 0.0, ge=0, le=1)
    mixup: float = _option("Data", "alpha of mixup; 0 does not mix", 0.0, ge=0)
    cutmix: float = _option("Data", "alpha of CutMix; with --mixup too, one of them by chance", 0.0, ge=0)
    on_bad_image: Literal["error", "skip"] = _option(
        "Data", "what to do with images that cannot be decoded: name them and end, or train without them", "error"
    )
    cache_limit: float = _option(
        "Data",
        "GiB of disk for decoded images ($SAMTUNE_CACHE, else ~/.cache/samtune); 0 decodes in every epoch",
        8.0,
        ge=0,
    )
    label_noise: float = _option(
        "Data",
        "share of the training labels to flip; validation, held out of train or not, and test keep clean labels",
        0.0,
        ge=0,
        le=1,
    )
    noise_kind: Literal["symmetric", "pair"] = _option(
        "Data", "a flipped label becomes any of the other classes (symmetric), or the next one (pair)", "symmetric"
    )
    noise_seed: int = _option(
        "Data", "seed of the flips; it does not follow --seed, so that runs have the same wrong labels", 0, ge=0
    )
    train_labels: PathField | None = _option(
        "Data",
        "labels to train on, from a file (.parquet, .csv, .jsonl): one for each row of train in its order, or in any "
        "order with a column `index`; validation and test keep the data set's own",
        None,
    )
    train_labels_key: str = _option("Data", "column of that file: class names, or numbers from 0", "label")

    opt: Literal["sgd", "adamw"] = _option("Optimizer", "sgd has Nesterov momentum", "sgd")
    lr: float | None = _option(
        "Optimizer",
        "peak learning rate of the body; by default a base for the optimizer times sqrt(batch size / 32)",
        None,
        gt=0,
    )
    head_lr_factor: float = _option("Optimizer", "learning rate of the new head over that of the body", 35.0, gt=0)
    momentum: float = _option("Optimizer", "momentum of sgd", 0.9, ge=0, lt=1)
    weight_decay: float | None = _option(
        "Optimizer",
        "decay of weights (not of biases and norm parameters); by default 1 / training images, at most 0.002",
        None,
        ge=0,
    )
    l2_in_loss: bool = _option(
        "Optimizer",
        "weight decay as an L2 term in the loss of both passes, as the paper's code has it, not in the optimizer",
        False,
    )
    epochs: RunLength = _option("Optimizer", 'length of the run: 8, or "5000 steps"', Duration(10, "epochs"))
    warmup_epochs: DurationField = _option(
        "Optimizer",
        'the body\'s learning rate and rho rise from 0 for so long, the head learns at once: 1, "100 steps" or "5%"',
        Duration(20, "%"),
    )
    clip_grad: float = _option(
        "Optimizer",
        "largest global norm of the final gradient (the default rates belong to 1); 0 does not clip",
        1.0,
        ge=0,
    )
    smoothing: float = _option("Optimizer", "label smoothing", 0.1, ge=0, lt=1)

    rho: float = _option("SAM", "radius of the perturbation in weight units; 0 is the plain optimizer", 0.05, ge=0)
    p: NormOrder = _option("SAM", "norm of that radius, from 1 to inf", 2.0)
    adaptive: bool = _option(
        "SAM", "ASAM: radius of each weight in units of |weight| + eta; it wants about ten times the rho", False
    )
    eta: float = _option("SAM", "eta of --adaptive, in weight units", 0.01, ge=0)
    m: Samples = _option(
        "SAM",
        "images that share a perturbation: device (the batch), global (the batches of all devices), or a number, which "
        "cuts the batch into pieces that are computed one after the other (gradient accumulation)",
        "device",
    )
    perturb: Pattern = _option(
        "SAM",
        "what is perturbed: all, norm (normalisation layers alone: a cheaper first pass), no-norm, or a regular "
        "expression for the names of parameters",
        "all",
    )
    head_rho_factor: float = _option("SAM", "rho of the new head over that of the body", 1.0, ge=0)
    sam_start: DurationField = _option(
        "SAM", 'SAM begins after so much of the run: "50%", 5 (epochs) or "100 steps"', Duration(0, "%")
    )
    sam_end: DurationField = _option("SAM", "SAM ends after so much of the run", Duration(100, "%"))
    sam_every: int = _option("SAM", "SAM in every k-th step only, the plain optimizer between", 1, ge=1)
    rho_schedule: Literal["constant", "linear", "cosine", "lr"] = _option(
        "SAM",
        "rho after the warm-up: constant, from rho to --rho-final along a line or a cosine, or in proportion to lr",
        "constant",
    )
    rho_final: float = _option("SAM", "rho at the end of a linear or cosine schedule", 0.0, ge=0)
    ascent_fraction: float = _option(
        "SAM",
        "share of the batch that the first pass uses; loss and error of training are those of this share",
        1.0,
        gt=0,
        le=1,
    )
    ascent_steps: int = _option("SAM", "passes that look for the perturbation, of rho / n each", 1, ge=1)

    amp_dtype: Literal["auto", "float32", "bfloat16", "float16"] = _option(
        "Run",
        "arithmetic of the forward pass (weights stay float32; float16 scales the loss); auto: bfloat16 on a GPU that "
        "has it, else float32",
        "auto",
    )
    seed: int = _option("Run", "seed of order, augmentation and dropout", 0, ge=0, lt=2**63)
    eval_every: Interval = _option(
        "Run", 'how often to validate: 1, "500 steps" or "5%" of the run', Duration(1, "epochs")
    )
    save_every: SaveInterval = _option(
        "Run",
        'how often to save, besides where validation is better than ever and at the end: "10 minutes", "200 steps", 1',
        Duration(10, "minutes"),
    )
    keep_checkpoints: int = _option("Run", "how many of the newest checkpoints stay, besides the best", 2, ge=1)
    model_ema: bool = _option(
        "Run", "average the weights over the steps, too; the average is scored and saved beside the last weights", False
    )
    model_ema_decay: float = _option(
        "Run", "decay of that average; in the first steps less, 1 - step^(-2/3)", 0.9998, gt=0, lt=1
    )
    on_nan: Literal["stop", "skip", "rollback"] = _option(
        "Run",
        "where loss or gradient are not finite: stop with the weights from before; skip the step, 20 in a row at most; "
        "or go back to the newest checkpoint and leave out the batches since then, 3 times at most",
        "stop",
    )
    deterministic: bool = _option(
        "Run", "only operations whose result is the same every time; a CPU's are anyway, a GPU gets slower", False
    )
    step_timeout: float = _option(
        "Run", "minutes without a step, or a batch of an evaluation, after which the run is ended; 0 waits", 30.0, ge=0
    )
    test: bool = _option("Run", "score the test split once, at the end", True)
    select: Literal["last", "best"] = _option(
        "Run", "the checkpoint to score: the last, or the best on validation", "last"
    )
    output: PathField | None = _option("Run", "run folder; by default a new one under runs/", None)

    _origins: dict[str, str] = PrivateAttr(default_factory=dict)

    @property
    def origins(self) -> Mapping[str, str]:
        """Where each value came from: "flag", "recipe FILE", "data set NAME", "default" or "derived: REASON"."""
        return self._origins

    def derive(self, key: str, value: Any, reason: str) -> "RunConfig":
        """A copy in which a value that was left open is filled in, with the reason as its origin."""
        copy = self.model_copy(update={key: value})
        copy._origins = {**self._origins, key: f"derived: {reason}"}
        return copy

    def to_toml(self) -> str:
        """The resolved config as a recipe that repeats the run elsewhere; origins stand in the comments."""
        lines = []
        for key, value in self.model_dump(mode="json").items():
            origin = self.origins.get(key, "default")
            # A JSON string, number or boolean is the same in TOML; TOML has no null, so an open value is left out.
            line = f"# {key} is open" if value is None else f"{key} = {json.dumps(value, ensure_ascii=False)}"
            if key == "output" and value is not None:
                line = f"# {line}"  # taken by the run itself
            lines.append(f"{line:<44} # {origin}")
        return "\n".join(lines) + "\n"


def load(recipe: Path | None = None, flags: Mapping[str, Any] | None = None) -> RunConfig:
    """Flag > recipe > data set's row > default. Raises UsageError that names key, origin and allowed range."""
    found = _with_origins(recipe, flags)
    name = found.get("dataset", ("", ""))[0]
    if isinstance(name, str) and name in CATALOG:
        row = CATALOG[name].defaults
        found = {key: (value, f"data set {name}") for key, value in row.items()} | found
    return _validated(found)


def load_over(
    stored: Mapping[str, Any], origins: Mapping[str, str], recipe: Path | None, flags: Mapping[str, Any]
) -> tuple[RunConfig, RunConfig, set[str]]:
    """The settings of a run that goes on, flag > recipe > as stored: (now, before, keys that differ).

    origins: where the stored values came from. What the run settled for itself stays settled: amp_dtype "auto" asks for
    nothing else. Raises UsageError as `load` does.
    """
    own = {key: (value, origins.get(key, "the run's own settings")) for key, value in stored.items()}
    asked = _with_origins(recipe, flags)
    if asked.get("amp_dtype", ("",))[0] == "auto":
        del asked["amp_dtype"]
    before, now = _validated(own), _validated(own | asked)
    return now, before, {key for key in RunConfig.model_fields if getattr(now, key) != getattr(before, key)}


def given(recipe: Path | None, flags: Mapping[str, Any] | None) -> dict[str, Any]:
    """What the command gives, by flags or by its recipe."""
    return {key: value for key, (value, _) in _with_origins(recipe, flags).items()}


def _with_origins(recipe: Path | None, flags: Mapping[str, Any] | None) -> dict[str, tuple[Any, str]]:
    found: dict[str, tuple[Any, str]] = {}
    if recipe is not None:
        found |= {key: (value, f"recipe {recipe}") for key, value in _read_recipe(recipe).items()}
    return found | {key: (value, "flag") for key, value in (flags or {}).items()}


def _validated(given: Mapping[str, tuple[Any, str]]) -> RunConfig:
    try:
        config = RunConfig.model_validate({key: value for key, (value, _) in given.items()})
    except ValidationError as error:
        first = error.errors()[0]
        raise _explain(str(first["loc"][0]), first["type"], first["msg"], given) from None
    if config.weights is not None and not config.pretrained:
        raise UsageError("--weights and --no-pretrained contradict each other", mend="give one of them")
    if config.train_labels is not None and config.label_noise > 0:
        raise UsageError("--train-labels and --label-noise contradict each other", mend="give one of them")
    if isinstance(config.m, int) and config.m > config.batch_size:
        raise UsageError(
            f"--m {config.m} is more than --batch-size {config.batch_size}",
            "a perturbation is shared within a batch",
            "give a smaller --m or a larger --batch-size",
        )
    config._origins = {key: given[key][1] if key in given else "default" for key in RunConfig.model_fields}
    return config


def _read_recipe(path: Path) -> dict[str, Any]:
    try:
        recipe = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(
            f"recipe {path} cannot be read", error.strerror or "", "give the path of a TOML file"
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"recipe {path} is not TOML", str(error), "recipes hold lines like: rho = 0.05") from None
    recipe.pop("expected", None)  # the recipe's claim: data for readers and tests, not a setting
    return recipe


def flag_name(key: str) -> str:
    """The flag of a config key: batch_size -> --batch-size."""
    return "--" + key.replace("_", "-")


def _explain(key: str, kind: str, message: str, given: Mapping[str, tuple[Any, str]]) -> UsageError:
    if kind == "missing":
        return UsageError(
            f"no {key} is given",
            "every run needs a model and a data set",
            f"add {flag_name(key)}, or a recipe that names it",
        )
    value, origin = given[key]
    where = f"{flag_name(key)} {value}" if origin == "flag" else f"{key} = {value!r} in {origin}"
    if kind == "extra_forbidden":
        near = difflib.get_close_matches(key, RunConfig.model_fields, n=1)
        mend = f"did you mean {near[0]}?" if near else "`samtune run --help` lists all keys (as flags)"
        return UsageError(f"unknown key {key} in {origin}", mend=mend)
    rule = message.removeprefix("Value error, ").replace("Input should be", "must be")
    mend = f"{flag_name(key)}: {RunConfig.model_fields[key].description}"
    if kind in ("float_type", "int_type", "bool_type") and isinstance(value, str) and origin != "flag":
        mend = f"write {key} = {value} without quotes, if that is meant; {mend}"
    return UsageError(f"{where}: {rule}", _allowed(key), mend)


def _allowed(key: str) -> str:
    """The range of a number in words; "" where the rule that was broken tells all that is allowed."""
    field = RunConfig.model_fields[key]
    types: tuple[Any, ...] = (field.annotation, *get_args(field.annotation))
    kind = next((words for type_, words in _KINDS.items() if type_ in types), "")
    rules = [(words, getattr(rule, name, None)) for rule in field.metadata for name, words in _LIMITS.items()]
    limits = [f"{words} {limit}" for words, limit in rules if limit is not None]
    return f"allowed: {kind}, {' and '.join(limits)}" if kind and limits else ""
