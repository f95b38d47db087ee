"""One update of a run: SAM's gradient, clipped once, and the base optimizer's step at w."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from samtune import device, distributed
from samtune.errors import OutOfMemory, first_line
from samtune.gradient import SAM, Loss
from samtune.replay import Statistics, batch_norms, put_back, statistics, undone_by_an_error


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
        self._total_norm = nn.utils.get_total_norm if sam.shards is None else sam.shards.total_norm

    def __call__(self, images: torch.Tensor, labels: torch.Tensor, weight: float = 1.0) -> StepResult:
        """One update on images (batch, 3, h, w), normalised, and labels: (batch,) int64, or (batch, classes) shares.

        weight: number of images here over its mean over the ranks, where they differ.

        Where memory runs out for the gradient, all is as before the step, and it begins again with half as many images
        at once: `sam.micro_batch`, which then stays. The update is that of a step that had this micro-batch from the
        start. Raises OutOfMemory where one image does not fit, and on several ranks; nothing is updated then.
        """
        self.optimizer.zero_grad(set_to_none=True)
        kept = statistics(self._batch_norms)
        seen = self._gradient(images, labels, weight, kept)

        # The final gradient: the same on every rank, and NaN on every rank if a value anywhere was not finite.
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        grad_norm = self._total_norm([w.grad for w in self._params if w.grad is not None])
        # The step's one read from the device: the decision whether to update, with what is logged.
        sums = distributed.sum_over_ranks(torch.stack(seen).sum(0))
        loss_sum, wrong, n, norm = torch.cat([sums, grad_norm.reshape(1)]).tolist()
        applied = math.isfinite(norm)
        if applied:
            if self.clip_grad > 0:
                nn.utils.clip_grads_with_norm_(self._params, self.clip_grad, grad_norm)
            self.optimizer.step()
        else:
            put_back(kept)  # nothing of this step stays
        if self.scaler is not None:
            self.scaler.update()
        return StepResult(loss_sum / n, int(wrong), int(n), norm, applied, self.sam.passes)

    def _gradient(
        self, images: torch.Tensor, labels: torch.Tensor, weight: float, kept: Statistics
    ) -> list[torch.Tensor]:
        """SAM's gradient in `.grad`; returns sums at w: loss, wrong, n, of each part that passed at once."""
        seen: list[torch.Tensor] = []

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

        def attempt(at_once: int) -> None:
            if at_once < tried_first:
                self.sam.micro_batch = at_once
            try:
                with undone_by_an_error(kept, images.device):
                    self.sam.backward(objective, images, labels)
            except BaseException as error:
                seen.clear()
                self.optimizer.zero_grad(set_to_none=True)
                if device.is_out_of_memory(error) and distributed.world_size() > 1:
                    # The others wait in a reduction that this rank has left, perhaps half done: none can begin again.
                    raise OutOfMemory(
                        f"no memory on a rank for {at_once} of its images at once",
                        first_line(error),
                        "let fewer pass at once: a smaller micro-batch, or fewer images on each rank",
                    ) from None
                raise

        tried_first = self.sam.at_once(len(images))
        device.halved_until_it_fits(attempt, tried_first, images.shape[1:])
        return seen
