"""Models whose weights, gradients and optimizer state are spread over ranks (FSDP2; Zhao et al. 2023).

Each parameter is cut along its first dimension, and a rank keeps one part of it (a DTensor). A block of the model is
whole only while it computes. Every rank calls the functions of this module, in the same order.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, Literal
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from samtune.distributed import collectives

# Shares of the model's elements: a larger block is cut into the blocks inside it, if there are any; a smaller one is
# not worth its own reduction.
_LARGE, _SMALL = 1 / 8, 1 / 1000

_replicas: WeakKeyDictionary[nn.Module, dist.ProcessGroup] = WeakKeyDictionary()


def shard(model: nn.Module, device: torch.device, group: int | None = None) -> nn.Module:
    """Move a model, the same on all ranks, to each rank's device, where only the rank's part of it stays.

    Build the optimizer and SAM afterwards. Parameters get torch's default memory layout; batch-norm statistics stay
    whole.

    group: number of ranks that hold one copy of the model together, a divisor of all; gradients are averaged between
    the groups too. None: all ranks.

    Raises:
        ValueError: the group does not divide the ranks, or a parameter has no dimension to cut.
    """
    world = collectives.world_size()
    group = world if group is None else group
    if group < 1 or world % group or (group == 1 < world):
        raise ValueError(f"groups of {group} ranks: must be at least 2, and divide the {world} ranks")
    scalars = [name for name, w in model.named_parameters() if w.ndim == 0]
    if scalars:
        raise ValueError(f"parameter {scalars[0]} has no dimension to be cut along")
    mesh = init_device_mesh(device.type, (world // group, group), mesh_dim_names=("replicas", "parts"))
    model.to(device)
    for w in model.parameters():
        w.data = w.data.contiguous()  # torch refuses to cut others
    for block in (*_blocks(model), model):
        # Whole weights that outlast a pass would be out of date after an update.
        fully_shard(block, mesh=mesh["parts"], reshard_after_forward=True)
    if group < world:
        _replicas[model] = mesh.get_group("replicas")
    shards = shards_of(model)
    assert shards is not None
    shards.average_over_replicas(True)
    # The first use of whole parameters allocates them: in inference mode they would be unusable for training.
    for part in shards.blocks:
        part.unshard()
        part.reshard()
    return model


def _blocks(model: nn.Module) -> list[nn.Module]:
    """The parts that are whole at different times: modules of a list or sequence that are called one by one."""
    total = sum(w.numel() for w in model.parameters())

    def inside(module: nn.Module) -> Iterator[nn.Module]:
        listed = isinstance(module, nn.Sequential | nn.ModuleList)
        for child in module.children():
            share = sum(w.numel() for w in child.parameters()) / total
            within = list(inside(child)) if share > _SMALL else []
            # A list is never called, a sequence not always. A single layer is no block.
            is_list = isinstance(child, nn.Sequential | nn.ModuleList)
            has_layers = next(child.children(), None) is not None
            if listed and not is_list and has_layers and share > _SMALL and (share <= _LARGE or not within):
                yield child
            else:
                yield from within

    return list(inside(model))


def _parts(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """What this rank holds of each tensor, in place."""
    with torch.no_grad():  # outside of it to_local makes another tensor, for autograd
        return [t.to_local() if isinstance(t, DTensor) else t for t in tensors]


@dataclass(frozen=True)
class Shards:
    """How a model is spread over ranks; the part of SAM that concerns other ranks, as ddp.Replicas for whole models.

    blocks: the root first. group: the ranks that hold one copy of the model together. replicas: of each group, the
    rank that holds the same parts as this one; None where there is one group.
    """

    is_sharded: ClassVar[Literal[True]] = True
    parts = staticmethod(_parts)

    model: nn.Module
    blocks: tuple[FSDPModule, ...]
    group: dist.ProcessGroup
    replicas: dist.ProcessGroup | None

    @property
    def norms(self) -> Any:
        """As perturbation.Norms, over the parts of all ranks that hold the model together."""
        return ShardedNorms(self.group)

    def check_m(self, m: Any) -> None:
        """Raise ValueError unless m names ranks that can share a perturbation: all, or a group with a whole model."""
        members = dist.get_process_group_ranks
        if m != "global" and not (isinstance(m, dist.ProcessGroup) and members(m) == members(self.group)):
            raise ValueError(
                f'm {m!r}: a sharded model is perturbed by all ranks that hold it together; "global", or their group'
            )

    def total_norm(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """The L2 norm over all tensors together -> (), with the same bits on all ranks."""
        norms = collectives.all_gather(nn.utils.get_total_norm(_parts(tensors)), self.group)
        total: torch.Tensor = torch.linalg.vector_norm(norms)
        return total

    def average_over_replicas(self, on: bool) -> None:
        """Whether the next backward passes average gradients between the groups too, or only within each one."""
        if self.replicas is not None:
            for block in self.blocks:
                block.set_all_reduce_hook(_mean_over(self.replicas if on else None))

    def num_micro_batches(self, n: int, size: int) -> int:
        """Into how many micro-batches of about `size` samples each rank splits its n samples: as many as the others.

        All ranks meet in every pass, so none may have one more. Where a rank has fewer samples than another has
        micro-batches, micro-batches are larger.
        """
        counts = torch.tensor([math.ceil(n / size), -n], device=next(self.model.parameters()).device)
        needed, minus_least = collectives.all_gather(counts).amax(0).tolist()
        return int(min(needed, -minus_least))

    @contextmanager
    def during_backward(self, ascent_passes: int) -> Iterator[None]:
        """Around one gradient of SAM. If it fails, no parameter stays whole: the next pass gathers them again."""
        try:
            yield
        except BaseException:
            for block in self.blocks:
                block.reshard()
            if hasattr(self.blocks[0], "reset_iter_state"):  # since torch 2.15
                self.blocks[0].reset_iter_state()
            raise

    def no_sync(self) -> AbstractContextManager[None]:
        """Does nothing: gradients that wait for a reduction would be whole."""
        return nullcontext()

    def ascent_gradient(
        self,
        loss: Callable[..., torch.Tensor],
        micro_batches: Sequence[tuple[tuple[Any, ...], float]],
        params: Sequence[nn.Parameter],
        descend: Callable[[Any, tuple[Any, ...], float], torch.Tensor],
        over_replicas: bool,
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Mean loss, detached, and this rank's parts of its gradient; `.grad` stays.

        By `descend(loss, batch, share)`, which adds to `.grad`, since only a backward pass gathers weights and scatters
        gradients. Each micro-batch is reduced by itself: gradients that wait for the last one would be whole.
        """
        trainable = [w for w in self.model.parameters() if w.requires_grad]
        before = [w.grad for w in trainable]
        for w in trainable:
            w.grad = None
        self.average_over_replicas(over_replicas)
        try:
            mean = torch.zeros((), device=params[0].device)
            for micro_batch, share in micro_batches:
                mean = mean + share * descend(loss, micro_batch, share)
            return mean, _parts([torch.zeros_like(w) if w.grad is None else w.grad for w in params])
        finally:
            self.average_over_replicas(True)
            for w, grad in zip(trainable, before, strict=True):
                w.grad = grad

    def settle(self, rehearse: Callable[[], None]) -> None:
        """Does nothing: torch does not rearrange these reductions."""


@dataclass(frozen=True)
class ShardedNorms:
    """The norms of samtune.sam.perturbation over parameters of which each rank of a group holds a part, perhaps empty.

    The ranks call each method together, and get the same bits.
    """

    group: dist.ProcessGroup

    def join(self, norm: torch.Tensor, q: float) -> torch.Tensor:
        """||.||_q of all parts, from that of this rank's part -> ()."""
        joined: torch.Tensor = torch.linalg.vector_norm(collectives.all_gather(norm.double(), self.group), q)
        return joined

    def largest(self, h: Sequence[torch.Tensor]) -> torch.Tensor:
        """The largest |value| of all parts -> ()."""
        parts = [x for x in h if x.numel() > 0]
        largest = torch.stack(torch._foreach_norm(parts, math.inf)).max() if parts else h[0].new_zeros(())
        return collectives.all_gather(largest, self.group).max()

    def argmax(self, h: Sequence[torch.Tensor], sizes: torch.Tensor) -> torch.Tensor:
        """Index of the largest of all ranks' sizes, the first of equals, among those of this rank: (1,), or (0,).

        sizes: |h| of this rank, flat. Ranks hold consecutive parts of each tensor: of equals in one tensor the lowest
        rank has the first.
        """
        first = sizes.argmax(keepdim=True) if len(sizes) else torch.zeros(0, dtype=torch.long, device=sizes.device)
        ends = torch.tensor([x.numel() for x in h], device=sizes.device).cumsum(0)
        candidate = torch.stack([sizes[first], torch.searchsorted(ends, first, right=True)], dim=1).double()
        candidate = torch.cat([candidate, candidate.new_tensor([[-1.0, 0.0]])])[0]
        size, tensor = collectives.all_gather(candidate, self.group).unbind(1)  # each (ranks,)
        winner = int(torch.where(size == size.max(), tensor, math.inf).argmin())
        return first if winner == collectives.rank(self.group) else first[:0]


def shards_of(model: nn.Module) -> Shards | None:
    """How the model is spread over ranks; None if it is not.

    Raises ValueError for a model that was sharded in another way than `shard` does.
    """
    parameters = list(model.parameters())
    meshes = {w.device_mesh if isinstance(w, DTensor) else None for w in parameters}
    if meshes <= {None}:
        return None
    mesh = next(iter(meshes))
    cut = all(isinstance(w, DTensor) and w.placements == (Shard(0),) for w in parameters)
    if len(meshes) > 1 or mesh is None or mesh.ndim != 1 or not cut or not isinstance(model, FSDPModule):
        raise ValueError("the model is sharded in another way than samtune.distributed.fsdp.shard does")
    blocks = tuple(module for module in model.modules() if isinstance(module, FSDPModule))
    return Shards(model, blocks, mesh.get_group(), _replicas.get(model))


def _mean_over(replicas: dist.ProcessGroup | None) -> Callable[[torch.Tensor], None]:
    """A hook that makes a gradient that one group has reduced its mean over the groups, in place; None: no change."""

    def mean(grad: torch.Tensor) -> None:
        if grad.is_cuda:  # before torch 2.15 nothing else holds it until this stream has added it to `.grad`
            grad.record_stream(torch.cuda.current_stream(grad.device))
        if replicas is not None:
            collectives.all_reduce_sum(grad, replicas).div_(collectives.world_size(replicas))

    return mean


# ----------------------------------------------------------------------------------------------------- full state dicts


def full_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """The weights and buffers of the unsharded model, on the CPU of rank 0; {} on the others.

    One tensor at a time is whole on the device.
    """
    full = ((name, _full(value)) for name, value in model.state_dict().items())
    return {name: value for name, value in full if value is not None}


def load_full_state_dict(model: nn.Module, state: Mapping[str, torch.Tensor] | None) -> None:
    """Load weights and buffers into a model, sharded or not. state: that of rank 0 counts.

    Raises RuntimeError on all ranks if names or shapes differ from the model's; nothing is loaded then.
    """
    state = (state or {}) if collectives.rank() == 0 else {}
    current = model.state_dict()
    shapes = collectives.broadcast_from_rank0(lambda: {name: tuple(value.shape) for name, value in state.items()})
    differing = sorted(shapes.items() ^ {name: tuple(value.shape) for name, value in current.items()}.items())
    if differing:
        raise RuntimeError(f"weights do not fit the model: {differing[0][0]} and {len(differing) - 1} more differ")
    for name, value in current.items():
        _fill(value, state.get(name))


def full_optimizer_state(optimizer: torch.optim.Optimizer) -> dict[int, dict[str, Any]]:
    """`optimizer.state_dict()["state"]` of the unsharded run, on the CPU of rank 0; empty on the others."""
    full: dict[int, dict[str, Any]] = {}
    for index, values in optimizer.state_dict()["state"].items():
        of_param = {key: _full(value) if isinstance(value, torch.Tensor) else value for key, value in values.items()}
        if collectives.rank() == 0:
            full[index] = of_param
    return full


def load_full_optimizer_state(optimizer: torch.optim.Optimizer, state: Mapping[int, Mapping[str, Any]] | None) -> None:
    """Load the state of an optimizer of the same parameters. state: that of rank 0 counts.

    Raises RuntimeError on all ranks if it has more parameters.
    """
    state = (state or {}) if collectives.rank() == 0 else {}
    params = [w for group in optimizer.param_groups for w in group["params"]]
    # A tensor of the parameter's shape is sharded as the parameter is; all else is a counter.
    outline = collectives.broadcast_from_rank0(
        lambda: {
            (index, key): (value.dtype,) if isinstance(value, torch.Tensor) and value.ndim > 0 else value
            for index, values in state.items()
            for key, value in values.items()
        }
    )
    if any(index >= len(params) for index, _ in outline):
        raise RuntimeError(f"the state is not that of an optimizer of {len(params)} parameters")
    loaded: dict[int, dict[str, Any]] = {index: {} for index, _ in outline}
    for (index, key), value in outline.items():
        if isinstance(value, tuple):
            loaded[index][key] = torch.zeros_like(params[index], dtype=value[0], requires_grad=False)
            _fill(loaded[index][key], state[index][key] if state else None)
        else:  # a copy: the optimizer counts on in place
            loaded[index][key] = value.clone() if isinstance(value, torch.Tensor) else value
    optimizer.load_state_dict(optimizer.state_dict() | {"state": loaded})


def _full(value: torch.Tensor) -> torch.Tensor | None:
    """A copy of the whole tensor on the CPU of rank 0; None on the others."""
    value = value.detach()
    full = value.full_tensor() if isinstance(value, DTensor) else value
    return full.to("cpu", copy=True) if collectives.rank() == 0 else None


def _fill(target: torch.Tensor, full: torch.Tensor | None) -> None:
    """Copy the whole tensor of rank 0 into a tensor of its shape, sharded or not, on all ranks."""
    part = _parts([target])[0]
    received = torch.empty(target.shape, dtype=target.dtype, device=part.device)
    if full is not None:
        received.copy_(full)
    dist.broadcast(received, 0)
    with torch.no_grad():
        if isinstance(target, DTensor):
            mesh, placements = target.device_mesh, target.placements
            received = distribute_tensor(received, mesh, placements, src_data_rank=None).to_local()
        part.copy_(received)
