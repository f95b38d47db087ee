"""The types of settings, read from a flag (text) or a recipe (TOML), and their rules."""

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, AllowInfNan, BeforeValidator, Field, PlainSerializer, Strict

from samtune.config.duration import Duration

_LARGEST_NORM = 1e6  # a larger p is as good as inf
_SEEDS = 2**63
_LEAST_ALPHA = 0.01  # below it, float32 draws shares near a half instead of near 0 and 1


def _must_be(rule: str, holds: Callable[[Any], bool]) -> AfterValidator:
    """Refuse values for which a rule does not hold, by its words."""

    def check(value: Any) -> Any:
        if not holds(value):
            raise ValueError(f"must be {rule}")
        return value

    return AfterValidator(check)


def _norm_order(p: float | int | str) -> float:
    """A number or "inf", from a flag or from a recipe."""
    try:
        order = float(p)
    except (TypeError, ValueError):
        order = math.nan
    if isinstance(p, bool) or not (1 <= order <= _LARGEST_NORM or order == math.inf):
        raise ValueError(f'must be a number from 1 on, at most {_LARGEST_NORM:g}, or "inf"')
    return order


def _samples(m: int | str) -> int | str:
    if isinstance(m, str) and re.fullmatch("device|global|group:[1-9][0-9]{0,8}", m):
        return m
    if isinstance(m, bool) or not re.fullmatch("[0-9]{1,9}", str(m)) or int(m) < 1:
        raise ValueError('must be "device", "global", "group:4" (devices that share it), or a number of images')
    return int(m)


def _images(batch_size: int | str) -> int | str:
    if batch_size == "auto":
        return batch_size
    if isinstance(batch_size, bool) or not re.fullmatch("[0-9]{1,9}", str(batch_size)) or int(batch_size) < 1:
        raise ValueError('must be a whole number from 1 on, of at most nine digits, or "auto"')
    return int(batch_size)


def _when(rule: str) -> str:
    match = re.fullmatch(r"gradient:(-?[0-9]{1,3}(\.[0-9]{1,6})?)", rule) if isinstance(rule, str) else None
    if match is None:
        raise ValueError('must be "gradient:1", with a number of standard deviations')
    return rule


def _seed_or_auto(seed: int | str) -> int | str:
    if seed == "auto":
        return seed
    if isinstance(seed, bool) or not re.fullmatch("[0-9]{1,19}", str(seed)) or int(seed) >= _SEEDS:
        raise ValueError('must be a whole number from 0 on, less than 2^63, or "auto"')
    return int(seed)


def gpu_choice(gpus: int | str) -> str:
    """Check a value of --gpus. Raises ValueError with the accepted forms."""
    if isinstance(gpus, bool) or not re.fullmatch("auto|all|[0-9]+(,[0-9]*)*", str(gpus)):
        raise ValueError('must be "auto", "all", a number of GPUs, or a list of them ("0,2"; "2," is one)')
    return str(gpus)


def _trackers(track: str | list[str]) -> str:
    names = track.split(",") if isinstance(track, str) else track
    if names not in (["none"], ["tensorboard"], ["wandb"], ["tensorboard", "wandb"], ["wandb", "tensorboard"]):
        raise ValueError('must be "none", "tensorboard", "wandb", or both: "tensorboard,wandb"')
    return ",".join(names)


def endpoint(endpoint: str) -> str:
    """Check the address of a machine. Raises ValueError with the accepted form."""
    host, _, port = endpoint.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 2**16:
        raise ValueError('must be "host:port", where the first machine listens')
    return endpoint


def _pattern(perturb: str) -> str:
    try:
        re.compile(perturb)
    except re.error as error:
        raise ValueError(f'must be "all", "norm", "no-norm" or a regular expression: {error}') from None
    return perturb


_AnyDuration = Annotated[Duration, BeforeValidator(Duration.parse), PlainSerializer(Duration.to_recipe)]
_no_minutes = _must_be(
    "epochs, steps or a share of the run, so that a repeated run is the same", lambda length: length.unit != "minutes"
)
_whole_run = _must_be("more than 0 epochs or steps", lambda length: length.unit != "%" and length.amount > 0)
_interval = _must_be("more than 0", lambda length: length.amount > 0)
_alpha = _must_be(
    f"0, or at least {_LEAST_ALPHA:g}: of less, torch's beta distribution is not right",
    lambda alpha: not 0 < alpha < _LEAST_ALPHA,
)
DurationField = Annotated[_AnyDuration, _no_minutes]
RunLength = Annotated[DurationField, _whole_run]
Interval = Annotated[DurationField, _interval]
SaveInterval = Annotated[_AnyDuration, _interval]
Durations = Annotated[
    tuple[Interval, ...],
    BeforeValidator(lambda given: tuple(given.split(",")) if isinstance(given, str) else given),
    PlainSerializer(lambda durations: ", ".join(duration.to_recipe() for duration in durations)),
    Strict(False),
]
PathField = Annotated[Path, Strict(False), PlainSerializer(str)]
NormOrder = Annotated[
    float, AllowInfNan(True), BeforeValidator(_norm_order), PlainSerializer(lambda p: "inf" if math.isinf(p) else p)
]
Seed = Annotated[int, Field(ge=0, lt=_SEEDS)]
SeedOrAuto = Annotated[int | Literal["auto"], BeforeValidator(_seed_or_auto)]
Share = Annotated[float, Field(ge=0, le=1)]
Alpha = Annotated[float, _alpha]
When = Annotated[str, BeforeValidator(_when)]
Samples = Annotated[int | str, BeforeValidator(_samples)]
BatchSize = Annotated[int | Literal["auto"], BeforeValidator(_images)]
Gpus = Annotated[str, BeforeValidator(gpu_choice)]
TrackerNames = Annotated[str, BeforeValidator(_trackers)]
Endpoint = Annotated[str, AfterValidator(endpoint)]
Pattern = Annotated[str, AfterValidator(_pattern)]
