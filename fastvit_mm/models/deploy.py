"""The deploy form: modules that :meth:`FastViT.switch_to_deploy` puts in place of training blocks.

Each module consists of a few PyTorch layers and plain sums; ``deployed()`` of a training block
creates it from merged weights. On a CPU and without gradients, :mod:`.onednn` computes the same in
fewer passes, unless something observes or changes the layers (:mod:`.ordinary`).
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from mmcv.cnn.bricks import DropPath
from torch import Tensor

from . import onednn
from .archs import HEAD_WIDTH
from .onednn import Rearranged
from .ordinary import DeployWeight, transformed, untouched

#: A tensor between two layers of more than LARGE bytes is computed in strips of STRIP bytes.
#: Below that size, memory is recycled (onednn.recycle_memory).
LARGE, STRIP = onednn.RECYCLED, 8 << 20


def deployed(module: nn.Module) -> nn.Module:
    """The deploy form of ``module``, which reuses its layers; ``module`` itself if it has none."""
    if not hasattr(module, 'deployed'):
        return module
    made = module.deployed().train(module.training)
    for layer in made.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear) and type(layer.weight) is nn.Parameter:
            layer.weight.__class__ = DeployWeight
    return made


def deploy_parts(network: nn.Module, wanted=lambda name, part: True, prefix: str = '') -> None:
    """Replace the parts of ``network`` that have a deploy form by it.

    Args:
        wanted: whether to replace a part, given its name within ``network`` and the part.
    """
    for name, child in network.named_children():
        if hasattr(child, 'deployed') and wanted(prefix + name, child):
            setattr(network, name, deployed(child))
        else:
            deploy_parts(child, wanted, f'{prefix}{name}.')


def replaces_gelu(act: nn.Module) -> bool:
    """Whether an exact GELU may be computed in place of ``act``."""
    return untouched(act, nn.GELU) and act.approximate == 'none'


def does_nothing(part: nn.Module) -> bool:
    """Whether calling ``part``, such as a drop path in eval mode, gives its input."""
    return untouched(part, nn.Identity) or (untouched(part, DropPath) and not part.training)


class Deployed(nn.Module):
    """Keeps rearranged weights of its layers until the mode (train or eval) changes."""

    def __init__(self):
        super().__init__()
        self.rearranged = {}

    def weight_of(self, name: str) -> Rearranged:
        if name not in self.rearranged:
            self.rearranged[name] = Rearranged()
        return self.rearranged[name]

    def train(self, mode: bool = True):
        if mode != self.training:
            self.forget()
        return super().train(mode)

    def forget(self) -> None:
        """Discard rearranged weights; call it after edits that bypass PyTorch, such as numpy's."""
        self.rearranged.clear()


class DeployConv(Deployed):
    """All branches in one convolution, then SE, if there is one, then the activation:
    (B, C, H, W) to (B, C', H', W')."""

    def __init__(self, conv: nn.Conv2d, act: nn.Module | None = None, se: nn.Module | None = None):
        super().__init__()
        self.reparam_conv = conv
        self.se = se or nn.Identity()
        self.act = act or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        if not onednn.takes(x, self.reparam_conv):
            return self.act(self.se(self.reparam_conv(x)))
        gelu = untouched(self.se, nn.Identity) and replaces_gelu(self.act)
        y = onednn.convolution(x, self.reparam_conv, self.weight_of('reparam_conv'), gelu=gelu)
        return y if gelu else self.act(self.se(y))


class DeployFFN(Deployed):
    """x plus: depthwise 7x7, pointwise, activation, pointwise; (B, C, H, W) (section 3.2.3)."""

    def __init__(self, conv: DeployConv, fc1: nn.Conv2d, act, fc2: nn.Conv2d, drop_path):
        super().__init__()
        self.conv = conv
        self.fc1 = fc1
        self.act = act
        self.fc2 = fc2
        self.drop_path = drop_path

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if (
            onednn.takes(y, self.fc1, self.fc2)
            and replaces_gelu(self.act)
            and does_nothing(self.drop_path)
        ):
            return self.pointwise_twice(y, x)
        return x + self.drop_path(self.fc2(self.act(self.fc1(y))))

    def pointwise_twice(self, y: Tensor, x: Tensor) -> Tensor:
        """``x + fc2(gelu(fc1(y)))``.

        The hidden tensor is three or four times as large as x. If it is very large, fc1 and fc2 run
        on strips that fit in the cache: the backbone is 1.1 to 1.2 x as fast at 800 x 1216 pixels.
        """
        first = self.fc1, self.weight_of('fc1')
        second = self.fc2, self.weight_of('fc2')
        cut = strips(y.shape, self.fc1.out_channels * y.element_size())
        if cut is None:
            return onednn.convolution(onednn.convolution(y, *first, gelu=True), *second, add=x)
        out = torch.empty_like(x, memory_format=torch.channels_last)
        images, rows = cut
        for of_images in zip(*(t.split(images) for t in (y, x, out)), strict=True):
            for part, add, goal in zip(*(t.split(rows, 2) for t in of_images), strict=True):
                hidden = onednn.convolution(part, *first, gelu=True)
                goal.copy_(onednn.convolution(hidden, *second, add=add))
        return out


def strips(shape: torch.Size, pixel: int) -> tuple[int, int] | None:
    """How many images, and rows of them, to compute at a time for ``shape``, (B, C, H, W), if
    each pixel takes ``pixel`` bytes; None for all at once."""
    images, _, rows, columns = shape
    image = rows * columns * pixel
    if images * image <= LARGE:
        return None
    return max(1, STRIP // image), math.ceil(rows / math.ceil(image / STRIP))


class DeployStem(nn.Sequential):
    """Three convolutions, each with its activation: (B, C, H, W) to (B, C', H/4, W/4).

    The tensor between the first, dense convolution and the second is four times as large as the
    output. If it is very large, the stem runs on strips of the image.
    """

    #: rows of the image above a strip that its first rows depend on, and output rows they produce
    MARGIN, EXTRA = 4, 1

    def forward(self, x: Tensor) -> Tensor:
        if not (all(self.is_local(part) for part in self) and self.has_strides(2, 2, 1)):
            return super().forward(x)
        if not onednn.takes(x, *(part.reparam_conv for part in self)):
            return super().forward(x)
        height, width = (math.ceil(n / 4) for n in x.shape[2:])
        pixel = 4 * self[0].reparam_conv.out_channels * x.element_size()
        cut = strips((len(x), 0, height, width), pixel)
        if cut is None:
            return super().forward(x)
        images, rows = cut
        done = []
        for some in x.split(images):
            for start in range(0, height, rows):
                above = self.MARGIN if start else 0
                strip = some[:, :, 4 * start - above : 4 * (start + rows)]
                done.append(super().forward(strip)[:, :, self.EXTRA if start else 0 :])
        per_image = math.ceil(height / rows)
        return torch.cat(
            [torch.cat(done[i : i + per_image], 2) for i in range(0, len(done), per_image)]
        )

    @staticmethod
    def is_local(part: nn.Module) -> bool:
        """Whether nobody looks inside ``part``, and a pixel of it depends on its own window."""
        return (
            untouched(part, DeployConv)
            and untouched(part.se, nn.Identity)
            and replaces_gelu(part.act)
        )

    def has_strides(self, *strides: int) -> bool:
        return [part.reparam_conv.stride for part in self] == [(s, s) for s in strides]


class DeployAttention(Deployed):
    """x plus multi-head self-attention over all positions, (B, C, H, W), C a multiple of 32.

    ``norm``, if there is one, normalizes the tokens before it.
    """

    def __init__(
        self, qkv: nn.Linear, proj: nn.Linear, drop_path: nn.Module, norm: nn.Module | None = None
    ):
        super().__init__()
        self.norm = norm or nn.Identity()
        self.qkv = qkv
        self.proj = proj
        self.drop_path = drop_path

    def forward(self, x: Tensor) -> Tensor:
        B, C, H, W = x.shape
        tokens = x.flatten(2).transpose(1, 2)
        if onednn.takes(x, self.qkv, self.proj) and does_nothing(self.drop_path):
            qkv = onednn.linear(self.norm(tokens), self.qkv, self.weight_of('qkv'))
            mixed = attend(qkv, scale=1.0)
            tokens = onednn.linear(mixed, self.proj, self.weight_of('proj'), add=tokens)
        else:
            mixed = attend(self.qkv(self.norm(tokens)), scale=1.0)
            tokens = tokens + self.drop_path(self.proj(mixed))
        return tokens.transpose(1, 2).reshape(B, C, H, W)


def attend(qkv: Tensor, scale: float) -> Tensor:
    """Softmax attention with heads of 32: (B, N, 3C), q, k and v concatenated, to (B, N, C)."""
    B, N, C = qkv.shape
    q, k, v = qkv.view(B, N, 3, -1, HEAD_WIDTH).permute(2, 0, 3, 1, 4).unbind(0)  # B, heads, N, 32
    if not torch.compiler.is_compiling() and transformed():  # the fused one has no forward AD
        x = (scale * q @ k.transpose(-2, -1)).softmax(-1) @ v
    else:
        x = F.scaled_dot_product_attention(q, k, v, scale=scale)
    return x.transpose(1, 2).reshape(B, N, C // 3)
