"""The command that looks at models: `samtune models`, and `samtune models show`."""

import os
from pathlib import Path
from typing import Annotated

import typer

from samtune.cli.help import Json
from samtune.errors import UsageError, plural


def list_models(
    pattern: Annotated[
        str | None,
        typer.Argument(
            help='Part of a name (vit), or a glob ("efficientnet_b*"); by default those that people begin with. '
            "The word show, and a NAME after it, describes one model.",
            metavar="[PATTERN|show]",
            show_default=False,
        ),
    ] = None,
    name: Annotated[
        str | None, typer.Argument(help="After show: a name, as --model takes it.", show_default=False)
    ] = None,
    *,
    every: Annotated[bool, typer.Option("--all", help="All that match, however many, or all there are.")] = False,
    results: Annotated[
        Path | None,
        typer.Option(
            help="timm's own table results/results-imagenet.csv, for top-1 on ImageNet; pip does not install it.",
            metavar="FILE",
            show_default=False,
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """List pretrained models, or show one: parameters, size, pretraining data, and where the weights are.

    Example: samtune models "efficientnet_b*"

    Example: samtune models show tf_efficientnet_lite0

    Example: samtune models wrn

    The parameters are with the head of the pretrained weights. Weights are in a package, in the cache of the hub, or
    have to come from the hub. `show` tells licence, normalisation, stages with their output, and what --perturb lets
    through. Networks for CIFAR, such as wrn28_10, have no pretrained weights: use --no-pretrained.
    """
    if pattern == "show" and name is None:
        raise UsageError("models show: no NAME is given", hint="samtune models show tf_efficientnet_lite0")
    if pattern != "show" and name is not None:
        raise UsageError(f"models {pattern} {name}: one PATTERN is enough", hint=f"samtune models show {name}")
    if every and pattern == "show":
        raise UsageError("models show --all: --all is of a list", hint="leave it out")
    os.environ["HF_HUB_OFFLINE"] = "1"  # what is in the cache is read from there
    if name is not None:
        _show(name, results, as_json)
    else:
        _list(pattern, results, every, as_json)


def _show(name: str, results: Path | None, as_json: bool) -> None:
    from samtune import console
    from samtune.models import listing

    about = listing.describe(name, listing.top1(results))
    if as_json:
        console.print_json(about)
        return
    console.print_table(about["name"], listing.description_rows(about))
    console.print_rows("Stages", listing.stage_rows(about))
    console.print_lines([listing.example(about)])


def _list(pattern: str | None, results: Path | None, every: bool, as_json: bool) -> None:
    from samtune import console
    from samtune.models import listing

    accuracy = listing.top1(results)
    unfiltered = listing.all_names() if every else listing.FIRST_CHOICES
    names = unfiltered if pattern is None else listing.find(pattern)
    shown = names if every else names[: listing.MOST]
    count = len(shown) <= listing.MOST
    if count:
        console.info(f"counting the parameters of {plural(len(shown), 'model')} ...")
    rows = listing.rows(shown, accuracy, count=count)
    if as_json:
        console.print_json(rows)
    else:
        console.print_rows("Pretrained models", listing.table(rows))
        console.print_lines(f"--model {row['alias']} is {row['name']}" for row in rows if row["alias"])
    if not count:
        console.info(f"parameters are counted in lists of up to {listing.MOST}")
    if len(shown) < len(names):
        console.info(f"{len(names) - len(shown)} more: narrow the pattern, or --all")
    if pattern is None and not every:
        console.info('search with `samtune models PATTERN` ("convnext*", vit); `samtune models show NAME` tells more')
