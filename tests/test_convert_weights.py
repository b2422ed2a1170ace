"""Conversion among the three layouts, against the projects' own names and timm's outputs."""

import json
import re

import pytest
import timm
import torch
from randomize import randomize, relative
from test_tools import load_tool, refusal
from test_weights import KEYS, authors_file, classifier, logits, segmentor, timms

from fastvit_mm import ARCHS, FastViT, launch, weights
from fastvit_mm.models.archs import title


@pytest.fixture
def convert(capfd):
    """The tool in this process; gives exit code and stderr, and stdout as ``convert.out``."""

    def call(*args):
        capfd.readouterr()
        code = 0
        try:
            launch.run(lambda _: load_tool('convert_weights').main([str(a) for a in args]))
        except SystemExit as end:
            code = end.code
        call.out, err = capfd.readouterr()
        return code, err.strip()

    return call


def done(result):
    code, err = result
    assert code == 0, err


def tensors(path):
    return weights.state_dict_of(weights.read(path), path)


def same(a, b):
    assert set(a) == set(b)
    for key in a:
        assert a[key].dtype == b[key].dtype and torch.equal(a[key], b[key]), key


@pytest.fixture(scope='module', params=['t8', 'sa12'])
def original(request, tmp_path_factory):
    """(arch, timm's model with random weights and statistics, its file)."""
    arch = request.param
    model = randomize(timm.create_model(f'fastvit_{arch}')).eval()
    file = tmp_path_factory.mktemp(arch) / 'timm.pth'
    torch.save(model.state_dict(), file)
    return arch, model, file


def names(arch, form):
    shapes = json.loads((KEYS / f'apple_fastvit_{arch}_keys.json').read_text())[form]
    return {k: torch.Size(s) for k, s in shapes.items()}


def test_round_trips_are_bitwise(original, convert, tmp_path):
    arch, model, file = original
    steps = [file]
    for to in ('apple', 'mm', 'timm', 'mm', 'apple', 'timm'):
        steps.append(tmp_path / f'{len(steps)}_{to}.pth')
        done(convert(steps[-2], steps[-1], '--to', to))
        assert str(steps[-1]) in convert.out
        assert 'left out' not in convert.out
    read = [tensors(s) for s in steps]
    for again in (3, 6):
        same(read[again], read[0])
    same(read[1], read[5])
    same(read[2], read[4])
    # the authors' names and shapes, under their key; OpenMMLab's as a classifier has them
    assert {k: v.shape for k, v in read[1].items()} == names(arch, 'unfused')
    assert set(weights.read(steps[1])) == {'state_dict'}
    assert set(read[2]) == set(classifier(arch).state_dict())

    expected = logits(model)
    for path in steps:
        ours = classifier(arch)
        weights.load(ours, path, whole=True)
        assert relative(logits(ours), expected) < 1e-5
    # as timm itself reads the authors' names
    assert torch.equal(logits(timms(arch, read[1])), expected)


def test_deploy_forms(original, convert, tmp_path):
    arch, model, file = original
    expected = logits(model)

    done(convert(file, t := tmp_path / 't.pth', '--to', 'timm', '--deploy'))
    deployed = timm.create_model(f'fastvit_{arch}', inference_mode=True).eval()
    deployed.load_state_dict(torch.load(t, weights_only=True), strict=True)
    assert relative(logits(deployed), expected) < 1e-5

    done(convert(file, a := tmp_path / 'a.pth.tar', '--to', 'apple', '--deploy'))
    assert {k: v.shape for k, v in tensors(a).items()} == names(arch, 'reparam')
    assert relative(logits(timms(arch, tensors(a), 'reparam')), expected) < 1e-5

    done(convert(file, m := tmp_path / 'm.pth', '--deploy'))
    ours = classifier(arch, deploy=True)
    ours.load_state_dict(tensors(m), strict=True)
    assert relative(logits(ours), expected) < 1e-5

    # among the deploy forms: the two published ones are the same numbers; ours is a step further
    for source, target in (('a', 'timm'), ('t', 'apple')):
        done(
            convert(
                dict(a=a, t=t)[source],
                b := tmp_path / 'b.pth',
                '--to',
                target,
                '--deploy',
                '--force',
            )
        )
        same(tensors(b), tensors(dict(apple=a, timm=t)[target]))
    for source in (a, t, m):
        done(convert(source, b, '--to', 'mm', '--deploy', '--force'))
        ours.load_state_dict(tensors(b), strict=True)
        assert relative(logits(ours), expected) < 1e-5
    same(tensors(b), tensors(m))

    # nothing leads back
    for source in (a, t, m):
        for to in ('timm', 'apple', 'mm'):
            result = convert(source, tmp_path / 'no.pth', '--to', to)
            refusal(result, 'deploy form', 'training form', '--deploy')
    for to in ('timm', 'apple'):
        result = convert(m, tmp_path / 'no.pth', '--to', to, '--deploy')
        refusal(result, 'merged completely', to, 'training form')
    assert not (tmp_path / 'no.pth').exists()


def test_the_authors_deploy_file(convert, tmp_path):
    """As published, with pickled records beside the weights."""
    state = authors_file('sa12', 'reparam', file := tmp_path / 'a.pth.tar')
    done(convert(file, t := tmp_path / 't.safetensors', '--to', 'timm', '--deploy'))
    deployed = timm.create_model('fastvit_sa12', inference_mode=True).eval()
    deployed.load_state_dict(tensors(t), strict=True)
    assert torch.equal(logits(deployed), logits(timms('sa12', state, 'reparam')))
    done(convert(t, again := tmp_path / 'again.pth', '--to', 'apple', '--deploy'))
    same(tensors(again), state)


def test_safetensors(original, convert, tmp_path):
    pytest.importorskip('safetensors')
    _, model, file = original
    done(convert(file, s := tmp_path / 'new' / 'folder' / 'm.safetensors', '--to', 'apple'))
    done(convert(s, t := tmp_path / 't.pth', '--to', 'timm'))
    same(tensors(t), model.state_dict())
    assert [p.name for p in s.parent.iterdir()] == ['m.safetensors']


def test_names_of_all_variants():
    """Every variant goes to the authors' names and back, and is recognized from its weights."""
    for name in ARCHS:
        with torch.device('meta'):
            every = tuple(range(len(ARCHS[name]['depths'])))
            state = FastViT(name, out_indices=every).state_dict()
        theirs = weights.timm_to_authors(state)
        assert not set(theirs) & set(state)
        assert weights.recognize(theirs) == 'apple'
        assert list(weights.authors_to_timm(theirs)) == list(state)
        known = title(name) if name not in ('mci3', 'hd') else 'MCi3 or FastViTHD'  # one network
        assert known in weights.describe(state)


def test_any_arch(convert, tmp_path):
    """What no table has: other depths and widths, attention in two stages, four input channels."""
    arch = dict(depths=(1, 2, 1, 2), widths=(16, 32, 64, 64), ffn_ratio=2.5, attention=(0, 0, 1, 1))
    backbone = randomize(FastViT(arch, in_channels=4)).eval()
    torch.save(backbone.state_dict(), file := tmp_path / 'odd.pth')
    settings = weights.arch_of(backbone.state_dict())
    unseen = ('layer_scale', 'downsample_act')
    assert settings == {k: v for k, v in backbone.settings.items() if k not in unseen}
    done(convert(file, a := tmp_path / 'a.pth', '--to', 'apple'))
    done(convert(a, m := tmp_path / 'm.pth', '--deploy'))
    merged = FastViT(arch, in_channels=4, deploy=True).eval()
    weights.load(merged, m)
    images = torch.randn(1, 4, 64, 64)
    with torch.no_grad():
        for out, expected in zip(merged(images), backbone(images), strict=True):
            assert relative(out, expected) < 1e-5


def test_whole_models_of_other_tasks(convert, tmp_path):
    source = randomize(segmentor())
    meta = dict(dataset_meta=dict(classes=['a', 'b']), config='1/0', cfg='1/0')
    torch.save(dict(state_dict=source.state_dict(), meta=meta), file := tmp_path / 'seg.pth')
    done(convert(file, m := tmp_path / 'm.pth', '--deploy'))
    deployed = segmentor(deploy=True)
    deployed.load_state_dict(tensors(m), strict=True)
    assert relative(logits(deployed), logits(source)) < 1e-5
    assert weights.read(m)['meta'] == dict(dataset_meta=meta['dataset_meta'])

    done(convert(file, t := tmp_path / 't.pth', '--to', 'timm'))
    assert re.search(
        r'left out, unknown to timm: backbone\.norm0\.bias, .* and \d+ more', convert.out
    )
    reference = timm.create_model('fastvit_t8')
    missing, unexpected = reference.load_state_dict(tensors(t), strict=False)
    assert not unexpected and all(k.startswith(('final_conv.', 'head.')) for k in missing)
    assert torch.equal(
        reference.stages[3].blocks[1].mlp.fc2.weight,
        source.backbone.stages[3].blocks[1].mlp.fc2.weight,
    )


def test_half_precision(convert, tmp_path):
    model = randomize(timm.create_model('fastvit_t8')).half()
    torch.save(model.state_dict(), file := tmp_path / 'half.pth')
    done(convert(file, t := tmp_path / 't.pth', '--to', 'timm', '--deploy'))
    state = tensors(t)
    assert {v.dtype for v in state.values()} == {torch.float16, torch.int64}
    deployed = timm.create_model('fastvit_t8', inference_mode=True).eval()
    deployed.load_state_dict(state, strict=True)
    assert relative(logits(deployed), logits(model.float().eval())) < 5e-2


def test_refusals_write_nothing(original, convert, tmp_path, monkeypatch):
    arch, model, file = original
    target = tmp_path / 'new' / 'x.pth'
    refusal(convert(tmp_path / 'no.pth', target), 'no.pth', 'does not exist')
    refusal(convert(file, tmp_path / 'x.onnx'), '.pth', '.safetensors')
    refusal(convert(file, tmp_path / 'x'), '.pth', '.safetensors')

    torch.save(timm.create_model('resnet10t').state_dict(), other := tmp_path / 'other.pth')
    refusal(convert(other, target), 'not a FastViT')
    torch.save(dict(epoch=3), other)
    refusal(convert(other, target), 'contains no weights')
    state = model.state_dict()
    gone = [k for k in state if k.startswith('stages.1.blocks.0.mlp.')][:4]
    for deploy in ([], ['--deploy']):
        torch.save({k: v for k, v in state.items() if k not in gone}, other)
        result = convert(other, target, '--to', 'apple', *deploy)
        refusal(result, f'FastViT-{arch.upper()}', 'missing', sorted(gone)[0], '1 more')
        torch.save({**state, 'stages.0.extra': torch.ones(1)}, other)
        refusal(convert(other, target, *deploy), 'unknown', 'stages.0.extra')
    torch.save({k: v for k, v in state.items() if not k.startswith('stages.3.')}, other)
    refusal(convert(other, target), 'whole')
    assert not target.parent.exists()

    # an existing file stays as it is, without --force
    (there := tmp_path / 'there.pth').write_text('precious')
    refusal(convert(file, there), 'there.pth', 'exists', '--force')
    assert there.read_text() == 'precious'
    # and with it, where writing fails halfway
    save = torch.save

    def full(content, path):
        save(content, path)
        raise OSError('no space left on device')

    monkeypatch.setattr(torch, 'save', full)
    refusal(convert(file, there, '--force'), 'there.pth', 'no space left')
    assert there.read_text() == 'precious'
    monkeypatch.undo()
    refusal(convert(file, there / 'x.pth'), 'x.pth', 'cannot write')
    assert sorted(p.name for p in tmp_path.iterdir()) == ['other.pth', 'there.pth']
    done(convert(file, there, '--force', '--to', 'timm'))
    same(tensors(there), state)
