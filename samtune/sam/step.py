"""One update of a run: SAM's gradient, clipped once, and the base optimizer's step at w."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from samtune.distributed import collectives, device
from samtune.errors import OutOfMemory, first_line
from samtune.sam.gradient import SAM, Loss
from samtune.sam.snapshot import (
    Statistics,
    batch_norms,
    bn_stats,
    generator_states,
    restore_bn_stats,
    rollback_on_error,
    set_generator_states,
)
from samtune.text import plural


@dataclass(frozen=True)
class StepResult:
    """What a step saw, summed over all ranks; at w, before the update, so that SAM and SGD curves compare.

    loss: mean over the samples of pass 1, nats. wrong: images of those whose class was missed. n: how many they were.
    grad_norm: L2 norm of the final gradient before clipping. applied: False where a value was not finite and nothing
    was updated. passes: forward-backward passes over the batch. stop_requested: whether any rank was.
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
        penalty: () -> scalar that is added to the loss in all passes, but not to the loss that is reported.

    Raises ValueError for a penalty on a sharded model: it would see one rank's parts.
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
        self._batch_norms = batch_norms(sam.model)
        if penalty is not None and sam.shards is not None:
            raise ValueError("a penalty on weights cannot be part of the loss of a sharded model")
        # Ranks that meet in every pass: one that leaves it cannot be waited for.
        self._in_step = sam.shards is not None or any(isinstance(m, nn.SyncBatchNorm) for m in self._batch_norms)
        self._total_norm = nn.utils.get_total_norm if sam.shards is None else sam.shards.total_norm

    def __call__(
        self,
        images: torch.Tensor,
        labels: torch.Tensor,
        weight: float = 1.0,
        stop_requested: Callable[[], bool] = bool,
    ) -> StepResult:
        """One update on images (batch, 3, h, w), normalised, and labels: (batch,) int64, or (batch, classes) shares.

        weight: number of images here over its mean over the ranks, where they differ; 0 for a rank that has none, and
        is given one so that it can take part. stop_requested: whether somebody wants this rank to end; the ranks decide
        that together.

        Where memory runs out for the gradient, on any rank, all is as before the step on all of them, and it begins
        again with half as many images at once: `sam.micro_batch`, which then stays. The update is that of a step that
        had this micro-batch from the start. Raises OutOfMemory where one image does not fit; nothing is updated then.
        """
        kept = bn_stats(self._batch_norms)
        self._settle_reductions(images, labels)
        # On all ranks the same number, which is halved on all of them, though some may have an image less.
        most = math.ceil(len(images) / weight - 1e-9) if weight > 0 else 1
        tried_first = self.sam.effective_micro_batch(most)

        def attempt(micro_batch: int) -> list[float]:
            if micro_batch < tried_first:
                self.sam.micro_batch = micro_batch
            try:
                with rollback_on_error(kept, images.device):
                    return self._attempt(images, labels, weight, stop_requested)
            except BaseException:
                self.optimizer.zero_grad(set_to_none=True)
                raise

        decided = device.retry_with_smaller_batch(attempt, tried_first, images.shape[1:])
        loss_sum, wrong, n, asked, grad_norm = decided
        applied = math.isfinite(grad_norm)
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        if applied:
            if self.clip_grad > 0:
                norm = torch.tensor(grad_norm, dtype=self._params[0].dtype, device=images.device)
                nn.utils.clip_grads_with_norm_(self._params, self.clip_grad, norm)
            self.optimizer.step()
            self._share_statistics(kept, weight)
        else:
            restore_bn_stats(kept)  # nothing of this step stays
        if self.scaler is not None:
            self.scaler.update()
        return StepResult(loss_sum / n, int(wrong), int(n), grad_norm, applied, self.sam.passes, asked > 0)

    def _attempt(
        self, images: torch.Tensor, labels: torch.Tensor, weight: float, stop_requested: Callable[[], bool]
    ) -> list[float]:
        """SAM's gradient in `.grad`, the same on every rank, and NaN on every rank if a value anywhere was not finite.

        Returns what the ranks decide by: sums at w of loss, wrong and n, how many were asked to end; norm of the
        gradient. Raises an error of memory on all ranks if it ran out on one.
        """
        self.optimizer.zero_grad(set_to_none=True)
        seen: list[torch.Tensor] = []

        def objective(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            with self.autocast():
                logits = self.sam.model(images)
                loss = self.loss(logits, labels)
            if not self.sam.perturbed:
                classes = labels if labels.ndim == 1 else labels.argmax(1)  # of a mixed image the larger share
                wrong = (logits.detach().argmax(1) != classes).sum()
                sums = torch.stack([loss.detach() * len(labels), wrong, wrong.new_tensor(len(labels))])
                seen.append(sums if weight > 0 else torch.zeros_like(sums))
            if self.penalty is not None:
                loss = loss + self.penalty()
            if weight != 1:
                loss = loss * weight
            return loss if self.scaler is None else self.scaler.scale(loss)

        no_memory = ""
        try:
            self.sam.backward(objective, images, labels)
        except Exception as error:
            if collectives.world_size() == 1 or not device.is_out_of_memory(error):
                raise
            if self._in_step:
                raise OutOfMemory(
                    f"no memory on rank {collectives.rank()} for its part of a step",
                    first_line(error),
                    "give a smaller --micro-batch or --batch-size: with --shard or --sync-bn no step can begin again",
                ) from None
            no_memory = first_line(error)
        if no_memory:  # the others wait in a reduction
            seen = [torch.zeros(3, device=images.device)]
            self.optimizer.zero_grad(set_to_none=True)
            device.free_memory()
            self.sam.complete()
        # The step's one small reduction, and its one read from the device: all decisions, with what is logged.
        flags = torch.tensor([bool(no_memory), stop_requested()], dtype=torch.float64).to(images.device)
        sums = collectives.all_reduce_sum(torch.cat([torch.stack(seen).sum(0).double(), flags]))
        norm = self._total_norm([w.grad for w in self._params if w.grad is not None]).to(sums)
        if self.scaler is not None:
            norm = norm / self.scaler.scale(torch.ones_like(norm))
        loss_sum, wrong, n, without_memory, asked, norm = torch.cat([sums, norm.reshape(1)]).tolist()
        if without_memory:
            self.sam.model = collectives.rewrap(self.sam.model)
            self._settle_reductions(images, labels)
            raise MemoryError(no_memory or "memory ran out on another rank")
        return [loss_sum, wrong, n, asked, norm]

    def _settle_reductions(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        """Have torch arrange its reductions before the first of them counts.

        It arranges them anew after the first gradient, by the order in which its parts came, and on three ranks or more
        sums then differ in the last bit: a run that goes on would not equal one that was not interrupted.
        """
        model = self.sam.model
        if not isinstance(model, collectives.DataParallel) or model.is_settled:
            return
        kept, generators = bn_stats(self._batch_norms), generator_states(images.device)
        n = 2 if kept else 1  # batch norm that is not frozen wants more than one
        with device.oom_as_user_error(plural(n, "image")), self.autocast():
            loss = self.loss(model(images[:1].expand(n, *images.shape[1:])), labels[:1].expand(n, *labels.shape[1:]))
            loss.backward()
        self.optimizer.zero_grad(set_to_none=True)
        restore_bn_stats(kept)
        set_generator_states(generators, images.device)
        model.is_settled = True

    def _share_statistics(self, kept: Statistics, weight: float) -> None:
        """Batch-norm statistics that update become their mean over the ranks, each of which has seen its own images."""
        updated = [buffer for buffer, _ in kept if buffer.is_floating_point()]
        if collectives.world_size() > 1 and updated:
            means = collectives.all_reduce_sum_lists(list(torch._foreach_mul(updated, weight)))
            torch._foreach_copy_(updated, torch._foreach_div(means, collectives.world_size()))
