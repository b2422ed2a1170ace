"""Frozen stages and ``norm_eval``: what a pass in training mode may change, and what it may not."""

import copy

import pytest
import torch
from randomize import randomize
from torch.nn.modules.batchnorm import _BatchNorm

from fastvit_mm import FastViT

TINY = dict(depths=(1, 1, 1, 1), widths=(16, 16, 32, 32), ffn_ratio=2, attention=(0, 0, 0, 1))


def trained(**settings):
    """A network after a step of training, and its state before."""
    network = randomize(FastViT(TINY, feature_norm=True, **settings)).train()
    before = copy.deepcopy(network.state_dict())
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    sum(out.square().mean() for out in network(x)).backward()
    optimizer.step()
    return network, before


def changed(network, before):
    return {k for k, v in network.state_dict().items() if not torch.equal(v, before[k])}


@pytest.mark.parametrize('stages', [-1, 0, 2, 4])
def test_frozen_stages_stay_as_they_are(stages):
    """Statistics too, and after train() was called once more."""
    network, before = trained(frozen_stages=stages)
    frozen = tuple(['stem.', *(f'stages.{i}.' for i in range(4))][: stages + 1])
    different = changed(network, before)
    assert not [k for k in different if k.startswith(frozen)]
    rest = {k for k in before if not k.startswith(frozen)}
    # A scale or a bias whose effect the next BatchNorm takes away has a gradient of 0.
    statistics = {k for k in rest if k.endswith(('_mean', '_var', '_tracked'))}
    assert statistics and statistics <= different
    assert {k for k in rest if k.endswith(('fc2.weight', 'qkv.weight'))} <= different
    for name, module in network.train().named_modules():
        assert module.training != f'{name}.'.startswith(frozen), name
        if not module.training:
            assert not any(p.requires_grad for p in module.parameters()), name


@pytest.mark.parametrize('built', [False, True], ids=['switched', 'built'])
def test_frozen_stages_of_the_deploy_form(built):
    network = FastViT(TINY, frozen_stages=2, deploy=built).train()
    network.switch_to_deploy()
    for name, parameter in network.named_parameters():
        assert parameter.requires_grad != name.startswith(('stem.', 'stages.0.', 'stages.1.')), name


def test_norm_eval_keeps_every_statistic():
    """Of the stem, the stages and the output norms; their weights still learn."""
    network, before = trained(norm_eval=True)
    statistics = {k for k in before if k.endswith(('_mean', '_var', '_tracked'))}
    for part in ('stem.', 'stages.', *(f'norm{i}.' for i in range(4))):
        assert any(k.startswith(part) for k in statistics)
    different = changed(network, before)
    assert not statistics & different
    assert {f'norm{i}.weight' for i in range(4)} <= different
    for name, module in network.train().named_modules():
        assert module.training != isinstance(module, _BatchNorm), name
