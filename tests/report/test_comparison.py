"""What `samtune report` makes of several run folders, which are written by hand here."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from samtune.config import loading
from samtune.errors import CheckpointError, UsageError
from samtune.report import stats
from samtune.report.comparison import compare, markdown
from tests.conftest import samtune

N = 40  # images


def write_run(folder, wrong=(), *, seed=0, split="test", n=N, passes=100, seconds=50.0, dataset="pets", **settings):
    """A run that is done and has these images of `split` wrong; settings: those that are not the default."""
    folder.mkdir(parents=True)
    flags = {"model": "m", "dataset": dataset, "seed": seed, "output": str(folder)} | settings
    (folder / "config.toml").write_text(loading.load(None, flags).to_toml())
    (folder / "status.json").write_text('{"state": "done"}')
    labels = np.arange(n) % 3
    predictions = np.where(np.isin(np.arange(n), list(wrong)), labels + 1, labels)
    table = pa.table({"index": np.arange(n), "label": labels, "prediction": predictions, "probability": np.ones(n)})
    pq.write_table(table.replace_schema_metadata({"split": split}), folder / "predictions.parquet")
    interval = [100 * limit for limit in stats.wilson_interval(len(wrong), n)]
    scores = {"split": split, "n": n, "wrong": len(wrong), "top1_error": 100 * len(wrong) / n}
    write_report(
        folder,
        dataset={"name": dataset},
        seed=seed,
        **{"test": None, "val": None, split: scores | {"top1_error_ci95": interval}},
        train_seconds=seconds,
        cost={"forward_backward_passes": passes},
    )
    return folder


REPORT = {
    "model": {"weights": "random"},
    "epochs": 8,
    "steps": 100,
    "images_per_second": 100.0,
    "world_size": 1,
    "machine": "Linux x86_64, 2 cores",
    "devices": ["cpu (2 threads)"],
    "versions": {"torch": "2.15.0"},
}


def write_report(folder, **entries):
    path = folder / "report.json"
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else REPORT) | entries))


def pair_of(*folders):
    (pair,) = compare(folders)["pairs"]
    return pair


@pytest.fixture
def two(tmp_path):
    """SGD has images 0 to 7 wrong, SAM 6 to 9: 6 by SGD alone, 2 by SAM alone."""
    sgd = write_run(tmp_path / "sgd", range(8), rho=0.0)
    return sgd, write_run(tmp_path / "sam", range(6, 10), rho=0.05, passes=200, seconds=95.0)


@pytest.fixture
def seeds(tmp_path):
    """Three seeds each, with so many images wrong."""
    return [
        write_run(tmp_path / f"{arm}-{seed}", range(wrong), seed=seed, rho=rho)
        for arm, rho, counts in (("sgd", 0.0, (8, 10, 9)), ("sam", 0.05, (6, 7, 8)))
        for seed, wrong in enumerate(counts)
    ]


def test_two_runs_are_tested_on_the_images_that_both_scored(two):
    pair = pair_of(*two)
    assert (pair["label"], pair["baseline"], pair["difference"]["mean"]) == ("sam", "sgd", -10.0)
    assert pair["mcnemar"] == {"only_wrong": 2, "baseline_only_wrong": 6, "p": pytest.approx(74 / 256)}
    assert pair["error_reduction"]["percent"] == pytest.approx(50)


def test_one_seed_each_has_no_interval_and_says_what_cannot_be_concluded(two):
    pair = pair_of(*two)
    assert (pair["difference"]["ci95"], pair["difference"]["p"], pair["error_reduction"]["low"]) == (None, None, None)
    assert pair["limits"] == [
        "one seed each: how much another seed would differ is not known; "
        "the test says whether these two models differ on these images"
    ]


def test_only_what_differs_is_listed_by_run(two):
    assert compare(two)["differs"] == {"rho": {"sgd": 0.0, "sam": 0.05}}


def test_what_the_comparison_holds_equal_stands_in_words(two):
    page = markdown(compare(two))
    assert "- equal: epochs 8, steps 100; not equal: passes 200 against 100 (ratio 2), seconds 95 ag" in page
    assert "against 50 (ratio 1.9)\n" in page


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (50.0, "equal: epochs 8, steps 100, passes 100, seconds 50"),
        (52.0, "nearly equal: seconds 52 against 50"),
        (None, "not known"),
    ],
)
def test_costs_are_equal_or_nearly_or_not_known(tmp_path, seconds, said):
    runs = write_run(tmp_path / "a"), write_run(tmp_path / "b", seconds=seconds, rho=0.1)
    assert said in markdown(compare(runs))


def test_runs_carry_what_their_reports_say(two):
    first = compare(two)["runs"][0]
    assert first["top1_error_ci95"] == [100 * limit for limit in stats.wilson_interval(8, N)]
    assert (first["label"], first["wrong"], first["n"], first["split"]) == ("sgd", 8, N, "test")
    assert (first["epochs"], first["steps"], first["passes"], first["seconds"]) == (8, 100, 100, 50.0)


def test_runs_that_differ_in_the_seed_alone_are_one_setting(seeds):
    comparison = compare(seeds)
    sgd, sam = comparison["groups"]
    assert [(group["label"], group["seeds"]) for group in (sgd, sam)] == [
        ("sgd-0 + 2 seeds", [0, 1, 2]),
        ("sam-0 + 2 seeds", [0, 1, 2]),
    ]
    half = 4.302653 * 2.5 / 3**0.5  # 8, 10 and 9 of 40: 20, 25 and 22.5 %, standard deviation 2.5
    assert sgd["mean_error"] == 22.5
    assert sgd["mean_error_ci95"] == pytest.approx([22.5 - half, 22.5 + half])
    assert len(comparison["pairs"]) == 1


def test_seeds_that_both_settings_have_are_paired_in_whatever_order_they_are_given(seeds):
    expected = stats.paired_difference([15, 17.5, 20], [20, 25, 22.5])
    for runs in (seeds, [seeds[0], *seeds[:0:-1]]):
        found = pair_of(*runs)["difference"]
        assert (found["paired"], found["n"], found["mean"]) == (True, 3, pytest.approx(-5))
        assert [*found["ci95"], found["p"]] == pytest.approx([expected.low, expected.high, expected.p])


def test_the_error_reduction_over_seeds_has_fiellers_interval(seeds):
    expected = stats.error_reduction([15, 17.5, 20], [20, 25, 22.5])
    assert list(pair_of(*seeds)["error_reduction"].values()) == pytest.approx(list(expected))
    assert expected.low is not None


def test_a_seed_without_a_partner_is_left_out_of_the_pairs_by_name(seeds):
    pair = pair_of(*seeds[:5])
    assert (pair["difference"]["n"], pair["difference"]["mean"]) == (2, -6.25)
    assert "seeds of sgd-0 + 2 seeds that have no partner are left out of the pairs: 2" in pair["limits"]


def test_settings_without_common_seeds_are_compared_as_independent(tmp_path):
    counts = {("sgd", 0): 8, ("sgd", 1): 10, ("sam", 2): 6, ("sam", 3): 7, ("sam", 4): 9}
    runs = [
        write_run(tmp_path / f"{arm}{seed}", range(wrong), seed=seed, rho=0.05 * (arm == "sam"))
        for (arm, seed), wrong in counts.items()
    ]
    pair = pair_of(*runs)
    a, b = [15, 17.5, 22.5], [20, 25]
    expected = stats.independent_difference(a, b)
    assert (pair["difference"]["paired"], pair["difference"]["n"], pair["difference"]["baseline_n"]) == (False, 3, 2)
    assert pair["difference"]["p"] == pytest.approx(expected.p)
    assert pair["error_reduction"]["percent"] == stats.error_reduction(a, b, paired=False).percent
    assert "Welch's t test, 3 and 2 seeds" in markdown(compare(runs))


def test_one_run_against_several_seeds_has_no_test(seeds):
    pair = pair_of(*seeds[:4])
    assert (pair["mcnemar"], pair["difference"]["p"]) == (None, None)
    assert pair["limits"] == ["one seed: how much another seed would differ is not known"]


def test_the_same_seed_once_more_is_no_second_seed(tmp_path):
    comparison = compare([write_run(tmp_path / name, range(5)) for name in ("a", "again")])
    assert [group["n"] for group in comparison["groups"]] == [1, 1]
    assert comparison["differs"] == {}
    assert comparison["pairs"][0]["mcnemar"]["p"] == 1


def test_settings_that_change_no_number_do_not_make_another_setting(tmp_path):
    runs = [
        write_run(tmp_path / "a", range(5), workers=0),
        write_run(tmp_path / "b", range(6), seed=1, workers=3, gpus="1", save_every="5 minutes"),
    ]
    comparison = compare(runs)
    assert list(comparison["differs"]) == ["seed"]
    assert comparison["groups"][0]["n"] == 2
    write_report(runs[1], world_size=2)
    comparison = compare(runs)
    assert comparison["differs"]["world_size"] == {"a": 1, "b": 2}
    assert len(comparison["groups"]) == 2


def test_a_setting_that_an_older_run_did_not_know_had_its_default(two):
    path = two[0] / "config.toml"
    lines = [line for line in path.read_text().splitlines() if not line.startswith("mixup")]
    path.write_text("\n".join(lines))
    assert list(compare(two)["differs"]) == ["rho"]


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"split": "val"}, "b was scored on val, a on test"),
        ({"n": N // 2}, "b and a were scored on other images, or labels, of test: 20 and 40"),
        ({"dataset": "cars"}, "b is of cars, a of pets"),
    ],
)
def test_other_images_give_no_test_and_the_reason(tmp_path, other, said):
    pair = pair_of(write_run(tmp_path / "a", [1, 2]), write_run(tmp_path / "b", [1], rho=0.1, **other))
    assert (pair["mcnemar"], pair["error_reduction"], pair["difference"]["p"]) == (None, None, None)
    assert f"no test: {said}" in pair["limits"]
    assert not any("the test says" in limit for limit in pair["limits"])


def test_other_rows_of_as_many_images_are_other_images(two):
    path = two[1] / "predictions.parquet"
    table = pq.read_table(path)
    shuffled = table.take(np.random.default_rng(0).permutation(N))  # the same images in another order are the same
    pq.write_table(shuffled, path)
    assert pair_of(*two)["mcnemar"]["only_wrong"] == 2
    pq.write_table(table.set_column(0, "index", pa.array(np.arange(N) + 1)), path)
    assert pair_of(*two)["mcnemar"] is None


def test_one_run_of_other_images_among_the_seeds_is_found(seeds):
    path = seeds[4] / "predictions.parquet"
    table = pq.read_table(path)
    pq.write_table(table.set_column(0, "index", pa.array(np.arange(N) + 1)), path)
    assert pair_of(*seeds)["difference"]["p"] is None


@pytest.mark.parametrize("stale", [False, True])
def test_predictions_that_are_missing_or_not_those_of_the_report_give_no_test(two, stale):
    path = two[1] / "predictions.parquet"
    if stale:
        path.write_bytes((two[0] / "predictions.parquet").read_bytes())
    else:
        path.unlink()
    pair = pair_of(*two)
    assert pair["mcnemar"] is None
    assert any(
        "predictions.parquet of sam is not there, or not of what its report counted" in x for x in pair["limits"]
    )


def test_seconds_of_other_machines_are_named(two):
    write_report(two[1], machine="Linux aarch64, 64 cores")
    comparison = compare(two)
    assert "seconds were taken on different machines or devices" in comparison["pairs"][0]["limits"]
    assert comparison["differs"]["machine"] == {"sgd": "Linux x86_64, 2 cores", "sam": "Linux aarch64, 64 cores"}


def test_seeds_that_came_to_the_same_have_no_interval_and_it_says_why(tmp_path):
    counts = {("sgd", 0): 8, ("sgd", 1): 8, ("sam", 0): 6, ("sam", 1): 6}
    runs = [
        write_run(tmp_path / f"{arm}{seed}", range(wrong), seed=seed, rho=0.05 * (arm == "sam"))
        for (arm, seed), wrong in counts.items()
    ]
    comparison = compare(runs)
    assert [group["mean_error_ci95"] for group in comparison["groups"]] == [None, None]
    assert comparison["pairs"][0]["difference"]["p"] is None
    page = markdown(comparison)
    assert (page.count("the error was the same at every seed"), page.count("the difference was the same")) == (2, 1)


def test_several_pairs_say_that_each_p_is_of_one_test_alone(tmp_path):
    runs = [write_run(tmp_path / f"{rho}", range(5), rho=rho) for rho in (0.0, 0.05, 0.1)]
    assert "for 2 together, look for p < 0.025" in markdown(compare(runs))
    untested = write_run(tmp_path / "cars", range(5), rho=0.2, dataset="cars")
    assert "for 2 together" in markdown(compare([*runs, untested]))
    assert "Bonferroni" not in markdown(compare(runs[:2]))


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path):
    runs = [write_run(tmp_path / arm / "seed0", range(5), rho=rho) for arm, rho in (("sgd", 0.0), ("sam", 0.1))]
    assert [run["label"] for run in compare(runs)["runs"]] == ["sgd/seed0", "sam/seed0"]


def test_names_with_the_signs_of_markdown_do_not_break_its_tables(tmp_path):
    runs = [write_run(tmp_path / name, range(5), rho=rho) for name, rho in (("a|b & <c>", 0.0), ("c", 0.1))]
    tables = [line for line in markdown(compare(runs)).splitlines() if line.startswith("|")]
    assert tables[2].startswith("| a\\|b & <c> |")  # no HTML: nothing else is escaped
    assert len({line.replace("\\|", "").count("|") for line in tables[:4]}) == 1


@pytest.mark.parametrize(
    ("damage", "error", "said"),
    [
        (lambda run: (run / "config.toml").unlink(), UsageError, "there is no run in"),
        (lambda run: (run / "status.json").write_text('{"state": "stopped"}'), UsageError, "its state is stopped"),
        (lambda run: write_report(run, test=None), UsageError, "was scored on nothing"),
        (lambda run: (run / "config.toml").write_text("rho = "), CheckpointError, "TOMLDecodeError"),
        (lambda run: (run / "report.json").write_text('{"test": '), CheckpointError, "JSONDecodeError"),
        (lambda run: (run / "report.json").write_text("{}"), CheckpointError, "KeyError"),
        (lambda run: (run / "report.json").write_text("[]"), CheckpointError, "no JSON object"),
        (lambda run: (run / "report.json").unlink(), CheckpointError, "provenance.json"),
        (lambda run: (run / "predictions.parquet").write_bytes(b"PAR1"), CheckpointError, "Arrow"),
    ],
)
def test_a_folder_that_cannot_be_compared_is_named_with_the_reason_and_the_mend(two, damage, error, said):
    damage(two[1])
    with pytest.raises(error, match=str(two[1])) as caught:
        compare(two)
    assert said in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 3


def test_a_run_without_status_counts_as_done_if_it_has_a_report(two):
    (two[0] / "status.json").unlink()
    assert pair_of(*two)["mcnemar"] is not None
    (two[0] / "report.json").unlink()
    with pytest.raises(UsageError, match="is not done"):
        compare(two)


def test_a_run_twice_or_alone_is_no_comparison(two):
    with pytest.raises(UsageError, match="given twice"):
        compare([two[0], two[0] / ".." / "sgd"])
    with pytest.raises(UsageError, match="at least two"):
        compare(two[:1])


def test_programs_people_and_files_get_the_same_comparison(two, tmp_path):
    expected = compare(two)
    done = samtune("report", *two, "--json", "--output", tmp_path / "new" / "folder")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout) == expected
    assert json.loads((tmp_path / "new" / "folder" / "comparison.json").read_text()) == expected
    assert (tmp_path / "new" / "folder" / "comparison.md").read_text() == markdown(expected)
    shown = samtune("report", *two, env={"COLUMNS": "200"})
    assert (shown.returncode, shown.stderr) == (0, "")
    for part in (
        " 20.00 ",
        "8 of 40",
        "rho",
        "sam against sgd\n",
        "McNemar's exact test: p = 0.29",
        "not equal: passes",
    ):
        assert part in shown.stdout


def test_the_report_of_one_run_is_made_anew_from_its_other_files(uninterrupted, tmp_path):
    before = json.loads((uninterrupted / "report.json").read_text())
    done = samtune("report", uninterrupted, "--output", tmp_path / "r", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == before
    assert (tmp_path / "r" / "report.md").read_bytes() == (uninterrupted / "report.md").read_bytes()


def test_what_cannot_be_reported_ends_in_one_line_each(two, tmp_path):
    for arguments, code in (
        ([tmp_path / "nowhere"], 2),
        ([two[0]], 5),  # it has no provenance.json
        ([*two, tmp_path / "nowhere"], 2),
        ([*two, "--output", two[0] / "config.toml"], 8),
    ):
        done = samtune("report", *arguments)
        assert (done.returncode, done.stdout) == (code, "")
        assert "hint:" in done.stderr
        assert "Traceback" not in done.stderr
