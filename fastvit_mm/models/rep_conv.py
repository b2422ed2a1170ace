"""Convolutions that train as a sum of branches and run as one (FastViT, section 3.1).

Every branch is linear and reads the same input, so each one is a convolution kernel and the kernels
add up. :class:`RepConv` holds that merge once; its subclasses only name their branches.
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

from .fused_inference import Conv2d
from .fused_training import Term, computed_in, convolve, fits, normalized_sum, patch_sum


def exact(tensor: Tensor) -> Tensor:
    """Detach to float64 on the CPU, where merging loses nothing (some devices lack float64)."""
    return tensor.detach().to('cpu', torch.float64)


def build_bn(norm_cfg: dict, channels: int) -> _BatchNorm:
    """Build a BatchNorm of ``channels``; another norm depends on its input and cannot merge."""
    norm = build_norm_layer(norm_cfg, channels)[1]
    if not isinstance(norm, _BatchNorm):
        raise FastViTError(
            f'norm_cfg type {norm_cfg["type"]!r} cannot be reparameterized: use BN or SyncBN'
        )
    return norm


def bn_affine(bn: _BatchNorm) -> tuple[Tensor, Tensor]:
    """Scale and shift, each (C,) float64, that ``bn`` applies per channel in eval mode."""
    scale = (exact(bn.running_var) + bn.eps).rsqrt()
    if bn.weight is not None:
        scale = scale * exact(bn.weight)
    shift = -exact(bn.running_mean) * scale
    if bn.bias is not None:
        shift = shift + exact(bn.bias)
    return scale, shift


def set_fused(network: nn.Module, fused: bool) -> None:
    """Turn :mod:`.fused_training` on or off in every block of ``network`` that knows it."""
    for module in network.modules():
        if hasattr(module, 'fused'):
            module.fused = fused


def is_exact_gelu(act: nn.Module) -> bool:
    return type(act) is nn.GELU and act.approximate == 'none'


class LayerScale(nn.Module):
    """Per-channel learned factor on (B, C, H, W)."""

    def __init__(self, channels: int, init: float):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((channels, 1, 1), init))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class RepConv(nn.Module):
    """A sum of linear branches over one input, which equals one convolution.

    Training form: the branches named by :meth:`branches`. Deploy form: ``reparam_conv`` alone.

    Args:
        in_channels, out_channels, kernel_size, stride, groups: those of the merged convolution,
            padded so that stride 1 keeps the size.
        deploy: build the deploy form.

    ``fused`` trains with fewer passes where :mod:`.fused_training` knows how, same numbers.
    """

    fused = True

    def __init__(self, in_channels, out_channels, kernel_size, stride=1, groups=1, deploy=False):
        super().__init__()
        self.geometry = dict(
            in_channels=in_channels,
            out_channels=out_channels,
            kernel_size=kernel_size,
            stride=stride,
            padding=kernel_size // 2,
            groups=groups,
        )
        self.reparam_conv = Conv2d(**self.geometry) if deploy else None

    def branches(self) -> Iterable[tuple[float | Tensor, nn.Module | None]]:
        """(factor, module) of each branch; a module of None is the identity."""
        raise NotImplementedError

    def leaves(self) -> Iterable[tuple[float | Tensor, nn.Module | None]]:
        """As :meth:`branches`, with a branch that has branches itself taken apart."""
        for factor, branch in self.branches():
            if isinstance(branch, RepConv) and not isinstance(branch, ConvBN):
                for inner, leaf in branch.leaves():
                    yield inner * factor, leaf
            else:
                yield factor, branch

    def forward(self, x: Tensor) -> Tensor:
        if self.reparam_conv is not None:
            return self.reparam_conv(x)
        if self.fused and self.training:
            leaves = list(self.leaves())
            if fits(x, [getattr(leaf, 'bn', leaf) for _, leaf in leaves if leaf is not None]):
                return self.sum_fused(x, leaves)
        return self.sum_branches(x)

    def sum_fused(self, x: Tensor, leaves: list) -> Tensor:
        """The sum of ``leaves``, of which those that see the same x share its statistics."""
        geometry = self.geometry
        size, stride = geometry['kernel_size'], geometry['stride']
        patch = size**2 * geometry['in_channels']
        if geometry['groups'] == 1 < size and patch <= geometry['out_channels']:
            return patch_sum(x, [(leaf.conv.weight, leaf.bn) for _, leaf in leaves], size, stride)

        terms, skip, dtype = [], False, computed_in(x)
        for factor, leaf in leaves:
            if isinstance(factor, Tensor):
                factor, dtype = factor.flatten(), torch.promote_types(dtype, factor.dtype)
            else:
                factor = None
            if leaf is None:
                skip = True
            elif isinstance(leaf, _BatchNorm):
                dtype = torch.promote_types(dtype, x.dtype)
                terms.append(Term(x, leaf, factor=factor))
            elif leaf.is_scale:
                terms.append(Term(self.centers(x), leaf.bn, leaf.conv.weight.flatten(), factor))
            else:
                terms.append(Term(leaf.convolve(x), leaf.bn, factor=factor))
        return normalized_sum(terms, skip, dtype)

    def centers(self, x: Tensor) -> Tensor:
        """What each output of a depthwise convolution has at its kernel's center, in its shape."""
        stride = self.geometry['stride']
        multiplier = self.geometry['out_channels'] // self.geometry['in_channels']
        x = x if stride == 1 else x[:, :, ::stride, ::stride].contiguous()
        return x if multiplier == 1 else x.repeat_interleave(multiplier, dim=1)

    def sum_branches(self, x: Tensor) -> Tensor:
        out = None
        for factor, branch in self.branches():
            y = x if branch is None else branch(x)
            y = y if isinstance(factor, float) and factor == 1 else factor * y
            out = y if out is None else out + y
        return out

    def kernel_of(self, branch: nn.Module | None) -> tuple[Tensor, Tensor]:
        """Weight (O, I / groups, k, k) and bias (O,), float64, of one branch."""
        geometry = self.geometry
        size, groups, out = (geometry[k] for k in ('kernel_size', 'groups', 'out_channels'))
        if isinstance(branch, RepConv):
            weight, bias = branch.merged()
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
        if self.reparam_conv is not None:
            return exact(self.reparam_conv.weight), exact(self.reparam_conv.bias)
        weight = bias = 0.0
        for factor, branch in self.branches():
            factor = exact(torch.as_tensor(factor)).reshape(-1, 1, 1, 1)
            w, b = self.kernel_of(branch)
            weight = weight + factor * w
            bias = bias + factor.flatten() * b
        return weight, bias

    @torch.no_grad()
    def switch_to_deploy(self) -> None:
        """Merge the branches into ``reparam_conv`` in place; harmless when already merged."""
        if self.reparam_conv is not None:
            return
        weight, bias = self.merged()
        like = next(self.parameters())
        conv = Conv2d(**self.geometry, device=like.device, dtype=like.dtype)
        conv.weight.copy_(weight)
        conv.bias.copy_(bias)
        self.drop_branches()
        self.reparam_conv = conv.train(self.training)

    def drop_branches(self) -> None:
        for name in [n for n, _ in self.named_children()]:
            delattr(self, name)


class ConvBN(RepConv):
    """Convolution without bias, then BatchNorm."""

    def __init__(
        self, in_channels, out_channels, kernel_size, stride=1, groups=1, *, norm_cfg, deploy=False
    ):
        super().__init__(in_channels, out_channels, kernel_size, stride, groups, deploy)
        if not deploy:
            self.conv = nn.Conv2d(**self.geometry, bias=False)
            self.bn = build_bn(norm_cfg, out_channels)

        self.is_scale = kernel_size == 1 and groups == in_channels

    def convolve(self, x: Tensor) -> Tensor:
        return convolve(self.conv, x) if self.fused and self.training else self.conv(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.convolve(x)) if self.reparam_conv is None else self.reparam_conv(x)

    def merged(self) -> tuple[Tensor, Tensor]:
        if self.reparam_conv is not None:
            return super().merged()
        scale, shift = bn_affine(self.bn)
        return exact(self.conv.weight) * scale[:, None, None, None], shift


class MobileOneBlock(RepConv):
    """[identity BN] + [1x1 scale conv + BN] + [k x k conv + BN], then SE, then activation.

    The identity exists where input and output have one shape, the scale where k > 1.

    Args:
        with_conv: False leaves the identity alone (RepMixer's norm).
        se_reduction: squeeze-and-excite with ``out_channels / se_reduction`` hidden channels.
        act_cfg: None for no activation.
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
        se_reduction=None,
        norm_cfg,
        act_cfg=None,
        deploy=False,
    ):
        super().__init__(in_channels, out_channels, kernel_size, stride, groups, deploy)
        self.identity = self.conv_scale = self.conv_kxk = None
        if not deploy:
            args = dict(stride=stride, groups=groups, norm_cfg=norm_cfg)
            if in_channels == out_channels and stride == 1:
                self.identity = build_bn(norm_cfg, out_channels)
            if with_conv and kernel_size > 1:
                self.conv_scale = ConvBN(in_channels, out_channels, 1, **args)
            if with_conv:
                # A list, as in the published weights, which hold one branch each.
                self.conv_kxk = nn.ModuleList(
                    [ConvBN(in_channels, out_channels, kernel_size, **args)]
                )
        self.se = (
            SqueezeExcitation(out_channels, out_channels // se_reduction)
            if se_reduction
            else nn.Identity()
        )
        self.act = build_activation_layer(act_cfg) if act_cfg else nn.Identity()
        self.gelu_follows = is_exact_gelu(self.act) and not se_reduction

    def branches(self):
        for branch in (self.identity, self.conv_scale, *(self.conv_kxk or ())):
            if branch is not None:
                yield 1.0, branch

    def forward(self, x: Tensor) -> Tensor:
        if self.reparam_conv is not None and self.gelu_follows:
            return self.reparam_conv(x, gelu=True)
        return self.act(self.se(super().forward(x)))

    def drop_branches(self) -> None:
        self.identity = self.conv_scale = self.conv_kxk = None
