"""The part of FastViT's classifier between the backbone and the linear layer."""

import torch.nn as nn
import torch.nn.functional as F
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from torch import Tensor

from .deploy import deploy_parts
from .fused_training import set_fused
from .rep_conv import MobileOneBlock


@MODELS.register_module()
class FastViTNeck(BaseModule):
    """Depthwise 3x3 MobileOne block with squeeze-and-excite, then global average pooling.

    Takes the last of a tuple of (B, in_channels, H, W) and returns a tuple with one
    (B, out_channels), for a linear head (section 3.2; SE reduction 1/16), or with one
    (B, projection), MobileCLIP's embeddings, not normalized.

    Args:
        in_channels: width of the backbone's last stage.
        out_channels: a multiple of ``in_channels``; twice by default.
        projection: width of MobileCLIP's embeddings, 512 (mci0 to mci2) or 768 (mci3, mci4): adds
            a linear layer. None for none.
        frozen: keep the weights and statistics, as linear probing does.
        deploy: build the deploy form.
        fused_training: as in :class:`FastViT`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int | None = None,
        projection: int | None = None,
        frozen: bool = False,
        deploy: bool = False,
        fused_training: bool = True,
        norm_cfg: dict = dict(type='BN'),
        act_cfg: dict = dict(type='GELU'),
        init_cfg: dict | list | None = None,
    ):
        super().__init__(init_cfg)
        out_channels = out_channels or 2 * in_channels
        self.network = dict(
            in_channels=in_channels,
            out_channels=out_channels,
            projection=projection,
            norm_cfg=norm_cfg,
            act_cfg=act_cfg,
        )
        self.final_conv = MobileOneBlock(
            in_channels,
            out_channels,
            3,
            groups=in_channels,
            se_reduction=16,
            norm_cfg=norm_cfg,
            act_cfg=act_cfg,
        )
        self.projection = nn.Identity()
        if projection:
            self.projection = nn.Linear(out_channels, projection)
            nn.init.trunc_normal_(self.projection.weight, std=0.02)
            nn.init.zeros_(self.projection.bias)
        self.frozen = frozen
        set_fused(self, fused_training)
        if frozen:
            self.requires_grad_(False)
        if deploy:
            self.switch_to_deploy()

    def forward(self, feats: tuple[Tensor, ...]) -> tuple[Tensor]:
        x = self.final_conv(feats[-1])
        return (self.projection(F.adaptive_avg_pool2d(x, 1).flatten(1)),)

    def training_form(self) -> 'FastViTNeck':
        """A new neck of the same shape with all branches."""
        return FastViTNeck(**self.network)

    def switch_to_deploy(self) -> None:
        """Merge the block's branches in place; calling it twice is harmless."""
        deploy_parts(self)
        if self.frozen:
            self.requires_grad_(False)

    def train(self, mode: bool = True):
        return super().train(mode and not self.frozen)
