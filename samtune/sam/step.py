"""One update of a run: SAM's gradient, clipped once, and the base optimizer's step at w."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from samtune.distributed import collectives, ddp, device
from samtune.errors import plural
from samtune.sam import snapshot
from samtune.sam.gradient import SAM
from samtune.sam.losses import Loss


@dataclass(frozen=True)
class StepResult:
    """Results of a step over all ranks; at w, before the update, so that SAM and SGD curves compare.

    Where SAM has one pass (ascent momentum or previous), loss and wrong are those at w + e.

    loss: mean over the samples of pass 1, nats. n: number of these samples. wrong: how many were misclassified.
    grad_norm: L2 norm of the final gradient before clipping. applied: False if a value was not finite and nothing
    was updated. passes: forward-backward passes over the batch. stop_requested: whether any rank was asked to stop.
    """

    loss: float
    wrong: int
    n: int
    grad_norm: float
    applied: bool
    passes: float
    stop_requested: bool = False


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
        penalty: () -> scalar that is added to the loss in all passes, but not to the reported loss.
        prepare: images as they come, such as uint8, -> what the model takes; in each forward pass, for its images.

    Raises ValueError for a penalty on a sharded model: it would see only one rank's parts.
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
        prepare: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> None:
        self.sam, self.optimizer, self.loss = sam, optimizer, loss
        self.clip_grad, self.autocast, self.scaler, self.penalty = clip_grad, autocast, scaler, penalty
        self.prepare = prepare or (lambda images: images)
        self._params = [w for w in sam.model.parameters() if w.requires_grad]
        self._stats = snapshot.BatchNormStats(snapshot.batch_norms(sam.model))
        dtype = torch.promote_types(self._params[0].dtype, torch.float32)
        # Allocated once: a recorded CUDA graph adds to this very tensor.
        self._at_w = torch.zeros(3, dtype=dtype, device=self._params[0].device)
        """Sums at w over the forward passes of a step: of the loss, of misclassified samples, of samples."""
        if penalty is not None and sam.ranks.is_sharded:
            raise ValueError("a penalty on weights cannot be part of the loss of a sharded model")

    def __call__(
        self,
        images: torch.Tensor,
        labels: torch.Tensor,
        weight: float = 1.0,
        stop_requested: Callable[[], bool] = bool,
    ) -> StepResult:
        """One update on images (batch, 3, h, w), and labels: (batch,) int64, or (batch, classes) shares.

        weight: number of images on this rank over its mean over the ranks; 0 on a rank without images, which gets one
        so that it can take part. stop_requested: whether this rank was asked to stop; the ranks decide together.

        If memory runs out for the gradient on any rank, all ranks restore the state before the step and repeat it with
        half as many images at once: `sam.micro_batch`, which then stays. The update is that of a step that had this
        micro-batch from the start. Raises OutOfMemory if one image does not fit; nothing is updated then.
        """
        self._stats.keep()
        self.sam.ranks.settle(lambda: self._rehearse(images, labels))
        # The same number on every rank, so that halving stays in step, though some may have an image less.
        most = math.ceil(len(images) / weight - 1e-9) if weight > 0 else 1
        tried_first = self.sam.effective_micro_batch(most)

        rule = self.sam.when
        moments = None if rule is None else rule.state

        def attempt(micro_batch: int) -> list[float]:
            if rule is not None and moments is not None:
                rule.state = moments  # as before an attempt that failed
            if micro_batch < tried_first:
                self.sam.runner.release()
                self.sam.micro_batch = micro_batch
            try:
                with snapshot.rollback_on_error(self._stats, images.device):
                    return self._attempt(images, labels, weight, stop_requested)
            except BaseException:
                self.optimizer.zero_grad(set_to_none=True)
                raise

        totals = device.retry_with_smaller_batch(attempt, tried_first, images.shape[1:])
        loss_sum, wrong, n, stopping, grad_norm = totals
        applied = math.isfinite(grad_norm)
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        if applied:
            if self.clip_grad > 0 and grad_norm + 1e-6 > self.clip_grad:  # else torch would multiply by 1
                # Not torch.tensor: a copy of a number makes the CPU wait for the GPU.
                norm = torch.full((), grad_norm, dtype=self._params[0].dtype, device=images.device)
                nn.utils.clip_grads_with_norm_(self._params, self.clip_grad, norm)
            self.optimizer.step()
            ddp.average_over_ranks(self._stats.kept_floats(), weight)
        else:
            self._stats.restore()  # nothing of this step stays
            if rule is not None and moments is not None:
                rule.state = moments
        if self.scaler is not None:
            self.scaler.update()
        return StepResult(loss_sum / n, int(wrong), int(n), grad_norm, applied, self.sam.passes, stopping > 0)

    def _attempt(
        self, images: torch.Tensor, labels: torch.Tensor, weight: float, stop_requested: Callable[[], bool]
    ) -> list[float]:
        """SAM's gradient in `.grad`, the same on every rank, and NaN on every rank if a value anywhere was not finite.

        Returns sums over the ranks: loss, wrong and n at w, ranks that were asked to stop; and the gradient's norm.
        Raises MemoryError on all ranks if memory ran out on one.
        """
        self.optimizer.zero_grad(set_to_none=True)
        self._at_w.zero_()

        def objective(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            images = self.prepare(images)
            with self.autocast():
                logits = self.sam.model(images)
                loss = self.loss(logits, labels)
            if not self.sam.perturbed and weight > 0:
                classes = labels if labels.ndim == 1 else labels.argmax(1)  # of a mixed image the larger share
                wrong = (logits.detach().argmax(1) != classes).sum()
                self._at_w += torch.stack([loss.detach() * len(labels), wrong, wrong.new_full((), len(labels))])
            if self.penalty is not None:
                loss = loss + self.penalty()
            if weight != 1:
                loss = loss * weight
            return loss if self.scaler is None else self.scaler.scale(loss)

        ranks = self.sam.ranks
        no_memory = ddp.backward_or_complete(
            ranks, lambda: self.sam.backward(objective, images, labels), self.optimizer.zero_grad
        )
        if no_memory is not None:
            self._at_w.zero_()
        # The step's one small reduction, and its one read from the device: all decisions, with what is logged.
        at_w = self._at_w.double()
        flags = [at_w.new_full((1,), float(flag)) for flag in (no_memory is not None, stop_requested())]
        sums = collectives.all_reduce_sum(torch.cat([at_w, *flags]))
        norm = ranks.total_norm([w.grad for w in self._params if w.grad is not None]).to(sums)
        if self.scaler is not None:
            norm = norm / self.scaler.scale(torch.ones_like(norm))
        loss_sum, wrong, n, without_memory, stopping, norm = torch.cat([sums, norm.reshape(1)]).tolist()
        if without_memory:
            assert not ranks.is_sharded
            self.sam.model = ranks.rewrap()
            ranks.settle(lambda: self._rehearse(images, labels))
            raise MemoryError(no_memory or "memory ran out on another rank")
        return [loss_sum, wrong, n, stopping, norm]

    def _rehearse(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        """A backward pass on a few images that leaves no gradient, statistics or random numbers behind."""
        stats = snapshot.BatchNormStats(snapshot.batch_norms(self.sam.model))  # those of the step are kept already
        generators = snapshot.generator_states(images.device)
        n = 2 if stats.will_change else 1  # batch norm that is not frozen needs more than one
        with stats.restored(), device.oom_as_user_error(plural(n, "image")), device.uncompiled(), self.autocast():
            logits = self.sam.model(self.prepare(images[:1].expand(n, *images.shape[1:])))
            self.loss(logits, labels[:1].expand(n, *labels.shape[1:])).backward()
        self.optimizer.zero_grad()
        snapshot.set_generator_states(generators, images.device)
