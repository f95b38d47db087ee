"""Batches copied to a GPU one ahead: the order of operations, with stand-ins for torch's streams, and a real GPU."""

from contextlib import contextmanager

import numpy as np
import pytest
import torch

from samtune.data.loader import eval_batches
from samtune.data.prefetch import prefetch
from samtune.data.transforms import EvalTransform
from tests.data.test_loader import DATA_CONFIG
from tests.support.data_sets import look

GPU = torch.device("cuda", 0)


class Gpu:
    """Writes down what is asked of it: (stream, operation, of what)."""

    def __init__(self, monkeypatch):
        self.log, self.is_done, self.events = [], True, 0
        self.current = self.computing = Stream(self, "computing")
        monkeypatch.setattr(torch.cuda, "Stream", lambda _: Stream(self, "copying"))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda _: self.current)
        monkeypatch.setattr(torch.cuda, "stream", self.on)
        monkeypatch.setattr(torch.cuda, "Event", lambda blocking: Event(self))

    @contextmanager
    def on(self, stream):
        before, self.current = self.current, stream
        yield
        self.current = before


class Event:
    def __init__(self, gpu):
        self.gpu, self.number = gpu, gpu.events
        gpu.events += 1

    def query(self):
        return self.gpu.is_done

    def synchronize(self):
        self.gpu.log.append(("host", "wait", self.number))


class Stream:
    def __init__(self, gpu, name):
        self.gpu, self.name = gpu, name

    def record_event(self, event=None):
        event = event or Event(self.gpu)
        self.gpu.log.append((self.name, "record", event.number))
        return event

    def wait_event(self, event):
        self.gpu.log.append((self.name, "wait", event.number))


class Part:
    """Images or labels of a batch."""

    def __init__(self, gpu, name):
        self.gpu, self.name = gpu, name

    def to(self, target, non_blocking):
        assert target == GPU
        assert non_blocking
        self.gpu.log.append((self.gpu.current.name, "copy", self.name))
        return self

    def record_stream(self, stream):
        self.gpu.log.append((stream.name, "uses memory of", self.name))


class Loader:
    """Gives n batches, then raises `error` if there is one."""

    def __init__(self, gpu, n, error=None):
        self.gpu, self.n, self.error, self.given, self.is_closed = gpu, n, error, 0, False

    def __next__(self):
        if self.given == self.n:
            raise self.error or StopIteration
        self.given += 1
        return Part(self.gpu, f"images {self.given}"), Part(self.gpu, f"labels {self.given}")

    def close(self):
        self.is_closed = True


@pytest.fixture
def gpu(monkeypatch):
    return Gpu(monkeypatch)


def test_a_batch_is_copied_while_the_one_before_it_is_computed_with(gpu):
    batches = prefetch(Loader(gpu, 3), GPU)
    next(batches)
    assert gpu.log == [
        ("copying", "copy", "images 1"),
        ("copying", "copy", "labels 1"),
        ("copying", "record", 0),
        ("copying", "copy", "images 2"),
        ("copying", "copy", "labels 2"),
        ("copying", "record", 1),
        ("computing", "wait", 0),  # for its own copy alone
        ("computing", "uses memory of", "images 1"),
        ("computing", "uses memory of", "labels 1"),
    ]
    gpu.log.clear()
    images, _ = next(batches)
    assert images.name == "images 2"
    assert gpu.log == [
        ("computing", "record", 2),  # what was computed with the first batch
        ("copying", "copy", "images 3"),
        ("copying", "copy", "labels 3"),
        ("copying", "record", 3),
        ("computing", "wait", 1),
        ("computing", "uses memory of", "images 2"),
        ("computing", "uses memory of", "labels 2"),
    ]
    assert [images.name for images, _ in batches] == ["images 3"]


def test_the_host_waits_for_nothing_but_a_gpu_that_is_two_batches_behind(gpu):
    assert len(list(prefetch(Loader(gpu, 4), GPU))) == 4
    assert [who for who, *_ in gpu.log if who == "host"] == []
    gpu.is_done = False
    batches = prefetch(Loader(gpu, 9), GPU)
    for _ in range(2):
        next(batches)
    gpu.log.clear()
    next(batches)
    recorded = [what for who, operation, what in gpu.log if (who, operation) == ("computing", "record")]
    # The work with the first batch has to end before a fourth one is copied; that with the second goes on.
    assert gpu.log[:2] == [("computing", "record", recorded[0]), ("host", "wait", recorded[0] - 2)]
    assert gpu.log[2] == ("copying", "copy", "images 4")


def test_an_error_comes_with_its_batch_and_not_with_the_one_before(gpu):
    batches = prefetch(Loader(gpu, 2, ValueError("broken")), GPU)
    assert [next(batches)[0].name, next(batches)[0].name] == ["images 1", "images 2"]
    with pytest.raises(ValueError, match="broken"):
        next(batches)
    with pytest.raises(ValueError, match="broken"):
        next(prefetch(Loader(gpu, 0, ValueError("broken")), GPU))
    assert list(prefetch(Loader(gpu, 0), GPU)) == []


def test_who_stops_asking_ends_the_loader_too(gpu):
    loaded = Loader(gpu, 9)
    batches = prefetch(loaded, GPU)
    next(batches)
    batches.close()
    assert loaded.is_closed
    assert loaded.given == 2


def test_on_a_cpu_batches_are_what_the_loader_gives():
    batches = iter(())
    assert prefetch(batches, torch.device("cpu")) is batches


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_batches_arrive_whole_while_it_is_busy(split):
    """The work with each batch takes longer than the copies of the next ones, and is read at the end."""
    images, rows = look(split), np.tile(np.arange(len(split)), 20)

    def loaded():
        return eval_batches(images, rows, EvalTransform(DATA_CONFIG), batch_size=16, workers=2, pin_memory=True)

    expected = [(pictures.clone(), labels.clone()) for pictures, labels in loaded()]
    busy = torch.randn(4096, 4096, device=GPU)
    found = []
    for pictures, labels in prefetch(loaded(), GPU):
        for _ in range(5):
            busy = (busy @ busy).clamp(-1, 1)
        late = (0 * busy[0, 0]).long()  # known when the work is done
        found.append((pictures + late, labels + late))
        del pictures, labels
    assert len(found) == len(expected)
    for (pictures, labels), (others, other_labels) in zip(found, expected, strict=True):
        assert torch.equal(pictures.cpu(), others.long())
        assert torch.equal(labels.cpu(), other_labels)
