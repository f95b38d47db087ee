"""The Hessian of a mean loss as an operator: products with vectors, without the matrix."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from samtune.distributed import collectives, device
from samtune.distributed.collectives import flat_views
from samtune.sam.batch import Batch, num_samples
from samtune.sam.losses import Loss, as_scalar
from samtune.sam.second_derivative import differentiable_gradient
from samtune.sharpness.directions import random_directions


class Hessian:
    """The Hessian H of the mean loss over all samples of all ranks, by all given parameters together.

    A product H v differentiates the gradient of every batch again (Pearlmutter 1994). Put the model into evaluation
    mode: then neither batch norm nor dropout makes the loss random, and no buffer changes. A vector holds the values of
    all parameters in the order of their memory, whatever their layout; `as_tensors` cuts it into their shapes.

    The gradient is the same for every vector. With memory for it, its graph is kept for the next product, which then
    goes neither forward nor backward before it differentiates again, until one of the parameters changes.

    Args:
        loss: (*batch) -> (), the mean over the samples it is given.
        params: the parameters that the loss is differentiated by, all on one device and of one dtype.
        batches: the samples of this rank, in parts that fit into memory.
        memory: bytes that kept graphs may take; a batch whose graph no longer fits goes forward for each product. 0
            keeps none.
    """

    def __init__(
        self, loss: Loss, params: Sequence[nn.Parameter], batches: Sequence[Batch], *, memory: int = 0
    ) -> None:
        self._loss = as_scalar(loss)
        self._params = list(params)
        self._batches = list(batches)
        counts = [num_samples(batch) or 1 for batch in self._batches]
        total = torch.tensor([sum(counts)], dtype=torch.float64)
        self.samples = int(collectives.all_reduce_sum(total).item())
        """Samples of all ranks."""
        self._shares = [count / self.samples for count in counts]
        self.products = 0
        """Number of products computed so far."""
        self._memory = memory
        self._sizes: dict[int, int] = {}  # bytes of a batch's graph
        self._kept: dict[int, dict[int, torch.Tensor]] = {}
        self._versions: list[int] = []  # of the parameters that the kept graphs belong to

    @property
    def dim(self) -> int:
        """Number of parameters."""
        return sum(w.numel() for w in self._params)

    def draw(self, seed: int) -> torch.Tensor:
        """A vector from N(0, I), the same on every rank and device: (dim,)."""
        return torch.cat([d.flatten() for d in random_directions(self._params, seed)])

    def as_tensors(self, v: torch.Tensor) -> list[torch.Tensor]:
        """The parts of a vector (dim,) in the shapes of the parameters, without a copy."""
        return flat_views(v, self._params)

    def __matmul__(self, v: torch.Tensor) -> torch.Tensor:
        """H v: (dim,) -> (dim,)."""
        if self._versions != [w._version for w in self._params]:
            self._versions = [w._version for w in self._params]
            self._sizes.clear()
            self._kept.clear()
        try:
            product = self._product(v)
        except Exception as error:
            if not self._kept or not device.may_be_out_of_memory(error):
                raise
            self._kept.clear()
            self._memory = 0
            product = self._product(v)
        self.products += 1
        return collectives.all_reduce_sum(product)

    def _product(self, v: torch.Tensor) -> torch.Tensor:
        """The part of this rank's samples."""
        product = torch.zeros_like(v)
        sums = self.as_tensors(product)
        along = self.as_tensors(v)
        with sdpa_kernel(SDPBackend.MATH):  # the fused kernels of attention have no second derivative
            for number, share in enumerate(self._shares):
                grads = self._gradient(number)
                if grads:
                    more = torch.autograd.grad(
                        list(grads.values()),
                        self._params,
                        [along[i] for i in grads],
                        retain_graph=number in self._kept,
                        materialize_grads=True,
                    )
                    torch._foreach_add_(sums, list(more), alpha=share)
        return product

    def _gradient(self, number: int) -> dict[int, torch.Tensor]:
        """`differentiable_gradient` of a batch, kept if memory is left for its graph."""
        if number in self._kept:
            return self._kept[number]
        loss = partial(self._loss, *self._batches[number])
        if number in self._sizes or self._memory == 0:
            return differentiable_gradient(loss, self._params)
        saved = _SavedTensors(self._params)
        with torch.autograd.graph.saved_tensors_hooks(saved.pack, saved.unpack):
            grads = differentiable_gradient(loss, self._params)
        self._sizes[number] = saved.bytes + sum(g.nbytes for g in grads.values())
        if self._sizes[number] + sum(self._sizes[kept] for kept in self._kept) <= self._memory:
            self._kept[number] = grads
        return grads


class _SavedTensors:
    """Hooks of autograd that count the bytes of what a graph saves, parameters left out."""

    def __init__(self, params: Sequence[nn.Parameter]) -> None:
        self._params = {w.untyped_storage().data_ptr() for w in params}
        self._sizes: dict[int, int] = {}  # by address

    @property
    def bytes(self) -> int:
        return sum(self._sizes.values())

    def pack(self, tensor: torch.Tensor) -> tuple[torch.Tensor, int]:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._params:
            size = min(storage.nbytes(), tensor.nbytes)  # of a batch that is a part of the data, the part
            self._sizes[storage.data_ptr()] = max(size, self._sizes.get(storage.data_ptr(), 0))
        return tensor.detach(), tensor._version  # with its graph it would hold itself alive

    def unpack(self, packed: tuple[torch.Tensor, int]) -> torch.Tensor:
        tensor, version = packed
        if tensor._version != version:  # torch looks for that only without hooks
            raise RuntimeError("a tensor that the loss depends on was changed in place between two products")
        return tensor
