"""Training in fewer passes gives the branch-by-branch form's numbers, and timm's."""

import copy
import os
import pickle
import subprocess
import sys

import pytest
import timm
import torch
import torch.nn as nn
from randomize import randomize, relative
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode

from fastvit_mm import FastViT, FastViTNeck
from fastvit_mm.models.fastvit import Block, ConvFFN, LargeKernelConv, PositionalEncoding, RepMixer
from fastvit_mm.models.fused_training import moments, set_fused
from fastvit_mm.models.rep_conv import LayerScale, MobileOneBlock

# Every kind of block, narrow; a downsampling that keeps the width and two that double it.
TINY = dict(depths=(1, 1, 1, 1), widths=(32, 32, 64, 128), attention=(0, 0, 0, 1), ffn_ratio=2)
# MobileCLIP's: squeeze-and-excite, GELU, LayerNorm, five stages, a stem without scale.
CLIP = dict(
    depths=(1,) * 5,
    widths=(32, 32, 64, 64, 128),
    attention=(0, 0, 0, 1, 1),
    attention_norm='LN',
    downsample_se=(0, 0, 1, 0, 0),
    downsample_act=True,
    stem_scale=False,
    ffn_ratio=2,
)
BN = dict(norm_cfg=dict(type='BN'))
GELU = dict(type='GELU')


class ScaledFFN(Block):
    def __init__(self):
        super().__init__()
        self.mlp = ConvFFN(3, 4, **BN, act_cfg=GELU)
        self.ffn_scale = LayerScale(3, 1.0)
        self.drop_path = nn.Identity()

    def forward(self, x):
        return self.feed_forward(x)


BLOCKS = {
    'RepMixer': (lambda: RepMixer(3, 1.0, **BN), 3),
    'depthwise': (lambda: MobileOneBlock(3, 3, 3, groups=3, **BN), 3),
    'depthwise, stride 2': (lambda: MobileOneBlock(3, 3, 3, stride=2, groups=3, **BN), 3),
    'depthwise, widened': (lambda: MobileOneBlock(2, 4, 3, groups=2, **BN), 2),
    'stem': (lambda: MobileOneBlock(1, 9, 3, stride=2, **BN), 1),
    'dense': (lambda: MobileOneBlock(3, 3, 3, **BN), 3),
    'dense, stride 2': (lambda: MobileOneBlock(2, 3, 3, stride=2, **BN), 2),
    'pointwise': (lambda: MobileOneBlock(3, 3, 1, **BN), 3),
    'squeeze': (lambda: MobileOneBlock(2, 4, 3, groups=2, se_reduction=2, act_cfg=GELU, **BN), 2),
    'LargeKernelConv': (lambda: LargeKernelConv(2, 4, **BN), 2),
    'LargeKernelConv, same width': (lambda: LargeKernelConv(2, 2, **BN), 2),
    'LargeKernelConv, squeeze': (
        lambda: LargeKernelConv(2, 4, se_reduction=2, act_cfg=GELU, **BN),
        2,
    ),
    'stem without scale': (lambda: MobileOneBlock(2, 4, 3, stride=2, with_scale=False, **BN), 2),
    'PositionalEncoding': (lambda: PositionalEncoding(2), 2),
    'FFN': (ScaledFFN, 3),
}


def random_input(channels, size=(5, 6), batch=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    # Channels far from zero: a variance must not suffer from a large mean.
    x = torch.randn(batch, channels, *size, generator=generator, dtype=torch.float64)
    return x + torch.linspace(-3, 3, channels).view(-1, 1, 1)


def tangled(module, seed=1):
    """Random weights and statistics, with a zero and a negative among each layer's factors."""
    randomize(module, seed).double().train()
    with torch.no_grad():
        for part in module.modules():
            if isinstance(part, _BatchNorm):
                part.weight[0] *= -1
            if isinstance(part, LayerScale):
                part.gamma[0] = 0
            if isinstance(part, MobileOneBlock) and part.conv_scale is not None:
                part.conv_scale.conv.weight[0] = 0
    return module


def twins(build, **kwargs):
    """The same network twice, fused and branch by branch."""
    fused = tangled(build(**kwargs))
    plain = copy.deepcopy(fused)
    set_fused(plain, False)
    return fused, plain


def compare(fused, plain, limit=1e-8):
    """Gradients and buffers of ``fused`` against those of ``plain``."""
    for (key, a), b in zip(fused.named_parameters(), plain.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), key
        if b.grad is not None:
            assert close(a.grad, b.grad, limit), key
    for (key, a), b in zip(fused.named_buffers(), plain.buffers(), strict=True):
        assert close(a, b, 1e-12), key


def close(a, b, limit):
    """Where symmetry makes a value zero there is only rounding to compare."""
    return relative(a, b) < limit or max(a.abs().max(), b.abs().max()) < 1e-14


def refuse(*_):
    raise AssertionError('ran branch by branch')


@pytest.mark.parametrize('name', BLOCKS)
def test_blocks_are_exact(name, monkeypatch):
    build, channels = BLOCKS[name]
    fused, plain = twins(build)
    x = random_input(channels)
    expected = plain(x)
    dy = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2)).double()
    inputs = x.clone().requires_grad_(), x.clone().requires_grad_()
    (plain(inputs[1]) * dy).sum().backward()

    monkeypatch.setattr(nn.BatchNorm2d, 'forward', refuse)
    if name == 'PositionalEncoding':
        monkeypatch.setattr(nn.Conv2d, 'forward', refuse)
    assert relative(fused(x), expected) < 1e-12
    (fused(inputs[0]) * dy).sum().backward()
    assert relative(inputs[0].grad, inputs[1].grad) < 1e-10
    compare(fused, plain)


@pytest.mark.parametrize('name', BLOCKS)
def test_gradcheck(name):
    build, channels = BLOCKS[name]
    block = tangled(build())
    names, parameters = zip(*block.named_parameters(), strict=True)

    def function(x, *values):
        return functional_call(block, dict(zip(names, values, strict=True)), (x,))

    x = random_input(channels, (3, 4)).requires_grad_()
    assert torch.autograd.gradcheck(function, (x, *parameters), fast_mode=True)


@pytest.mark.parametrize(
    'arch, optimizer',
    [(TINY, torch.optim.SGD), (TINY, torch.optim.AdamW), (CLIP, torch.optim.AdamW)],
    ids=['SGD', 'AdamW', 'MobileCLIP'],
)
def test_twenty_steps(arch, optimizer):
    last = len(arch['depths']) - 1
    size = (33, 64) if arch is TINY else (97, 160)  # of two positions a norm is a sign
    args = dict(out_indices=(0, 1, 2, last), feature_norm=True, drop_path_rate=0.2)
    models = twins(FastViT, arch=arch, **args)
    optimizers = [optimizer(model.parameters(), lr=1e-3) for model in models]
    for step in range(20):
        for model, own in zip(models, optimizers, strict=True):
            torch.manual_seed(step)
            own.zero_grad()
            sum(out.square().mean() for out in model(random_input(3, size))).backward()
            own.step()
    fused, plain = (model.state_dict() for model in models)
    for key, value in plain.items():
        assert relative(fused[key], value) < 1e-9, key


@pytest.mark.parametrize('momentum', [0.1, None])
def test_running_statistics_equal_timms(momentum):
    ours = nn.ModuleDict(dict(backbone=FastViT('t8'), neck=FastViTNeck(384)))
    randomize(ours, seed=3).double().train()
    theirs = timm.create_model('fastvit_t8', num_classes=0).double().train()
    rename = lambda key: key.replace('backbone.', '').replace('neck.', '')  # noqa: E731
    theirs.load_state_dict({rename(k): v for k, v in ours.state_dict().items()})
    for module in [*ours.modules(), *theirs.modules()]:
        if isinstance(module, _BatchNorm):
            module.momentum = momentum
    for seed in range(3):
        x = random_input(3, (64, 64), seed=seed)
        with torch.no_grad():
            ours.neck(ours.backbone(x))
            theirs(x)
    buffers = dict(theirs.named_buffers())
    for key, buffer in ours.named_buffers():
        assert relative(buffer, buffers[rename(key)]) < 1e-10, key


def gradients(model, x, **autocast):
    with torch.autocast('cpu', **autocast):
        outs = model(x)
        loss = sum(out.float().square().mean() for out in outs)
    loss.backward()
    return [*outs, *(p.grad for p in model.parameters())]


@pytest.mark.parametrize('mixed', [True, False])
def test_bfloat16(mixed):
    """As near to float64 as the branch-by-branch form, in mixed and in pure half precision."""
    models = twins(FastViT, arch=TINY)
    x = random_input(3, (64, 64), batch=4)
    exact = gradients(copy.deepcopy(models[1]), x, enabled=False)
    dtype = torch.float32 if mixed else torch.bfloat16
    fused, plain = (
        gradients(m.to(dtype), x.to(dtype), enabled=mixed, dtype=torch.bfloat16) for m in models
    )
    assert [t.dtype for t in fused] == [t.dtype for t in plain]

    ratios = []
    for own, theirs, reference in zip(fused, plain, exact, strict=True):
        if reference.norm() < 1e-10:  # a bias before a BatchNorm: nothing but rounding
            continue
        own, theirs = ((t - reference).norm() / reference.norm() for t in (own, theirs))
        # Of a kernel near zero the gradient hangs on eps, and both lose digits.
        assert own < 3 * theirs + 0.05
        ratios.append(own / theirs)
    assert len(ratios) > 100
    assert torch.stack(ratios).log().mean().exp() < 1


def test_float32_with_a_large_mean():
    x = torch.randn(4, 3, 16, 16) + 1000
    mean, var = moments(x)
    assert relative(mean, x.double().mean((0, 2, 3))) < 1e-6
    assert relative(var, x.double().var((0, 2, 3), correction=0)) < 1e-5


def test_checkpointing():
    fused, plain = twins(FastViT, arch=TINY, with_cp=True, drop_path_rate=0.3)
    x = random_input(3, (33, 64))
    for model in (fused, plain):
        torch.manual_seed(0)
        sum(out.square().mean() for out in model(x)).backward()
    compare(fused, plain)


def saved_bytes(model, x):
    """Activations that the backward pass keeps."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outs = model(x)
    assert outs
    return sum(storage.nbytes() for address, storage in kept.items() if address not in own)


def test_keeps_fewer_activations():
    ours = FastViT('t8').train()
    theirs = timm.create_model('fastvit_t8', features_only=True).train()
    x = torch.randn(8, 3, 128, 128)
    assert saved_bytes(ours, x) < 0.7 * saved_bytes(theirs, x)


@pytest.mark.parametrize(
    'args',
    [
        dict(norm_eval=True),
        dict(frozen_stages=2),
        dict(act_cfg=dict(type='ReLU')),
        dict(norm_cfg=dict(type='BN', affine=False)),
        dict(norm_cfg=dict(type='BN', track_running_stats=False)),
        dict(norm_cfg=dict(type='BN', eps=1e-3, momentum=0.01)),
        dict(norm_cfg=dict(type='SyncBN')),
    ],
)
def test_other_settings(args):
    torch.manual_seed(0)
    fused = FastViT(TINY, **args).double().train()
    plain = FastViT(TINY, **args, fused_training=False).double().train()
    plain.load_state_dict(fused.state_dict(), strict=True)
    x = random_input(3, (33, 64))
    for model in (fused, plain):
        sum(out.square().mean() for out in model(x)).backward()
    compare(fused, plain)


def test_one_norm_in_eval_mode():
    fused, plain = twins(RepMixer, dim=3, layer_scale=1.0, **BN)
    for block in (fused, plain):
        block.mixer.identity.eval()
    x = random_input(3)
    assert relative(fused(x), plain(x)) < 1e-14
    for (key, a), b in zip(fused.named_buffers(), plain.buffers(), strict=True):
        assert relative(a, b) < 1e-14, key


def test_one_position_is_the_norms_error():
    with pytest.raises(ValueError, match='more than 1 value per channel'):
        RepMixer(3, 1.0, **BN).train()(torch.randn(1, 3, 1, 1))


def test_copies_and_compiles():
    block = tangled(RepMixer(3, 1.0, **BN))
    x = random_input(3)
    expected = block(x)
    assert torch.equal(copy.deepcopy(block)(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(block))(x), expected)
    compiled = torch.compile(block, backend='eager', fullgraph=True)
    assert relative(compiled(x), expected) < 1e-12


def test_gradients_accumulate():
    """Two parameters whose gradients are views of one memory would each count the other's."""
    fused, plain = twins(FastViT, arch=TINY, feature_norm=True)
    for seed in range(2):
        for model in (fused, plain):
            outs = model(random_input(3, (33, 64), seed=seed))
            sum(out.square().mean() for out in outs).backward()
    compare(fused, plain)
    storages = [p.grad.untyped_storage().data_ptr() for p in fused.stem[0].parameters()]
    assert len(set(storages)) == len(storages)


def test_half_precision_runs_branch_by_branch():
    """A layer scale of 1e-6 times a weight is nothing in float16."""
    fused, plain = (m.half() for m in twins(RepMixer, dim=3, layer_scale=1.0, **BN))
    x = random_input(3).half()
    assert torch.equal(fused(x), plain(x))
    fused, plain = twins(RepMixer, dim=3, layer_scale=1.0, **BN)
    with torch.autocast('cpu', torch.float16):
        assert torch.equal(fused(random_input(3)), plain(random_input(3)))


def test_channels_last():
    """The fast path wants contiguous images, and takes those in channels_last all the same; the
    operator that aborts PyTorch (docs/channels_last_crash.py) is not reached in either layout."""
    fused, plain = twins(FastViT, arch=TINY)
    for size in ((64, 64), (96, 96), (64, 128), (128, 128)):
        x = random_input(3, size)
        for model, layout in ((fused, torch.channels_last), (plain, torch.contiguous_format)):
            outs = model(x.to(memory_format=layout))
            assert all(out.is_contiguous() for out in outs)
            sum(out.square().mean() for out in outs).backward()
    compare(fused, plain)


CRASHES = """
import torch
from fastvit_mm import FastViT
for fused in (True, False):
    model = FastViT('t8', fused_training=fused).train().to(memory_format=torch.channels_last)
    for size in (128, 160, 192, 224, 128):
        x = torch.randn(2, 3, size, size).to(memory_format=torch.channels_last)
        sum(out.square().mean() for out in model(x)).backward()
"""


@pytest.mark.slow
def test_weights_in_channels_last():
    # glibc checks its heap at every call, and fills what is freed; since 2.34, with this library.
    env = {**os.environ, 'MALLOC_CHECK_': '3', 'MALLOC_PERTURB_': '165', 'OMP_NUM_THREADS': '1'}
    if sys.platform == 'linux':
        env['LD_PRELOAD'] = 'libc_malloc_debug.so.0'  # without it, the loader only warns
    call = [sys.executable, '-c', CRASHES]
    run = subprocess.run(call, env=env, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr[-500:]


def test_steps_aside_on_other_devices():
    """No work for a path that is not taken: as many operators as branch by branch."""
    counts = []
    for fused in (True, False):
        model = FastViT(TINY, fused_training=fused).to('meta').train()
        with Count() as count:
            model(torch.empty(2, 3, 64, 64, device='meta'))
        counts.append(count.operators)
    assert counts[0] == counts[1] > 100


class Count(TorchDispatchMode):
    operators = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operators += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize('name', BLOCKS)
def test_gradients_of_gradients(name):
    build, channels = BLOCKS[name]
    found = []
    for block in twins(build):
        x = random_input(channels).requires_grad_()
        (gradient,) = torch.autograd.grad(block(x).pow(3).sum(), x, create_graph=True)
        gradient.square().sum().backward()
        found.append({'x': x.grad, **{k: p.grad for k, p in block.named_parameters()}})
    for key, b in found[1].items():
        a = found[0][key]
        # A parameter that no second derivative reaches has none, or zeros.
        assert (a is None or not a.any()) if b is None else close(a, b, 1e-8), key


def test_deployed_while_training():
    fused, _ = twins(FastViT, arch=TINY)
    x = random_input(3, (33, 64))
    expected = copy.deepcopy(fused).eval()(x)
    fused.switch_to_deploy()
    assert all(relative(a, b) < 1e-10 for a, b in zip(fused.train()(x), expected, strict=True))
