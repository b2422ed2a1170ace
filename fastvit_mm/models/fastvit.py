"""FastViT (Vasu et al., ICCV 2023, https://arxiv.org/abs/2303.14189).

Read from the bottom: :class:`FastViT` stacks a stem and four stages of blocks. A variant is a row
of :data:`ARCHS`. Parameter names are timm's, so that timm's weights load as they are.
"""

from collections.abc import Sequence
from contextlib import contextmanager, nullcontext
from itertools import pairwise

import torch
import torch.nn as nn
import torch.nn.functional as F
from mmcv.cnn import build_activation_layer
from mmcv.cnn.bricks import DropPath
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from fastvit_mm.errors import FastViTError

from .fused_inference import Conv2d, Linear, pack, pointwise_twice
from .fused_training import convolve, feed_forward, fits
from .rep_conv import (
    ConvBN,
    LayerScale,
    MobileOneBlock,
    RepConv,
    bn_affine,
    build_bn,
    exact,
    is_exact_gelu,
    set_fused,
)

#: Table 2 of the paper. ``attention`` marks the stages that mix tokens by self-attention.
ARCHS = {
    't8': dict(depths=(2, 2, 4, 2), widths=(48, 96, 192, 384), ffn_ratio=3),
    't12': dict(depths=(2, 2, 6, 2), widths=(64, 128, 256, 512), ffn_ratio=3),
    's12': dict(depths=(2, 2, 6, 2), widths=(64, 128, 256, 512)),
    'sa12': dict(depths=(2, 2, 6, 2), widths=(64, 128, 256, 512), attention=(0, 0, 0, 1)),
    'sa24': dict(depths=(4, 4, 12, 4), widths=(64, 128, 256, 512), attention=(0, 0, 0, 1)),
    'sa36': dict(
        depths=(6, 6, 18, 6),
        widths=(64, 128, 256, 512),
        attention=(0, 0, 0, 1),
        layer_scale=1e-6,
    ),
    'ma36': dict(
        depths=(6, 6, 18, 6),
        widths=(76, 152, 304, 608),
        attention=(0, 0, 0, 1),
        layer_scale=1e-6,
    ),
}
ARCH_DEFAULTS = dict(ffn_ratio=4, attention=(0, 0, 0, 0), layer_scale=1e-5)

HEAD_WIDTH = 32
MIN_SIZE = 32


def parse_arch(arch: str | dict) -> dict:
    """Settings of ``arch``: a name in :data:`ARCHS`, or a dict with ``depths`` and ``widths`` (four
    each) and optionally ``ffn_ratio``, ``attention`` and ``layer_scale``.

    Raises:
        FastViTError: an unknown name or key, a missing key, or a list that is not of length four.
    """
    if isinstance(arch, str):
        if arch not in ARCHS:
            raise FastViTError(f'unknown arch {arch!r}: choose one of {", ".join(ARCHS)}')
        return {**ARCH_DEFAULTS, **ARCHS[arch]}
    known = ['depths', 'widths', *ARCH_DEFAULTS]
    unknown, missing = set(arch) - set(known), {'depths', 'widths'} - set(arch)
    if unknown or missing:
        raise FastViTError(
            f'arch as a dict takes {", ".join(known)}; '
            f'unknown: {sorted(unknown) or "none"}, missing: {sorted(missing) or "none"}'
        )
    settings = {**ARCH_DEFAULTS, **arch}
    for key in ('depths', 'widths', 'attention'):
        if len(settings[key]) != 4:
            raise FastViTError(f'arch: {key} needs four values, got {settings[key]!r}')
    for before, width in pairwise(settings['widths']):
        if width % before:
            raise FastViTError(f'arch: width {width} is not a multiple of {before}, the one before')
    for width, attends in zip(settings['widths'], settings['attention'], strict=True):
        if attends and width % HEAD_WIDTH:
            raise FastViTError(
                f'arch: width {width} is not a multiple of {HEAD_WIDTH} for attention'
            )
    return settings


class RepMixer(RepConv):
    """Token mixer x + gamma * (mixer(x) - norm(x)), (B, C, H, W); one depthwise 3x3 when deployed
    (section 3.1)."""

    def __init__(self, dim, layer_scale, *, norm_cfg, deploy=False):
        super().__init__(dim, dim, 3, groups=dim, deploy=deploy)
        if not deploy:
            args = dict(kernel_size=3, groups=dim, norm_cfg=norm_cfg)
            self.norm = MobileOneBlock(dim, dim, with_conv=False, **args)
            self.mixer = MobileOneBlock(dim, dim, **args)
            self.layer_scale = LayerScale(dim, layer_scale)

    def branches(self):
        gamma = self.layer_scale.gamma
        return (1.0, None), (gamma, self.mixer), (-gamma, self.norm)

    def sum_branches(self, x: Tensor) -> Tensor:
        return x + self.layer_scale(self.mixer(x) - self.norm(x))


class LargeKernelConv(RepConv):
    """Strided 7x7 beside 3x3, (B, C, H, W) to (B, C', H/2, W/2), no activation (section 3.2.2)."""

    def __init__(self, in_channels, out_channels, *, norm_cfg, deploy=False):
        args = dict(stride=2, groups=in_channels)
        super().__init__(in_channels, out_channels, 7, **args, deploy=deploy)
        if not deploy:
            self.large_conv = ConvBN(in_channels, out_channels, 7, **args, norm_cfg=norm_cfg)
            self.small_conv = ConvBN(in_channels, out_channels, 3, **args, norm_cfg=norm_cfg)

    def branches(self):
        return (1.0, self.large_conv), (1.0, self.small_conv)


class PositionalEncoding(RepConv):
    """Conditional positional encoding: x + depthwise 7x7 with bias, (B, C, H, W)."""

    def __init__(self, dim, deploy=False):
        super().__init__(dim, dim, 7, groups=dim, deploy=deploy)
        if not deploy:
            self.pos_enc = nn.Conv2d(**self.geometry)

    def branches(self):
        return (1.0, None), (1.0, self.pos_enc)

    def sum_branches(self, x: Tensor) -> Tensor:
        return x + (convolve(self.pos_enc, x) if self.fused and self.training else self.pos_enc(x))


class Downsample(nn.Module):
    """Between stages: large-kernel convolution, then a pointwise MobileOne block."""

    def __init__(self, in_channels, out_channels, *, norm_cfg, act_cfg, deploy=False):
        super().__init__()
        self.proj = nn.Sequential(
            LargeKernelConv(in_channels, out_channels, norm_cfg=norm_cfg, deploy=deploy),
            MobileOneBlock(
                out_channels, out_channels, 1, norm_cfg=norm_cfg, act_cfg=act_cfg, deploy=deploy
            ),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


class ConvFFN(nn.Module):
    """x plus: depthwise 7x7 + BN, two pointwise convolutions, layer scale; (B, C, H, W)
    (section 3.2.3)."""

    fused = True

    def __init__(self, dim, hidden, *, norm_cfg, act_cfg, deploy=False):
        super().__init__()
        self.conv = ConvBN(dim, dim, 7, groups=dim, norm_cfg=norm_cfg, deploy=deploy)
        self.fc1 = Conv2d(dim, hidden, 1)
        self.act = build_activation_layer(act_cfg)
        self.exact_gelu = is_exact_gelu(self.act)
        self.fc2 = Conv2d(hidden, dim, 1)

    def forward(self, x: Tensor, layer_scale: nn.Module, drop_path: nn.Module) -> Tensor:
        conv, fc2 = self.conv, self.fc2
        fused = self.fused and self.training and conv.reparam_conv is None
        if fused and self.exact_gelu and fits(x, [conv.bn]):
            gamma = layer_scale.gamma
            weight, bias = fc2.weight * gamma[..., None], fc2.bias * gamma.flatten()
            y = feed_forward(conv.convolve(x), conv.bn, self.fc1, weight, bias)
            return x + drop_path(y)
        y = conv(x)
        if isinstance(layer_scale, nn.Identity) and self.exact_gelu and not self.training:
            return pointwise_twice(y, self.fc1, fc2, add=x)
        return x + drop_path(layer_scale(fc2(self.act(self.fc1(y)))))


class Attention(nn.Module):
    """Multi-head self-attention over all positions, (B, C, H, W), C a multiple of 32."""

    def __init__(self, dim, deploy=False):
        super().__init__()
        self.num_heads = dim // HEAD_WIDTH
        # Deployed, the norm before qkv leaves a bias and the scale is in q's weights.
        self.scale = 1.0 if deploy else HEAD_WIDTH**-0.5
        self.qkv = Linear(dim, 3 * dim, bias=deploy)
        self.proj = Linear(dim, dim)

    def forward(self, x: Tensor, skip: bool = False) -> Tensor:
        """``skip``: add x."""
        B, C, H, W = x.shape
        tokens = x.flatten(2).transpose(1, 2)
        qkv = self.qkv(tokens)  # B, N, 3C
        qkv = qkv.view(B, H * W, 3, self.num_heads, HEAD_WIDTH)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each B, heads, N, 32
        x = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        x = self.proj(x.transpose(1, 2).reshape(B, H * W, C), add=tokens if skip else None)
        return x.transpose(1, 2).reshape(B, C, H, W)

    @torch.no_grad()
    def absorb(self, norm: _BatchNorm) -> None:
        """Take ``norm``, which precedes, and the softmax scale into qkv."""
        scale, shift = bn_affine(norm)
        weight = exact(self.qkv.weight)
        bias = weight @ shift
        weight = weight * scale
        dim = weight.shape[1]
        weight[:dim] *= self.scale
        bias[:dim] *= self.scale
        self.qkv.bias = nn.Parameter(bias.to(self.qkv.weight))
        self.qkv.weight.copy_(weight)
        self.scale = 1.0


@torch.no_grad()
def absorb_scale(layer: nn.Linear | nn.Conv2d, layer_scale: LayerScale) -> None:
    """Take the layer scale that follows ``layer`` into its weight and bias."""
    gamma = exact(layer_scale.gamma).flatten()
    layer.weight.copy_(exact(layer.weight) * gamma.view(-1, *[1] * (layer.weight.ndim - 1)))
    layer.bias.copy_(exact(layer.bias) * gamma)


class RepMixerBlock(nn.Module):
    """RepMixer, then ConvFFN with a residual, (B, C, H, W)."""

    def __init__(self, dim, hidden, layer_scale, drop_path, *, norm_cfg, act_cfg, deploy=False):
        super().__init__()
        self.token_mixer = RepMixer(dim, layer_scale, norm_cfg=norm_cfg, deploy=deploy)
        self.mlp = ConvFFN(dim, hidden, norm_cfg=norm_cfg, act_cfg=act_cfg, deploy=deploy)
        self.layer_scale = nn.Identity() if deploy else LayerScale(dim, layer_scale)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.token_mixer(x), self.layer_scale, self.drop_path)

    def switch_to_deploy(self) -> None:
        if isinstance(self.layer_scale, LayerScale):
            absorb_scale(self.mlp.fc2, self.layer_scale)
            self.layer_scale = nn.Identity()


class AttentionBlock(nn.Module):
    """BN and self-attention with a residual, then ConvFFN with a residual, (B, C, H, W)."""

    def __init__(self, dim, hidden, layer_scale, drop_path, *, norm_cfg, act_cfg, deploy=False):
        super().__init__()
        self.norm = nn.Identity() if deploy else build_bn(norm_cfg, dim)
        self.token_mixer = Attention(dim, deploy=deploy)
        self.layer_scale_1 = nn.Identity() if deploy else LayerScale(dim, layer_scale)
        self.mlp = ConvFFN(dim, hidden, norm_cfg=norm_cfg, act_cfg=act_cfg, deploy=deploy)
        self.layer_scale_2 = nn.Identity() if deploy else LayerScale(dim, layer_scale)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.layer_scale_1, nn.Identity) and not self.training:
            x = self.token_mixer(x, skip=True)
        else:
            x = x + self.drop_path(self.layer_scale_1(self.token_mixer(self.norm(x))))
        return self.mlp(x, self.layer_scale_2, self.drop_path)

    def switch_to_deploy(self) -> None:
        if isinstance(self.norm, _BatchNorm):
            self.token_mixer.absorb(self.norm)
            absorb_scale(self.token_mixer.proj, self.layer_scale_1)
            absorb_scale(self.mlp.fc2, self.layer_scale_2)
            self.norm = self.layer_scale_1 = self.layer_scale_2 = nn.Identity()


class Stage(nn.Module):
    """Halve the resolution (not in stage 1), encode positions (attention only), then the blocks.

    (B, C, H, W) to (B, C', H', W').
    """

    def __init__(
        self,
        in_channels,
        dim,
        drop_paths,
        *,
        attention,
        ffn_ratio,
        layer_scale,
        downsample,
        with_cp,
        **args,
    ):
        super().__init__()
        self.with_cp = with_cp
        self.downsample = Downsample(in_channels, dim, **args) if downsample else nn.Identity()
        self.pos_emb = PositionalEncoding(dim, args['deploy']) if attention else nn.Identity()
        block = AttentionBlock if attention else RepMixerBlock
        hidden = int(dim * ffn_ratio)
        self.blocks = nn.Sequential(
            *[block(dim, hidden, layer_scale, p, **args) for p in drop_paths]
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.pos_emb(self.downsample(x))
        if not (self.with_cp and self.training and torch.is_grad_enabled()):
            return self.blocks(x)
        for block in self.blocks:
            contexts = lambda block=block: (nullcontext(), frozen_statistics(block))  # noqa: E731
            x = checkpoint(block, x, use_reentrant=False, context_fn=contexts)
        return x


@contextmanager
def frozen_statistics(module: nn.Module):
    """Normalize by the batch without counting it: a recomputed batch must not count twice."""
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    before = [(m.momentum, m.num_batches_tracked.clone()) for m in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, before, strict=True):
            norm.momentum = momentum
            norm.num_batches_tracked.copy_(count)


@MODELS.register_module()
class FastViT(BaseModule):
    """FastViT as an OpenMMLab backbone: (B, in_channels, H, W) to a tuple of stage outputs.

    Output i of ``out_indices`` is (B, widths[i], H / (4 * 2**i), W / (4 * 2**i)), rounded up, from
    the end of stage i. Input of any size from 32 up, RGB, normalized with ImageNet's statistics.
    Stages behind the last of ``out_indices`` are not built.

    Args:
        arch: t8, t12, s12, sa12, sa24, sa36, ma36, or a dict of settings (:func:`parse_arch`).
        in_channels: channels of the input.
        out_indices: stages to give, from 0 to 3.
        feature_norm: a BatchNorm on every output (``norm0`` to ``norm3``), as for dense prediction.
        drop_path_rate: of the last block, in [0, 1); grows linearly from 0 over all blocks.
        frozen_stages: -1 for none, 0 freezes the stem, i also the stages 0 to i - 1; at most 4.
        norm_eval: keep every BatchNorm in eval mode during training.
        with_cp: recompute the blocks in the backward pass, to save memory.
        deploy: build the deploy form (see :meth:`switch_to_deploy`).
        fused_training: train on the CPU with fewer passes over the activations, in less time and
            memory; the same numbers but for rounding.
        norm_cfg: BN or SyncBN.
        act_cfg: activation everywhere.
        init_cfg: OpenMMLab's; ``dict(type='Pretrained', checkpoint=...)`` reads the authors',
            timm's and OpenMMLab's files, strictly.

    Raises:
        FastViTError: an unknown ``arch``, ``out_indices`` or ``frozen_stages`` out of range, an
            input smaller than 32.
    """

    def __init__(
        self,
        arch: str | dict = 'sa36',
        in_channels: int = 3,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        feature_norm: bool = False,
        drop_path_rate: float = 0.0,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        with_cp: bool = False,
        deploy: bool = False,
        fused_training: bool = True,
        norm_cfg: dict = dict(type='BN'),
        act_cfg: dict = dict(type='GELU'),
        init_cfg: dict | list | None = None,
    ):
        super().__init__(init_cfg)
        settings = parse_arch(arch)
        out_indices = (out_indices,) if isinstance(out_indices, int) else tuple(out_indices)
        if not out_indices or not all(i in range(4) for i in out_indices):
            raise FastViTError(f'out_indices {out_indices} out of range: choose from 0, 1, 2, 3')
        if frozen_stages not in range(-1, 5):
            raise FastViTError(f'frozen_stages {frozen_stages} out of range: choose from -1 to 4')
        self.settings = settings
        self.out_indices = out_indices
        self.feature_norm = feature_norm
        self.frozen_stages = frozen_stages
        self.norm_eval = norm_eval
        self.network = dict(
            arch=arch,
            in_channels=in_channels,
            out_indices=out_indices,
            norm_cfg=norm_cfg,
            act_cfg=act_cfg,
        )

        args = dict(norm_cfg=norm_cfg, act_cfg=act_cfg, deploy=deploy)
        depths, widths = settings['depths'], settings['widths']
        self.stem = nn.Sequential(
            MobileOneBlock(in_channels, widths[0], 3, stride=2, **args),
            MobileOneBlock(widths[0], widths[0], 3, stride=2, groups=widths[0], **args),
            MobileOneBlock(widths[0], widths[0], 1, **args),
        )
        drop_paths = torch.linspace(0, drop_path_rate, sum(depths)).split(list(depths))
        self.stages = nn.ModuleList(
            Stage(
                widths[max(i - 1, 0)],
                widths[i],
                drop_paths[i].tolist(),
                attention=settings['attention'][i],
                ffn_ratio=settings['ffn_ratio'],
                layer_scale=settings['layer_scale'],
                downsample=i > 0,
                with_cp=with_cp,
                **args,
            )
            for i in range(max(out_indices) + 1)
        )
        if feature_norm:
            for i in out_indices:
                self.add_module(f'norm{i}', build_bn(norm_cfg, widths[i]))

        set_fused(self, fused_training)
        if deploy:
            pack(self)
        self.reset_parameters()
        self.freeze()

    def reset_parameters(self) -> None:
        """Truncated normal, std 0.02, for linear layers and ConvFFN; PyTorch's own elsewhere."""
        for module in self.modules():
            layers = module.modules() if isinstance(module, ConvFFN) else [module]
            for layer in layers:
                is_ffn_conv = layer is not module and isinstance(layer, nn.Conv2d)
                if is_ffn_conv or isinstance(layer, nn.Linear):
                    nn.init.trunc_normal_(layer.weight, std=0.02)
                    if layer.bias is not None:
                        nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        if min(x.shape[-2:]) < MIN_SIZE:
            raise FastViTError(
                f'input of {x.shape[-2]} x {x.shape[-1]} pixels is too small: '
                f'FastViT needs at least {MIN_SIZE} x {MIN_SIZE}'
            )
        x = self.stem(x)
        outs = []
        for i, stage in enumerate(self.stages):
            x = stage(x)
            if i in self.out_indices:
                outs.append(getattr(self, f'norm{i}')(x) if self.feature_norm else x)
        return tuple(outs)

    def switch_to_deploy(self) -> None:
        """Merge every branch, BatchNorm and scale into its neighbouring weights, in place.

        Exact algebra on the running statistics; any dtype and device; harmless when done twice.
        ``feature_norm`` stays: it follows a residual sum whose terms are also used without it.
        Without gradients on a CPU it then runs by :mod:`.fused_inference`: who changes weights
        through ``weight.data`` calls ``eval()`` or ``train()`` afterwards, as hooks do.
        """
        for module in list(self.modules()):
            if module is not self and hasattr(module, 'switch_to_deploy'):
                module.switch_to_deploy()
        pack(self)

    def training_form(self) -> 'FastViT':
        """A fresh network of the same shape with all its branches and without output norms."""
        return FastViT(**self.network)

    def freeze(self) -> None:
        """Stop gradients and statistics of the ``frozen_stages``."""
        frozen = [self.stem, *self.stages][: self.frozen_stages + 1]
        for module in frozen:
            module.eval().requires_grad_(False)

    def train(self, mode: bool = True):
        super().train(mode)
        if mode:
            self.freeze()
            if self.norm_eval:
                for module in self.modules():
                    if isinstance(module, _BatchNorm):
                        module.eval()
        return self
