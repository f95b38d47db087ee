"""Networks for pictures of 32 px whose branches are shaken, registered with timm: Shake-Shake, PyramidNet, ShakeDrop.

In training a shaken branch is multiplied by a random coefficient in the forward pass, and its gradient by another in
the backward pass. SAM's ascent passes set `true_gradient` on all such modules: then the gradient is multiplied by the
forward pass's coefficient, which makes it the derivative of what was computed, as in the code of Foret et al. 2021.
Both coefficients are drawn in every forward pass, for each image, from torch's generator of the device, as dropout
masks are. So all passes of a SAM step draw the same ones, also on several ranks, in micro-batches and after a resume.
"""

from typing import Any

import torch
import torch.nn.functional as F
from timm.models import generate_default_cfgs, register_model
from torch import nn

from samtune.models.cifar_resnet import CifarNetwork, build, cifar_cfg, conv3x3, pool_and_pad


class _Scale(torch.autograd.Function):
    """x * forward, whose gradient is multiplied by `backward`."""

    @staticmethod
    def forward(x: torch.Tensor, forward: torch.Tensor, backward: torch.Tensor) -> torch.Tensor:
        return x * forward

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        ctx.save_for_backward(inputs[2])

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return grad * ctx.saved_tensors[0], None, None


class Shaking(nn.Module):
    """A module that multiplies by random coefficients while it trains.

    true_gradient: whether the backward pass multiplies by the forward pass's coefficients, or by others.
    """

    def __init__(self) -> None:
        super().__init__()
        self.true_gradient = False

    def scale(self, x: torch.Tensor, forward: torch.Tensor, backward: torch.Tensor) -> torch.Tensor:
        """Multiply x by one of the coefficients in each pass: (B, C, H, W), twice (B, 1, 1, 1) -> (B, C, H, W)."""
        forward, backward = forward.to(x.dtype), backward.to(x.dtype)
        scaled: torch.Tensor = x * forward if self.true_gradient else _Scale.apply(x, forward, backward)
        return scaled


class ShakeShake(Shaking):
    """The random mean of two branches (Gastaldi 2017, "Shake-Shake-Image"); their plain mean in evaluation mode."""

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Two branches (B, C, H, W) -> (B, C, H, W)."""
        if not self.training:
            return (a + b) / 2
        alpha, beta = torch.rand(2, len(a), 1, 1, 1, device=a.device)
        return self.scale(a, alpha, beta) + self.scale(b, 1 - alpha, 1 - beta)


class ShakeDrop(Shaking):
    """Keeps a branch, or multiplies it by alpha in [-1, 1], its gradient by beta in [0, 1] (Yamada et al. 2018).

    keep: probability that the branch of an image is kept. In evaluation mode the branch is multiplied by `keep`, the
    mean of its coefficient.
    """

    def __init__(self, keep: float) -> None:
        super().__init__()
        self.keep = keep

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """A branch (B, C, H, W) -> (B, C, H, W)."""
        if not self.training:
            return x * self.keep
        gate, alpha, beta = torch.rand(3, len(x), 1, 1, 1, device=x.device)
        kept = gate < self.keep
        return self.scale(x, torch.where(kept, 1.0, 2 * alpha - 1), torch.where(kept, 1.0, beta))

    def extra_repr(self) -> str:
        """What print shows."""
        return f"keep={self.keep:.4g}"


class ShiftedShortcut(nn.Module):
    """Half of the channels by a 1x1 convolution on every second pixel, half by one that starts a pixel further."""

    def __init__(self, in_chs: int, out_chs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_chs, out_chs // 2, 1, stride, bias=False)
        self.conv2 = nn.Conv2d(in_chs, out_chs // 2, 1, stride, bias=False)
        self.norm = nn.BatchNorm2d(out_chs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, in_chs, H, W) -> (B, out_chs, H / stride, W / stride)."""
        shifted = F.pad(x[:, :, 1:, 1:], (0, 1, 0, 1))
        normalized: torch.Tensor = self.norm(torch.cat([self.conv1(x), self.conv2(shifted)], dim=1))
        return normalized


class ShakeShakeBlock(nn.Module):
    """Two branches ReLU-conv-norm-ReLU-conv-norm, mixed, beside a shortcut."""

    def __init__(self, in_chs: int, out_chs: int, stride: int) -> None:
        super().__init__()

        def branch() -> nn.Sequential:
            first = [nn.ReLU(), conv3x3(in_chs, out_chs, stride), nn.BatchNorm2d(out_chs)]
            return nn.Sequential(*first, nn.ReLU(), conv3x3(out_chs, out_chs), nn.BatchNorm2d(out_chs))

        self.branch1, self.branch2 = branch(), branch()
        self.shake = ShakeShake()
        keeps_shape = in_chs == out_chs and stride == 1
        self.shortcut = nn.Identity() if keeps_shape else ShiftedShortcut(in_chs, out_chs, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, in_chs, H, W) -> (B, out_chs, H / stride, W / stride)."""
        mixed: torch.Tensor = self.shake(self.branch1(x), self.branch2(x))
        shortcut: torch.Tensor = self.shortcut(x)
        return shortcut + mixed


class ShakeShakeNet(CifarNetwork):
    """Shake-Shake (Gastaldi 2017, arXiv 1705.07485) with `blocks` of each of three widths, from `width` on."""

    def __init__(self, blocks: int, width: int, **options: Any) -> None:
        stages: list[list[nn.Module]] = []
        in_chs = 16
        for stage in range(3):
            out_chs = width * 2**stage
            stages.append([ShakeShakeBlock(in_chs, out_chs, 2 if stage > 0 else 1)])
            stages[-1] += [ShakeShakeBlock(out_chs, out_chs, 1) for _ in range(blocks - 1)]
            in_chs = out_chs
        stem = [("conv", conv3x3(options.get("in_chans", 3), 16)), ("norm", nn.BatchNorm2d(16))]
        super().__init__(stem, stages, nn.Identity(), in_chs, **options)


class PyramidBlock(nn.Module):
    """A bottleneck norm-conv-norm-ReLU-conv-norm-ReLU-conv-norm beside a shortcut without parameters.

    width: of the bottleneck; the block has four times as many channels. keep: of ShakeDrop; 1 is none.
    """

    def __init__(self, in_chs: int, width: int, stride: int, keep: float) -> None:
        super().__init__()
        self.out_chs, self.stride = 4 * width, stride
        self.norm1, self.conv1 = nn.BatchNorm2d(in_chs), nn.Conv2d(in_chs, width, 1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(width), conv3x3(width, width, stride)
        self.norm3, self.conv3 = nn.BatchNorm2d(width), nn.Conv2d(width, self.out_chs, 1, bias=False)
        self.norm4 = nn.BatchNorm2d(self.out_chs)
        self.shake = ShakeDrop(keep) if keep < 1 else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, in_chs, H, W) -> (B, 4 width, H / stride, W / stride)."""
        branch = self.conv1(self.norm1(x))
        branch = self.conv2(F.relu(self.norm2(branch)))
        branch = self.norm4(self.conv3(F.relu(self.norm3(branch))))
        shaken: torch.Tensor = self.shake(branch)
        return shaken + pool_and_pad(x, self.out_chs, self.stride)


class PyramidNet(CifarNetwork):
    """PyramidNet with bottlenecks (Han et al. 2017, arXiv 1610.02915): each block is wider than the one before.

    blocks: number in each of three stages. alpha: the last bottleneck has 16 + alpha channels; widths are rounded.
    shake_drop: probability that ShakeDrop does not keep the last block's branch; it grows linearly from block to block.
    """

    def __init__(self, blocks: int, alpha: float, *, shake_drop: float = 0.0, **options: Any) -> None:
        stages: list[list[nn.Module]] = [[], [], []]
        in_chs, n = 16, 3 * blocks
        for block in range(1, n + 1):
            stage, position = divmod(block - 1, blocks)
            stride = 2 if position == 0 and stage > 0 else 1
            stages[stage].append(
                PyramidBlock(in_chs, round(16 + alpha * block / n), stride, keep=1 - shake_drop * block / n)
            )
            in_chs = 4 * round(16 + alpha * block / n)
        stem = [("conv", conv3x3(options.get("in_chans", 3), 16)), ("norm", nn.BatchNorm2d(16))]
        super().__init__(stem, stages, nn.BatchNorm2d(in_chs), in_chs, **options)


default_cfgs = generate_default_cfgs(
    {
        "shake26_2x96d": cifar_cfg("1705.07485"),
        "pyramidnet272_a200": cifar_cfg("1610.02915"),
        "pyramidnet272_a200_shakedrop": cifar_cfg("1802.02375"),
    }
)


@register_model
def shake26_2x96d(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Shake-Shake (26 2x96d)."""
    return build(ShakeShakeNet, "shake26_2x96d", pretrained, {"blocks": 4, "width": 96} | kwargs)


@register_model
def pyramidnet272_a200(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """PyramidNet of depth 272 and alpha 200, with bottlenecks."""
    return build(PyramidNet, "pyramidnet272_a200", pretrained, {"blocks": 30, "alpha": 200} | kwargs)


@register_model
def pyramidnet272_a200_shakedrop(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """PyramidNet with ShakeDrop: a block's branch is kept with probability 1 - 0.5 l / L."""
    args = {"blocks": 30, "alpha": 200, "shake_drop": 0.5} | kwargs
    return build(PyramidNet, "pyramidnet272_a200_shakedrop", pretrained, args)
