"""The backbone against timm's FastViT, an implementation that is not ours."""

import pytest
import timm
import torch
import torch.nn as nn
from mmengine.registry import MODELS
from randomize import randomize, relative

import fastvit_mm
from fastvit_mm import FastViT, FastViTError, FastViTNeck
from fastvit_mm.models.archs import parse_arch

# design facts: parameters of the training form with 1000 classes
PARAMETERS = dict(
    t8=4_026_232,
    t12=7_553_704,
    s12=9_473_576,
    sa12=11_580_968,
    sa24=21_554_216,
    sa36=31_527_464,
    ma36=44_068_004,
)
# float64 convolutions are slow on the CPU, and these are deep; of MobileCLIP's, one of each kind
# (tests/test_family.py has the others).
VARIANTS = [
    pytest.param(a, marks=pytest.mark.slow) if a in ('sa24', 'sa36', 'ma36', 'mci0') else a
    for a in (*PARAMETERS, 'mci0')
]
SIZES = [(64, 64), (32, 96), (75, 61)]


class Classifier(nn.Module):
    """Backbone, neck and linear head, as mmpretrain's ImageClassifier chains them."""

    def __init__(self, arch, **args):
        super().__init__()
        stages = len(parse_arch(arch)['depths'])
        self.backbone = FastViT(arch, out_indices=tuple(range(stages)), **args)
        width = self.backbone.settings['widths'][-1]
        self.neck = FastViTNeck(width, deploy=args.get('deploy', False))
        self.head = nn.ModuleDict(dict(fc=nn.Linear(2 * width, 1000)))

    def forward(self, x):
        """Stage outputs and logits: float64 on the CPU is slow, one pass has to do."""
        features = self.backbone(x)
        return features, self.head['fc'](self.neck(features)[0])


def ours_and_timms(arch, dtype):
    """Our classifier and timm's with the same random weights and statistics."""
    ours = randomize(Classifier(arch), seed=3).to(dtype)
    theirs = timm.create_model(f'fastvit_{arch}', num_classes=1000).to(dtype)
    theirs.load_state_dict(
        {k.replace('backbone.', '').replace('neck.', ''): v for k, v in ours.state_dict().items()},
        strict=True,
    )
    return ours, theirs


def images(size, dtype, batch=2, seed=0):
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize('arch', PARAMETERS)
def test_parameter_counts(arch):
    model = Classifier(arch)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[arch]


@pytest.mark.parametrize('arch', VARIANTS)
def test_outputs_equal_timms(arch):
    for dtype, limit in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        ours, theirs = ours_and_timms(arch, dtype)
        ours.eval(), theirs.eval()
        for size in SIZES[:2] if dtype == torch.float64 else SIZES:
            x = images(size, dtype)
            with torch.no_grad():
                last, features = theirs.forward_intermediates(x)
                logits = theirs.forward_head(last)
                outs, own_logits = ours(x)
            assert len(features) == len(outs) == len(ours.backbone.stages)
            for i, (out, feature) in enumerate(zip(outs, features, strict=True)):
                stride = 4 * 2**i
                assert out.shape[2:] == tuple(-(-s // stride) for s in size)
                assert relative(out, feature) < limit
            assert relative(own_logits, logits) < limit


@pytest.mark.parametrize('arch', VARIANTS)
def test_gradients_and_statistics_equal_timms(arch):
    ours, theirs = ours_and_timms(arch, torch.float64)
    optimizers = [torch.optim.SGD(m.parameters(), lr=1e-3) for m in (ours, theirs)]
    for step in range(2):
        x = images((64, 64), torch.float64, seed=step)
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            out = model.train()(x)
            logits = out[1] if model is ours else out
            logits.square().mean().backward()
        gradients = {n: p.grad for n, p in theirs.named_parameters()}
        for name, parameter in ours.named_parameters():
            reference = gradients[name.replace('backbone.', '').replace('neck.', '')]
            assert parameter.grad is not None, f'{name} gets no gradient'
            scale = reference.abs().max()
            if scale < 1e-12:  # biases before a BatchNorm in training: zero but for rounding
                assert parameter.grad.abs().max() < 1e-10, name
            else:
                assert relative(parameter.grad, reference) < 1e-8, name
        for optimizer in optimizers:
            optimizer.step()
    buffers = dict(theirs.named_buffers())
    for name, buffer in ours.named_buffers():
        reference = buffers[name.replace('backbone.', '').replace('neck.', '')]
        assert relative(buffer, reference) < 1e-8, name


@pytest.mark.parametrize('arch', VARIANTS)
def test_deploy_form_equals_training_form(arch):
    for dtype, limit in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        model = randomize(Classifier(arch), seed=5).to(dtype).eval()
        with torch.no_grad():
            merged = fastvit_mm.reparameterize(model)
            for size in SIZES:
                x = images(size, dtype, batch=1)
                (features, logits), (own, own_logits) = model(x), merged(x)
                assert relative(own_logits, logits) < limit
                for out, feature in zip(own, features, strict=True):
                    assert relative(out, feature) < limit


@pytest.mark.parametrize('arch', ['t8', 'sa12'])
def test_switch_to_deploy_in_place(arch):
    model = randomize(FastViT(arch, feature_norm=True)).eval()
    x = images((64, 96), torch.float32)
    with torch.no_grad():
        before = model(x)
        model.switch_to_deploy()
        once = {k: v.clone() for k, v in model.state_dict().items()}
        model.switch_to_deploy()  # idempotent
    again = model.state_dict()
    assert all(torch.equal(once[k], again[k]) for k in once | again)

    norms = [n for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms == ['norm0', 'norm1', 'norm2', 'norm3'], 'only the output norms may stay'
    assert not any('scale' in n or 'gamma' in n for n in again)

    # Both routes agree: the merged weights load into a model that is built merged.
    built = FastViT(arch, feature_norm=True, deploy=True).eval()
    built.load_state_dict(again, strict=True)
    with torch.no_grad():
        for a, b, c in zip(before, model(x), built(x), strict=True):
            assert relative(b, a) < 1e-5
            assert torch.equal(b, c)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_deploys_in_half_precision(dtype):
    model = randomize(FastViT('sa12')).to(dtype).eval()
    exact = fastvit_mm.reparameterize(model.double())
    model = randomize(FastViT('sa12')).to(dtype).eval()
    model.switch_to_deploy()
    for name, value in model.state_dict().items():
        assert value.dtype == dtype
        assert relative(value, exact.state_dict()[name]) < 2 * torch.finfo(dtype).eps, name


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_deploys_on_the_gpu():
    model = randomize(FastViT('sa12')).cuda().double().eval()
    x = images((64, 96), torch.float64).cuda()
    with torch.no_grad():
        before = model(x)
        model.switch_to_deploy()
        assert all(p.is_cuda for p in model.parameters())
        assert all(relative(a, b) < 1e-10 for a, b in zip(model(x), before, strict=True))


def test_fourth_output_is_the_attention_stage():
    """The authors' dense-prediction code taps the positional encoding here."""
    model = randomize(FastViT('sa12')).eval()
    seen = {}
    stage = model.stages[3]
    stage.pos_emb.register_forward_hook(lambda m, i, o: seen.update(encoding=o))
    stage.blocks[-1].register_forward_hook(lambda m, i, o: seen.update(last=o))
    with torch.no_grad():
        out = model(images((64, 64), torch.float32))[3]
    assert torch.equal(out, seen['last'])
    assert relative(out, seen['encoding']) > 0.01


def test_resolves_in_every_scope():
    for scope in ('mmpretrain', 'mmdet', 'mmseg', None):
        name = f'{scope}.FastViT' if scope else 'FastViT'
        registry = MODELS
        if scope:
            registry = __import__(f'{scope}.registry', fromlist=['MODELS']).MODELS
        assert registry.get('FastViT') is FastViT, name
        assert isinstance(registry.build(dict(type='FastViT', arch='t8')), FastViT)


def test_arch_as_data():
    tiny = dict(depths=(1, 1, 2, 1), widths=(32, 32, 64, 128), attention=(0, 0, 1, 1), ffn_ratio=2)
    model = randomize(FastViT(tiny, in_channels=4)).double().eval()
    x = torch.randn(1, 4, 45, 33).double()
    outs = model(x)
    assert [o.shape[1] for o in outs] == [32, 32, 64, 128]
    merged = fastvit_mm.reparameterize(model)
    assert all(relative(a, b) < 1e-10 for a, b in zip(merged(x), outs, strict=True))


def test_out_indices_build_only_what_is_needed():
    model = FastViT('t8', out_indices=(0, 2), feature_norm=True)
    assert len(model.stages) == 3
    outs = model(torch.randn(1, 3, 64, 64))
    assert [tuple(o.shape) for o in outs] == [(1, 48, 16, 16), (1, 192, 4, 4)]
    sum(o.mean() for o in outs).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_frozen_stages_and_norm_eval():
    model = FastViT('t8', frozen_stages=2, norm_eval=True).train()
    assert not any(p.requires_grad for p in model.stem.parameters())
    assert not any(p.requires_grad for s in model.stages[:2] for p in s.parameters())
    assert all(p.requires_grad for s in model.stages[2:] for p in s.parameters())
    assert not any(m.training for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    assert model.stages[2].training
    # Nothing is frozen unasked.
    free = FastViT('t8').train()
    assert all(p.requires_grad for p in free.parameters())
    assert all(m.training for m in free.modules())


def test_checkpointing_changes_nothing_but_memory():
    """Recomputing must not count a batch's statistics twice."""
    plain, saving = (
        randomize(FastViT('sa12', with_cp=cp, drop_path_rate=0.3)).double().train()
        for cp in (False, True)
    )
    x = images((64, 64), torch.float64)
    for model in (plain, saving):
        torch.manual_seed(0)
        sum(o.square().mean() for o in model(x)).backward()
    for (name, a), b in zip(saving.named_parameters(), plain.parameters(), strict=True):
        assert relative(a.grad, b.grad) < 1e-10, name
    for (name, a), b in zip(saving.named_buffers(), plain.buffers(), strict=True):
        assert torch.equal(a, b), name


def test_drop_path_grows_linearly():
    model = FastViT('sa12', drop_path_rate=0.11)
    rates = [getattr(b.drop_path, 'drop_prob', 0.0) for s in model.stages for b in s.blocks]
    assert rates == pytest.approx([0.01 * i for i in range(12)])


def test_initial_weights():
    torch.manual_seed(0)
    model = FastViT('sa36')
    mlp = model.stages[2].blocks[0].mlp
    for weight in (
        mlp.fc1.weight,
        mlp.fc2.weight,
        model.stages[3].blocks[0].token_mixer.qkv.weight,
    ):
        assert weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert mlp.conv.conv.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.stages[0].blocks[0].layer_scale.gamma.unique().item() == pytest.approx(1e-6)


@pytest.mark.parametrize(
    'args, words',
    [
        (dict(arch='sa48'), ['sa48', 't8, t12, s12, sa12, sa24, sa36, ma36']),
        (dict(arch=dict(depths=(1, 1, 1, 1))), ['widths']),
        (dict(arch=dict(depths=(1, 1, 1), widths=(8, 8, 8, 8))), ['depths', 'four']),
        (dict(arch=dict(depths=(1,) * 4, widths=(8,) * 4, attention=(0, 0, 0, 1))), ['32']),
        (dict(arch=dict(depths=(1,) * 4, widths=(8, 12, 24, 48))), ['12', 'multiple', '8']),
        (dict(out_indices=(0, 4)), ['out_indices', '(0, 4)']),
        (dict(out_indices=()), ['out_indices']),
        (dict(frozen_stages=5), ['frozen_stages', '5']),
        (dict(norm_cfg=dict(type='GN', num_groups=2)), ['GN', 'BN']),
        (dict(norm_cfg=None), ['norm_cfg', 'BN']),
        (dict(norm_cfg=dict(eps=1e-3)), ['norm_cfg', 'BN']),
        (dict(act_cfg=None), ['act_cfg', 'GELU']),
        (dict(arch=12), ['12', 'name', 'dict']),
        (dict(arch=None), ['None', 'name', 'dict']),
        (dict(arch=dict(depths=2, widths=(8,) * 4)), ['depths', 'four', '2']),
        (dict(arch=dict(depths=(1.5,) * 4, widths=(8,) * 4)), ['depths', 'whole', '1.5']),
        (dict(arch=dict(depths=(1,) * 4, widths=(0,) * 4)), ['widths', 'from 1']),
        (dict(arch=dict(depths=(1,) * 4, widths=(8,) * 4, ffn_ratio=0)), ['ffn_ratio', '0']),
        (dict(arch=dict(depths=(1,) * 4, widths=(8,) * 4, layer_scale='a')), ['layer_scale', 'a']),
        (dict(drop_path_rate=1.0), ['drop_path_rate', '1.0', '[0, 1)']),
        (dict(drop_path_rate=-0.1), ['drop_path_rate', '-0.1']),
        (dict(drop_path_rate='0.1'), ['drop_path_rate', '0.1']),
        (dict(in_channels=0), ['in_channels', '0']),
        (dict(in_channels='rgb'), ['in_channels', 'rgb']),
        (dict(out_indices=(2, 1)), ['out_indices', '(2, 1)', 'order']),
        (dict(out_indices=(1, 1)), ['out_indices', '(1, 1)', 'once']),
        (dict(out_indices=(True, 2)), ['out_indices', 'True']),
        (dict(out_indices=1.5), ['out_indices', '1.5']),
        (dict(frozen_stages=1.5), ['frozen_stages', '1.5']),
    ],
)
def test_wrong_arguments(args, words):
    with pytest.raises(FastViTError) as error:
        FastViT(**args)
    assert '\n' not in str(error.value)
    assert all(w in str(error.value) for w in words), error.value
    # and through the registry, as configs are built
    with pytest.raises(FastViTError):
        MODELS.build(dict(type='FastViT', **args))


def test_smallest_input():
    model = FastViT('t8').eval()
    assert model(torch.randn(1, 3, 32, 32))[-1].shape[2:] == (1, 1)
    with pytest.raises(FastViTError, match='31 x 64 pixels is too small'):
        model(torch.randn(1, 3, 31, 64))
