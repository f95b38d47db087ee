"""--batch-size auto: the largest power of two that fits, found by trying; memory is a stand-in."""

import contextlib

import pytest
import torch

from samtune.config import loading
from samtune.distributed import collectives, device
from samtune.errors import OutOfMemory
from samtune.models.build import build_model
from samtune.models.training import allow_single_values
from samtune.sam.gradient import SAM
from samtune.train import batch_search
from samtune.train.batch_search import Found, resolve_batch_size, search
from tests.support.small_models import assert_same, state

ERRORS = {
    "the GPU's": lambda: torch.OutOfMemoryError("full"),
    "a library's": lambda: RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    "one that may be another": lambda: RuntimeError("GET was unable to find an engine to execute this computation"),
}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(device, "free_memory", lambda: None)  # it looks through all that the libraries made


@pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS)
@pytest.mark.parametrize("room", [0, 1, 2, 3, 16, 21, 1000])
@pytest.mark.parametrize("most", [1, 40, 64])
def test_the_largest_power_of_two_that_fits_is_found_with_its_rate(error, room, most):
    tried, shown = [], []

    def attempt(images):
        tried.append(images)
        if images > room:
            raise error()
        return images / (100 + images)  # seconds

    found = search(attempt, most, lambda *row: shown.append(row))
    powers = [2**k for k in range(10) if 2**k <= min(room, most)]
    assert found.images == max(powers, default=0)
    assert found.images_per_second == pytest.approx(100 + found.images if powers else 0)
    assert [images for images, _ in shown] == powers
    assert tried[: len(powers)] == powers
    assert len(tried) <= len(powers) + 1


def test_an_error_that_is_not_a_lack_of_memory_ends_the_search():
    def attempt(images):
        raise RuntimeError("shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="shapes"):
        search(attempt, 8, lambda *_: None)


class OnGpu:
    """Stands for parameters on a GPU, of which only the device is asked."""

    device = torch.device("cuda", 0)

    def parameters(self):
        yield self


@pytest.fixture
def net():
    torch.manual_seed(0)
    return build_model("test_resnet", classes=3, pretrained=False, img_size=32, drop=0.5)


def settings(**given):
    small = {"model": "test_resnet", "dataset": "any", "batch_size": "auto", "amp_dtype": "float32"}
    return loading.load(None, small | given)


def test_a_cpu_takes_the_default_and_says_so(net):
    config = resolve_batch_size(settings(), *net, 100, 1)
    assert config.batch_size == 16
    assert config.origins["batch_size"] == "derived: the default, on device cpu"
    given = settings(batch_size=7)
    assert resolve_batch_size(given, *net, 100, 1) is given


def test_what_is_found_is_the_batch_and_the_reason_has_its_rate(net, monkeypatch):
    asked = []

    def largest(model, config, info, most, progress, copies):
        asked.append((most, copies))
        return Found(32, 123.4)

    monkeypatch.setattr(batch_search, "largest_batch", largest)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "GPU one")
    config = resolve_batch_size(settings(opt="adamw"), OnGpu(), net[1], 100, 3)
    assert config.batch_size == 32
    assert config.origins["batch_size"] == "derived: the largest power of two for GPU one, 123 images/s"
    assert asked == [(33, 3)], "a third of the images; two copies for AdamW, one for the ranks"
    monkeypatch.setattr(batch_search, "largest_batch", lambda *_: Found(0, 0.0))
    with pytest.raises(OutOfMemory, match="no memory on GPU one for one image of 32 px"):
        resolve_batch_size(settings(), OnGpu(), net[1], 100, 1)


@pytest.mark.parametrize("freeze_bn", [True, False])
def test_the_search_takes_real_passes_and_leaves_the_model_as_it_was(net, monkeypatch, freeze_bn):
    model, info = net
    model.train()
    if not freeze_bn:
        allow_single_values(model)  # as a run does
    plain, sizes, spared = SAM.backward, [], []

    def full(self, loss, images, labels):
        assert images.shape[1:] == (3, 32, 32)
        sizes.append(len(images))
        if len(images) > 5:
            raise torch.OutOfMemoryError("full")
        return plain(self, loss, images, labels)

    @contextlib.contextmanager
    def limited(target, spare):
        spared.append(spare)
        yield

    monkeypatch.setattr(SAM, "backward", full)
    monkeypatch.setattr(device, "limited_memory", limited)
    before, generator = state(model), torch.get_rng_state()
    found = batch_search.largest_batch(model, settings(freeze_bn=freeze_bn), info, 100, lambda *_: None, copies=1)
    assert found.images == 4
    assert found.images_per_second > 0
    assert sizes == [1, 1, 2, 2, 4, 4, 8], "each twice: libraries choose their algorithms in the first one"
    assert spared == [0.1]
    assert_same(state(model), before)
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(w.grad is None for w in model.parameters())


def test_ranks_agree_on_the_smallest(net, monkeypatch):
    monkeypatch.setattr(device, "limited_memory", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(batch_search, "search", lambda *_: Found(64, 9.0))
    monkeypatch.setattr(collectives, "all_gather_object", lambda own: [own, Found(8, 5.0), Found(32, 7.0)])
    assert batch_search.largest_batch(*[net[0], settings(), net[1]], 100, lambda *_: None) == Found(8, 5.0)
