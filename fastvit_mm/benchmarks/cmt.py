"""CMT (Guo et al., CVPR 2022, https://arxiv.org/abs/2107.06263), to be timed against FastViT.

Written from the paper's section 3 and table 1, because no library has it; there are no weights.
Tests compare its counts with the published ones: multiply-adds match for all four variants,
parameters for CMT-Ti, XS and B. For CMT-S the paper reports 25.1 M, but its widths and depths give
26.3 M, as in the authors' own code.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

#: Table 1 of the paper; ``size`` is the side of the images in pixels.
VARIANTS = {
    'ti': dict(stem=16, widths=(46, 92, 184, 368), depths=(2, 2, 10, 2), expansion=3.6, size=160),
    'xs': dict(stem=16, widths=(52, 104, 208, 416), depths=(3, 3, 12, 3), expansion=3.8, size=192),
    's': dict(stem=32, widths=(64, 128, 256, 512), depths=(3, 3, 16, 3), expansion=4, size=224),
    'b': dict(stem=38, widths=(76, 152, 304, 608), depths=(4, 4, 20, 4), expansion=4, size=256),
}
HEADS = (1, 2, 4, 8)
REDUCTIONS = (8, 4, 2, 1)
PROJECTION = 1280


def conv_act_norm(in_channels: int, out_channels: int, stride: int = 1) -> nn.Sequential:
    """3x3 convolution, GELU, BatchNorm."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, stride, padding=1),
        nn.GELU(),
        nn.BatchNorm2d(out_channels),
    )


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of (B, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class LocalPerception(nn.Module):
    """x + depthwise 3x3, (B, C, H, W)."""

    def __init__(self, dim: int):
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x)


class LightAttention(nn.Module):
    """Self-attention whose keys and values are reduced by a depthwise convolution, (B, C, H, W).

    Args:
        reduction: kernel and stride of that convolution, k in the paper.
        bias: relative position bias, (heads, N, N / reduction**2), shared by all blocks of a stage.
    """

    def __init__(self, dim: int, heads: int, reduction: int, bias: nn.Parameter):
        super().__init__()
        self.heads = heads
        self.bias = bias
        self.reduce = nn.Identity()
        if reduction > 1:
            self.reduce = nn.Sequential(
                nn.Conv2d(dim, dim, reduction, reduction, groups=dim), nn.BatchNorm2d(dim)
            )
        self.q, self.k, self.v, self.proj = (nn.Linear(dim, dim) for _ in range(4))

    def split(self, x: Tensor) -> Tensor:
        """(B, N, C) to (B, heads, N, C / heads)."""
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        tokens, reduced = (t.flatten(2).transpose(1, 2) for t in (x, self.reduce(x)))
        q, k, v = self.split(self.q(tokens)), *map(self.split, (self.k(reduced), self.v(reduced)))
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias)
        mixed = self.proj(mixed.transpose(1, 2).flatten(2))
        return mixed.transpose(1, 2).unflatten(2, x.shape[2:])


class InvertedResidualFFN(nn.Module):
    """1x1, depthwise 3x3 with a shortcut, 1x1, each with BatchNorm, (B, C, H, W)."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.expand = nn.Sequential(nn.Conv2d(dim, hidden, 1), nn.GELU(), nn.BatchNorm2d(hidden))
        self.depthwise = LocalPerception(hidden)
        self.norm = nn.Sequential(nn.GELU(), nn.BatchNorm2d(hidden))
        self.project = nn.Sequential(nn.Conv2d(hidden, dim, 1), nn.BatchNorm2d(dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.project(self.norm(self.depthwise(self.expand(x))))


class Block(nn.Module):
    """Local perception, then attention and FFN with residuals, (B, C, H, W)."""

    def __init__(self, dim: int, hidden: int, heads: int, reduction: int, bias: nn.Parameter):
        super().__init__()
        self.local = LocalPerception(dim)
        self.norm1 = ChannelNorm(dim)
        self.attention = LightAttention(dim, heads, reduction, bias)
        self.norm2 = ChannelNorm(dim)
        self.ffn = InvertedResidualFFN(dim, hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = self.local(x)
        x = x + self.attention(self.norm1(x))
        return x + self.ffn(self.norm2(x))


class CMT(nn.Sequential):
    """(B, 3, size, size) to logits (B, classes), where size is the variant's."""

    def __init__(self, variant: str = 's', classes: int = 1000):
        settings = VARIANTS[variant]
        before, side = settings['stem'], settings['size'] // 2
        layers = [conv_act_norm(3, before, 2), *(conv_act_norm(before, before) for _ in range(2))]
        stages = zip(settings['widths'], settings['depths'], HEADS, REDUCTIONS, strict=True)
        for dim, depth, heads, reduction in stages:
            side //= 2
            hidden = int(settings['expansion'] * dim)
            bias = nn.Parameter(torch.zeros(heads, side**2, (side // reduction) ** 2))
            layers += [nn.Conv2d(before, dim, 2, 2), ChannelNorm(dim)]
            layers += [Block(dim, hidden, heads, reduction, bias) for _ in range(depth)]
            before = dim
        layers += [
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(before, PROJECTION, 1),
            nn.BatchNorm2d(PROJECTION),
            nn.SiLU(),
            nn.Flatten(),
            nn.Linear(PROJECTION, classes),
        ]
        super().__init__(*layers)
