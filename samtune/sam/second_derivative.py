"""The derivative of a gradient along vectors: products with the Hessian, without the matrix (Pearlmutter 1994)."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

HESSIAN_PASSES = 3
"""A product with the Hessian in forward-backward passes, each of which is three forward passes' work.

It goes forward (1), backward (2), and backward through both (6).
"""


def differentiable_gradient(
    loss: Callable[[], torch.Tensor], params: Sequence[nn.Parameter], *, recomputes: bool = False
) -> dict[int, torch.Tensor]:
    """The gradient of a loss, () -> (), to be differentiated again: by the number of the parameter in `params`.

    A gradient that is constant, such as that of a linear loss, or of a parameter that the loss does not use, has no
    derivative and is left out. recomputes: whether activations are recomputed in the backward pass, which must then
    have the very operations of the forward pass.
    """
    with nullcontext() if recomputes else _CheapSecondDerivatives():
        at_w = loss()
        grads = torch.autograd.grad(at_w, params, create_graph=True, materialize_grads=True)
    return {number: grad for number, grad in enumerate(grads) if grad.requires_grad}


class _CheapSecondDerivatives(TorchFunctionMode):
    """Inside the block two operations have second derivatives that cost what first derivatives do.

    On a CPU, torch differentiates the gradient of a grouped convolution group by group, and that of a batch norm by a
    dozen passes over the activations: together two thirds of the time of a product for an EfficientNet.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        cheap: dict[Callable[..., Any], Callable[..., Any]] = {torch.conv2d: _conv2d, F.batch_norm: _batch_norm}
        chosen = cheap.get(func, func) if args else func  # the names of torch's arguments are not ours
        return chosen(*args, **(kwargs or {}))


def _batch_norm(
    x: torch.Tensor,
    mean: torch.Tensor | None,
    var: torch.Tensor | None,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> torch.Tensor:
    """F.batch_norm; by frozen statistics it is one product and one sum for each channel."""
    if training or mean is None or var is None or x.dtype != var.dtype or x.element_size() < 4:
        return F.batch_norm(x, mean, var, weight, bias, training, momentum, eps)
    scale = torch.rsqrt(var + eps) if weight is None else weight * torch.rsqrt(var + eps)
    shift = -mean * scale if bias is None else bias - mean * scale
    of_channel = (-1,) + (1,) * (x.ndim - 2)
    return x * scale.view(of_channel) + shift.view(of_channel)


def _conv2d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> torch.Tensor:
    """torch.conv2d; grouped convolutions by `_Convolution`."""
    plain = groups == 1 or isinstance(padding, str) or x.ndim != 4
    if plain or torch.is_autocast_enabled(x.device.type):  # under autocast the operands differ in precision
        return torch.conv2d(x, weight, bias, stride, padding, dilation, groups)
    assert not isinstance(padding, str)
    stride, padding, dilation = ([v] * 2 if isinstance(v, int) else list(v) for v in (stride, padding, dilation))
    y: torch.Tensor = _Convolution.apply(x, weight, (stride, padding, dilation, False, [0, 0], groups))
    return y if bias is None else y + bias.view(-1, 1, 1)


class _Convolution(torch.autograd.Function):
    """y = x * w, a convolution. `how`: stride, padding, dilation, whether transposed, output padding, groups."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, w: torch.Tensor, how: tuple[Any, ...]) -> torch.Tensor:
        ctx.save_for_backward(x, w)
        ctx.how = how
        return torch.convolution(x, w, None, *how)

    @staticmethod
    def backward(ctx: Any, by_y: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        by_x, by_w = _ConvolutionBackward.apply(by_y, *ctx.saved_tensors, ctx.how, ctx.needs_input_grad[:2])
        return by_x, by_w, None


class _ConvolutionBackward(torch.autograd.Function):
    """The gradients of `_Convolution` by x and w: by_x = A(by_y, w), linear in both, and by_w = B(by_y, x).

    The derivative of the function along_x . by_x + along_w . by_w, which `backward` is asked for, by by_y is
    along_x * w + x * along_w; by x it is A(by_y, along_w); by w it is B(by_y, along_x).
    """

    @staticmethod
    def forward(
        ctx: Any,
        by_y: torch.Tensor,
        x: torch.Tensor,
        w: torch.Tensor,
        how: tuple[Any, ...],
        needed: tuple[bool, bool],
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        ctx.save_for_backward(by_y, x, w)
        ctx.set_materialize_grads(False)
        ctx.how = how
        return _gradients(by_y, x, w, how, *needed)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, along_x: torch.Tensor | None, along_w: torch.Tensor | None) -> tuple[Any, ...]:
        (by_y, x, w), how = ctx.saved_tensors, ctx.how
        _, x_needed, w_needed = ctx.needs_input_grad[:3]
        of_by_y = of_x = of_w = None
        if along_x is not None:
            of_by_y = torch.convolution(along_x, w, None, *how)
            of_w = _gradients(by_y, along_x, w, how, False, w_needed)[1]
        if along_w is not None:
            more = torch.convolution(x, along_w, None, *how)
            of_by_y = more if of_by_y is None else of_by_y + more
            of_x = _gradients(by_y, x, along_w, how, x_needed, False)[0]
        return of_by_y, of_x, of_w, None, None


def _gradients(
    by_y: torch.Tensor, x: torch.Tensor, w: torch.Tensor, how: tuple[Any, ...], by_x: bool, by_w: bool
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """(gradient by x, gradient by w) of a convolution, each None where it is not asked for."""
    grads = torch.ops.aten.convolution_backward(by_y, x, w, None, *how, [by_x, by_w, False])
    return grads[0], grads[1]
