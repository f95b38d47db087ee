"""`samtune sweep`: what is compared, by which runs, and what is chosen."""

import itertools
import json
import random
import tomllib

import pytest

from samtune.config import loading
from samtune.config.duration import Duration
from samtune.distributed import device
from samtune.errors import CheckpointError, DataError, ModelError, UsageError
from samtune.sam.gradient import sam_passes
from samtune.sweep import arms, decode_once, executors, ledger, spec
from samtune.sweep.budget import Budget, steps_within
from samtune.sweep.ledger import Outcome
from samtune.sweep.plan import Plan, seconds_per_step
from samtune.sweep.run import check, check_names, open_folder
from samtune.train.batch_plan import BatchPlan
from samtune.train.schedule import TrainingLength
from tests.conftest import samtune, write_image_folder
from tests.support.small_sweep import attempts, sweep, write_recipe


def load(tmp_path, table="", base="", flags=None, **more):
    path = tmp_path / "recipe.toml"
    path.write_text(f'model = "test_resnet"\ndataset = "cifar10"\n{base}\n[sweep]\n{table}\n')
    return spec.load(path, flags or {}, **more)


# ------------------------------------------------------------------------------------------------------------ the table


def test_a_recipe_without_a_table_is_the_papers_protocol(tmp_path):
    asked = load(tmp_path)
    assert (asked.table.seeds, asked.table.selection_seeds) == ([0, 1, 2, 3, 4], [0])
    assert arms.arms(asked) == ["sam", "sam-late", "sgd", "sgd-2x"]
    assert arms.points(asked, "sam") == [{"rho": rho} for rho in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)]
    late = arms.points(asked, "sam-late")
    assert len(late) == 18
    assert late[:3] == [{"rho": 0.01, "sam_start": start} for start in ("50%", "70%", "90%")]
    assert arms.points(asked, "sgd") == arms.points(asked, "sgd-2x") == [{}]


@pytest.mark.parametrize("place", ["base", "grid"])
def test_a_batch_that_each_run_would_find_for_itself_is_refused(tmp_path, place):
    base = 'batch_size = "auto"' if place == "base" else ""
    asked = load(tmp_path, "" if base else '[sweep.grid]\nbatch_size = ["auto", 8]', base)
    with pytest.raises(UsageError, match="batch_size = auto"):
        asked.config(arms.points(asked, "sam")[0])


@pytest.mark.parametrize(
    ("arm", "expected"),
    [
        ("sam", [{"rho": 0.3, "lr": 0.1}, {"rho": 0.3, "lr": 0.2}]),
        ("sam-late", [{"rho": rho, "lr": lr, "sam_start": 5} for rho in (0.1, 0.2) for lr in (0.1, 0.2)]),
        ("sgd", [{"lr": 0.5}]),
        ("sgd-2x", [{"lr": 0.1}, {"lr": 0.2}]),
    ],
)
def test_settings_of_sam_are_for_its_arms_and_a_grid_of_one_arm_goes_before(tmp_path, arm, expected):
    table = "[sweep.grid]\nrho = [0.1, 0.2]\nlr = [0.1, 0.2]\n[sweep.sam]\nrho = [0.3]\n[sweep.sam-late]\n"
    asked = load(tmp_path, table + "sam_start = [5]\n[sweep.sgd]\nlr = [0.5]")
    assert arms.points(asked, arm) == expected


def test_a_schedule_of_sam_may_be_a_grid_or_that_of_the_recipe(tmp_path):
    grid = '[sweep.grid]\nrho = [0.1]\nsam_schedule = ["late 25%", "every 2"]\n'
    asked = load(tmp_path, grid, 'sam_schedule = "early 50%"')
    late, often = (asked.config(arms.settings(asked, "sam", point)) for point in arms.points(asked, "sam"))
    assert (str(late.sam_start), str(late.sam_end), often.sam_every) == ("75%", "100%", 2)
    assert arms.points(asked, "sgd") == [{}]
    assert arms.points(load(tmp_path, grid), "sam-late") == arms.points(asked, "sam")  # without starts of its own
    flagged = load(tmp_path, flags={"sam_schedule": "late 10%"})
    (late,) = {
        flagged.config(arms.settings(flagged, "sam-late", p)).sam_start for p in arms.points(flagged, "sam-late")
    }
    assert str(late) == "90%"
    asked = load(tmp_path, "[sweep.grid]\nrho = [0.1]\n", 'sam_schedule = "early 50%"')
    assert 'sam_end = "50%"' in asked.to_toml().replace("  ", "")
    copy = tmp_path / "copy.toml"
    copy.write_text(asked.to_toml())
    again = spec.load(copy, {})
    assert str(again.base.sam_end) == "50%"
    assert str(asked.config(arms.settings(asked, "sam", arms.points(asked, "sam")[0])).sam_end) == "50%"


@pytest.mark.parametrize(
    ("arm", "point", "base", "settings"),
    [
        ("sam", {"rho": 0.1}, "", {"rho": 0.1}),
        ("sgd", {"lr": 0.1}, "", {"lr": 0.1, "rho": 0.0}),
        ("sgd-2x", {}, "epochs = 8", {"rho": 0.0, "epochs": "16 epochs"}),
        ("sgd-2x", {}, 'epochs = "500 steps"', {"rho": 0.0, "epochs": "1000 steps"}),
        ("sgd-2x", {"epochs": 3}, "", {"rho": 0.0, "epochs": "6 epochs"}),
    ],
)
def test_an_arm_is_a_few_settings(tmp_path, arm, point, base, settings):
    assert arms.settings(load(tmp_path, base=base), arm, point) == settings


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ("seed = 3", "did you mean seeds"),
        ("seeds = 0", "whole numbers"),
        ('seeds = "5"', "whole numbers"),
        ("seeds = [1, 1]", "different"),
        ("seeds = [-1]", "whole numbers"),
        ('arms = ["adam"]', "some of sam, sam-late"),
        ("arms = []", "some of sam, sam-late"),
        ('budgets = "20 passes"', "a list"),
        ('budgets = ["20 minutes"]', "2000 passes"),
        ('budgets = ["0 passes"]', "2000 passes"),
        ("[sweep.grid]\nrhoo = [0.1]", "did you mean rho"),
        ("[sweep.grid]\nrho = 0.1", "a list of values"),
        ("[sweep.grid]\nrho = []", "a list of values"),
        ("[sweep.grid]\nrho = [0.1, 0.1]", "twice"),
        ("[sweep.grid]\nseed = [1]", "seeds are a sweep's own"),
        ('[sweep.grid]\nval_split = ["dev"]', "different images"),
        ("[sweep.adam]\nlr = [1]", "unknown key adam"),
        ("grid = 3", "a table"),
    ],
)
def test_a_table_that_cannot_be_meant_is_refused_with_the_rule(tmp_path, table, said):
    with pytest.raises(UsageError) as error:
        load(tmp_path, table)
    assert said in str(error.value)
    assert "recipe.toml" in error.value.message


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ("[sweep.grid]\nrho = [0.05, -0.1]", "greater than or equal to 0"),
        ("[sweep.grid]\nrho = [0, 0.1]", "without a radius is SGD"),
        ("[sweep.sgd]\nrho = [0.1]", "arm sgd has no SAM"),
        ('budgets = ["20 passes"]\n[sweep.grid]\nepochs = [1, 2]', "the budget decides"),
        ('budgets = ["1 passes"]', "does not pay for one step of arm sam"),
        ('[sweep.sam-late]\nsam_start = ["100%"]', "leave SAM no step"),
        ("[sweep.grid]\nm = [32]", "--m 32 is more than --batch-size 16"),
    ],
)
def test_every_point_is_checked_before_the_first_run(tmp_path, table, said):
    with pytest.raises(UsageError) as error:
        check(Plan(load(tmp_path, table), lambda settings: 1000))
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("table", "error"),
    [
        ('[sweep.sgd]\nmodel = ["test_resnet", "test_resnett"]', ModelError),
        ('[sweep.grid]\nweights = ["nowhere.pth"]', CheckpointError),
        ('[sweep.grid]\ntrain_labels = ["nowhere.csv"]', DataError),
    ],
)
def test_what_a_point_names_must_be_there(tmp_path, table, error):
    asked = load(tmp_path, table)
    with pytest.raises(error):
        check_names(asked, check(Plan(asked, lambda settings: 1000)))


@pytest.mark.parametrize("base", ["processes = 2", 'nnodes = 2\nrdzv_endpoint = "a:1"', "shard = true"])
def test_a_run_of_a_sweep_is_on_one_device(tmp_path, base):
    with pytest.raises(UsageError, match="one device"):
        load(tmp_path, base=base)


@pytest.mark.parametrize(
    ("table", "flags", "arm", "expected"),
    [
        ("", {"rho": 0.3}, "sam", [{"rho": 0.3}]),
        ("", {"rho": 0.3, "sam_start": "60%"}, "sam-late", [{"rho": 0.3, "sam_start": "60%"}]),
        ("grid.lr = [0.1, 0.2]\nsgd.lr = [0.5, 0.6]", {"lr": 0.4}, "sgd", [{"lr": 0.4}]),
        ("grid.rho = [0.1, 0.2]", {"lr": 0.4}, "sam", [{"rho": 0.1}, {"rho": 0.2}]),
    ],
)
def test_a_flag_takes_the_place_of_a_grid(tmp_path, table, flags, arm, expected):
    load(tmp_path, table)
    assert arms.points(spec.load(tmp_path / "recipe.toml", flags), arm) == expected


def test_flags_take_the_place_of_budgets_and_seeds(tmp_path):
    asked = load(tmp_path, 'seeds = 5\nbudgets = ["3 passes"]', budgets=["20 passes", "1.5 seconds"], seeds="3,7")
    assert asked.table.seeds == [3, 7]
    assert [str(budget) for budget in asked.table.budgets] == ["20 passes", "1.5 seconds"]
    assert load(tmp_path, seeds="2").table.seeds == [0, 1]
    with pytest.raises(UsageError, match="flag --seeds"):
        load(tmp_path, seeds="few")


def test_the_folders_recipe_repeats_the_sweep(tmp_path):
    table = 'seeds = 2\nrefit = false\nbudgets = ["9 passes"]\n[sweep.grid]\nrho = [0.1]\np = ["inf", 2]\n'
    table += "[sweep.sam-late]\nsam_start = [2]"
    asked = load(tmp_path, table, 'global_batch_size = 64\nseed = 3\ntest = false\ngpus = "all"')
    (tmp_path / "sweep.toml").write_text(asked.to_toml())
    again = spec.load(tmp_path / "sweep.toml", {})
    assert again.table == asked.table
    own = dict.fromkeys(spec.OWN)
    assert again.base.model_dump() | own == asked.base.model_dump() | own
    assert again.to_toml().replace("sweep.toml", "recipe.toml") == asked.to_toml()
    assert BatchPlan.of(again.base, 1, 1000) == BatchPlan.of(asked.base, 1, 1000)  # it asks what was given


def test_a_run_ignores_the_table(tmp_path):
    assert load(tmp_path, "seeds = 3").base == loading.load(tmp_path / "recipe.toml")


def test_what_differs_between_two_recipes_is_said_by_key():
    before = {"rho": 0.1, "sweep": {"seeds": [0], "arms": ["sam"]}}
    now = {"lr": 1, "sweep": {"seeds": [1], "arms": ["sam"]}}
    assert spec.differences(before, now) == [
        "lr: not given before, 1 now",
        "rho: 0.1 before, not given now",
        "sweep.seeds: [0] before, [1] now",
    ]


# ------------------------------------------------------------------------------------------------------ length and cost


def cost(settings, rows, plain, sam):
    """Step by step, as a run counts it."""
    length = TrainingLength.of(settings, BatchPlan.of(settings, 1, rows), rows)
    return sum(sam if length.rho(step) > 0 else plain for step in range(length.total_steps))


@pytest.mark.parametrize("case", range(60))
def test_the_number_of_steps_is_the_largest_that_the_budget_pays_for(case):
    draw = random.Random(case)
    given = {
        "sam_start": draw.choice(["0%", "33%", "50%", "90%", "7 steps", 1]),
        "sam_every": draw.choice([1, 1, 2, 5]),
        "ascent_fraction": draw.choice([1.0, 0.3]),
        "ascent_steps": draw.choice([1, 3]),
    }
    given["sam_end"] = draw.choice(["100%", "95%", "20 steps"]) if given["sam_start"] in ("0%", "7 steps") else "100%"
    settings = loading.load(None, {"model": "a", "dataset": "cifar10", "batch_size": 8} | given)
    sam = sam_passes(settings.ascent_steps, settings.ascent_fraction)
    plain = 1.0
    if draw.random() < 0.5:  # seconds
        plain, sam = draw.uniform(0.1, 0.2), draw.uniform(0.1, 0.5)
    budget = Budget(draw.uniform(50, 200) * plain, "passes")
    rows = 80

    def of(steps):
        return settings.model_copy(update={"epochs": Duration(steps, "steps")})

    found = steps_within(
        budget, plain, sam, lambda n: len(TrainingLength.of(of(n), BatchPlan.of(of(n), 1, rows), rows).rho.sam_steps)
    )
    affordable = [n for n in range(20, 260) if cost(of(n), rows, plain, sam) <= budget.amount + 1e-6]
    assert found == max(affordable)


def test_every_arm_gets_the_same_cost_and_sgd_twice_as_long_is_left_out(tmp_path):
    grids = '[sweep.grid]\nrho = [0.1]\n[sweep.sam-late]\nsam_start=["60%"]'
    asked = load(tmp_path, 'seeds = 1\nbudgets = ["200 passes"]\n' + grids)
    runs = check(Plan(asked, lambda settings: 1000))
    costs = {run.arm: (run.steps, run.passes) for run in runs}
    assert costs == {"sam": (100, 200), "sam-late": (143, 200), "sgd": (200, 200)}
    assert [run.id for run in runs] == [f"b200p-final-{arm}-seed0" for arm in ("sam", "sam-late", "sgd")]
    assert runs[0].settings["epochs"] == "100 steps"
    assert any("sgd-2x" in note for note in arms.notes(asked))


def test_points_whose_steps_take_the_same_time_share_a_probe(tmp_path):
    table = 'arms = ["sam", "sgd"]\nbudgets = ["9 seconds"]\n[sweep.grid]\nrho = [0.1, 0.2]\nlr = [1, 2]\nm = [4, 8]'
    plan = Plan(load(tmp_path, table), lambda settings: 1000)
    names = ("plain-m4", "sam-m4", "plain-m8", "sam-m8", "plain")
    assert [run.id for run in plan.probes()] == [f"probe-{name}" for name in names]
    assert [run.settings["rho"] > 0 for run in plan.probes()] == [False, True, False, True, False]
    paces = {"probe-plain-m4": 0.1, "probe-plain-m8": 0.1, "probe-plain": 0.1, "probe-sam-m4": 0.3, "probe-sam-m8": 0.2}
    budget = plan.sweep.table.budgets[0]
    steps = {run.point["m"]: run.steps for runs in plan.selections(budget, "sam", paces) for run in runs}
    assert steps == {4: 30, 8: 45}
    assert plan.selections(budget, "sgd", paces)[0][0].steps == 90


@pytest.mark.parametrize(
    ("more", "steps"),
    [
        ("", [80, 40]),
        ("ascent_fraction = 0.25", [80, 64]),
        ("ascent_steps = 9", [80, 20]),
        ('ascent = "random"', [80, 60]),
        ('ascent = "momentum"', [80, 80]),
    ],  # 20 at least
)
def test_probes_side_by_side_cost_the_same_so_that_both_share_the_machine_to_the_end(tmp_path, more, steps):
    plan = Plan(load(tmp_path, 'budgets = ["9 seconds"]', more), lambda settings: 1000)
    assert [run.steps for run in plan.probes()] == steps


def test_a_probe_is_measured_without_its_first_steps(tmp_path):
    rows = [(10, 10, 1.0), (15, 5, 16.0), (25, 10, 8.0)]  # step, steps since the row before, images per second
    with (tmp_path / "metrics.jsonl").open("w") as file:
        for step, steps, speed in rows:
            row = {"step": step, "epoch": 1, "split": "train", "seconds": 0, "n": 8 * steps, "steps": steps}
            file.write(json.dumps(row | {"images_per_second": speed}) + "\n")
            file.write(json.dumps({"step": step, "epoch": 1, "split": "val", "seconds": 0}) + "\n")
    assert seconds_per_step(tmp_path) == (5 * 0.5 + 10 * 1.0) / 15


@pytest.mark.slow
def test_a_budget_in_seconds_becomes_steps_by_what_the_probes_took(photos, tmp_path):
    path = write_recipe(tmp_path / "r.toml", photos, grid="rho = [0.05]", more='budgets = ["3 seconds"]')
    assert sweep(path, tmp_path / "s").returncode == 0
    plain, sam = (seconds_per_step(tmp_path / "s" / "runs" / f"probe-{kind}") for kind in ("plain", "sam"))
    found = ledger.read(tmp_path / "s")
    assert [arm["budget"] for arm in found["arms"]] == ["3 seconds"] * 2
    assert [arm["final"][0]["report"]["steps"] for arm in found["arms"]] == [int(3 / sam), int(3 / plain)]
    assert [run["id"] for run in found["probes"]] == ["probe-plain", "probe-sam"]
    before = attempts(tmp_path / "s")
    assert sweep(path, tmp_path / "s").returncode == 0
    assert attempts(tmp_path / "s") == before


@pytest.mark.parametrize(("more", "validates"), [("", False), ("\nrefit = false", True)])
def test_the_stages_differ_in_what_they_train_on_and_score(tmp_path, more, validates):
    table = 'seeds = 2\nselection_seeds = [4, 5]\narms = ["sam"]' + more
    plan = Plan(load(tmp_path, table, 'select = "best"'), lambda settings: 1000)
    tried = list(itertools.chain(*plan.selections(None, "sam", {})))
    assert len(tried) == 12
    assert {run.seed for run in tried} == {4, 5}
    assert all(run.settings["val"] and not run.settings["test"] for run in tried)
    assert tried[0].id == "select-sam-rho0.01-seed4"
    last = plan.finals(None, "sam", {"rho": 0.1}, {})
    assert [run.settings for run in last] == [
        {"rho": 0.1, "val": validates, "test": True, "select": "last", "seed": seed, "html": False} for seed in (0, 1)
    ]


def test_averaged_weights_are_chosen_by_and_scored_at_the_end(tmp_path):
    """They are not chosen on validation, unlike the best checkpoint."""
    selected = 'select = "average"\naverage_tail = "25%"'
    plan = Plan(load(tmp_path, 'seeds = 1\narms = ["sam"]', selected), lambda settings: 1000)
    runs = [*itertools.chain(*plan.selections(None, "sam", {})), *plan.finals(None, "sam", {"rho": 0.1}, {})]
    assert {plan.sweep.config(run.settings).select for run in runs} == {"average"}
    assert len({run.stage for run in runs}) == 2


def test_names_of_points_are_readable_and_apart():
    assert arms.names([{"rho": 0.1, "sam_start": "50%"}]) == ["rho0.1-sam_start50pc"]
    assert arms.names([{"perturb": "a|b"}, {"perturb": "ab"}]) == ["point1", "point2"]
    assert arms.names([{"perturb": "x" * 80}]) == ["point1"]


# ----------------------------------------------------------------------------------------------------------- the choice


def scored(error, loss=1.0):
    return Outcome("done", 0, report={"val": {"top1_error": error, "loss": loss}})


@pytest.mark.parametrize(
    ("points", "best"),
    [
        ([[scored(3)], [scored(2)], [scored(2.5)]], 1),
        ([[scored(2, 1.5)], [scored(2, 1.4)], [scored(2, 1.6)]], 1),
        ([[scored(2)], [scored(2)]], 0),
        ([[scored(1), scored(5)], [scored(2), scored(3)]], 1),
        ([[scored(5)], [Outcome("failed", 7)]], 0),
        ([[scored(1), Outcome("failed", 7)], [scored(2), scored(2)]], 1),
        ([[scored(1)], [Outcome("running")]], None),
        ([[scored(1)], [Outcome("failed", 6)]], None),
        ([[scored(1)], [Outcome("waiting")]], None),
        ([[Outcome("failed", 7)]], None),
    ],
)
def test_the_point_with_the_lowest_mean_error_then_loss_then_the_first_is_chosen(points, best):
    assert ledger.choose([dict(enumerate(point)) for point in points]) == best


# ---------------------------------------------------------------------------------------------------- states and places


@pytest.mark.parametrize(
    ("status", "exit_code", "state", "why"),
    [
        (None, None, "waiting", ""),
        ({"state": "running"}, None, "stopped", ""),
        ({"state": "running"}, -9, "failed", "ended by SIGKILL: the system does so when memory runs out"),
        ({"state": "stopped"}, 75, "stopped", ""),
        ({"state": "failed", "exit_code": 7, "error": {"what": "step 3: loss nan"}}, 7, "failed", "step 3: loss nan"),
        ({"state": "failed", "exit_code": 6, "error": {"what": "of another time"}}, 4, "failed", "no such model"),
        (None, 4, "failed", "no such model"),
    ],
)
def test_the_state_of_a_run_is_told_by_its_folders(tmp_path, status, exit_code, state, why):
    log = ledger.log_folder(tmp_path, "r")
    log.mkdir(parents=True)
    (log / "output.txt").write_text("reading ...\nerror: no such model\n  hint:  choose another\n")
    if status is not None:
        ledger.run_folder(tmp_path, "r").mkdir(parents=True)
        (ledger.run_folder(tmp_path, "r") / "status.json").write_text(json.dumps(status))
    if exit_code is not None:
        ledger.write_exit_code(tmp_path, "r", exit_code)
    found = ledger.outcome(tmp_path, "r")
    assert found.state == state
    assert state != "failed" or found.exit_code == exit_code
    assert why in found.cause


@pytest.mark.parametrize(
    ("gpus", "visible", "jobs", "places"),
    [
        ("all", None, 1, ["0", "1", "2"]),
        ("0,2", None, 1, ["0", "2"]),
        ("all", "4,5,6", 1, ["4", "5", "6"]),
        ("1", None, 2, ["0", "0"]),
    ],
)
def test_each_gpu_has_a_run_of_its_own(gpus, visible, jobs, places, monkeypatch):
    monkeypatch.setattr(device.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(device.torch.cuda, "device_count", lambda: 3)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    settings = loading.load(None, {"model": "a", "dataset": "cifar10", "gpus": gpus})
    assert executors.local_slots(settings, jobs) == [{"CUDA_VISIBLE_DEVICES": name} for name in places]


def test_runs_at_a_time_on_a_cpu_share_its_cores(monkeypatch):
    monkeypatch.setattr(device, "available_cpus", lambda: 9)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    settings = loading.load(None, {"model": "a", "dataset": "cifar10", "gpus": "0"})
    assert executors.local_slots(settings, 4) == [{"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "2"}] * 4
    assert executors.local_slots(settings, 1) == [{"CUDA_VISIBLE_DEVICES": ""}]  # as a run by itself
    with pytest.raises(UsageError, match="this machine has 9 cores"):
        executors.local_slots(settings, 10)


# -------------------------------------------------------------------------------------------------------------- a sweep


@pytest.fixture(scope="module")
def found(whole_sweep):
    return whole_sweep, ledger.read(whole_sweep)


def test_what_is_chosen_is_the_best_on_validation(found):
    _, result = found
    sam, sgd = result["arms"]
    errors = [(point["val_error"], point["val_loss"]) for point in sam["points"]]
    assert len(errors) == 2
    best = sam["points"][errors.index(min(errors))]
    assert best["chosen"]
    assert sam["chosen"] == best["point"]
    for point in sam["points"]:
        (run,) = point["runs"]
        assert point["val_error"] == run["report"]["val"]["top1_error"]
    assert (sgd["points"], sgd["chosen"]) == ([], {})


def test_the_last_fits_have_the_chosen_settings_train_on_validation_too_and_score_test_once(found):
    folder, result = found
    for arm, rho in zip(result["arms"], (result["arms"][0]["chosen"]["rho"], 0), strict=True):
        (run,) = arm["final"]
        report = run["report"]
        assert report["sam"]["rho"] == rho
        assert (report["dataset"]["train"], report["dataset"]["val"], report["val"]) == (48, 0, None)
        assert report["test"]["n"] == 16
        rows = [json.loads(line) for line in (folder / "runs" / run["id"] / "metrics.jsonl").read_text().splitlines()]
        assert [row["split"] for row in rows if row["split"] != "train"] == ["test"]


def test_runs_that_choose_never_score_test_and_keep_no_checkpoints(found):
    folder, result = found
    tried = [run for point in result["arms"][0]["points"] for run in point["runs"]]
    for run in tried:
        assert run["report"]["test"] is None
        assert run["report"]["dataset"]["train"] < 48
        assert '"test"' not in (folder / "runs" / run["id"] / "metrics.jsonl").read_text()
        assert not (folder / "runs" / run["id"] / "checkpoints").exists()


def test_what_a_run_was_said_to_cost_is_what_it_cost(found):
    _, result = found
    runs = [run for arm in result["arms"] for run in arm["final"] + [r for p in arm["points"] for r in p["runs"]]]
    assert len(runs) == 4
    for run in runs:
        assert run["report"]["cost"]["forward_backward_passes"] == run["passes"]
        assert run["report"]["steps"] == run["steps"] == 4


def test_the_ledger_knows_all_runs_and_can_be_made_again(found, whole_sweep_recipe):
    folder, result = found
    assert result["totals"] | {"train_seconds": 0} == {"runs": 4, "done": 4, "failed": 0, "train_seconds": 0}
    assert (result["failed"], result["missing"], result["budgets"]) == ([], [], [None])
    assert result["settings"]["img_size"] == 32
    written = (folder / "ledger.json").read_text()
    before = attempts(folder)
    (folder / "ledger.json").unlink()
    report = (folder / "report.json").read_text()
    again = sweep(whole_sweep_recipe, folder, "--json")
    assert again.returncode == 0, again.stderr
    assert again.stdout == report
    assert ledger.read(folder) == result
    assert (folder / "ledger.json").read_text() == written
    assert attempts(folder) == before == dict.fromkeys(before, 1)


def test_other_settings_in_the_same_folder_are_refused_by_name(found, whole_sweep_recipe):
    folder, _ = found
    asked = spec.load(whole_sweep_recipe, {"lr": 0.02, "workers": 1}, seeds="3")  # workers change no number
    with pytest.raises(UsageError, match="holds a sweep with other settings") as error:
        open_folder(asked, folder)
    assert error.value.cause == "lr: 0.01 before, 0.02 now; sweep.seeds: [0] before, [0, 1, 2] now"
    for dry in (), ("--dry-run",):
        refused = sweep(whole_sweep_recipe, folder, "--lr", 0.02, *dry)
        assert refused.returncode == 2, refused.stdout
        assert "lr: 0.01 before, 0.02 now" in refused.stderr


def test_the_plan_can_be_seen_without_running_it(tmp_path, photos):
    path = write_recipe(tmp_path / "r.toml", photos, seeds=3)
    shown = samtune("sweep", path, "--dry-run", "--budget", "12 passes", "--json", "--output", tmp_path / "out")
    assert shown.returncode == 0, shown.stderr
    assert json.loads(shown.stdout) == [
        {"budget": "12 passes"} | row
        for row in [
            {"stage": "select", "arm": "sam", "points": 2, "runs": 2, "steps": "6", "passes": "12"},
            {"stage": "final", "arm": "sam", "points": 1, "runs": 3, "steps": "6", "passes": "12"},
            {"stage": "final", "arm": "sgd", "points": 1, "runs": 3, "steps": "12", "passes": "12"},
        ]
    ]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("--engine", "slurm"), 2, "local or ray"),
        (("--address", "here:1"), 2, "without --engine ray"),
        (("--engine", "ray", "--address", "ray://here"), 2, "host:port"),
        (("--seed", "3"), 2, "--seeds"),
        (("--budget", "1 hour"), 2, "2000 passes"),
        (("--rho", "-1"), 2, "greater than or equal to 0"),
        (("--dataset", "./nowhere"), 3, "is not there"),
        (("--output", "{data}"), 2, "the folder of the data set"),
        (("--jobs", "999"), 2, "cores"),
        (("--jobs", "999", "--dry-run"), 2, "cores"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_a_run_begins(tmp_path, photos, arguments, code, said):
    path = write_recipe(tmp_path / "r.toml", photos)
    done = samtune("sweep", path, *(a.format(data=photos) for a in arguments), cwd=tmp_path)
    assert done.returncode == code, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.glob("sweeps/*/runs/*"))


def test_a_data_set_without_test_cannot_be_swept(tmp_path):
    path = write_recipe(tmp_path / "r.toml", write_image_folder(tmp_path / "data", {"train": 6}))
    with pytest.raises(UsageError, match="no test split"):
        check(Plan(spec.load(path, {}), decode_once.count_once(decode_once.count_listed)))


def test_the_folders_recipe_is_plain_toml(found):
    folder, _ = found
    stored = tomllib.loads((folder / "sweep.toml").read_text())
    table = {"seeds": [0], "selection_seeds": [0], "arms": ["sam", "sgd"], "grid": {"rho": [0.05, 0.1]}}
    assert stored["sweep"] == table
    assert "output" not in stored
