"""A run's own steps on a GPU that is not there: python -m tests.support.fake_cuda [--json | --record]

`emulate` builds a run with `build_setup` and trains it with `Trainer.train`, on torch's fake tensors: they have shapes,
strides and the device cuda:0, but no values. `DeviceWatch` notes what the GPU would be asked for. Only the data, the
run folder and torch's calls of the driver are replaced.

What this cannot show: numbers, time, kernels that fail, the inside of an operation, DistributedDataParallel, recorded
graphs.

The module prints a table of all settings; --json prints it as JSON, --record the operations of each setting, as
tests/train/test_fake_cuda.py stores them.
"""

import argparse
import json
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.optim import optimizer
from torch.utils import _foreach_utils

from samtune.config.loading import load
from samtune.distributed import collectives, device, signals
from samtune.train import evaluation, loop, setup
from samtune.train.run_data import RunData
from samtune.train.state import TrainState
from tests.support.device_watch import DeviceWatch, Seen
from tests.support.fake_backward import run_backward

CUDA = torch.device("cuda", 0)
CLASSES = 102
_ROWS = 40  # of a split: an evaluation has three batches
# What a step reads of the GPU, in its order: sums of loss, wrong and n; ranks without memory, and asked to stop; norm.
_DECISION = [2.0, 1.0, 8.0, 0.0, 0.0, 3.0]
# What a run may switch for the whole process.
_SWITCHES = [
    *((torch.backends.cudnn, name) for name in ("benchmark", "deterministic")),
    *((backend, "allow_tf32") for backend in (torch.backends.cudnn, torch.backends.cuda.matmul)),
]

_BASE: Mapping[str, Any] = {
    "model": "test_efficientnet",
    "img_size": 64,
    "batch_size": 8,
    "dataset": "none",
    "epochs": "2 steps",  # the first makes what stays: only the second is looked at
    "workers": 0,
    "output": "none",
    # Without pretrained weights the defaults are others.
    "pretrained": False,
    "freeze_bn": True,
    "head_lr_factor": 35.0,
    "warmup_epochs": 0,
    "drop": 0.2,
    "smoothing": 0.1,
    "clip_grad": 1.0,
    "graphs": "off",
}
SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "default": {},
    "rho 0": {"rho": 0.0},
    "no clipping": {"clip_grad": 0.0},
    "smoothing 0": {"smoothing": 0.0},
    "p 1": {"p": 1.0},
    "p 4": {"p": 4.0},
    "p inf": {"p": "inf"},
    "adaptive": {"adaptive": True},
    "norm alone": {"perturb": "norm"},
    "head rho": {"head_rho_factor": 0.5},
    "ascent in 2 steps": {"ascent_steps": 2},
    "ascent on half": {"ascent_fraction": 0.5},
    "momentum": {"ascent": "momentum"},
    "previous gradient": {"ascent": "previous"},
    "m in pieces": {"m": 4},
    "micro-batches": {"micro_batch": 4},
    "accumulation": {"global_batch_size": 16, "batch_size": 8},
    "mixup, cutmix": {"mixup": 0.2, "cutmix": 1.0},
    "average": {"model_ema": True},
    "statistics move": {"freeze_bn": False},
    "statistics move, average": {"freeze_bn": False, "model_ema": True},
    "float16": {"amp_dtype": "float16"},
    "float32": {"amp_dtype": "float32"},
    "adamw": {"opt": "adamw"},
    "l2 in loss": {"l2_in_loss": True},
    "drop path": {"model": "test_resnet", "drop_path": 0.2},  # in test_efficientnet no block has a shortcut
    "checkpointing": {"grad_checkpointing": True},
    "checkpointing, statistics move": {"grad_checkpointing": True, "freeze_bn": False},
    "not channels last": {"channels_last": False},
    "two ranks": {"ranks": 2},
    "two ranks, m global": {"ranks": 2, "m": "global"},
    "two ranks, statistics move": {"ranks": 2, "freeze_bn": False},
}
"""Settings that change the path of a step. ranks: how many seem to run."""


@dataclass(frozen=True)
class Emulated:
    """What was seen in a step, and in the evaluations after it: of the weights, and of their average if any."""

    step: Seen
    evaluations: list[Seen]


# ---------------------------------------------------------------------------------------------------------- the driver


class _Stream:
    """Stands in for torch.cuda.Stream and torch.cuda.Event: nothing runs, so that nothing is awaited."""

    watch: DeviceWatch

    def __init__(self, *_: Any, **__: Any) -> None:
        self.device, self.cuda_stream = CUDA, 0

    def synchronize(self) -> None:
        self.watch.wait("a stream or an event is awaited")

    def query(self) -> bool:
        return True

    def record_event(self, event: Any = None) -> Any:
        return event or type(self)()

    def record(self, stream: Any = None) -> None:
        pass

    def wait(self, stream: Any = None) -> None:
        pass

    wait_stream = wait_event = wait


@contextmanager
def fake_gpu(watch: DeviceWatch, ranks: int = 1) -> Iterator[None]:
    """In the block tensors are fake, a GPU seems to be there, and other ranks, to which nothing is sent."""
    stream = type("Stream", (_Stream,), {"watch": watch})
    state = torch.zeros(16, dtype=torch.uint8)
    tensors = [torch.Tensor, torch.nn.Parameter, FakeTensor]

    def tolist(self: torch.Tensor) -> Any:
        if self.device.type == "cpu":
            return np.zeros(tuple(self.shape)).tolist()  # flags of other ranks: none is set
        watch.wait("tolist reads values")
        return list(_DECISION) if self.shape == (len(_DECISION),) else np.ones(tuple(self.shape)).tolist()

    def numpy(self: torch.Tensor, **_: Any) -> Any:
        return np.zeros(tuple(self.shape), dtype=str(self.dtype).removeprefix("torch."))

    def gather_object(values: list[Any], value: Any, **_: Any) -> None:
        values[:] = [value] * len(values)

    properties = SimpleNamespace(name="no GPU", total_memory=80 * 2**30, major=9, minor=0)
    replaced: dict[Any, dict[str, Any]] = {
        torch.cuda: {
            "Stream": stream,
            "Event": stream,
            "current_stream": lambda *_: stream(),
            "stream": lambda *_: nullcontext(),
            "device": lambda *_: nullcontext(),
            "set_device": lambda *_: None,
            "synchronize": lambda *_: stream().synchronize(),
            "get_rng_state": lambda *_: state,
            "set_rng_state": lambda *_: None,
            "is_bf16_supported": lambda *_, **__: True,
            "get_device_capability": lambda *_: (properties.major, properties.minor),
            "get_device_properties": lambda *_: properties,
            "get_device_name": lambda *_: properties.name,
            "max_memory_allocated": lambda *_: 0,
            "empty_cache": lambda: None,
        },
        device: {"select_device": lambda *_: CUDA},
        torch.cuda.amp.common: {"amp_definitely_not_available": lambda: False},
        torch._C: {
            "_conv_determine_backend_memory_format": _cudnn_memory_format,
            "_current_graph_task_id": lambda: 0,  # recomputed activations are kept by it
        },
        torch.autograd: {"_engine_run_backward": run_backward},
        _foreach_utils: {"_foreach_supported_types": tensors},
        optimizer: {"_foreach_supported_types": tensors},
        torch.nn.Module: {"_apply": _replace_tensors},
        FakeTensor: {"tolist": tolist, "numpy": numpy, "record_stream": lambda *_: None},
        collectives: {"world_size": lambda *_: ranks},
        torch.distributed: {
            "all_reduce": lambda *_, **__: None,
            "broadcast_object_list": lambda *_, **__: None,
            "all_gather_object": gather_object,
        },
    }
    with ExitStack() as stack:
        stack.callback(_clear_caches)
        _clear_caches()
        for module, name in _SWITCHES:
            stack.callback(setattr, module, name, getattr(module, name))
        for target, members in replaced.items():
            for name, value in members.items():
                stack.enter_context(mock.patch.object(target, name, value))
        stack.enter_context(mock.patch.object(FakeTensorMode, "__deepcopy__", lambda self, _: self, create=True))
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")  # to copy a model does
        with FakeTensorMode(), watch:
            yield


def _clear_caches() -> None:
    """Forget what functions of samtune keep: fake tensors are of one `fake_gpu`, and no others may be among them."""
    for name, module in list(sys.modules.items()):
        if name.startswith("samtune."):
            for value in vars(module).values():
                if hasattr(value, "cache_clear"):
                    value.cache_clear()


def _replace_tensors(module: torch.nn.Module, fn: Any, recurse: bool = True) -> torch.nn.Module:
    """`nn.Module._apply`: new parameters, since fake ones cannot be exchanged in place."""
    for child in module.children() if recurse else ():
        child._apply(fn)
    for key, w in module._parameters.items():
        if w is not None:
            module._parameters[key] = torch.nn.Parameter(fn(w.detach()), w.requires_grad)
    for key, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[key] = fn(buffer)
    return module


def _cudnn_memory_format(images: torch.Tensor, weight: torch.Tensor, _: Any) -> torch.memory_format:
    """The layout of a convolution's result: channels last if one of its tensors is (ATen/native/ConvUtils.h)."""
    four = [t for t in (images, weight) if t.ndim == 4 and t.dtype != torch.float64]
    is_last = any(torch._prims_common.suggest_memory_format(t) == torch.channels_last for t in four)
    return torch.channels_last if is_last else torch.contiguous_format


# ----------------------------------------------------------------------------------------------------------- emulation


def emulate(**settings: Any) -> Emulated:
    """Train two steps and evaluate with these settings (`_BASE` for others); what was seen in the second step."""
    ranks = settings.pop("ranks", 1)
    config = load(None, {**_BASE, **settings})
    updates: list[Any] = []  # the update of the run, once it is built
    watch = DeviceWatch(lambda: bool(updates) and updates[0].sam.perturbed, run_backward)
    steps: list[Seen] = []
    evaluations: list[Seen] = []
    take_step, evaluate = loop.Trainer._step, loop.evaluate

    def watched_step(*args: Any) -> None:
        with watch.record() as seen:
            take_step(*args)
        steps.append(seen)

    def watched_evaluation(*args: Any, **named: Any) -> Any:
        with watch.record() as seen:
            scored = evaluate(*args, **named)
        evaluations.append(seen)
        return scored

    def images(n: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A batch as the loader gives it: uint8, channels last, in pinned memory."""
        pixels = watch.pin(torch.empty((n, config.img_size, config.img_size, 3), dtype=torch.uint8))
        return pixels.permute(0, 3, 1, 2), watch.pin(torch.zeros(n, dtype=torch.int64))

    def train_batches(*_: Any, batch_size: int, total_steps: int, **__: Any) -> Iterator[Any]:
        return (images(batch_size // ranks) for _ in range(total_steps))

    def eval_batches(_: Any, rows: np.ndarray, *__: Any, batch_size: int, **___: Any) -> Iterator[Any]:
        return (images(len(rows[i : i + batch_size])) for i in range(0, len(rows), batch_size))

    with (
        mock.patch.object(setup, "load_run_data", return_value=_no_data()),
        mock.patch.object(loop, "train_batches", train_batches),
        mock.patch.object(loop, "evaluate", watched_evaluation),
        mock.patch.object(loop.Trainer, "_step", watched_step),
        mock.patch.object(evaluation, "eval_batches", eval_batches),
        fake_gpu(watch, ranks),
    ):
        made = setup.build_setup(config)
        updates.append(made.update)
        log = mock.MagicMock(**{"seconds.return_value": 1.0})
        saver = mock.MagicMock(newest=None, **{"due.return_value": False})
        parts = {"progress": mock.MagicMock(), "watchdog": mock.MagicMock(), "stop": signals.StopRequest()}
        loop.Trainer(setup=made, state=TrainState(), log=log, saver=saver, **parts).train()
    if log.warn.called:
        raise RuntimeError(f"the run warned: {log.warn.call_args}")
    return Emulated(steps[-1], evaluations)


def _no_data() -> RunData:
    """A data set of which only the classes and the number of rows are known."""
    rows: dict[str, Any] = {f"{split}_rows": np.arange(_ROWS) for split in ("train", "val", "test")}
    data: Any = SimpleNamespace(class_names=tuple(map(str, range(CLASSES))), name="none", notes=())
    empty: Any = dict.fromkeys(("rule", "train", "noise", "val", "test"))
    return RunData(data=data, **rows, **empty, bad_images=[], seen_test_images=0, one_colour=[])


def why_impossible() -> str | None:
    """Why this torch cannot emulate: what fails for a convolution and its gradient; None if nothing does."""
    try:
        with fake_gpu(DeviceWatch(backward=run_backward)):
            layer = torch.nn.Conv2d(3, 4, 3).to(CUDA, memory_format=torch.channels_last)  # type: ignore[call-overload]
            layer(torch.empty(2, 3, 8, 8).to(CUDA, non_blocking=True)).sum().backward()
            torch._foreach_mul_([w.grad for w in layer.parameters()], 2.0)
            layer.weight.grad.sum().item()
    except Exception as error:
        return f"torch {torch.__version__} cannot emulate a GPU: {type(error).__name__}: {error}"
    return None


# --------------------------------------------------------------------------------------------------------------- table


def _as_dict(seen: Seen) -> dict[str, Any]:
    kinds = {kind: dict(getattr(seen, kind)) for kind in ("waits", "mixed", "per_tensor")}
    return {"total": seen.total, "operations": seen.by_part(), **kinds}


def _show(name: str, seen: Seen) -> None:
    counts = f"{seen.waits.total()} waits, {seen.mixed.total()} mixed devices, {seen.per_tensor.total()} per tensor"
    print(f"{name}: {seen.total} operations, {counts}")
    print("    " + ", ".join(f"{part} {count}" for part, count in seen.by_part().items()))
    for kind in ("waits", "mixed", "per_tensor"):
        for what, times in getattr(seen, kind).items():
            print(f"    {kind}: {times} x {what}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print the table as JSON")
    parser.add_argument("--record", action="store_true", help="print the operations of each setting, to be stored")
    given = parser.parse_args()
    found: dict[str, Emulated] = {}
    for name, settings in SETTINGS.items():
        found[name] = emulate(**settings)
        if not given.json and not given.record:
            _show(name, found[name].step)
            for number, seen in enumerate(found[name].evaluations, 1):
                _show(f"  evaluation {number}", seen)
    if given.json:
        table = {n: _as_dict(e.step) | {"evaluations": list(map(_as_dict, e.evaluations))} for n, e in found.items()}
        print(json.dumps(table, indent=2))
    if given.record:
        print("OPERATIONS = {\n" + "".join(f'    "{n}": {e.step.total},\n' for n, e in found.items()) + "}")


if __name__ == "__main__":
    main()
