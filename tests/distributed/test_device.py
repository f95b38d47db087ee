"""What a device computes with, and how much of its memory. No GPU: torch.cuda answers as a test says."""

import contextlib

import pytest
import torch

from samtune.config import loading
from samtune.distributed import collectives, device
from samtune.errors import UsageError
from samtune.train import setup
from samtune.train.defaults import resolve_amp_dtype

CPU, GPU = torch.device("cpu"), torch.device("cuda", 1)


@pytest.fixture(autouse=True)
def flags():
    """Puts back what is global in torch."""
    backends = torch.backends
    before = backends.cuda.matmul.allow_tf32, backends.cudnn.allow_tf32, backends.cudnn.benchmark
    yield
    device.deterministic(False)
    backends.cuda.matmul.allow_tf32, backends.cudnn.allow_tf32, backends.cudnn.benchmark = before


@pytest.fixture
def gpu(monkeypatch):
    """Lets there be a GPU of a compute capability."""

    def be(capability):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda asked: {GPU: capability}[asked])
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda asked: {GPU: "GPU one"}[asked])

    return be


@pytest.mark.parametrize(
    ("capability", "dtype", "reason"),
    [
        ((6, 1), "float32", "6.1 has no fast 16-bit arithmetic"),
        ((7, 0), "float16", "7.0 has tensor cores"),
        ((7, 5), "float16", "no bfloat16"),
        ((8, 0), "bfloat16", "8.0 has it"),
        ((12, 0), "bfloat16", "12.0 has it"),
    ],
)
def test_auto_is_the_best_arithmetic_that_a_gpu_has_with_the_reason(gpu, capability, dtype, reason):
    gpu(capability)
    config = resolve_amp_dtype(loading.load(None, {"model": "a", "dataset": "b"}), GPU)
    assert config.amp_dtype == dtype
    assert config.origins["amp_dtype"].startswith("derived: ")
    assert reason in config.origins["amp_dtype"]
    assert (device.loss_scaler(CPU, dtype) is not None) == (dtype == "float16")


def float32_arithmetic():
    """What torch does with float32 in matrix products and convolutions, by its newer names."""
    return torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_float32_is_ieee_on_a_gpu_unless_tf32_is_asked_for(dtype):
    torch.backends.cudnn.allow_tf32 = True  # torch's own default
    device.set_float32_arithmetic(CPU, "float32")
    assert float32_arithmetic()[1] == "tf32", "a process that computes on a CPU keeps its flags"
    device.set_float32_arithmetic(GPU, "tf32")
    assert float32_arithmetic() == ("tf32", "tf32")
    assert torch.get_float32_matmul_precision() == "high", "what the compiler asks"
    device.set_float32_arithmetic(GPU, dtype)
    assert "tf32" not in float32_arithmetic()
    assert not torch.backends.cudnn.allow_tf32
    assert torch.get_float32_matmul_precision() == "highest"


def test_tf32_is_refused_where_there_is_none(gpu):
    config = loading.load(None, {"model": "a", "dataset": "b", "amp_dtype": "tf32"})
    with pytest.raises(UsageError, match="tf32 on a CPU"):
        resolve_amp_dtype(config, CPU)
    gpu((7, 5))
    with pytest.raises(UsageError, match="tf32 on GPU one"):
        resolve_amp_dtype(config, GPU)
    gpu((8, 6))
    assert resolve_amp_dtype(config, GPU) is config


def test_a_run_sets_the_arithmetic_before_its_model_computes(monkeypatch, photos):
    asked = []
    monkeypatch.setattr(device, "set_float32_arithmetic", lambda target, dtype: asked.append((target.type, dtype)))
    monkeypatch.setattr(setup, "build_model", lambda *_, **__: asked.append("model"))
    small = {"model": "test_resnet", "pretrained": False, "dataset": str(photos)}
    with contextlib.suppress(TypeError):
        setup.build_setup(loading.load(None, small))
    assert asked == [("cpu", "float32"), "model"]


def test_a_log_says_which_float32_is_meant():
    said = {dtype: device.arithmetic(GPU, dtype) for dtype in ("float32", "tf32", "bfloat16", "float16")}
    assert len(set(said.values())) == 4
    assert "IEEE" in said["float32"]
    assert "TF32" in said["tf32"]
    assert device.arithmetic(CPU, "float32") == "float32"
    assert device.library_versions(CPU) == {}
    assert device.library_versions(GPU).keys() == {"cuda", "cudnn"}


def test_deterministic_runs_neither_fill_new_tensors_nor_try_kernels():
    device.deterministic(False)
    assert torch.backends.cudnn.benchmark
    assert torch.utils.deterministic.fill_uninitialized_memory
    device.deterministic(True)
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.backends.cudnn.benchmark
    assert not torch.utils.deterministic.fill_uninitialized_memory


@pytest.mark.parametrize("before", [False, True])
def test_kernels_are_not_tried_within_a_block_that_says_so(before):
    torch.backends.cudnn.benchmark = before
    with contextlib.suppress(KeyError), device.cudnn_benchmark(False):
        assert not torch.backends.cudnn.benchmark
        raise KeyError
    assert torch.backends.cudnn.benchmark == before


def test_limited_memory_is_a_share_of_what_this_process_can_have(monkeypatch):
    set_to = []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (60, 100))  # 40 are in use
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 10)  # 10 of them by this process
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda *limit: set_to.append(limit))
    with contextlib.suppress(KeyError), device.limited_memory(GPU, 0.1):
        assert set_to == [(pytest.approx(0.63), GPU)]
        raise KeyError
    assert set_to[1:] == [(1.0, GPU)]


def test_a_gpu_has_as_many_loading_threads_as_cores_are_left():
    assert [device.loading_workers(GPU, cores)[0] for cores in (1, 2, 8, 17, 64)] == [1, 1, 7, 16, 16]
    assert "8 cores" in device.loading_workers(GPU, 8)[1]
    assert [device.loading_workers(CPU, cores)[0] for cores in (1, 64)] == [1, 1]


def test_the_gpu_of_a_process_is_its_default_without_other_ranks_too(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    collectives.init(CPU)
    assert chosen == []
    collectives.init(GPU)
    assert chosen == [GPU]


@pytest.mark.parametrize("version", [1, 2])
def test_the_limit_of_each_control_group_counts_without_the_page_cache(tmp_path, version):
    names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    mounted = tmp_path / ("sys/fs/cgroup" if version == 2 else "sys/fs/cgroup/memory")
    job = mounted / "slurm" / "job"
    job.mkdir(parents=True)
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/slurm/job\n" if version == 2 else "3:cpu:/\n2:memory:/slurm/job\n")
    for folder, limit in ((job, "1000"), (mounted / "slurm", "max"), (mounted, "5000")):
        (folder / names[0]).write_text(f"{limit}\n")
        (folder / names[1]).write_text("700\n")
        (folder / "memory.stat").write_text("inactive_file 100\ntotal_inactive_file 100\nother 5\n")
    assert [*device._container_memory(tmp_path)] == [(1000, 600), (5000, 600)]
    assert [*device._container_memory(tmp_path / "nothing")] == []
