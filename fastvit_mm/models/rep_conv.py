"""Convolutions that train as a sum of branches and run as one (FastViT, section 3.1).

Every branch is linear and reads the same input, so each is a convolution kernel, and the kernels
add up. :class:`RepConv` implements this merge; its subclasses only define their branches.
"""

from collections.abc import Iterable

import torch
import torch.nn as nn
import torch.nn.functional as F
from mmcv.cnn import build_activation_layer, build_norm_layer
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.ops import SqueezeExcitation

from fastvit_mm.errors import FastViTError

from .deploy import DeployConv
from .fused_training import accelerated, convolution_and_norm, sum_of_branches


def exact(tensor: Tensor) -> Tensor:
    """Detach to float64 on the CPU, to merge without rounding (some devices lack float64)."""
    return tensor.detach().to('cpu', torch.float64)


def build_bn(norm_cfg: dict, channels: int) -> _BatchNorm:
    """Build a BatchNorm of ``channels``; other norms depend on their input and cannot be merged."""
    norm = build_norm_layer(norm_cfg, channels)[1]
    if not isinstance(norm, _BatchNorm):
        raise FastViTError(
            f'norm_cfg type {norm_cfg["type"]!r} cannot be reparameterized: use BN or SyncBN'
        )
    return norm


def bn_affine(bn: _BatchNorm) -> tuple[Tensor, Tensor]:
    """Scale and shift that ``bn`` applies per channel in eval mode, each (C,) float64."""
    if bn.running_mean is None:
        raise FastViTError(
            'a BatchNorm without running statistics depends on its input and cannot be merged: '
            'train with track_running_stats=True'
        )
    scale = (exact(bn.running_var) + bn.eps).rsqrt()
    if bn.weight is not None:
        scale = scale * exact(bn.weight)
    shift = -exact(bn.running_mean) * scale
    if bn.bias is not None:
        shift = shift + exact(bn.bias)
    return scale, shift


@torch.no_grad()
def refill(layer: nn.Module, weight: Tensor, bias: Tensor) -> nn.Module:
    """Replace weight and bias of ``layer`` in place, and return it."""
    layer.weight.copy_(weight)
    layer.bias.copy_(bias)
    return layer


class LayerScale(nn.Module):
    """Per-channel learned factor on (B, C, H, W)."""

    def __init__(self, channels: int, init: float):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((channels, 1, 1), init))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class RepConv(nn.Module):
    """A sum of linear branches over one input, which equals one convolution.

    Args:
        in_channels, out_channels, kernel_size, stride, groups: of the merged convolution, which is
            padded so that stride 1 keeps the size.
    """

    fused = True  # see fused_training.accelerated

    def __init__(self, in_channels, out_channels, kernel_size, stride=1, groups=1):
        super().__init__()
        self.geometry = dict(
            in_channels=in_channels,
            out_channels=out_channels,
            kernel_size=kernel_size,
            stride=stride,
            padding=kernel_size // 2,
            groups=groups,
        )

    def branches(self) -> Iterable[tuple[float | Tensor, nn.Module | None]]:
        """(factor, module) of each branch; None stands for the identity."""
        raise NotImplementedError

    def leaves(self) -> Iterable[tuple[float | Tensor, nn.Module | None]]:
        """Like :meth:`branches`, but branches that have branches themselves are expanded."""
        for factor, branch in self.branches():
            if isinstance(branch, RepConv) and not isinstance(branch, ConvBN):
                for inner, leaf in branch.leaves():
                    yield inner * factor, leaf
            else:
                yield factor, branch

    def kernel_of(self, branch: nn.Module | None) -> tuple[Tensor, Tensor]:
        """Weight (O, I / groups, k, k) and bias (O,), float64, of one branch."""
        geometry = self.geometry
        size, groups, out = (geometry[k] for k in ('kernel_size', 'groups', 'out_channels'))
        if isinstance(branch, RepConv):
            weight, bias = branch.merged()
        elif isinstance(branch, DeployConv):
            weight, bias = exact(branch.reparam_conv.weight), exact(branch.reparam_conv.bias)
        elif isinstance(branch, nn.Conv2d):
            weight = exact(branch.weight)
            bias = torch.zeros(out).double() if branch.bias is None else exact(branch.bias)
        else:  # the identity, or a BatchNorm over it
            shape = (out, geometry['in_channels'] // groups, size, size)
            weight = nn.init.dirac_(torch.empty(shape, dtype=torch.float64), groups)
            bias = torch.zeros(out, dtype=torch.float64)
            if branch is not None:
                scale, bias = bn_affine(branch)
                weight = weight * scale[:, None, None, None]
        margin = (size - weight.shape[-1]) // 2
        return F.pad(weight, [margin] * 4), bias

    def merged(self) -> tuple[Tensor, Tensor]:
        """Weight and bias, float64, of the convolution that all branches add up to."""
        weight = bias = 0.0
        for factor, branch in self.branches():
            factor = exact(torch.as_tensor(factor)).reshape(-1, 1, 1, 1)
            w, b = self.kernel_of(branch)
            weight = weight + factor * w
            bias = bias + factor.flatten() * b
        return weight, bias

    def deployed(self) -> DeployConv:
        like = next(self.parameters())
        conv = nn.Conv2d(**self.geometry, device=like.device, dtype=like.dtype)
        return DeployConv(refill(conv, *self.merged()))


class ConvBN(RepConv):
    """Convolution without bias, then BatchNorm."""

    expected = dict(conv=nn.Conv2d, bn=nn.BatchNorm2d)

    def __init__(self, in_channels, out_channels, kernel_size, stride=1, groups=1, *, norm_cfg):
        super().__init__(in_channels, out_channels, kernel_size, stride, groups)
        # The weight gradient of a strided dense 1x1 convolution with few channels aborts PyTorch
        # on a CPU in channels_last (docs/channels_last_crash.py): skip pixels before it instead.
        self.skips = stride if kernel_size == 1 == groups else 1
        conv_stride = stride // self.skips
        self.conv = nn.Conv2d(**{**self.geometry, 'stride': conv_stride}, bias=False)
        self.bn = build_bn(norm_cfg, out_channels)

    @property
    def is_scale(self) -> bool:
        return self.conv.kernel_size == (1, 1) and self.conv.groups == self.conv.in_channels

    def strided(self, x: Tensor) -> Tensor:
        return x if self.skips == 1 else x[:, :, :: self.skips, :: self.skips]

    @accelerated(convolution_and_norm, over=lambda block: [block.conv])
    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(self.strided(x)))

    def merged(self) -> tuple[Tensor, Tensor]:
        scale, shift = bn_affine(self.bn)
        return exact(self.conv.weight) * scale[:, None, None, None], shift


def branch_modules(block: RepConv) -> list[nn.Module]:
    return [branch for _, branch in block.branches() if branch is not None]


class RepBlock(RepConv):
    """A sum of branches, then squeeze-and-excite, then an activation.

    Args:
        se_reduction: squeeze-and-excite with ``out_channels / se_reduction`` hidden channels; None
            for none.
        act_cfg: None for no activation.
    """

    expected = dict(se=nn.Identity, act=nn.Identity)  # as a branch of another block

    def add_se_and_act(self, se_reduction: int | None, act_cfg: dict | None) -> None:
        channels = self.geometry['out_channels']
        self.se = nn.Identity()
        if se_reduction:
            self.se = SqueezeExcitation(channels, channels // se_reduction)
        self.act = build_activation_layer(act_cfg) if act_cfg else nn.Identity()

    @accelerated(sum_of_branches, over=branch_modules)
    def sum(self, x: Tensor) -> Tensor:
        first, *others = (branch(x) for _, branch in self.branches())
        return sum(others, first)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.se(self.sum(x)))

    def deployed(self) -> DeployConv:
        return DeployConv(super().deployed().reparam_conv, self.act, self.se)


class MobileOneBlock(RepBlock):
    """[identity BN] + [1x1 scale conv + BN] + [k x k conv + BN], then SE, then activation.

    The identity exists if input and output have the same shape, the scale if k > 1.

    Args:
        with_conv: False keeps only the identity (RepMixer's norm).
        with_scale: False leaves out the scale.
        se_reduction, act_cfg: see :class:`RepBlock`.
    """

    def __init__(
        self,
        in_channels,
        out_channels,
        kernel_size,
        stride=1,
        groups=1,
        *,
        with_conv=True,
        with_scale=True,
        se_reduction=None,
        norm_cfg,
        act_cfg=None,
    ):
        super().__init__(in_channels, out_channels, kernel_size, stride, groups)
        args = dict(stride=stride, groups=groups, norm_cfg=norm_cfg)
        self.identity = self.conv_scale = self.conv_kxk = None
        if in_channels == out_channels and stride == 1:
            self.identity = build_bn(norm_cfg, out_channels)
        if with_conv and with_scale and kernel_size > 1:
            self.conv_scale = ConvBN(in_channels, out_channels, 1, **args)
        if with_conv:
            # A list, as in the published weights, with a single branch.
            self.conv_kxk = nn.ModuleList([ConvBN(in_channels, out_channels, kernel_size, **args)])
        self.add_se_and_act(se_reduction, act_cfg)

    def branches(self):
        for branch in (self.identity, self.conv_scale, *(self.conv_kxk or ())):
            if branch is not None:
                yield 1.0, branch
