"""Checkpoints: whole or not there, and at home in timm."""

import json
import os
import shutil

import pytest
import timm
import torch
from safetensors.torch import load_file

from samtune.config.run_config import RunConfig
from samtune.errors import CheckpointError
from samtune.models.build import build_model
from samtune.models.timm_format import load_checkpoint, timm_config
from samtune.models.training import WeightAverage
from samtune.models.weights import locate
from samtune.runs import checkpoint
from tests.conftest import Bomb

NAMES = ("cat", "dog", "owl")


@pytest.fixture(scope="module")
def model_and_info():
    return build_model("tf_efficientnet_lite0", classes=3, pretrained=False, img_size=64)


def save(root, model_and_info, step, *, about=None, **more):
    model, info = model_and_info
    config = timm_config(model, info, NAMES)
    return checkpoint.save(root, model.state_dict(), step, timm_config=config, about=about or {"note": "x"}, **more)


def test_timm_loads_a_checkpoint_with_the_same_logits_and_the_same_preprocessing(tmp_path, model_and_info):
    folder = save(tmp_path, model_and_info, 12)
    model, info = model_and_info
    loaded = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(loaded(images), model.eval()(images))
    assert load_checkpoint(folder)[1] == info.data_config
    assert list(timm.data.resolve_model_data_config(loaded)["input_size"]) == [3, 64, 64]
    assert loaded.pretrained_cfg["label_names"] == list(NAMES)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "resnet18"])
def test_other_architectures_load_too(tmp_path, name):
    model, info = build_model(name, classes=3, pretrained=False, img_size=96)
    loaded, data_config = load_checkpoint(save(tmp_path, (model, info), 1))
    images = torch.randn(1, 3, 96, 96)
    with torch.no_grad():
        assert torch.equal(loaded(images), model.eval()(images))
    assert data_config["input_size"] == (3, 96, 96)


def test_the_newest_ones_stay_and_what_last_and_best_mean(tmp_path, model_and_info):
    for step in range(1, 7):
        folder = save(tmp_path, model_and_info, step)
        if step == 2:
            checkpoint.update_link(tmp_path, "best", folder)
        checkpoint.update_link(tmp_path, "last", folder)
        checkpoint.prune(tmp_path, folder, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best", "last", "step-000002", "step-000005", "step-000006"]
    assert checkpoint.verify(tmp_path / "last")["step"] == 6
    assert checkpoint.verify(tmp_path / "best")["step"] == 2


def test_weights_that_share_memory_are_saved_each(tmp_path):
    whole = torch.arange(6.0)
    folder = checkpoint.save(tmp_path, {"a": whole, "b": whole, "c": whole[:3]}, 1, timm_config={}, about={})
    loaded = load_file(folder / "model.safetensors")
    assert {key: len(value) for key, value in loaded.items()} == {"a": 6, "b": 6, "c": 3}
    assert all(torch.equal(value, whole[: len(value)]) for value in loaded.values())


@pytest.mark.parametrize("left", ["links", "nothing", "dangling links", "empty files"])
@pytest.mark.parametrize("select", ["last", "best"])
def test_without_links_last_is_the_latest_and_best_is_what_it_says(tmp_path, model_and_info, left, select):
    checkpoints = tmp_path / "checkpoints"
    config = RunConfig(model="tf_efficientnet_lite0", dataset="d", select=select).model_dump(mode="json")
    for step in (2, 4, 10):
        save(checkpoints, model_and_info, step, about={"config": config}, state={"position": {"best_step": 4}})
    for name, step in (("last", 10), ("best", 4)):
        if left == "links":
            checkpoint.update_link(checkpoints, name, checkpoints / f"step-{step:06d}")
        elif left == "dangling links":
            (checkpoints / name).symlink_to("/nowhere/step-000002")
        elif left == "empty files":
            (checkpoints / name).touch()
    assert checkpoint.find(tmp_path, "last").resolve().name == "step-000010"
    assert checkpoint.find(tmp_path, "best").resolve().name == "step-000004"
    assert checkpoint.find(tmp_path).resolve().name == ("step-000010" if select == "last" else "step-000004")
    assert locate(tmp_path).path.parent == checkpoint.find(tmp_path)  # as --weights has it
    if left == "nothing":
        shutil.rmtree(checkpoints / "step-000004")
        with pytest.raises(CheckpointError, match="no best checkpoint"):
            checkpoint.find(tmp_path, "best")


def test_a_run_that_went_back_drops_what_was_newer(tmp_path, model_and_info):
    for step in (10, 20, 30, 15):
        folder = save(tmp_path, model_and_info, step)
    gone = checkpoint.prune(tmp_path, folder, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000010", "step-000015"]
    assert {path.name for path in gone} == {"step-000020", "step-000030"}


def test_a_checkpoint_survives_moving_its_run_folder(tmp_path, model_and_info):
    checkpoint.update_link(tmp_path / "a", "last", save(tmp_path / "a", model_and_info, 1))
    (tmp_path / "a").rename(tmp_path / "b")
    assert checkpoint.verify(tmp_path / "b" / "last")["step"] == 1


def test_what_is_no_checkpoint_says_what_it_is(tmp_path, model_and_info):
    save(tmp_path / "runs" / "r1" / "checkpoints", model_and_info, 3)
    (tmp_path / "runs" / "r1" / "config.toml").touch()
    with pytest.raises(CheckpointError, match="is a folder of runs") as raised:
        checkpoint.locate(tmp_path / "runs")
    assert raised.value.cause == "r1"
    folder = checkpoint.locate(tmp_path / "runs" / "r1" / "checkpoints", "last")
    assert checkpoint.verify(folder)["step"] == 3
    (folder / "manifest.json").rename(tmp_path / "manifest.json")
    with pytest.raises(CheckpointError, match="is no checkpoint of a run"):
        checkpoint.locate(folder)


def test_one_flipped_bit_is_seen(tmp_path, model_and_info):
    folder = save(tmp_path, model_and_info, 1)
    flip(folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="damaged") as error:
        checkpoint.verify(folder)
    assert "model.safetensors" in error.value.cause


@pytest.mark.parametrize("name", ["model.safetensors", "manifest.json", "config.json"])
def test_a_missing_file_is_named(tmp_path, model_and_info, name):
    folder = save(tmp_path, model_and_info, 1)
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match="not complete") as error:
        checkpoint.verify(folder)
    assert name in error.value.cause


def test_an_empty_manifest_is_refused(tmp_path, model_and_info):
    folder = save(tmp_path, model_and_info, 1)
    (folder / "manifest.json").write_text("")
    with pytest.raises(CheckpointError, match="no valid manifest"):
        checkpoint.verify(folder)


def test_a_save_that_was_cut_off_leaves_nothing_behind_after_the_next(tmp_path, model_and_info, monkeypatch):
    def cut_off(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_sync", cut_off)
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path, model_and_info, 1)
    assert not list(tmp_path.glob("step-*"))
    assert [p.name for p in checkpoint.remove_leftovers(tmp_path)] == [".step-000001.part"]
    save(tmp_path, model_and_info, 1)
    assert [p.name for p in tmp_path.iterdir()] == ["step-000001"]


def test_a_disk_that_gives_back_something_else_is_an_error_of_the_disk_and_leaves_nothing(
    tmp_path, model_and_info, monkeypatch
):
    sums = iter(["not what was written"])
    monkeypatch.setattr(checkpoint, "_sha256", lambda path: next(sums))
    with pytest.raises(OSError, match="not what is read"):
        save(tmp_path, model_and_info, 1)
    assert list(tmp_path.iterdir()) == []


def test_the_manifest_lists_every_other_file_with_its_size(tmp_path, model_and_info):
    folder = save(tmp_path, model_and_info, 1)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["files"].keys() == {"model.safetensors", "config.json"}
    assert all((folder / n).stat().st_size == f["size"] for n, f in manifest["files"].items())
    assert manifest["note"] == "x"


def test_the_averaged_model_lies_beside_it_and_loads_in_timm(tmp_path, model_and_info):
    model, _ = model_and_info
    averaged = WeightAverage(model, 0.9).module
    with torch.no_grad():
        averaged.classifier.bias.add_(torch.arange(3.0))
    folder = save(tmp_path, model_and_info, 1, ema=averaged.state_dict())
    loaded = timm.create_model(f"local-dir:{folder / 'ema'}", pretrained=True).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(loaded(images), averaged(images))
        assert not torch.equal(loaded(images), model.eval()(images))


def test_the_newest_valid_one_is_found_by_its_step_whatever_is_broken(tmp_path, model_and_info):
    for step in (9, 10, 11, 12):
        save(tmp_path, model_and_info, step)
    os.utime(tmp_path / "step-000009")  # as if a clock had been set back
    (tmp_path / "last").symlink_to("step-000099")
    (tmp_path / "step-000012" / "manifest.json").unlink()
    flip(tmp_path / "step-000011" / "model.safetensors")
    found, damage = checkpoint.newest_valid(tmp_path)
    assert found == tmp_path / "step-000010"
    assert ["step-000012" in damage[0].message, "step-000011" in damage[1].message] == [True, True]


def test_a_checkpoint_is_hardly_larger_than_weights_optimizer_and_average(tmp_path, model_and_info):
    model, _ = model_and_info
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for w in model.parameters():
        w.grad = torch.zeros_like(w)
    optimizer.step()
    state = {"optimizer": optimizer.state_dict()["state"]}
    folder = save(tmp_path, model_and_info, 1, ema=WeightAverage(model, 0.9).module.state_dict(), state=state)
    written = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    momentum = sum(w.numel() * 4 for w in model.parameters())
    assert written <= 1.05 * (2 * sum(t.numel() * t.element_size() for t in model.state_dict().values()) + momentum)


def test_a_state_that_holds_code_is_refused_and_nothing_is_executed(tmp_path, model_and_info):
    folder = save(tmp_path, model_and_info, 1)
    torch.save({"position": Bomb(tmp_path / "executed")}, folder / "state.pt")
    with pytest.raises(CheckpointError, match="cannot be read") as error:
        checkpoint.load_state(folder)
    assert "nothing of it was executed" in error.value.hint
    assert not (tmp_path / "executed").exists()


def flip(path):
    """One bit, in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
