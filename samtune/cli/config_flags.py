"""The flags that are fields of RunConfig."""

import inspect
from collections.abc import Callable, Collection
from dataclasses import fields
from functools import partial, wraps
from typing import Annotated, Any, Literal, get_args, get_origin

import typer

from samtune.cli import completion
from samtune.cli.help import Command, HelpAll
from samtune.config.run_config import MOST_PROCESSES, RunConfig, flag_name
from samtune.data.split_roles import DataSelection

_LONG = 30  # with more flags, --help shows only the common ones
_SHORT = {"batch_size": "-b", "workers": "-j", "output": "-o"}
_COMPLETE = {"model": completion.models, "dataset": completion.datasets, "weights": completion.weights}

Gpus = Annotated[str, typer.Option(help="auto, all, a number of GPUs, or a list of them, as in a run.")]
Processes = Annotated[
    int | None, typer.Option(min=1, max=MOST_PROCESSES, help="So many ranks on the CPU, in place of GPUs.")
]
DATA_KEYS = tuple(field.name for field in fields(DataSelection))
"""The settings that say how a data set is read."""


class RunCommand(Command):
    """A command with all flags of a run; --help shows the common ones."""

    common = frozenset(
        (
            *("model", "weights", "img_size", "dataset", "batch_size", "workers", "epochs", "lr", "weight_decay"),
            *("rho", "adaptive", "gpus", "seed", "output", "resume"),
        )
    )


def with_config_flags(
    command: Callable[..., None], without: Collection[str] = (), only: Collection[str] = tuple(RunConfig.model_fields)
) -> Callable[..., None]:
    """Give a command one flag for each field of RunConfig; it receives those that were typed, as `flags`.

    without: fields that are no flags of this command, or flags of its own. only: the fields that are.
    """
    keys = [key for key in RunConfig.model_fields if key in only and key not in without]
    is_long = len(keys) > _LONG

    @wraps(command)
    def wrapped(**arguments: Any) -> None:
        arguments.pop("help_all", None)
        others = {key: arguments.pop(key) for key in list(arguments) if key not in keys}
        command(**others, flags={key: value for key, value in arguments.items() if value is not None})

    signature = inspect.signature(command)
    parameters = [p for p in signature.parameters.values() if p.name != "flags"]
    option = partial(inspect.Parameter, kind=inspect.Parameter.KEYWORD_ONLY)
    parameters += [option(key, default=None, annotation=_annotation(key)) for key in keys]
    if is_long:
        parameters.append(option("help_all", default=False, annotation=Annotated[bool, HelpAll]))
        wrapped.command_class = RunCommand  # type: ignore[attr-defined]
    parameters.sort(key=lambda p: p.kind)
    wrapped.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    wrapped.__annotations__ = {p.name: p.annotation for p in parameters}
    return wrapped


def _annotation(key: str) -> Any:
    field = RunConfig.model_fields[key]
    given: Any = field.annotation
    types = [t for t in get_args(given) if t is not type(None)] if type(None) in get_args(given) else [given]
    kind = types[0] if types[0] in (bool, int, float) else str
    choices = get_args(types[0]) if get_origin(types[0]) is Literal else ()
    names = [flag_name(key)]
    if kind is bool:
        names = [f"{flag_name(key)}/{flag_name('no_' + key)}"]
    elif key in _SHORT:
        names.append(_SHORT[key])
    default = None if field.is_required() or field.default is None else str(field.default)
    if kind is bool:
        default = flag_name(key if field.default else f"no_{key}").removeprefix("--")
    option = typer.Option(
        *names,
        help=f"{field.description}." + (f" Default: {default}." if default is not None else ""),
        show_default=False,
        rich_help_panel=RunConfig.metadata(key)["panel"],
        autocompletion=_COMPLETE.get(key),
        metavar="|".join(choices) or None,
    )
    return Annotated[kind | None, option]
