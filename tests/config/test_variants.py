"""Variants: one recipe with a table of experiments, of which a run takes one cell."""

import json
import re
import tomllib

import pytest

from samtune.config import loading, shipped_recipes
from samtune.errors import UsageError
from samtune.sweep import arms, spec
from tests.conftest import samtune, write_image_folder

RECIPE = """
model = "test_resnet"
dataset = "cifar10"
rho = 0.05
lr = 0.1
[sweep]
arms = ["sam", "sgd"]
grid.rho = [0.05, 0.1]
grid.momentum = [0.9]
[variants.network.thin]
[variants.network.wide]
model = "resnet10t"
rho = 0.1
[variants.augmentation.basic]
[variants.augmentation.cutout]
cutout = 0.5
[variants.augmentation.mixup]
mixup = 1.0
lr = 0.2
sweep.arms = ["sgd"]
sweep.grid.mixup = [1.0, 8.0]
[variants.length.short]
epochs = 2
[variants.length.long]
epochs = 9
lr = 0.3
[combinations."cutout long wide"]
rho = 0.3
[combinations."wide long"]
rho = 0.2
momentum = 0.8
"""


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "table.toml"
    path.write_text(RECIPE)
    return path


def load(recipe, variant=None, **flags):
    return loading.load(recipe, flags | ({"variant": variant} if variant else {}))


@pytest.mark.parametrize(
    ("variant", "flags", "expected", "origin"),
    [
        (None, {}, {"rho": 0.05, "lr": 0.1, "cutout": 0.0, "epochs": "2 epochs"}, "recipe {}"),
        ("wide", {}, {"model": "resnet10t", "rho": 0.1}, "recipe {}, variant wide"),
        ("cutout", {}, {"cutout": 0.5, "rho": 0.05}, "recipe {}"),
        ("wide,long", {}, {"rho": 0.2, "momentum": 0.8, "lr": 0.3}, "recipe {}, variant wide long"),
        ("long,cutout,wide", {}, {"rho": 0.3, "momentum": 0.8}, "recipe {}, variant cutout long wide"),
        ("wide cutout long", {"rho": 0.7}, {"rho": 0.7, "momentum": 0.8}, "flag"),
        ("mixup", {}, {"lr": 0.2}, "recipe {}"),
        ("long,mixup", {}, {"lr": 0.3, "mixup": 1.0}, "recipe {}"),
    ],
)
def test_a_flag_goes_before_a_combination_that_before_an_option_and_that_before_the_recipe(
    recipe, variant, flags, expected, origin
):
    settings = load(recipe, variant, **flags)
    stored = tomllib.loads(settings.to_toml())
    assert {key: stored[key] for key in expected} == expected
    assert settings.origins["rho"] == origin.format(recipe)


def test_a_cell_has_the_first_option_of_each_axis_that_is_not_named_and_a_name_in_the_order_of_the_axes(recipe):
    assert load(recipe).variant == "thin basic short"
    assert load(recipe, "long,wide").variant == "wide basic long"
    assert load(recipe, "long,wide").origins["variant"] == "flag"
    assert load(recipe).origins["variant"] == f"recipe {recipe}"
    cells = loading.variants(recipe).cells()
    assert len(set(cells)) == 2 * 3 * 2
    assert all(load(recipe, cell).variant == cell for cell in cells)


@pytest.mark.parametrize(
    ("variant", "said"),
    [
        ("cutuot", "--variant cutuot: .* no such variant .*network: thin, wide; augmentation: .* did you mean cutout"),
        ("basic,cutout", "--variant basic,cutout: both are options of augmentation"),
        ("nothing-like-it", "give one of an axis"),
    ],
)
def test_an_option_that_is_not_there_or_one_too_many_is_refused_with_the_axes(recipe, variant, said):
    with pytest.raises(UsageError) as error:
        load(recipe, variant)
    assert re.search(said, " ".join(str(error.value).split()))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("variants = 3", "variants in recipe"),
        ("[variants.network]\nmodel = 3", "write [variants.AXIS.OPTION]"),
        ("[variants.network]", "write [variants.AXIS.OPTION]"),
        ("[variants.a.x]\n[variants.b.x]", "one option of one axis"),
        ('[variants.a."x y"]', "without blanks"),
        ("[variants.a.x]\n[combinations]\nx = 3", "a combination has settings"),
        ("[variants.a.x]\n[combinations.y]\nrho = 1", "recipe.toml: y: recipe"),
        ("[variants.a.x]\nrhoo = 1", "unknown key rhoo in recipe"),
        ("[variants.a.x]\nsweep = 1", "sweep = 1 in recipe"),
    ],
)
def test_tables_of_another_form_are_refused_with_the_form(tmp_path, text, said):
    path = tmp_path / "recipe.toml"
    path.write_text(f'model = "a"\ndataset = "cifar10"\n{text}\n')
    with pytest.raises(UsageError) as error:
        spec.load(path, {})
    assert said in str(error.value)


@pytest.mark.parametrize("with_recipe", [True, False])
def test_variant_without_variants_is_refused_in_one_line(tmp_path, with_recipe):
    path = tmp_path / "plain.toml"
    path.write_text('model = "a"\ndataset = "cifar10"\n')
    with pytest.raises(UsageError, match="--variant cutout") as error:
        loading.load(path if with_recipe else None, {"variant": "cutout", "model": "a", "dataset": "b"})
    assert "leave it out" in error.value.hint


def test_the_stored_settings_are_flat_and_repeat_the_cell(recipe, tmp_path):
    first = load(recipe, "wide,cutout,long")
    stored = tmp_path / "config.toml"
    stored.write_text(first.to_toml())
    again = loading.load(stored)
    assert again.model_dump() == first.model_dump()
    assert not tomllib.loads(stored.read_text()).keys() & {"variants", "combinations"}


def test_a_resumed_run_keeps_its_variant_and_another_one_differs(recipe):
    stored = load(recipe, "wide").model_dump()
    assert loading.load_over(stored, {}, recipe, {})[2] == set()
    assert loading.load_over(stored, {}, None, {})[2] == set()
    assert loading.load_over(stored, {}, recipe, {"variant": "wide"})[2] == set()
    assert loading.load_over(stored, {}, recipe, {"variant": "wide,cutout"})[2] == {"variant", "cutout"}


def test_a_sweep_is_of_one_cell_whose_options_change_its_table(recipe, tmp_path):
    plain, mixed = spec.load(recipe, {}), spec.load(recipe, {"variant": "mixup,wide"})
    assert (arms.arms(plain), arms.arms(mixed)) == (["sam", "sgd"], ["sgd"])
    assert arms.points(mixed, "sgd") == [{"momentum": 0.9, "mixup": alpha} for alpha in (1.0, 8.0)]
    assert mixed.config({"mixup": 8.0}).model == "resnet10t"
    stored = tmp_path / "sweep.toml"
    stored.write_text(mixed.to_toml())
    again = spec.load(stored, {})
    assert again.base.model_dump() == mixed.base.model_dump()
    assert again.table == mixed.table
    assert (plain.name, mixed.name) == ("table-thin-basic-short", "table-wide-mixup-short")
    stored.write_text(RECIPE.replace("grid.rho = [0.05, 0.1]", 'grid.variant = ["thin", "wide"]'))
    with pytest.raises(UsageError, match="variant cannot vary"):
        spec.load(stored, {})


def test_run_and_sweep_take_a_variant_and_validate_looks_at_all(recipe, tmp_path):
    data = write_image_folder(tmp_path / "data", {"train": 6, "test": 3})
    short = ("--no-pretrained", "--img-size", 32, "--workers", 0, "--epochs", "1 steps", "--dataset", data)
    done = samtune("run", recipe, "--variant", "cutout", *short, "--output", tmp_path / "r")
    assert done.returncode == 0, done.stderr
    stored = tomllib.loads((tmp_path / "r" / "config.toml").read_text())
    assert (stored["cutout"], stored["variant"]) == (0.5, "thin cutout short")
    swept = samtune("sweep", recipe, "--variant", "mixup", *short, "--seeds", 1, "--dry-run", "--json")
    assert {row["arm"] for row in json.loads(swept.stdout)} == {"sgd"}
    assert samtune("recipes", "validate", recipe).stdout == f"{recipe}: ok (run, sweep; 12 variants)\n"
    recipe.write_text(RECIPE.replace("cutout = 0.5", "cutout = 5.0"))
    assert samtune("recipes", "validate", recipe).returncode == 2


def test_the_list_of_recipes_says_which_variants_there_are(recipe):
    about = shipped_recipes.Recipe("table", recipe).about()
    assert about["variants"]["augmentation"] == ["basic", "cutout", "mixup"]
    assert (about["model"], about["kind"]) == ("test_resnet", "run, sweep")
