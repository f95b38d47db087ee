"""`samtune guide`: read the pages of samtune/guide."""

from typing import Annotated

import typer

from samtune.cli import completion
from samtune.cli.help import Json


def guide(
    topic: Annotated[
        str | None,
        typer.Argument(help="By default the topics are listed.", show_default=False, autocompletion=completion.topics),
    ] = None,
    as_json: Json = False,
) -> None:
    """Read a page of the guide, or list its topics.

    Example: samtune guide data

    Exit code 2 for an unknown topic. --json prints {topic, text} of a page, in Markdown.
    """
    from samtune import console
    from samtune import guide as pages

    if topic is not None:
        text = pages.read(topic)
        if as_json:
            console.print_json({"topic": topic, "text": text})
        else:
            console.print_markdown(text)
        return
    rows = [{"topic": name, "about": about} for name, about in pages.topics().items()]
    if as_json:
        console.print_json(rows)
    else:
        console.print_rows("Guide", rows)
        console.print_prose(["`samtune guide TOPIC` prints a page"])
