"""--average-tail: the mean of the weights over the last part of a run, its statistics, and --select average."""

import json
import signal
from functools import partial

import pytest
import safetensors.torch
import torch
from torch import nn
from torch.optim.swa_utils import update_bn

from samtune.config import loading
from samtune.data.loader import train_batches
from samtune.data.transforms import train_transform
from samtune.errors import UsageError
from samtune.models.training import WeightAverage, estimate_batch_norm
from samtune.predict.predictor import Predictor
from samtune.report import finished_run
from samtune.runs import checkpoint, predictions
from samtune.runs.metrics import read_metrics
from samtune.train.batch_plan import BatchPlan
from samtune.train.schedule import TrainingLength
from samtune.train.setup import build_setup
from tests.conftest import samtune
from tests.support.fingerprint import fingerprint
from tests.support.small_run import resume, run, step_of

TAIL = ("--no-model-ema", "--average-tail", "25%", "--select", "average", "--epochs", "20 steps", "--eval-every", 1)


def weights_at(folder, step, part=""):
    return safetensors.torch.load_file(folder / "checkpoints" / f"step-{step:06d}" / part / "model.safetensors")


def is_statistic(name):
    return "running_" in name


def mean(states):
    """In float64."""
    return {name: torch.stack([state[name].double() for state in states]).mean(0) for name in states[0]}


@pytest.fixture(scope="module")
def averaged(tmp_path_factory, photos):
    """A run of 20 steps in which batch norm updates; it keeps the checkpoint of each step."""
    folder = tmp_path_factory.mktemp("runs") / "tail"
    every = ("--save-every", "1 steps", "--keep-checkpoints", 20, "--rho", 1)
    done = run(photos, folder, *TAIL, *every, "--json")
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout), done.stderr


def test_it_is_the_mean_of_the_weights_of_exactly_the_last_steps_each_counting_once(averaged):
    folder, _, _ = averaged
    for step in range(1, 16):
        assert not (folder / "checkpoints" / f"step-{step:06d}" / "ema").exists(), step
    for step in range(16, 21):
        expected = mean([weights_at(folder, number) for number in range(16, step + 1)])
        found = weights_at(folder, step, "ema")
        for name, value in found.items():
            # Statistics are averaged, too, until they are estimated at the end; counters are those of the last step.
            if value.is_floating_point() and not (is_statistic(name) and step == 20):
                torch.testing.assert_close(value.double(), expected[name], rtol=1e-6, atol=1e-7)


def test_statistics_at_the_end_are_those_of_the_averaged_weights_on_the_first_batches(averaged):
    """By torch's update_bn, on batches read anew."""
    folder, _, _ = averaged
    stored = checkpoint.run_config(checkpoint.verify((folder / "checkpoints" / "last").resolve()))
    setup = build_setup(loading.load(folder / "config.toml", {"output": str(folder) + "-none"}))
    found = weights_at(folder, 20, "ema")
    setup.model.load_state_dict(found)
    transform = train_transform(setup.info.data_config, stored)
    steps = min(50, setup.steps_per_epoch)
    batches = train_batches(
        *(setup.train, setup.train_rows, transform),
        **{"batch_size": 8, "seed": stored.seed, "total_steps": steps, "workers": 0, "pin_memory": False},
    )
    update_bn((setup.update.prepare(images) for images, _ in batches), setup.model)
    before = mean([weights_at(folder, step) for step in range(16, 21)])
    names = [name for name in found if is_statistic(name)]
    assert names
    for name in names:
        torch.testing.assert_close(found[name], setup.model.state_dict()[name], rtol=1e-5, atol=1e-6)
    assert any(not torch.allclose(found[name].double(), before[name], rtol=1e-3) for name in names)


def test_the_predictions_are_those_of_the_average_and_the_report_uses_them(averaged):
    folder, result, _ = averaged
    table = predictions.read(folder / "predictions.parquet", result["dataset"]["classes"])
    assert table.split == "test"
    assert int((~table.correct).sum()) == result["test"]["wrong"]
    assert finished_run.read(folder, "tail").predictions is not None
    assert "predictions.parquet is not of the result" not in (folder / "report.md").read_text()
    assert result["ema"]["steps"] == 5


def test_a_run_that_ends_where_it_is_has_nothing_to_average(photos, tmp_path):
    folder = tmp_path / "r"
    given = ("--no-model-ema", "--average-tail", "25%", "--epochs", "8 steps", "--rho", 0)
    stopped = run(photos, folder, *given, faults=[{"at": "step", "call": 4, "do": "SIGTERM"}])
    assert stopped.returncode == 75, stopped.stderr
    step = step_of(folder)
    done = resume(folder, "--epochs", f"{step} steps", "--allow-change", "epochs")
    assert done.returncode == 5, done.stderr
    assert "none is left to average" in done.stderr


def test_the_average_is_the_result_and_what_eval_and_predict_take(averaged):
    folder, result, said = averaged
    assert result["selected"] == "average"
    about = {"kind": "tail", "start": 15, "steps": 5}
    assert {key: result["ema"][key] for key in about} == about
    assert "average mean over the last 5 steps" in said
    rows = read_metrics(folder)
    assert [row["step"] for row in rows if row["split"] == "val_ema"] == [20]
    for split in ("test", "val"):
        assert result[split] == result["ema"][split] | {"split": split}
        scored = json.loads(samtune("eval", folder, "--split", split, "--json").stdout)
        assert scored["ema"] is True
        for key in ("n", "wrong", "loss"):
            assert scored[key] == result[split][key]
    last = json.loads(samtune("eval", folder, "--checkpoint", "last", "--json").stdout)
    assert last["ema"] is False
    assert last["loss"] == result["test_by_checkpoint"]["last"]["loss"] != result["test"]["loss"]
    assert Predictor(folder).ema
    assert not Predictor(folder, ema=False).ema
    assert not Predictor((folder / "checkpoints" / "last").resolve()).ema
    page, words = (folder / "report.html").read_text(), (folder / "report.md").read_text()
    for text in (page, words):
        assert "the average of the weights at the end of the run (mean over the last 5 steps)" in text
    assert "last epoch" in words


def test_a_checkpoint_from_before_the_tail_has_no_average_and_says_so(averaged):
    folder, _, _ = averaged
    refused = samtune("eval", folder / "checkpoints" / "step-000015", "--ema")
    assert refused.returncode == 2
    assert "step 15 is before the last part of the run, --average-tail 25%" in refused.stderr


def test_averaging_leaves_the_run_itself_as_it_is(averaged, photos, tmp_path):
    folder, _, _ = averaged
    done = run(photos, tmp_path / "r", "--no-model-ema", "--epochs", "20 steps", "--rho", 1, "--no-html")
    assert done.returncode == 0, done.stderr
    last = [path / "checkpoints" / "last" / "model.safetensors" for path in (folder, tmp_path / "r")]
    assert last[0].read_bytes() == last[1].read_bytes()


@pytest.mark.parametrize(("call", "begins_in"), [(7, range(4, 7)), (19, range(16, 19))])
def test_a_run_that_is_killed_in_its_tail_or_before_goes_on_to_the_same_end(call, begins_in, photos, tmp_path):
    shorter = (*TAIL, "--no-html", "--save-every", "2 steps")
    assert run(photos, tmp_path / "whole", *shorter).returncode == 0
    fault = {"at": "step", "call": call, "when": "after", "do": "SIGKILL"}
    assert run(photos, tmp_path / "r", *shorter, faults=[fault]).returncode == -signal.SIGKILL
    assert step_of(tmp_path / "r") in begins_in
    done = resume(tmp_path / "r")
    assert done.returncode == 0, done.stderr
    assert "ema" in fingerprint(tmp_path / "r")
    assert fingerprint(tmp_path / "r") == fingerprint(tmp_path / "whole")


def test_two_ranks_have_the_average_and_the_statistics_of_one(photos, tmp_path):
    """On one rank the batch of 8 passes in two pieces of 4, which are those of the ranks."""
    shorter = (*TAIL, "--no-html", "--epochs", "6 steps", "--average-tail", "3 steps", "--drop", 0)
    two = run(photos, tmp_path / "two", *shorter, "--processes", 2, "--batch-size", 4)
    assert two.returncode == 0, two.stderr
    assert run(photos, tmp_path / "one", *shorter, "--batch-size", 8, "--m", 4).returncode == 0
    one, other = (weights_at(tmp_path / name, 6, "ema") for name in ("one", "two"))
    for name, value in one.items():
        if value.is_floating_point():
            torch.testing.assert_close(value, other[name], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_sharded_model_has_the_average_and_the_statistics_of_a_whole_one(photos, tmp_path):
    several = (*TAIL, "--no-html", "--epochs", "6 steps", "--processes", 2, "--batch-size", 4, "--drop", 0)
    assert run(photos, tmp_path / "whole", *several, "--m", "global").returncode == 0
    assert run(photos, tmp_path / "sharded", *several, "--shard").returncode == 0
    whole, sharded = (weights_at(tmp_path / name, 6, "ema") for name in ("whole", "sharded"))
    for name, value in whole.items():
        torch.testing.assert_close(value, sharded[name], rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------------------ the parts


def floats(net):
    return {name: value.clone() for name, value in net.state_dict().items() if value.is_floating_point()}


def moved(net, step):
    """The weights and statistics of the net after a step."""
    with torch.no_grad():
        for value in net.state_dict().values():
            if value.is_floating_point():
                value += step
    return floats(net)


def assert_mean(average, states):
    for name, expected in mean(states).items():
        torch.testing.assert_close(floats(average.module)[name].double(), expected)


def test_before_the_tail_there_is_no_average_and_a_step_that_was_skipped_counts(small_net):
    average = WeightAverage(small_net, start=3)
    states = []
    for step in range(1, 9):
        states.append(moved(small_net, step if step != 6 else 0))
        average.update(small_net, step, applied=step != 6)
        assert average.has_begun == (step > 3)
    assert average.count == 5
    assert_mean(average, states[3:])


def test_the_first_step_of_the_tail_is_taken_bit_for_bit_whatever_was_there(small_net):
    average = WeightAverage(small_net.float(), start=1)
    moved(small_net, 0.1)
    average.update(small_net, 1)
    state = moved(small_net, 0.3)
    average.update(small_net, 2)
    for name, value in floats(average.module).items():
        assert torch.equal(value, state[name]), name


def test_after_a_change_of_length_the_average_has_no_step_from_before_the_tail(small_net):
    """A run of 4 steps with a tail of 2 becomes one of 8."""
    average = WeightAverage(small_net, start=2)
    for step in range(1, 5):
        moved(small_net, step)
        average.update(small_net, step)
    average.start = 6
    states = []
    for step in range(5, 9):
        states.append(moved(small_net, step))
        average.update(small_net, step)
        assert average.has_begun == (step > 6)
    assert_mean(average, states[2:])


def test_statistics_are_estimated_as_by_torch_and_dropout_stays_off():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=0.3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)]
    ours, theirs = nn.Sequential(*layers, nn.Dropout(0.5)), nn.Sequential(*layers)
    batches = [3 + torch.randn(n, 3, 8, 8) for n in (4, 4, 2)]
    ours(100 * batches[0])  # statistics to forget
    before = torch.get_rng_state()
    estimate_batch_norm(ours, batches)
    assert torch.equal(torch.get_rng_state(), before)
    assert not any(module.training for module in ours.modules())
    assert layers[1].momentum == 0.3
    found = [buffer.clone() for buffer in ours.buffers()]
    ours(100 * batches[0])
    assert all(torch.equal(a, b) for a, b in zip(found, ours.buffers(), strict=True))
    update_bn(batches, theirs)
    for a, b in zip(found, theirs.buffers(), strict=True):
        assert torch.equal(a, b)


def length(**given):
    config = loading.load(None, {"model": "a", "dataset": "b", "batch_size": 8, "epochs": "20 steps"} | given)
    return TrainingLength.of(config, BatchPlan.of(config, 1, 80), 80)


@pytest.mark.parametrize(
    ("tail", "start"), [("25%", 15), ("1 epochs", 10), ("7 steps", 13), ("0.1%", 19), ("100%", 0), (None, 20)]
)
def test_the_tail_begins_after_this_step(tail, start):
    assert length(**({} if tail is None else {"average_tail": tail})).tail_start == start


def test_a_tail_that_is_longer_than_the_run_is_refused():
    with pytest.raises(UsageError, match="--average-tail 3 epochs is more than the run"):
        length(average_tail="3 epochs")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"average_tail": "25%", "model_ema": True}, "--average-tail and --model-ema contradict"),
        ({"select": "average"}, "--select average without an average"),
        ({"average_tail": "0%"}, "more than 0"),
        ({"average_tail": "10 minutes"}, "so that a repeated run is the same"),
    ],
)
def test_what_makes_no_sense_is_refused(given, said):
    with pytest.raises(UsageError, match=said):
        loading.load(None, {"model": "a", "dataset": "b"} | given)


def test_the_average_of_a_tail_is_scored_at_the_end_whichever_checkpoint_is_best(photos, tmp_path):
    often = ("--epochs", "8 steps", "--eval-every", "1 steps", "--select", "best", "--lr", 0.3, "--json")
    done = run(photos, tmp_path / "r", "--no-model-ema", "--average-tail", "2 steps", *often)
    assert done.returncode == 0, done.stderr
    result, rows = json.loads(done.stdout), read_metrics(tmp_path / "r")
    assert result["test_by_checkpoint"]["best"]["step"] < 7  # before the tail
    assert [row["step"] for row in rows if row["split"] == "val_ema"] == [7, 8]
    assert [(row["step"], row["checkpoint"]) for row in rows if row["split"] == "test_ema"] == [(8, "last")]
    assert result["ema"]["test"] is not None
    assert result["test"] == {
        key: value for key, value in result["test_by_checkpoint"]["best"].items() if key != "step"
    }
    assert checkpoint.open_weights(tmp_path / "r", "last", ema=True).weights.is_dir()
    refused = samtune("eval", tmp_path / "r", "--ema")
    assert refused.returncode == 2
    assert "--checkpoint last" in refused.stderr


def test_the_exponential_average_can_be_selected_too(photos, tmp_path):
    done = run(photos, tmp_path / "r", "--epochs", "3 steps", "--select", "average", "--no-test", "--json")
    result = json.loads(done.stdout)
    assert result["ema"]["kind"] == "exponential"
    assert result["val"] == result["ema"]["val"] | {"split": "val"}
    find = partial(checkpoint.open_weights, tmp_path / "r")
    assert find().weights == find(ema=True).weights != find("last").weights == find(ema=False).weights
