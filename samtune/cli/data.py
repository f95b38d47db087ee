"""The commands that look at data sets: `samtune data check`, `samtune datasets`, `samtune datasets show`."""

import os
from functools import partial
from typing import Annotated, Any

import typer

from samtune.cli.config_flags import DATA_KEYS, with_config_flags
from samtune.cli.help import Command, Json, new_group
from samtune.config import loading
from samtune.config.run_config import MOST_PROCESSES

data_app = new_group("Look at a data set before a run does.\n\nExample: samtune data check path/to/photos")
datasets_app = new_group()


@data_app.command(name="check", cls=Command, short_help="find unreadable images, duplicates, leaks and odd labels")
@partial(with_config_flags, only=(*DATA_KEYS, "max_megapixels"))
def data_check(
    dataset: Annotated[
        str,
        typer.Argument(
            help="A known name, the path of a folder or a list, or user/name on the hub.",
            metavar="NAME_OR_PATH",
            show_default=False,
        ),
    ],
    *,
    workers: Annotated[
        int | None,
        typer.Option(
            "--workers", "-j", min=0, max=MOST_PROCESSES, help="Processes that read images; by default one a core."
        ),
    ] = None,
    as_json: Json = False,
    flags: dict[str, Any],
) -> None:
    """Find unreadable images, duplicates within and across splits, missing classes and odd labels.

    Example: samtune data check path/to/photos

    An image is readable if training can decode it. Exit code 3 if one is not, and 0 otherwise, whatever else is found.
    Pictures that look alike are found with the package imagehash (extra: check), equal files without it.
    """
    from samtune.data.source import locate

    locate(dataset)
    settings = loading.load(None, {"model": "", "dataset": dataset, **flags})

    from samtune import console
    from samtune.data.check import check

    with console.RunProgress() as progress:
        result = check.check(settings, workers=workers, progress=progress.count)
    if as_json:
        console.print_json(result)
    else:
        console.print_table(f"Data check: {result['dataset']}", check.summary(result))
        console.print_prose(check.findings(result))
    check.raise_if_unreadable(result)


@datasets_app.callback(invoke_without_command=True)
def list_datasets(context: typer.Context, as_json: Json = False) -> None:
    """List the data sets that have a name: classes, images, licence, source. `show` tells more of one.

    Example: samtune datasets --json

    Any other data set is given by the path of a folder or a list, or by its id on the hub.
    """
    if context.invoked_subcommand is not None:
        return
    from samtune import console
    from samtune.data import describe

    rows = describe.names()
    if as_json:
        console.print_json(rows)
    else:
        console.print_rows("Data sets", rows, droppable=("source", "licence", "validation"))


@datasets_app.command(cls=Command, short_help="tell what is known of a data set")
def show(
    dataset: Annotated[str, typer.Argument(help="A name, a path, or user/name on the hub.", metavar="NAME_OR_PATH")],
    as_json: Json = False,
) -> None:
    """Tell what is known of a data set: classes, splits, policy, citation, licence. Downloads nothing.

    Example: samtune datasets show flowers102
    """
    os.environ["HF_HUB_OFFLINE"] = "1"  # what is in the cache is read from there

    from samtune import console
    from samtune.data import describe

    about = describe.describe(dataset)
    if as_json:
        console.print_json(about)
    else:
        console.print_table(about["name"], describe.to_rows(about))
