"""The end of a run that is done: its page, what its number means, and what to do next."""

import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from samtune import console
from samtune.errors import first_line
from samtune.train.setup import Setup


def draw(setup: Setup, folder: Path, result: Mapping[str, Any]) -> Path | None:
    """The page of a run, drawn from its folder; None, with a warning, where that fails: it is not worth a run."""
    page = folder / "report.html"
    try:
        from samtune.report import run_page  # with matplotlib, which takes long to load

        opened = {"val": setup.val.split, "test": setup.test.split if setup.test is not None else None}
        run_page.write(page, folder, result, opened)
    except Exception as error:
        again = f"samtune report {shlex.quote(str(folder))}"
        console.warn(f"the page of the run is not drawn ({first_line(error)}); `{again}` tries once more")
        return None
    return page


def words(folder: Path, result: Mapping[str, Any], page: Path | None) -> Iterator[str]:
    """What the result says and what it does not, where its page is, and which commands come next."""
    scored = result["test"] or result["val"]
    if scored is not None:
        yield f"means   {meaning(result)}"
    run = shlex.quote(str(folder))
    drawn = "" if page else f"; `samtune report {run}` draws its page"
    yield f"next    `samtune predict {run} IMAGES` says what it sees in images of your own{drawn}"
    if page is not None:
        yield f"page    {page}"


def meaning(result: Mapping[str, Any]) -> str:
    """What the headline does say and what it does not, in words."""
    scored = result["test"] or result["val"]
    split = "test" if result["test"] else "validation"
    low, high = scored["top1_error_ci95"]
    said = f"{scored['wrong']} of {scored['n']} {split} images are wrong: of such images, this model gets "
    said += f"{low:.1f} to {high:.1f} % wrong (95 % interval). "
    if result["test"] is None:
        said += "If settings were chosen on these images, that is too low. "
    said += "One seed cannot say whether other settings are better, or what another seed would give; "
    return said + "`samtune sweep` compares over seeds"
