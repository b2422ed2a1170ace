"""Whoever looks at a layer or follows what it computes sees an ordinary network, in every form."""

import copy

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn as nn
from mmcv.cnn.bricks import DropPath
from randomize import randomize, relative
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import prune
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastvit_mm import FastViT
from fastvit_mm.models.deploy import DeployFFN
from fastvit_mm.models.fastvit import ConvFFN
from fastvit_mm.models.fused_training import set_fused
from fastvit_mm.models.ordinary import DeployWeight
from fastvit_mm.models.rep_conv import LayerScale

ARCH = dict(depths=(1, 1, 1, 1), widths=(16, 32, 64, 64), attention=(0, 0, 0, 1), ffn_ratio=2)
# MobileCLIP's kinds of layers
CLIP = dict(
    ARCH, attention_norm='LN', downsample_se=(0, 0, 1, 1), downsample_act=True, stem_scale=False
)
FORMS = ['training', 'eval', 'deploy']


def network(form, arch=ARCH, **args):
    model = randomize(FastViT(arch, **args)).train(form == 'training')
    if form == 'deploy':
        model.switch_to_deploy()
        with torch.no_grad():
            model(torch.randn(1, 3, 64, 64))  # weights are rearranged already
    return model


def images(dtype=torch.float32, batch=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, 64, 64, generator=generator).to(dtype)


def agree(outs, references, limit=1e-5):
    for a, b in zip(outs, references, strict=True):
        assert relative(a, b) < limit


@pytest.mark.slow
@pytest.mark.parametrize(
    'with_cp, arch', [(False, ARCH), (True, ARCH), (False, CLIP)], ids=['', 'with_cp', 'clip']
)
@pytest.mark.parametrize('form', FORMS)
def test_compiles_to_one_graph(form, with_cp, arch):
    if with_cp and form != 'training':
        pytest.skip('nothing is recomputed without gradients')
    torch._dynamo.reset()
    model, twin = (network(form, arch, with_cp=with_cp, feature_norm=True) for _ in range(2))
    exact = form != 'deploy'  # whose fast path is for float32
    dtype, limit = (torch.float64, 1e-8) if exact else (torch.float32, 1e-5)
    model.to(dtype), twin.to(dtype)
    compiled = torch.compile(model, fullgraph=True, backend='aot_eager')
    x = images(dtype)
    with torch.set_grad_enabled(form == 'training'):
        for _ in range(2):
            outs, references = compiled(x), twin(x)
            agree(outs, references, limit)
            if form == 'training':
                for values in (outs, references):
                    sum(out.square().mean() for out in values).backward()
    for (name, a), b in zip(model.named_buffers(), twin.buffers(), strict=True):
        assert relative(a, b) < limit, name
    for (name, a), b in zip(model.named_parameters(), twin.parameters(), strict=True):
        if b.grad is not None and b.grad.abs().max() > 1e-12:
            assert relative(a.grad, b.grad) < limit, name


@pytest.mark.slow
@pytest.mark.parametrize('arch', [ARCH, CLIP], ids=['', 'clip'])
def test_compiles_with_inductor_and_frozen_weights(arch):
    model = network('deploy', arch)
    with torch.no_grad():
        expected = model(images())
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, options={'freezing': True})
        agree(compiled(images()), expected)


@pytest.mark.parametrize(
    'form, arch',
    [('eval', ARCH), ('deploy', ARCH), ('deploy', CLIP)],
    ids=['eval', 'deploy', 'clip'],
)
def test_vmap(form, arch):
    model = network(form, arch)
    x = images(batch=6).view(3, 2, 3, 64, 64)
    with torch.no_grad():
        expected = [torch.stack(outs) for outs in zip(*map(model, x), strict=True)]
        agree(torch.func.vmap(model)(x), expected)


@pytest.mark.parametrize('gradients', [False, True])
@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('way', ['jvp', 'dual numbers'])
def test_forward_mode(way, form, gradients):
    """Against differences. Under no_grad a fast path would give a derivative of 0 in silence."""
    if way == 'jvp' and form == 'training':
        pytest.skip('torch.func refuses BatchNorm that counts batches')
    model = network(form).double()
    x, direction = images(torch.float64), images(torch.float64, seed=1)
    step = 1e-6
    with torch.no_grad():
        ahead, behind = (copy.deepcopy(model)(x + s * step * direction)[3] for s in (1, -1))
    # float32 is what the deploy form's fast path takes
    dtype = torch.float32 if form == 'deploy' else torch.float64
    model, x, direction = model.to(dtype), x.to(dtype), direction.to(dtype)
    with torch.set_grad_enabled(gradients):
        if way == 'jvp':
            _, tangent = torch.func.jvp(lambda x: model(x)[3], (x,), (direction,))
        else:
            with forward_ad.dual_level():
                out = model(forward_ad.make_dual(x, direction))[3]
                tangent = forward_ad.unpack_dual(out).tangent
    assert relative(tangent, (ahead - behind) / (2 * step)) < 1e-4


@pytest.mark.parametrize('form', FORMS)
def test_functional_call(form):
    model = network(form)
    other = {k: 1.1 * v.detach() for k, v in model.named_parameters()}
    twin = copy.deepcopy(model)
    twin.load_state_dict({**twin.state_dict(), **other})
    with torch.no_grad():
        before = copy.deepcopy(model)(images())
        agree(torch.func.functional_call(copy.deepcopy(model), other, (images(),)), twin(images()))
        agree(model(images()), before)


def test_gradients_of_gradients():
    """Of the whole network; PyTorch's fused attention has none, its plain one does."""
    found = []
    for fused in (True, False):
        model = network('training').double()
        set_fused(model, fused)
        x = images(torch.float64).requires_grad_()
        with sdpa_kernel(SDPBackend.MATH):
            loss = sum(out.square().mean() for out in model(x))
            (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
            gradient.square().sum().backward()
        found.append([x.grad, *(p.grad for p in model.parameters())])
    for a, b in zip(*found, strict=True):
        if b is not None and b.abs().max() > 1e-9:
            assert relative(a, b) < 1e-7


@pytest.mark.parametrize('form', FORMS)
def test_fx(form):
    model = network(form, drop_path_rate=0.2)
    graph = torch.fx.symbolic_trace(model)
    called = {n.target for n in graph.graph.nodes if n.op == 'call_module'}
    convolutions = {n for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    assert convolutions <= called
    results = []
    for one in (graph, model):
        torch.manual_seed(0)
        with torch.no_grad():
            results.append(one(images()))
    agree(*results)


def leaves(model):
    kinds = nn.Conv2d | nn.Linear | nn.BatchNorm2d | nn.GELU
    return [m for m in model.modules() if isinstance(m, kinds)]


@pytest.mark.parametrize('kind', ['forward', 'forward_pre', 'full_backward', 'everywhere'])
@pytest.mark.parametrize('form', FORMS)
def test_hooks_see_every_layer(form, kind):
    model = network(form)
    gradients = form == 'training' or kind == 'full_backward'
    with torch.set_grad_enabled(gradients):
        expected = copy.deepcopy(model)(images())
    seen = []
    note = lambda module, *_: seen.append(module)  # noqa: E731
    if kind == 'everywhere':
        handles = [nn.modules.module.register_module_forward_hook(note)]
    else:
        handles = [getattr(m, f'register_{kind}_hook')(note) for m in leaves(model)]
    try:
        with torch.set_grad_enabled(gradients):
            outs = model(images())
            agree(outs, expected)
            if kind == 'full_backward':
                sum(out.sum() for out in outs).backward()
    finally:
        for handle in handles:
            handle.remove()
    seen = [m for m in seen if m in set(leaves(model))]
    assert sorted(map(id, seen)) == sorted(map(id, leaves(model))), 'not each of them once'


def test_a_hook_may_change_what_a_layer_gives():
    model = network('deploy')
    for module in model.modules():
        if isinstance(module, nn.GELU):
            module.register_forward_hook(lambda m, args, out: torch.zeros_like(out))
    with torch.no_grad():
        outs = model(images())
    with torch.enable_grad():
        agree(outs, model(images()))


@pytest.mark.filterwarnings('ignore:torch.ao.quantization is deprecated')
def test_dynamic_quantization():
    model = network('deploy')
    quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    kind = torch.ao.nn.quantized.dynamic.Linear
    layers = [m for m in quantized.modules() if isinstance(m, kind)]
    assert len(layers) == sum(isinstance(m, nn.Linear) for m in model.modules()) == 2
    with torch.no_grad():
        difference = relative(quantized(images())[3], model(images())[3])
    assert 0 < difference < 0.1


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('form', ['eval', 'deploy'])
@pytest.mark.parametrize('way', ['Int8WeightOnlyConfig', 'Int8DynamicActivationInt8WeightConfig'])
def test_torchao(way, form):
    """Its int8 weights are used, those of the linear layers, and nothing of ours beside them."""
    torchao = pytest.importorskip('torchao.quantization')
    model = network(form)
    quantized, rounded = copy.deepcopy(model), copy.deepcopy(model)
    torchao.quantize_(quantized, getattr(torchao, way)())
    pairs = [
        (a, b)
        for a, b in zip(quantized.modules(), rounded.modules(), strict=True)
        if type(b) is nn.Linear
    ]
    assert len(pairs) == 2
    for layer, twin in pairs:
        assert type(layer.weight) not in (nn.Parameter, DeployWeight)
        twin.weight = nn.Parameter(layer.weight.dequantize().detach())
    with torch.no_grad():
        outs, wanted, before = (each(images()) for each in (quantized, rounded, model))
    agree(outs[:3], before[:3])
    assert relative(outs[3], wanted[3]) < (1e-5 if 'WeightOnly' in way else 0.02)
    assert relative(outs[3], before[3]) > 1e-4


@pytest.mark.filterwarnings('ignore')
def test_torchao_trains_with_fake_quantization():
    torchao = pytest.importorskip('torchao.quantization')
    qat = pytest.importorskip('torchao.quantization.qat')
    config = qat.QATConfig(torchao.IntxWeightOnlyConfig(torch.int8), step='prepare')
    model, plain = (network('training') for _ in range(2))
    set_fused(plain, False)
    for each in (model, plain):
        torchao.quantize_(each, config)
        layers = [m for m in each.modules() if isinstance(m, nn.Linear)]
        assert [type(m).__name__ for m in layers] == ['FakeQuantizedLinear'] * 2
        sum(out.square().mean() for out in each(images())).backward()
    for (name, a), b in zip(model.named_parameters(), plain.parameters(), strict=True):
        if b.grad.abs().max() > 1e-6:  # others are zero but for rounding
            assert relative(a.grad, b.grad) < 1e-3, name


@pytest.mark.parametrize('form', FORMS)
def test_pruning(form):
    """Keeps its mask through training steps, and every form respects it."""
    model = network(form)
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    before = model(images())[3].detach()
    for layer in layers:
        prune.random_unstructured(layer, 'weight', 0.5)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        sum(out.mean() for out in model(images())).backward()
        optimizer.step()
    if form != 'training':
        with torch.no_grad():
            outs = model(images())
        agree(outs, model(images()))
        assert relative(outs[3], before) > 0.1
    for layer in layers:
        prune.remove(layer, 'weight')
        assert (layer.weight == 0).float().mean() > 0.45
    if form == 'deploy':
        with torch.no_grad():
            agree(model(images()), outs)


class LowRank(nn.Module):
    """A frozen layer and a small one beside it that learns."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.beside = nn.Conv2d(layer.in_channels, layer.out_channels, 1)

    def forward(self, x):
        return self.layer(x) + self.beside(x)


@pytest.mark.parametrize('form', FORMS)
def test_wrapped_layers(form):
    model = network(form)
    wrappers = []
    for module in model.modules():
        if isinstance(module, ConvFFN | DeployFFN):
            module.fc1 = LowRank(module.fc1)
            wrappers.append(module.fc1)
    outs = model(images())
    sum(out.square().mean() for out in outs).backward()
    assert len(wrappers) == 4
    for wrapper in wrappers:
        assert wrapper.beside.weight.grad.any()
        assert wrapper.layer.weight.grad is None
    if form != 'training':
        with torch.no_grad():
            agree(model(images()), outs)


def test_parametrized_layers():
    model = network('deploy')

    class Half(nn.Module):
        def forward(self, weight):
            return 0.5 * weight

    for layer in [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]:
        nn.utils.parametrize.register_parametrization(layer, 'weight', Half())
    with torch.no_grad():
        outs = model(images())
    agree(outs, model(images()))


class Watch(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


class WatchFunctions(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen.append(getattr(func, '__name__', str(func)))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize('mode', [Watch, WatchFunctions])
@pytest.mark.parametrize('form', ['training', 'deploy'])
def test_modes_see_pytorchs_own_operators(form, mode):
    """Such modes count operators, replace them, or turn them into another device's."""
    model = network(form)
    layers = sum(isinstance(m, nn.Conv2d | nn.Linear) for m in model.modules())
    with torch.set_grad_enabled(form == 'training'), mode() as watch:
        model(images())
    assert not any('mkldnn' in name for name in watch.seen)
    kinds = ('aten.convolution', 'aten.addmm', 'aten.mm', 'conv2d', 'linear')
    assert sum(name.startswith(kinds) for name in watch.seen) == layers


def test_active_drop_path_in_the_deploy_form():
    """Stochastic depth at test time: only the drop paths are in training mode."""
    model = network('deploy', drop_path_rate=0.5)
    for module in model.modules():
        if isinstance(module, DropPath):
            module.train()
    x = images()
    with torch.no_grad():
        outs = [model(x)[3] for _ in range(8)]
    assert any(not torch.equal(outs[0], out) for out in outs[1:])


def test_a_replaced_drop_path_in_the_deploy_form():
    class Nothing(nn.Module):
        def forward(self, x):
            return 0 * x

    model = network('deploy', drop_path_rate=0.5)
    for module in model.modules():
        if hasattr(module, 'drop_path'):
            module.drop_path = Nothing()
    with torch.no_grad():
        outs = model(images())
    agree(outs, model(images()))


CHANGES = {
    'no activation': lambda block: setattr(block.mlp, 'act', nn.Identity()),
    'circular padding': lambda block: setattr(block.mlp.conv.conv, 'padding_mode', 'circular'),
    'dilation': lambda block: (
        setattr(block.mlp.conv.conv, 'dilation', (2, 2)),
        setattr(block.mlp.conv.conv, 'padding', (6, 6)),
    ),
    'an activation more': lambda block: setattr(block.token_mixer.mixer, 'act', nn.GELU()),
    'no norm': lambda block: setattr(block.mlp.conv, 'bn', nn.Identity()),
}


@pytest.mark.parametrize('change', CHANGES)
def test_changed_layers_in_training(change):
    model = network('training').double()
    for module in model.modules():
        if isinstance(module, LayerScale):
            nn.init.ones_(module.gamma)
    CHANGES[change](model.stages[0].blocks[0])
    plain = copy.deepcopy(model)
    set_fused(plain, False)
    # PyTorch pads circularly by a list that is made with the layer
    for one in (model, plain):
        conv = one.stages[0].blocks[0].mlp.conv.conv
        if isinstance(conv, nn.Conv2d):
            conv._reversed_padding_repeated_twice = [p for p in conv.padding for _ in (0, 1)]
    agree(model(images(torch.float64)), plain(images(torch.float64)), 1e-10)
