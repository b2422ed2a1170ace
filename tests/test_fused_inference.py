"""The deploy form on a CPU without gradients: PyTorch's own operators give the same numbers."""

import copy
import io
import pickle

import pytest
import torch
from randomize import randomize, relative
from torch.utils.flop_counter import FlopCounterMode

from fastvit_mm import FastViT, FastViTNeck
from fastvit_mm.models import fused_inference
from fastvit_mm.models.fused_inference import Packed

ARCH = dict(depths=(1, 1, 1, 2), widths=(16, 32, 64, 64), attention=(0, 0, 0, 1), ffn_ratio=3)


@pytest.fixture
def deployed():
    model = randomize(FastViT(ARCH, feature_norm=True).eval())
    model.switch_to_deploy()
    return model


@pytest.fixture
def x():
    return torch.randn(2, 3, 64, 96)


def plain(model, x):
    """By PyTorch's operators alone, as where gradients are wanted."""
    with torch.enable_grad():
        return [y.detach() for y in model(x)]


def fused(model, x):
    with torch.no_grad():
        outs = model(x)
    assert all(m.packed for m in model.modules() if isinstance(m, Packed)) == (
        x.device.type == 'cpu'
    )
    return outs


def agree(model, x, limit=2e-5):
    for a, b in zip(fused(model, x), plain(model, x), strict=True):
        assert relative(a.float(), b.float()) < limit


@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('size', [(32, 32), (64, 96), (45, 77)])
def test_same_numbers(deployed, layout, size):
    agree(deployed, torch.randn(2, 3, *size).contiguous(memory_format=layout))
    agree(deployed, torch.randn(1, 3, *size[::-1]))  # weights rearranged for another size


@pytest.mark.slow
def test_every_size_has_its_order(monkeypatch):
    """oneDNN wants weights in another order for some sizes; those that want the same share it."""
    model = FastViT('t8').eval()
    model.switch_to_deploy()
    layers = [m for m in model.modules() if isinstance(m, Packed)][1:]  # the stem's are all apart
    used = {}
    original = Packed.packed_weight

    def note(self, *args):
        used[self] = original(self, *args)
        return used[self]

    monkeypatch.setattr(Packed, 'packed_weight', note)

    def orders(size):
        with torch.no_grad():
            model(torch.randn(1, 3, size, size))
        describe = torch.ops.mkldnn._get_mkldnn_serialized_md
        return [describe(used[layer]).tolist() for layer in layers]

    sizes = (256, 384, 512)
    alone = []
    for size in sizes:
        model.eval()  # forgets
        alone.append(orders(size))
    model.eval()
    assert [orders(size) for size in sizes] == alone
    first = [used[layer] for layer in layers]
    orders(384)
    assert orders(512) == alone[2]
    assert all(a is used[layer] for a, layer in zip(first, layers, strict=True)), 'not kept'
    kept = sum(len(layer.packed.by_order) for layer in layers)
    assert kept < len(layers) * len(sizes), 'sizes share nothing'


def test_memory_of_sizes_is_bounded(monkeypatch):
    monkeypatch.setattr(fused_inference, 'SIZES', 3)
    conv = fused_inference.Conv2d(8, 8, 3)
    fused_inference.pack(conv)
    with torch.no_grad():
        for size in (*range(10, 20), 10):
            x = torch.randn(1, 8, size, size)
            wanted = torch.nn.functional.conv2d(x, conv.weight, conv.bias)
            assert relative(conv(x), wanted) < 1e-5
            assert len(conv.packed.by_size) <= 3
        kept = conv.packed
        conv(x)
        assert conv.packed is kept


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('strip', [1, 10_000, 30_000, 1 << 20])
@pytest.mark.parametrize('size', [(64, 96), (45, 77)])
def test_strips_give_the_same_numbers(monkeypatch, deployed, size, strip, dtype):
    """Large feed-forward networks run by a row, by some, by an image and by all images at once."""
    deployed.to(dtype)
    x = torch.randn(3, 3, *size, dtype=dtype)
    wanted = fused(deployed, x)
    calls = []
    mlp = deployed.stages[0].blocks[0].mlp
    for layer in (mlp.fc1, mlp.fc2):
        layer.register_forward_hook(lambda m, args, out: calls.append((m, len(out), out.shape[2])))
    monkeypatch.setattr(fused_inference, 'LARGE', 0)
    monkeypatch.setattr(fused_inference, 'STRIP', strip)
    close = 1e-5 if dtype == torch.float32 else 2e-2
    for layout in (torch.contiguous_format, torch.channels_last):
        calls.clear()
        with torch.inference_mode():
            outs = deployed(x.contiguous(memory_format=layout))
        for a, b in zip(outs, wanted, strict=True):
            assert relative(a.float(), b.float()) < close
        for layer in (mlp.fc1, mlp.fc2):
            parts = [(images, rows) for m, images, rows in calls if m is layer]
            assert sum(images * rows for images, rows in parts) == 3 * wanted[0].shape[2]
            assert len(parts) == 1 if strip == 1 << 20 else len(parts) > 1
            assert strip > 1 or set(parts) == {(1, 1)}


def test_without_onednn(monkeypatch, deployed, x):
    """As in PyTorch's builds for macOS, which have none of its operators."""
    wanted = plain(deployed, x)
    monkeypatch.setattr(torch.backends.mkldnn, 'is_available', lambda: False)
    monkeypatch.setattr(fused_inference, 'mkldnn', None)
    fused_inference.has_bf16.cache_clear()
    with torch.no_grad():
        for a, b in zip(deployed(x), wanted, strict=True):
            assert torch.equal(a, b)
        deployed.bfloat16()(x.bfloat16())


def test_half(deployed, x):
    exact = plain(deployed, x)
    deployed.bfloat16()
    for a, b, c in zip(
        fused(deployed, x.bfloat16()), plain(deployed, x.bfloat16()), exact, strict=True
    ):
        assert relative(a.float(), c) < 2 * relative(b.float(), c) + 1e-2


def test_neck(x):
    neck = randomize(FastViTNeck(16).eval())
    feats = (torch.randn(2, 16, 5, 7),)
    with torch.no_grad():
        wanted = neck(feats)[0]
        neck.switch_to_deploy()
        assert relative(neck(feats)[0], wanted) < 1e-5
    assert neck.final_conv.reparam_conv.packed


@pytest.mark.parametrize(
    'change',
    [
        lambda model, other: model.load_state_dict(other),
        lambda model, other: [p.mul_(-0.5) for p in model.parameters()],
        lambda model, other: model.double().float(),
        # leaves no trace: averaging hooks do this, and call eval() or train()
        lambda model, other: [p.data.mul_(-0.5) for p in model.parameters()] and model.eval(),
        lambda model, other: (
            [p.data.mul_(-0.5) for p in model.parameters()] and model.train().eval()
        ),
        lambda model, other: [setattr(p, 'data', 2 * p.data) for p in model.parameters()],
    ],
)
def test_changed_weights_are_noticed(deployed, x, change):
    other = {k: v.clone() for k, v in randomize(deployed, seed=1).state_dict().items()}
    agree(randomize(deployed), x)
    with torch.no_grad():
        change(deployed, other)
    agree(deployed, x)


def test_copies(deployed, x):
    wanted = fused(deployed, x)
    state = set(deployed.state_dict())
    file = io.BytesIO()
    torch.save(deployed, file)
    file.seek(0)
    copies = [copy.deepcopy(deployed), pickle.loads(pickle.dumps(deployed))]
    for twin in (*copies, torch.load(file, weights_only=False)):
        assert set(twin.state_dict()) == state
        assert not any(m.packed for m in twin.modules() if isinstance(m, Packed))
        for a, b in zip(fused(twin, x), wanted, strict=True):
            assert torch.equal(a, b)


def test_only_where_nobody_looks_inside(deployed, x):
    """Gradients, counters, tracers and a training form get PyTorch's operators."""
    deployed(x)[0].sum().backward()
    assert all(p.grad is not None for p in deployed.stem.parameters())
    assert not any(m.packed for m in deployed.modules() if isinstance(m, Packed))
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
        training = FastViT(ARCH).eval()
        training(x)
    assert not any(m.packed for m in training.modules() if isinstance(m, Packed))


def test_inference_mode(x):
    with torch.inference_mode():
        model = randomize(FastViT(ARCH).eval())
        wanted = model(x)
        model.switch_to_deploy()
        for a, b in zip(model(x), wanted, strict=True):
            assert relative(a, b) < 2e-5


@pytest.mark.parametrize('large', [0, fused_inference.LARGE])
def test_hooks_see_every_layer(monkeypatch, deployed, x, large):
    monkeypatch.setattr(fused_inference, 'LARGE', large)
    seen = []
    for module in deployed.modules():
        if isinstance(module, Packed):
            module.register_forward_hook(lambda m, *_: seen.append(m))
    fused(deployed, x)
    assert len(seen) == sum(isinstance(m, Packed) for m in deployed.modules())
