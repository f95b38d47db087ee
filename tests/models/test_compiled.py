"""--compile: the same steps as without it, the same weights and names, and the same masks in both passes."""

import tomllib

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from samtune import SAM
from samtune.config import loading
from samtune.data import source
from samtune.data.cache import Images
from samtune.distributed import device
from samtune.errors import MachineError
from samtune.models.compiled import _blocks, check_compiler, compile_blocks
from samtune.train.evaluation import evaluate
from tests.conftest import SMALL_MODEL, SmallNet, samtune
from tests.support.small_models import make_step, sgd, state

# What torch warns of within its own compiler.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute", "ignore:.*:DeprecationWarning")


@pytest.fixture(autouse=True)
def compiled_files(tmp_path, monkeypatch):
    """The folder for what the compiler makes; by default it would be one that outlasts the tests."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compiled"))


class Block(nn.Module):
    """A layer, and dropout that only a compiled block draws."""

    def __init__(self, width, drop):
        super().__init__()
        self.layer, self.drop = nn.Linear(width, width), nn.Dropout(drop)

    def forward(self, x):
        return self.drop(F.silu(self.layer(x)) + 2)


def small_net(drop):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Sequential(Block(6, drop), Block(6, drop)), nn.Flatten(), nn.Linear(6, 3))
    return net.train()


def batches(steps):
    rng = np.random.default_rng(3)
    return [
        (torch.from_numpy(rng.normal(size=(8, 6)).astype(np.float32)), torch.from_numpy(rng.integers(0, 3, 8)))
        for _ in range(steps)
    ]


@pytest.mark.parametrize(
    ("name", "count", "kind"),
    [
        ("efficientnet_b0", 16, "InvertedResidual"),
        ("resnet10t", 4, "BasicBlock"),
        ("test_vit", 6, "Block"),
        ("test_convnext", 4, "ConvNeXtStage"),
        ("swin_tiny_patch4_window7_224", 4, "SwinTransformerStage"),
        ("vgg11", 0, ""),
    ],
)
def test_the_blocks_of_a_model_are_what_it_calls_one_after_the_other(name, count, kind):
    with torch.device("meta"):
        found = list(_blocks(timm.create_model(name)))
    assert len(found) == count
    assert not found or type(found[-1]).__name__ == kind


def test_a_missing_compiler_is_an_error_at_the_start(monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv("CC", raising=False)
    check_compiler(torch.device("cpu"))
    monkeypatch.setenv("CXX", "none")  # torch would use it, and no other
    with pytest.raises(MachineError, match="none is not on the PATH"):
        check_compiler(torch.device("cpu"))
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(MachineError, match=r"no C\+\+ compiler\n  cause: g\+\+ is not on the PATH\n  hint: "):
        check_compiler(torch.device("cpu"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    with pytest.raises(MachineError, match=r"no C compiler\n  cause: gcc or clang is not"):
        check_compiler(torch.device("cuda"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MachineError, match="triton is not installed"):
        check_compiler(torch.device("cuda"))


def test_an_evaluation_neither_compiles_nor_tries_kernels(photos, monkeypatch):
    split = source.open_source(str(photos)).splits["test"]
    data_config = {"input_size": (3, 16, 16), "interpolation": "bicubic", "crop_pct": 0.9, "crop_mode": "center"}
    data_config |= {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)}
    config = loading.load(None, {"model": "any", "dataset": "any", "amp_dtype": "tf32", "workers": 0})
    net, seen, asked = SmallNet(classes=2), [], []
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    monkeypatch.setattr(device, "set_float32_arithmetic", lambda target, dtype: asked.append((target.type, dtype)))
    net.register_forward_hook(
        lambda *_: seen.append((torch.backends.cudnn.benchmark, torch._dynamo.eval_frame._stance.stance))
    )
    evaluate(net, Images(split), np.arange(16), "test", config, data_config, lambda *_: None, 8)
    assert seen == [(False, "force_eager")] * 2
    assert torch.backends.cudnn.benchmark
    assert torch._dynamo.eval_frame._stance.stance == "default"
    assert asked == [("cpu", "tf32")], "a run with tf32 is scored on a CPU, too"


@pytest.mark.slow
def test_compiled_steps_equal_plain_ones_within_rounding_and_names_stay():
    plain, compiled = small_net(0.0), small_net(0.0)
    compile_blocks(compiled)
    steps = [make_step(net, sgd(net), rho=0.1) for net in (plain, compiled)]
    for batch in batches(4):
        expected, found = (step(*batch) for step in steps)
        assert found.loss == pytest.approx(expected.loss, rel=1e-5)
        assert found.grad_norm == pytest.approx(expected.grad_norm, rel=1e-4)
    assert torch._dynamo.utils.counters["frames"]["ok"] > 0, "something was compiled"
    weights = state(compiled)
    assert weights.keys() == state(plain).keys()
    for name, value in state(plain).items():
        torch.testing.assert_close(weights[name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_masks_of_compiled_blocks_are_the_same_in_both_passes_and_new_in_each_step():
    net = small_net(0.5)
    compile_blocks(net)
    sam, seen = SAM(net, 0.01), []
    net[0].register_forward_hook(lambda module, inputs, output: seen.append(output.detach() == 0))
    for images, labels in batches(3):
        sam.backward(lambda x, y: F.cross_entropy(net(x), y), images, labels)
    assert len(seen) == 6
    assert 0.3 < seen[0].float().mean() < 0.7
    for first, second in zip(seen[::2], seen[1::2], strict=True):
        assert torch.equal(first, second)
    assert not torch.equal(seen[0], seen[2])


@pytest.mark.slow
def test_many_different_blocks_are_all_compiled_and_an_evaluation_compiles_nothing():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Sequential(*(Sized(n) for n in range(1, 13))))
    compile_blocks(net)
    counters = torch._dynamo.utils.counters
    before = counters["stats"]["unique_graphs"]
    with device.uncompiled():
        net(torch.ones(2, 1))
    assert counters["stats"]["unique_graphs"] == before
    net(torch.ones(2, 1))
    assert counters["stats"]["unique_graphs"] == before + 12, "more than torch's limit of eight"


class Sized(nn.Module):
    """n values -> n + 1."""

    def __init__(self, n):
        super().__init__()
        self.layer = nn.Linear(n, n + 1)

    def forward(self, x):
        return self.layer(x).relu()


@pytest.mark.slow
def test_a_compiled_run_is_resumed_as_one_and_its_checkpoint_needs_no_compiler(photos, tmp_path):
    flags = (*SMALL_MODEL, "--dataset", photos, "--batch-size", 8, "--output", tmp_path / "run", "--freeze-bn")
    flags = (*flags, "--epochs", "1 steps", "--rho", 0)  # the less is compiled, the better
    done = samtune("run", *flags, "--compile")
    assert done.returncode == 0, done.stderr
    assert ", compiled; " in done.stderr
    assert tomllib.loads((tmp_path / "run" / "config.toml").read_text())["compile"] is True
    refused = samtune("run", *flags, "--no-compile", "--resume")
    assert refused.returncode == 5
    assert "cannot change" in refused.stderr
    without = {"PATH": "", "CXX": "none"}
    assert samtune("eval", tmp_path / "run", env=without).returncode == 0
    refused = samtune("run", *flags[:-2], "--compile", "--output", tmp_path / "other", env=without)
    assert refused.returncode == 8, refused.stderr
    assert "no C++ compiler" in refused.stderr
    assert not (tmp_path / "other").exists()
