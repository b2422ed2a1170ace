"""MobileCLIP's image encoders and FastVLM's FastViTHD: against timm's, which are not ours."""

import pytest
import timm
import torch
import torch.nn as nn
from randomize import randomize, relative
from torch.utils.flop_counter import FlopCounterMode

import fastvit_mm
from fastvit_mm import ARCHS, FastViT, FastViTError, FastViTNeck
from fastvit_mm.models.archs import parse_arch

# name in timm, width of the embeddings, published parameters of the image tower in millions
FAMILY = {
    'mci0': ('mci0', 512, 11.4),
    'mci1': ('mci1', 512, 21.5),
    'mci2': ('mci2', 512, 35.7),
    'mci3': ('mci3', 768, 125.1),
    'mci4': ('mci4', 768, 321.6),
    'hd': ('mci3', 768, 125.1),  # timm has no FastViTHD, whose structure is MCi3's
}


class Encoder(nn.Module):
    """Backbone, last block and projection: stage outputs and embeddings."""

    def __init__(self, arch, embedding, **args):
        super().__init__()
        settings = parse_arch(arch)
        self.backbone = FastViT(arch, out_indices=tuple(range(len(settings['depths']))), **args)
        width = settings['widths'][-1]
        self.neck = FastViTNeck(width, deploy=args.get('deploy', False))
        self.head = nn.ModuleDict(dict(fc=nn.Linear(2 * width, embedding)))

    def forward(self, x):
        features = self.backbone(x)
        return features, self.head['fc'](self.neck(features)[0])


def shallow(name):
    """The settings of a network, with one block per stage: float64 is slow on a CPU."""
    settings = parse_arch(name)
    return {**settings, 'depths': (1,) * len(settings['depths'])}


def ours_and_timms(name, dtype=torch.float64):
    """Our encoder and timm's, shallow, with the same random weights and statistics."""
    theirs_name, embedding, _ = FAMILY[name]
    arch = shallow(name)
    ours = randomize(Encoder(arch, embedding), seed=3).to(dtype)
    theirs = timm.create_model(
        f'fastvit_{theirs_name}', num_classes=embedding, layers=arch['depths']
    ).to(dtype)
    state = {timms(k): v for k, v in ours.state_dict().items()}
    theirs.load_state_dict(state, strict=True)
    return ours, theirs


def timms(key):
    return key.replace('backbone.', '').replace('neck.', '')


def images(dtype=torch.float64, batch=2, size=(64, 96), seed=0):
    return torch.rand(batch, 3, *size, generator=torch.Generator().manual_seed(seed)).to(dtype)


NAMES = [pytest.param(n, marks=pytest.mark.slow) if n in ('mci3', 'mci4') else n for n in FAMILY]


@pytest.mark.parametrize('name', FAMILY)
def test_names_shapes_and_sizes(name):
    """At full depth, without memory for the weights."""
    theirs_name, embedding, millions = FAMILY[name]
    with torch.device('meta'):
        ours = Encoder(name, embedding)
        theirs = timm.create_model(f'fastvit_{theirs_name}', num_classes=embedding)
    shapes = {timms(k): v.shape for k, v in ours.state_dict().items()}
    assert shapes == {k: v.shape for k, v in theirs.state_dict().items()}
    # What is published counts the deploy form's for some and the training form's for others.
    counts = [sum(p.numel() for p in ours.parameters())]
    assert counts[0] / 1e6 == pytest.approx(millions, rel=0.02)
    macs = []
    for model in (ours.eval(), theirs.eval()):
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(1, 3, 256, 256, device='meta'))
        macs.append(counter.get_total_flops())
    assert macs[0] == macs[1] > 0


@pytest.mark.parametrize('name', NAMES)
def test_outputs_equal_timms(name):
    ours, theirs = (m.eval() for m in ours_and_timms(name))
    x = images()
    with torch.no_grad():
        last, features = theirs.forward_intermediates(x)
        embeddings = theirs.forward_head(last)
        outs, own = ours(x)
    assert len(outs) == len(features) == len(parse_arch(name)['depths'])
    for i, (out, feature) in enumerate(zip(outs, features, strict=True)):
        assert out.shape[2:] == tuple(-(-s // (4 * 2**i)) for s in (64, 96))
        assert relative(out, feature) < 1e-10
    assert relative(own, embeddings) < 1e-10


@pytest.mark.slow
@pytest.mark.parametrize('name', ['mci0', 'mci2', 'hd'])
def test_gradients_and_statistics_equal_timms(name):
    ours, theirs = (m.train() for m in ours_and_timms(name))
    x = images(size=(128, 96))
    ours(x)[1].square().mean().backward()
    theirs(x).square().mean().backward()
    references = dict(theirs.named_parameters())
    for key, parameter in ours.named_parameters():
        reference = references[timms(key)].grad
        assert parameter.grad is not None, f'{key} gets no gradient'
        if reference.abs().max() < 1e-12:  # biases before a BatchNorm: zero but for rounding
            assert parameter.grad.abs().max() < 1e-10, key
        else:
            assert relative(parameter.grad, reference) < 1e-8, key
    buffers = dict(theirs.named_buffers())
    for key, buffer in ours.named_buffers():
        assert relative(buffer, buffers[timms(key)]) < 1e-10, key


@pytest.mark.parametrize('name', NAMES)
def test_deploy_form_equals_training_form(name):
    for dtype, limit in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        model = randomize(Encoder(shallow(name), 8), seed=5).to(dtype).eval()
        x = images(dtype, batch=1)
        with torch.no_grad():
            merged = fastvit_mm.reparameterize(model)
            (features, embeddings), (outs, own) = model(x), merged(x)
        assert relative(own, embeddings) < limit
        for out, feature in zip(outs, features, strict=True):
            assert relative(out, feature) < limit
        left = [n for n, m in merged.named_modules() if isinstance(m, nn.BatchNorm2d)]
        assert not left and not any('gamma' in k or 'norm' in k for k in merged.state_dict())


@pytest.mark.parametrize('name', ['mci0', 'hd'])
def test_a_model_that_is_built_merged(name):
    model = randomize(FastViT(shallow(name), feature_norm=True)).eval()
    built = FastViT(shallow(name), feature_norm=True, deploy=True).eval()
    x = images(torch.float32)
    with torch.no_grad():
        before = model(x)
        model.switch_to_deploy()
        model.switch_to_deploy()
        built.load_state_dict(model.state_dict(), strict=True)
        for a, b, c in zip(before, model(x), built(x), strict=True):
            assert relative(b, a) < 1e-5
            assert torch.equal(b, c)


def test_the_activation_counts():
    """It has no parameter: only the numbers show it."""
    arch = shallow('mci1')
    with_it = randomize(FastViT(arch)).eval()
    without = FastViT({**arch, 'downsample_act': False}).eval()
    without.load_state_dict(with_it.state_dict(), strict=True)
    x = images(torch.float32)
    with torch.no_grad():
        assert relative(without(x)[1], with_it(x)[1]) > 0.01
    for name in ('t8', 'sa12'):
        act = [type(s.downsample.proj[0].act) for s in FastViT(name).stages[1:]]
        assert act == [nn.Identity] * 3


@pytest.mark.parametrize(
    'args, words',
    [
        (dict(arch='mci0', out_indices=(4,)), ['out_indices', '0, 1, 2, 3']),
        (dict(arch='mci3', out_indices=(5,)), ['out_indices', '0, 1, 2, 3, 4']),
        (dict(arch='hd', frozen_stages=6), ['frozen_stages', '-1 to 5']),
        (dict(arch=dict(depths=(1,) * 5, widths=(8,) * 4)), ['widths', 'five']),
        (dict(arch={**ARCHS['mci0'], 'attention_norm': 'GN'}), ['attention_norm', 'BN or LN']),
        (dict(arch={**ARCHS['mci0'], 'downsample_se': (0, 1)}), ['downsample_se', 'four']),
    ],
)
def test_wrong_arguments(args, words):
    with pytest.raises(FastViTError) as error:
        FastViT(**args)
    assert all(word in str(error.value) for word in words), error.value
