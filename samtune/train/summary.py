"""What a finished run shows: its page, what its number means, and which commands come next."""

import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from samtune import console
from samtune.errors import first_line
from samtune.train.setup import Setup


def write_page(setup: Setup, folder: Path, result: Mapping[str, Any]) -> Path | None:
    """Write report.html into the run folder. Best effort: where that fails, a warning and None."""
    page = folder / "report.html"
    try:
        from samtune.report import run_page  # with matplotlib, which takes long to load

        splits = {"val": setup.val.split, "test": setup.test.split if setup.test is not None else None}
        run_page.write(page, folder, result, splits)
    except Exception as error:
        again = f"samtune report {shlex.quote(str(folder))}"
        console.warn(f"the page of the run is not drawn ({first_line(error)}); `{again}` tries once more")
        return None
    return page


def lines(folder: Path, result: Mapping[str, Any], page: Path | None) -> Iterator[str]:
    """What the result means, where its page is, and which commands come next."""
    scored = result["test"] or result["val"]
    if scored is not None:
        yield f"means   {interpret(result)}"
    run = shlex.quote(str(folder))
    drawn = "" if page else f"; `samtune report {run}` draws its page"
    yield f"next    `samtune predict {run} IMAGES` says what it sees in images of your own{drawn}"
    if page is not None:
        yield f"page    {page}"


def interpret(result: Mapping[str, Any]) -> str:
    """What the error does and does not say, in words."""
    scored = result["test"] or result["val"]
    split = "test" if result["test"] else "validation"
    low, high = scored["top1_error_ci95"]
    text = f"{scored['wrong']} of {scored['n']} {split} images are wrong: of such images, this model gets "
    text += f"{low:.1f} to {high:.1f} % wrong (95 % interval). "
    if result["test"] is None:
        text += "If settings were chosen on these images, that is too low. "
    text += "One seed cannot say whether other settings are better, or what another seed would give; "
    return text + "`samtune sweep` compares over seeds"
