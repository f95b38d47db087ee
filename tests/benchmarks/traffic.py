"""How many bytes a step moves between a GPU and its memory, counted by watching a step that computes nothing.

The passes, the perturbation and the optimizer run as a run has them, on fake tensors, which have shapes and no values,
under autocast to bfloat16. Every operation that launches a kernel reads its inputs and writes its outputs. Views and
tensors without content move nothing.

Left out: what an operation keeps for itself (cuDNN's workspaces and changes of layout), what stays in the GPU's cache
from one operation to the next, and what a compiler fuses. The images' way to the model, averaged weights and the step's
decision are left out too.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from samtune import SAM
from samtune.models.build import build_model
from samtune.models.training import keep_inputs_of_activations, train_mode
from tests.support.device_watch import NO_KERNEL

RHO = 0.05
_ONLY_WRITES = {"copy_", "fill_", "zero_", "normal_", "uniform_", "bernoulli_", "_foreach_copy_", "_foreach_zero_"}
# One kernel for the input's gradient and one for the weights': both read the output's gradient, the first argument.
_TWO_KERNELS = {"convolution_backward", "native_batch_norm_backward"}


@dataclass(frozen=True)
class Traffic:
    """What a step moves: bytes read and written, and operations that launch a kernel or more."""

    bytes: int
    operations: int


class Watch(TorchDispatchMode):
    """Adds up what the operations of the block read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return 1.0  # SAM reads the norm on a CPU; a fake tensor has none
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        if func.namespace != "aten" or name in NO_KERNEL or func.is_view:
            return result
        self.operations += 1
        written: list[torch.Tensor] = []
        for argument, value in _arguments(func._schema, args, kwargs or {}):
            changes = argument.alias_info is not None and argument.alias_info.is_write
            tensors = list(_tensors(value))
            written += tensors if changes else []
            if not (changes and name in _ONLY_WRITES):
                self.bytes += sum(map(size_of, tensors))
        if name in _TWO_KERNELS:
            self.bytes += size_of(args[0])
        self.bytes += sum(map(size_of, written or _tensors(result)))
        return result


def _arguments(schema: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[tuple[Any, Any]]:
    yield from zip(schema.arguments, args, strict=False)
    yield from ((argument, kwargs[argument.name]) for argument in schema.arguments if argument.name in kwargs)


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def size_of(tensor: torch.Tensor) -> int:
    """Bytes of a tensor in memory: what is expanded lies there once."""
    distinct = (n for n, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride != 0 or n == 0)
    return math.prod(distinct) * tensor.element_size()


@cache
def count(name: str, img_size: int, images: int, classes: int = 1000, rho: float = RHO) -> Traffic:
    """A step of a timm model on so many images of a size in pixels: SAM's, or SGD's where rho is 0."""
    with FakeTensorMode():
        model, _ = build_model(name, classes=classes, img_size=img_size, drop=0.2, pretrained=False)
        batch = torch.randn(images, 3, img_size, img_size), torch.zeros(images, dtype=torch.int64)
        batch = batch[0].contiguous(memory_format=torch.channels_last), batch[1]
        return count_step(model, batch, rho)


def count_step(model: torch.nn.Module, batch: tuple[torch.Tensor, torch.Tensor], rho: float) -> Traffic:
    """A step of a model on a batch, with frozen batch norm, clipping and Nesterov momentum; not the first step."""
    keep_inputs_of_activations(model)
    train_mode(model, freeze_bn=True)
    params = [w for w in model.parameters() if w.requires_grad]
    optimizer = torch.optim.SGD(params, lr=1e-3, momentum=0.9, nesterov=True, weight_decay=1e-5, foreach=True)
    for w in params:
        w.grad = torch.zeros_like(w)
    optimizer.step()  # makes the momentum
    sam = SAM(model, rho)

    def loss(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return F.cross_entropy(model(images), labels)

    with Watch() as watch:
        optimizer.zero_grad()
        sam.backward(loss, *batch)
        norm = torch.nn.utils.get_total_norm([w.grad for w in params if w.grad is not None], foreach=True)
        torch.nn.utils.clip_grads_with_norm_(params, 1.0, norm, foreach=True)
        optimizer.step()
    return Traffic(watch.bytes, watch.operations)
