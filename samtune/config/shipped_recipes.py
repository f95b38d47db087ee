"""The recipes that come with samtune, found by name."""

import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from samtune.config.variants import Variants
from samtune.errors import UsageError, similar_names

_HERE = Path(__file__).parents[1]
# An installed package has them inside, a checkout beside it.
FOLDER = next((folder for folder in (_HERE / "recipes", _HERE.parent / "recipes") if folder.is_dir()), _HERE)
_COMMAND = re.compile(r"^#\s+samtune (run|sweep) ", re.MULTILINE)


@dataclass(frozen=True)
class Recipe:
    """A recipe that comes with samtune. name: its path in the folder of recipes, without suffix: quick/pets."""

    name: str
    path: Path

    @property
    def text(self) -> str:
        """The content of the file."""
        return self.path.read_text(encoding="utf-8")

    @property
    def variants(self) -> Variants:
        """The variants of the file."""
        return Variants.of(tomllib.loads(self.text), self.path)

    def about(self) -> dict[str, Any]:
        """name, kind, model, dataset, variants, and about: the first sentence of the file.

        kind: the command that its first lines give, run or sweep; of a run that has a table [sweep] both. model,
        dataset: of the first variant. variants: axis -> options.
        """
        text, variants = self.text, self.variants
        content = tomllib.loads(text)
        for _, settings in variants.layers(variants.cell(None)):
            content |= settings
        command = _COMMAND.search(text)
        kind = command[1] if command else "run"
        return {
            "name": self.name,
            "kind": "run, sweep" if kind == "run" and "sweep" in content else kind,
            "model": content.get("model"),
            "dataset": content.get("dataset"),
            "variants": {axis: list(options) for axis, options in variants.axes.items()},
            "about": _first_sentence(text),
        }


def _first_sentence(text: str) -> str:
    """The comment that a file begins with, up to the end of its first sentence."""
    lines = []
    for line in text.splitlines():
        words = line.removeprefix("#").strip()
        if not (line.startswith("#") and words):
            break
        lines.append(words)
    return re.split(r"(?<=[.?!])\s(?=[A-Z])", " ".join(lines), maxsplit=1)[0].rstrip(".")


def recipes() -> list[Recipe]:
    """All of them, by name."""
    paths = {path.relative_to(FOLDER).with_suffix("").as_posix(): path for path in FOLDER.rglob("*.toml")}
    return [Recipe(name, paths[name]) for name in sorted(paths, key=lambda name: (name.count("/"), name))]


def named(name: str) -> Recipe | None:
    """The recipe of a name: quick/pets, pets if only one has this name, or recipes/quick/pets.toml."""
    wanted = name
    if name.startswith("recipes/") and name.endswith(".toml"):  # as they are called in a checkout
        wanted = name.removeprefix("recipes/").removesuffix(".toml")
    matches = [recipe for recipe in recipes() if recipe.name == wanted]
    if not matches and wanted == name:
        matches = [recipe for recipe in recipes() if recipe.path.stem == name]
    return matches[0] if len(matches) == 1 else None


def get(name: str) -> Recipe:
    """The recipe of a name. Raises UsageError with the nearest names."""
    recipe = named(name)
    if recipe is None:
        raise UsageError(
            f"no recipe is called {name}", _nearest(name), "`samtune recipes ls` lists those that come with samtune"
        )
    return recipe


def find(path: Path, *, quiet: bool = False) -> Path:
    """The file of a recipe that a command names: a path, else the name of one that comes with samtune.

    quiet: without the note that names the latter. Raises UsageError with the nearest names if there is neither.
    """
    if path.exists() and not path.is_dir():
        return path
    recipe = named(path.as_posix())
    if recipe is not None:
        if not quiet:
            from samtune import console

            console.info(f"recipe {recipe.name} that comes with samtune: {recipe.path}")
        return recipe.path
    if path.exists():
        return path  # a folder: reading it raises the error
    raise UsageError(
        f"recipe {path} cannot be read",
        f"there is no such file, and no recipe of that name comes with samtune; {_nearest(path.as_posix())}",
        "give the path of a TOML file, or a name of `samtune recipes ls`",
    )


def _nearest(name: str) -> str:
    """The recipes with the most similar names, as text."""
    stem = Path(name.removesuffix(".toml")).name
    by_stem: dict[str, list[str]] = {}
    for recipe in recipes():
        by_stem.setdefault(recipe.path.stem, []).append(recipe.name)
    if stem in by_stem:
        return f"it may be one of {', '.join(by_stem[stem])}"
    near = [full for similar in similar_names(stem, by_stem, 3) for full in by_stem[similar]]
    return f"nearest: {', '.join(near)}" if near else "none has a name like it"
