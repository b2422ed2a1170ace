"""Published weights, in every layout, against timm's own reading of the same files."""

import argparse
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn as nn
from mmengine.config import ConfigDict
from mmengine.logging import HistoryBuffer
from mmengine.model import PretrainedInit
from mmengine.registry import DefaultScope
from randomize import randomize, relative
from timm.models.fastvit import checkpoint_filter_fn

from fastvit_mm import FastViT, FastViTError, weights

KEYS = Path(__file__).parent / 'data'
IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def build(scope, model):
    registry = __import__(f'{scope}.registry', fromlist=['MODELS']).MODELS
    with DefaultScope.overwrite_default_scope(scope):
        return registry.build(model).eval()


def classifier(arch, deploy=False, init_cfg=None, backbone_init=None, num_classes=1000):
    """mmpretrain's ImageClassifier, as the configs build it."""
    width = FastViT(arch).settings['widths'][-1]
    model = dict(
        type='ImageClassifier',
        backbone=dict(
            type='FastViT', arch=arch, out_indices=(3,), deploy=deploy, init_cfg=backbone_init
        ),
        neck=dict(type='FastViTNeck', in_channels=width, deploy=deploy),
        head=dict(type='LinearClsHead', num_classes=num_classes, in_channels=2 * width),
        init_cfg=init_cfg,
    )
    return build('mmpretrain', model)


def segmentor(arch='t8', **backbone):
    widths = FastViT(arch).settings['widths']
    return build(
        'mmseg',
        dict(
            type='EncoderDecoder',
            backbone=dict(type='FastViT', arch=arch, feature_norm=True, **backbone),
            neck=dict(type='FPN', in_channels=list(widths), out_channels=32, num_outs=4),
            decode_head=dict(
                type='FPNHead',
                in_channels=[32] * 4,
                in_index=[0, 1, 2, 3],
                feature_strides=[4, 8, 16, 32],
                channels=16,
                num_classes=5,
                norm_cfg=dict(type='BN'),
            ),
        ),
    )


def authors_file(arch, form, path, seed=0):
    """The authors' layout, with random values; ``form`` is 'unfused' or 'reparam'."""
    shapes = json.loads((KEYS / f'apple_fastvit_{arch}_keys.json').read_text())[form]
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for key, shape in shapes.items():
        value = torch.empty(shape)
        if key.endswith('num_batches_tracked'):
            value = torch.tensor(7)
        elif key.endswith(('running_var', 'bn.weight', 'rbr_skip.weight')):
            value.uniform_(0.5, 1.5, generator=generator)
        elif len(shape) > 1 and 'layer_scale' not in key:
            value.normal_(0, value[0].numel() ** -0.5, generator=generator)
        else:
            value.normal_(0, 0.3, generator=generator)
        state[key] = value
    torch.save({'state_dict': state, 'args': argparse.Namespace(model=f'fastvit_{arch}')}, path)
    return state


def timms(arch, state, form='unfused'):
    model = timm.create_model(f'fastvit_{arch}', inference_mode=form == 'reparam')
    state = checkpoint_filter_fn(dict(state), model)
    # timm does not know the names of the merged large-kernel convolution and encoding.
    fix = {'.lkb_reparam.': '.reparam_conv.', 'pos_emb.reparam_conv.': 'pos_emb.reparam_conv.'}
    for old, new in fix.items():
        state = {k.replace(old, new): v for k, v in state.items()}
    model.load_state_dict(
        {
            k.replace('stages.3.blocks.reparam_conv', 'stages.3.pos_emb.reparam_conv'): v
            for k, v in state.items()
        },
        strict=True,
    )
    return model.eval()


@torch.no_grad()
def logits(model, x=IMAGES):
    return model(x) if not hasattr(model, 'extract_feat') else model(x, mode='tensor')


@pytest.mark.parametrize('arch', ['t8', 'sa12'])
@pytest.mark.parametrize('form', ['unfused', 'reparam'])
def test_the_authors_files(arch, form, tmp_path):
    state = authors_file(arch, form, file := tmp_path / f'fastvit_{arch}.pth.tar')
    expected = logits(timms(arch, state, form))
    deploy = form == 'reparam'
    # by init_cfg of the whole classifier, and by load()
    initialized = classifier(arch, deploy, init_cfg=dict(type='Pretrained', checkpoint=str(file)))
    initialized.init_weights()
    loaded = classifier(arch, deploy)
    weights.load(loaded, file, whole=True)
    for model in (initialized, loaded):
        assert relative(logits(model), expected) < 1e-5
    # by init_cfg of the backbone alone
    backbone = FastViT(arch, deploy=deploy, init_cfg=dict(type='Pretrained', checkpoint=str(file)))
    backbone.init_weights()
    with torch.no_grad():
        a, b = backbone.eval()(IMAGES)[3], loaded.backbone(IMAGES)[0]
    assert torch.equal(a, b)


@pytest.mark.parametrize('arch', ['t8', 'sa12'])
def test_training_form_loads_into_deploy_form(arch, tmp_path):
    state = authors_file(arch, 'unfused', file := tmp_path / 'a.pth.tar')
    model = classifier(arch, deploy=True)
    weights.load(model, file, whole=True)
    assert relative(logits(model), logits(timms(arch, state))) < 1e-5


@pytest.mark.parametrize('arch', ['t8', 'sa12'])
@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
@pytest.mark.parametrize('merged', [False, True])
def test_timms_files(arch, suffix, merged, tmp_path):
    reference = randomize(timm.create_model(f'fastvit_{arch}')).eval()
    if merged:
        reference = timm.utils.model.reparameterize_model(reference)
    file = tmp_path / f'model{suffix}'
    if suffix == '.pth':
        torch.save(reference.state_dict(), file)
    else:
        safetensors = pytest.importorskip('safetensors.torch')
        safetensors.save_file({k: v.contiguous() for k, v in reference.state_dict().items()}, file)
    model = classifier(arch, deploy=merged)
    weights.load(model, file, whole=True)
    assert relative(logits(model), logits(reference)) < 1e-5


def test_our_own_files_and_whole_models(tmp_path):
    source = randomize(segmentor())
    file = tmp_path / 'segmentor.pth'
    torch.save({'state_dict': source.state_dict(), 'meta': {}}, file)

    again = segmentor()
    weights.load(again, file, whole=True)
    assert torch.equal(logits(again), logits(source))

    # a deploy-form model takes it merged
    deployed = segmentor(deploy=True)
    weights.load(deployed, file, whole=True)
    assert relative(logits(deployed), logits(source)) < 1e-5
    # and its own file back
    torch.save(deployed.state_dict(), merged := tmp_path / 'merged.pth')
    again = segmentor(deploy=True)
    weights.load(again, merged, whole=True)
    assert torch.equal(logits(again), logits(deployed))

    # the backbone out of a whole model, into a bare backbone and into another task
    backbone = FastViT('t8').eval()
    weights.load(backbone, file)
    other = classifier('t8')
    weights.load(other, file)
    plain = FastViT('t8', feature_norm=True).eval()
    weights.load(plain, file)
    # a shallow backbone leaves the later stages
    shallow = FastViT('t8', out_indices=(1,)).eval()
    weights.load(shallow, file)
    with torch.no_grad():
        assert torch.equal(plain(IMAGES)[3], source.backbone(IMAGES)[3])
        assert torch.equal(backbone(IMAGES)[3], other.backbone(IMAGES)[0])
        assert torch.equal(backbone(IMAGES)[1], shallow(IMAGES)[0])


def test_pretrained_backbone_in_a_new_task(tmp_path, caplog):
    """Only what is new may be missing, and it is named."""
    reference = randomize(timm.create_model('fastvit_t8'))
    torch.save(reference.state_dict(), file := tmp_path / 'timm.pth')
    model = segmentor(init_cfg=dict(type='Pretrained', checkpoint=str(file)))
    model.init_weights()
    own, theirs = model.backbone.state_dict(), reference.state_dict()
    shared = [k for k in own if not k.startswith('norm')]
    assert len(shared) > 300
    assert all(torch.equal(own[k], theirs[k]) for k in shared)
    # fine-tuning on other classes keeps backbone and neck, and a new head
    few = classifier('t8', num_classes=7)
    weights.load(few, file)
    assert torch.equal(few.neck.final_conv.se.fc1.weight, reference.final_conv.se.fc1.weight)


def says(call, *words):
    with pytest.raises(FastViTError) as error:
        call()
    text = str(error.value)
    assert '\n' not in text
    for word in words:
        assert word in text, text


def test_files_that_do_not_fit(tmp_path):
    torch.save(
        randomize(timm.create_model('fastvit_s12')).state_dict(), file := tmp_path / 's12.pth'
    )
    says(
        lambda: weights.load(FastViT('sa12'), file),
        'this is FastViT-S12; the model is FastViT-SA12',
    )
    says(lambda: weights.load(FastViT('t8'), file), 'FastViT-S12', 'FastViT-T8', 'another shape')
    init = dict(type='Pretrained', checkpoint=str(file))
    says(lambda: FastViT('t12', init_cfg=init).init_weights(), 'FastViT-S12', 'FastViT-T12')

    authors_file('t8', 'reparam', file := tmp_path / 'merged.pth.tar')
    says(lambda: weights.load(FastViT('t8'), file), 'deploy form', 'deploy=True')

    torch.save(nn.Linear(2, 3).state_dict(), file := tmp_path / 'other.pth')
    says(
        lambda: weights.load(FastViT('t8'), file),
        'not a FastViT',
        'weight, bias',
    )

    state = timm.create_model('fastvit_t8').state_dict()
    gone = [k for k in state if k.startswith('stages.1.blocks.0.mlp.')][:4]
    torch.save({k: v for k, v in state.items() if k not in gone}, file := tmp_path / 'gap.pth')
    says(
        lambda: weights.load(FastViT('t8'), file),
        'missing in the file',
        *sorted(gone)[:3],
        '1 more',
    )
    torch.save({**state, 'stages.1.extra': torch.ones(1)}, file)
    says(lambda: weights.load(FastViT('t8'), file), 'unknown to the model', 'stages.1.extra')

    # a test needs everything: another task's file will not do
    torch.save(segmentor().state_dict(), file := tmp_path / 'segmentor.pth')
    says(lambda: weights.load(classifier('t8'), file, whole=True), 'another task', 'head.fc.bias')


def test_files_that_are_not_there(tmp_path, monkeypatch):
    says(lambda: weights.find(tmp_path / 'no.pth'), 'no.pth', 'does not exist', 'apple_dist_in1k')

    def offline(address, path):
        raise OSError('no network')

    monkeypatch.setattr(torch.hub, 'download_url_to_file', offline)
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path))
    for name, folder in (('apple_in1k', 'models'), ('apple_dist_in1k', 'distilled_models')):
        address = (
            'https://docs-assets.developer.apple.com/ml-research/models/fastvit/'
            f'image_classification_{folder}/fastvit_sa36.pth.tar'
        )
        cached = str(tmp_path / 'checkpoints' / f'fastvit_sa36.{name}.pth.tar')
        says(lambda name=name: weights.find(f'fastvit_sa36.{name}'), address, 'no network', cached)
        # put there by hand, it is found
        Path(cached).write_bytes(b'')
        assert str(weights.find(f'fastvit_sa36.{name}')) == cached
    says(lambda: weights.find('https://example.org/a/b.pth'), 'https://example.org/a/b.pth')


def test_the_class_by_name_or_as_it_is(tmp_path):
    """Configs in plain Python hold the initializer itself, not its name."""
    torch.save(FastViT('t8').state_dict(), file := tmp_path / 't8.pth')
    for kind in ('Pretrained', 'mmengine.Pretrained', PretrainedInit):
        init = dict(type=kind, checkpoint=str(file))
        says(lambda init=init: FastViT('t12', init_cfg=init).init_weights(), 'FastViT-T8')


def test_what_a_file_wraps_its_weights_in(tmp_path):
    """Training scripts save several sets; the first of these is the model's own."""
    models = {k: FastViT('t8') for k in ('state_dict', 'model', 'state_dict_ema')}
    for _ in range(3):
        (first, model), *_ = models.items()
        states = {k: m.state_dict() for k, m in reversed(models.items())}
        torch.save(dict(epoch=3, **states), file := tmp_path / 'several.pth')
        weights.load(read := FastViT('t8'), file)
        assert torch.equal(read.stem[0].conv_kxk[0].conv.weight, kernel(model)), first
        del models[first]


def kernel(model):
    return model.stem[0].conv_kxk[0].conv.weight


def test_pretrained_weights_are_dropped():
    """Wherever they are in a model's config; everything else stays."""
    init = dict(type='Pretrained', checkpoint='https://example.invalid/a.pth')
    normal = dict(type='Normal', std=0.01)
    config = ConfigDict(
        init_cfg=init,
        backbone=dict(type='ResNet', init_cfg=[init, normal], pretrained='torchvision://resnet50'),
        heads=[dict(init_cfg=dict(init, type=PretrainedInit)), dict(init_cfg=normal, pretrained=0)],
        aux=(dict(deep=dict(type='TIMMBackbone', pretrained=True)),),
    )
    weights.drop_pretrained(config)
    assert config.to_dict() == dict(
        init_cfg=None,
        backbone=dict(type='ResNet', init_cfg=[normal], pretrained=None),
        heads=[dict(init_cfg=None), dict(init_cfg=normal, pretrained=0)],
        aux=(dict(deep=dict(type='TIMMBackbone', pretrained=None)),),
    )


def test_damaged_files(tmp_path):
    whole = tmp_path / 'whole.pth'
    torch.save(FastViT('t8').state_dict(), whole)
    cut = tmp_path / 'cut.pth'
    cut.write_bytes(whole.read_bytes()[:100_000])
    says(lambda: weights.read(cut), 'cut.pth', 'truncated')
    cut.write_bytes(b'')
    says(lambda: weights.read(cut), 'truncated')
    cut.write_text('<html>not found</html>')
    says(lambda: weights.read(cut), 'truncated')
    bad = tmp_path / 'bad.safetensors'
    bad.write_bytes(b'\x10')
    says(lambda: weights.read(bad), 'truncated')
    torch.save(dict(epoch=3), cut)
    says(lambda: weights.load(FastViT('t8'), cut), 'contains no weights')


class Hostile:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), 'w')


@pytest.mark.parametrize('old', [False, True])
def test_no_file_runs_code(old, tmp_path):
    trap = tmp_path / 'trap'
    file = tmp_path / 'hostile.pth'
    content = dict(state_dict=FastViT('t8').state_dict(), meta=Hostile(trap))
    torch.save(content, file, _use_new_zipfile_serialization=not old)
    init = dict(type='Pretrained', checkpoint=str(file))
    for call in (
        lambda: weights.read(file),
        lambda: weights.load(FastViT('t8'), file),
        lambda: FastViT('t8', init_cfg=init).init_weights(),
    ):
        says(call, 'open', 'refused')
        assert not trap.exists()
    # a plain pickle, which torch.load used to take
    file.write_bytes(pickle.dumps(content))
    says(lambda: weights.read(file))
    assert not trap.exists()


def test_harmless_types_are_read(tmp_path):
    history = HistoryBuffer([1.0, 2.0], [1, 1])
    content = dict(
        state_dict=FastViT('t8').state_dict(),
        args=argparse.Namespace(lr=1e-3),
        loss=np.float64(0.5),
        step=np.int64(3),
        curve=np.arange(4.0),
        message_hub=dict(log_scalars=dict(loss=history)),
    )
    torch.save(content, file := tmp_path / 'plain.pth')
    read = weights.read(file)
    assert read['args'].lr == 1e-3
    assert read['loss'] == 0.5 and read['step'] == 3 and read['curve'].tolist() == [0, 1, 2, 3]
    assert read['message_hub']['log_scalars']['loss'].mean() == 1.5
    weights.load(FastViT('t8'), file)


def test_remapping_is_safe_to_repeat():
    shapes = json.loads((KEYS / 'apple_fastvit_sa12_keys.json').read_text())['unfused']
    state = {k: torch.empty(s) for k, s in shapes.items()}
    once = weights.to_mm(state)
    assert list(weights.to_mm(once)) == list(once)
    assert set(once) == set(classifier('sa12').state_dict()) - {'head.fc'}
