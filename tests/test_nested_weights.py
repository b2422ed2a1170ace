"""Models with a FastViT at any depth, or several, as mmdet's semi-supervised detectors have."""

import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from mmengine.config import Config
from mmengine.model import BaseModel
from randomize import randomize, relative
from test_convert_weights import convert, done, refusal  # noqa: F401  (a fixture)
from test_tools import DETECTION, home, shallow, tool  # noqa: F401
from test_weights import IMAGES, build, says

from fastvit_mm import FastViT, FastViTNeck, launch, weights
from fastvit_mm.demo import apply_demo

ARCH = dict(depths=(1, 1, 1, 1), widths=(16, 16, 32, 32), ffn_ratio=2)
HALVES = ('student', 'teacher')


def settings(arch=ARCH, **backbone):
    return dict(
        type='RetinaNet',
        backbone=dict(type='FastViT', arch=arch, feature_norm=True, **backbone),
        neck=dict(
            type='FPN',
            in_channels=list(FastViT(arch).settings['widths']),
            start_level=1,
            out_channels=16,
            num_outs=5,
        ),
        bbox_head=dict(type='RetinaHead', num_classes=5, in_channels=16, feat_channels=16),
    )


def detector(*args, **backbone):
    return build('mmdet', settings(*args, **backbone))


def pair(*args, **backbone):
    """mmdet's student and teacher."""
    return build(
        'mmdet',
        dict(
            type='SemiBaseDetector',
            detector=settings(*args, **backbone),
            semi_train_cfg=dict(freeze_teacher=True),
            semi_test_cfg=dict(predict_on='teacher'),
        ),
    )


def same(module, state, prefix=''):
    own = module.state_dict()
    assert own
    for key, value in own.items():
        assert torch.equal(value, state[prefix + key]), key


@torch.no_grad()
def features(model):
    return [y for half in HALVES for y in getattr(model, half).extract_feat(IMAGES)]


@pytest.fixture
def both(tmp_path):
    """A semi-supervised detector, whose halves differ, and its file."""
    model = randomize(pair())
    assert not torch.equal(model.student.backbone.norm0.weight, model.teacher.backbone.norm0.weight)
    torch.save(dict(state_dict=model.state_dict()), file := tmp_path / 'both.pth')
    return model, file


def test_a_whole_model_with_two(both):
    model, file = both
    for whole in (True, False):
        weights.load(again := pair(), file, whole=whole)
        same(again, model.state_dict())
    # each half is merged on its own
    weights.load(deployed := pair(deploy=True), file, whole=True)
    for a, b in zip(features(deployed), features(model), strict=True):
        assert relative(a, b) < 1e-5
    # a shallow backbone leaves the later stages of both
    shallow = nn.ModuleDict({h: nn.Module() for h in HALVES})
    for half in HALVES:
        shallow[half].backbone = FastViT(ARCH, out_indices=(1,))
    weights.load(shallow, file)
    same(shallow, model.state_dict())


def test_one_file_for_both(both, tmp_path):
    """As mmdet does with a detector's file, and for pre-trained backbones."""
    one = randomize(detector(), seed=1)
    torch.save(dict(state_dict=one.state_dict()), file := tmp_path / 'one.pth')
    weights.load(model := pair(), file, whole=True)
    for half in HALVES:
        same(getattr(model, half), one.state_dict())
    reference = randomize(timm.create_model('fastvit_t8'))
    trained = reference.stages[3].blocks[1].mlp.fc1.weight
    torch.save(reference.state_dict(), file := tmp_path / 'timm.pth')
    weights.load(model := pair('t8'), file)
    for half in HALVES:
        backbone = getattr(model, half).backbone
        assert torch.equal(backbone.stages[3].blocks[1].mlp.fc1.weight, trained)


def test_one_of_two(both, convert, tmp_path):  # noqa: F811
    model, file = both
    says(lambda: weights.load(detector(), file), 'several', 'student., teacher.', 'prefix')
    for half in HALVES:
        weights.load(one := detector(), file, whole=True, prefix=half)
        same(one, getattr(model, half).state_dict())
        for prefix in (half, f'{half}.', f'{half}.backbone', f'{half}.backbone.'):
            init = dict(type='Pretrained', checkpoint=str(file), prefix=prefix)
            (backbone := FastViT(ARCH, feature_norm=True, init_cfg=init)).init_weights()
            own, theirs = backbone.state_dict(), getattr(model, half).backbone.state_dict()
            assert all(torch.equal(own[k], theirs[k]) for k in own if not k.startswith('norm'))
    says(lambda: weights.load(detector(), file, prefix='pupil'), 'nothing', 'pupil', 'student.')

    out = tmp_path / 'out.pth'
    refusal(convert(file, out), 'several', '--prefix student.')
    refusal(convert(file, out, '--prefix', 'pupil'), 'nothing', 'pupil')
    done(convert(file, out, '--prefix', 'teacher', '--deploy'))
    weights.load(merged := detector(deploy=True), out, whole=True)
    with torch.no_grad():
        for a, b in zip(merged.backbone(IMAGES), model.teacher.backbone(IMAGES), strict=True):
            assert relative(a, b) < 1e-5

    # where there is one, nobody has to say which
    state = {k: v for k, v in model.state_dict().items() if k.startswith('teacher.')}
    torch.save(state, file)
    weights.load(one := detector(), file, whole=True)
    same(one, model.teacher.state_dict())


def test_two_that_do_not_fit(both, tmp_path):
    model, file = both
    state = model.state_dict()
    torch.save({k: v for k, v in state.items() if k.startswith('teacher.')}, file)
    for whole in (True, False):
        says(lambda whole=whole: weights.load(pair(), file, whole), 'missing', 'student.')
    gone = 'student.backbone.stages.0.blocks.0.mlp.fc1.weight'
    torch.save({k: v for k, v in state.items() if k != gone}, file)
    for whole in (True, False):
        says(lambda whole=whole: weights.load(pair(), file, whole), f'missing in the file: {gone}')
    torch.save(pair('t8').state_dict(), file)
    says(lambda: weights.load(pair(), file), 'this is FastViT-T8; the model is a FastViT with')
    torch.save(pair(deploy=True).state_dict(), file)
    says(lambda: weights.load(pair(), file), 'deploy form', 'deploy=True')


class Deep(nn.Module):
    """Names of its own, far from ``backbone.``."""

    def __init__(self):
        super().__init__()
        self.net = nn.ModuleDict(dict(encoder=FastViT(ARCH), last=FastViTNeck(32)))
        self.fc = nn.Linear(64, 2)


def test_any_name_at_any_depth(tmp_path):
    model = randomize(Deep())
    torch.save(model.state_dict(), file := tmp_path / 'deep.pth')
    weights.load(again := Deep(), file, whole=True)
    same(again, model.state_dict())
    torch.save(model.net.encoder.state_dict(), file)
    weights.load(again := Deep(), file)
    same(again.net.encoder, model.net.encoder.state_dict())


class Pair(BaseModel):
    def __init__(self):
        super().__init__()
        self.student, self.teacher = (nn.ModuleDict(dict(backbone=FastViT(ARCH))) for _ in HALVES)

    def forward(self, inputs, mode='tensor'):
        x = torch.stack(list(inputs))
        a, b = (half['backbone'](x)[-1] for half in (self.student, self.teacher))
        return dict(loss=F.mse_loss(a, b))


def runner(folder, steps, **args):
    return launch.Runner(
        Pair(),
        str(folder),
        train_dataloader=dict(
            dataset=[dict(inputs=torch.rand(3, 64, 64)) for _ in range(8)],
            batch_size=2,
            sampler=dict(type='DefaultSampler', shuffle=False),
        ),
        train_cfg=dict(by_epoch=False, max_iters=steps),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.1, momentum=0.9)),
        default_hooks=dict(checkpoint=dict(type='CheckpointHook', interval=1, by_epoch=False)),
        custom_hooks=[dict(type='EMAHook')],
        **args,
    )


def test_resume(tmp_path):
    runner(tmp_path, 2).train()
    saved = weights.read(tmp_path / 'iter_2.pth')
    again = runner(tmp_path, 3, resume=True)
    again.call_hook('before_run')
    again.load_or_resume()
    assert again.iter == 2
    # with averaging, a checkpoint's state_dict is the average
    same(again.model, saved['ema_state_dict'], 'module.')
    again.train()
    after = weights.read(tmp_path / 'iter_3.pth')
    for key in ('state_dict', 'ema_state_dict'):
        assert after[key].keys() == saved[key].keys()


SEMI = """
_base_ = '{base}'
model = dict(
    _delete_=True,
    type='SoftTeacher',
    detector=_base_.model,
    data_preprocessor=dict(
        type='MultiBranchDataPreprocessor', data_preprocessor=_base_.model.data_preprocessor
    ),
    semi_train_cfg=dict(freeze_teacher=True),
    semi_test_cfg=dict(predict_on='teacher'),
)
"""


@pytest.mark.slow
def test_the_test_tool(tool, tmp_path):  # noqa: F811
    """Its own checkpoint, and the one of a detector, in both forms."""
    plain = shallow(DETECTION, tmp_path)
    (config := tmp_path / 'semi.py').write_text(SEMI.format(base=plain))
    cfg = Config.fromfile(config)
    apply_demo(cfg)
    model = build('mmdet', cfg.model)
    torch.save(dict(state_dict=model.state_dict()), own := tmp_path / 'own.pth')
    torch.save(dict(state_dict=model.student.state_dict()), one := tmp_path / 'one.pth')
    few = ('--demo', '--cfg-options', 'test_dataloader.dataset.indices=4')
    done(tool('test', config, own, *few))
    done(tool('test', config, one, '--reparam', *few))
    refusal(tool('test', plain, own, *few), 'several', 'student., teacher.')
