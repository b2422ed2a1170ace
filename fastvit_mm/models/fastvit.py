"""FastViT (Vasu et al., ICCV 2023, https://arxiv.org/abs/2303.14189) and its relatives.

Read it from the bottom: :class:`FastViT` stacks a stem and stages of blocks. This is the training
form; :mod:`.deploy` has the modules for inference. A variant is a row of
:data:`.archs.ARCHS`. Parameter names are timm's, so that timm's weights load without conversion.
"""

import warnings
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import pairwise
from numbers import Real

import torch
import torch.nn as nn
from mmcv.cnn import build_activation_layer
from mmcv.cnn.bricks import DropPath
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from fastvit_mm.errors import FastViTError

from .archs import HEAD_WIDTH, parse_arch
from .deploy import (
    DeployAttention,
    DeployFFN,
    DeployStem,
    attend,
    deploy_parts,
    deployed,
)
from .fused_training import (
    accelerated,
    ffn_residual,
    positional_encoding,
    set_fused,
    sum_of_branches,
)
from .rep_conv import (
    ConvBN,
    LayerScale,
    MobileOneBlock,
    RepBlock,
    RepConv,
    bn_affine,
    build_bn,
    exact,
    refill,
)

MIN_SIZE = 32


class Stem(nn.Sequential):
    """To a quarter of the resolution, (B, C, H, W) to (B, C', H/4, W/4): dense 3x3, depthwise 3x3,
    pointwise."""

    def __init__(self, in_channels, dim, *, with_scale=True, **args):
        strided = dict(kernel_size=3, stride=2, with_scale=with_scale)
        super().__init__(
            MobileOneBlock(in_channels, dim, **strided, **args),
            MobileOneBlock(dim, dim, groups=dim, **strided, **args),
            MobileOneBlock(dim, dim, 1, **args),
        )

    def deployed(self) -> DeployStem:
        return DeployStem(*map(deployed, self))


class RepMixer(RepConv):
    """Token mixer x + gamma * (mixer(x) - norm(x)), (B, C, H, W); a single depthwise 3x3 when
    deployed (section 3.1)."""

    def __init__(self, dim, layer_scale, *, norm_cfg):
        super().__init__(dim, dim, 3, groups=dim)
        args = dict(kernel_size=3, groups=dim, norm_cfg=norm_cfg)
        self.norm = MobileOneBlock(dim, dim, with_conv=False, **args)
        self.mixer = MobileOneBlock(dim, dim, **args)
        self.layer_scale = LayerScale(dim, layer_scale)

    def branches(self):
        gamma = self.layer_scale.gamma
        return (1.0, None), (gamma, self.mixer), (-gamma, self.norm)

    @accelerated(sum_of_branches)
    def forward(self, x: Tensor) -> Tensor:
        return x + self.layer_scale(self.mixer(x) - self.norm(x))


class LargeKernelConv(RepBlock):
    """Strided 7x7 plus 3x3, (B, C, H, W) to (B, C', H/2, W/2) (section 3.2.2); in MobileCLIP's
    networks, squeeze-and-excite and an activation follow."""

    def __init__(self, in_channels, out_channels, *, se_reduction=None, norm_cfg, act_cfg=None):
        args = dict(stride=2, groups=in_channels)
        super().__init__(in_channels, out_channels, 7, **args)
        self.large_conv = ConvBN(in_channels, out_channels, 7, **args, norm_cfg=norm_cfg)
        self.small_conv = ConvBN(in_channels, out_channels, 3, **args, norm_cfg=norm_cfg)
        self.add_se_and_act(se_reduction, act_cfg)

    def branches(self):
        return (1.0, self.large_conv), (1.0, self.small_conv)


class PositionalEncoding(RepConv):
    """Conditional positional encoding: x + depthwise 7x7 with bias, (B, C, H, W)."""

    def __init__(self, dim):
        super().__init__(dim, dim, 7, groups=dim)
        self.pos_enc = nn.Conv2d(**self.geometry)

    def branches(self):
        return (1.0, None), (1.0, self.pos_enc)

    @accelerated(positional_encoding)
    def forward(self, x: Tensor) -> Tensor:
        return x + self.pos_enc(x)


class Downsample(nn.Sequential):
    """Between stages: large-kernel convolution, then a pointwise MobileOne block."""

    def __init__(self, in_channels, out_channels, *, with_se, with_act, norm_cfg, act_cfg):
        large = LargeKernelConv(
            in_channels,
            out_channels,
            se_reduction=4 if with_se else None,
            norm_cfg=norm_cfg,
            act_cfg=act_cfg if with_act else None,
        )
        args = dict(norm_cfg=norm_cfg, act_cfg=act_cfg)
        pointwise = MobileOneBlock(out_channels, out_channels, 1, **args)
        super().__init__(OrderedDict(proj=nn.Sequential(large, pointwise)))


class ConvFFN(nn.Module):
    """Depthwise 7x7 + BN, then two pointwise convolutions, (B, C, H, W) (section 3.2.3)."""

    expected = dict(fc1=nn.Conv2d, act=nn.GELU, fc2=nn.Conv2d)

    def __init__(self, dim, hidden, *, norm_cfg, act_cfg):
        super().__init__()
        self.conv = ConvBN(dim, dim, 7, groups=dim, norm_cfg=norm_cfg)
        self.fc1 = nn.Conv2d(dim, hidden, 1)
        self.act = build_activation_layer(act_cfg)
        self.fc2 = nn.Conv2d(hidden, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(self.conv(x))))


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of (B, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Attention(nn.Module):
    """Multi-head self-attention over all positions, (B, C, H, W), C a multiple of 32."""

    def __init__(self, dim):
        super().__init__()
        self.scale = HEAD_WIDTH**-0.5
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)  # B, H * W, C
        tokens = self.proj(attend(self.qkv(tokens), self.scale))
        return tokens.transpose(1, 2).reshape(x.shape)


class Block(nn.Module):
    """Token mixing, then a ConvFFN with layer scale, drop path and residual: (B, C, H, W)."""

    fused = True
    ffn_scale: LayerScale

    @accelerated(ffn_residual, over=lambda block: (block.mlp, block.ffn_scale))
    def feed_forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.ffn_scale(self.mlp(x)))

    def deployed(self) -> nn.Module:
        mlp = self.mlp
        ffn = DeployFFN(
            deployed(mlp.conv), mlp.fc1, mlp.act, scaled(mlp.fc2, self.ffn_scale), self.drop_path
        )
        return nn.Sequential(OrderedDict(token_mixer=self.deployed_mixer(), mlp=ffn))


def scaled(layer: nn.Conv2d | nn.Linear, layer_scale: LayerScale) -> nn.Module:
    """``layer`` with the following layer scale merged into its weight and bias, in place."""
    gamma = exact(layer_scale.gamma).flatten()
    weight = exact(layer.weight)
    return refill(
        layer, weight * gamma.view(-1, *[1] * (weight.ndim - 1)), exact(layer.bias) * gamma
    )


class RepMixerBlock(Block):
    """RepMixer, then ConvFFN with a residual, (B, C, H, W)."""

    def __init__(self, dim, hidden, layer_scale, drop_path, *, norm_cfg, act_cfg):
        super().__init__()
        self.token_mixer = RepMixer(dim, layer_scale, norm_cfg=norm_cfg)
        self.mlp = ConvFFN(dim, hidden, norm_cfg=norm_cfg, act_cfg=act_cfg)
        self.layer_scale = LayerScale(dim, layer_scale)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    @property
    def ffn_scale(self) -> LayerScale:
        return self.layer_scale

    def forward(self, x: Tensor) -> Tensor:
        return self.feed_forward(self.token_mixer(x))

    def deployed_mixer(self) -> nn.Module:
        return deployed(self.token_mixer)


class AttentionBlock(Block):
    """Norm and self-attention with a residual, then ConvFFN with a residual, (B, C, H, W)."""

    def __init__(self, dim, hidden, layer_scale, drop_path, *, norm, norm_cfg, act_cfg):
        super().__init__()
        self.norm = ChannelNorm(dim) if norm == 'LN' else build_bn(norm_cfg, dim)
        self.token_mixer = Attention(dim)
        self.layer_scale_1 = LayerScale(dim, layer_scale)
        self.mlp = ConvFFN(dim, hidden, norm_cfg=norm_cfg, act_cfg=act_cfg)
        self.layer_scale_2 = LayerScale(dim, layer_scale)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    @property
    def ffn_scale(self) -> LayerScale:
        return self.layer_scale_2

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.layer_scale_1(self.token_mixer(self.norm(x))))
        return self.feed_forward(x)

    def deployed_mixer(self) -> nn.Module:
        """The norm's scale and shift and the softmax scale go into qkv. Of a LayerNorm, the part
        that depends on the input stays."""
        attention, norm = self.token_mixer, self.norm
        layer_norm = isinstance(norm, ChannelNorm)
        scale, shift = map(exact, (norm.weight, norm.bias)) if layer_norm else bn_affine(norm)
        weight = exact(attention.qkv.weight)
        bias = weight @ shift
        weight = weight * scale
        dim = weight.shape[1]
        weight[:dim] *= attention.scale
        bias[:dim] *= attention.scale
        like = attention.qkv.weight
        qkv = nn.Linear(dim, 3 * dim, device=like.device, dtype=like.dtype)
        return DeployAttention(
            refill(qkv, weight, bias),
            scaled(attention.proj, self.layer_scale_1),
            self.drop_path,
            nn.LayerNorm(dim, norm.eps, elementwise_affine=False) if layer_norm else None,
        )


class Stage(nn.Module):
    """Halve the resolution (not in stage 1), encode positions (attention only), apply the blocks.

    (B, C, H, W) to (B, C', H', W'). ``settings`` are those of :func:`parse_arch`.
    """

    def __init__(self, index, settings, drop_paths, *, with_cp, **args):
        super().__init__()
        self.with_cp = with_cp
        widths, block = settings['widths'], RepMixerBlock
        dim, hidden = widths[index], int(widths[index] * settings['ffn_ratio'])
        self.downsample, self.pos_emb = nn.Identity(), nn.Identity()
        if index > 0:
            se, act = settings['downsample_se'][index], settings['downsample_act']
            self.downsample = Downsample(widths[index - 1], dim, with_se=se, with_act=act, **args)
        if settings['attention'][index]:
            self.pos_emb = PositionalEncoding(dim)
            block = partial(AttentionBlock, norm=settings['attention_norm'])
        scale = settings['layer_scale']
        self.blocks = nn.Sequential(*[block(dim, hidden, scale, p, **args) for p in drop_paths])

    def forward(self, x: Tensor) -> Tensor:
        x = self.pos_emb(self.downsample(x))
        if not (self.with_cp and self.training and torch.is_grad_enabled()):
            return self.blocks(x)
        for block in self.blocks:
            x = recomputed(block, x)
        return x


def recomputed(block: nn.Module, x: Tensor) -> Tensor:
    """``block(x)``, recomputed in the backward pass instead of keeping its activations."""
    if torch.compiler.is_compiling():  # a compiled graph does not count a batch twice
        return checkpoint(block, x, use_reentrant=False)
    contexts = lambda: (nullcontext(), frozen_statistics(block))  # noqa: E731
    return checkpoint(block, x, use_reentrant=False, context_fn=contexts)


@contextmanager
def frozen_statistics(module: nn.Module):
    """Normalize by the batch, but do not update running statistics: it was counted before."""
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


@torch.fx.wrap  # tracers record it as one step
def checked(x: Tensor, training: bool) -> Tensor:
    """``x``, if it is large enough; in training on a CPU, in the layout that is faster."""
    height, width = x.shape[-2:]
    if min(height, width) < MIN_SIZE:
        raise FastViTError(
            f'input of {height} x {width} pixels is too small: '
            f'FastViT needs at least {MIN_SIZE} x {MIN_SIZE}'
        )
    return x.contiguous() if training and x.is_cpu else x


@MODELS.register_module()
class FastViT(BaseModule):
    """FastViT as an OpenMMLab backbone: (B, in_channels, H, W) to a tuple of stage outputs.

    Output i of ``out_indices`` is (B, widths[i], H / (4 * 2**i), W / (4 * 2**i)), rounded up, from
    the end of stage i. Input: RGB, any size from 32 up, normalized as the weights expect
    (ImageNet's statistics; MobileCLIP's differ, see docs/family.md). Stages after the last of
    ``out_indices`` are not built.

    Args:
        arch: t8, t12, s12, sa12, sa24, sa36, ma36; mci0 to mci4 (MobileCLIP's encoders), hd
            (FastViTHD); or a dict of settings (:func:`parse_arch`).
        in_channels: channels of the input.
        out_indices: stages whose outputs are returned, from 0 to 3; mci3, mci4 and hd have a fifth.
        feature_norm: add a BatchNorm to every output (``norm0``, ``norm1``, ...), as dense
            prediction needs.
        drop_path_rate: rate of the last block, in [0, 1); grows linearly from 0 over all blocks.
        frozen_stages: -1 for none, 0 freezes the stem, i also the stages 0 to i - 1.
        norm_eval: keep every BatchNorm in eval mode during training.
        with_cp: recompute the blocks in the backward pass, to save memory.
        deploy: build the deploy form (see :meth:`switch_to_deploy`).
        fused_training: train on the CPU with fewer passes over the activations, in less time and
            memory; same results up to rounding.
        norm_cfg: BN or SyncBN.
        act_cfg: activation of all blocks.
        init_cfg: as in OpenMMLab; ``dict(type='Pretrained', checkpoint=...)`` reads files of the
            authors, timm and OpenMMLab, strictly.

    Raises:
        FastViTError: an invalid argument, or an input smaller than 32 x 32.
    """

    branchless = False  # and nobody has been warned of training it

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
        several, stages = isinstance(out_indices, Sequence), range(len(settings['depths']))
        out_indices = tuple(out_indices) if several else (out_indices,)
        if not out_indices or not all(type(i) is int and i in stages for i in out_indices):
            choices = ', '.join(map(str, stages))
            raise FastViTError(f'out_indices {out_indices} out of range: choose from {choices}')
        if any(i >= j for i, j in pairwise(out_indices)):
            raise FastViTError(f'out_indices {out_indices}: give each stage once, in order')
        if type(frozen_stages) is not int or frozen_stages not in range(-1, len(stages) + 1):
            raise FastViTError(
                f'frozen_stages {frozen_stages} out of range: choose from -1 to {len(stages)}'
            )
        if type(in_channels) is not int or in_channels < 1:
            raise FastViTError(f'in_channels {in_channels!r}: give a whole number from 1 up')
        if not isinstance(drop_path_rate, Real) or not 0 <= drop_path_rate < 1:
            raise FastViTError(f'drop_path_rate {drop_path_rate!r} is not a number in [0, 1)')
        for key, cfg, example in (('norm_cfg', norm_cfg, 'BN'), ('act_cfg', act_cfg, 'GELU')):
            if not isinstance(cfg, dict) or 'type' not in cfg:
                raise FastViTError(f"{key} {cfg!r}: give a dict such as dict(type='{example}')")
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

        args = dict(norm_cfg=norm_cfg, act_cfg=act_cfg)
        depths, widths = settings['depths'], settings['widths']
        self.stem = Stem(in_channels, widths[0], with_scale=settings['stem_scale'], **args)
        rates = torch.linspace(0, drop_path_rate, sum(depths), device='cpu').split(list(depths))
        self.stages = nn.ModuleList(
            Stage(i, settings, rates[i].tolist(), with_cp=with_cp, **args)
            for i in range(max(out_indices) + 1)
        )
        if feature_norm:
            for i in out_indices:
                self.add_module(f'norm{i}', build_bn(norm_cfg, widths[i]))

        set_fused(self, fused_training)
        self.reset_parameters()
        self.freeze()
        if deploy:
            self.switch_to_deploy()

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
        if self.branchless and self.training and not torch.compiler.is_compiling():
            self.warn_of_training()
        x = self.stem(checked(x, self.training))
        outs = []
        for i, stage in enumerate(self.stages):
            x = stage(x)
            if i in self.out_indices:
                outs.append(getattr(self, f'norm{i}')(x) if self.feature_norm else x)
        return tuple(outs)

    def switch_to_deploy(self) -> None:
        """Merge every branch, BatchNorm and scale into its neighbouring weights, in place.

        Exact algebra on the running statistics; any dtype and device; calling it twice is harmless.
        ``feature_norm`` stays: it follows a residual sum whose terms are also used without it.
        Modules of :mod:`.deploy` replace those of the training form; on a CPU they keep rearranged
        copies of the weights.
        """
        deploy_parts(self)
        self.freeze()
        self.branchless = True

    def warn_of_training(self) -> None:
        self.branchless = False  # once is enough
        if any(p.requires_grad for p in self.parameters()):
            warnings.warn(
                'FastViT trains in its deploy form, without the branches and BatchNorms that '
                'training needs: train first, call switch_to_deploy() afterwards',
                stacklevel=5,
            )

    def training_form(self) -> 'FastViT':
        """A new network of the same shape with all branches and without output norms."""
        return FastViT(**self.network)

    def freeze(self) -> None:
        """Disable gradients and statistics updates of the ``frozen_stages``."""
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
