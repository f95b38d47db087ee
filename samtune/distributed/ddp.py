"""Whole models on several ranks: DistributedDataParallel, and what the ranks do together in a step of SAM."""

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from samtune.distributed import collectives, device
from samtune.errors import OutOfMemory, first_line

if TYPE_CHECKING:
    from samtune.distributed.fsdp import Shards

# Buffers are not sent before every pass. (torch 2.15 has a new name for the option.)
_DDP_OPTIONS = inspect.signature(DistributedDataParallel.__init__).parameters
_NO_BUFFERS: dict[str, Any] = {
    "forward_sync_buffers" if "forward_sync_buffers" in _DDP_OPTIONS else "broadcast_buffers": False
}


class DataParallel(DistributedDataParallel):
    """DistributedDataParallel that counts its reductions, and in which a rank without a gradient can complete them.

    Buffers are not broadcast: batch-norm statistics are frozen, or the step averages them. has_final_buckets: whether
    a gradient was made, after which torch rebuilds its buckets, once.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        super().__init__(
            model,
            device_ids=[device] if device.type == "cuda" else None,
            gradient_as_bucket_view=True,
            **_NO_BUFFERS,
        )
        self.has_final_buckets = False
        self._reductions: list[torch.futures.Future[Any]] = []  # of one gradient, in order
        self.register_comm_hook(self._reductions, _mean_of_bucket)

    def start_gradient(self) -> None:
        """Count the reductions of the next gradient from zero."""
        self._reductions.clear()

    def complete(self) -> None:
        """Take part, with NaN, in the reductions of a gradient that this rank could not finish.

        The other ranks wait for it there. Afterwards the wrapper must be replaced.
        """
        for future in self._reductions:
            future.wait()
        for bucket in self.reducer._get_zeros_like_grad_buckets()[len(self._reductions) :]:
            collectives.all_reduce_sum(bucket.buffer().fill_(math.nan))


def data_parallel(model: nn.Module, device: torch.device) -> nn.Module:
    """The model, wrapped so that its gradients become their mean over the ranks; itself without torch.distributed."""
    return DataParallel(model, device) if collectives.is_initialized() else model


def _mean_of_bucket(
    reductions: list[torch.futures.Future[Any]],
    bucket: dist.GradBucket,  # type: ignore[name-defined]
) -> torch.futures.Future[torch.Tensor]:
    mean = bucket.buffer().div_(collectives.world_size())
    collectives.traffic.count(mean)
    future = dist.all_reduce(mean, async_op=True).get_future()
    reductions.append(future)
    return future.then(lambda done: done.value()[0])


class Replicas:
    """The part of SAM that concerns other ranks, for a model that is whole on each; fsdp.Shards is for a sharded one.

    model: with its wrapper. params: the perturbed parameters. m: as in SAM, the ranks that share a perturbation.
    """

    is_sharded: ClassVar[Literal[False]] = False
    norms = None  # those of whole tensors

    def __init__(self, model: nn.Module, params: Sequence[nn.Parameter], m: Any) -> None:
        self.model = model
        self._params = params
        self._shares_perturbation = m != "device" and not isinstance(m, int)
        self._group: collectives.Group = None if isinstance(m, str | int) else m
        self._pending = 0  # reductions of ascent gradients in which this rank has yet to take part
        self.meets_in_forward = any(isinstance(module, nn.SyncBatchNorm) for module in model.modules())

    def parts(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """What this rank holds of each tensor: all of it."""
        return list(tensors)

    def num_micro_batches(self, n: int, size: int) -> int | None:
        """The number of micro-batches that all ranks need; None: each rank splits its n samples by itself."""
        return None

    @contextmanager
    def during_backward(self, ascent_passes: int) -> Iterator[None]:
        """Around one gradient of SAM, with this number of passes that look for a perturbation."""
        self._pending = ascent_passes if self._shares_perturbation else 0
        if isinstance(self.model, DataParallel):
            self.model.start_gradient()
        yield

    def no_sync(self) -> AbstractContextManager[Any]:
        """No reduction of gradients in this block, if the model is wrapped in something that reduces them."""
        context: AbstractContextManager[Any] = getattr(self.model, "no_sync", nullcontext)()
        return context

    def reduce_ascent(self, grads: list[torch.Tensor]) -> list[torch.Tensor]:
        """The ascent gradient of all ranks that share a perturbation, up to its scale."""
        if self._shares_perturbation:
            grads = collectives.all_reduce_sum_lists(grads, self._group, like=self._params)
            self._pending -= 1
        return grads

    def complete(self) -> None:
        """Take part, with NaN, in all that other ranks reduce in a `backward` that failed on this one.

        Their gradient becomes NaN, and they do not wait for ever. The model needs `rewrap` afterwards.
        """
        for _ in range(self._pending):
            nans = [torch.full_like(w, math.nan) for w in self._params]
            collectives.all_reduce_sum_lists(nans, self._group, like=self._params)
        if isinstance(self.model, DataParallel):
            self.model.complete()

    def rewrap(self) -> nn.Module:
        """The model in a new wrapper, on all ranks, after one of them has completed its reductions."""
        if isinstance(self.model, DataParallel):
            inner, device = self.model.module, self.model.device
            del self.model.logger, self.model.reducer  # and with it its hooks on the parameters
            self.model = DataParallel(inner, device)
        return self.model

    def settle(self, rehearse: Callable[[], None]) -> None:
        """Have torch rebuild its buckets before the first reduction that counts. rehearse: any backward pass.

        torch rebuilds them after the first gradient, in the order in which its parts came. On three ranks or more sums
        then differ in the last bit: a resumed run would not equal one that was not interrupted.
        """
        if isinstance(self.model, DataParallel) and not self.model.has_final_buckets:
            rehearse()
            self.model.has_final_buckets = True

    def total_norm(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """The L2 norm over all tensors together -> ()."""
        return nn.utils.get_total_norm(tensors)


def ranks_of(model: nn.Module, inner: nn.Module, params: Sequence[nn.Parameter], m: Any) -> "Replicas | Shards":
    """How the model lies on the ranks. inner: the model without wrappers.

    Raises ValueError for another m than a sharded model can have.
    """
    if collectives.is_initialized():
        from samtune.distributed.fsdp import shards_of  # torch can be built without

        shards = shards_of(inner)
        if shards is not None:
            shards.check_m(m)
            return shards
    return Replicas(model, params, m)


def backward_or_complete(
    ranks: "Replicas | Shards", backward: Callable[[], object], clear: Callable[[], None]
) -> str | None:
    """Call backward; if memory runs out on this one of several ranks, complete what the others reduce, with NaN.

    clear: releases the gradients that were made. Returns the error in one line, None without one. Raises OutOfMemory
    where ranks meet in every pass: a rank that leaves a pass cannot take part in it later.
    """
    try:
        backward()
        return None
    except Exception as error:
        if collectives.world_size() == 1 or not device.may_be_out_of_memory(error):
            raise
        if ranks.is_sharded or ranks.meets_in_forward:
            raise OutOfMemory(
                f"no memory on rank {collectives.rank()} for its part of a step",
                first_line(error),
                "give a smaller --micro-batch or --batch-size: with --shard or --sync-bn no step can begin again",
            ) from None
        reason = first_line(error)
    # Out here the error is gone, and with it the frames that held what did not fit. The others wait in a reduction.
    clear()
    device.free_memory()
    ranks.complete()
    return reason


def average_over_ranks(tensors: list[torch.Tensor], weight: float) -> None:
    """Make each tensor its weighted mean over the ranks, in place; the weights of all ranks have the mean 1."""
    if collectives.world_size() > 1 and tensors:
        sums = collectives.all_reduce_sum_lists(list(torch._foreach_mul(tensors, weight)))
        torch._foreach_copy_(tensors, torch._foreach_div(sums, collectives.world_size()))
