"""Runs whose steps have one pass, along what the optimizer knows: that is in their checkpoints."""

import json

import pytest
import torch

from samtune.runs import checkpoint
from samtune.runs.metrics import read_metrics
from tests.support.fingerprint import fingerprint
from tests.support.small_run import resume, run


def interrupted(photos, folder, *settings, call):
    """The folder of a run that was stopped in a perturbation, and resumed."""
    broken = run(photos, folder, *settings, faults=[{"at": "perturb", "call": call, "do": "SIGTERM"}])
    assert broken.returncode == 75, broken.stderr
    done = resume(folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize(
    ("ascent", "more"),
    [("momentum", ("--opt", "adamw", "--rho", 0.5)), ("previous", ("--no-freeze-bn",))],
)
def test_a_resumed_run_equals_an_uninterrupted_one(ascent, more, photos, tmp_path):
    settings = ("--ascent", ascent, *more)
    whole = tmp_path / "whole"
    done = run(photos, whole, *settings, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["cost"]["sgd_equivalents"] == 1
    assert fingerprint(interrupted(photos, tmp_path / "parts", *settings, call=7)) == fingerprint(whole)


def test_a_rule_for_the_second_pass_goes_on_with_its_moving_mean_and_its_passes_are_counted(photos, tmp_path):
    whole = tmp_path / "whole"
    settings = ("--sam-when", "gradient:0.2")
    done = run(photos, whole, *settings, "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["steps"] < report["cost"]["forward_backward_passes"] < 2 * report["steps"]
    assert report["sam"]["when"] == "gradient:0.2"
    assert fingerprint(interrupted(photos, tmp_path / "parts", *settings, call=4)) == fingerprint(whole)


def test_the_previous_gradient_is_in_the_checkpoint_if_there_is_a_radius(photos, tmp_path):
    for rho in (0.05, 0):
        folder = tmp_path / f"rho{rho}"
        done = run(photos, folder, "--ascent", "previous", "--rho", rho, "--epochs", "2 steps")
        assert done.returncode == 0, done.stderr
        state = checkpoint.load_state((folder / "checkpoints" / "last").resolve())["optimizer"]
        kept = [values["previous_gradient"] for values in state.values() if "previous_gradient" in values]
        assert len(kept) == (len(state) if rho else 0)
        assert all(isinstance(g, torch.Tensor) and g.isfinite().all() for g in kept)


def test_a_batch_in_parts_has_one_perturbation(photos, tmp_path):
    """The parts of --global-batch-size are micro-batches; without dropout they change nothing."""
    losses = []
    for size in (8, 4):
        folder = tmp_path / str(size)
        more = ("--global-batch-size", 8, "--batch-size", size, "--drop", 0, "--epochs", "5 steps", "--freeze-bn")
        done = run(photos, folder, "--ascent", "momentum", *more, "--json")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["sam"]["m_images"] == 8
        losses.append([row["loss"] for row in read_metrics(folder) if row["split"] == "train"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
