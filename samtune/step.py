"""One update of Algorithm 1 (Foret et al. 2021): `SAM` makes its gradient, `Step` is the update of a run around it."""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from samtune import distributed
from samtune.sam import Perturbation

Loss = Callable[..., torch.Tensor]


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
            DistributedDataParallel, whose gradient reduction then happens once, in the last pass.
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

    Raises:
        ValueError: an argument out of range, 16-bit weights, or a filter that matches no parameter.
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
        m: Literal["device", "global"] | int | distributed.Group = "device",
        ascent_fraction: float = 1.0,
        ascent_steps: int = 1,
    ) -> None:
        if not 0 < ascent_fraction <= 1:
            raise ValueError(f"ascent_fraction {ascent_fraction:g}: must be in (0, 1]")
        if ascent_steps < 1 or (isinstance(m, int) and m < 1):
            raise ValueError(f"ascent_steps {ascent_steps}, m {m}: must be at least 1")
        if m is None or (isinstance(m, str) and m not in ("device", "global")):
            raise ValueError(f'm {m!r}: must be "device", "global", a number of samples or a process group')
        self.model = model
        self._inner = _unwrapped(model)
        self.rho = rho
        self.m = m
        self.ascent_fraction, self.ascent_steps = ascent_fraction, ascent_steps
        self.perturbed = False
        """Whether the weights are w + e at this moment: False in pass 1, for a loss that wants to know."""
        named = _chosen(self._inner, perturb)
        self._params = list(named.values())
        self._ball = Perturbation(
            self._params,
            p=p,
            adaptive=[adaptive and w.ndim > 1 for w in self._params],
            eta=eta,
            factors=[_first_match(rho_factors or {}, name) for name in named],
        )
        if rho > 0:
            self._ball.reserve()
        self._device = self._params[0].device
        self._batch_norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]

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
    def passes(self) -> float:
        """Forward-backward passes over the batch in one call."""
        return 1 + self.ascent_steps * self.ascent_fraction if self.rho > 0 else 1

    def backward(self, loss: Loss, *batch: torch.Tensor) -> torch.Tensor:
        """Add the gradient of the loss at w + e to `.grad` of all parameters of the model; w is as it was.

        Args:
            loss: (*batch) -> (), the mean over the samples it is given. It is called once for each pass, with the
                random numbers of the first pass in all of them, so that dropout and drop-path masks are the same. A
                loss scale may be part of it: e does not depend on it.
            batch: tensors of one first dimension, the samples.

        Returns:
            The mean loss at w (of the samples of pass 1), detached: what SGD's curve would show.

        A loss or gradient that is not finite, in any pass, makes the whole gradient NaN: every rank and every
        GradScaler sees it. Batch-norm statistics update in pass 1, if they update at all.
        """
        n = len(batch[0])
        if n == 0:
            raise ValueError("the batch is empty")
        pieces = list(zip(*(t.split(self.m) for t in batch), strict=True)) if isinstance(self.m, int) else [batch]
        at_w = []
        for piece in pieces:
            share = len(piece[0]) / n
            with nullcontext() if piece is pieces[-1] else self._no_sync():
                at_w.append(share * self._backward(loss, piece, share))
        return torch.stack(at_w).sum()

    def _backward(self, loss: Loss, batch: tuple[torch.Tensor, ...], share: float) -> torch.Tensor:
        """The gradient of one perturbation, times share, is added to `.grad`."""
        if self.rho == 0:
            at_w = loss(*batch)
            _descend(at_w, at_w, share)
            return at_w.detach()

        masks = _generator_states(self._device)
        part = tuple(t[: math.ceil(self.ascent_fraction * len(t))] for t in batch)
        radius = self.rho / self.ascent_steps
        # Pass 1, at w: batch-norm statistics update here, if they update at all.
        with self._no_sync():
            at_w = loss(*part)
        # e = rho * dual(g1)
        with self._perturb(at_w, radius):
            # Further ascent, if it is asked for, from where the last pass arrived.
            for _ in range(self.ascent_steps - 1):
                _set_generator_states(masks, self._device)
                with self._no_sync():
                    self._ball.add_(self._ascent_gradient(loss(*part)), radius)
            # Pass 2, at w + e: same samples, same masks; statistics stay as pass 1 left them.
            _set_generator_states(masks, self._device)
            _descend(loss(*batch), at_w, share)
        return at_w.detach()

    def _ascent_gradient(self, loss: torch.Tensor) -> list[torch.Tensor]:
        """By autograd.grad, which leaves `.grad` and the hooks that communicate it to the final gradient alone."""
        grads = list(torch.autograd.grad(loss, self._params, materialize_grads=True))
        if self.m == "device" or isinstance(self.m, int):
            return grads
        group = None if isinstance(self.m, str) else self.m
        return distributed.sum_lists_over_ranks(grads, group)

    @contextmanager
    def _perturb(self, at_w: torch.Tensor, radius: float) -> Iterator[None]:
        """Inside the block weights are w + e, batch-norm statistics rest, and the model refuses to be saved."""
        updating = [module for module in self._batch_norms if module.training and module.track_running_stats]
        guard = self._inner.register_state_dict_pre_hook(_refuse_to_save)
        try:
            with self._ball.perturbed(self._ascent_gradient(at_w), radius):
                self.perturbed = True
                torch.clear_autocast_cache()  # 16-bit copies of w, where a caller's autocast is around all passes
                for module in updating:  # they normalise as before, and keep mean, variance and num_batches_tracked
                    module.track_running_stats = False
                yield
        finally:
            for module in updating:
                module.track_running_stats = True
            self.perturbed = False
            torch.clear_autocast_cache()
            guard.remove()

    def _no_sync(self) -> AbstractContextManager[Any]:
        """No reduction of gradients, where the model is wrapped in something that reduces them."""
        context: AbstractContextManager[Any] = getattr(self.model, "no_sync", nullcontext)()
        return context


def _descend(loss: torch.Tensor, at_w: torch.Tensor, share: float) -> None:
    """Backward; where the loss at w is not finite, the gradient is NaN."""
    at_w = at_w.detach().to(torch.promote_types(at_w.dtype, torch.float32))  # a 16-bit share would be off by 0.4 %
    (loss * torch.where(at_w.isfinite(), torch.full_like(at_w, share), math.nan)).backward()


def _unwrapped(model: nn.Module) -> nn.Module:
    """The module whose parameters have the names that their author gave them."""
    while isinstance(model, DistributedDataParallel) or hasattr(model, "_orig_mod"):  # the latter by torch.compile
        model = model.module if isinstance(model, DistributedDataParallel) else model._orig_mod  # type: ignore[assignment]
    return model


def _chosen(model: nn.Module, perturb: str) -> dict[str, nn.Parameter]:
    """The trainable parameters that a filter lets through, by name."""
    norm = {
        id(w)
        for module in model.modules()
        if "norm" in type(module).__name__.lower()
        for w in module.parameters(recurse=False)
    }

    def lets_through(name: str, w: nn.Parameter) -> bool:
        if perturb in ("norm", "no-norm"):
            return (id(w) in norm) == (perturb == "norm")
        return perturb == "all" or re.search(perturb, name) is not None

    chosen = {
        name: w for name, w in model.named_parameters() if w.requires_grad and w.numel() > 0 and lets_through(name, w)
    }
    if not chosen:
        raise ValueError(f"perturb {perturb!r} matches none of the model's trainable parameters")
    return chosen


def _first_match(factors: Mapping[str, float], name: str) -> float:
    return next((factor for pattern, factor in factors.items() if re.search(pattern, name)), 1.0)


def _refuse_to_save(*_: Any) -> None:
    raise RuntimeError("the weights are perturbed at this moment (w + e): save the model between two steps of SAM")


def _generator_states(device: torch.device) -> list[torch.Tensor]:
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return states


def _set_generator_states(states: list[torch.Tensor], device: torch.device) -> None:
    """Draw the same random numbers again: each pass has the masks of pass 1, and ends in the state that pass 1 left."""
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)


# ------------------------------------------------------------------------------------------------------------- update


@dataclass(frozen=True)
class StepResult:
    """What a step saw, summed over all ranks; at w, before the update, so that SAM and SGD curves compare.

    loss: mean over the samples of pass 1, nats. wrong: images of those whose class was missed. n: how many they were.
    grad_norm: L2 norm of the final gradient before clipping. applied: False where a value was not finite and nothing
    was updated. passes: forward-backward passes over the batch.
    """

    loss: float
    wrong: int
    n: int
    grad_norm: float
    applied: bool
    passes: float


class Step:
    """The update of a run: SAM's gradient, clipped once, and the base optimizer's step at w.

    Args:
        sam: the gradient of the model: images (batch, ...) -> logits (batch, classes).
        optimizer: any torch optimizer over the model's parameters.
        loss: (logits, labels) -> scalar mean, nats.
        clip_grad: largest global L2 norm of the final gradient; 0 does not clip. The first gradient needs none: e
            does not depend on its scale.
        autocast: makes the context of a forward pass (mixed precision); weights and gradients stay float32.
        scaler: scales the loss for float16; None does not.
        penalty: () -> scalar that is added to the loss in all passes, but not to the loss that is reported.
    """

    def __init__(
        self,
        sam: SAM,
        optimizer: torch.optim.Optimizer,
        loss: Loss,
        *,
        clip_grad: float = 0.0,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
        scaler: torch.amp.GradScaler | None = None,
        penalty: Callable[[], torch.Tensor] | None = None,
    ) -> None:
        self.sam, self.optimizer, self.loss = sam, optimizer, loss
        self.clip_grad, self.autocast, self.scaler, self.penalty = clip_grad, autocast, scaler, penalty
        self._params = [w for w in sam.model.parameters() if w.requires_grad]

    def __call__(self, images: torch.Tensor, labels: torch.Tensor, weight: float = 1.0) -> StepResult:
        """One update on images (batch, 3, h, w), normalised, and labels: (batch,) int64, or (batch, classes) shares.

        weight: number of images here over its mean over the ranks, where they differ.
        """
        seen: list[torch.Tensor] = []  # sums at w: loss, wrong, n

        def objective(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            with self.autocast():
                logits = self.sam.model(images)
                loss = self.loss(logits, labels)
            if not self.sam.perturbed:
                classes = labels if labels.ndim == 1 else labels.argmax(1)  # of a mixed image the larger share
                wrong = (logits.detach().argmax(1) != classes).sum()
                seen.append(torch.stack([loss.detach() * len(labels), wrong, wrong.new_tensor(len(labels))]))
            if self.penalty is not None:
                loss = loss + self.penalty()
            if weight != 1:
                loss = loss * weight
            return loss if self.scaler is None else self.scaler.scale(loss)

        self.optimizer.zero_grad(set_to_none=True)
        self.sam.backward(objective, images, labels)

        # The final gradient: the same on every rank, and NaN on every rank if a value anywhere was not finite.
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        grad_norm = nn.utils.get_total_norm([w.grad for w in self._params if w.grad is not None])
        # The step's one read from the device: the decision whether to update, with what is logged.
        sums = distributed.sum_over_ranks(torch.stack(seen).sum(0))
        loss_sum, wrong, n, norm = torch.cat([sums, grad_norm.reshape(1)]).tolist()
        applied = math.isfinite(norm)
        if applied:
            if self.clip_grad > 0:
                nn.utils.clip_grads_with_norm_(self._params, self.clip_grad, grad_norm)
            self.optimizer.step()
        if self.scaler is not None:
            self.scaler.update()
        return StepResult(loss_sum / n, int(wrong), int(n), norm, applied, self.sam.passes)
