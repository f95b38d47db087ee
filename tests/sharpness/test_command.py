"""`samtune sharpness`: files, several checkpoints, a sweep's correlation, bad input, a stop."""

import json

import pytest

from samtune.report import stats
from samtune.sharpness import report
from tests.conftest import SMALL_MODEL, samtune, write_image_folder

QUICK = ("--max-images", 6, "--ascent-steps", 2, "--starts", 0, "--points", 3, "--lanczos-steps", 3)


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


def test_the_box_of_p_inf_is_measured_and_written(folder, tmp_path):
    chosen = ("--m", 3, "--p", "inf", "--rho", 1e-3)
    done = samtune("sharpness", folder / "sgd", *chosen, *QUICK, "-o", tmp_path, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["measures"]["p"] == "inf"
    assert "p inf" in (tmp_path / "sharpness.md").read_text()


def test_training_images_have_the_labels_that_the_run_was_trained_on(folder, tmp_path):
    noisy, flipped = ("--label-noise", 1.0), tmp_path / "flipped"
    arguments = ("--epochs", "2 steps", "--batch-size", 8, "--no-html", "--dataset", folder / "data")
    assert samtune("run", *SMALL_MODEL, *arguments, *noisy, "--output", flipped).returncode == 0
    done = samtune("sharpness", flipped, "--m", 6, *QUICK, "--json", "--split", "train", "--max-images", 100)
    (found,) = json.loads(done.stdout)["checkpoints"]
    clean = json.loads(samtune("eval", flipped, "--split", "train", "--json").stdout)
    assert found["top1_error"] == pytest.approx(100 - clean["top1_error"])  # of two classes, all flipped


def test_without_a_choice_it_measures_m_sharpness_and_eigenvalues(folder, tmp_path):
    done = samtune("sharpness", folder / "sgd", "--max-images", 4, "--ascent-steps", 1, "--starts", 0, "-o", tmp_path)
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
    ],
)
def test_what_cannot_be_measured_is_refused_in_a_line(folder, tmp_path, arguments, code, message):
    done = samtune("sharpness", folder / "sgd", *arguments, *QUICK, "-o", tmp_path)
    assert done.returncode == code, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_correlation_over_runs_has_its_interval_and_needs_spread():
    gaps = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    same = stats.kendall([2 * gap for gap in gaps], gaps)
    assert same.tau == pytest.approx(1)
    assert same.ci95 == pytest.approx((1, 1))
    low, high = stats.kendall([1.0, 3.0, 2.0, 4.0, 6.0, 5.0], gaps).ci95
    assert -1 <= low < 0.73 < high <= 1
    assert stats.kendall([1.0] * 6, gaps) == (None, None)


def test_numbers_of_very_different_size_keep_their_digits_in_text():
    one = {"label": "a", "step": 1, "loss": 1.23456e-5, "top1_error": 12.5}
    result = {"checkpoints": [one], "measures": {"m": ()}, "images": 4}
    assert report.text_tables(result)["Models"] == [{"model": "a", "step": 1, "loss": "1.235e-05", "error %": "12.5"}]
