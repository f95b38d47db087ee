"""`samtune sharpness`: files, several checkpoints, a sweep's correlation, bad input, a stop."""

import json
import shutil

import pytest

from samtune.report import stats
from samtune.sharpness import report
from tests.conftest import SMALL_MODEL, samtune, write_image_folder

QUICK = ("--max-images", 6, "--ascent-steps", 2, "--restarts", 0, "--points", 3, "--lanczos-steps", 3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two runs of four steps, of which all even ones are kept."""
    root = tmp_path_factory.mktemp("sharpness")
    data = write_image_folder(root / "data", {"train": 10, "test": 4})
    for name, rho in (("sgd", 0), ("sam", 0.05)):
        arguments = ("--epochs", "4 steps", "--lr", 0.01, "--batch-size", 8, "--rho", rho, "--no-html")
        kept = ("--keep-at", "2 steps,100%", "--keep-checkpoints", 1)
        done = samtune("run", *SMALL_MODEL, *arguments, *kept, "--dataset", data, "--output", root / name)
        assert done.returncode == 0, done.stderr
    return root


def test_two_runs_are_measured_on_the_same_images_and_drawn_on_one_page(folder, tmp_path):
    chosen = ("--m", "2,6", "--top", 2, "--density", "--slices", 1, "--direction-to", folder / "sam")
    done = samtune("sharpness", folder / "sgd", folder / "sam", *chosen, *QUICK, "-o", tmp_path, "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result == json.loads((tmp_path / "sharpness.json").read_text())
    assert [one["label"] for one in result["checkpoints"]] == ["sgd", "sam"]
    assert result["line"]["loss"][-2] != result["line"]["loss"][0]
    page = (tmp_path / "sharpness.html").read_text()
    for chart in ("chart-m", "chart-density", "chart-slices", "chart-line"):
        assert f'id="{chart}-title"' in page
    assert "(Andriushchenko et al. 2023)" in page
    assert "m-sharpness (nats)" in (tmp_path / "sharpness.md").read_text()
    assert all(one["m_sharpness"][0]["maximum"] >= one["m_sharpness"][0]["one_step"] for one in result["checkpoints"])


def test_all_kept_checkpoints_of_a_run_are_a_curve_over_training(folder):
    assert sorted(path.name for path in (folder / "sam" / "checkpoints").glob("step-*")) == [
        "step-000002",
        "step-000004",
    ]
    done = samtune("sharpness", folder / "sam", "--checkpoint", "all", "--top", 1, *QUICK, "--json")
    assert done.returncode == 0, done.stderr
    assert [one["label"] for one in json.loads(done.stdout)["checkpoints"]] == ["sam step 2", "sam step 4"]
    assert 'id="chart-training-title"' in (folder / "sam" / "sharpness.html").read_text()


def test_over_four_runs_m_sharpness_is_set_against_the_gap_of_test_and_train_error(folder, tmp_path):
    runs = [folder / "sgd", folder / "sam"]
    for seed in (1, 2):
        runs.append(tmp_path / f"seed{seed}")
        arguments = ("--epochs", "4 steps", "--batch-size", 8, "--seed", seed, "--no-html")
        done = samtune("run", *SMALL_MODEL, *arguments, "--dataset", folder / "data", "--output", runs[-1])
        assert done.returncode == 0, done.stderr
    done = samtune("sharpness", *runs, "--m", "2,6,100", *QUICK, "-o", tmp_path, "--json")  # 100 is all 6
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    errors = [json.loads((run / "report.json").read_text())["test"]["top1_error"] for run in runs]
    gaps = [error - one["top1_error"] for error, one in zip(errors, result["checkpoints"], strict=True)]
    assert [one["gap"] for one in result["gaps"]] == pytest.approx(gaps)
    assert [(one["m"], one["runs"]) for one in result["correlation"]] == [(2, 4), (6, 4)]
    assert 'id="chart-gaps-title"' in (tmp_path / "sharpness.html").read_text()
    fewer = json.loads(samtune("sharpness", *runs[:3], *runs[:1], "--m", 6, *QUICK, "-o", tmp_path, "--json").stdout)
    assert fewer["gaps"] == fewer["correlation"] == []


def test_averaged_weights_are_measured_by_name(folder, tmp_path):
    arguments = ("--epochs", "4 steps", "--batch-size", 8, "--lr", 0.1, "--model-ema", "--no-html")
    done = samtune("run", *SMALL_MODEL, *arguments, "--dataset", folder / "data", "--output", tmp_path / "averaged")
    assert done.returncode == 0, done.stderr
    chosen = (tmp_path / "averaged", "--m", 6, "--split", "test", *QUICK, "--max-images", 100)
    ema, last = (json.loads(samtune("sharpness", *chosen, *more, "--json").stdout) for more in (["--ema"], []))
    report = json.loads((tmp_path / "averaged" / "report.json").read_text())
    for found, scored in ((ema, report["ema"]["test"]), (last, report["test"])):
        assert found["checkpoints"][0]["loss"] == pytest.approx(scored["loss"], rel=1e-4)
    assert ema["checkpoints"][0]["loss"] != last["checkpoints"][0]["loss"]


def test_the_box_of_p_inf_is_measured_and_written(folder, tmp_path):
    chosen = ("--m", 3, "--p", "inf", "--rho", 1e-3)
    done = samtune("sharpness", folder / "sgd", *chosen, *QUICK, "-o", tmp_path, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["measures"]["p"] == "inf"
    assert "p inf" in (tmp_path / "sharpness.md").read_text()


def test_training_images_have_the_labels_that_the_run_was_trained_on(folder, tmp_path):
    noisy, flipped = ("--label-noise", 1.0), tmp_path / "flipped"
    arguments = ("--epochs", "4 steps", "--lr", 0.1, "--batch-size", 8, "--no-html", "--dataset", folder / "data")
    assert samtune("run", *SMALL_MODEL, *arguments, *noisy, "--output", flipped).returncode == 0
    done = samtune("sharpness", flipped, "--m", 6, *QUICK, "--json", "--split", "train", "--max-images", 100)
    (found,) = json.loads(done.stdout)["checkpoints"]
    clean = json.loads(samtune("eval", flipped, "--split", "train", "--json").stdout)
    assert found["top1_error"] == pytest.approx(100 - clean["top1_error"])  # of two classes, all flipped
    assert found["loss"] != pytest.approx(clean["loss"], rel=1e-3)


def test_without_a_choice_it_measures_m_sharpness_and_eigenvalues(folder, tmp_path):
    done = samtune("sharpness", folder / "sgd", "--max-images", 4, "--ascent-steps", 1, "--restarts", 0, "-o", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Eigenvalues of the Hessian" in done.stdout
    assert "diagnostic, and no score" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--m", "1,x"), 2, "must be numbers of images"),
        (("--m", "0"), 2, "must be numbers of images"),
        (("--split", "unknown", "--top", 1), 2, "no split 'unknown'"),
        (("--params", "nothing", "--top", 1), 2, "matches none of the model's trainable parameters"),
        (("--params", "(", "--top", 1), 2, "--params ("),
        (("--direction-to", "nowhere"), 5, "no run or checkpoint nowhere"),
        (("--slices", "3"), 2, "'3' is not one of '1', '2'"),
        (("--m", "2", "--rho", "nan"), 2, "--rho nan: must be finite"),
        (("--m", "2", "--p", "nan"), 2, "--p nan: must be in"),
        (("--m", "2", "--p", "0.5"), 2, "--p 0.5: must be in"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_a_line(folder, tmp_path, arguments, code, message):
    done = samtune("sharpness", folder / "sgd", *arguments, *QUICK, "-o", tmp_path)
    assert done.returncode == code, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("at", ["measure sharpness", "Hessian product"])
def test_what_was_measured_before_ctrl_c_is_written_and_printed(folder, tmp_path, at):
    faults = [{"at": at, "call": 2, "do": "SIGINT"}]
    chosen = ("--m", 3, "--top", 1)
    done = samtune("sharpness", folder / "sgd", folder / "sam", *chosen, *QUICK, "-o", tmp_path, faults=faults)
    assert done.returncode == 130, done.stderr
    assert "Traceback" not in done.stderr
    result = json.loads((tmp_path / "sharpness.json").read_text())
    assert result["interrupted"]
    *whole, last = result["checkpoints"]
    assert len(whole) == (at == "measure sharpness")
    assert "hessian" not in last
    assert "was interrupted" in (tmp_path / "sharpness.html").read_text()
    assert "was interrupted" in done.stdout


def test_what_was_measured_before_an_error_is_written(folder, tmp_path):
    faults = [{"at": "measure sharpness", "call": 2, "do": "oom"}]
    runs = (folder / "sgd", folder / "sam")
    done = samtune("sharpness", *runs, "--top", 1, *QUICK, "-o", tmp_path, faults=faults)
    assert done.returncode != 0
    assert "no memory" in done.stderr
    assert "--micro-batch" in done.stderr
    (first,) = json.loads((tmp_path / "sharpness.json").read_text())["checkpoints"]
    assert (first["label"], "hessian" in first) == ("sgd", True)


def test_runs_of_one_name_are_told_apart_and_one_that_is_named_twice_is_measured_once(folder, tmp_path):
    for arm in ("sgd", "sam"):
        shutil.copytree(folder / arm, tmp_path / arm / "seed0", symlinks=True)
    paths = [tmp_path / arm / "seed0" for arm in ("sgd", "sam")]
    again = paths[0] / "checkpoints" / "last"
    done = samtune("sharpness", *paths, again, "--slices", 1, *QUICK, "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [one["label"] for one in json.loads(done.stdout)["checkpoints"]] == ["sgd/seed0", "sam/seed0"]
    inside = samtune("sharpness", ".", "--m", 3, *QUICK, "--json", cwd=paths[0])
    assert json.loads(inside.stdout)["checkpoints"][0]["label"] == "seed0"


def test_data_that_have_moved_are_named_and_a_checkpoint_without_its_run_is_measured(folder, tmp_path):
    moved = shutil.copytree(folder / "data", tmp_path / "moved")
    alone = shutil.copytree(folder / "sam" / "checkpoints" / "step-000004", tmp_path / "alone")
    done = samtune("sharpness", alone, "--dataset", moved, "--checkpoint", "last", "--m", 3, *QUICK, "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["checkpoints"][0]["label"] == "alone"
    assert str(moved) in result["checkpoints"][0]["dataset"]


def test_a_sweep_stands_for_its_final_runs(whole_sweep, tmp_path):
    done = samtune("sharpness", whole_sweep, "--top", 1, *QUICK, "-o", tmp_path, "--json")
    assert done.returncode == 0, done.stderr
    runs = [one["run"] for one in json.loads(done.stdout)["checkpoints"]]
    assert len(runs) == 2
    assert all("final" in run for run in runs)


def test_planes_of_two_models_have_one_scale(folder, tmp_path):
    chosen = ("--slices", 2, "--max-images", 4, "--points", 3)
    done = samtune("sharpness", folder / "sgd", folder / "sam", *chosen, "-o", tmp_path)
    assert done.returncode == 0, done.stderr
    assert 'id="chart-planes-title"' in (tmp_path / "sharpness.html").read_text()


def test_averaged_weights_are_at_both_ends_of_a_line(folder, tmp_path):
    runs = []
    for name in ("a", "b"):
        arguments = ("--epochs", "2 steps", "--batch-size", 8, "--lr", 0.1, "--model-ema", "--no-html")
        runs.append(tmp_path / name)
        more = ("--seed", len(runs), "--dataset", folder / "data", "--output", runs[-1])
        assert samtune("run", *SMALL_MODEL, *arguments, *more).returncode == 0
    quick = ("--max-images", 6, "--points", 5, "--ema", "--json")
    line = json.loads(samtune("sharpness", runs[0], "--direction-to", runs[1], *quick).stdout)["line"]
    ends = [json.loads(samtune("sharpness", run, "--m", 6, *QUICK, "--ema", "--json").stdout) for run in runs]
    at = [line["loss"][line["at"].index(end)] for end in (0.0, 1.0)]
    assert at == pytest.approx([end["checkpoints"][0]["loss"] for end in ends], rel=1e-4)


def test_a_correlation_has_a_p_value_an_interval_from_ten_pairs_on_and_needs_spread():
    gaps = [float(i) for i in range(10)]
    same = stats.kendall([2 * gap for gap in gaps], gaps)
    assert same.tau == pytest.approx(1)
    assert same.ci95 == pytest.approx((1, 1))
    swapped = [1.0, 0.0, 2.0, 3.0, 5.0, 4.0, 6.0, 7.0, 9.0, 8.0]
    found = stats.kendall(swapped, gaps)
    assert found.tau == pytest.approx(1 - 2 * 3 / 45)  # 3 of 45 pairs are in the other order
    assert -1 <= found.ci95[0] < found.tau < found.ci95[1] <= 1
    few = stats.kendall(gaps[:4], gaps[:4])
    assert few.p_value == pytest.approx(2 / 24)  # of the 24 orders of 4, two are as extreme
    assert few.ci95 is None
    assert stats.kendall([1.0] * 10, gaps) == (None, None, None)


def test_numbers_of_very_different_size_keep_their_digits_in_text():
    one = {"label": "a", "step": 1, "loss": 1.23456e-5, "top1_error": 12.5}
    result = {"checkpoints": [one], "measures": {"m": ()}}
    assert report.text_tables(result)["Models"] == [{"model": "a", "step": 1, "loss": "1.235e-05", "error %": "12.5"}]
