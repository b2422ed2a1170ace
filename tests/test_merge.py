"""The merge with BatchNorms that are not PyTorch's default."""

import pytest
import torch
import torch.nn as nn
from randomize import randomize, relative

import fastvit_mm
from fastvit_mm import FastViT, FastViTNeck
from fastvit_mm.models.rep_conv import bn_affine
from fastvit_mm.reparameterize import absorb_output_norms

TINY = dict(depths=(1, 1, 1, 1), widths=(16, 16, 32, 32), ffn_ratio=2, attention=(0, 0, 0, 1))


class Whole(nn.Module):
    """Every kind of block, up to the classifier's last one."""

    def __init__(self, norm_cfg):
        super().__init__()
        self.backbone = FastViT(TINY, norm_cfg=norm_cfg)
        self.neck = FastViTNeck(TINY['widths'][-1], norm_cfg=norm_cfg)

    def forward(self, x):
        outs = self.backbone(x)
        return [*outs, *self.neck(outs)]


@pytest.mark.parametrize(
    'norm_cfg', [dict(type='BN', eps=1e-3), dict(type='BN', eps=0.1), dict(type='SyncBN', eps=0.01)]
)
def test_merges_with_the_epsilon_of_each_norm(norm_cfg):
    model = randomize(Whole(norm_cfg)).double().eval()
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert {n.eps for n in norms} == {norm_cfg['eps']}
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)).double()
    with torch.no_grad():
        for ours, theirs in zip(fastvit_mm.reparameterize(model)(x), model(x), strict=True):
            assert relative(ours, theirs) < 1e-10


@pytest.mark.parametrize('affine', [True, False])
def test_scale_and_shift_are_pytorchs(affine):
    norm = randomize(nn.BatchNorm2d(6, eps=0.05, affine=affine)) if affine else None
    norm = norm or nn.BatchNorm2d(6, eps=0.05, affine=False)
    norm.running_mean.uniform_(-1, 1)
    norm.running_var.uniform_(0.01, 2)
    norm = norm.double().eval()
    x = torch.randn(2, 6, 3, 3).double()
    scale, shift = bn_affine(norm)
    expected = x * scale[:, None, None] + shift[:, None, None]
    torch.testing.assert_close(norm(x), expected, rtol=1e-12, atol=1e-12)


def test_output_norms_go_into_an_fpn_with_their_epsilon():
    from mmdet.models import FPN

    model = nn.Module()
    model.backbone = FastViT(TINY, feature_norm=True, norm_cfg=dict(type='BN', eps=0.1))
    model.neck = FPN(list(TINY['widths']), 8, num_outs=4)
    randomize(model).double().eval()
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)).double()
    with torch.no_grad():
        before = model.neck(model.backbone(x))
        absorb_output_norms(model)
        assert isinstance(model.backbone.norm0, nn.Identity)
        for ours, theirs in zip(model.neck(model.backbone(x)), before, strict=True):
            assert relative(ours, theirs) < 1e-10
