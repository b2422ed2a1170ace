"""The networks that the paper compares FastViT with, each in its fastest form, with random weights.

Speed does not depend on the weights. Accuracies are those published in each network's paper, with
training on ImageNet-1k only, without distillation, at ``size``.
"""

import copy
from dataclasses import dataclass

import timm
import torch
import torch.nn as nn
from timm.layers import BatchNormAct2d
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval

import fastvit_mm
from fastvit_mm import FastViT, FastViTNeck

from . import measure
from .cmt import CMT
from .sides import images, unsettle


@dataclass(frozen=True)
class Network:
    """A classifier of 1000 classes.

    Attributes:
        name: its name in ``library``: ours, timm, mmpretrain or cmt.
        size: side of its images in pixels.
        top1: published accuracy, %.
    """

    family: str
    label: str
    library: str
    name: str
    size: int
    top1: float

    def build(self) -> nn.Module:
        """The network in eval mode, with everything merged that can be merged."""
        model = unsettle(BUILDERS[self.library](self.name)).eval()
        return fold_norms(model, images(self.size, 1))


class Ours(nn.Sequential):
    def __init__(self, arch: str):
        backbone = FastViT(arch, out_indices=(3,))
        neck = FastViTNeck(backbone.settings['widths'][-1])
        super().__init__(backbone, neck)
        self.head = nn.Linear(neck.network['out_channels'], 1000)

    def forward(self, x):
        return self.head(self[1](self[0](x))[0])


class Logits(nn.Module):
    """An mmpretrain classifier, called like any other network."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x, mode='tensor')


def from_mmpretrain(name: str) -> nn.Module:
    import mmpretrain

    model = mmpretrain.get_model(name, pretrained=False)
    mergeable = any(hasattr(m, 'switch_to_deploy') for m in model.modules())
    return Logits(fastvit_mm.reparameterize(model) if mergeable else model)


BUILDERS = dict(
    ours=lambda arch: fastvit_mm.reparameterize(Ours(arch)),
    timm=lambda name: timm.utils.reparameterize_model(timm.create_model(name).eval()),
    mmpretrain=from_mmpretrain,
    cmt=CMT,
)


def merge_norms(module: nn.Module) -> None:
    """Merge every BatchNorm that directly follows a convolution among a module's children."""
    name_before = before = None
    for name, child in list(module.named_children()):
        behind = isinstance(before, nn.Conv2d) and isinstance(child, _BatchNorm)
        if behind and before.out_channels == child.num_features:
            setattr(module, name_before, fuse_conv_bn_eval(before, child))
            has_act = isinstance(child, BatchNormAct2d)
            setattr(module, name, child.act if has_act else nn.Identity())
        merge_norms(child)
        name_before, before = name, child


@torch.no_grad()
def fold_norms(model: nn.Module, inputs: torch.Tensor) -> nn.Module:
    """``model`` with BatchNorms merged into convolutions, if that does not change the outputs.

    A module that follows a convolution need not be called after it, so the outputs decide: in
    float64, because random weights of a deep network can amplify rounding.
    """
    if not any(isinstance(m, _BatchNorm) for m in model.modules()):
        return model
    exact = copy.deepcopy(model).double()
    folded = copy.deepcopy(exact)
    merge_norms(folded)
    same = measure.agree(folded(inputs.double()), exact(inputs.double())) is None
    return folded.float() if same else model


def family(name: str, library: str, *rows: tuple) -> list[Network]:
    return [Network(name, f'{name}-{label}', library, *rest) for label, *rest in rows]


NETWORKS = [
    *family(
        'FastViT',
        'ours',
        ('T8', 't8', 256, 76.2),
        ('T12', 't12', 256, 79.3),
        ('S12', 's12', 256, 79.9),
        ('SA12', 'sa12', 256, 80.9),
        ('SA24', 'sa24', 256, 82.7),
        ('SA36', 'sa36', 256, 83.6),
        ('MA36', 'ma36', 256, 83.9),
    ),
    # https://arxiv.org/abs/2206.04040
    *family(
        'MobileOne',
        'mmpretrain',
        ('S0', 'mobileone-s0_8xb32_in1k', 224, 71.4),
        ('S1', 'mobileone-s1_8xb32_in1k', 224, 75.9),
        ('S2', 'mobileone-s2_8xb32_in1k', 224, 77.4),
        ('S3', 'mobileone-s3_8xb32_in1k', 224, 78.1),
        ('S4', 'mobileone-s4_8xb32_in1k', 224, 79.4),
    ),
    # https://arxiv.org/abs/2110.02178
    *family(
        'MobileViT',
        'timm',
        ('XXS', 'mobilevit_xxs', 256, 69.0),
        ('XS', 'mobilevit_xs', 256, 74.8),
        ('S', 'mobilevit_s', 256, 78.4),
    ),
    # https://arxiv.org/abs/1905.11946
    *family(
        'EfficientNet',
        'timm',
        ('B0', 'efficientnet_b0', 224, 77.1),
        ('B1', 'efficientnet_b1', 240, 79.1),
        ('B2', 'efficientnet_b2', 260, 80.1),
        ('B3', 'efficientnet_b3', 300, 81.6),
        ('B4', 'efficientnet_b4', 380, 82.9),
        ('B5', 'efficientnet_b5', 456, 83.6),
    ),
    # https://arxiv.org/abs/2201.03545
    *family(
        'ConvNeXt',
        'timm',
        ('T', 'convnext_tiny', 224, 82.1),
        ('S', 'convnext_small', 224, 83.1),
        ('B', 'convnext_base', 224, 83.8),
    ),
    # https://arxiv.org/abs/2111.11418
    *family(
        'PoolFormer',
        'mmpretrain',
        ('S12', 'poolformer-s12_3rdparty_32xb128_in1k', 224, 77.2),
        ('S24', 'poolformer-s24_3rdparty_32xb128_in1k', 224, 80.3),
        ('S36', 'poolformer-s36_3rdparty_32xb128_in1k', 224, 81.4),
        ('M36', 'poolformer-m36_3rdparty_32xb128_in1k', 224, 82.1),
        ('M48', 'poolformer-m48_3rdparty_32xb128_in1k', 224, 82.5),
    ),
    # https://arxiv.org/abs/2103.14030
    *family(
        'Swin',
        'timm',
        ('T', 'swin_tiny_patch4_window7_224', 224, 81.3),
        ('S', 'swin_small_patch4_window7_224', 224, 83.0),
        ('B', 'swin_base_patch4_window7_224', 224, 83.5),
    ),
    # https://arxiv.org/abs/2107.06263
    *family('CMT', 'cmt', ('S', 's', 224, 83.5)),
]

#: The abstract of the FastViT paper: how many times slower than MA36 on an iPhone 12 Pro.
CLAIMS = {'ConvNeXt-B': 1.9, 'EfficientNet-B5': 4.9, 'CMT-S': 3.5}
CLAIMANT = 'FastViT-MA36'
