"""Runs of the networks for CIFAR: exact resume with shaken branches, and every command on what a run leaves."""

import json

import pytest
import safetensors.torch
import timm
import torch

import samtune.models  # registers the networks
from tests.conftest import samtune
from tests.support.fingerprint import fingerprint
from tests.support.small_run import resume, run

SIBLINGS = {
    "shake26_2x96d": {"blocks": 1, "width": 16},
    "pyramidnet272_a200_shakedrop": {"blocks": 1, "alpha": 48},
    "wrn28_10": {"blocks": 1, "widths": [16, 32, 64]},
}


def sibling(folder, name):
    """A folder for `--model local-dir:FOLDER` with a small network of this architecture."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=2, **SIBLINGS[name])
    folder.mkdir()
    safetensors.torch.save_file(model.state_dict(), folder / "model.safetensors")
    config = {"architecture": name, "num_classes": 2, "model_args": SIBLINGS[name], "pretrained_cfg": {}}
    (folder / "config.json").write_text(json.dumps(config))
    return ("--model", f"local-dir:{folder}", "--pretrained", "--no-freeze-bn")


@pytest.mark.parametrize(
    "name", ["shake26_2x96d", pytest.param("pyramidnet272_a200_shakedrop", marks=pytest.mark.slow)]
)
def test_a_resumed_run_with_shaken_branches_equals_an_uninterrupted_one(name, photos, tmp_path):
    settings = sibling(tmp_path / "model", name)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run(photos, whole, *settings).returncode == 0
    broken = run(photos, parts, *settings, faults=[{"at": "perturb", "call": 7, "do": "SIGTERM"}])
    assert broken.returncode == 75, broken.stderr
    done = resume(parts)
    assert done.returncode == 0, done.stderr
    assert fingerprint(parts) == fingerprint(whole)


@pytest.mark.slow
@pytest.mark.parametrize("name", SIBLINGS)
def test_every_command_takes_what_a_run_leaves(name, photos, tmp_path):
    folder = tmp_path / "r"
    options = ("--perturb", "norm", "--grad-checkpointing", "--m", 4, "--processes", 2, "--batch-size", 4)
    done = run(photos, folder, *sibling(tmp_path / "model", name), *options, "--json")
    assert done.returncode == 0, done.stderr
    for command in (
        ("eval", folder, "--split", "test"),
        ("predict", folder, next(photos.glob("test/*/*.png"))),
        ("report", folder),
        ("export", folder, "--to", "timm"),
        ("export", folder, "--to", "torch"),
    ):
        done = samtune(*command)
        assert done.returncode == 0, done.stderr
    config = json.loads((folder / "export" / "timm" / "config.json").read_text())
    assert (config["architecture"], config["model_args"]) == (name, SIBLINGS[name])
    model = timm.create_model(f"local-dir:{folder / 'export' / 'timm'}", pretrained=True)
    weights = safetensors.torch.load_file(folder / "checkpoints" / "last" / "model.safetensors")
    assert model.state_dict().keys() == weights.keys()
