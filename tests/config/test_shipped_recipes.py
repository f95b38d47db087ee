"""Recipes that come with samtune: they are in the package, are found by name, and can be listed, copied and checked."""

import json
import tomllib

import pytest

from samtune.config import shipped_recipes
from samtune.errors import UsageError
from tests.conftest import ROOT, samtune, write_image_folder

FILES = sorted((ROOT / "recipes").rglob("*.toml"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_every_recipe_of_the_checkout_is_listed():
    assert sorted(recipe.path for recipe in shipped_recipes.recipes()) == FILES
    listed = {row["name"]: row for row in json.loads(samtune("recipes", "ls", "--json").stdout)}
    assert len(listed) == len(FILES)
    pets = listed["quick/pets"]
    assert (pets["kind"], pets["model"], pets["dataset"]) == ("run, sweep", "efficientnet_b3", "pets")
    assert listed["demo"]["kind"] == "run"
    assert listed["smoke/sweep"]["kind"] == "sweep"
    assert listed["paper/b7-pets"]["about"].endswith("(Foret et al. 2021: Table 3, C.2, its code)")


def test_the_wheel_holds_all_packages_and_all_recipes():
    """Packages are named one by one in pyproject.toml, since that of the recipes has another folder."""
    tool = PROJECT["tool"]["setuptools"]
    folders = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "samtune").rglob("__init__.py")}
    assert set(tool["packages"]) == folders | {"samtune.recipes"}
    assert tool["package-dir"] == {"samtune.recipes": "recipes"}
    matched = {path for pattern in tool["package-data"]["samtune.recipes"] for path in (ROOT / "recipes").glob(pattern)}
    assert sorted(matched) == FILES


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("demo", "demo"),
        ("flowers102-b7", "quick/flowers102-b7"),
        ("paper/b7-pets", "paper/b7-pets"),
        ("recipes/quick/pets.toml", "quick/pets"),
        ("pets.toml", None),  # a file of one's own that is not there
        ("mine/pets", None),
        ("flowers", None),
    ],
)
def test_a_name_means_one_recipe(name, found):
    recipe = shipped_recipes.named(name)
    assert (recipe and recipe.name) == found


def test_a_name_that_several_have_means_none_of_them(monkeypatch):
    several = [shipped_recipes.Recipe(name, ROOT / f"{name}.toml") for name in ("a/pets", "b/pets")]
    monkeypatch.setattr(shipped_recipes, "recipes", lambda: several)
    with pytest.raises(UsageError, match="a/pets, b/pets"):
        shipped_recipes.get("pets")


def test_a_file_goes_before_a_recipe_of_that_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = shipped_recipes.Path("demo")
    assert shipped_recipes.find(name) == ROOT / "recipes" / "demo.toml"
    name.mkdir()  # a folder is no recipe
    assert shipped_recipes.find(name) == ROOT / "recipes" / "demo.toml"
    name.rmdir()
    name.write_text("rho = 0")
    assert shipped_recipes.find(name) == name


def test_run_and_sweep_find_a_recipe_by_its_name_and_say_which(tmp_path):
    data = write_image_folder(tmp_path / "data", {"train": 3})
    done = samtune("run", "flowers102-b7", "--dataset", data, "--rho", "-1", cwd=tmp_path)
    assert done.returncode == 2
    assert f"recipe quick/flowers102-b7 that comes with samtune: {ROOT}/recipes/quick/flowers102-b7.toml" in done.stderr
    assert "--rho -1" in done.stderr
    swept = samtune("sweep", "smoke/sweep", "--dataset", "./nowhere", cwd=tmp_path)
    assert swept.returncode == 3
    assert "recipe smoke/sweep that comes with samtune" in swept.stderr
    for command in ("run", "sweep"):
        done = samtune(command, "flower102-b7", cwd=tmp_path)
        assert done.returncode == 2
        assert "nearest: quick/flowers102-b7" in done.stderr


def test_a_run_by_name_is_the_run_of_the_file(tmp_path):
    """The settings that the run folder keeps are those of the recipe."""
    data = write_image_folder(tmp_path / "data", {"train": 6, "test": 3})
    small = ("--dataset", data, "--model", "test_resnet", "--img-size", 32, "--workers", 0, "--batch-size", 4)
    short = ("--epochs", "2 steps", "--max-train", 8, "--max-eval", 2, "--output", "r")
    done = samtune("run", "smoke/random", *small, *short, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    kept = tomllib.loads((tmp_path / "r" / "config.toml").read_text())
    wanted = tomllib.loads((ROOT / "recipes" / "smoke" / "random.toml").read_text())
    assert kept["pretrained"] is wanted["pretrained"] is False
    assert kept["rho"] == wanted["rho"]


def test_show_prints_the_file_as_it_is():
    text = (ROOT / "recipes" / "demo.toml").read_text()
    assert samtune("recipes", "show", "demo").stdout == text
    assert json.loads(samtune("recipes", "show", "demo", "--json").stdout)["text"] == text
    done = samtune("recipes", "show", "deno")
    assert done.returncode == 2
    assert "nearest: demo" in done.stderr


def test_cp_copies_and_replaces_nothing_unasked(tmp_path):
    text = (ROOT / "recipes" / "quick" / "pets.toml").read_text()
    assert samtune("recipes", "cp", "pets", cwd=tmp_path).stdout == "pets.toml\n"
    assert (tmp_path / "pets.toml").read_text() == text
    (tmp_path / "pets.toml").write_text("rho = 1")
    done = samtune("recipes", "cp", "pets", cwd=tmp_path)
    assert done.returncode == 2
    assert "--force" in done.stderr
    assert (tmp_path / "pets.toml").read_text() == "rho = 1"
    assert samtune("recipes", "cp", "pets", "--force", cwd=tmp_path).returncode == 0
    assert (tmp_path / "pets.toml").read_text() == text
    assert samtune("recipes", "cp", "pets", "nowhere/x.toml", cwd=tmp_path).returncode == 8
    assert json.loads(samtune("recipes", "cp", "pets", "y.toml", "--json", cwd=tmp_path).stdout)["path"] == "y.toml"


def test_validate_says_what_a_run_would(tmp_path):
    good, bad, swept = tmp_path / "good.toml", tmp_path / "bad.toml", tmp_path / "swept.toml"
    given = 'model = "test_resnet"\ndataset = "nowhere"\n'
    good.write_text(given)
    bad.write_text(given + "rho = -1\n")
    swept.write_text(given + "[sweep]\narmz = 1\n")
    assert samtune("recipes", "validate", good).stdout == f"{good}: ok (run)\n"
    done = samtune("recipes", "validate", bad, good, swept)
    assert done.returncode == 2
    assert done.stdout == f"{good}: ok (run)\n"
    assert done.stderr == samtune("run", bad).stderr + samtune("sweep", swept).stderr
    rows = json.loads(samtune("recipes", "validate", bad, good, "--json").stdout)
    assert [row["ok"] for row in rows] == [False, True]
    assert "rho" in rows[0]["what"]


def test_all_that_comes_with_samtune_is_valid():
    done = samtune("recipes", "validate", *(recipe.name for recipe in shipped_recipes.recipes()))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(": ok") == len(FILES)
