"""FastViT and its deploy form inside models of other people's making, from their own configs."""

import re
from importlib import import_module
from pathlib import Path

import mmcv
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.evaluator import BaseMetric
from mmengine.model import revert_sync_batchnorm
from mmengine.optim import OptimWrapper
from mmengine.registry import DATASETS, HOOKS, MODELS, init_default_scope
from mmengine.runner import Runner
from mmengine.structures import InstanceData, PixelData
from randomize import randomize, relative
from test_tools import CLASSIFICATION, shallow
from torch.utils.data import Dataset

import fastvit_mm
from fastvit_mm import FastViT
from fastvit_mm.reparameterize import compare, mergeable, tensors

SIZE = 64
WIDTHS = [16, 32, 64, 64]
ARCH = dict(depths=(1, 1, 1, 1), widths=WIDTHS, ffn_ratio=2, attention=(0, 0, 0, 1))

# Which config the package ships, and what a project changes in it to have FastViT: the backbone
# (its outputs, all of which the model uses), and where the model says which of them it takes.
DETECTORS = {
    'RetinaNet': (
        'retinanet/retinanet_r50_fpn_1x_coco.py',
        (1, 2, 3),
        dict(neck=dict(in_channels=WIDTHS[1:], start_level=0)),
    ),
    'Cascade Mask R-CNN': (
        'cascade_rcnn/cascade-mask-rcnn_r50_fpn_1x_coco.py',
        (0, 1, 2, 3),
        dict(neck=dict(in_channels=WIDTHS)),
    ),
    'RTMDet-Ins': (
        'rtmdet/rtmdet-ins_s_8xb32-300e_coco.py',
        (1, 2, 3),
        dict(neck=dict(in_channels=WIDTHS[1:])),
    ),
    'Mask2Former': (
        'mask2former/mask2former_r50_8xb2-lsj-50e_coco.py',
        (0, 1, 2, 3),
        dict(data_preprocessor=dict(batch_augments=None), panoptic_head=dict(in_channels=WIDTHS)),
    ),
}
SEGMENTORS = {
    'UPerNet': (
        'upernet/upernet_r50_4xb4-160k_ade20k-512x512.py',
        (0, 1, 2, 3),
        dict(decode_head=dict(in_channels=WIDTHS), auxiliary_head=dict(in_channels=WIDTHS[2])),
    ),
    'DeepLabV3+': (
        'deeplabv3plus/deeplabv3plus_r50-d8_4xb4-160k_ade20k-512x512.py',
        (0, 2, 3),
        dict(
            decode_head=dict(in_channels=WIDTHS[3], in_index=2, c1_in_channels=WIDTHS[0]),
            auxiliary_head=dict(in_channels=WIDTHS[2], in_index=1),
        ),
    ),
    'SegFormer head': (
        'segformer/segformer_mit-b0_8xb2-160k_ade20k-512x512.py',
        (0, 1, 2, 3),
        dict(decode_head=dict(in_channels=WIDTHS)),
    ),
    'Mask2Former': (
        'mask2former/mask2former_r50_8xb2-160k_ade20k-512x512.py',
        (0, 1, 2, 3),
        dict(decode_head=dict(in_channels=WIDTHS)),
    ),
}
SELF_SUPERVISED = {
    'MoCo v3': 'mocov3/mocov3_resnet50_8xb512-amp-coslr-100e_in1k.py',
    'SimSiam': 'simsiam/simsiam_resnet50_8xb32-coslr-100e_in1k.py',
}
# The same models, narrow and shallow, with few queries and regions.
CHANNELS = (
    *('in_channels', 'out_channels', 'feat_channels', 'channels', 'hid_channels', 'embed_dims'),
    *('conv_out_channels', 'fc_out_channels', 'feedforward_channels'),
)
LIMITS = dict.fromkeys(CHANNELS, 64) | dict(
    num_feats=32,
    num_layers=2,
    num_queries=8,
    num_points=64,
    num=32,
    nms_pre=50,
    max_per_img=20,
    max_per_image=20,
)


def shrink(node):
    for key, value in node.items() if isinstance(node, dict) else enumerate(node):
        if key in LIMITS and isinstance(value, int):
            node[key] = min(value, LIMITS[key])
        elif isinstance(value, dict | list):
            shrink(value)


def build(package, file, out_indices, changes):
    """A shipped config's model with a small FastViT as its backbone."""
    root = import_module(package).__path__[0]
    cfg = Config.fromfile(Path(root, '.mim', 'configs', file))
    backbone = dict(_delete_=True, type='FastViT', arch=ARCH, out_indices=out_indices)
    backbone.update(feature_norm=package != 'mmpretrain')
    cfg.merge_from_dict(dict(model=dict(backbone=backbone, **changes)))
    cfg.model.pop('pretrained', None)
    if package == 'mmseg':
        cfg.model.data_preprocessor.size = (SIZE, SIZE)
    if package == 'mmpretrain':
        cfg.model.data_preprocessor = cfg.data_preprocessor
    shrink(cfg.model)
    torch.manual_seed(0)
    init_default_scope(package)
    # As the packages' own APIs do, where there is no process group.
    model = revert_sync_batchnorm(MODELS.build(cfg.model))
    model.init_weights()
    return model


def noise(i):
    generator = torch.Generator().manual_seed(i)
    return torch.randint(0, 256, (3, SIZE, SIZE), generator=generator, dtype=torch.uint8)


META = dict(
    img_shape=(SIZE, SIZE),
    ori_shape=(SIZE, SIZE),
    pad_shape=(SIZE, SIZE),
    batch_input_shape=(SIZE, SIZE),
    scale_factor=(1.0, 1.0),
    img_path='',
)


def detection_sample(i):
    from mmdet.structures import DetDataSample
    from mmdet.structures.bbox import HorizontalBoxes
    from mmdet.structures.mask import BitmapMasks

    boxes = [(4, 6, 40, 50), (20, 8, 60, 30), (34, 30, 60, 62)]
    masks = np.zeros((len(boxes), SIZE, SIZE), np.uint8)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes, strict=True):
        mask[y0:y1, x0:x1] = 1
    instances = InstanceData(
        bboxes=HorizontalBoxes(torch.tensor(boxes).float()),
        labels=torch.tensor([3, 7, 41]),
        masks=BitmapMasks(masks, SIZE, SIZE),
    )
    sample = DetDataSample(metainfo={**META, 'img_id': i})
    sample.gt_instances, sample.ignored_instances = instances, instances[:0]
    return sample


def segmentation_sample(i):
    from mmseg.structures import SegDataSample

    labels = torch.arange(SIZE * SIZE).view(1, SIZE, SIZE) // 512 + i  # bands
    return SegDataSample(metainfo=META, gt_sem_seg=PixelData(data=labels))


def batch(make_sample):
    return dict(
        inputs=[noise(i) for i in range(2)], data_samples=[make_sample(i) for i in range(2)]
    )


def train_one_step(model, data):
    """The step of mmengine's training loops."""
    model.train()
    before = {name: p.detach().clone() for name, p in model.backbone.named_parameters()}
    reached = set()
    for name, p in model.backbone.named_parameters():
        p.register_hook(lambda grad, name=name: reached.add(name) if grad.any() else None)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0)
    losses = model.train_step(data, OptimWrapper(optimizer))
    assert losses
    for name, value in losses.items():
        assert torch.isfinite(torch.as_tensor(value)).all(), name
    for name, p in model.backbone.named_parameters():
        assert name in reached, f'no gradient: {name}'
        assert not torch.equal(p, before[name]), f'unchanged: {name}'


def predicted(samples):
    """All that a list of predictions says, as tensors."""
    found = []
    for sample in samples:
        for key in ('pred_instances', 'pred_sem_seg', 'seg_logits'):
            found.extend(torch.as_tensor(v) for v in sample.get(key, {}).values())
    return found


def raw_outputs(model, data):
    ready = model.data_preprocessor(data)
    if type(getattr(model, 'decode_head', None)).__name__ == 'Mask2FormerHead':
        # mode='tensor' fails in mmseg itself: this head's forward() wants the samples too.
        return tensors(model.decode_head(model.extract_feat(ready['inputs']), data['data_samples']))
    return tensors(model(**ready, mode='tensor'))


def in_float64(backbone):
    """Computes in float64 inside. What rounding is left turns no threshold's answer in the heads,
    which otherwise amplify it from stage to stage (Cascade R-CNN's boxes) or cut it (masks)."""
    backbone.double()
    backbone.register_forward_pre_hook(lambda module, args: tuple(a.double() for a in args))
    backbone.register_forward_hook(lambda module, args, out: tuple(o.float() for o in out))


def check_same(found, expected, limit):
    assert len(found) == len(expected) > 0
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert a.shape == b.shape and b.numel(), i
        if a.is_floating_point():
            assert torch.isfinite(b).all(), i
            assert relative(a, b) < limit, i
        else:
            assert (a != b).float().mean() < limit, i


@torch.no_grad()
def check_deploy_form(model, data):
    """Same raw outputs and same predictions in both forms, for weights that tell them apart."""
    randomize(model.eval())
    inputs = model.data_preprocessor(data)['inputs']
    in_float32 = fastvit_mm.reparameterize(model)
    check_same(in_float32.backbone(inputs), model.backbone(inputs), limit=1e-5)

    in_float64(model.backbone)
    merged = fastvit_mm.reparameterize(model)
    assert set(mergeable(model)) == {'backbone'}
    assert any('conv_scale' in k for k in model.state_dict())
    assert not any('conv_scale' in k for k in merged.state_dict())
    check_same(raw_outputs(merged, data), raw_outputs(model, data), limit=1e-5)
    predictions = (predicted(m.test_step(data)) for m in (merged, model))
    check_same(*predictions, limit=1e-5)


@pytest.mark.parametrize('name', DETECTORS)
def test_mmdet(name):
    model = build('mmdet', *DETECTORS[name])
    train_one_step(model, batch(detection_sample))
    check_deploy_form(model, batch(detection_sample))


@pytest.mark.parametrize('name', SEGMENTORS)
def test_mmseg(name):
    model = build('mmseg', *SEGMENTORS[name])
    train_one_step(model, batch(segmentation_sample))
    check_deploy_form(model, batch(segmentation_sample))


@pytest.mark.parametrize('name', SELF_SUPERVISED)
def test_mmpretrain(name):
    """Pre-train, then merge the backbone that came out of it."""
    model = build('mmpretrain', SELF_SUPERVISED[name], (3,), {})
    views = [
        torch.stack([noise(0), noise(1)]),
        torch.stack([noise(2), noise(3)]),
    ]  # of two images each
    data = dict(inputs=views, data_samples=None)
    train_one_step(model, data)

    randomize(model.eval().backbone)
    with torch.no_grad():
        inputs = model.data_preprocessor(data)['inputs'][0]
        expected = model.extract_feat(inputs)[0]
        merged = fastvit_mm.reparameterize(model)
        assert relative(merged.extract_feat(inputs)[0], expected) < 1e-5
        model.backbone.switch_to_deploy()
        assert relative(model.extract_feat(inputs)[0], expected) < 1e-5
    assert not any('conv_scale' in k for k in model.backbone.state_dict())


class Images(Dataset):
    def __init__(self, make_sample):
        self.make_sample = make_sample

    def __len__(self):
        return 3

    def __getitem__(self, i):
        return dict(inputs=noise(i), data_samples=self.make_sample(i))


class Keep(BaseMetric):
    """Keeps the predictions of a test."""

    def process(self, data_batch, data_samples):
        self.results.extend(data_samples)

    def compute_metrics(self, results):
        self.kept = predicted(results)
        return dict(images=len(results))


@pytest.mark.parametrize(
    'package, project, make_sample',
    [
        ('mmdet', DETECTORS['RetinaNet'], detection_sample),
        ('mmseg', SEGMENTORS['UPerNet'], segmentation_sample),
    ],
    ids=['mmdet', 'mmseg'],
)
def test_by_the_runner(package, project, make_sample, tmp_path):
    """The hook in a test of mmengine's own Runner, with nothing of ours but the backbone."""
    model = randomize(build(package, *project))
    kept = []
    for hooks in ([], [dict(type='ReparameterizeHook')]):
        metric = Keep()
        runner = Runner(
            model,
            work_dir=str(tmp_path / f'run{len(hooks)}'),
            test_dataloader=dict(
                dataset=Images(make_sample),
                sampler=dict(type='DefaultSampler', shuffle=False),
                batch_size=2,
                collate_fn=dict(type='pseudo_collate'),
            ),
            test_cfg=dict(),
            test_evaluator=metric,
            custom_hooks=hooks,
            default_scope=package,
            experiment_name=f'{tmp_path.name}-{len(hooks)}',
            log_level='ERROR',
        )
        assert runner.test() == dict(images=3)
        assert runner.model is model
        kept.append(metric.kept)
    plain, merged = kept
    check_same(merged, plain, limit=1e-4)
    assert any(not torch.equal(a, b) for a, b in zip(merged, plain, strict=True))


def test_a_model_in_float64():
    """Nothing is more exact to measure its rounding by; it is explained all the same."""
    model = randomize(FastViT('t8')).double().eval()
    inputs = torch.stack([noise(0)]).double() / 128 - 1
    agreement = compare(model, fastvit_mm.reparameterize(model), inputs)
    assert 0 < agreement.difference <= agreement.limit < 1e-12


PAGE = Path(__file__).parents[1] / 'docs' / 'use_in_your_project.md'
BLOCKS = re.findall(r'```python\n(.*?)```', PAGE.read_text(), re.S)
PROJECTS = [block for block in BLOCKS if block.startswith('_base_')]


def classification_batch(cfg):
    """From the folders that the page describes, through both of the config's pipelines."""
    for split in ('train', 'val'):
        for i in range(10):
            path = Path(cfg.mine.data_root, split, f'class_{i}', 'a.png')
            mmcv.imwrite(noise(i).permute(1, 2, 0).numpy(), str(path))
    datasets = [DATASETS.build(cfg[f'{s}_dataloader'].dataset) for s in ('train', 'val', 'test')]
    assert [len(d) for d in datasets] == [10, 10, 10]
    assert datasets[1].img_prefix.endswith('val') and datasets[2].img_prefix.endswith('val')
    items = [datasets[0][i] for i in range(2)]
    return {key: [item[key] for item in items] for key in items[0]}


@pytest.mark.parametrize('block', PROJECTS, ids=['detector', 'segmenter', 'classifier'])
def test_the_pages_projects(block, tmp_path, monkeypatch):
    """As written, with a stand-in for the published weights where a download would be kept."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path))
    assert len(block.splitlines()) <= 16
    (tmp_path / 'project.py').write_text(block)
    cfg = Config.fromfile('project.py')
    init_default_scope(cfg.default_scope)
    if cfg.default_scope == 'mmseg':
        cfg.model.data_preprocessor.size = (SIZE, SIZE)
    if cfg.default_scope == 'mmpretrain':
        cfg.model.data_preprocessor = cfg.data_preprocessor
    cfg.model.backbone.drop_path_rate = 0.0  # a dropped block would get no gradient
    torch.manual_seed(0)
    model = revert_sync_batchnorm(MODELS.build(cfg.model))

    source = (cfg.model.backbone.get('init_cfg') or cfg.model.init_cfg).checkpoint
    published = randomize(FastViT(source.split('.')[0].removeprefix('fastvit_'))).state_dict()
    (tmp_path / 'checkpoints').mkdir()
    torch.save(published, tmp_path / 'checkpoints' / f'{source}.pth.tar')
    model.init_weights()
    own = model.backbone.state_dict()
    assert all(torch.equal(own[k], v) for k, v in published.items() if k in own)

    if cfg.default_scope == 'mmpretrain':
        data = classification_batch(cfg)
    else:
        data = batch(detection_sample if cfg.default_scope == 'mmdet' else segmentation_sample)
    train_one_step(model, data)
    model.eval()
    with torch.no_grad():
        for m in (model, fastvit_mm.reparameterize(model)):
            assert len(m.test_step(data)) == 2


def test_the_pages_last_lines(tmp_path, monkeypatch):
    hook, example = BLOCKS[len(PROJECTS) :]
    exec(hook, names := {})
    built = [HOOKS.build(h) for h in names['custom_hooks']]
    assert [type(h) for h in built] == [fastvit_mm.ReparameterizeHook]

    line = re.search(r'`(custom_hooks = .*)`', PAGE.read_text())[1]
    (tmp_path / 'project.py').write_text(PROJECTS[-1] + line)
    kept = Config.fromfile(tmp_path / 'project.py').custom_hooks
    (tmp_path / 'project.py').write_text(PROJECTS[-1])
    inherited = Config.fromfile(tmp_path / 'project.py').custom_hooks
    assert inherited[0].type == 'EMAHook'
    assert kept == [*inherited, dict(type='ReparameterizeHook')]

    monkeypatch.chdir(tmp_path)
    shallow(CLASSIFICATION, tmp_path).rename('my_config.py')
    model = fastvit_mm.init_model('my_config.py')
    torch.save(dict(state_dict=model.state_dict()), 'my_checkpoint.pth')
    for i, name in enumerate(('image.jpg', 'other.jpg')):
        mmcv.imwrite(noise(i).permute(1, 2, 0).numpy(), name)
    exec(example, names := {})
    assert names['result']['pred_label'] in range(1000)
    assert names['results'][0]['pred_score'] == pytest.approx(names['result']['pred_score'])
    assert len(names['results']) == 2
    assert not any('conv_scale' in k for k in names['model'].state_dict())
