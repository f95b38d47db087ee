"""The gradient of Algorithm 1 (Foret et al. 2021)."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from samtune.distributed import collectives
from samtune.sam.filters import first_match, select_parameters, unwrapped
from samtune.sam.perturbation import Perturbation
from samtune.sam.snapshot import (
    batch_norms,
    bn_in_train_mode,
    bn_stats,
    generator_states,
    restore_bn_stats,
    set_generator_states,
)

if TYPE_CHECKING:
    from samtune.distributed.fsdp import Shards

Loss = Callable[..., Any]  # a scalar tensor, or what has one as `.loss` or under the key "loss"
Objective = Callable[..., torch.Tensor]
Batch = tuple[Any, ...]  # tensors of one first dimension, the samples; or dictionaries and lists of such tensors


def sam_passes(ascent_steps: int, ascent_fraction: float) -> float:
    """Forward-backward passes over the batch in a step of SAM."""
    return 1 + ascent_steps * ascent_fraction


class SAM:
    """The gradient of Sharpness-Aware Minimization, for any model, loss and base optimizer.

    `sam.backward(loss, *batch)` stands where `loss(*batch).backward()` stood, and adds the SAM gradient to `.grad`:

        sam = SAM(model, rho=0.05)
        for images, labels in loader:
            optimizer.zero_grad()
            sam.backward(lambda x, y: F.cross_entropy(model(x), y), images, labels)
            optimizer.step()

    The rest of the loop stays as it is: clipping, GradScaler, schedulers, accumulation, DistributedDataParallel,
    checkpoints. Between two calls nothing is kept but the room for a copy of the perturbed weights, so there is no
    state to save.

    Args:
        model: the module whose trainable float32 parameters are perturbed, on its device already; it may be wrapped in
            DistributedDataParallel, whose gradient reduction then happens once, in the last pass. Or it was sharded by
            samtune.distributed.fsdp, before the optimizer was made; then m must be "global" or the group that holds the
            model, and pass 1 computes all gradients, whatever is perturbed.
        rho: radius of the perturbation in weight units; the attribute may be set between calls, as a schedule does.
            rho = 0 is the plain gradient, bit for bit, for one pass.
        p: the norm of the radius, in [1, inf] (Foret et al. 2021, eq. 2).
        adaptive: measure the radius of each weight in units of |w| + eta (ASAM, Kwon et al. 2021, eq. 5); biases and
            norm parameters, all that have less than two dimensions, keep weight units.
        eta: see adaptive; in weight units.
        perturb: "all"; "norm", the parameters of normalisation layers alone (SAM-ON, Mueller et al. 2023), for which
            pass 1 computes no other weight gradients; "no-norm", all others; or a regular expression that is searched
            for in the parameters' names.
        rho_factors: radius of the parameters whose name holds a regular expression, in units of rho; the first that
            matches counts, 1 where none does. The ball is then ||e_g / rho_g||_p <= 1 over all groups together.
        m: the samples that share a perturbation ("m-sharpness", Foret et al. 2021, section 4.1). "device": the batch,
            on each rank its own. A number: pieces of so many samples, one after the other, each with a perturbation of
            its own; their gradients are averaged, which is gradient accumulation too. "global": the batches of all
            ranks together. A process group: the batches of its ranks together.
        ascent_fraction: share of the samples that pass 1 uses, the first ones.
        ascent_steps: passes that look for the perturbation, each adding rho / ascent_steps along its dual gradient.
        micro_batch: the most samples that pass through the model at once; None: all that share a perturbation. It
            bounds memory and changes nothing else: the samples of m still share one perturbation, made of their mean
            gradient. But each micro-batch draws its own dropout and drop-path masks (the same in all passes, not those
            of the whole batch), and batch norm that is not frozen normalises each by itself. May be set between calls.

    Raises:
        ValueError: an argument out of range, 16-bit weights, a filter that matches no parameter, or another m than a
            sharded model can have.
    """

    def __init__(
        self,
        model: nn.Module,
        rho: float = 0.05,
        *,
        p: float = 2.0,
        adaptive: bool = False,
        eta: float = 0.01,
        perturb: str = "all",
        rho_factors: Mapping[str, float] | None = None,
        m: Literal["device", "global"] | int | collectives.Group = "device",
        ascent_fraction: float = 1.0,
        ascent_steps: int = 1,
        micro_batch: int | None = None,
    ) -> None:
        if not 0 < ascent_fraction <= 1:
            raise ValueError(f"ascent_fraction {ascent_fraction:g}: must be in (0, 1]")
        if ascent_steps < 1 or (isinstance(m, int) and m < 1):
            raise ValueError(f"ascent_steps {ascent_steps}, m {m}: must be at least 1")
        if m is None or (isinstance(m, str) and m not in ("device", "global")):
            raise ValueError(f'm {m!r}: must be "device", "global", a number of samples or a process group')
        self.model = model
        self._inner = unwrapped(model)
        self.rho = rho
        self.m = m
        self.micro_batch = micro_batch
        self.ascent_fraction, self.ascent_steps = ascent_fraction, ascent_steps
        self.perturbed = False
        """Whether the weights are w + e at this moment: False in pass 1, for a loss that wants to know."""
        named = select_parameters(self._inner, perturb)
        self._params = list(named.values())
        self.shards = _shards_of(self._inner)
        """How the model is sharded; None if it is not."""
        if self.shards is not None:
            self.shards.refuse_other_than(m)
        self._perturbation = Perturbation(
            self._params if self.shards is None else self.shards.parts(self._params),
            p=p,
            adaptive=[adaptive and w.ndim > 1 for w in self._params],
            eta=eta,
            factors=[first_match(rho_factors or {}, name) for name in named],
            group=None if self.shards is None else self.shards.group,
        )
        if rho > 0:
            self._perturbation.allocate_backup()
        self._owed = 0  # reductions of an ascent gradient that this call has still to take part in
        self._device = self._params[0].device
        self._batch_norms = batch_norms(model)
        self._recomputes = any(getattr(module, "grad_checkpointing", False) for module in model.modules())

    @property
    def rho(self) -> float:
        """Radius of the perturbation in weight units."""
        return self._rho

    @rho.setter
    def rho(self, value: float) -> None:
        if not 0 <= value < math.inf:
            raise ValueError(f"rho {value:g}: must be finite and at least 0")
        self._rho = value

    @property
    def micro_batch(self) -> int | None:
        """The most samples that pass through the model at once; None: all that share a perturbation."""
        return self._micro_batch

    @micro_batch.setter
    def micro_batch(self, value: int | None) -> None:
        if value is not None and value < 1:
            raise ValueError(f"micro_batch {value}: must be at least 1, or None")
        self._micro_batch = value

    def effective_micro_batch(self, n: int) -> int:
        """Of a batch of n samples, how many pass through the model at once."""
        return min(n, self.m if isinstance(self.m, int) else n, self.micro_batch or n)

    @property
    def passes(self) -> float:
        """Forward-backward passes over the batch in one call."""
        return sam_passes(self.ascent_steps, self.ascent_fraction) if self.rho > 0 else 1

    def backward(self, loss: Loss, *batch: Any) -> torch.Tensor:
        """Add the gradient of the loss at w + e to `.grad` of all parameters of the model; w is as it was.

        Args:
            loss: (*batch) -> (), the mean over the samples it is given; or a model's output that has it as `.loss`. It
                is called once for each pass, or for each micro-batch of it, with the random numbers of the first pass
                in all of them, so that dropout and drop-path masks are the same. A loss scale may be part of it: e does
                not depend on it.
            batch: tensors of one first dimension, the samples, or dictionaries and lists of such tensors. Without a
                batch the loss knows its samples by itself; then they cannot be divided (m, micro_batch,
                ascent_fraction).

        Returns:
            The mean loss at w (of the samples of pass 1), detached: what SGD's curve would show.

        A loss or gradient that is not finite, in any pass, makes the whole gradient NaN: every rank and every
        GradScaler sees it. Batch-norm statistics update in pass 1, if they update at all.

        Raises:
            ValueError: the batch is empty, its tensors disagree on the number of samples, or it has none and is to be
                divided; a loss that is no scalar, has no gradient, or has called backward itself.
            TypeError: a loss that is no tensor.
        """
        n = _samples(batch)
        if isinstance(self.m, int) or self.micro_batch is not None or self.ascent_fraction < 1:
            _check_divisible(batch, n)
        n = 1 if n is None else n
        loss = _scalar(loss)
        self._owed = self.ascent_steps if self.rho > 0 and self._shares_perturbation and self.shards is None else 0
        if isinstance(self.model, collectives.DataParallel):
            self.model.begin()
        # The samples of a perturbation; without one, those that pass at once.
        together = self.m if isinstance(self.m, int) else n
        pieces = _split(batch, together) if self.rho > 0 else self._split(batch, self.effective_micro_batch(n))
        at_w = []
        with nullcontext() if self.shards is None else self.shards.reset_by_an_error(), _second_backward_told():
            for piece in pieces:
                share = (_samples(piece) or n) / n
                with nullcontext() if piece is pieces[-1] else self._no_sync():
                    at_w.append(share * self._backward(loss, piece, share))
        return torch.stack(at_w).sum()

    def _backward(self, loss: Objective, batch: Batch, share: float) -> torch.Tensor:
        """The gradient of one perturbation, times share, is added to `.grad`."""
        if self.rho == 0:
            at_w = loss(*batch)
            with self._statistics_stay():
                _backward_nan_guarded(at_w, at_w, share)
            return at_w.detach()

        masks = generator_states(self._device)
        part = batch
        if self.ascent_fraction < 1:
            count = math.ceil(self.ascent_fraction * (_samples(batch) or 1))
            part = tuple(_map(lambda t: t[:count], content) for content in batch)
        radius = self.rho / self.ascent_steps
        # Pass 1, at w: batch-norm statistics update here, if they update at all.
        at_w, g1 = self._ascent_gradient(loss, part)
        # e = rho * dual(g1)
        with self._perturb(g1, radius):
            # Further ascent, if it is asked for, from where the last pass arrived.
            for _ in range(self.ascent_steps - 1):
                set_generator_states(masks, self._device)
                self._perturbation.add_(self._ascent_gradient(loss, part)[1], radius)
                torch.clear_autocast_cache()  # the weights moved again
            # Pass 2, at w + e: same samples, same masks; statistics stay as pass 1 left them.
            set_generator_states(masks, self._device)
            micro_batches = self._micro_batches(batch)
            for micro, of_batch in micro_batches:
                with nullcontext() if micro is micro_batches[-1][0] else self._no_sync():
                    _backward_nan_guarded(loss(*micro), at_w, share * of_batch)
        return at_w

    def _ascent_gradient(self, loss: Objective, batch: Batch) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Loss and gradient where the weights are, detached; the gradient of all ranks that share a perturbation."""

        def gradient(micro: Batch) -> tuple[torch.Tensor, list[torch.Tensor]]:
            """By autograd.grad, which leaves `.grad` and the hooks that communicate it to the final gradient alone."""
            with self._no_sync():
                value = loss(*micro)
            with self._statistics_stay():
                return value.detach(), list(torch.autograd.grad(value, self._params, materialize_grads=True))

        micro_batches = self._micro_batches(batch)
        if self.shards is not None:
            return self._sharded_ascent_gradient(self.shards, loss, micro_batches)
        if len(micro_batches) == 1:
            mean, grads = gradient(batch)
        else:
            mean, grads = torch.zeros((), device=self._device), [torch.zeros_like(w) for w in self._params]
            for micro, share in micro_batches:
                value, more = gradient(micro)
                mean = mean + share * value
                torch._foreach_add_(grads, more, alpha=share)
                del more  # before the next one needs the room
        if self._shares_perturbation:
            grads = collectives.all_reduce_sum_lists(grads, self._group)
            self._owed -= 1
        return mean, grads

    def complete(self) -> None:
        """For a rank on which `backward` failed, while the others go on: take part in what they reduce, with NaN.

        They get a gradient of NaN then, in place of waiting for ever. The model needs a new wrapper afterwards.
        """
        for _ in range(self._owed):
            collectives.all_reduce_sum_lists([torch.full_like(w, math.nan) for w in self._params], self._group)
        if isinstance(self.model, collectives.DataParallel):
            self.model.complete()

    @property
    def _shares_perturbation(self) -> bool:
        """Whether other ranks have the same perturbation."""
        return self.m != "device" and not isinstance(self.m, int)

    @property
    def _group(self) -> collectives.Group:
        """The ranks that share it."""
        return None if isinstance(self.m, str | int) else self.m

    def _sharded_ascent_gradient(
        self, shards: "Shards", loss: Objective, micro_batches: list[tuple[Batch, float]]
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """`_ascent_gradient` of this rank's parts, by backward: that alone gathers weights and scatters gradients.

        `.grad` is as before. Each micro-batch is reduced at once: gradients that wait for a last one would be whole.
        """
        params = [w for w in self.model.parameters() if w.requires_grad]
        before = [w.grad for w in params]
        for w in params:
            w.grad = None
        shards.average_over_replicas(self.m == "global")
        try:
            mean = torch.zeros((), device=self._device)
            for micro, share in micro_batches:
                value = loss(*micro)
                with self._statistics_stay():
                    _backward_nan_guarded(value, value, share)
                mean = mean + share * value.detach()
            return mean, shards.parts([torch.zeros_like(w) if w.grad is None else w.grad for w in self._params])
        finally:
            shards.average_over_replicas(True)
            for w, grad in zip(params, before, strict=True):
                w.grad = grad

    def _micro_batches(self, batch: Batch) -> list[tuple[Batch, float]]:
        """What passes through the model at once, and its share of the batch."""
        n = _samples(batch) or 1
        return [(micro, (_samples(micro) or n) / n) for micro in self._split(batch, self.micro_batch or n)]

    def _split(self, batch: Batch, size: int) -> list[Batch]:
        """Micro-batches of so many samples; of a sharded model, as many on each rank."""
        if self.shards is None or self.micro_batch is None:
            return _split(batch, size)
        count = self.shards.pieces(_samples(batch) or 1, size, self._device)
        return _divide(batch, lambda t: t.tensor_split(count))

    @contextmanager
    def _perturb(self, g1: list[torch.Tensor], radius: float) -> Iterator[None]:
        """Inside the block weights are w + e, batch-norm statistics rest, and the model refuses to be saved.

        g1: one gradient per perturbed parameter. The list is emptied, for pass 2 needs the room.
        """
        resting = bn_in_train_mode(self._batch_norms)
        guard = self._inner.register_state_dict_pre_hook(_refuse_to_save)
        try:
            with self._perturbation.perturbed(g1, radius):
                g1.clear()
                self.perturbed = True
                torch.clear_autocast_cache()  # 16-bit copies of w, where a caller's autocast is around all passes
                for module in resting:  # they normalise as before, and keep mean, variance and num_batches_tracked
                    module.track_running_stats = False
                yield
        finally:
            for module in resting:
                module.track_running_stats = True
            self.perturbed = False
            torch.clear_autocast_cache()
            guard.remove()

    @contextmanager
    def _statistics_stay(self) -> Iterator[None]:
        """Where a backward pass computes activations again, they do not update batch-norm statistics once more."""
        kept = bn_stats(self._batch_norms) if self._recomputes else []
        yield
        restore_bn_stats(kept)

    def _no_sync(self) -> AbstractContextManager[Any]:
        """No reduction of gradients, where the model is wrapped in something that reduces them."""
        context: AbstractContextManager[Any] = getattr(self.model, "no_sync", nullcontext)()
        return context


def _shards_of(model: nn.Module) -> "Shards | None":
    if not collectives.is_initialized():
        return None
    from samtune.distributed.fsdp import shards_of  # torch can be built without

    return shards_of(model)


def _split(batch: Batch, size: int) -> list[Batch]:
    """Pieces of so many samples, the last of what is left; one piece is the batch itself."""
    n = _samples(batch)
    return [batch] if n is None or size >= n else _divide(batch, lambda t: t.split(size))


def _divide(batch: Batch, split: Callable[[torch.Tensor], Sequence[torch.Tensor]]) -> list[Batch]:
    """The batch in pieces, each of its tensors by `split`."""
    pieces = [[split(t) for t in _tensors(content)] for content in batch]
    count = len(next(parts for of_one in pieces for parts in of_one))
    divided = []
    for i in range(count):
        own = iter([parts[i] for of_one in pieces for parts in of_one])
        divided.append(tuple(_map(lambda _, own=own: next(own), content) for content in batch))  # type: ignore[misc]
    return divided


def _tensors(content: Any) -> Iterator[torch.Tensor]:
    """The tensors of a batch that hold samples, in the order in which `_map` meets them."""
    if isinstance(content, torch.Tensor) and content.ndim > 0:
        yield content
    elif isinstance(content, Mapping):
        for value in content.values():
            yield from _tensors(value)
    elif isinstance(content, list | tuple):
        for value in content:
            yield from _tensors(value)


def _map(change: Callable[[torch.Tensor], torch.Tensor], content: Any) -> Any:
    """The same content with each tensor of samples changed; a mapping of any kind becomes a dict."""
    if isinstance(content, torch.Tensor) and content.ndim > 0:
        return change(content)
    if isinstance(content, Mapping):
        return {key: _map(change, value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        changed = [_map(change, value) for value in content]
        if hasattr(content, "_fields"):  # a named tuple
            return type(content)(*changed)
        return changed if isinstance(content, list) else tuple(changed)
    return content


def _check_divisible(batch: Batch, n: int | None) -> None:
    """Raise ValueError where the samples of a batch are not all in tensors. n: how many; None: no batch."""
    if n is None:
        raise ValueError(
            "m, micro_batch and ascent_fraction divide the batch, and backward was given none: "
            "pass the tensors, sam.backward(loss, images, labels), in place of a closure over them"
        )
    for values in _lists(batch):
        if len(values) == n and next(_tensors(values), None) is None:
            raise ValueError(
                f"m, micro_batch and ascent_fraction divide the batch, and it holds a list of {n} "
                f"{type(values[0]).__name__}: give a tensor"
            )


def _lists(content: Any) -> Iterator[Sequence[Any]]:
    """The lists inside a batch."""
    for value in content.values() if isinstance(content, Mapping) else content:
        if isinstance(value, list | tuple):
            yield value
        if isinstance(value, list | tuple | Mapping):
            yield from _lists(value)


def _samples(batch: Batch) -> int | None:
    """How many samples a batch has; None for no batch."""
    sizes = {len(t) for content in batch for t in _tensors(content)}
    if batch and not sizes:
        raise ValueError("the batch holds no tensor: sam.backward(loss, images, labels)")
    if len(sizes) > 1:
        words = " and ".join(map(str, sorted(sizes)))
        raise ValueError(f"the tensors of a batch have {words} samples: they need one first dimension")
    if 0 in sizes:
        raise ValueError("the batch is empty")
    return sizes.pop() if sizes else None


def _scalar(loss: Loss) -> Objective:
    """The loss as a scalar tensor, also of one that returns a model's output. Says what else it returned."""

    def scalar(*batch: Any) -> torch.Tensor:
        value = loss(*batch)
        if isinstance(value, Mapping) and "loss" in value:
            value = value["loss"]
        value = getattr(value, "loss", value)
        if value is None:
            raise TypeError("the loss is None: a model's output has one if it is given the labels")
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"the loss is a {type(value).__name__}: return a scalar tensor, or an output with `.loss`")
        if value.numel() != 1:
            raise ValueError(f"the loss has the shape {tuple(value.shape)}: return its mean over the samples")
        if not value.requires_grad:
            raise ValueError("the loss has no gradient: it is detached, or backward is called under torch.no_grad()")
        return value if value.ndim == 0 else value.reshape(())

    return scalar


@contextmanager
def _second_backward_told() -> Iterator[None]:
    """A loss that calls backward itself, as closures for other implementations do, is told so."""
    try:
        yield
    except RuntimeError as error:
        if "backward through the graph a second time" in str(error):
            raise ValueError("the loss calls backward itself: return it, and sam.backward does the rest") from error
        raise


def _backward_nan_guarded(loss: torch.Tensor, at_w: torch.Tensor, share: float) -> None:
    """Backward; where the loss at w is not finite, the gradient is NaN."""
    at_w = at_w.detach().to(torch.promote_types(at_w.dtype, torch.float32))  # a 16-bit share would be off by 0.4 %
    (loss * torch.where(at_w.isfinite(), torch.full_like(at_w, share), math.nan)).backward()


def _refuse_to_save(*_: Any) -> None:
    raise RuntimeError("the weights are perturbed at this moment (w + e): save the model between two steps of SAM")
