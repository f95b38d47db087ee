"""`samtune plan`: what it says of a run is what the run does; nothing is left behind."""

import json
import math
import re
import tempfile
import tomllib
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from torch import nn

from samtune.config import loading
from samtune.plan import measure
from samtune.plan import plan as plan_module
from samtune.plan.sample import Sampler, rows_with_pixels
from samtune.train import batch_search, run_data, setup
from samtune.train.batch_search import Found
from tests.conftest import SMALL_MODEL, samtune, write_image_folder

FLAGS = (
    *(*SMALL_MODEL, "--batch-size", 8, "--epochs", 3, "--sam-start", "50%", "--sam-every", 2, "--rho", 0.02),
    *("--eval-every", "4 steps", "--save-every", "5 steps"),
)


def plan(*arguments, **options):
    done = samtune("plan", *arguments, "--json", **options)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    """A plan, and the run that was planned: (plan, run folder, folder in which both were started)."""
    folder = tmp_path_factory.mktemp("planned")
    data = write_image_folder(folder / "pets", {"train": 24, "test": 8})
    work = folder / "work"
    work.mkdir()
    env = {"SAMTUNE_CACHE": str(folder / "cache")}
    before = plan(*FLAGS, "--dataset", data, "--output", work / "r1", env=env, cwd=work)
    assert list(work.iterdir()) == [], "a plan leaves nothing"
    assert not (folder / "cache").exists(), "nor decoded images"
    run = samtune("run", *FLAGS, "--dataset", data, "--output", work / "r1", env=env)
    assert run.returncode == 0, run.stderr
    return before, work / "r1", plan(*FLAGS, "--dataset", data, "--output", work / "r2", env=env, cwd=work)


def test_steps_passes_and_validations_are_those_of_the_run(planned):
    said, run, _ = planned
    report = json.loads((run / "report.json").read_text())
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    length = said["length"]
    assert length["steps"] == report["steps"]
    assert length["epochs"] == report["epochs"]
    assert length["passes"] == report["cost"]["forward_backward_passes"]
    assert report["steps"] < length["passes"] < 2 * report["steps"], "SAM in some of the steps"
    assert length["validations"] == sum(row["split"] == "val" for row in rows)
    assert said["sam"] == report["sam"]
    assert said["optimizer"] == report["optimizer"]
    assert {key: report["model"][key] for key in ("resolved", "parameters")}.items() <= said["model"].items()
    assert {key: report["dataset"][key] for key in ("train", "val", "test")}.items() <= said["dataset"].items()


def test_the_settings_are_those_of_the_run_with_their_reasons(planned):
    said, run, _ = planned
    text = (run / "config.toml").read_text()
    stored = tomllib.loads(text)
    for key in ("lr", "weight_decay", "rho", "batch_size", "epochs", "img_size", "amp_dtype", "workers"):
        setting = said["settings"][key]
        assert setting["value"] == stored[key], key
        line = next(line for line in text.splitlines() if line.startswith(f"{key} ="))
        assert line.endswith(setting["origin"]), key
    assert "from scratch" in said["settings"]["lr"]["origin"]
    assert said["settings"]["rho"]["origin"] == "flag"


def test_a_checkpoint_has_the_size_that_was_said(planned):
    said, run, _ = planned
    size = sum(path.stat().st_size for path in (run / "checkpoints" / "last").iterdir())
    assert said["disk"]["checkpoint_bytes"] == pytest.approx(size, abs=2000)  # paths, and numbers of more digits
    there = [path for path in (run / "checkpoints").glob("step-*") if not path.is_symlink()]
    assert len(there) <= said["disk"]["kept"]


def test_images_are_decoded_once_and_a_plan_knows_whether_they_are(planned):
    before, run, after = planned
    assert before["dataset"]["decoded"] == "once"
    assert before["dataset"]["decode_seconds"] > 0
    assert after["dataset"]["decoded"] == "kept"
    assert after["dataset"]["decode_seconds_per_image"] is None
    cached = sum(path.stat().st_size for path in (run.parents[1] / "cache").glob("*/pixels"))
    assert before["dataset"]["pixel_bytes"] == after["dataset"]["pixel_bytes"] == cached == 64 * 24 * 20 * 3


def test_the_times_add_up(planned):
    said, _, _ = planned
    parts = said["time"]
    rest = {"total", "train_seconds", "total_with_sgd"}
    assert parts["total"] == pytest.approx(sum(value for key, value in parts.items() if key not in rest))
    sam, sgd = said["step"]["sam"], said["step"]["sgd"]
    length = said["length"]
    plain = length["steps"] - length["sam_steps"]
    assert parts["steps"] == pytest.approx(length["sam_steps"] * sam["seconds"] + plain * sgd["seconds"])
    assert parts["total"] - parts["total_with_sgd"] == pytest.approx(
        length["sam_steps"] * (sam["seconds"] - sgd["seconds"])
    )
    assert said["step"]["cost_against_sgd"] == pytest.approx(sam["seconds"] / sgd["seconds"])
    assert min(sam["measured"], sgd["measured"]) >= 5
    assert 0 < parts["train_seconds"] < parts["total"]


def test_memory_is_four_bytes_a_number(planned):
    said, _, _ = planned
    model = timm.create_model("test_resnet", num_classes=2)
    parameters = sum(w.numel() for w in model.parameters())
    # Statistics of batch norm are float32, their counter is int64.
    buffers = sum(b.numel() * (8 if b.dtype == torch.int64 else 4) for b in model.buffers())
    memory = said["memory"]
    assert memory["weights"] == 4 * parameters + buffers
    assert memory["gradients"] == memory["weights_copy"] == memory["optimizer"] == 4 * parameters
    parts = ("weights", "gradients", "weights_copy", "optimizer", "ema", "activations")
    assert memory["total"] == sum(memory[part] for part in parts)
    assert memory["ema"] == 0
    assert memory["total"] < memory["measured_peak"] < said["device"]["memory_bytes"]
    assert said["batch"]["fits"] is None
    assert "GPU" in said["batch"]["fits_why"]


def test_text_has_every_topic_and_stays_apart_from_notes(tmp_path, photos):
    done = samtune("plan", *FLAGS, "--rho", 0, "--sam-start", "0%", "--dataset", photos, env={"COLUMNS": "60"})
    assert done.returncode == 0, done.stderr
    for topic in ("Model", "Data", "Settings", "Memory", "Speed", "Time", "Disk"):
        assert re.search(rf"^{topic}\b", done.stdout, re.M), topic
    assert "measuring steps of the plain optimizer" in done.stderr
    assert "step of SAM" not in done.stdout
    assert max(len(line) for line in done.stdout.splitlines() if line[:1] in "┌│└") <= 60


def test_several_ranks_share_a_batch_and_what_they_send_is_left_out(photos):
    said = plan(*FLAGS, "--dataset", photos, "--processes", 2, "--m", "group:2", "--model-ema", "--perturb", "norm")
    assert said["batch"] | {"images": 16, "per_device": 8, "devices": 2, "at_once": 8} == said["batch"]
    assert said["length"]["steps_per_epoch"] == 44 // 16
    assert said["settings"]["lr"]["value"] == float(f"{0.07 * math.sqrt(16 / 32):.3g}")
    assert "what they send each other" in " ".join(said["warnings"])
    assert said["memory"]["ema"] == said["memory"]["weights"]
    norms = (module for module in timm.create_model("test_resnet").modules() if "Norm" in type(module).__name__)
    assert said["memory"]["weights_copy"] == 4 * sum(w.numel() for module in norms for w in module.parameters())


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("--model", "efficientnet_b77", "--dataset", "{data}"), 4, "efficientnet_b7"),
        (("--model", "test_resnet", "--dataset", "{data}", "--rho", "-1"), 2, "greater than or equal to 0"),
        (("--model", "test_resnet", "--dataset", "./nowhere"), 3, "is not there"),
        (("--model", "test_resnet"), 2, "--dataset"),
        (("--model", "test_resnet", "--dataset", "{data}", "--output", "{data}"), 2, "the folder of the data set"),
        (("--model", "test_resnet", "--dataset", "{data}", "--resume"), 2, "--resume"),
        ((*SMALL_MODEL, "--dataset", "{data}", "--shard"), 2, "cannot be planned"),
        ((*SMALL_MODEL, "--dataset", "{data}", "--gpus", "64"), 8, "--gpus 64"),
        (("nowhere.toml",), 2, "nowhere.toml"),
    ],
)
def test_what_a_run_refuses_a_plan_refuses(photos, arguments, code, said):
    done = samtune("plan", *(str(a).format(data=photos) for a in arguments))
    assert done.returncode == code, done.stderr
    assert said in done.stderr
    assert done.stdout == ""
    assert "measuring" not in done.stderr


def set_up(photos, **flags):
    small = {"model": "test_resnet", "pretrained": False, "img_size": 32, "dataset": str(photos)}
    return setup.build_setup(loading.load(None, small | flags))


@pytest.fixture(scope="module")
def small_setup(photos):
    return set_up(photos, workers=0, batch_size=8)


def test_activations_are_four_bytes_for_each_value_that_is_kept(small_setup, monkeypatch):
    def kept(hidden, images):
        model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, hidden), nn.ReLU(), nn.Linear(hidden, 2))
        monkeypatch.setattr(small_setup, "model", model)
        return measure.activation_bytes(small_setup, images)

    assert kept(107, 5) - kept(7, 5) == 4 * 100 * 5  # the ReLU and the layer after it keep the same ones, once
    input_bytes = 4 * 3 * 32 * 32
    assert input_bytes + 4 * 7 <= kept(7, 6) - kept(7, 5) < input_bytes + 4 * 7 + 100  # and what the loss keeps
    assert kept(7, 5) < 5 * (input_bytes + 4 * 7 + 100) + 1000  # the weights are not counted again


def test_statistics_stay_where_activations_are_counted(photos):
    prepared = set_up(photos, freeze_bn=False)
    prepared.model.train()
    before = {name: value.clone() for name, value in prepared.model.named_buffers()}
    assert measure.activation_bytes(prepared, 4) > 4 * 4 * 3 * 32 * 32
    assert all(torch.equal(value, before[name]) for name, value in prepared.model.named_buffers())


def test_on_a_gpu_the_plan_has_the_batch_that_auto_would_be(small_setup, monkeypatch):
    asked, shown = [], []

    def largest(model, config, info, most, progress):
        asked.append((model is small_setup.model, config.batch_size, most))
        progress(4, 100.0)
        return Found(4, 100.0)

    assert plan_module._fits(small_setup, lambda *_: None)[0] is None, "not on a CPU"
    monkeypatch.setattr(small_setup, "device", torch.device("cuda", 0))
    monkeypatch.setattr(batch_search, "largest_batch", largest)
    images = len(small_setup.train_rows)
    assert plan_module._fits(small_setup, lambda *row: shown.append(row)) == (4, "the largest power of two")
    assert asked == [(True, 8, images)]
    assert shown == [("searching the batch that fits: so far", 4, images)]


def test_a_sample_stands_for_all(tmp_path, photos, monkeypatch):
    monkeypatch.setenv("SAMTUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("samtune.plan.sample._FEW", 5)
    monkeypatch.setattr("samtune.plan.sample._MANY", 9)
    flags = {"model": "test_resnet", "img_size": 32, "dataset": str(photos)}
    for more, states, sampled in (({}, {"once"}, 9), ({"cache_limit": 0.0}, {"every epoch"}, None)):
        sampler = Sampler(tmp_path / str(sampled), 1)
        (tmp_path / str(sampled)).mkdir()
        read = run_data.load_run_data(loading.load(None, flags | more), decode=sampler.look)
        assert {part.state for part in sampler.found} == states
        assert [part.images for part in sampler.found] == [len(read.train_rows), len(read.val_rows), 16]
        known = rows_with_pixels(read.train, read.train_rows)
        assert len(known) == (sampled or len(read.train_rows))
        assert set(known) <= set(read.train_rows)
        whole = run_data.load_run_data(loading.load(None, flags | {"cache_limit": 0.0}))
        row = int(known[-1])
        assert np.array_equal(read.train[row], whole.train[row])
    assert not (tmp_path / "cache").exists()


def test_a_signal_ends_a_plan_and_nothing_stays_behind(photos):
    def left():
        return {path.name for path in Path(tempfile.gettempdir()).glob("samtune-plan-*")}

    before = left()
    fault = {"at": "step", "call": 2, "do": "SIGINT"}
    done = samtune("plan", *FLAGS, "--dataset", photos, faults=[fault])
    assert done.returncode == 130, done.stderr
    assert "stopped by SIGINT" in done.stderr
    assert done.stdout == ""
    assert left() == before


def test_a_run_without_validation_has_its_test_alone(photos):
    said = plan(*SMALL_MODEL, "--batch-size", 8, "--epochs", 1, "--dataset", photos, "--no-val", "--cache-limit", 0)
    assert (said["length"]["validations"], said["length"]["checkpoints"]) == (0, 1)
    assert said["dataset"]["val"] == said["time"]["validation"] == said["time"]["decode"] == 0
    assert said["dataset"]["train"] == 48
    assert said["dataset"]["decoded"] == "every epoch"
    assert said["time"]["test"] == pytest.approx(16 / said["evaluation"]["images_per_second"])


def test_a_tail_is_averaged_in_memory_of_its_own_and_scored_only_where_it_has_begun(photos, monkeypatch):
    """Of the four validations only the last one has an average; the checkpoint is one of the end."""
    monkeypatch.setattr("samtune.plan.measure.evaluation", lambda *_: measure.Evaluating(per_image=1.0, first=0.0))
    settings = {"model": "test_resnet", "pretrained": False, "img_size": 32, "batch_size": 8, "workers": 0}
    settings |= {"dataset": str(photos), "epochs": 4}
    without, tail = (plan_module.plan(loading.load(None, settings | more)) for more in ({}, {"average_tail": "25%"}))
    assert tail["memory"]["ema"] == tail["memory"]["weights"]
    assert tail["disk"]["checkpoint_bytes"] - without["disk"]["checkpoint_bytes"] > tail["memory"]["weights"]
    rows = tail["dataset"]["val"]
    assert (without["time"]["validation"], tail["time"]["validation"]) == (4 * rows, 5 * rows)
