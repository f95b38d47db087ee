"""The order between the packages of samtune, and which module knows which library: every import, wherever it stands."""

import ast
import graphlib

import pytest

from tests.conftest import ROOT

# A package imports from those to its right. Those of one step do not know each other.
ORDER = (
    {"cli"},
    {"api", "doctor", "sharpness"},
    {"sweep"},
    {"plan", "predict", "export"},
    {"train"},
    {"report"},
    {"models"},
    {"runs"},
    {"sam", "data"},
    {"distributed"},
    {"config"},
    {"hub"},
    {"console", "guide"},
    {"errors", "files"},
)
LIBRARIES = {
    "datasets": "samtune.data.tables",
    "filelock": "samtune.runs.lock",
    "huggingface_hub": "samtune.hub",
    "imagehash": "samtune.data.check.scan",
    "jinja2": "samtune.report.html",
    "matplotlib": "samtune.report.svg_charts",
    "onnx": "samtune.export.onnx_file",
    "onnxruntime": "samtune.export.onnx_file",
    "ray": "samtune.sweep.ray_executor",
    "rich": "samtune.console",
    "timm": ("samtune.models", "samtune.data.transforms"),
    "torch.distributed": "samtune.distributed",
    "typer": "samtune.cli",
    "wandb": "samtune.train.trackers",
}
_STEP = {package: step for step, packages in enumerate(ORDER) for package in packages}


def imports_of(source):
    """Full names of what a module imports, also inside its functions: `from a import b` is a.b."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def modules():
    for path in sorted((ROOT / "samtune").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path.read_text()


MODULES = dict(modules())
INSIDE = [name for name in MODULES if name not in ("samtune", "samtune.__main__")]


def package(name):
    return name.split(".")[1]


def against_the_order(module, source):
    """The imports of a module that lead to a package left of its own, or beside it."""
    inside = [name for name in imports_of(source) if name.startswith("samtune.") and package(name) in _STEP]
    own = package(module)
    return [name for name in inside if package(name) != own and _STEP[package(name)] <= _STEP[own]]


def test_no_import_goes_against_the_order_of_the_packages():
    assert {package(module) for module in INSIDE} == set(_STEP)
    found = {module: against_the_order(module, MODULES[module]) for module in INSIDE}
    assert {module: names for module, names in found.items() if names} == {}


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("samtune.data.loader", "from samtune.train import loop"),
        ("samtune.data.loader", "def f():\n    from samtune.cli.main import main"),
        ("samtune.sam.step", "from samtune.data.loader import eval_batches"),
        ("samtune.console", "from samtune import hub"),
    ],
)
def test_an_import_against_the_order_is_seen(module, source):
    assert len(against_the_order(module, source)) == 1


def test_the_modules_import_each_other_without_cycles():
    graph = {}
    for name in INSIDE:
        found = set(imports_of(MODULES[name]))
        graph[name] = {other for other in found | {each.rpartition(".")[0] for each in found} if other in INSIDE} - {
            name
        }
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError


@pytest.mark.parametrize("library", LIBRARIES)
def test_each_library_is_known_in_one_place(library):
    known = LIBRARIES[library]
    known = (known,) if isinstance(known, str) else known
    users = {
        name
        for name, source in MODULES.items()
        if any(one == library or one.startswith(f"{library}.") for one in imports_of(source))
    }
    assert users
    assert all(any(user == one or user.startswith(f"{one}.") for one in known) for user in users), users
