"""One temperature on validation: what it is, where it is stored, and that predictions follow it."""

import csv
import io
import json
import shutil

import numpy as np
import pytest
import scipy.special

from samtune import Predictor
from samtune.errors import CheckpointError, DataError
from samtune.report import run_charts
from samtune.runs import checkpoint
from samtune.runs.predictions import Predictions
from samtune.train import temperature
from tests.conftest import SMALL_MODEL, samtune, write_image_folder

CLASSES = ("cat", "dog", "owl")


def drawn(t, n=20_000, classes=5, seed=0):
    """Logits, and labels that are as likely as softmax(logits / t) says."""
    generator = np.random.default_rng(seed)
    logits = generator.normal(0, 2, (n, classes)).astype(np.float32)
    p = scipy.special.softmax(logits.astype(float) / t, axis=1)
    labels = (p.cumsum(axis=1) < generator.random((n, 1))).sum(axis=1)
    return logits, labels


@pytest.mark.parametrize("t", [0.4, 1.0, 2.5])
def test_it_finds_the_temperature_that_labels_were_drawn_with(t):
    logits, labels = drawn(t)
    found = temperature.fit(logits, labels)
    assert found.temperature == pytest.approx(t, rel=0.05)
    assert found.n == len(labels)
    assert found.nll_after <= found.nll_before
    assert found.ece_after < 0.02
    assert (found.ece_before > 0.05) == (t != 1)


def test_at_the_optimum_mean_logits_of_labels_are_those_that_are_expected():
    """The derivative of the NLL by the inverse temperature is 0: E_p[z] = z of the label, in the mean."""
    logits, labels = drawn(1.7, n=500)
    t = temperature.fit(logits, labels).temperature
    expected = (scipy.special.softmax(logits.astype(float) / t, axis=1) * logits).sum(axis=1).mean()
    assert logits[np.arange(len(labels)), labels].mean() == pytest.approx(expected, abs=1e-5)


def test_logits_of_another_scale_have_a_temperature_of_that_scale():
    logits, labels = drawn(1.3, n=500)
    once, thrice = temperature.fit(logits, labels), temperature.fit(3 * logits, labels)
    assert thrice.temperature == pytest.approx(3 * once.temperature, rel=1e-4)
    assert thrice.nll_after == pytest.approx(once.nll_after)


def test_few_images_do_not_tell_a_temperature_from_1():
    """By chance one fit in twenty seems sure where the truth is 1; with many images, every other truth is told."""
    sure = [temperature.fit(*drawn(1.0, n=100, seed=seed)).is_sure for seed in range(100)]
    assert 1 <= sum(sure) <= 12
    assert temperature.fit(*drawn(1.5, n=2000)).is_sure


def test_where_all_is_right_there_is_no_temperature():
    with pytest.raises(DataError, match="all its 4 images are classified rightly"):
        temperature.fit(np.eye(4, dtype=np.float32), np.arange(4))


def test_logits_that_are_all_equal_keep_the_temperature_of_1():
    assert temperature.fit(np.zeros((6, 3), np.float32), np.array([0, 1, 2, 0, 1, 2])).temperature == 1


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    root = tmp_path_factory.mktemp("trained")
    data = write_image_folder(root / "data", {"train": 24, "test": 6}, CLASSES)
    arguments = ("--epochs", 1, "--val-fraction", 0.4, "--model-ema")
    done = samtune("run", *SMALL_MODEL, *arguments, "--dataset", data, "--output", root / "r")
    assert done.returncode == 0, done.stderr
    return root / "r"


def probabilities(run, *flags):
    done = samtune("predict", run, run.parent / "data" / "test", "--all", *flags)
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader(io.StringIO(done.stdout)))
    return np.array([[float(row[f"p_{name}"]) for name in CLASSES] for row in rows]), done


def test_eval_stores_it_and_predict_follows_it(trained):
    before, _ = probabilities(trained)
    done = samtune("eval", trained, "--temperature", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    fitted = result["temperature"]
    assert (result["split"], fitted["split"], fitted["n"]) == ("val", "val", result["n"])
    assert fitted["nll_before"] == pytest.approx(result["loss"], abs=1e-5)
    folder = checkpoint.find(trained)
    checkpoint.verify(folder)
    assert temperature.read(folder).temperature == fitted["temperature"] != 1
    after, done = probabilities(trained)
    assert f"temperature {fitted['temperature']:.3g}" in done.stderr
    assert np.abs(after - scipy.special.softmax(np.log(before) / fitted["temperature"], axis=1)).max() < 1e-5
    assert np.abs(after - before).max() > 1e-3
    plain, _ = probabilities(trained, "--no-temperature")
    assert np.array_equal(plain, before)
    assert Predictor(trained).temperature.temperature == fitted["temperature"]
    assert Predictor(trained, use_temperature=False).temperature is None
    assert Predictor(trained, ema=True).temperature is None  # it is of other weights
    assert samtune("eval", trained, "--temperature", "--ema").returncode == 0
    assert temperature.read(folder / "ema") is not None


def test_it_is_never_fitted_on_test_or_other_data(trained):
    for flags in (("--split", "test"), ("--split", "train"), ("--dataset", "mnist5k")):
        done = samtune("eval", trained, "--temperature", *flags)
        assert (done.returncode, done.stdout) == (2, "")


def test_a_damaged_one_is_named(trained, tmp_path):
    shutil.copytree(checkpoint.find(trained), tmp_path / "c")
    for text in ("{", "[]", '{"temperature": 1}', "null"):
        (tmp_path / "c" / temperature.NAME).write_text(text)
        with pytest.raises(CheckpointError, match=r"temperature\.json cannot be read"):
            Predictor(tmp_path / "c")
    Predictor(tmp_path / "c", use_temperature=False)


@pytest.mark.parametrize(
    ("probability", "smoothing", "has_val", "said", "unsaid"),
    [
        (0.7, 0.1, True, ["Label smoothing (0.1)", "93.33 %", "samtune eval RUN --temperature"], []),
        (0.7, 0.0, True, ["samtune eval RUN --temperature"], ["smoothing"]),
        (0.7, 0.1, False, ["held none out"], ["samtune eval"]),
        (1.0, 0.1, True, ["surer than it is right", "samtune eval RUN --temperature"], ["smoothing"]),
        (0.9, 0.1, True, [], ["smoothing", "--temperature"]),
    ],
)
def test_the_report_names_the_cause_and_the_command(probability, smoothing, has_val, said, unsaid):
    """Of a model that has nine of ten right."""
    labels = np.zeros(10, np.int64)
    found = Predictions("test", np.arange(10), labels, np.array([1] + [0] * 9), np.full(10, probability))
    note = run_charts.calibration(found, classes=3, smoothing=smoothing, has_val=has_val)["calibration_note"]
    assert all(text in note for text in said)
    assert not any(text in note for text in unsaid)
