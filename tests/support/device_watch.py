"""What a block of torch code asks of a GPU: its operations, the waits, tensors of two devices, foreach loops.

`DeviceWatch` sees every operation on fake tensors (tests/support/fake_cuda.py), which have no values. A result whose
shape depends on values (nonzero, an index that is a mask) would wait too: there fake tensors raise.
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only

import samtune

aten = torch.ops.aten
PACKAGE = str(Path(samtune.__file__).parent)
GPU = "cuda"
READS = (aten._local_scalar_dense.default, aten.item.default, aten.is_nonzero.default, aten.equal.default)
COPIES = (aten._to_copy.default, aten.copy_.default, aten.copy.default)
NO_KERNEL = {
    *("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "lift_fresh", "_unsafe_view"),
    *("record_stream", "is_pinned"),
}
STAGED = 64 * 1024  # bytes; the driver takes so much of pageable memory over at once, and copies it later


@dataclass
class Seen:
    """What was seen in a block. Keys of all but `operations` say where and what; values count.

    operations: kernels or groups of them, by (part of the step, name). waits: the CPU waits for the GPU. mixed: tensors
    of two devices meet, an error on a GPU. per_tensor: an operation on lists of tensors that torch runs one tensor at a
    time, because they differ in device, dtype or strides, or because there is no fused kernel.
    """

    operations: Counter[tuple[str, str]] = field(default_factory=Counter)
    waits: Counter[str] = field(default_factory=Counter)
    mixed: Counter[str] = field(default_factory=Counter)
    per_tensor: Counter[str] = field(default_factory=Counter)

    @property
    def total(self) -> int:
        """The number of operations."""
        return self.operations.total()

    def by_part(self) -> dict[str, int]:
        """Operations of each part, in the order in which the parts began."""
        parts: Counter[str] = Counter()
        for (part, _), count in self.operations.items():
            parts[part] += count
        return dict(parts)


class DeviceWatch(TorchDispatchMode):
    """Sees each operation, and answers for values that fake tensors do not have: 1, or True.

    is_perturbed: whether weights are perturbed at this moment. backward: the function that goes through a graph.
    """

    def __init__(self, is_perturbed: Callable[[], bool] = bool, backward: Callable[..., Any] | None = None) -> None:
        super().__init__()
        self.is_perturbed = is_perturbed
        self._backward_code = getattr(backward, "__code__", None)
        self._pinned: dict[int, torch.UntypedStorage] = {}  # kept, so that no other gets the same address
        self._seen: Seen | None = None

    @contextmanager
    def record(self) -> Iterator[Seen]:
        """In the block, what is seen."""
        before, self._seen = self._seen, Seen()
        try:
            yield self._seen
        finally:
            self._seen = before

    def wait(self, what: str) -> None:
        """Note that the CPU waits for the GPU."""
        if self._seen is not None:
            self._seen.waits[f"{self._origin()[1]}: {what}"] += 1

    def pin(self, tensor: torch.Tensor) -> torch.Tensor:
        """Take a tensor's memory for page-locked."""
        self._pinned[_storage(tensor)] = tensor.untyped_storage()
        return tensor

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func.namespace != "aten":
            return func(*args, **kwargs)
        if _is_composite(func):  # where autograd, which takes it apart otherwise, is off
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        name = func._schema.name.removeprefix("aten::")
        tensors = [t for t in tree_iter((args, kwargs)) if isinstance(t, torch.Tensor)]
        if name in ("_pin_memory", "pin_memory"):
            return self.pin(aten.clone.default(args[0]))
        if name == "is_pinned":
            return _storage(args[0]) in self._pinned
        if func in READS:
            return self._read(func, name, args, kwargs)
        pinned = kwargs.pop("pin_memory", False)
        if self._seen is not None:
            args, kwargs = self._look(self._seen, func, name, tensors, args, kwargs)
        if name.startswith("_fused_"):  # an optimizer's step, in place; fake tensors lack it, and there is no result
            return None
        made = func(*args, **kwargs)
        return self.pin(made) if pinned else made

    def _read(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        tensor = args[0]
        if tensor.device.type == GPU:
            self.wait(f"{name} reads a value")
        elif not isinstance(tensor, FakeTensor) or tensor.constant is not None:
            return func(*args, **kwargs)
        return True if tensor.dtype is torch.bool else 1.0 if tensor.is_floating_point() else 1

    def _look(
        self, seen: Seen, func: Any, name: str, tensors: list[torch.Tensor], args: Any, kwargs: Any
    ) -> tuple[Any, Any]:
        """Record an operation; return its arguments, on one device."""
        on_gpu = [t for t in tensors if t.device.type == GPU]
        to_gpu = kwargs.get("device") is not None and torch.device(kwargs["device"]).type == GPU
        if not on_gpu and not to_gpu:
            return args, kwargs
        if func in COPIES:
            self._copy(func, name, args, kwargs)
        elif on_gpu and any(t.device.type == "cpu" and t.ndim > 0 for t in tensors):
            shapes = ", ".join(f"{tuple(t.shape)} on {t.device.type}" for t in tensors[:4])
            seen.mixed[f"{self._origin()[1]}: {name} of {shapes}"] += 1
            args, kwargs = tree_map_only(torch.Tensor, lambda t: t.to(on_gpu[0].device), (args, kwargs))
        if name == "index_put_" and args[2].numel() > 1 and any(t.dtype is torch.bool for t in on_gpu[1:]):
            self.wait(f"{name}: a mask becomes indices")
        if name.startswith(("_foreach_", "_fused_")):
            why = why_per_tensor(name, args)
            if why is not None:
                seen.per_tensor[f"{self._origin()[1]}: {name} {why}"] += 1
        if not func.is_view and name not in NO_KERNEL:
            seen.operations[self._origin()[0], name] += 1
        return args, kwargs

    def _copy(self, func: Any, name: str, args: Any, kwargs: Any) -> None:
        """Note a copy between CPU and GPU for which the CPU waits."""
        if func is aten._to_copy.default:
            source, target = args[0], torch.device(kwargs.get("device") or args[0].device)
            is_async = bool(kwargs.get("non_blocking"))
            is_pinned = target.type == "cpu" or _storage(source) in self._pinned  # torch pins the result
        else:
            source, target = args[1], args[0].device
            is_async = bool(kwargs.get("non_blocking", len(args) > 2 and args[2]))
            is_pinned = _storage(args[0] if target.type == "cpu" else source) in self._pinned
        if source.device.type == target.type:
            return
        bytes_ = source.numel() * source.element_size()
        text = f"{name}: {tuple(source.shape)} {str(source.dtype).removeprefix('torch.')} to {target.type}"
        if not is_async:
            self.wait(f"{text}, blocking")
        elif not is_pinned and (target.type == "cpu" or bytes_ > STAGED):
            self.wait(f"{text}, pageable memory")

    def _origin(self) -> tuple[str, str]:
        """The part of the step that an operation belongs to, and the innermost line of samtune that it comes from."""
        is_backward = is_forward = is_optimizer = False
        frame = sys._getframe(2)
        while frame is not None:
            code = frame.f_code
            file = code.co_filename
            if code is self._backward_code:
                is_backward = True
            elif file.startswith(PACKAGE):
                module = file[len(PACKAGE) + 1 :]
                part = module.removesuffix(".py")
                if is_backward or (is_forward and not module.startswith("data/")):  # mixup is a module, too
                    part = "backward" if is_backward else "forward"
                    part += " at w+e" if self.is_perturbed() else " at w"
                elif is_optimizer:
                    part = "optimizer"
                return part, f"{module}:{frame.f_lineno} {code.co_name}"
            elif code.co_name == "_call_impl" and file.endswith("nn/modules/module.py"):
                is_forward = True
            elif "/torch/optim/" in file:
                is_optimizer = True
            frame = frame.f_back
        return "other", "?"


def why_per_tensor(name: str, args: Sequence[Any]) -> str | None:
    """Why torch runs an operation on lists of tensors one tensor at a time on a GPU; None if it does not.

    The conditions of `can_use_fast_route` in ATen/native/ForeachUtils.h and of _foreach_norm in
    ATen/native/cuda/ForeachReduceOp.cu. A fused optimizer (_fused_*) raises where they do not hold.
    """
    lists = [a for a in args if isinstance(a, list | tuple) and a and isinstance(a[0], torch.Tensor)]
    first = lists[0][0]
    of = f"of {len(lists[0])} tensors"
    if name == "_foreach_norm" and len(args) > 1 and args[1] not in (1, 2, float("inf")):
        return f"{of}: there is no fused norm of order {args[1]:.3g}"
    scalars = [a for a in args if isinstance(a, torch.Tensor) and a.device == first.device]
    if name.startswith("_foreach_") and any(s.dtype != first.dtype for s in scalars):
        return f"{of}: dtype of the factor {scalars[0].dtype} / {first.dtype}"
    # The steps of AdamW are a list of another shape.
    lists = [a for a in lists if [t.shape for t in a] == [t.shape for t in lists[0]]]
    for group in zip(*lists, strict=True):
        kinds = {(t.device, None if name == "_foreach_copy_" else t.dtype) for t in (first, *group)}
        strides = {tuple(s for s, n in zip(t.stride(), t.shape, strict=True) if n != 1) for t in group}
        if len(kinds) > 1 or len(strides) > 1 or not all(_is_dense(t) for t in group):
            what = "device or dtype" if len(kinds) > 1 else "strides"
            pair = " / ".join(f"{t.stride()} {str(t.dtype).removeprefix('torch.')} {t.device.type}" for t in group)
            return f"{of}: {what} of {tuple(group[0].shape)}: {pair}"
    return None


def _is_composite(func: Any) -> bool:
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    return has(func.name(), "CompositeImplicitAutograd") and not has(func.name(), "CUDA")


def _is_dense(t: torch.Tensor) -> bool:
    """Whether a tensor's elements fill its memory without a gap, in any order."""
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(t.stride(), t.shape, strict=True) if n != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def _storage(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
