"""Every config: it builds, trains a step, says the right command, runs on the demo data."""

import copy
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
import yaml
from mmcv.cnn.bricks import DropPath
from mmengine.config import Config
from mmengine.model import ExponentialMovingAverage
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DefaultScope
from mmengine.structures import InstanceData, PixelData
from PIL import Image
from randomize import randomize
from test_tools import load_tool, refusal

import fastvit_mm
from fastvit_mm import FastViTError, launch, weights
from fastvit_mm.demo import apply_demo, scenes
from fastvit_mm.hand_mesh import demo_data
from fastvit_mm.models.archs import parse_arch

ROOT = Path(__file__).parent.parent
CONFIGS = sorted(
    str(p.relative_to(ROOT))
    for p in ROOT.glob('configs/*/*.py')
    if p.parent.name not in ('_base_', 'embedding')  # which has nothing to train
)
# MobileCLIP's larger encoders have the same configs as MCi0: one task for all of them.
LARGE = [c for c in CONFIGS if re.search('mci[123]|_hd_', c)]
DEEP = [
    pytest.param(c, marks=pytest.mark.slow) if re.search('[sm]a36|mci[123]|_hd_', c) else c
    for c in CONFIGS
    if c not in LARGE or 'segmentation' in c
]
DISTILLED = [c for c in CONFIGS if '_dist_' in c]
# A teacher that costs nothing; the real one has 84 M parameters and has to be downloaded.
TEACHER = dict(type='TimmClassifier', model_name='test_resnet', pretrained=False, num_classes=1000)
CLASSES = 1000


def entries():
    """name -> entry of all metafiles that the model index imports."""
    index = yaml.safe_load((ROOT / 'model-index.yml').read_text())
    files = [yaml.safe_load((ROOT / f).read_text()) for f in index['Import']]
    models = [m for f in files for m in f['Models']]
    assert len({m['Name'] for m in models}) == len(models)
    return {m['Name']: m for m in models}


def load(path):
    cfg = Config.fromfile(ROOT / path)
    if 'teacher' in cfg.model:
        cfg.model.teacher = dict(TEACHER)
    if 'hand_mesh' in path:
        cfg.model.head.hand_model = 'synthetic'
    return cfg


def build(cfg):
    """As mmengine's runner builds the model, without weights."""
    scope = cfg.default_scope
    model = copy.deepcopy(cfg.model)
    if cfg.get('data_preprocessor'):
        model.setdefault('data_preprocessor', cfg.data_preprocessor)
    registry = __import__(f'{scope}.registry', fromlist=['MODELS']).MODELS
    with DefaultScope.overwrite_default_scope(scope):
        return registry.build(model)


def batch(scope, size=64, n=2, classes=CLASSES):
    """What a pipeline gives: uint8 images and their labels."""
    generator = torch.Generator().manual_seed(0)
    images = [
        torch.randint(256, (3, size, size), generator=generator, dtype=torch.uint8)
        for _ in range(n)
    ]
    meta = dict(img_shape=(size, size), ori_shape=(size, size), pad_shape=(size, size))
    samples = []
    for i in range(n):
        if scope == 'mmpretrain':
            from mmpretrain.structures import DataSample

            samples.append(DataSample().set_gt_label(i % classes))
        elif scope == 'mmdet':
            from mmdet.structures import DetDataSample
            from mmdet.structures.mask import BitmapMasks

            box = [4.0, 4.0, size - 8.0, size - 8.0]
            mask = torch.zeros(1, size, size, dtype=torch.uint8)
            mask[:, 4 : size - 8, 4 : size - 8] = 1
            sample = DetDataSample(metainfo=dict(meta, batch_input_shape=(size, size)))
            sample.gt_instances = InstanceData(
                bboxes=torch.tensor([box]),
                labels=torch.tensor([i]),
                masks=BitmapMasks(mask.numpy(), size, size),
            )
            samples.append(sample)
        elif scope == 'mmengine':
            from fastvit_mm.hand_mesh import HandSample

            sizes = dict(xyz=(21, 3), verts=(778, 3), uv=(21, 2), mano=(61,))
            sample = HandSample(metainfo=meta)
            for name, shape in sizes.items():
                setattr(sample, name, torch.randn(shape, generator=generator))
            samples.append(sample)
        else:
            from mmseg.structures import SegDataSample

            sample = SegDataSample(metainfo=meta)
            labels = torch.randint(150, (1, size, size), generator=generator)
            sample.gt_sem_seg = PixelData(data=labels)
            samples.append(sample)
    return dict(inputs=images, data_samples=samples)


# -------------------------------------------------------------------------------------- building


@pytest.mark.parametrize('path', DEEP)
def test_builds_and_trains(path):
    """One forward and backward pass; every parameter of the backbone gets a gradient, not 0."""
    cfg = load(path)
    if cfg.default_scope == 'mmseg':
        cfg.model.data_preprocessor.size = (64, 64)
    if cfg.default_scope == 'mmdet':
        cfg.model.train_cfg.rcnn.sampler.num = 32
    torch.manual_seed(0)
    arch = re.search(r'fastvit_(\w+?)_', Path(path).stem)[1]
    assert cfg.model.backbone.arch == arch
    if path in LARGE:  # a block for each stage: the others take time and show no more
        settings = parse_arch(arch)
        cfg.model.backbone.arch = {**settings, 'depths': (1,) * len(settings['depths'])}
    model = build(cfg).train()
    for module in model.backbone.modules():
        if isinstance(module, DropPath):  # which may drop every image of so small a batch
            assert module.drop_prob > 0
            module.drop_prob = 0.0
    data = model.data_preprocessor(batch(cfg.default_scope), True)
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        losses = model(**data, mode='loss')
    loss, _ = model.parse_losses(losses)
    assert torch.isfinite(loss)
    loss.backward()
    if '_linear_' in path:
        grown = [n for n, p in model.named_parameters() if p.grad is not None]
        assert grown == ['head.fc.weight', 'head.fc.bias']
        return
    gradients = {n: p.grad for n, p in model.backbone.named_parameters()}
    assert len(gradients) > (30 if path in LARGE else 100)
    assert not [n for n, g in gradients.items() if g is None]
    assert all(torch.isfinite(g).all() for g in gradients.values())
    assert not [n for n, g in gradients.items() if not g.any()]
    name = Path(path).stem
    stated = entries()[name]['Metadata'].get('Parameters')
    assert path in LARGE or stated in (None, sum(p.numel() for p in model.parameters()))


@pytest.mark.slow
def test_fastvithd_is_built_without_branches():
    """At full width and merged, as its detector begins, without the fifth stage."""
    model = build(load('configs/detection/mask_rcnn_fastvit_hd_coco.py')).eval()
    names = model.backbone.state_dict()
    assert 'stem.0.reparam_conv.weight' in names and not any('conv_kxk' in n for n in names)
    assert len(model.backbone.stages) == 4
    with torch.no_grad():
        outs = model.extract_feat(torch.rand(1, 3, 64, 64))
    assert {out.shape[1] for out in outs} == {256}


@pytest.mark.parametrize(
    'path',
    [
        'configs/classification/fastvit_t8_dist_in1k.py',
        'configs/detection/mask_rcnn_fastvit_t8_coco.py',
        'configs/segmentation/fpn_fastvit_t8_ade20k.py',
        'configs/hand_mesh/vertices_fastvit_t8_freihand.py',
    ],
)
def test_custom_imports_are_enough(path, tmp_path):
    """In an interpreter that knows nothing of this package."""
    code = f"""
from mmengine.config import Config
from mmengine.registry import DefaultScope
cfg = Config.fromfile({str(ROOT / path)!r})
scope = cfg.default_scope
cfg.model.pop('teacher', None)
registry = __import__(scope + '.registry', fromlist=['MODELS']).MODELS
with DefaultScope.overwrite_default_scope(scope):
    print(type(registry.build(cfg.model)).__name__, cfg.model.type)
"""
    run = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', code], cwd=tmp_path, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    built, wanted = run.stdout.split()[-2:]
    assert built == wanted


# ------------------------------------------------------------------------------ what configs say


def test_index_and_configs_are_the_same_set():
    found = entries()
    assert sorted(m['Config'] for m in found.values()) == CONFIGS
    for name, entry in found.items():
        assert Path(entry['Config']).stem == name
        assert entry['Metadata']['Reproduced'] is False, name


@pytest.mark.parametrize('path', CONFIGS)
def test_header(path):
    """Command, hardware and the paper's figure, as the index has it."""
    command, hardware = (ROOT / path).read_text().splitlines()[:2]
    cfg, entry = Config.fromfile(ROOT / path), entries()[Path(path).stem]
    amp = ' --amp' if 'classification' in path else ''
    assert command == f'# torchrun --nproc-per-node 8 tools/train.py {path} --launcher pytorch{amp}'
    assert f'8 GPUs with {cfg.train_dataloader.batch_size} images each' in hardware

    metrics = entry['Results'][0]['Metrics'] if 'Results' in entry else {}
    patterns = {
        'Top 1 Accuracy': r'The paper: ([\d.]+) % top-1',
        'box AP': r'The paper: ([\d.]+) box AP',
        'mask AP': r'([\d.]+) mask AP',
        'mIoU': r'The paper: ([\d.]+) mIoU',
        'PA-MPJPE': r'The paper: ([\d.]+) mm PA-MPJPE',
        'PA-MPVPE': r'The paper: .* ([\d.]+) mm PA-MPVPE',
        'F@5': r'The paper: .* F@5 (\d\.\d+)',
        'F@15': r'The paper: .* F@15 (\d\.\d+)',
    }
    said = {k: float(m[1]) for k, p in patterns.items() if (m := re.search(p, hardware))}
    assert said == metrics
    assert bool(said) != ('The paper has no' in hardware or 'reports no figure' in hardware)
    unsure = 'unverified' in entry['Metadata'].get('Source', '')
    assert ('secondary source' in hardware) == unsure


def pretrained_names(node):
    if isinstance(node, dict):
        if node.get('type') == 'Pretrained':
            yield node['checkpoint']
        node = list(node.values())
    if isinstance(node, list | tuple):
        for child in node:
            yield from pretrained_names(child)


@pytest.mark.parametrize('path', CONFIGS)
def test_pretrained_names_have_addresses(path, tmp_path, monkeypatch):
    """Nothing is fetched: the download is replaced."""
    asked = []

    def fetch(address, file):
        asked.append(address)
        Path(file).touch()

    monkeypatch.setattr(torch.hub, 'download_url_to_file', fetch)
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path))
    cfg = Config.fromfile(ROOT / path)
    names = list(pretrained_names(cfg.model.to_dict()))
    # Classification at 256 starts from scratch; everything else from the same backbone's weights.
    arch = cfg.model.backbone.arch
    if arch == 'hd':  # a folder, which the config's first lines tell to fetch
        assert names == ['checkpoints/llava-fastvithd_0.5b_stage3']
        assert 'llava-fastvithd_0.5b_stage3.zip' in (ROOT / path).read_text()
        return
    if 'mci' in arch:
        (name,) = names
        weights.find(name)
        assert len(asked) == 1 and f'fastvit_{arch}.apple_mclip' in name
        return
    from_scratch = 'classification' in path and '_384_' not in path
    assert names == ([] if from_scratch else [f'fastvit_{arch}.apple_in1k'])
    folder = 'https://docs-assets.developer.apple.com/ml-research/models/fastvit/'
    for name in names:
        weights.find(name)
    plain = f'{folder}image_classification_models/fastvit_{arch}.pth.tar'
    assert asked == [plain] * len(names)
    if from_scratch:  # the index has the weights that this config would train
        kind = 'distilled_models' if path in DISTILLED else 'models'
        address = f'{folder}image_classification_{kind}/fastvit_{arch}.pth.tar'
        assert entries()[Path(path).stem]['Weights'] == address


# ----------------------------------------------------------------------------- demo runs of each


@pytest.fixture(scope='module')
def home(tmp_path_factory):
    """A folder to run in, with demo data of a few pictures."""
    folder = tmp_path_factory.mktemp('home')
    (folder / 'configs').symlink_to(ROOT / 'configs')
    with pytest.MonkeyPatch.context() as patch:
        for name, spec in scenes.LAYOUTS.items():
            patch.setitem(scenes.LAYOUTS, name, spec | dict(images=(32, 5)))
        patch.setitem(demo_data.SPEC, 'hands', (8, 3))
        yield folder


@pytest.mark.slow
@pytest.mark.parametrize('path', [c for c in CONFIGS if c not in LARGE])
def test_demo(path, home, tmp_path, monkeypatch, capfd):
    """Two iterations, a checkpoint, and a test of it in the deploy form, by the tools."""
    monkeypatch.chdir(home)
    cfg = Config.fromfile(ROOT / path)
    by_epoch = 'max_epochs' in cfg.train_cfg
    length, unit = ('max_epochs', 'epoch') if by_epoch else ('max_iters', 'iter')
    steps = 2 if unit == 'iter' else 1
    teacher = ['model.teacher.model_name=test_resnet'] if path in DISTILLED else []
    common = [path, '--demo', '--work-dir', str(tmp_path)]
    load_tool('train').main(
        [
            *common,
            '--cfg-options',
            f'train_cfg.{length}={steps}',
            'train_cfg.val_interval=1000',
            'train_dataloader.batch_size=2',
            'train_dataloader.dataset.indices=4',
            f'default_hooks.checkpoint.interval={steps}',
            'default_hooks.checkpoint.save_best=None',
            'default_hooks.checkpoint.save_optimizer=False',
            *teacher,
        ]
    )
    checkpoint = tmp_path / f'{unit}_{steps}.pth'
    assert weights.read(checkpoint)['meta']['iter'] == 2
    out = tmp_path / 'metrics.json'
    few = ['--cfg-options', 'test_dataloader.dataset.indices=2']
    if cfg.default_scope == 'mmdet':  # each detection costs a mask
        few.append('model.test_cfg.rcnn.max_per_img=3')
    load_tool('test').main(
        [path, str(checkpoint), *common[1:], '--reparam', '--out', str(out), *few]
    )
    if cfg.default_scope != 'mmdet':  # which has nothing to say where nothing was found
        assert json.loads(out.read_text())


AUGMENTED = """
_base_ = '{base}'
load, *steps, pack = _base_.test_dataloader.dataset.pipeline
flips = [dict(type='RandomFlip', prob=p, direction='horizontal') for p in (0.0, 1.0)]
transforms = [*([step] for step in steps), flips, [pack]]
test_dataloader = dict(
    dataset=dict(pipeline=[load, dict(type='TestTimeAug', transforms=transforms)])
)
model = dict(_delete_=True, type='{kind}', module=_base_.model)
"""


@pytest.mark.parametrize(
    'base, kind',
    [
        ('configs/classification/fastvit_t8_in1k.py', 'AverageClsScoreTTA'),
        ('configs/segmentation/fpn_fastvit_t8_ade20k.py', 'SegTTAModel'),
    ],
)
def test_test_time_augmentation(base, kind, home, tmp_path, monkeypatch, capfd):
    """mmpretrain's and mmseg's own, in the deploy form, give what they do in the training form."""
    monkeypatch.chdir(home)
    plain = apply_demo(Config.fromfile(base))
    state = randomize(fastvit_mm.init_model(plain)).state_dict()
    torch.save(dict(state_dict=state), checkpoint := tmp_path / 'weights.pth')
    (config := tmp_path / 'augmented.py').write_text(AUGMENTED.format(base=ROOT / base, kind=kind))
    metrics = []
    for form in ([], ['--reparam']):
        out = tmp_path / 'metrics.json'
        few = ['--cfg-options', 'test_dataloader.dataset.indices=4']
        args = [str(config), str(checkpoint), '--demo', '--work-dir', str(tmp_path), *form]
        load_tool('test').main([*args, '--out', str(out), *few])
        metrics.append(json.loads(out.read_text()))
    assert metrics[0] == pytest.approx(metrics[1], abs=0.01)
    said = capfd.readouterr()
    assert f'reparameterized {plain.model.type}' in said.out + said.err


# ----------------------------------------------------------------------------------- distillation

ARCH = dict(depths=(1, 1, 1, 1), widths=(8, 16, 32, 32), ffn_ratio=2)
HEAD = dict(
    type='LinearClsHead',
    num_classes=10,
    in_channels=64,
    loss=dict(type='LabelSmoothLoss', label_smooth_val=0.1, mode='original'),
)
PREPROCESSOR = dict(
    type='ClsDataPreprocessor', num_classes=10, mean=[124, 116, 104], std=[58, 57, 57]
)


def small_config(kind='DistilledImageClassifier', teacher=None, **settings):
    import fastvit_mm.models.distillation  # noqa: F401  (registers it)

    model = dict(
        type=kind,
        backbone=dict(type='FastViT', arch=dict(ARCH), out_indices=(3,)),
        neck=dict(type='FastViTNeck', in_channels=32),
        head=dict(HEAD),
        data_preprocessor=dict(PREPROCESSOR),
        **settings,
    )
    if teacher:
        model['teacher'] = teacher
    return Config(dict(model=model, default_scope='mmpretrain'))


TIMM_TEACHER = {**TEACHER, 'num_classes': 10}
MM_TEACHER = dict(
    type='ImageClassifier',
    backbone=dict(type='ResNet', depth=18, num_stages=4, out_indices=(3,)),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(type='LinearClsHead', num_classes=10, in_channels=512),
)


@pytest.fixture(params=['timm', 'mmpretrain'])
def student(request):
    """A distilled classifier with a teacher of random weights and statistics."""
    torch.manual_seed(0)
    teacher = TIMM_TEACHER if request.param == 'timm' else MM_TEACHER
    model = build(small_config(teacher=dict(teacher)))
    randomize(model.teacher.module)
    return model.train()


def small_batch(model, n=4):
    return model.data_preprocessor(batch('mmpretrain', n=n, classes=10), True)


def test_the_teacher_is_out_of_sight(student):
    plain = build(small_config('ImageClassifier'))
    assert list(student.state_dict()) == list(plain.state_dict())
    assert [n for n, _ in student.named_parameters()] == [n for n, _ in plain.named_parameters()]
    taught = {id(p) for p in student.teacher.module.parameters()}
    assert len(taught) > 10
    wrapper = build_optim_wrapper(student, dict(optimizer=dict(type='AdamW', lr=1e-3)))
    stepped = {id(p) for g in wrapper.optimizer.param_groups for p in g['params']}
    assert not stepped & taught
    assert not any(p.requires_grad for p in student.teacher.module.parameters())

    averaged = ExponentialMovingAverage(student, momentum=0.1)
    for copied in (copy.deepcopy(student), averaged.module):
        assert copied.teacher.module is student.teacher.module
    averaged.update_parameters(student)
    assert set(averaged.module.state_dict()) == set(plain.state_dict())


def test_the_teacher_never_learns(student):
    teacher = student.teacher.module
    before = copy.deepcopy(teacher.state_dict())
    own = copy.deepcopy(student.state_dict())
    wrapper = build_optim_wrapper(student, dict(optimizer=dict(type='AdamW', lr=1e-2)))
    student.train()
    for _ in range(2):
        student.train_step(batch('mmpretrain', n=4, classes=10), wrapper)
        assert not any(m.training for m in teacher.modules())
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    assert not all(torch.equal(v, own[k]) for k, v in student.state_dict().items())


@pytest.mark.parametrize('weight', [None, 0.2])
def test_the_loss_by_hand(student, weight):
    if weight is None:
        weight = 0.5  # the paper's, unless it is set
    else:
        student.weight = weight
    data = small_batch(student)
    losses = student(**data, mode='loss')
    again = copy.deepcopy(student)  # the same BatchNorm statistics of the batch
    logits = again.head(again.extract_feat(data['inputs']))
    labels = torch.stack([s.gt_label for s in data['data_samples']]).flatten()
    with torch.no_grad():
        taught = student.teacher.module(data['inputs'], mode='tensor').argmax(1)
    assert len(taught.unique()) > 1 or (taught != labels).any()
    own = F.cross_entropy(logits, labels, label_smoothing=0.1)
    teachers = F.cross_entropy(logits, taught)
    torch.testing.assert_close(losses['loss_own'], (1 - weight) * own)
    torch.testing.assert_close(losses['loss_teacher'], weight * teachers)
    total, _ = student.parse_losses(losses)
    torch.testing.assert_close(total, (1 - weight) * own + weight * teachers)


def test_the_teacher_sees_the_augmented_batch(monkeypatch):
    """Mixed images, as the student does, and the mixed labels count in its own loss."""
    augments = dict(augments=[dict(type='Mixup', alpha=0.8), dict(type='CutMix', alpha=1.0)])
    cfg = small_config(teacher=dict(TIMM_TEACHER), train_cfg=augments)
    model = build(cfg).train()
    np.random.seed(0)
    torch.manual_seed(0)
    seen = {}
    monkeypatch.setattr(model, 'teach', lambda x: seen.setdefault('x', x).new_zeros(4).long())
    data = small_batch(model)
    model(**data, mode='loss')
    assert seen['x'] is data['inputs']
    plain = build(small_config(teacher=dict(TIMM_TEACHER))).train()
    assert not torch.equal(seen['x'], small_batch(plain)['inputs'])


def test_teachers_that_cannot_be(tmp_path):
    cases = (
        dict(type='TimmClassifier', model_name='no_such_model', pretrained=False),
        dict(type='NoClassifier'),
    )
    for teacher in cases:
        with pytest.raises(FastViTError) as error:
            build(small_config(teacher=teacher))
        assert teacher.get('model_name', teacher['type']) in str(error.value)
        assert '\n' not in str(error.value)
    model = build(small_config()).train()  # to test with, no teacher is needed
    with pytest.raises(FastViTError, match='teacher'):
        model(**small_batch(model), mode='loss')
    with torch.no_grad():
        assert model.eval()(small_batch(model)['inputs']).shape == (4, 10)


def test_a_wrong_teacher_is_one_line_of_the_tools(home, monkeypatch, capfd):
    monkeypatch.chdir(home)
    args = [DISTILLED[0], '--demo', '--cfg-options', 'model.teacher.model_name=no_such_model']
    with pytest.raises(SystemExit) as end:
        launch.run(lambda _: load_tool('train').main(args))
    refusal((end.value.code, capfd.readouterr().err.strip()), 'no_such_model', 'teacher')


def test_teacher_of_the_configs():
    """It has weights in timm, made on images normalized as ours are, for classes in our order."""
    cfg = Config.fromfile(ROOT / DISTILLED[0])
    theirs = timm.get_pretrained_cfg(cfg.model.teacher.model_name)
    assert theirs.architecture == 'regnety_160' and theirs.tag == 'deit_in1k'
    assert theirs.num_classes == 1000 == cfg.model.head.num_classes and theirs.has_weights
    assert not theirs.label_offset
    ours = cfg.data_preprocessor
    assert ours.mean == pytest.approx([255 * v for v in theirs.mean], abs=1e-3)
    assert ours.std == pytest.approx([255 * v for v in theirs.std], abs=1e-3)
    assert ours.to_rgb and timm.is_model(theirs.architecture)


@torch.no_grad()
def test_the_teacher_sees_what_it_was_trained_on():
    """From an image as OpenCV reads it to a class of RegNetY-16GF, as by timm's own transform."""
    cfg = Config.fromfile(ROOT / 'configs/classification/fastvit_t8_dist_in1k.py')
    cfg.model.teacher.pretrained = False
    model = build(cfg).train()
    teacher = model.teacher.module
    assert sum(p.numel() for p in teacher.parameters()) == 83_590_140  # timm's table: 83.59 M
    reference = randomize(teacher.model)
    assert type(reference) is timm.models.RegNet and not reference.training

    images = np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3), np.uint8)
    images[:, :, :, 0] //= 4  # red and blue are told apart
    settings = timm.data.resolve_data_config({}, model=reference, verbose=False)
    settings |= dict(input_size=(3, 64, 64), crop_pct=1.0)
    transform = timm.data.create_transform(**settings)
    theirs = torch.stack([transform(Image.fromarray(i)) for i in images])
    ours = [torch.from_numpy(i[:, :, ::-1].copy()).permute(2, 0, 1) for i in images]
    seen = model.data_preprocessor(dict(inputs=ours), True)['inputs']
    torch.testing.assert_close(seen, theirs, rtol=0, atol=1e-4)
    expected = reference(theirs)
    assert len(expected.argmax(1).unique()) > 1
    assert torch.equal(model.teach(seen), expected.argmax(1))
