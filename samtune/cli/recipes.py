"""The commands about recipes: `samtune recipes ls`, `show`, `cp`, `validate`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from samtune.cli.help import Command, Json, new_group
from samtune.config import shipped_recipes
from samtune.errors import MachineError, SamtuneError, UsageError, plural

recipes_app = new_group(
    "The recipes that come with samtune, and a look at one's own: `samtune run NAME` finds one by its name."
    "\n\nExample: samtune recipes ls"
)

_Name = Annotated[str, typer.Argument(help="Of `samtune recipes ls`: quick/pets, or pets.", show_default=False)]


@recipes_app.command(name="ls", cls=Command, short_help="list the recipes, and what each is for")
def list_recipes(as_json: Json = False) -> None:
    """List the recipes that come with samtune: run or sweep, model, data set, variants, and what each is for.

    Example: samtune recipes ls --json
    """
    from samtune import console

    rows = [recipe.about() for recipe in shipped_recipes.recipes()]
    if as_json:
        console.print_json(rows)
        return
    shown = [
        {"name": row["name"], "kind": row["kind"], "variants": _count(row["variants"]), "about": row["about"]}
        for row in rows
    ]
    console.print_rows("Recipes", shown, droppable=("variants",))
    console.print_prose(["`samtune recipes show NAME` prints one, `samtune run NAME` runs it"])


@recipes_app.command(cls=Command, short_help="print a recipe as it is")
def show(name: _Name, as_json: Json = False) -> None:
    """Print a recipe as it is: its claim, its settings, what was measured. Its variants are listed on stderr.

    Example: samtune recipes show flowers102-b7
    """
    from samtune import console

    recipe = shipped_recipes.get(name)
    if as_json:
        console.print_json({**recipe.about(), "path": str(recipe.path), "text": recipe.text})
    else:
        console.print_lines(recipe.text.splitlines())
        if axes := recipe.variants.describe():
            console.info(f"--variant takes one option of each axis: {axes}")


@recipes_app.command(name="cp", cls=Command, short_help="copy a recipe, to change it")
def copy(
    name: _Name,
    destination: Annotated[
        Path | None, typer.Argument(help="A file or a folder; by default NAME.toml in this folder.", show_default=False)
    ] = None,
    *,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
    as_json: Json = False,
) -> None:
    """Copy a recipe, to change it.

    Example: samtune recipes cp flowers102-b7 mine.toml
    """
    recipe = shipped_recipes.get(name)
    path = destination or Path()
    if path.is_dir():
        path /= recipe.path.name
    if path.exists() and not force:
        raise UsageError(f"{path} exists", hint="give another path, or --force to replace it")
    try:
        path.write_text(recipe.text, encoding="utf-8")
    except OSError as error:
        raise MachineError(f"{path} cannot be written", error.strerror or "", "give another path") from None

    from samtune import console

    if as_json:
        console.print_json({"name": recipe.name, "path": str(path)})
    else:
        console.print_lines([str(path)])


@recipes_app.command(cls=Command, short_help="check keys and values, as a run or a sweep would")
def validate(
    recipes: Annotated[
        list[Path], typer.Argument(help="TOML files, or names of `samtune recipes ls`.", metavar="FILE")
    ],
    as_json: Json = False,
) -> None:
    """Check the keys and values of recipes in all variants, as a run or sweep would. Reads no data set and no model.

    Example: samtune recipes validate mine.toml

    Exit code 2 if one of them is refused, with the words that a run would have for it.
    """
    from samtune import console

    rows: list[dict[str, Any]] = []
    for recipe in recipes:
        row: dict[str, Any] = {"recipe": str(recipe), "ok": True, "what": "", "why": "", "mend": ""}
        try:
            kind = _check(recipe)
        except SamtuneError as error:
            row |= {"ok": False, "what": error.message, "why": error.cause, "mend": error.hint}
            console.error(str(error))
        else:
            if not as_json:
                console.print_lines([f"{recipe}: ok ({kind})"])
        rows.append(row)
    if as_json:
        console.print_json(rows)
    if not all(row["ok"] for row in rows):
        raise typer.Exit(UsageError.exit_code)


def _count(variants: dict[str, list[str]]) -> str | None:
    """The number of options of each axis: 5 x 3 x 2."""
    return " x ".join(str(len(options)) for options in variants.values()) or None


def _check(recipe: Path) -> str:
    """What a valid recipe is for, in words. Raises UsageError as `samtune run` and `samtune sweep` would."""
    path = shipped_recipes.find(recipe)
    from samtune.config import loading

    cells = loading.variants(path).cells()
    every: list[dict[str, Any]] = [{"variant": cell} for cell in cells] or [{}]
    for flags in every:
        loading.load(path, flags)
    if any(loading.sweep_table(path, flags.get("variant")) for flags in every):
        from samtune.sweep import spec as sweeps

        for flags in every:
            sweeps.load(path, flags)
        kind = "run, sweep"
    else:
        kind = "run"
    return f"{kind}; {plural(len(cells), 'variant')}" if cells else kind
