"""When a checkpoint is due, and what a thread writes while the run goes on."""

import errno
import os
import threading
from concurrent.futures import wait
from types import SimpleNamespace

import pytest
import torch

from samtune.config import loading
from samtune.config.duration import Duration
from samtune.errors import MachineError, Stopped
from samtune.runs import checkpoint
from samtune.runs.run_log import RunLog
from samtune.train import checkpointing
from samtune.train.checkpointing import CheckpointSaver
from samtune.train.host_copy import HostCopy
from samtune.train.setup import build_setup
from samtune.train.state import TrainState


def made(every, keep_at=()):
    config = SimpleNamespace(save_every=Duration.parse(every), keep_at=[*map(Duration.parse, keep_at)])
    return CheckpointSaver(
        SimpleNamespace(config=config, steps_per_epoch=10, total_steps=100, is_sharded=False), None, None
    )


@pytest.mark.parametrize(("every", "due"), [("4 steps", [4, 8, 12]), ("0.5 epochs", [5, 10]), ("6%", [6, 12])])
def test_steps_are_counted_from_the_beginning_of_the_run(every, due):
    """So that a run that goes on saves after the same steps."""
    assert [step for step in range(1, 13) if made(every).due(step)] == due


def test_checkpoints_to_keep_are_due_in_any_unit_and_the_last_step_is_one():
    chosen = made("50 steps", ["1 epochs", "25%", "3 steps", "400%"])
    assert [step for step in range(1, 101) if chosen.due(step)] == [3, 10, 25, 50, 100]


def test_minutes_are_counted_from_the_last_save(monkeypatch):
    now = 1000.0
    monkeypatch.setattr(checkpointing.time, "monotonic", lambda: now)
    chosen = made("10 minutes")
    now += 599
    assert not chosen.due(7)
    now += 1
    assert chosen.due(7)


# ------------------------------------------------------------------------------------------ written beside the training


@pytest.fixture(scope="module")
def setup(photos):
    """Of a small run with averaged weights and momentum."""
    small = {"model": "test_resnet", "dataset": str(photos), "img_size": 32, "batch_size": 8, "workers": 0}
    built = build_setup(loading.load(None, small | {"pretrained": False, "model_ema": True}))
    train_a_little(built)
    return built


def train_a_little(setup):
    """Change all that a checkpoint holds, in place."""
    for w in setup.model.parameters():
        w.grad = torch.ones_like(w)
    setup.optimizer.step()
    for value in (*setup.model.buffers(), *setup.average.module.state_dict().values()):
        value.add_(1)
    torch.rand(1)


@pytest.fixture
def log(tmp_path):
    log = RunLog.create(tmp_path / "r", "", {}, total_steps=9)
    yield log
    log.close()


class Gate:
    """Holds the thread before it writes, until the gate is opened."""

    def __init__(self, monkeypatch):
        self.reached, self._open = threading.Event(), threading.Event()
        write = checkpointing.write

        def held(*arguments):
            self.reached.set()
            assert self._open.wait(60)
            return write(*arguments)

        monkeypatch.setattr(checkpointing, "write", held)
        self.open = self._open.set


@pytest.fixture
def gate(monkeypatch):
    return Gate(monkeypatch)


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def state_after(step):
    return TrainState(step=step, evaluated_step=step, best=(0.5, 1.0), best_step=step)


def test_what_the_thread_writes_is_what_was_there_though_the_run_has_gone_on(setup, log, gate, tmp_path):
    with CheckpointSaver(setup, log, None) as saver:
        state = state_after(3)
        saver.save(state)
        whole = checkpointing.content(setup, state)
        at_once = checkpoint.save(  # on this thread, from the tensors themselves
            tmp_path / "at_once",
            step=3,
            timm_config={},
            about={},
            **whole,
        )
        train_a_little(setup)
        state.step, state.best_step, state.row.loss = 4, 4, 9.0
        gate.open()
    written, expected = contents(log.checkpoints / "step-000003"), contents(at_once)
    assert written.keys() == expected.keys()
    for name in ("model.safetensors", "ema/model.safetensors", "state.pt"):
        assert written[name] == expected[name], name
    assert checkpoint.load_state(at_once)["position"]["step"] == 3
    after = checkpoint.save(tmp_path / "after", step=4, timm_config={}, about={}, **checkpointing.content(setup, state))
    assert all(contents(after)[name] != expected[name] for name in ("model.safetensors", "state.pt"))


def test_nothing_of_it_counts_before_it_is_written(setup, log, gate):
    with CheckpointSaver(setup, log, None) as saver:
        saver.save(state_after(3))
        saver.check()  # does not wait
        assert gate.reached.wait(60)
        assert saver.newest is None
        assert list(log.checkpoints.iterdir()) == []
        gate.open()
        saver.wait()
        assert saver.newest == log.checkpoints / "step-000003"
        assert {path.name for path in log.checkpoints.iterdir()} == {"step-000003", "last", "best"}
        assert os.readlink(log.checkpoints / "last") == os.readlink(log.checkpoints / "best") == "step-000003"


def test_a_second_save_waits_for_the_first_whose_memory_it_takes(setup, log, gate, monkeypatch):
    with CheckpointSaver(setup, log, None) as saver:
        saver.save(state_after(1))
        expected = {name: value.clone() for name, value in setup.model.state_dict().items()}
        train_a_little(setup)
        wait = saver.wait
        monkeypatch.setattr(saver, "wait", lambda: (gate.open(), wait()))
        saver.save(state_after(2))
    weights = {}
    checkpoint.load_weights(weights.update, log.checkpoints / "step-000001" / "model.safetensors")
    assert all(torch.equal(weights[name], value) for name, value in expected.items())
    assert checkpoint.verify(log.checkpoints / "last")["step"] == 2


def test_what_looks_for_the_newest_checkpoint_waits_for_the_one_that_is_being_written(setup, log, gate, monkeypatch):
    """It would take its files for what a killed save left."""
    with CheckpointSaver(setup, log, None) as saver:
        saver.save(state_after(1))
        wait = saver.wait
        monkeypatch.setattr(saver, "wait", lambda: (gate.open(), wait()))
        assert saver.find_newest() == log.checkpoints / "step-000001"


@pytest.fixture
def full(monkeypatch):
    """The gate of a disk that is full."""
    monkeypatch.setattr(checkpointing, "write", raising(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))))
    return Gate(monkeypatch)


def raising(error):
    def function(*_):
        raise error

    return function


def test_a_full_disk_is_an_error_at_the_next_look_after_the_thread_has_met_it(setup, log, full):
    with CheckpointSaver(setup, log, log.checkpoints / "step-000001") as saver:
        saver.save(state_after(3))
        saver.check()
        full.open()
        wait([saver._written])
        with pytest.raises(MachineError) as raised:
            saver.check()
    assert raised.value.message == f"step 3 cannot be saved in {log.folder}"
    assert raised.value.cause == "No space left on device"
    assert raised.value.hint == "step-000001 is intact: make room, then go on with --resume"
    assert raised.value.exit_code == 8


def ending(setup, log, gate, error=None, then=lambda saver: None):
    """A run that saves step 3 and ends, perhaps by an error, while the thread writes."""
    with CheckpointSaver(setup, log, None) as saver:
        saver.save(state_after(3))
        gate.open()
        then(saver)
        if error is not None:
            raise error


def test_a_run_that_ends_waits_and_has_the_error_of_the_thread(setup, log, full):
    with pytest.raises(MachineError, match="step 3 cannot be saved"):
        ending(setup, log, full)


def test_an_error_of_the_run_is_raised_once_the_checkpoint_is_written(setup, log, gate):
    with pytest.raises(ZeroDivisionError):
        ending(setup, log, gate, ZeroDivisionError())
    assert checkpoint.verify(log.checkpoints / "last")["step"] == 3


def test_where_run_and_thread_both_fail_the_error_of_the_run_is_raised_and_the_other_one_logged(setup, log, full):
    with pytest.raises(ZeroDivisionError):
        ending(setup, log, full, ZeroDivisionError())
    noted = log.notes.read_text()
    assert "warning: step 3 cannot be saved" in noted
    assert "No space left on device" in noted


def test_a_save_before_an_error_is_tried_even_if_the_one_before_it_failed(setup, log, full):
    with pytest.raises(ZeroDivisionError):
        ending(setup, log, full, ZeroDivisionError(), lambda saver: saver.save_before_error(state_after(4)))
    noted = log.notes.read_text()
    assert "warning: step 3 cannot be saved" in noted
    assert "warning: step 4 cannot be saved" in noted


def test_a_second_signal_cuts_a_save_off_between_two_files(setup, log, monkeypatch):
    """And leaves what a kill leaves."""
    first, ended = threading.Event(), threading.Event()
    write = checkpoint._write

    def held(path, content):
        found = write(path, content)
        first.set()
        assert ended.wait(60)
        return found

    def signal(saver):
        assert first.wait(60)
        shutdown = saver._thread.shutdown
        monkeypatch.setattr(saver._thread, "shutdown", lambda: (ended.set(), shutdown()))

    monkeypatch.setattr(checkpoint, "_write", held)
    gate = SimpleNamespace(open=lambda: None)
    with pytest.raises(Stopped):
        ending(setup, log, gate, Stopped("stopped by a second signal", 143), signal)
    assert {path.name for path in (log.checkpoints / ".step-000003.part").iterdir()} == {"model.safetensors"}
    assert checkpoint.steps(log.checkpoints) == {}
    assert not any(thread.name.startswith("checkpoint") for thread in threading.enumerate())


# ------------------------------------------------------------------------------------------------------------ the copy


def test_a_copy_keeps_values_strides_and_what_shares_memory():
    whole = torch.arange(24.0)
    laid_out = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    given = {"tied": [whole, whole], "part": whole[4:10], "image": laid_out, "numbers": (1, None, "a"), "n": {2: 0.5}}
    copy = HostCopy()(given)
    tied, again = copy["tied"]
    assert torch.equal(tied, whole)
    assert torch.equal(copy["image"], laid_out)
    assert copy["image"].stride() == laid_out.stride()
    assert (copy["numbers"], copy["n"]) == ((1, None, "a"), {2: 0.5})
    whole.zero_()
    assert tied.sum() == 276
    tied.fill_(7)
    assert again.eq(7).all()
    assert copy["part"].eq(7).all()
    assert copy["part"].shape == (6,)


def test_the_next_copy_takes_the_memory_of_the_one_before():
    copy, values = HostCopy(), {"a": torch.ones(5), "b": torch.ones(7, dtype=torch.int64)}
    first = copy(values)
    second = copy({name: value + 1 for name, value in values.items()})
    assert {name: value.data_ptr() for name, value in first.items()} == {n: v.data_ptr() for n, v in second.items()}
    assert second["b"].tolist() == [2] * 7
    assert copy({"a": torch.ones(6), "b": torch.full((7,), 0.5)})["b"].tolist() == [0.5] * 7  # other sizes and types


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_copy_from_a_gpu_is_pinned_and_whole_when_it_is_returned():
    weights = torch.randn(4096, 4096, device="cuda")
    expected = weights.cpu()
    copy = HostCopy()({"w": weights})
    weights.zero_()
    assert copy["w"].is_pinned()
    assert torch.equal(copy["w"], expected)
