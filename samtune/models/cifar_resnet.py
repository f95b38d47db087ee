"""Residual networks for pictures of 32 px, registered with timm: Wide ResNets and the thin ResNets of He et al.

Foret et al. 2021 train them from scratch; they are built as in that paper's code. No shortcut has parameters, also
where the shape changes: Zagoruyko and Komodakis have a convolution there, and 0.5 to 1.5 % more parameters. The
networks take pictures of any size. Convolutions start normal with variance 2 / fan_out, and the classifier uniform in
+-1 / sqrt(classes) with bias 0.
"""

import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import SelectAdaptivePool2d
from timm.models import build_model_with_cfg, checkpoint_seq, generate_default_cfgs, register_model
from torch import nn


def cifar_cfg(paper: str) -> dict[str, Any]:
    """Timm's description of a network for CIFAR that has no weights. paper: its number on arXiv."""
    return {
        "num_classes": 10,
        "input_size": (3, 32, 32),
        "interpolation": "bicubic",
        "crop_pct": 1.0,
        "mean": (0.4914, 0.4822, 0.4465),
        "std": (0.2470, 0.2435, 0.2616),
        "first_conv": "stem.conv",
        "classifier": "fc",
        "paper_ids": f"arXiv:{paper}",
    }


def conv3x3(in_chs: int, out_chs: int, stride: int = 1, *, bias: bool = False) -> nn.Conv2d:
    """A convolution that keeps the size, or with stride 2 halves it, rounded up."""
    return nn.Conv2d(in_chs, out_chs, 3, stride, padding=1, bias=bias)


def pad_channels(x: torch.Tensor, channels: int) -> torch.Tensor:
    """(B, C, H, W) -> (B, channels, H, W): zeros in the channels after those of x."""
    return x if x.shape[1] == channels else F.pad(x, (0, 0, 0, 0, 0, channels - x.shape[1]))


def pool_and_pad(x: torch.Tensor, channels: int, stride: int) -> torch.Tensor:
    """(B, C, H, W) -> (B, channels, H / stride, W / stride), rounded up: average pooling, and channels of zeros."""
    return pad_channels(x if stride == 1 else F.avg_pool2d(x, stride, ceil_mode=True), channels)


class Classifier(nn.Linear):
    """A linear layer whose weights start uniform in +-1 / sqrt(classes), and whose bias starts at 0."""

    def reset_parameters(self) -> None:
        """Draw the weights anew."""
        bound = 1 / math.sqrt(self.out_features)
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.zeros_(self.bias)


class CifarNetwork(nn.Module):
    """A stem, stages of residual blocks, a last normalisation with ReLU, pooling and a classifier, as timm has them.

    stem: modules by name, the first of them `conv`. stages: blocks, by stage. norm: comes after the last block.
    drop_rate: dropout before the classifier.
    """

    def __init__(
        self,
        stem: Sequence[tuple[str, nn.Module]],
        stages: Sequence[Sequence[nn.Module]],
        norm: nn.Module,
        num_features: int,
        *,
        num_classes: int = 10,
        in_chans: int = 3,
        drop_rate: float = 0.0,
        global_pool: str = "avg",
    ) -> None:
        super().__init__()
        self.in_chans, self.num_features, self.drop_rate = in_chans, num_features, drop_rate
        self.grad_checkpointing = False
        self.stem = nn.Sequential(OrderedDict(stem))
        self.stages = nn.Sequential(*(nn.Sequential(*blocks) for blocks in stages))
        self.norm = norm
        self.reset_classifier(num_classes, global_pool)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Regular expressions that timm groups parameters by: layers, or with coarse, stages."""
        blocks = [(r"^stages\.(\d+)" if coarse else r"^stages\.(\d+)\.(\d+)", None), (r"^norm", (99999,))]
        return {"stem": r"^stem", "blocks": blocks}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the activations of each block in the backward pass."""
        self.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        """The last layer."""
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: str = "avg") -> None:
        """A new last layer; without classes, none. global_pool: "" keeps feature maps, and needs 0 classes."""
        self.num_classes = num_classes
        self.global_pool = SelectAdaptivePool2d(pool_type=global_pool, flatten=bool(global_pool))
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()
        self.fc = Classifier(self.head_hidden_size, num_classes) if num_classes else nn.Identity()

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Images (B, in_chans, H, W) -> feature maps (B, num_features, H / 4, W / 4)."""
        x = self.stem(x)
        x = checkpoint_seq(self.stages, x, flatten=True) if self.grad_checkpointing else self.stages(x)
        return F.relu(self.norm(x))

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Feature maps -> pooled features (B, num_features) with pre_logits, else logits (B, classes)."""
        x = F.dropout(self.global_pool(x), self.drop_rate, self.training)
        return x if pre_logits else self.fc(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images (B, in_chans, H, W) -> logits (B, classes)."""
        return self.forward_head(self.forward_features(x))


class PreActivationBlock(nn.Module):
    """Norm-ReLU-conv-norm-ReLU-conv beside a shortcut without parameters.

    norm: without it, the convolutions have biases. shares_activation: the shortcut too starts from the first ReLU.
    """

    def __init__(self, in_chs: int, out_chs: int, stride: int, *, norm: bool, shares_activation: bool) -> None:
        super().__init__()
        self.out_chs, self.stride, self.shares_activation = out_chs, stride, shares_activation
        self.norm1 = nn.BatchNorm2d(in_chs) if norm else nn.Identity()
        self.conv1 = conv3x3(in_chs, out_chs, stride, bias=not norm)
        self.norm2 = nn.BatchNorm2d(out_chs) if norm else nn.Identity()
        self.conv2 = conv3x3(out_chs, out_chs, bias=not norm)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, in_chs, H, W) -> (B, out_chs, H / stride, W / stride)."""
        activated = F.relu(self.norm1(x))
        branch: torch.Tensor = self.conv2(F.relu(self.norm2(self.conv1(activated))))
        shortcut = pool_and_pad(activated if self.shares_activation else x, self.out_chs, self.stride)
        return branch + shortcut


class WideResNet(CifarNetwork):
    """A ResNet of pre-activation blocks (Zagoruyko and Komodakis 2016) with `blocks` of each width.

    In the first block the shortcut, too, starts after normalisation and ReLU. norm: False leaves out normalisation.
    Then the last convolution of each block starts smaller by the square root of the number of blocks, so that the
    variance grows by a factor below e over all blocks, in place of 2 in each. De and Smith 2020 (arXiv 2002.10444) show
    that batch norm has this effect on deep ResNets at the start, and that they train with this initialisation only.
    """

    def __init__(
        self, blocks: int, widths: Sequence[int], stem: int = 16, *, norm: bool = True, **options: Any
    ) -> None:
        stages: list[list[nn.Module]] = []
        in_chs = stem
        for stage, out_chs in enumerate(widths):
            stages.append([])
            for block in range(blocks):
                first_of_all, stride = stage == block == 0, 2 if block == 0 and stage > 0 else 1
                stages[-1].append(
                    PreActivationBlock(in_chs, out_chs, stride, norm=norm, shares_activation=first_of_all)
                )
                in_chs = out_chs
        conv = conv3x3(options.get("in_chans", 3), stem, bias=not norm)
        last = nn.BatchNorm2d(in_chs) if norm else nn.Identity()
        super().__init__([("conv", conv)], stages, last, in_chs, **options)
        if not norm:
            with torch.no_grad():
                for module in self.stages.modules():
                    if isinstance(module, PreActivationBlock):
                        module.conv2.weight /= math.sqrt(blocks * len(widths))


class BasicBlock(nn.Module):
    """Conv-norm-ReLU-conv-norm beside a shortcut, then ReLU; the shortcut skips pixels (He et al., option A)."""

    def __init__(self, in_chs: int, out_chs: int, stride: int) -> None:
        super().__init__()
        self.out_chs, self.stride = out_chs, stride
        self.conv1, self.norm1 = conv3x3(in_chs, out_chs, stride), nn.BatchNorm2d(out_chs)
        self.conv2, self.norm2 = conv3x3(out_chs, out_chs), nn.BatchNorm2d(out_chs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, in_chs, H, W) -> (B, out_chs, H / stride, W / stride)."""
        branch = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(branch + pad_channels(x[:, :, :: self.stride, :: self.stride], self.out_chs))


class ThinResNet(CifarNetwork):
    """The ResNet for CIFAR of He et al. 2016 (arXiv 1512.03385, section 4.2) with `blocks` of each width."""

    def __init__(self, blocks: int, widths: Sequence[int] = (16, 32, 64), **options: Any) -> None:
        in_chs = widths[0]
        conv = conv3x3(options.get("in_chans", 3), in_chs)
        stages: list[list[nn.Module]] = []
        for stage, out_chs in enumerate(widths):
            stages.append([BasicBlock(in_chs, out_chs, 2 if stage > 0 else 1)])
            stages[-1] += [BasicBlock(out_chs, out_chs, 1) for _ in range(blocks - 1)]
            in_chs = out_chs
        stem = [("conv", conv), ("norm", nn.BatchNorm2d(widths[0])), ("act", nn.ReLU())]
        super().__init__(stem, stages, nn.Identity(), in_chs, **options)


_WIDE, _THIN, _LABEL_NOISE = cifar_cfg("1605.07146"), cifar_cfg("1512.03385"), cifar_cfg("1911.09781")
default_cfgs = generate_default_cfgs(
    {
        "wrn28_10": _WIDE,
        "wrn40_10": _WIDE,
        "wrn16_8": _WIDE,
        "wrn40_2": _WIDE,
        "wrn40_10_nonorm": _WIDE,
        "wrn16_2_nonorm": _WIDE,
        "resnet20": _THIN,
        "resnet32": _THIN,
        "resnet56": _THIN,
        "resnet32_wide": _LABEL_NOISE,
    }
)


def build(network: type[CifarNetwork], variant: str, pretrained: bool, args: dict[str, Any]) -> nn.Module:
    """A network whose description is registered with timm. args: of the network."""
    model: nn.Module = build_model_with_cfg(network, variant, pretrained, **args)
    return model


def _wide_resnet(variant: str, pretrained: bool, given: dict[str, Any], depth: int, k: int, **args: Any) -> nn.Module:
    args = {"blocks": (depth - 4) // 6, "widths": (16 * k, 32 * k, 64 * k)} | args | given
    return build(WideResNet, variant, pretrained, args)


def _thin_resnet(variant: str, pretrained: bool, given: dict[str, Any], depth: int) -> nn.Module:
    return build(ThinResNet, variant, pretrained, {"blocks": (depth - 2) // 6} | given)


@register_model
def wrn28_10(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """WRN-28-10, the first network of Foret et al. 2021, Tables 1 and 5."""
    return _wide_resnet("wrn28_10", pretrained, kwargs, 28, 10)


@register_model
def wrn40_10(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """WRN-40-10."""
    return _wide_resnet("wrn40_10", pretrained, kwargs, 40, 10)


@register_model
def wrn16_8(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """WRN-16-8."""
    return _wide_resnet("wrn16_8", pretrained, kwargs, 16, 8)


@register_model
def wrn40_2(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """WRN-40-2."""
    return _wide_resnet("wrn40_2", pretrained, kwargs, 40, 2)


@register_model
def wrn40_10_nonorm(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """WRN-40-10 without batch norm, whose Hessian is in Foret et al. 2021, Figure 3."""
    return _wide_resnet("wrn40_10_nonorm", pretrained, kwargs, 40, 10, norm=False)


@register_model
def wrn16_2_nonorm(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """WRN-16-2 without batch norm: its small sibling, for a CPU."""
    return _wide_resnet("wrn16_2_nonorm", pretrained, kwargs, 16, 2, norm=False)


@register_model
def resnet20(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-20 for CIFAR."""
    return _thin_resnet("resnet20", pretrained, kwargs, 20)


@register_model
def resnet32(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-32 for CIFAR."""
    return _thin_resnet("resnet32", pretrained, kwargs, 32)


@register_model
def resnet56(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-56 for CIFAR."""
    return _thin_resnet("resnet56", pretrained, kwargs, 56)


@register_model
def resnet32_wide(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """The ResNet-32 of the protocol for label noise (Jiang et al. 2020), of wide pre-activation blocks."""
    args = {"blocks": 5, "widths": (128, 256, 512), "stem": 64} | kwargs
    return build(WideResNet, "resnet32_wide", pretrained, args)
