"""The report of a sweep, from folders that are written by hand; numbers by numpy and scipy alone."""

import json
import math

import numpy as np
import pytest
from scipy import optimize, stats

from samtune.errors import CheckpointError, UsageError
from samtune.report import html
from samtune.runs.folder import read_report
from samtune.sweep import page as sweep_page
from samtune.sweep import tables
from samtune.sweep.report import build
from tests.conftest import samtune
from tests.support.run_folders import write_sweep

N = 60  # images
SAM = {0: range(6), 1: range(2, 9), 2: range(5)}  # images that are wrong, by seed: 6, 7 and 5
SGD = {0: range(4, 14), 1: range(9), 2: range(8)}  # 10, 9 and 8
TWICE = {0: range(9), 1: range(9), 2: range(6)}
GRID = {0.05: 4, 0.1: 6}  # how many validation images are wrong
RECIPE = 'seeds = 3\narms = ["sam", "sgd", "sgd-2x"]\n[sweep.grid]\nrho = [0.05, 0.1]\n'


def usual(run, final=None, grid=None):
    """What a run has wrong, by its arm and seed, or by its rho."""
    if run.stage == "select":
        wrong = (grid or GRID)[run.point["rho"]]
        return range(wrong) if isinstance(wrong, int) else wrong(run)
    return (final or {"sam": SAM, "sgd": SGD, "sgd-2x": TWICE})[run.arm][run.seed]


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """(folder, report) of a sweep that is done."""
    folder = write_sweep(tmp_path_factory.mktemp("sweep") / "s", RECIPE, usual)
    return folder, build(folder)


def collect(folder, recipe=RECIPE, wrong=usual):
    return build(write_sweep(folder / "s", recipe, wrong))


def pair_of(report, arm, baseline, budget=None):
    found = {(pair["label"], pair["baseline"], pair["budget"]): pair for pair in report["comparisons"]}
    return found[arm, baseline, budget]


def percent(wrong):
    return np.array([100 * len(images) / N for images in wrong.values()])


def test_errors_over_seeds_have_students_interval(done):
    entry = done[1]["final"][0]
    errors = percent(SAM)
    low, high = stats.t.interval(0.95, 2, errors.mean(), errors.std(ddof=1) / math.sqrt(3))
    assert (entry["arm"], entry["label"], entry["n"], entry["images"]) == ("sam", "rho 0.05", 3, N)
    assert entry["test_errors"] == pytest.approx(list(errors))
    assert [entry["mean_error"], *entry["mean_error_ci95"]] == pytest.approx([errors.mean(), low, high])


def test_arms_have_the_errors_of_both_checkpoints_where_their_runs_validate(done, tmp_path):
    folder = write_sweep(tmp_path / "s", f"refit = false\n{RECIPE}", usual)
    report = build(folder)
    for entry in report["final"]:
        stored = [read_report(folder / "runs" / run)["test_by_checkpoint"] for run in entry["runs"]]
        means = {name: np.mean([both[name]["top1_error"] for both in stored]) for name in ("last", "best")}
        assert entry["by_checkpoint"] == pytest.approx(means)
        assert entry["by_checkpoint"]["last"] == pytest.approx(entry["mean_error"])
    best = f"{report['final'][0]['by_checkpoint']['best']:.2f}"
    assert tables.arm_rows(report)[0]["best epoch %"] == best
    page = html.render("sweep.html", sweep_page.content(folder, report))
    assert 'data-path="final.0.by_checkpoint.best"' in page
    assert [entry["by_checkpoint"] for entry in done[1]["final"]] == [{}] * 3  # trained on the validation images, too
    assert "best epoch %" not in tables.arm_rows(done[1])[0]


def test_arms_are_compared_in_pairs_of_seeds(done):
    found = pair_of(done[1], "sam", "sgd")["difference"]
    differences = percent(SAM) - percent(SGD)
    low, high = stats.t.interval(0.95, 2, differences.mean(), differences.std(ddof=1) / math.sqrt(3))
    p = 2 * stats.t.sf(abs(differences.mean()) / (differences.std(ddof=1) / math.sqrt(3)), 2)
    assert (found["paired"], found["n"]) == (True, 3)
    assert [found["mean"], *found["ci95"], found["p"]] == pytest.approx([differences.mean(), low, high, p])


def test_the_error_reduction_has_the_limits_at_which_a_t_test_finds_p_of_5_percent(done):
    found = pair_of(done[1], "sam", "sgd")["error_reduction"]
    a, b = percent(SAM), percent(SGD)
    ratio = a.mean() / b.mean()

    def surplus(other):
        return stats.ttest_1samp(a - other * b, 0).pvalue - 0.05

    upper, lower = optimize.brentq(surplus, ratio, 10), optimize.brentq(surplus, -10, ratio)
    assert list(found.values())[:3] == pytest.approx([100 * (1 - x) for x in (ratio, upper, lower)])


def test_images_are_tested_seed_by_seed_and_never_added_up(done):
    found = pair_of(done[1], "sam", "sgd")["mcnemar"]
    assert [test["seed"] for test in found] == [0, 1, 2]
    for test, a, b in zip(found, SAM.values(), SGD.values(), strict=True):
        only, others = len(set(a) - set(b)), len(set(b) - set(a))
        tail = sum(math.comb(only + others, k) for k in range(min(only, others) + 1)) / 2 ** (only + others)
        assert (test["only_wrong"], test["baseline_only_wrong"]) == (only, others)
        assert test["p"] == pytest.approx(min(1, 2 * tail))
    assert any("must not be added up" in line for line in tables.markdown(done[1]).splitlines())


def test_the_better_length_of_sgd_is_named_and_that_test_chose_it(done):
    (entry,) = done[1]["baselines"]
    assert entry["arm"] == "sgd-2x"
    assert entry["mean_errors"] == pytest.approx({"sgd": percent(SGD).mean(), "sgd-2x": percent(TWICE).mean()})
    assert "the better plain arm is sgd-2x (sgd 15.00 % and sgd-2x 13.33 %)" in tables.markdown(done[1])
    assert "chosen by its error on test, which favours the baseline" in tables.markdown(done[1])
    assert "sgd-2x" in done[1]["verdict"][0]


def test_what_a_comparison_holds_equal_is_computed_from_the_runs(done):
    cost = pair_of(done[1], "sam", "sgd")["cost"]
    verdicts = {"epochs": "equal", "steps": "equal", "passes": "not equal", "seconds": "equal"}
    assert {key: both["verdict"] for key, both in cost.items()} == verdicts
    assert (cost["passes"]["run"], cost["passes"]["baseline"], cost["passes"]["ratio"]) == (40, 20, 2)
    cost = pair_of(done[1], "sam", "sgd-2x")["cost"]
    assert (cost["passes"]["verdict"], cost["epochs"]["ratio"]) == ("equal", 0.5)


def test_every_arm_is_compared_with_sgd_and_those_with_sam_with_twice_the_length(done):
    pairs = [(pair["label"], pair["baseline"]) for pair in done[1]["comparisons"]]
    assert pairs == [("sam", "sgd"), ("sam", "sgd-2x"), ("sgd-2x", "sgd")]


def test_what_was_asked_what_is_done_and_what_it_took(done):
    asked, progress, made = (done[1][key] for key in ("asked", "progress", "made_of"))
    assert (asked["seeds"], asked["selection_seeds"], asked["budgets"]) == ([0, 1, 2], [0], [None])
    assert asked["grid"] == {"grid": {"rho": [0.05, 0.1]}}
    assert (progress["runs"], progress["done"], progress["missing"], progress["failed"]) == (11, 11, [], [])
    assert progress["passes"] == 2 * 40 + 3 * (40 + 20 + 40)
    assert made["dataset"]["selection"]["val"] == made["dataset"]["final"]["test"] == N
    assert made["dataset"]["final"]["split_hash"] == "e8840c06d8a85b10"


# -------------------------------------------------------------------------------------------------------------- choice


@pytest.mark.parametrize(("second", "uncertain"), [(6, True), (9, True), (10, False)])
def test_a_choice_is_uncertain_where_the_next_best_is_within_wilsons_interval(tmp_path, second, uncertain):
    report = collect(tmp_path, wrong=lambda run: usual(run, grid={0.05: 4, 0.1: second}))
    choice = report["choices"][0]
    z, p = stats.norm.ppf(0.975), 4 / N
    centre, half = p + z**2 / (2 * N), z * math.sqrt(p * (1 - p) / N + z**2 / (4 * N**2))
    bounds = [100 * (centre + sign * half) / (1 + z**2 / N) for sign in (-1, 1)]
    assert choice["wilson_ci95"] == pytest.approx(bounds)
    assert choice["uncertain"] is uncertain is bool(100 * second / N <= bounds[1])
    assert any("too few to be sure" in warning for warning in report["warnings"]) is uncertain


def test_a_choice_over_several_seeds_has_an_interval_and_their_mean_error(tmp_path):
    recipe = RECIPE.replace("seeds = 3", "seeds = 1\nselection_seeds = 3")
    by_seed = {0.05: (4, 6, 5), 0.1: (9, 9, 9)}
    report = collect(tmp_path, recipe, lambda run: usual(run, grid={k: v[run.seed] for k, v in by_seed.items()}))
    chosen, other = report["selection"]
    errors = np.array([4, 6, 5]) * 100 / N
    low, high = stats.t.interval(0.95, 2, errors.mean(), stats.sem(errors))
    assert (chosen["chosen"], other["chosen"]) == (True, False)
    assert [chosen["mean_error"], *chosen["mean_error_ci95"]] == pytest.approx([errors.mean(), low, high])
    assert other["mean_error_ci95"] is None
    assert chosen["val_errors"] == pytest.approx(list(errors))


def test_a_rho_at_an_end_of_its_grid_is_warned_of_and_one_within_is_not(tmp_path):
    recipe = RECIPE.replace("[0.05, 0.1]", "[0.01, 0.05, 0.1]")
    for best, warned in ((0.01, "lower"), (0.05, None), (0.1, "upper")):
        grid = dict.fromkeys((0.01, 0.05, 0.1), 20) | {best: 3}
        report = collect(tmp_path / str(best), recipe, lambda run, grid=grid: usual(run, grid=grid))
        said = [warning for warning in report["warnings"] if "end of the grid" in warning]
        expected = f"sam: the chosen rho {best} is at the {warned} end of the grid; a better one may lie beyond."
        assert said == ([expected] if warned else [])


def test_of_equal_points_the_first_is_taken_and_it_is_said(tmp_path):
    report = collect(tmp_path, wrong=lambda run: usual(run, grid={0.05: 5, 0.1: 5}))
    assert (report["choices"][0]["label"], report["choices"][0]["by"]) == ("rho 0.05", "order")
    assert "the first of the grid was taken" in tables.markdown(report)


# --------------------------------------------------------------------------------------------- what cannot be concluded


def test_one_seed_has_no_interval_and_the_verdict_concludes_nothing(tmp_path):
    report = collect(tmp_path, RECIPE.replace("seeds = 3", "seeds = 1"))
    pair = pair_of(report, "sam", "sgd")
    assert (pair["difference"]["ci95"], pair["difference"]["p"]) == (None, None)
    assert len(pair["mcnemar"]) == 1
    assert report["final"][0]["no_interval"].startswith("one seed")
    assert report["verdict"][0].startswith("Whether sam differs from sgd-2x cannot be concluded")
    assert "one seed each: how much another seed would differ is not known" in tables.markdown(report)


@pytest.mark.parametrize(
    ("counts", "begins"),
    [
        ({"sam": (3, 4, 3), "sgd": (10, 11, 12)}, "SAM lowered the error: sam had 12.78 percentage points less"),
        ({"sam": (10, 11, 10), "sgd": (3, 4, 3)}, None),  # no spread of the differences: no interval
        ({"sam": (10, 11, 12), "sgd": (3, 4, 3)}, "SAM raised the error: sam had 12.78 percentage points more"),
        ({"sam": (6, 7, 5), "sgd": (5, 9, 8)}, "No difference between sam and sgd is shown: sam had"),
        ({"sam": (6, 7, 5), "sgd": (5, 6, 7)}, "No difference between sam and sgd is shown: sam had the same mean"),
    ],
)
def test_the_verdict_claims_no_more_than_the_interval_allows(tmp_path, counts, begins):
    final = {arm: [range(count) for count in by_seed] for arm, by_seed in counts.items()}
    report = collect(tmp_path, RECIPE.replace(', "sgd-2x"', ""), lambda run: usual(run, final))
    pair = pair_of(report, "sam", "sgd")["difference"]
    if begins is None:
        assert pair["ci95"] is None
        begins = "Whether sam differs from sgd cannot be concluded"
    else:
        assert (pair["ci95"][0] <= 0 <= pair["ci95"][1]) is begins.startswith("No difference")
    assert report["verdict"][0].startswith(begins)


@pytest.mark.parametrize(("twice", "doubtful"), [((7, 9, 7), True), ((12, 14, 11), False)])
def test_a_small_p_among_several_comparisons_is_put_into_proportion(tmp_path, twice, doubtful):
    sgd = {0: range(15), 1: range(17), 2: range(20)}
    final = {"sam": SAM, "sgd": sgd, "sgd-2x": [range(count) for count in twice]}
    report = collect(tmp_path, wrong=lambda run: usual(run, final))
    p = stats.ttest_1samp(np.array([6, 7, 5]) - twice, 0).pvalue  # 0.038 and 0.0029 of three tests
    assert bool(0.05 / 3 <= p < 0.05) is doubtful
    said = "That is one of 3 comparisons: for all together, p would have to be below 0.017, and is 0.038."
    assert [line for line in report["verdict"] if "for all together" in line] == ([said] if doubtful else [])
    assert report["verdict"][0].startswith("SAM lowered the error")


def test_against_the_luckier_of_two_plain_arms_sam_raises_the_error_only_where_p_is_below_half_of_5_percent(tmp_path):
    sgd, twice, sam = ([range(count) for count in counts] for counts in ((15, 17, 20), (6, 7, 5), (7, 9, 7)))
    report = collect(tmp_path, wrong=lambda run: usual(run, {"sam": sam, "sgd": sgd, "sgd-2x": twice}))
    assert pair_of(report, "sam", "sgd-2x")["difference"]["ci95"][0] > 0
    assert report["verdict"][0].startswith("No difference between sam and sgd-2x is shown")
    assert "better of 2 plain arms on test: p would have to be below 0.025, and is 0.038" in report["verdict"][0]


@pytest.mark.parametrize("state", ["nothing", "chosen", "one side"])
def test_an_unfinished_sweep_says_what_is_there_and_what_is_missing(tmp_path, state):
    def wrong(run):
        begun = run.stage == "select" if state == "chosen" else run.arm == "sam" if state == "one side" else False
        return usual(run) if begun else None

    report = collect(tmp_path, wrong=wrong)
    left = {"nothing": 11, "chosen": 9, "one side": 6}[state]
    assert f"of 11 runs, {left} are left" in report["warnings"][0]
    assert report["verdict"] == [
        "Nothing can be said of SAM yet: not both sides of any comparison have a final run that is done."
    ]
    assert report["comparisons"] == []
    assert report["final"][0]["n"] == (3 if state == "one side" else 0)
    assert report["progress"]["unplanned"] == (3 if state == "nothing" else 0)
    assert len(report["progress"]["missing"]) == left - report["progress"]["unplanned"]
    assert len(tables.arm_rows(report)) == 3
    assert tables.markdown(report)


def test_a_seed_that_failed_is_left_out_of_the_pairs_and_the_bias_is_said(tmp_path):
    report = collect(tmp_path, wrong=lambda run: 9 if run.id == "final-sam-seed1" else usual(run))
    entry = report["final"][0]
    assert (entry["seeds"], entry["lost_seeds"], entry["n"]) == ([0, 2], [1], 2)
    assert pair_of(report, "sam", "sgd")["difference"]["n"] == 2
    assert any("final runs failed (seed 1)" in warning for warning in report["warnings"])
    (failed,) = report["progress"]["failed"]
    assert (failed["run"], failed["exit_code"], failed["why"]) == ("final-sam-seed1", 9, "it went wrong")
    assert report["verdict"][0].startswith("So far: ")
    assert "| final-sam-seed1 | it went wrong | logs/final-sam-seed1/output.txt |" in tables.markdown(report)


def test_a_point_that_diverged_is_out_and_an_arm_of_which_all_did_has_no_last_fits(tmp_path):
    one = collect(tmp_path / "one", wrong=lambda run: usual(run, grid={0.05: lambda _: 7, 0.1: 6}))
    assert [point["state"] for point in one["selection"]] == ["diverged", "done"]
    assert (one["choices"][0]["label"], one["choices"][0]["uncertain"]) == ("rho 0.1", None)
    assert not any("not complete" in warning for warning in one["warnings"])
    everything = collect(tmp_path / "all", wrong=lambda run: 7 if run.stage == "select" else usual(run))
    assert everything["final"][0]["point"] is None
    assert [w for w in everything["warnings"] if "sam:" in w] == [
        "sam: no point trained, as every loss was not finite; it has no final runs."
    ]
    assert not any("not complete" in warning for warning in everything["warnings"])


def test_without_predictions_there_is_no_test_and_the_reason(tmp_path):
    folder = write_sweep(tmp_path / "s", RECIPE, usual)
    (folder / "runs" / "final-sam-seed1" / "predictions.parquet").unlink()
    pair = pair_of(build(folder), "sam", "sgd")
    assert (pair["difference"]["ci95"], [test["seed"] for test in pair["mcnemar"]]) == (None, [0, 2])
    assert "predictions.parquet of final-sam-seed1 is not there" in pair["limits"][0]


def test_without_test_images_the_last_fits_say_so(tmp_path):
    folder = write_sweep(tmp_path / "s", RECIPE, usual)
    for run in (folder / "runs").glob("final-*"):
        result = json.loads((run / "report.json").read_text())
        (run / "report.json").write_text(json.dumps(result | {"test": None}))
    report = build(folder)
    assert report["warnings"][0] == "sam: the final runs were scored on nothing, as the data set has no test images."
    assert (report["final"][0]["n"], report["comparisons"]) == (0, [])


# ------------------------------------------------------------------------------------------------------------- budgets


def over_budgets(tmp_path, surplus):
    """A sweep of four budgets; surplus: by how many images SAM is worse than SGD there, for each of three seeds."""
    budgets = ["100 passes", "200 passes", "400 passes", "800 passes"]
    recipe = f'seeds = 3\narms = ["sam", "sgd"]\nbudgets = {json.dumps(budgets[::-1])}\n[sweep.grid]\nrho = [0.05]\n'

    def wrong(run):
        base = 20 + run.seed
        return range(base + (surplus[budgets.index(run.budget)][run.seed] if run.arm == "sam" else 0))

    return collect(tmp_path, recipe, wrong)


@pytest.mark.parametrize(
    ("surplus", "start", "sure"),
    [
        ([(5, 4, 5), (1, -2, 0), (-1, 2, -2), (-8, -7, -8)], "200 passes", "800 passes"),
        ([(-5, -4, -5), (1, 2, 1), (-5, -4, -5), (-8, -7, -8)], "400 passes", "400 passes"),
        ([(-5, -4, -5), (-5, -6, -5), (-5, -4, -5), (-8, -7, -8)], "100 passes", "100 passes"),
        ([(5, 4, 5), (5, 6, 5), (1, -2, 0), (-8, 2, 1)], "400 passes", None),
        ([(-5, -4, -5), (-5, -6, -5), (-5, -4, -5), (1, 0, 2)], None, None),
    ],
)
def test_where_sam_begins_to_pay_is_the_budget_from_which_on_it_has_less_error(tmp_path, surplus, start, sure):
    report = over_budgets(tmp_path, surplus)
    (entry,) = report["pays"]
    assert entry["tried"] == ["100 passes", "200 passes", "400 passes", "800 passes"]
    assert (entry["from"], entry["sure_from"]) == (start, sure)
    last = report["verdict"][-1]
    assert ("there is none from which on" in last) is (start is None)
    assert ("this may be chance" in last) is (start is not None and sure is None)
    assert "800 passes" in report["verdict"][0]  # the largest budget


def test_with_budgets_every_row_says_at_which(tmp_path):
    report = over_budgets(tmp_path, [(1, 0, 2)] * 4)
    rows = tables.arm_rows(report)
    assert [(row["budget"], row["arm"]) for row in rows[:2]] == [("800 passes", "sam"), ("800 passes", "sgd")]
    assert rows[0]["passes"] == rows[1]["passes"] == "800"
    assert "## sam against sgd, 100 passes" in tables.markdown(report)


# --------------------------------------------------------------------------------------------------------- the command


def test_the_command_writes_three_files_and_prints_what_is_in_them(done, tmp_path):
    folder, report = done
    shown = samtune("report", folder, "--output", tmp_path / "new", env={"COLUMNS": "200"})
    assert shown.returncode == 0, shown.stderr
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"report.json", "report.md", "report.html"}
    assert json.loads((tmp_path / "new" / "report.json").read_text()) == report
    assert (tmp_path / "new" / "report.md").read_text() == tables.markdown(report)
    assert report["verdict"][0] in shown.stdout
    low, high = report["final"][0]["mean_error_ci95"]
    assert f"10.00 ({low:.2f} to {high:.2f})" in shown.stdout
    assert shown.stdout.endswith(f"page: {tmp_path / 'new' / 'report.html'}\n")
    again = samtune("report", folder, "--json")
    assert json.loads(again.stdout) == report
    assert json.loads((folder / "report.json").read_text()) == report


def test_a_sweep_among_runs_and_a_folder_that_has_lost_its_ledger_are_refused(done, tmp_path):
    folder, _ = done
    refused = samtune("report", folder / "runs" / "final-sam-seed0", folder)
    assert refused.returncode == 2
    assert "it has them in runs/" in refused.stderr
    (tmp_path / "sweep.toml").write_text((folder / "sweep.toml").read_text())
    with pytest.raises(UsageError, match="there is no ledger"):
        build(tmp_path)


def test_a_damaged_run_is_named(tmp_path):
    folder = write_sweep(tmp_path / "s", RECIPE, usual)
    (folder / "runs" / "final-sgd-seed0" / "config.toml").write_text("rho = ")
    with pytest.raises(CheckpointError, match="final-sgd-seed0 is damaged"):
        build(folder)
