"""What a recipe claims is complete and true of its settings, and every recipe runs: in miniature, in this process."""

import itertools
import re
import statistics
import subprocess
import tomllib
from functools import cache
from pathlib import Path

import pytest
import timm

from samtune import api
from samtune.config import loading
from samtune.config.duration import Duration
from samtune.config.run_config import RunConfig
from samtune.data import source
from samtune.data.catalog import CATALOG
from samtune.models.names import resolve
from samtune.report import stats
from samtune.sweep import arms
from samtune.sweep.plan import Plan
from samtune.sweep.spec import load
from samtune.train.batch_plan import BatchPlan
from tests.conftest import ROOT, write_image_folder
from tests.test_docs import RECIPES, SCRIPTS

FOLDER = ROOT / "recipes"
PAPER = sorted([*FOLDER.glob("paper/b7-*"), *FOLDER.glob("paper/l2-*")])
QUICK = sorted((FOLDER / "quick").iterdir())
PAGE = (FOLDER / "README.md").read_text()

# Foret et al. 2021, Table 3 (Table 10 for rho 0.05): top-1 error in % and half of its 95 % interval over 5 runs.
# data set: B7 with SAM, with rho 0.05, without SAM; L2 with SAM, without.
TABLE_3 = {
    "aircraft": ((6.80, 0.06), 7.06, (8.15, 0.08), (4.82, 0.08), (5.80, 0.10)),
    "flowers102": ((0.63, 0.02), 0.81, (1.16, 0.05), (0.35, 0.01), (0.40, 0.02)),
    "pets": ((3.97, 0.04), 4.15, (4.24, 0.09), (2.90, 0.04), (3.08, 0.04)),
    "cars": ((5.18, 0.02), 5.57, (5.94, 0.06), (4.04, 0.03), (4.93, 0.04)),
    "cifar10": ((0.88, 0.02), 0.88, (0.95, 0.03), (0.30, 0.01), (0.34, 0.02)),
    "cifar100": ((7.44, 0.06), 7.56, (7.68, 0.06), (3.92, 0.06), (4.07, 0.08)),
    "birdsnap": ((13.64, 0.15), 13.64, (14.30, 0.18), (9.93, 0.15), (10.31, 0.15)),
    "food101": ((7.02, 0.02), 7.06, (7.17, 0.03), (3.82, 0.01), (3.97, 0.03)),
}
# The same, of training from scratch. Table 1: network and length -> CIFAR-10, CIFAR-100, each with the basic
# augmentation, with cutout, and with AutoAugment and cutout: with SAM / without.
TABLE_1 = {
    "wrn28_10": "2.7/3.5 2.3/2.6 2.1/2.3 16.5/18.8 14.9/16.9 13.6/15.8",
    "wrn28_10_1800": "2.4/3.5 2.1/2.7 1.6/2.2 16.3/19.1 14.0/17.4 12.8/16.1",
    "shake26_2x96d": "2.3/2.7 2.0/2.3 1.6/1.9 15.1/17.0 14.2/15.7 12.8/14.1",
    "pyramidnet272_a200": "2.7/4.0 1.9/2.5 1.6/1.9 14.6/19.7 12.6/16.4 11.6/14.6",
    "pyramidnet272_a200_shakedrop": "2.1/2.5 1.6/1.9 1.4/1.6 13.3/14.5 11.3/11.8 10.3/10.6",
}
# ImageNet, 100, 200 and 400 epochs.
TABLE_2 = {
    "resnet50": "22.5/22.9 21.4/22.3 20.9/22.3",
    "resnet101": "20.2/21.2 19.4/20.9 19.0/22.3",
    "resnet152": "19.2/20.4 18.5/20.3 18.4/20.9",
}
# CIFAR-10 with 20, 40, 60 and 80 % wrong labels: accuracy on the clean test split.
TABLE_4 = {
    "sgd": "84.8 68.8 48.2 26.2",
    "mixup": "93.0 90.0 83.8 70.2",
    "bootstrap-mixup": "93.3 92.0 87.6 72.0",
    "sam": "95.1 93.4 90.5 77.9",
    "bootstrap-sam": "95.4 94.2 91.8 79.9",
}
# SVHN, Fashion-MNIST, each basic and with AutoAugment.
TABLE_5 = {
    "wrn28_10": "1.42/1.58 0.99/1.14 3.98/4.57 3.61/3.86",
    "shake26_2x96d": "1.44/1.58 1.07/1.03 3.97/4.37 3.59/3.76",
}
# Errors by the number of ascent steps.
INNER_STEPS = {"steps1": "2.77", "steps2": "2.76", "steps3": "2.73", "steps5": "2.77"}
TABLES = {"table1": TABLE_1, "table2": TABLE_2, "table4": TABLE_4, "table5": TABLE_5, "ablations": INNER_STEPS}
# A cell of each of them, and of their miniatures, that has more to it than the first.
RUN_CELLS = {
    "table1": "autoaugment",
    "table4": "bootstrap-sam",
    "table5": "svhn,autoaugment",
    "ablations": "second-order",
}
MEASURED = {"n", "train_seconds", "machine", "date", "versions"}
OF_A_RUN = {"passes", "top1_error", "wrong", "ci95"}
OF_A_SWEEP = {"passes", "train", "val", "arms"}  # arms: what was chosen, wrong images by seed, passes of a run
ARMS = {"sam", "sam-late", "sgd", "sgd-2x"}

SWEPT = [path for path in RECIPES if "arms" in tomllib.loads(path.read_text())["expected"]]
RUN = [path for path in RECIPES if path not in SWEPT]

each = pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: str(path.relative_to(FOLDER)))
each_sweep = pytest.mark.parametrize("recipe", SWEPT, ids=lambda path: path.stem)
each_of_the_paper = pytest.mark.parametrize("recipe", PAPER, ids=lambda path: path.stem)


def read(recipe: Path) -> dict:
    return tomllib.loads(recipe.read_text())


def cells(recipe: Path) -> list[dict[str, str]]:
    """Flags for each variant of a recipe; of one without variants no flags."""
    return [{"variant": cell} for cell in loading.variants(recipe).cells()] or [{}]


def of_cell(by_options: dict, cell: str) -> list:
    """The entries whose options a cell has."""
    return [value for key, value in by_options.items() if set(key.split()) <= set(cell.split())]


def passes(settings: RunConfig) -> float:
    """Forward-backward passes of a run: one in each step, and those that SAM adds where it is on."""
    rows = settings.max_train or int((1 - settings.val_fraction) * CATALOG[settings.dataset].counts.get("train", 0))
    steps = settings.epochs.steps(rows // (settings.global_batch_size or settings.batch_size))
    before = settings.ascent_steps + 3 * settings.second_order
    added = {"gradient": before, "random": 1 / 3, "momentum": 0, "previous": 0}[settings.ascent]
    with_sam = steps - settings.sam_start.steps(0, steps) if settings.rho else 0
    return (1 + settings.bootstrap) * (steps + added * with_sam)


@each
def test_every_recipe_loads_and_names_things_that_exist(recipe):
    for flags in cells(recipe):
        settings = loading.load(recipe, flags)
        resolved = resolve(settings.model)
        source.locate(settings.dataset)
        said = re.search(r"-> (\S+), (\d+) px", recipe.read_text())
        assert said is not None or settings.img_size is not None
        if said is not None:
            assert (said[1], int(said[2])) == (resolved, timm.get_pretrained_cfg(resolved).input_size[1])


@each
def test_every_recipe_states_what_was_measured_and_on_how_many_images_or_that_nothing_was(recipe):
    text, claim = recipe.read_text(), read(recipe)["expected"]
    if not claim["measured"]:
        assert claim.keys() - {"paper"} == {"measured", "passes"}
        assert "Not measured here" in text
        return
    assert claim.keys() == {"measured"} | MEASURED | (OF_A_SWEEP if recipe in SWEPT else OF_A_RUN)
    if recipe in SWEPT:
        return
    assert claim["top1_error"] == pytest.approx(100 * claim["wrong"] / claim["n"])
    assert claim["ci95"] == [round(100 * bound, 2) for bound in stats.wilson_interval(claim["wrong"], claim["n"])]
    low, high = (f"{bound:.1f}" for bound in claim["ci95"])
    assert f"{claim['top1_error']} % (95 % interval {low} to {high}, n = {claim['n']})" in text.replace("\n# ", " ")


@each_sweep
def test_a_measured_sweep_has_all_seeds_of_all_arms_at_the_cost_of_their_settings(recipe):
    asked, claim = load(recipe, {}), read(recipe)["expected"]
    plan = Plan(asked, lambda settings: claim["train"] + (0 if settings.val else claim["val"]))
    runs = []
    for found, (budget, arm) in zip(claim["arms"], plan.arms(), strict=True):
        assert (found["arm"], found.get("budget")) == (arm, budget and str(budget))
        assert found["chosen"] in arms.points(asked, arm)
        finals = plan.finals(budget, arm, found["chosen"], {})
        assert len(found["wrong"]) == len(finals)
        assert {run.passes for run in finals} == {found["passes"]}
        runs += [*finals, *itertools.chain(*plan.selections(budget, arm, {}))]
    assert claim["passes"] == sum(run.passes for run in runs)


@each_sweep
def test_the_page_has_the_means_and_intervals_that_follow_from_the_counts_of_a_measured_sweep(recipe):
    claim = read(recipe)["expected"]
    for found in claim["arms"]:
        errors = [100 * wrong / claim["n"] for wrong in found["wrong"]]
        interval = stats.student_interval(errors)
        row = f"{statistics.mean(errors):.2f} % ({interval.low:.2f} to {interval.high:.2f}) | {found['passes']:,} |"
        assert row in PAGE


@pytest.mark.parametrize("recipe", RUN, ids=lambda path: str(path.relative_to(FOLDER)))
def test_the_cost_that_a_recipe_states_is_that_of_its_settings(recipe):
    claim = read(recipe)["expected"]
    for flags in cells(recipe):
        settings = loading.load(recipe, flags)
        stated = claim["passes"] if isinstance(claim["passes"], int) else of_cell(claim["passes"], settings.variant)
        assert stated in (round(passes(settings)), [round(passes(settings))])
    if recipe in QUICK:
        assert f"an hour at {claim['passes'] * settings.batch_size / 3600:.0f} images/s" in recipe.read_text()


@each
def test_every_recipe_has_a_row_on_the_page_with_its_figures(recipe):
    name, claim = str(recipe.relative_to(FOLDER)), read(recipe)["expected"]
    row = next(line for line in PAGE.splitlines() if f"]({name})" in line)
    if claim["measured"] and recipe not in SWEPT:
        assert f"{claim['top1_error']:.2f} %" in row
        assert f"{claim['wrong']} of {claim['n']}" in row
    if recipe in PAPER:
        figures = claim["paper"]
        assert f"{figures['top1_error']:.2f} ± {figures['ci95']:.2f}" in row
        assert f"{figures['no_sam']:.2f} ± {figures['no_sam_ci95']:.2f}" in row


def test_the_page_links_to_nothing_that_is_not_there():
    for link in re.findall(r"\]\(([^)]+)\)", PAGE):
        assert link.startswith("https://") or (FOLDER / link).exists(), link


def test_each_data_set_of_table_3_has_a_recipe_for_each_model():
    assert {recipe.stem for recipe in PAPER} == {f"{model}-{data}" for model in ("b7", "l2") for data in TABLE_3}


@each_of_the_paper
def test_the_papers_figures_are_those_of_its_table(recipe):
    model, _, data = recipe.stem.partition("-")
    (b7, b7_interval), untuned, b7_without, (l2, l2_interval), l2_without = TABLE_3[data]
    if model == "b7":
        expected = {"top1_error": b7, "ci95": b7_interval, "rho_0_05": untuned}
    else:
        expected = {"top1_error": l2, "ci95": l2_interval}
    without, interval = b7_without if model == "b7" else l2_without
    assert loading.load(recipe).dataset == data
    assert read(recipe)["expected"]["paper"] == expected | {"no_sam": without, "no_sam_ci95": interval}


@each_of_the_paper
def test_the_papers_settings_are_those_of_its_appendix_and_code(recipe):
    settings = loading.load(recipe)
    model, _, data = recipe.stem.partition("-")
    cifar = data.startswith("cifar")
    batch, lr, steps = {"b7": (1024, 0.016, 5000), "l2": (512, 0.008, 10000)}[model]
    expected = {
        **{"model": f"efficientnet_{model}", "global_batch_size": batch, "lr": lr, "m": "device"},
        **{"opt": "sgd", "momentum": 0.9, "weight_decay": 1e-5, "l2_in_loss": True, "clip_grad": 5, "smoothing": 0},
        **{"head_lr_factor": 1, "freeze_bn": True, "drop": 0.5, "drop_path": 0.2, "model_ema": False, "rho": 0.05},
        **({"crop": "pad", "aa": "cifar10"} if cifar else {"crop": "resized", "scale": 0.08, "aa": "none"}),
        "train_split": "train+validation" if data in ("flowers102", "aircraft") else None,
    }
    assert {key: getattr(settings, key) for key in expected} == expected
    assert settings.epochs.steps(1) == steps
    assert settings.warmup_epochs.steps(1) == 0
    assert batch * steps == 1024 * 5000  # images of a run


@each_of_the_paper
def test_any_number_of_devices_computes_the_papers_batch_with_its_perturbations(recipe):
    settings = loading.load(recipe)
    cores, m = {"b7": (64, 16), "l2": (128, 4)}[recipe.stem[:2]]
    for devices in (1, 2, 4, 8, 16, cores):
        batch = BatchPlan.of(settings, devices, 10_000)
        assert (batch.total, batch.sharing(settings.m)) == (cores * m, m)
        assert batch.parts * devices == cores


@pytest.mark.parametrize("table", TABLES)
def test_the_figures_of_every_cell_are_those_of_its_table_and_stand_on_the_page(table):
    recipe = FOLDER / "paper" / f"{table}.toml"
    section = next(part for part in re.split("^##+ ", PAGE, flags=re.M) if f"](paper/{table}.toml)" in part)
    figures = {}
    for row, errors in TABLES[table].items():
        assert f"| `{row}` | {' | '.join(errors.split())} |".replace("/", " / ") in section
        own = [cell for each in cells(recipe) if (cell := each["variant"]).split()[0] == row]
        for cell, error in zip(own, errors.split(), strict=True):
            with_sam, _, without = error.partition("/")
            name = "top1_accuracy" if table == "table4" else "top1_error"
            figures[cell] = {name: float(with_sam)} | ({"no_sam": float(without)} if without else {})
    assert read(recipe)["expected"]["paper"] == figures


FROM_SCRATCH = [path for path in RECIPES if loading.variants(path).axes]
each_from_scratch = pytest.mark.parametrize("recipe", FROM_SCRATCH, ids=lambda path: f"{path.parent.name}-{path.stem}")


def test_no_miniature_has_a_published_figure_beside_it():
    miniatures = [path for path in FROM_SCRATCH if path.parent.name == "mini"]
    assert {path.stem for path in miniatures} <= {*TABLES, "figure3"}
    for recipe in miniatures:
        assert recipe.read_text().startswith(f"# A miniature of {recipe.stem}: ")
        assert "paper" not in read(recipe)["expected"]


@pytest.mark.parametrize(
    ("table", "cell", "expected"),
    [
        ("table1", "wrn28_10 cifar10", ("200 epochs", 0.1, 5e-4, 0.05)),
        ("table1", "wrn28_10 cifar100", ("200 epochs", 0.1, 5e-4, 0.1)),
        ("table1", "wrn28_10_1800 cifar10", ("1800 epochs", 0.05, 1e-3, 0.05)),
        ("table1", "wrn28_10_1800 cifar100", ("1800 epochs", 0.05, 1e-3, 0.1)),
        ("table1", "shake26_2x96d cifar10", ("1800 epochs", 0.02, 1e-3, 0.02)),
        ("table1", "shake26_2x96d cifar100", ("1800 epochs", 0.02, 1e-3, 0.05)),
        ("table1", "pyramidnet272_a200 cifar10", ("1800 epochs", 0.05, 5e-4, 0.05)),
        ("table1", "pyramidnet272_a200 cifar100", ("1800 epochs", 0.05, 5e-4, 0.2)),
        ("table1", "pyramidnet272_a200_shakedrop cifar10", ("1800 epochs", 0.02, 5e-4, 0.05)),
        ("table1", "pyramidnet272_a200_shakedrop cifar100", ("1800 epochs", 0.05, 5e-4, 0.05)),
        ("table2", "resnet152 epochs400", ("400 epochs", 1.0, 1e-4, 0.05)),
        ("table4", "sgd noise40", ("200 epochs", 0.1, 5e-4, 0)),
        ("table4", "sam noise60", ("200 epochs", 0.1, 5e-4, 0.1)),
        ("table4", "bootstrap-sam noise80", ("200 epochs", 0.1, 5e-4, 0.05)),
        ("table5", "wrn28_10 svhn", ("160 epochs", 0.01, 5e-4, 0.01)),
        ("table5", "shake26_2x96d svhn", ("160 epochs", 0.01, 5e-4, 0.01)),
        ("table5", "wrn28_10 fashion_mnist", ("200 epochs", 0.1, 5e-4, 0.05)),
        ("table5", "shake26_2x96d fashion_mnist", ("200 epochs", 0.1, 5e-4, 0.02)),
    ],
)
def test_the_settings_of_a_cell_are_those_of_the_papers_code(table, cell, expected):
    settings = loading.load(FOLDER / "paper" / f"{table}.toml", {"variant": cell})
    assert (str(settings.epochs), settings.lr, settings.weight_decay, settings.rho) == expected


@each_from_scratch
def test_every_cell_trains_from_scratch_as_the_papers_code_does(recipe):
    of_paper = recipe.parent.name == "paper"
    for flags in cells(recipe):
        settings = loading.load(recipe, flags)
        expected = {
            **{"pretrained": False, "freeze_bn": False, "opt": "sgd", "momentum": 0.9, "clip_grad": 5, "drop": 0},
            **{"head_lr_factor": 1, "smoothing": 0.1 if recipe.stem == "table2" else 0},
            **({"l2_in_loss": True} if of_paper else {}),
        }
        assert {key: getattr(settings, key) for key in expected} == expected
        assert settings.warmup_epochs.amount == (0 if of_paper else 5)
        batch = (
            {"table2": 4096, "table4": 128}.get(recipe.stem, 256)
            if of_paper
            else 64
            if recipe.stem == "figure3"
            else 32
        )
        assert (settings.global_batch_size or settings.batch_size) == batch


@cache
def as_read(recipe: Path, key: str, values: tuple) -> list:
    """These values of a setting, as a run of the recipe has them."""
    return [getattr(loading.load(recipe, {key: value}), key) for value in values]


@pytest.mark.parametrize(
    "recipe",
    [path for path in RECIPES if any(loading.sweep_table(path, flags.get("variant")) for flags in cells(path))],
    ids=lambda path: str(path.relative_to(FOLDER)),
)
def test_a_sweep_varies_settings_that_exist_within_their_range(recipe):
    for flags in cells(recipe):
        sweep = loading.sweep_table(recipe, flags.get("variant"))
        assert sweep.keys() <= {"seeds", "selection_seeds", "refit", "budgets", "arms", "grid"} | ARMS
        assert len(set(sweep["arms"])) == len(sweep["arms"])
        assert set(sweep["arms"]) <= ARMS
        assert sweep.keys() & ARMS <= set(sweep["arms"])
        of_run = loading.load(recipe, flags)
        for grid in (sweep["grid"], *(sweep[arm] for arm in sweep.keys() & ARMS)):
            for key, values in grid.items():
                tried = as_read(recipe, key, tuple(values))
                is_given = of_run.origins[key].startswith("recipe")
                is_used = any(map(arms.has_sam, sweep["arms"])) or RunConfig.metadata(key)["panel"] != "SAM"
                assert not (is_given and is_used) or getattr(of_run, key) in tried


@pytest.mark.parametrize("recipe", [FOLDER / "paper" / "table4.toml", FOLDER / "mini" / "table4.toml"], ids=str)
def test_each_arm_of_label_noise_is_searched_at_as_many_rates_and_never_refits_on_clean_labels(recipe):
    searched = set()
    for flags in cells(recipe):
        asked = load(recipe, flags)
        assert not asked.table.refit
        assert (asked.base.rho > 0) == ("sam" in asked.table.arms)
        (arm,) = (arm for arm in asked.table.arms if arm in ("sam", "sgd"))
        points = arms.points(asked, arm)
        assert {point["mixup"] for point in points if "mixup" in point} >= ({1, 8, 32} if asked.base.mixup else set())
        searched.add(len({(point["lr"], point.get("weight_decay")) for point in points}))
    assert len(searched) == 1


def test_the_recipes_that_show_what_sam_gains_have_a_sweep():
    for recipe in (*PAPER, *QUICK):
        sweep = read(recipe)["sweep"]
        assert sweep["seeds"] == (5 if recipe in PAPER else 3)
        assert sweep["arms"][1:] == ["sgd", "sgd-2x"]
    assert {tuple(read(recipe)["sweep"]["grid"]["rho"]) for recipe in PAPER} == {(0.01, 0.02, 0.05, 0.1, 0.2, 0.5)}


@pytest.fixture(scope="session")
def small_data(tmp_path_factory):
    """A folder of pictures with the splits of a data set, made once for each set of splits."""
    made: dict[tuple[str, ...], Path] = {}

    def folder(dataset: str) -> Path:
        splits = tuple(CATALOG[dataset].splits) or ("train", "test")
        if splits not in made:
            counts = {split: 10 if split == "train" else 3 for split in splits}
            made[splits] = write_image_folder(tmp_path_factory.mktemp("data"), counts)
        return made[splits]

    return folder


@each
def test_every_recipe_runs_in_miniature(recipe, tmp_path, small_data):
    """Two steps of a small network that starts at random, on small pictures, on the CPU; the rest is the recipe's.

    A batch for many devices is computed by one, in as many parts as there are images for.
    """
    chosen = {"variant": RUN_CELLS[recipe.stem]} if recipe in FROM_SCRATCH and recipe.stem in RUN_CELLS else {}
    meant = loading.load(recipe, chosen)
    small = {
        **{"model": "test_efficientnet", "pretrained": False, "img_size": 32, "epochs": "2 steps"},
        **{"dataset": str(small_data(meant.dataset)), "processes": 1, "workers": 0},
    }
    report = api.run(recipe, output=tmp_path / "run", **chosen, **small)
    ran = loading.load(tmp_path / "run" / "config.toml")
    kept = {key for key in RunConfig.model_fields if meant.origins[key].startswith("recipe")} - small.keys()
    assert {key: getattr(ran, key) for key in kept} == {key: getattr(meant, key) for key in kept}
    assert ran.variant == meant.variant
    two_steps = passes(meant.model_copy(update={"epochs": Duration(2, "steps"), "max_train": 10**6}))
    assert report["cost"]["forward_backward_passes"] == pytest.approx(two_steps)
    assert (report["test"] is None) == (meant.dataset == "birdsnap")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_batch_scripts_are_shell_without_errors(script):
    subprocess.run(["bash", "-n", script], check=True)
