"""Drop path: per image, around every residual branch, as often as it says."""

import pytest
import torch
from randomize import randomize

from fastvit_mm import FastViT

TINY = dict(depths=(1, 1, 1, 1), widths=(16, 16, 32, 32), ffn_ratio=2, attention=(0, 0, 0, 1))
IMAGES = 1000
RATE = 0.4


@pytest.fixture(params=[True, False], ids=['fused', 'plain'])
def network(request):
    """Every block drops at one rate."""
    network = FastViT(TINY, drop_path_rate=RATE, fused_training=request.param)
    last = network.stages[-1].blocks[-1].drop_path
    assert last.drop_prob == pytest.approx(RATE)
    for stage in network.stages:
        for block in stage.blocks:
            block.drop_path = last
    torch.manual_seed(0)
    return randomize(network).train()


def share(same):
    """Of the images whose values are all the same."""
    return same.flatten(1).all(1).float().mean().item()


def run(block, width):
    x = torch.randn(IMAGES, width, 2, 2, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return x, block(x)


def test_around_attention_and_feed_forward(network):
    """Each is dropped on its own, so that 0.16 of the images pass both by."""
    x, out = run(network.stages[3].blocks[0], 32)
    assert share(out == x) == pytest.approx(RATE**2, abs=0.05)


def test_around_the_feed_forward_of_a_repmixer(network):
    """The token mixer, which has its skip inside, is never dropped."""
    block = network.stages[1].blocks[0]
    x, out = run(block, 16)
    with torch.no_grad():
        mixed = block.token_mixer(x)
    assert share(out == mixed) == pytest.approx(RATE, abs=0.06)
    assert share(mixed == x) == 0


def test_keeps_the_mean(network):
    """What stays is scaled up by 1 / (1 - rate)."""
    block = network.stages[1].blocks[0]
    x, out = run(block, 16)
    with torch.no_grad():
        branch = out - block.token_mixer(x)
        block.drop_path = torch.nn.Identity()
        undropped = block(x) - block.token_mixer(x)
    kept = branch.flatten(1).any(1)
    torch.testing.assert_close(branch[kept], undropped[kept] / (1 - RATE), rtol=1e-3, atol=1e-4)


def test_nothing_is_dropped_in_eval_mode(network):
    first, second = (run(network.eval().stages[3].blocks[0], 32)[1] for _ in range(2))
    assert torch.equal(first, second)
