"""The flags that commands share: --json, and the fields of RunConfig."""

import inspect
from collections.abc import Callable, Collection
from functools import wraps
from typing import Annotated, Any, Literal, get_args, get_origin

import typer

from samtune.config import flag_name
from samtune.options import RunConfig

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON, alone on stdout.")]
_SHORT = {"batch_size": "-b", "workers": "-j", "output": "-o"}


DATA_KEYS = (
    *("dataset_config", "image_key", "label_key", "split_key", "image_root", "image_suffix", "class_folders"),
    *("train_split", "val_split", "test_split", "on_unlabelled", "on_bad_image"),
)
"""The settings of a run that tell how a data set is read."""


def with_config_flags(
    command: Callable[..., None], without: Collection[str] = (), only: Collection[str] = tuple(RunConfig.model_fields)
) -> Callable[..., None]:
    """Give a command one flag for each field of RunConfig; it receives those that were typed, as `flags`.

    without: fields that are no flags of this command, or flags of its own. only: the fields that are.
    """
    keys = [key for key in RunConfig.model_fields if key in only and key not in without]

    @wraps(command)
    def wrapped(**arguments: Any) -> None:
        own = {key: arguments.pop(key) for key in list(arguments) if key not in keys}
        command(**own, flags={key: value for key, value in arguments.items() if value is not None})

    signature = inspect.signature(command)
    parameters = [p for p in signature.parameters.values() if p.name != "flags"]
    parameters += [
        inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=_annotation(key))
        for key in keys
    ]
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
        rich_help_panel=RunConfig.panel(key),
        metavar="|".join(choices) or None,
    )
    return Annotated[kind | None, option]
