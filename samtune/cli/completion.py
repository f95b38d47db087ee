"""Shell completion of models, data sets, recipes, runs and topics. It must be fast: no heavy imports."""

import os
import re
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path

_LISTS = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")
_WEIGHTS = (".safetensors", ".pth", ".pt", ".bin", ".tar")
# How timm's modules declare their architectures, and the weights of each (name.tag).
_ARCHITECTURE = re.compile(r"^@register_model\s+def (\w+)\(", re.M)
_TAGGED = re.compile(r"""^    ['"](\w+\.\w+)['"]:""", re.M)


def models(incomplete: str) -> list[str]:
    """Names in timm's sources, as importing it takes seconds; after a dot the tags of weights."""
    if incomplete.startswith("local-dir:"):
        return [f"local-dir:{path}" for path in _paths(incomplete.removeprefix("local-dir:"))]
    spec = find_spec("timm")
    if spec is None or spec.origin is None:
        return []
    pattern = _TAGGED if "." in incomplete else _ARCHITECTURE
    sources = sorted((Path(spec.origin).parent / "models").glob("*.py"))
    found = {name for path in sources for name in pattern.findall(path.read_text(encoding="utf-8"))}
    return sorted(name for name in found if name.startswith(incomplete))


def datasets(incomplete: str) -> list[str]:
    """Names of the catalog, folders and lists."""
    from samtune.data.catalog import CATALOG

    return [name for name in CATALOG if name.startswith(incomplete)] + list(_paths(incomplete, _LISTS))


def weights(incomplete: str) -> list[str]:
    """Runs and files of weights."""
    return list(_paths(incomplete, _WEIGHTS))


def recipes(incomplete: str) -> list[str]:
    """Recipes that come with samtune, TOML files, and folders that may hold others."""
    from samtune.config import shipped_recipes

    return [recipe.name for recipe in shipped_recipes.recipes() if recipe.name.startswith(incomplete)] + list(
        _paths(incomplete, (".toml",))
    )


def topics(incomplete: str) -> list[str]:
    """Topics of `samtune guide`."""
    from samtune import guide

    return [topic for topic in guide.topics() if topic.startswith(incomplete)]


def runs(incomplete: str) -> list[str]:
    """Run folders in runs/ by the start of their path or name, and folders that may hold others."""
    named = [f"runs/{run}" for run in _names("runs") if run.startswith(incomplete) and _is_run(Path("runs", run))]
    return named if incomplete and named else list(dict.fromkeys([*_paths(incomplete), *named]))


def _is_run(folder: Path) -> bool:
    return (folder / "status.json").is_file()


def _paths(incomplete: str, endings: Iterable[str] = ()) -> Iterator[str]:
    """Folders, with a slash, and files with these endings whose path starts so. Hidden ones only after a dot."""
    parent, name = os.path.split(incomplete)
    for entry in _names(parent or "."):
        path = os.path.join(parent, entry)
        if not entry.startswith(name) or (entry.startswith(".") and not name.startswith(".")):
            continue
        if os.path.isdir(path):
            yield path if _is_run(Path(path)) else f"{path}/"
        elif entry.lower().endswith(tuple(endings)) and endings:
            yield path


def _names(folder: str) -> list[str]:
    try:
        return sorted(os.listdir(os.path.expanduser(folder)))
    except OSError:
        return []
