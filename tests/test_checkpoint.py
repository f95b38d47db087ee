"""Checkpoints: whole or not there, and at home in timm."""

import json

import pytest
import timm
import torch

from samtune import checkpoint, models
from samtune.errors import CheckpointError

NAMES = ("cat", "dog", "owl")


@pytest.fixture(scope="module")
def model_and_info():
    return models.build("tf_efficientnet_lite0", classes=3, pretrained=False, img_size=64)


def save(root, model_and_info, step):
    model, info = model_and_info
    return checkpoint.save(root, model, step, timm_config=models.timm_config(model, info, NAMES), about={"note": "x"})


def test_timm_loads_a_checkpoint_with_the_same_logits_and_the_same_preprocessing(tmp_path, model_and_info):
    folder = save(tmp_path, model_and_info, 12)
    model, info = model_and_info
    loaded = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(loaded(images), model.eval()(images))
    assert models.load_checkpoint(folder)[1] == info.data_config
    assert list(timm.data.resolve_model_data_config(loaded)["input_size"]) == [3, 64, 64]
    assert loaded.pretrained_cfg["label_names"] == list(NAMES)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "resnet18"])
def test_other_architectures_load_too(tmp_path, name):
    model, info = models.build(name, classes=3, pretrained=False, img_size=96)
    folder = checkpoint.save(tmp_path, model, 1, timm_config=models.timm_config(model, info, NAMES), about={})
    loaded, data_config = models.load_checkpoint(folder)
    images = torch.randn(1, 3, 96, 96)
    with torch.no_grad():
        assert torch.equal(loaded(images), model.eval()(images))
    assert data_config["input_size"] == (3, 96, 96)


def test_pointers_move_and_what_nothing_points_to_is_deleted(tmp_path, model_and_info):
    first = save(tmp_path, model_and_info, 1)
    checkpoint.point(tmp_path, "best", first)
    checkpoint.point(tmp_path, "last", first)
    for step in (2, 3):
        checkpoint.point(tmp_path, "last", save(tmp_path, model_and_info, step))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best", "last", "step-000001", "step-000003"]
    assert checkpoint.verify(tmp_path / "last")["step"] == 3
    assert checkpoint.verify(tmp_path / "best")["step"] == 1


def test_a_checkpoint_survives_moving_its_run_folder(tmp_path, model_and_info):
    checkpoint.point(tmp_path / "a", "last", save(tmp_path / "a", model_and_info, 1))
    (tmp_path / "a").rename(tmp_path / "b")
    assert checkpoint.verify(tmp_path / "b" / "last")["step"] == 1


def test_one_flipped_bit_is_seen(tmp_path, model_and_info):
    folder = save(tmp_path, model_and_info, 1)
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1000] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    with pytest.raises(CheckpointError, match="damaged") as error:
        checkpoint.verify(folder)
    assert "model.safetensors" in error.value.why


@pytest.mark.parametrize("name", ["model.safetensors", "manifest.json", "config.json"])
def test_a_missing_file_is_named(tmp_path, model_and_info, name):
    folder = save(tmp_path, model_and_info, 1)
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match="not complete") as error:
        checkpoint.verify(folder)
    assert name in error.value.why


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
    save(tmp_path, model_and_info, 1)
    assert [p.name for p in tmp_path.iterdir()] == ["step-000001"]


def test_the_manifest_lists_every_other_file_with_its_size(tmp_path, model_and_info):
    folder = save(tmp_path, model_and_info, 1)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["files"].keys() == {"model.safetensors", "config.json"}
    assert all((folder / n).stat().st_size == f["size"] for n, f in manifest["files"].items())
    assert manifest["note"] == "x"
