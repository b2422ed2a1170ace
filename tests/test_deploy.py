"""The deploy form on a CPU without gradients: PyTorch's own operators give the same numbers."""

import copy
import io
import os
import pickle
import subprocess
import sys
import warnings

import pytest
import torch
import torch.nn as nn
from randomize import randomize, relative
from torch.utils.flop_counter import FlopCounterMode
from torchvision.ops import SqueezeExcitation

from fastvit_mm import FastViT, FastViTError, FastViTNeck
from fastvit_mm.models import deploy, onednn
from fastvit_mm.models.deploy import DeployConv, Deployed, DeployFFN, DeployStem
from fastvit_mm.models.onednn import Rearranged

ARCH = dict(depths=(1, 1, 1, 2), widths=(16, 32, 64, 64), attention=(0, 0, 0, 1), ffn_ratio=3)

# MobileCLIP's: squeeze-and-excite and GELU in the downsampling, LayerNorm, five stages.
CLIP = dict(
    depths=(1, 1, 1, 1, 1),
    widths=(16, 32, 64, 64, 64),
    attention=(0, 0, 0, 1, 1),
    attention_norm='LN',
    downsample_se=(0, 0, 1, 0, 0),
    downsample_act=True,
    stem_scale=False,
)


@pytest.fixture
def deployed():
    return deploy_form(ARCH)


def deploy_form(arch):
    indices = tuple(range(len(arch['depths'])))
    model = randomize(FastViT(arch, out_indices=indices, feature_norm=True).eval())
    model.switch_to_deploy()
    return model


@pytest.fixture
def x():
    return torch.randn(2, 3, 64, 96)


def plain(model, x):
    """By PyTorch's operators alone, as where gradients are wanted."""
    with torch.enable_grad():
        return [y.detach() for y in model(x)]


def layers(model):
    small = [p for m in model.modules() if isinstance(m, SqueezeExcitation) for p in m.modules()]
    own = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    return [m for m in own if m not in small]  # these read one pixel


def rearranged(model):
    return [r for m in model.modules() if isinstance(m, Deployed) for r in m.rearranged.values()]


def fast(model, x):
    with torch.no_grad():
        outs = model(x)
    assert len(rearranged(model)) == len(layers(model)), 'a layer ran by itself'
    return outs


def agree(model, x, limit=1e-5):
    for a, b in zip(fast(model, x), plain(model, x), strict=True):
        assert relative(a.float(), b.float()) < limit


@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('size', [(32, 32), (64, 96), (45, 77)])
def test_same_results(deployed, layout, size):
    agree(deployed, torch.randn(2, 3, *size).contiguous(memory_format=layout))
    agree(deployed, torch.randn(1, 3, *size[::-1]))  # weights rearranged for another size


@pytest.mark.parametrize('size', [(32, 32), (64, 96), (45, 77)])
def test_same_results_of_mobileclips(size):
    model = deploy_form(CLIP)
    agree(model, torch.randn(2, 3, *size))
    agree(model.bfloat16(), torch.randn(2, 3, *size).bfloat16(), limit=0.1)


@pytest.mark.slow
def test_every_size_has_its_order(monkeypatch):
    """oneDNN wants weights in another order for some sizes; those that want the same share it."""
    model = FastViT('t8').eval()
    model.switch_to_deploy()
    used = {}
    original = Rearranged.of

    def note(self, layer, *args):
        used[layer] = original(self, layer, *args)
        return used[layer]

    monkeypatch.setattr(Rearranged, 'of', note)
    known = layers(model)[1:]  # the first one's orders differ from size to size

    def orders(size):
        with torch.no_grad():
            model(torch.randn(1, 3, size, size))
        return [onednn.order_of(used[layer]).tolist() for layer in known]

    def forget():
        model.train()
        model.eval()

    sizes = (256, 384, 512)
    alone = []
    for size in sizes:
        forget()
        alone.append(orders(size))
    forget()
    assert [orders(size) for size in sizes] == alone
    first = [used[layer] for layer in known]
    orders(384)
    assert orders(512) == alone[2]
    assert all(a is used[layer] for a, layer in zip(first, known, strict=True)), 'not kept'
    kept = sum(len(r.by_order) for r in rearranged(model))
    assert kept < len(known) * len(sizes), 'sizes share nothing'


@pytest.mark.parametrize('limit', ['SIZES', 'ORDERS'])
def test_memory_of_sizes_is_bounded(monkeypatch, limit):
    monkeypatch.setattr(onednn, limit, 3)
    if limit == 'ORDERS':
        monkeypatch.setattr(onednn, 'order_of', None)  # as if none could be shared
    conv = DeployConv(nn.Conv2d(8, 8, 3)).eval()
    layer = conv.reparam_conv
    with torch.no_grad():
        for size in (*range(10, 20), 10):
            x = torch.randn(1, 8, size, size)
            wanted = nn.functional.conv2d(x, layer.weight, layer.bias)
            assert relative(conv(x), wanted) < 1e-5
            kept = conv.weight_of('reparam_conv')
            assert len(kept.by_size if limit == 'SIZES' else kept.by_order) <= 3
            assert kept.nbytes == len(kept.by_order) * layer.weight.nbytes
        before = kept.by_size[x.shape]
        conv(x)
        assert kept.by_size[x.shape] is before


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('strip', [1, 3_000, 30_000, 1 << 20])
@pytest.mark.parametrize('size', [(64, 96), (45, 77)])
def test_strips_give_the_same_results(monkeypatch, deployed, size, strip, dtype):
    """What is large runs by a row, by some, by an image and by all images at once."""
    deployed.to(dtype)
    x = torch.randn(3, 3, *size, dtype=dtype)
    wanted = fast(deployed, x)
    rows = wanted[0].shape[2]
    done = {}
    original = onednn.convolution

    def note(x, layer, *args, **kwargs):
        y = original(x, layer, *args, **kwargs)
        done.setdefault(layer, []).append((len(y), y.shape[2]))
        return y

    monkeypatch.setattr(onednn, 'convolution', note)
    monkeypatch.setattr(deploy, 'LARGE', 0)
    monkeypatch.setattr(deploy, 'STRIP', strip)
    close = 1e-5 if dtype == torch.float32 else 2e-2
    mlp, stem = deployed.stages[0].blocks[0].mlp, deployed.stem
    for layout in (torch.contiguous_format, torch.channels_last):
        done.clear()
        with torch.inference_mode():
            outs = deployed(x.contiguous(memory_format=layout))
        for a, b in zip(outs, wanted, strict=True):
            assert relative(a.float(), b.float()) < close
        for layer in (mlp.fc1, mlp.fc2, stem[2].reparam_conv):
            parts = done[layer]
            extra = 0 if layer in (mlp.fc1, mlp.fc2) else sum(images for images, _ in parts) - 3
            assert sum(images * n for images, n in parts) == 3 * rows + extra
            assert len(parts) == 1 if strip == 1 << 20 else len(parts) > 1
            assert strip > 1 or {images for images, _ in parts} == {1}


def test_a_hook_sees_whole_images(monkeypatch, deployed, x):
    monkeypatch.setattr(deploy, 'LARGE', 0)
    monkeypatch.setattr(deploy, 'STRIP', 1)
    seen = []
    for part in (deployed.stem[0], deployed.stages[0].blocks[0].mlp.fc1):
        part.register_forward_hook(lambda m, args, y: seen.append(tuple(y.shape)))
    with torch.no_grad():
        deployed(x)
    assert seen == [(2, 16, 32, 48), (2, 48, 16, 24)]


@pytest.mark.parametrize(
    'change',
    [
        lambda stem: stem[0].act.register_forward_hook(lambda m, args, y: None),
        lambda stem: setattr(stem[1], 'se', SqueezeExcitation(16, 4)),
        lambda stem: setattr(stem[2], 'act', nn.Softmax(2)),
        lambda stem: stem.pop(2),
        lambda stem: setattr(stem[1].reparam_conv, 'stride', (1, 1)),
    ],
    ids=['hook', 'se', 'softmax', 'a part less', 'stride'],
)
def test_a_changed_stem_has_no_strips(monkeypatch, deployed, change):
    stem, x = deployed.stem, torch.randn(2, 3, 67, 130)
    change(stem)
    wanted = stem(x).detach()
    heights = []
    forward = DeployConv.forward
    monkeypatch.setattr(
        DeployConv, 'forward', lambda self, x: heights.append(x.shape[2]) or forward(self, x)
    )
    monkeypatch.setattr(deploy, 'LARGE', 0)
    monkeypatch.setattr(deploy, 'STRIP', 1)
    with torch.no_grad():
        assert relative(stem(x), wanted) < 1e-5
    assert heights[:2] == [67, 34] and len(heights) == len(stem)


def test_an_image_without_a_batch(deployed):
    conv = deployed.stem[0]
    with torch.no_grad():
        assert relative(conv(torch.ones(3, 32, 32)), conv(torch.ones(1, 3, 32, 32))[0]) < 1e-5


@pytest.mark.parametrize(
    'padding', [dict(padding='same'), dict(padding=1, padding_mode='reflect')], ids=str
)
def test_other_padding_runs_by_itself(padding):
    conv = DeployConv(nn.Conv2d(8, 8, 3, **padding)).eval()
    x = torch.randn(1, 8, 9, 9)
    with torch.no_grad():
        assert torch.equal(conv(x), conv.reparam_conv(x))


def test_a_norm_without_statistics_cannot_merge():
    model = FastViT(ARCH, norm_cfg=dict(type='BN', track_running_stats=False))
    with pytest.raises(FastViTError, match='running statistics'):
        model.switch_to_deploy()


def test_without_onednn(monkeypatch, deployed, x):
    """As in PyTorch's builds for macOS, which have none of its operators."""
    wanted = plain(deployed, x)
    monkeypatch.setattr(torch.backends.mkldnn, 'is_available', lambda: False)
    for name in ('convolve', 'multiply', 'multiply_add', 'order_of'):
        monkeypatch.setattr(onednn, name, None)
    onednn.has_onednn.cache_clear()
    try:
        with torch.no_grad():
            for a, b in zip(deployed(x), wanted, strict=True):
                assert torch.equal(a, b)
            deployed.bfloat16()(x.bfloat16())
    finally:
        onednn.has_onednn.cache_clear()
    assert not rearranged(deployed)


def test_switched_off(deployed, x):
    wanted = plain(deployed, x)
    with torch.no_grad(), torch.backends.mkldnn.flags(enabled=False):
        for a, b in zip(deployed(x), wanted, strict=True):
            assert relative(a, b) < 1e-5
    assert not rearranged(deployed)


def test_half(deployed, x):
    """No further from the exact outputs than PyTorch's own operators."""
    exact = plain(deployed, x)
    deployed.bfloat16()
    for a, b, c in zip(
        fast(deployed, x.bfloat16()), plain(deployed, x.bfloat16()), exact, strict=True
    ):
        own, theirs = ((t.float() - c).square().mean().sqrt() for t in (a, b))
        assert own < 1.2 * theirs


@pytest.mark.parametrize('dtype', [torch.float16, torch.float64])
def test_other_types_run_by_themselves(deployed, x, dtype):
    wanted = plain(deployed.to(dtype), x.to(dtype))
    with torch.no_grad():
        for a, b in zip(deployed(x.to(dtype)), wanted, strict=True):
            assert a.dtype == dtype
            assert torch.equal(a, b)
    assert not rearranged(deployed)


def test_autocast(deployed, x):
    """Autocast decides about precision: no layer computes in float32 in spite of it."""
    exact = plain(deployed, x)
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16):
        outs = deployed(x)
        assert not rearranged(deployed)
        compiled = torch.compile(deployed, fullgraph=True, backend='aot_eager')(x)
    for a, b, c in zip(outs, compiled, exact, strict=True):
        assert 1e-4 < relative(a.float(), c) < 0.05
        assert relative(a.float(), b.float()) < 0.02


def test_neck(x):
    neck = randomize(FastViTNeck(16).eval())
    feats = (torch.randn(2, 16, 5, 7),)
    with torch.no_grad():
        wanted = neck(feats)[0]
        neck.switch_to_deploy()
        assert relative(neck(feats)[0], wanted) < 1e-5
    assert rearranged(neck)


CHANGES = {
    'loaded': lambda model, other: model.load_state_dict(other),
    'in place': lambda model, other: [p.mul_(-0.5) for p in model.parameters()],
    'dtype and back': lambda model, other: model.double().float(),
    'data': lambda model, other: [p.data.mul_(-0.5) for p in model.parameters()],
    'one value of data': lambda model, other: [
        p.data.flatten()[-1].add_(1) for p in model.parameters()
    ],
    'set': lambda model, other: [setattr(p, 'data', 2 * p.data) for p in model.parameters()],
    'set twice': lambda model, other: [
        setattr(p, 'data', k * p.data) for k in (3.0, 0.5) for p in model.parameters()
    ],
    'a new parameter': lambda model, other: [
        setattr(layer, 'weight', nn.Parameter(1.5 * layer.weight)) for layer in layers(model)
    ],
}


@pytest.mark.parametrize('change', CHANGES)
def test_changed_weights_are_noticed(deployed, x, change):
    other = {k: v.clone() for k, v in randomize(deployed, seed=1).state_dict().items()}
    agree(randomize(deployed), x)
    held = [p.data for p in deployed.parameters()]
    agree(deployed, x)
    before = fast(deployed, x)
    with torch.no_grad():
        CHANGES[change](deployed, other)
    agree(deployed, x)
    assert all(torch.equal(p.data, p.detach()) for p in deployed.parameters())
    if change != 'dtype and back':
        assert relative(fast(deployed, x)[3], before[3]) > 1e-3
    if change in ('in place', 'data'):  # through what `.data` gave before
        held[0].mul_(2)
        agree(deployed, x)


def test_changed_by_numpy(deployed, x):
    """Nothing notices this; a change of mode forgets what was made of the weights."""
    fast(deployed, x)
    for parameter in deployed.parameters():
        parameter.detach().numpy()[...] *= -0.5
    deployed.train()
    deployed.eval()
    agree(deployed, x)


def test_eval_of_an_evaluating_model_keeps_the_weights(deployed, x):
    fast(deployed, x)
    before = [w for r in rearranged(deployed) for w in r.by_order.values()]
    deployed.eval()
    fast(deployed, x)
    after = [w for r in rearranged(deployed) for w in r.by_order.values()]
    assert all(a is b for a, b in zip(before, after, strict=True))


def test_copies(deployed, x):
    wanted = fast(deployed, x)
    state = set(deployed.state_dict())
    file = io.BytesIO()
    torch.save(deployed, file)
    assert file.tell() < 1.5 * sum(p.nbytes for p in deployed.parameters())
    file.seek(0)
    copies = [copy.deepcopy(deployed), pickle.loads(pickle.dumps(deployed))]
    for twin in (*copies, torch.load(file, weights_only=False)):
        assert set(twin.state_dict()) == state
        assert not any(r.by_order for r in rearranged(twin))
        for a, b in zip(fast(twin, x), wanted, strict=True):
            assert torch.equal(a, b)
        twin.stem[0].reparam_conv.weight.data.mul_(2)
        agree(twin, x)


def test_only_where_nobody_looks_inside(deployed, x):
    """Gradients, counters, tracers and a training form get PyTorch's operators."""
    deployed(x)[0].sum().backward()
    assert all(p.grad is not None for p in deployed.stem.parameters())
    assert not rearranged(deployed)
    counts = []
    for mode in (torch.no_grad, torch.enable_grad):
        with mode(), FlopCounterMode(display=False) as counter:
            deployed(x)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0
    with torch.no_grad():
        traced = torch.jit.trace(deployed, x, check_trace=False)
        assert 'mkldnn' not in str(traced.inlined_graph)
        program = torch.export.export(deployed, (x,), strict=False)
        assert 'mkldnn' not in str(program.graph)
    assert not rearranged(deployed)
    agree(deployed, x)  # and none of these switches the fast path off for good


def test_inference_mode(x):
    with torch.inference_mode():
        model = randomize(FastViT(ARCH).eval())
        wanted = model(x)
        model.switch_to_deploy()
        for a, b in zip(model(x), wanted, strict=True):
            assert relative(a, b) < 1e-5
        # Tensors made here have no version: changes of theirs cannot be noticed.
        for parameter in model.parameters():
            parameter.mul_(0.5)
        changed = model(x)
    agree(copy.deepcopy(model), x)
    for a, b in zip(changed, copy.deepcopy(model)(x), strict=True):
        assert relative(a, b) < 1e-5


def test_the_deploy_form_has_its_own_modules(deployed):
    """PyTorch's layers hold the weights, so that quantizers, wrappers and pruning find them."""
    assert {type(m) for m in layers(deployed)} == {nn.Conv2d, nn.Linear}
    parts = {type(m) for m in deployed.modules() if isinstance(m, Deployed | DeployStem)}
    assert parts == {DeployStem, DeployConv, DeployFFN, deploy.DeployAttention}


FAULTS = """
import resource
import torch
from fastvit_mm import FastViT

model = FastViT('t8', out_indices=(3,)).eval()
model.switch_to_deploy()
with torch.inference_mode():
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        model(torch.ones(1, 3, 800, 1216))
        print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != 'linux', reason='about glibc')
def test_memory_is_recycled():
    """A second pass finds the first one's memory: hardly a page comes from the system anew.

    In a process of its own, as it depends on what others have left in the heap.
    """
    env = {k: v for k, v in os.environ.items() if not k.startswith(('MALLOC_', 'GLIBC_'))}
    run = subprocess.run([sys.executable, '-c', FAULTS], env=env, capture_output=True, text=True)
    faults = [int(line) for line in run.stdout.split()]
    assert len(faults) == 5, run.stderr[-500:]
    assert max(faults[2:]) < 2000, faults  # 24,900 when large blocks went back to the system


def said(model, x):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter('always')
        model(x)
    return [one for one in seen if 'deploy form' in str(one.message)]


def test_training_the_deploy_form_warns_once(x):
    model = randomize(FastViT(ARCH))
    assert not said(model.train(), x)
    model.switch_to_deploy()
    assert not said(model.eval(), x)
    (warning,) = said(model.train(), x)
    assert warning.filename == __file__
    assert not said(model, x)
    assert len(said(FastViT(ARCH, deploy=True).train(), x)) == 1
    # a frozen backbone below a head that is trained
    assert not said(FastViT(ARCH, deploy=True, frozen_stages=4).train(), x)


def test_training_the_deploy_form_compiles(x):
    model = FastViT(ARCH, deploy=True).train()
    torch.compile(model, backend='eager', fullgraph=True)(x)
