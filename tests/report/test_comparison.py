"""What `samtune report` makes of several run folders, which are written by hand here."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from samtune.errors import CheckpointError, UsageError
from samtune.report import run_report, stats
from samtune.report.comparison import compare, markdown
from tests.conftest import samtune
from tests.support import run_folders

N = 40  # images


def write_run(folder, wrong=(), *, split="test", n=N, passes=100, seconds=50.0, dataset="pets", **settings):
    """A run that is done and has these images of `split` wrong; settings: those that are not the default."""
    scored = {"val": split == "val", "test": split == "test", "images": n, "wrong": wrong}
    run_folders.write_run(folder, epochs=8, passes=passes / 8, **scored, **settings)
    run_report.write(folder, run_report.build(folder))
    write_report(folder, dataset={"name": dataset}, train_seconds=seconds)
    return folder


def write_report(folder, **entries):
    path = folder / "report.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def forget(folder, *names):
    for name in names:
        (folder / name).unlink()


def pair_of(*folders):
    (pair,) = compare(folders)["pairs"]
    return pair


@pytest.fixture
def two(tmp_path):
    """SGD has images 0 to 7 wrong, SAM 6 to 9: 6 by SGD alone, 2 by SAM alone."""
    sgd = write_run(tmp_path / "sgd", range(8), rho=0.0)
    return sgd, write_run(tmp_path / "sam", range(6, 10), rho=0.05, passes=200, seconds=95.0)


def write_seeds(folder, sgd, sam):
    """Runs of two settings: so many images wrong, by seed."""
    return [
        write_run(folder / f"{arm}-{seed}", range(wrong), seed=seed, rho=rho)
        for arm, rho, counts in (("sgd", 0.0, sgd), ("sam", 0.05, sam))
        for seed, wrong in counts.items()
    ]


@pytest.fixture
def seeds(tmp_path):
    return write_seeds(tmp_path, {0: 8, 1: 10, 2: 9}, {0: 6, 1: 7, 2: 8})


def test_two_runs_are_tested_on_the_images_that_both_scored_and_without_an_interval_over_seeds(two):
    pair = pair_of(*two)
    assert (pair["label"], pair["baseline"], pair["difference"]["mean"]) == ("sam", "sgd", -10.0)
    assert pair["mcnemar"] == {"only_wrong": 2, "baseline_only_wrong": 6, "p": pytest.approx(74 / 256)}
    assert pair["error_reduction"]["percent"] == pytest.approx(50)
    assert (pair["difference"]["ci95"], pair["difference"]["p"], pair["error_reduction"]["low"]) == (None, None, None)
    assert pair["limits"] == [
        "one seed each: how much another seed would differ is not known; "
        "the test says whether these two models differ on these images"
    ]


def test_what_differs_is_listed_by_run_and_what_is_held_equal_stands_in_words(two):
    assert compare(two)["differs"] == {"rho": {"sgd": 0.0, "sam": 0.05}}
    page = markdown(compare(two))
    assert "- equal: epochs 8, steps 40; not equal: passes 200 against 100 (ratio 2), seconds 95 ag" in page
    assert "against 50 (ratio 1.9)\n" in page


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (50.0, "equal: epochs 8, steps 40, passes 100, seconds 50"),
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
    assert (first["epochs"], first["steps"], first["passes"], first["seconds"]) == (8, 40, 100, 50.0)


def test_runs_that_differ_in_the_seed_alone_are_one_setting(seeds):
    comparison = compare(seeds)
    sgd, sam = comparison["groups"]
    assert [group["label"] for group in (sgd, sam)] == ["sgd-0 + 2 seeds", "sam-0 + 2 seeds"]
    assert sgd["seeds"] == sam["seeds"] == [0, 1, 2]
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
    runs = write_seeds(tmp_path, {0: 8, 1: 10}, {2: 6, 3: 7, 4: 9})
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
    shuffled = pq.read_table(path).take(np.random.default_rng(0).permutation(N))
    pq.write_table(shuffled, path)  # the same images in another order are the same
    assert pair_of(*two)["mcnemar"]["only_wrong"] == 2
    take_other_rows(two[1])
    assert pair_of(*two)["mcnemar"] is None


def test_one_run_of_other_images_among_the_seeds_is_found(seeds):
    take_other_rows(seeds[4])
    assert pair_of(*seeds)["difference"]["p"] is None


def take_other_rows(run):
    path = run / "predictions.parquet"
    table = pq.read_table(path)
    pq.write_table(table.set_column(0, "index", pa.array(np.array(table["index"]) + 1)), path)


@pytest.mark.parametrize("stale", [False, True])
def test_predictions_that_are_missing_or_not_those_of_the_report_give_no_test(two, stale):
    path = two[1] / "predictions.parquet"
    if stale:
        path.write_bytes((two[0] / "predictions.parquet").read_bytes())
    else:
        path.unlink()
    pair = pair_of(*two)
    assert pair["mcnemar"] is None
    said = "predictions.parquet of sam is not there, or not of what its report counted"
    assert any(said in limit for limit in pair["limits"])


def test_seconds_of_other_machines_are_named(two):
    write_report(two[1], machine="Linux aarch64, 64 cores")
    comparison = compare(two)
    assert "seconds were taken on different machines or devices" in comparison["pairs"][0]["limits"]
    assert comparison["differs"]["machine"] == {"sgd": "Linux x86_64, 2 cores", "sam": "Linux aarch64, 64 cores"}


def test_seeds_that_came_to_the_same_have_no_interval_and_it_says_why(tmp_path):
    comparison = compare(write_seeds(tmp_path, {0: 8, 1: 8}, {0: 6, 1: 6}))
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
        (lambda run: forget(run, "report.json", "provenance.json"), CheckpointError, "provenance.json"),
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
    said = ("sam against sgd\n", "McNemar's exact test: p = 0.29", "not equal: passes")
    assert all(part in shown.stdout for part in (" 20.00 ", "8 of 40", "rho", *said))


def test_the_report_of_one_run_is_made_anew_from_its_other_files(uninterrupted, tmp_path):
    before = json.loads((uninterrupted / "report.json").read_text())
    done = samtune("report", uninterrupted, "--output", tmp_path / "r", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == before
    assert (tmp_path / "r" / "report.md").read_bytes() == (uninterrupted / "report.md").read_bytes()


def test_what_cannot_be_reported_ends_in_one_line_each(two, tmp_path):
    forget(two[0], "provenance.json")
    for arguments, code in (
        ([tmp_path / "nowhere"], 2),
        ([two[0]], 5),
        ([*two, tmp_path / "nowhere"], 2),
        ([*two, "--output", two[0] / "config.toml"], 8),
    ):
        done = samtune("report", *arguments)
        assert (done.returncode, done.stdout) == (code, "")
        assert "hint:" in done.stderr
        assert "Traceback" not in done.stderr
