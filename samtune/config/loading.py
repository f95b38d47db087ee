"""Flags, a recipe and defaults -> RunConfig.

A value is taken from the flag, else the recipe, else the data set's defaults, else the default. A config has the
settings of one variant of its recipe (samtune/config/variants.py). Invalid settings raise UsageError with key, origin
and allowed range.
"""

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError

from samtune.config import sam_schedule
from samtune.config.dataset_defaults import DATASET_DEFAULTS
from samtune.config.duration import Duration
from samtune.config.run_config import RunConfig, flag_name
from samtune.config.types import gpu_choice
from samtune.config.variants import TABLES, Variants
from samtune.errors import UsageError, did_you_mean
from samtune.files import readable

# Defaults where the weights start at random. A data set's defaults, a recipe and flags take precedence.
_FROM_SCRATCH = {
    "freeze_bn": (False, "from scratch: there are no pretrained statistics to keep"),
    "head_lr_factor": (1.0, "from scratch: the head is as new as the body"),
    "warmup_epochs": ("5%", "from scratch: there are no pretrained weights to protect"),
    "clip_grad": (5.0, "from scratch: as in the SAM paper's code; random weights have larger gradients"),
    "drop": (0.0, "from scratch: as the SAM paper's networks on small images"),
    "smoothing": (0.0, "from scratch: as the SAM paper's networks on small images"),
}
# Keys of a recipe that are no settings. expected: the measured result, for readers and tests. sweep: the table of
# `samtune sweep`.
_NO_SETTINGS = ("expected", "sweep", *TABLES)
_LENGTH = RunConfig.model_fields["epochs"].default
_KINDS: dict[Any, str] = {float: "a number", int: "a whole number"}
_LIMITS = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}


def load(
    recipe: Path | None = None,
    flags: Mapping[str, Any] | None = None,
    overrides: Mapping[str, tuple[Any, str]] | None = None,
) -> RunConfig:
    """Flag > recipe > data set's defaults > default. Raises UsageError that names key, origin and allowed range.

    overrides: values that take precedence over all of them, each with its origin.
    """
    values = _with_origins(recipe, flags, overrides=overrides)
    name = values.get("dataset", ("", ""))[0]
    if isinstance(name, str):
        defaults = DATASET_DEFAULTS.get(name, {})
        values = {key: (value, f"data set {name}") for key, value in defaults.items()} | values
    return _validated(values)


def load_over(
    stored: Mapping[str, Any], origins: Mapping[str, str], recipe: Path | None, flags: Mapping[str, Any]
) -> tuple[RunConfig, RunConfig, set[str]]:
    """The settings of a resumed run, flag > recipe > stored: (now, before, keys that differ).

    origins: of the stored values. "auto" keeps what the run chose. Without --variant, a recipe keeps the variant that
    the run began with. Raises UsageError as `load` does.
    """
    stored_values = {key: (value, origins.get(key, "the run's own settings")) for key, value in stored.items()}
    given = _with_origins(recipe, flags, stored.get("variant"), length=stored.get("epochs", _LENGTH))
    for key in ("amp_dtype", "batch_size"):
        if given.get(key, ("",))[0] == "auto":
            del given[key]
    before, now = _validated(stored_values), _validated(_merge(stored_values, given))
    return now, before, {key for key in RunConfig.model_fields if getattr(now, key) != getattr(before, key)}


def given_settings(recipe: Path | None, flags: Mapping[str, Any] | None) -> dict[str, Any]:
    """The settings that flags or the recipe give."""
    return {key: value for key, (value, _) in _with_origins(recipe, flags, length=None).items()}


def check_devices(gpus: str, processes: int | None) -> None:
    """Raise UsageError for an invalid choice of devices."""
    if processes is not None and gpus != "auto":
        raise UsageError("--processes and --gpus contradict each other", hint="give one of them")
    try:
        gpu_choice(gpus)
    except ValueError as error:
        raise UsageError(f"--gpus {gpus}: {error}") from None


def _with_origins(
    recipe: Path | None,
    flags: Mapping[str, Any] | None,
    variant: str | None = None,
    *,
    overrides: Mapping[str, tuple[Any, str]] | None = None,
    length: Any = _LENGTH,
) -> dict[str, tuple[Any, str]]:
    """Key -> (value, origin) of all settings that a recipe, flags and overrides give.

    variant: used if no flag chooses one. length: of the run, if none of them gives it; None keeps --sam-schedule, which
    stands for other settings.
    """
    flags = flags or {}
    layers = [
        {key: (value, origin) for key, value in settings.items() if key not in _NO_SETTINGS}
        for origin, settings in _layers(recipe, flags.get("variant"), variant)
    ]
    layers.append({key: (value, "flag") for key, value in flags.items() if key != "variant"})
    layers.append(dict(overrides or {}))
    if length is not None:
        length = next((layer["epochs"][0] for layer in reversed(layers) if "epochs" in layer), length)
    values: dict[str, tuple[Any, str]] = {}
    for layer in layers:
        values = _merge(values, layer if length is None else _with_sam_schedule(layer, length))
    return values


def _with_sam_schedule(given: dict[str, tuple[Any, str]], length: Any) -> dict[str, tuple[Any, str]]:
    """Settings of one origin, with those that --sam-schedule stands for in its place. length: of the run."""
    text, origin = given.get("sam_schedule", (None, ""))
    if text is None:
        return given
    where = f"--sam-schedule {text}" if origin == "flag" else f"sam_schedule = {text!r} in {origin}"
    try:
        length = Duration.parse(length)
    except ValueError:  # an error of its own
        length = _LENGTH
    try:
        derived = sam_schedule.parse(str(text), length)
    except ValueError as error:
        raise UsageError(f"{where}: {error}") from None
    _refuse_together(where, {flag_name(key): key in given for key in derived}, "the schedule stands for all of these")
    rest = {key: value for key, value in given.items() if key != "sam_schedule"}
    return rest | {key: (value, f"{origin} (sam_schedule {text})") for key, value in derived.items()}


def _layers(recipe: Path | None, asked: str | None, default: str | None = None) -> list[tuple[str, Mapping[str, Any]]]:
    """A recipe and what its variant adds, as (origin, settings) by precedence, lowest first.

    asked: the value of --variant. default: the variant without it.
    """
    if recipe is None:
        if asked is not None:
            raise UsageError(
                f"--variant {asked} without a recipe", "a recipe has variants", "name one, or leave it out"
            )
        return []
    content = _read_toml(recipe)
    variants = Variants.of(content, recipe)
    own = (f"recipe {recipe}", content)
    if not variants.axes:
        if asked is not None:
            raise UsageError(f"--variant {asked}: recipe {recipe} has no variants", hint="leave it out")
        return [own]
    known = {option for options in variants.axes.values() for option in options}
    if default is not None and not set(default.split()) <= known:
        default = None  # that of another recipe
    cell = variants.cell(asked if asked is not None else default)
    chosen = ("flag" if asked is not None else f"recipe {recipe}", {"variant": " ".join(cell)})
    return [own, chosen, *variants.layers(cell)]


def _merge(values: dict[str, tuple[Any, str]], overrides: Mapping[str, tuple[Any, str]]) -> dict[str, tuple[Any, str]]:
    """Values with overrides; one choice of devices, gpus or processes, replaces the other."""
    for one, other in (("gpus", "processes"), ("processes", "gpus")):
        if one in overrides and other not in overrides:
            values = {key: value for key, value in values.items() if key != other}
    return values | dict(overrides)


def _validated(given: Mapping[str, tuple[Any, str]]) -> RunConfig:
    if given.get("pretrained", (True, ""))[0] is False:
        given = {key: (value, f"derived: {why}") for key, (value, why) in _FROM_SCRATCH.items()} | dict(given)
    for key, (value, _) in given.items():
        if str(value) != str(value).encode("utf-8", "replace").decode():
            raise UsageError(
                f"{flag_name(key)} {readable(str(value))} is no valid UTF-8",
                "a run's configuration and reports are, and name it",
                "rename it, or give a symbolic link to it: ln -s",
            )
    try:
        config = RunConfig.model_validate({key: value for key, (value, _) in given.items()})
    except ValidationError as error:
        first = min(error.errors(), key=lambda one: one["type"] != "extra_forbidden")  # a typo leaves others missing
        raise _explain(str(first["loc"][0]), first["type"], first["msg"], given) from None
    if config.weights is not None and not config.pretrained:
        raise UsageError("--weights and --no-pretrained contradict each other", hint="give one of them")
    if config.train_labels is not None and config.label_noise > 0:
        raise UsageError("--train-labels and --label-noise contradict each other", hint="give one of them")
    if config.average_tail is not None:
        _refuse_together("--average-tail", {"--model-ema": config.model_ema}, "a run has one average of its weights")
    if config.select == "average" and not config.averages_weights:
        raise UsageError(
            "--select average without an average", "the run does not average its weights", "give --average-tail 25%"
        )
    # The first training of --bootstrap with --no-val is scored on nothing.
    no_test = not config.test and not given["test"][1].startswith("derived")
    for given_as, is_given in (("--select best", config.select == "best"), ("--no-test", no_test)):
        if is_given and not config.val:
            raise UsageError(
                f"--no-val and {given_as} contradict each other",
                "nothing is held out to choose on, or to score in the place of test",
                "leave one out",
            )
    check_devices(config.gpus, config.processes)
    if config.nnodes > 1 and config.rdzv_endpoint is None:
        raise UsageError(
            "--nnodes without --rdzv-endpoint", hint="tell where the machines meet: --rdzv-endpoint HOST:PORT"
        )
    if config.node_rank >= config.nnodes:
        raise UsageError(
            f"--node-rank {config.node_rank} of --nnodes {config.nnodes}", hint="the machines are numbered from 0"
        )
    if config.sync_bn and config.freeze_bn:
        raise UsageError("--sync-bn without --no-freeze-bn", "frozen statistics are the same everywhere", "give both")
    if config.lr_base_batch is not None and config.lr is None:
        raise UsageError("--lr-base-batch without --lr", "the default rate grows with the batch by itself", "give --lr")
    if config.shard and config.l2_in_loss:
        raise UsageError("--shard and --l2-in-loss contradict each other", "no rank has all weights", "leave one out")
    if config.shard and "m" not in given:
        config = config.derive("m", "global", "no device has a whole model to perturb by itself")
        given = {**given, "m": ("global", config.origins["m"])}
    if config.shard and (config.m == "device" or isinstance(config.m, int)):
        raise UsageError(
            f"--shard with --m {config.m}",
            "no device has a whole model to perturb by itself",
            "give --m global, or --m group:8 for groups of devices that hold the model together",
        )
    if config.shard and config.compile:
        raise UsageError(
            "--shard and --compile contradict each other",
            "a compiled block would need its weights whole",
            "leave one out",
        )
    _check_ascent(config)
    if config.batch_size == "auto":
        _check_batch_can_be_found(config)
    elif isinstance(config.m, int) and config.global_batch_size is None and config.m > config.batch_size:
        raise UsageError(
            f"--m {config.m} is more than --batch-size {config.batch_size}",
            "a perturbation is shared within a batch",
            "give a smaller --m or a larger --batch-size",
        )
    config._origins = {key: given[key][1] if key in given else "default" for key in RunConfig.model_fields}
    return config


def _check_ascent(config: RunConfig) -> None:
    """Raise UsageError for settings that do not go with another direction, or with the second-order term."""
    several_steps = {f"--ascent-steps {config.ascent_steps}": config.ascent_steps > 1}
    if config.ascent == "random":
        others = several_steps | {"--second-order": config.second_order, "--shard": config.shard}
        why = "a random direction has no gradient to follow further, and each rank draws it for a whole model"
        _refuse_together("--ascent random", others, why)
    if config.ascent in ("momentum", "previous"):
        others = several_steps | {
            f"--ascent-fraction {config.ascent_fraction:g}": config.ascent_fraction < 1,
            "--second-order": config.second_order,
            "--shard": config.shard,
            "--perturb-from": config.perturb_from is not None,
            f"--m {config.m}": config.m != "device",
        }
        why = "a step has one pass, and one perturbation for all images, on whole models"
        _refuse_together(f"--ascent {config.ascent}", others, why)
    if config.ascent == "momentum" and config.opt == "sgd" and config.momentum == 0:
        raise UsageError("--ascent momentum with --momentum 0", "there is none to follow", "leave one out")
    if config.sam_when is not None:
        others = {
            f"--ascent {config.ascent}": config.ascent != "gradient",
            f"--ascent-fraction {config.ascent_fraction:g}": config.ascent_fraction < 1,
            f"--perturb {config.perturb}": config.perturb != "all",
            "--perturb-from": config.perturb_from is not None,
            "--second-order": config.second_order,
            f"--m {config.m}": config.m not in ("device", "global"),
            "--global-batch-size": config.global_batch_size is not None,
            f"--processes {config.processes}": (config.processes or 1) > 1,
            f"--nnodes {config.nnodes}": config.nnodes > 1,
            "--shard": config.shard,
            "--amp-dtype float16": config.amp_dtype == "float16",
        }
        why = "a step without a second pass needs the whole gradient of the batch, unscaled, from the first"
        _refuse_together("--sam-when", others, why)
    if config.perturb_from is not None:
        others = {
            "--batch-size auto": config.batch_size == "auto",
            "--second-order": config.second_order,
            "--shard": config.shard,
        }
        _refuse_together("--perturb-from", others, "the second pass begins in the middle of a whole model")
    if config.second_order:
        others = several_steps | {
            f"--p {config.p:g}": config.p != 2,
            "--compile": config.compile,
            "--shard": config.shard,
            "--batch-size auto": config.batch_size == "auto",
        }
        why = "the derivative of the perturbation is computed for p 2, one ascent step, and a whole model on one device"
        _refuse_together("--second-order", others, why)


def _refuse_together(given: str, others: Mapping[str, bool], why: str) -> None:
    """Raise UsageError for the first of the other settings that is there, too."""
    other = next((name for name, is_there in others.items() if is_there), None)
    if other is not None:
        raise UsageError(f"{given} and {other} contradict each other", why, "leave one out")


def _check_batch_can_be_found(config: RunConfig) -> None:
    """Raise UsageError for settings that decide how many images pass through the model at once, or may not."""
    others = {
        "--global-batch-size": config.global_batch_size is not None,
        "--micro-batch": config.micro_batch is not None,
        f"--m {config.m}": isinstance(config.m, int),
        "--shard": config.shard,
    }
    for other in (name for name, is_given in others.items() if is_given):
        raise UsageError(
            f"--batch-size auto and {other} contradict each other",
            "auto is the batch that passes through a whole model at once",
            "leave one out, or give --batch-size a number",
        )


def variants(path: Path) -> Variants:
    """The variants of a recipe. Raises UsageError for a file that is no recipe."""
    return Variants.of(_read_toml(path), path)


def sweep_table(path: Path, variant: str | None = None) -> dict[str, Any]:
    """The table [sweep] of a recipe, merged with the keys that a variant sets in it; {} without one."""
    merged: dict[str, Any] = {}
    for origin, settings in _layers(path, variant):
        table = settings.get("sweep", {})
        if not isinstance(table, dict):
            raise UsageError(f"sweep = {table!r} in {origin}", "it is a table", "write [sweep], and its keys below")
        for key, value in table.items():
            before = merged.get(key)
            merged[key] = before | value if isinstance(before, dict) and isinstance(value, dict) else value
    return merged


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(
            f"recipe {path} cannot be read", error.strerror or "", "give the path of a TOML file"
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"recipe {path} is not TOML", str(error), "recipes hold lines like: rho = 0.05") from None


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
        return unknown_key(key, origin)
    rule = message.removeprefix("Value error, ").replace("Input should be", "must be")
    hint = f"{flag_name(key)}: {RunConfig.model_fields[key].description}"
    if kind in ("float_type", "int_type", "bool_type") and isinstance(value, str) and origin != "flag":
        hint = f"write {key} = {value} without quotes, if that is meant; {hint}"
    return UsageError(f"{where}: {rule}", _allowed(key), hint)


def unknown_key(key: str, origin: str) -> UsageError:
    """The error for a setting that does not exist, with the nearest one."""
    hint = did_you_mean(key, RunConfig.model_fields) or "`samtune run --help-all` lists all keys (as flags)"
    return UsageError(f"unknown key {key} in {origin}", hint=hint)


def _allowed(key: str) -> str:
    """The allowed range of a number as text; "" for other settings."""
    field = RunConfig.model_fields[key]
    types: tuple[Any, ...] = (field.annotation, *get_args(field.annotation))
    kind = next((words for type_, words in _KINDS.items() if type_ in types), "")
    rules = [(words, getattr(rule, name, None)) for rule in field.metadata for name, words in _LIMITS.items()]
    limits = [f"{words} {limit}" for words, limit in rules if limit is not None]
    return f"allowed: {kind}, {' and '.join(limits)}" if kind and limits else ""
