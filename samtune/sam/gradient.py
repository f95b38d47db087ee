"""The gradient of Algorithm 1 (Foret et al. 2021)."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from samtune.distributed import collectives, ddp
from samtune.sam.batch import Batch, check_divisible, chunk, head, num_samples, split
from samtune.sam.cuda_graphs import GraphRunner
from samtune.sam.filters import first_match, select_parameters, unwrapped
from samtune.sam.gradient_rule import GradientRule
from samtune.sam.known_direction import ONE_PASS, KnownDirection
from samtune.sam.losses import Loss, ScalarLoss, as_scalar, explain_second_backward
from samtune.sam.perturbation import Perturbation
from samtune.sam.runner import EagerRunner
from samtune.sam.second_derivative import HESSIAN_PASSES, differentiable_gradient
from samtune.sam.shaking import shaking_modules, true_gradient
from samtune.sam.snapshot import batch_norms, bn_stats_frozen, generator_states, set_generator_states
from samtune.sam.suffix import Cut

Ascent = Literal["gradient", "random", "momentum", "previous"]

_FORWARD_PASS = 1 / 3  # a backward pass costs about two forward passes


def sam_passes(
    ascent_steps: int,
    ascent_fraction: float,
    ascent: Ascent = "gradient",
    second_order: bool = False,
    suffix_share: float = 1.0,
) -> float:
    """Forward-backward passes over the batch in a step of SAM. suffix_share: what pass 1 costs of a pass."""
    if ascent in ONE_PASS:
        return 1
    before = _FORWARD_PASS if ascent == "random" else ascent_steps + HESSIAN_PASSES * second_order
    return 1 + before * ascent_fraction * suffix_share


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
    state to save. (What ascent "previous" needs is in the state of the optimizer.)

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
        perturb_from: perturb only the network from this module on, such as "layer4", of what `perturb` selects. All
            data must pass through the module, once. What is before it is then computed once for both passes, where
            `shares_front` is true (suffix.py).
        rho_factors: radius of the parameters whose name holds a regular expression, in units of rho; the first that
            matches counts, 1 where none does. The ball is then ||e_g / rho_g||_p <= 1 over all groups together.
        m: the samples that share a perturbation ("m-sharpness", Foret et al. 2021, section 4.1). "device": the batch,
            on each rank its own. A number: pieces of so many samples, one after the other, each with a perturbation of
            its own; their gradients are averaged, which is gradient accumulation too. "global": the batches of all
            ranks together. A process group: the batches of its ranks together.
        ascent_fraction: share of the samples that pass 1 uses, the first ones.
        ascent_steps: passes that look for the perturbation, each adding rho / ascent_steps along its dual gradient.
        ascent: "gradient"; or "random", a Gaussian direction of the same norm in the place of the gradient g1 (an
            ablation of Foret et al. 2021): for p = 2, e = rho z / ||z||_2 with z ~ N(0, 1) for each perturbed weight.
            Each perturbation draws its own z from torch's generator. Pass 1 is then a forward pass only: it gives the
            loss to return, and updates batch-norm statistics. Two more are experimental. They need `optimizer`, and one
            pass, at w + e, which gives the loss to return and updates batch-norm statistics. e is the same for all
            samples, on all ranks. While there is no direction, as in the first step, or it is zero, e is zero.
            "momentum" (Momentum-SAM, Becker et al. 2024, Algorithm 1, and their code): e = -rho b / ||b||_2 for p = 2.
            b is the momentum that the optimizer keeps, `momentum_buffer` (SGD) or `exp_avg` (Adam): an average of
            gradients (w -= lr b). So w + e is ahead of w, where the updates lead, and not uphill: to first order the
            loss falls along -b, and it rises there only if so long a step overshoots. Between steps the weights are w,
            while the paper's are w + e.
            "previous": e = rho g / ||g||_2 for p = 2, uphill. g is the gradient of the previous step as it came to
            `optimizer.step()`, clipped if it was; a step that a GradScaler skips leaves g as it was. It takes the
            memory of a gradient, and is in the optimizer's state as "previous_gradient", so that a checkpoint has it.
        optimizer: the base optimizer, for ascent "momentum" and "previous", which read its state; others ignore it.
        second_order: add the term that Algorithm 1 drops, which gives the exact gradient of w -> L(w + e(w)). A third
            pass differentiates the gradient again. For p = 2, one ascent step and one process. Attention is computed by
            its plain formula, since the fused kernels have no second derivative.
        when: experimental: perturb only where this rule says so, by the gradient of pass 1; else that gradient is the
            result, for one pass. In one process, with one perturbation, of all parameters, for the whole batch.
        micro_batch: the most samples that pass through the model at once; None: all that share a perturbation. It
            bounds memory and changes nothing else: the samples of m still share one perturbation, made of their mean
            gradient. But each micro-batch draws its own dropout and drop-path masks (the same in all passes, not those
            of the whole batch), and batch norm that is not frozen normalises each by itself. May be set between calls.

    Raises:
        ValueError: an argument out of range, 16-bit weights, a filter that matches no parameter, another m than a
            sharded model can have, or an optimizer that is missing or has no momentum.
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
        perturb_from: str | None = None,
        rho_factors: Mapping[str, float] | None = None,
        m: Literal["device", "global"] | int | collectives.Group = "device",
        ascent_fraction: float = 1.0,
        ascent_steps: int = 1,
        ascent: Ascent = "gradient",
        optimizer: torch.optim.Optimizer | None = None,
        second_order: bool = False,
        when: GradientRule | None = None,
        micro_batch: int | None = None,
    ) -> None:
        if not 0 < ascent_fraction <= 1:
            raise ValueError(f"ascent_fraction {ascent_fraction:g}: must be in (0, 1]")
        if ascent_steps < 1 or (isinstance(m, int) and m < 1):
            raise ValueError(f"ascent_steps {ascent_steps}, m {m}: must be at least 1")
        if m is None or (isinstance(m, str) and m not in ("device", "global")):
            raise ValueError(f'm {m!r}: must be "device", "global", a number of samples or a process group')
        if ascent not in get_args(Ascent):
            raise ValueError(f"ascent {ascent!r}: must be one of {', '.join(get_args(Ascent))}")
        if ascent == "random" and (ascent_steps > 1 or second_order):
            raise ValueError("ascent random: a direction that was drawn has no further ascent steps, and no derivative")
        if ascent in ONE_PASS and (ascent_steps > 1 or ascent_fraction < 1 or second_order or perturb_from is not None):
            others = "ascent_steps, ascent_fraction, second_order and perturb_from"
            raise ValueError(f"ascent {ascent}: there is no pass 1, which {others} are about")
        if ascent in ONE_PASS and m != "device":  # as it must be for a sharded model
            raise ValueError(f"ascent {ascent}: the perturbation is the same for all samples: leave m out")
        if second_order and (p != 2 or ascent_steps > 1 or collectives.is_initialized()):
            raise ValueError("second_order: only for p = 2, one ascent step and one process")
        self.model = model
        self._inner = unwrapped(model)
        self.rho = rho
        self.m = m
        self.micro_batch = micro_batch
        self.ascent_fraction, self.ascent_steps = ascent_fraction, ascent_steps
        self.ascent, self.second_order = ascent, second_order
        self.perturbed = False
        """Whether the weights are w + e at this moment, for a loss that wants to know: False in pass 1. Also True in
        pass 3 of second_order, which is at w again, and False in the one pass of ascent momentum and previous, which is
        at w + e: so a loss that records something in pass 1, or the only one, records it once."""
        named = select_parameters(self._inner, perturb)
        if perturb_from is not None and second_order:
            raise ValueError("second_order: not with perturb_from, whose front has no derivative of the perturbation")
        self._cut = None if perturb_from is None else Cut(self._inner, perturb_from)
        self._is_whole = micro_batch is None  # whether samples that share a perturbation passed at once, the last time
        self.when = when
        """The rule that decides in each step, or None."""
        self._has_perturbed = True  # in the last call
        self.suffix_share = 1.0
        """What a pass over the network from perturb_from on costs of a whole one, for `passes`: set it if you know."""
        if self._cut is not None:
            named = {name: w for name, w in named.items() if name in self._cut.suffix}
            if not named:
                raise ValueError(f"pattern {perturb!r} matches no trainable parameter from {perturb_from} on")
        self._params = list(named.values())
        if when is not None:
            trainable = sum(w.requires_grad for w in self._inner.parameters())
            if ascent != "gradient" or second_order or ascent_fraction < 1 or len(named) < trainable:
                raise ValueError("when: a step without pass 2 needs the whole gradient of the whole batch from pass 1")
            if isinstance(m, int) or collectives.is_initialized():
                raise ValueError("when: only with one perturbation for the batch, in one process")
        self.perturb_from = perturb_from
        self.ranks = ddp.ranks_of(model, self._inner, self._params, m)
        """The part of this that concerns other ranks."""
        if ascent == "random" and self.ranks.is_sharded:
            raise ValueError("ascent random: not for a sharded model, of which no rank draws a whole direction")
        self._known_direction = KnownDirection(ascent, optimizer, self._params) if ascent in ONE_PASS else None
        self._perturbation = Perturbation(
            self.ranks.parts(self._params),
            p=p,
            adaptive=[adaptive and w.ndim > 1 for w in self._params],
            eta=eta,
            factors=[first_match(rho_factors or {}, name) for name in named],
            norms=self.ranks.norms,
        )
        if rho > 0:
            self._perturbation.allocate_backup()
        self._device = self._params[0].device
        self._batch_norms = batch_norms(model)
        self._shaking = [one for one in shaking_modules(model) if self._cut is None or self._cut.holds(one)]
        self.runner = EagerRunner(model, self._params, self.ranks)
        """How forward-backward passes are run."""

    @classmethod
    def split(cls, prefix: nn.Module, suffix: nn.Module, rho: float = 0.05, **options: Any) -> "SAM":
        """SAM of the suffix alone, for a network in two parts of one's own: logits = suffix(prefix(x)).

        `sam.model` is the two in sequence; the loss must call it, and the optimizer has its parameters. options: as of
        SAM, but perturb_from, which is the suffix.
        """
        return cls(nn.Sequential(prefix, suffix), rho, perturb_from="1", **options)

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

    def split_batch(self, *batch: Any) -> list[Batch]:
        """A batch in the parts that pass through the model at once; where ranks meet in every pass, as many on each."""
        return self._split(batch, self.effective_micro_batch(num_samples(batch) or 1))

    def use_cuda_graphs(self, *, required: bool = False) -> None:
        """Record the passes as CUDA graphs; see cuda_graphs.GraphRunner, also for `required`.

        Raises ValueError with second_order, since a gradient that was recorded cannot be differentiated, and with when.
        """
        if self.second_order or self.when is not None:
            raise ValueError("second_order, when: such passes cannot be recorded as CUDA graphs")
        self.runner = GraphRunner(
            self._inner, self._params, self.ranks, is_perturbed=lambda: self.perturbed, required=required
        )

    @property
    def perturbed_parameters(self) -> list[nn.Parameter]:
        """The parameters that are perturbed, in the model's order."""
        return list(self._params)

    @property
    def shares_front(self) -> bool:
        """Whether the front of a network that is perturbed from a module on is computed once for all passes.

        It is not where pass 1 has fewer samples than pass 2, where the samples that share a perturbation do not pass
        through the model at once, and where the model is compiled, sharded, recorded or recomputed: then each pass
        computes it anew, to the same result.
        """
        if self._cut is None or self.ascent_fraction < 1 or not self._is_whole or hasattr(self.model, "_orig_mod"):
            return False
        plain = not any(
            getattr(module, "grad_checkpointing", False) or module._compiled_call_impl is not None
            for module in self._inner.modules()
        )
        return plain and isinstance(self.runner, EagerRunner) and not self.ranks.is_sharded

    @property
    def passes(self) -> float:
        """Forward-backward passes over the batch in one call; with `when`, in the last one."""
        if self.rho == 0 or not self._has_perturbed:
            return 1
        share = self.suffix_share if self.shares_front else 1.0
        return sam_passes(self.ascent_steps, self.ascent_fraction, self.ascent, self.second_order, share)

    def gradient_share(self) -> float | None:
        """L2 norm of the perturbed parameters' `.grad` over that of all `.grad`; None without a gradient.

        Of a radius rho, plain SAM moves these parameters by rho times this share. So a part of the network takes SAM's
        step length with a radius of its own that is smaller by it (for p = 2, not adaptive).
        """
        norms = [
            torch.nn.utils.get_total_norm([w.grad for w in params if w.grad is not None])
            for params in (self._params, self._inner.parameters())
        ]
        return float(norms[0] / norms[1]) if norms[1] > 0 else None

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
            The mean loss at w (of the samples of pass 1), detached: what SGD's curve would show. With ascent momentum
            or previous, that at w + e.

        A loss or gradient that is not finite, in any pass, makes the whole gradient NaN: every rank and every
        GradScaler sees it. Batch-norm statistics update in pass 1, if they update at all.

        Raises:
            ValueError: the batch is empty, its tensors disagree on the number of samples, or it has none and is to be
                divided; a loss that is no scalar, has no gradient, or has called backward itself.
            TypeError: a loss that is no tensor.
        """
        n = num_samples(batch)
        if isinstance(self.m, int) or self.micro_batch is not None or self.ascent_fraction < 1:
            check_divisible(batch, n)
        n = 1 if n is None else n
        scalar_loss = as_scalar(loss)
        together = self.m if isinstance(self.m, int) else n  # the samples of one perturbation
        has_pass_1 = self.rho > 0 and self._known_direction is None
        pieces = split(batch, together) if has_pass_1 else self.split_batch(*batch)
        at_w = []
        with (
            self.ranks.during_backward(self.ascent_steps if has_pass_1 else 0),
            explain_second_backward(),
            self._perturbed_along_known() if self.rho > 0 and not has_pass_1 else nullcontext(),
        ):
            backward = self._second_order_backward if self.second_order and has_pass_1 else self._backward
            for piece in pieces:
                share = (num_samples(piece) or n) / n
                with nullcontext() if piece is pieces[-1] else self.ranks.no_sync():
                    at_w.append(share * backward(scalar_loss, piece, share))
        return torch.stack(at_w).sum()

    def _backward(self, loss: ScalarLoss, batch: Batch, share: float) -> torch.Tensor:
        """Algorithm 1: add the gradient of one perturbation, times share, to `.grad`; return the loss at w."""
        if self.rho == 0 or self._known_direction is not None:
            return self.runner.descend(loss, batch, share)

        # Drawn before the masks, whose random numbers pass 2 draws again.
        direction = self._random_direction() if self.ascent == "random" else None
        masks = generator_states(self._device)
        part = self._ascent_part(batch)
        radius = self.rho / self.ascent_steps
        self._is_whole = len(self._micro_batches(batch)) == 1
        cut = self._cut if self.shares_front else None
        try:
            # Pass 1, at w: batch-norm statistics update here, if they update at all.
            with nullcontext() if cut is None else cut.first_pass():
                if direction is None:
                    at_w, g1 = self._ascent_gradient(loss, part)
                else:
                    at_w, g1 = self._mean_loss(loss, part), direction
            self._has_perturbed = self.when is None or self.when(g1)
            if not self._has_perturbed:
                self._add_gradient(g1, share, at_w)
                return at_w
            # e = rho * dual(g1)
            with self._perturb(g1, radius):
                # Further ascent steps, if any, each from where the last one ended.
                for _ in range(self.ascent_steps - 1):
                    set_generator_states(masks, self._device)
                    with nullcontext() if cut is None else cut.later_pass(with_front=False):
                        more = self._ascent_gradient(loss, part)[1]
                    self._perturbation.add_(more, radius)
                    torch.clear_autocast_cache()  # the weights moved again
                # Pass 2, at w + e: same samples, same masks; statistics stay as pass 1 left them.
                set_generator_states(masks, self._device)
                with nullcontext() if cut is None else cut.later_pass(with_front=True):
                    self._descend(loss, batch, share, at_w)
        finally:
            if cut is not None:
                cut.release()
        return at_w

    @contextmanager
    def _perturbed_along_known(self) -> Iterator[None]:
        """Inside the block weights are w + e, for the one pass of a step; w while there is no direction."""
        assert self._known_direction is not None
        direction = self._known_direction()
        with self._perturb(direction, self.rho, statistics_stay=False) if direction else nullcontext():
            yield

    def _add_gradient(self, g1: list[torch.Tensor], share: float, at_w: torch.Tensor) -> None:
        """Add a gradient that is there, times share, to `.grad`; NaN if the loss at w is not finite."""
        torch._foreach_mul_(g1, torch.where(at_w.isfinite(), share, math.nan))
        for w, grad in zip(self._params, g1, strict=True):
            if w not in self.runner.unused:  # SGD would not touch it, and weight decay would
                w.grad = grad if w.grad is None else w.grad.add_(grad)

    def _second_order_backward(self, loss: ScalarLoss, batch: Batch, share: float) -> torch.Tensor:
        """`_backward` with the derivative of e: add the gradient of L(w + e(w)), times share, to `.grad`.

        It is g2 + (de/dw)^T g2, with g2 the gradient at w + e. e depends on w through g1, whose derivative is the
        Hessian at w; pass 3 multiplies the Hessian by a vector (Pearlmutter 1994).
        """
        masks = generator_states(self._device)
        part = self._ascent_part(batch)
        with sdpa_kernel(SDPBackend.MATH), self._own_grads():
            at_w, g1 = self._ascent_gradient(loss, part)
            with self._perturb(list(g1), self.rho):
                set_generator_states(masks, self._device)
                self._descend(loss, batch, share, at_w)
            after = generator_states(self._device)
            g2 = [torch.zeros_like(w) if w.grad is None else w.grad for w in self._params]
            by_g1, by_w = self._perturbation.transposed_derivatives(g1, g2, self.rho)
            # Pass 3, at w: same samples and masks as in pass 1.
            set_generator_states(masks, self._device)
            self._add_hessian_product(loss, part, by_g1)
            set_generator_states(after, self._device)  # as after a plain step, also if pass 3 had a part of the batch
            for w, term in zip(self._params, by_w, strict=True):
                w.grad = term if w.grad is None else w.grad + term
        return at_w

    def _add_hessian_product(self, loss: ScalarLoss, batch: Batch, vector: list[torch.Tensor]) -> None:
        """Add H v to `.grad`. H has a row for each parameter, and a column for each perturbed one.

        vector: v, one tensor for each perturbed parameter.
        """
        recomputes = any(getattr(module, "grad_checkpointing", False) for module in self._inner.modules())
        with self._after_pass_1(), true_gradient(self._shaking):
            for micro, share in self._micro_batches(batch):
                grads = differentiable_gradient(partial(loss, *micro), self._params, recomputes=recomputes)
                if grads:
                    torch.autograd.backward(list(grads.values()), [share * vector[i] for i in grads])

    @contextmanager
    def _own_grads(self) -> Iterator[None]:
        """Inside the block `.grad` holds only the gradients of the block; afterwards the earlier ones are added."""
        before = {w: w.grad for w in self._inner.parameters() if w.grad is not None}
        for w in before:
            w.grad = None
        try:
            yield
        finally:
            for w, grad in before.items():
                w.grad = grad if w.grad is None else grad.add_(w.grad)

    def _ascent_part(self, batch: Batch) -> Batch:
        """The samples of pass 1."""
        n = num_samples(batch) or 1
        return batch if self.ascent_fraction == 1 else head(batch, math.ceil(self.ascent_fraction * n))

    def _random_direction(self) -> list[torch.Tensor]:
        """Normal random numbers in the place of g1, summed over ranks that share a perturbation: normal again."""
        assert not self.ranks.is_sharded
        return self.ranks.reduce_ascent([torch.randn_like(w, requires_grad=False) for w in self._params])

    def _mean_loss(self, loss: ScalarLoss, batch: Batch) -> torch.Tensor:
        """Mean loss at the present weights, detached."""
        return torch.stack([share * self.runner.evaluate(loss, x) for x, share in self._micro_batches(batch)]).sum()

    def _descend(self, loss: ScalarLoss, batch: Batch, share: float, at_w: torch.Tensor) -> None:
        """Add the gradient at the present weights, times share, to `.grad`. at_w: as in EagerRunner.descend."""
        micro_batches = self._micro_batches(batch)
        for micro, of_batch in micro_batches:
            with nullcontext() if micro is micro_batches[-1][0] else self.ranks.no_sync():
                self.runner.descend(loss, micro, share * of_batch, at_w)

    def _ascent_gradient(self, loss: ScalarLoss, batch: Batch) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Loss and gradient at the present weights, detached; the gradient of all ranks that share a perturbation."""
        micro_batches = self._micro_batches(batch)
        with true_gradient(self._shaking):
            if self.ranks.is_sharded:
                return self.ranks.ascent_gradient(
                    loss, micro_batches, self._params, self.runner.descend, over_replicas=self.m == "global"
                )
            if len(micro_batches) == 1:
                mean, grads = self.runner.ascend(loss, batch)
            else:
                mean, grads = torch.zeros((), device=self._device), []
                for micro, share in micro_batches:
                    value, more = self.runner.ascend(loss, micro)
                    mean = mean + share * value
                    if grads:
                        torch._foreach_add_(grads, more, alpha=share)
                    else:
                        grads = list(torch._foreach_mul(more, share))
                    del more  # before the next one needs the memory
        return mean, self.ranks.reduce_ascent(grads)

    def _micro_batches(self, batch: Batch) -> list[tuple[Batch, float]]:
        """What passes through the model at once, and its share of the batch."""
        n = num_samples(batch) or 1
        return [(micro, (num_samples(micro) or n) / n) for micro in self._split(batch, self.micro_batch or n)]

    def _split(self, batch: Batch, size: int) -> list[Batch]:
        """Micro-batches of `size` samples; if the ranks meet in every pass, the same number of them on each."""
        count = None if self.micro_batch is None else self.ranks.num_micro_batches(num_samples(batch) or 1, size)
        return split(batch, size) if count is None else chunk(batch, count)

    @contextmanager
    def _perturb(self, g1: list[torch.Tensor], radius: float, *, statistics_stay: bool = True) -> Iterator[None]:
        """Inside the block weights are w + e, batch-norm statistics stay, and the model refuses to be saved.

        g1: one gradient per perturbed parameter. The list is emptied, since pass 2 needs the memory. statistics_stay:
        False for the only pass of a step.
        """
        guard = self._inner.register_state_dict_pre_hook(_refuse_to_save)
        try:
            with (
                self._perturbation.perturbed(g1, radius),
                self._after_pass_1() if statistics_stay else _fresh_autocast_cache(),
            ):
                g1.clear()
                yield
        finally:
            guard.remove()

    @contextmanager
    def _after_pass_1(self) -> Iterator[None]:
        """Inside the block batch-norm statistics stay, and `perturbed` is True: pass 1 is over."""
        try:
            with bn_stats_frozen(self._batch_norms), _fresh_autocast_cache():
                self.perturbed = True
                yield
        finally:
            self.perturbed = False


@contextmanager
def _fresh_autocast_cache() -> Iterator[None]:
    """Weights are cast to 16 bits anew in the block, and after it."""
    torch.clear_autocast_cache()  # 16-bit copies of w, where a caller's autocast is around all passes
    try:
        yield
    finally:
        torch.clear_autocast_cache()


def _refuse_to_save(*_: Any) -> None:
    raise RuntimeError("the weights are perturbed at this moment (w + e): save the model between two steps of SAM")
