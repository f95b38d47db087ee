"""One update of Algorithm 1 (Foret et al. 2021), line by line. rho = 0 is the base optimizer's own step."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from samtune.sam import Weights, perturbation

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class StepResult:
    """What a step saw. All at w, before the update, so that SAM and SGD curves compare.

    loss: mean over the batch, nats. wrong: images whose class was missed. grad_norm: L2 norm of the final gradient
    before clipping. applied: False where a value was not finite and nothing was updated.
    """

    loss: float
    wrong: int
    grad_norm: float
    applied: bool


class Step:
    """The update of one model by one base optimizer.

    Args:
        model: maps images (batch, ...) to logits (batch, classes); its trainable parameters are float32.
        optimizer: any torch optimizer over those parameters; it steps at w, with the gradient taken at w + e.
        loss: (logits, labels) -> scalar mean.
        rho: radius of the perturbation in weight units. With 0 there is one pass and no perturbation; otherwise it may
            be set to another value between steps, as a schedule does.
        clip_grad: largest global L2 norm of the final gradient; 0 does not clip. The first gradient needs none: e
            does not depend on its scale.
        autocast: makes the context of the forward passes (mixed precision); weights and gradients stay float32.

    The perturbation is the batch's own ("m-sharpness" with m = the batch of the device). It lives inside one call and
    is never part of a state_dict.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss: Loss,
        *,
        rho: float,
        clip_grad: float,
        autocast: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self.model, self.optimizer, self.loss = model, optimizer, loss
        self.rho, self.clip_grad, self.autocast = rho, clip_grad, autocast
        self.params = [p for p in model.parameters() if p.requires_grad]
        self.weights = Weights(self.params) if rho > 0 else None

    def __call__(self, images: torch.Tensor, labels: torch.Tensor) -> StepResult:
        """One update on images (batch, 3, h, w), normalised, and labels (batch,) int64."""
        self.optimizer.zero_grad(set_to_none=True)
        masks = _generator_states(images.device)

        # Pass 1, at w: batch-norm statistics update here, if they update at all.
        with self.autocast():
            logits = self.model(images)
            loss = self.loss(logits, labels)
        wrong = (logits.detach().argmax(1) != labels).sum()
        if self.weights is None:
            loss.backward()  # type: ignore[no-untyped-call]
        else:
            # g1: by autograd.grad, which leaves .grad and its hooks to the final gradient alone.
            g1 = torch.autograd.grad(loss, self.params, materialize_grads=True)
            # e = rho * g1 / ||g1||_2
            e = perturbation(g1, self.rho)
            del g1, logits
            # Pass 2, at w + e: same images, labels, dropout and drop-path masks; statistics stay as pass 1 left them.
            _set_generator_states(masks, images.device)
            with self.weights.perturbed(e), _statistics_untouched(self.model):
                with self.autocast():
                    loss_at_e = self.loss(self.model(images), labels)
                loss_at_e.backward()  # type: ignore[no-untyped-call]

        # The final gradient is clipped, once; then the base optimizer steps at w.
        grad_norm = nn.utils.get_total_norm([p.grad for p in self.params if p.grad is not None])
        # The step's one read from the device: the decision whether to update, with what is logged.
        loss_value, wrong_value, norm_value = torch.stack([loss.detach(), wrong, grad_norm]).tolist()
        applied = all(value - value == 0 for value in (loss_value, norm_value))  # False for inf and NaN
        if applied:
            if self.clip_grad > 0:
                nn.utils.clip_grads_with_norm_(self.params, self.clip_grad, grad_norm)
            self.optimizer.step()
        return StepResult(loss_value, int(wrong_value), norm_value, applied)

    @property
    def passes(self) -> int:
        """Forward-backward passes in one call."""
        return 1 if self.weights is None else 2


def _generator_states(device: torch.device) -> list[torch.Tensor]:
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return states


def _set_generator_states(states: list[torch.Tensor], device: torch.device) -> None:
    """Draw the same random numbers again: pass 2 has the masks of pass 1, and ends in the state that pass 1 left."""
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)


@contextmanager
def _statistics_untouched(model: nn.Module) -> Iterator[None]:
    """Normalise as the modules do now, but leave running mean, variance and num_batches_tracked as they are."""
    updating = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training]
    updating = [m for m in updating if m.track_running_stats]
    for module in updating:
        module.track_running_stats = False
    try:
        yield
    finally:
        for module in updating:
            module.track_running_stats = True
