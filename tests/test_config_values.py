"""Every value of every config. What each should be stands in the configs of mmpretrain, mmdet and
mmseg for the nearest network, and here, where FastViT's recipe differs from those. Nothing else
may differ."""

import copy
import inspect
import re
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.runner import Runner
from test_configs import CONFIGS as ALL_CONFIGS
from test_configs import ROOT

from fastvit_mm import FastViT

# Hand meshes have no config elsewhere to compare with.
# the paper's; tests/test_family.py has MobileCLIP's
CONFIGS = [c for c in ALL_CONFIGS if not re.search('hand_mesh|mci|_hd_', c)]
# Widths; drop path, plain and distilled; share of the image that is kept in evaluation.
VARIANTS = dict(
    t8=([48, 96, 192, 384], 0, 0, 0.9),
    t12=([64, 128, 256, 512], 0, 0, 0.9),
    s12=([64, 128, 256, 512], 0, 0, 0.9),
    sa12=([64, 128, 256, 512], 0.1, 0, 0.9),
    sa24=([64, 128, 256, 512], 0.1, 0.05, 0.9),
    sa36=([64, 128, 256, 512], 0.2, 0.1, 0.95),
    ma36=([76, 152, 304, 608], 0.35, 0.2, 0.95),
)
TEACHER = dict(
    type='TimmClassifier', model_name='regnety_160.deit_in1k', pretrained=True, num_classes=1000
)
GONE = object()  # in place of a value: the nearest network's config has it, ours does not
NEAREST = dict(
    classification=('mmpretrain', 'swin_transformer/swin-tiny_16xb64_in1k.py'),
    detection=('mmdet', 'mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py'),
    segmentation=('mmseg', 'poolformer/fpn_poolformer_s12_8xb4-40k_ade20k-512x512.py'),
)
# What a run reads; anything else in a config is a variable of its file.
READ = {*inspect.signature(Runner.__init__).parameters, 'custom_imports', 'sync_bn'}
VARIABLES = {'dataset', 'train_pipeline', 'test_pipeline', 'bgr_mean', 'bgr_std', 'vis_backends'}


def backbone(arch, rate, **settings):
    return dict(type='FastViT', arch=arch, drop_path_rate=rate, **settings)


def pretrained(arch):
    return dict(type='Pretrained', checkpoint=f'fastvit_{arch}.apple_in1k')


def of_all(best):
    return {
        'custom_imports': dict(imports=['fastvit_mm'], allow_failed_imports=False),
        'default_hooks.checkpoint.type': 'WholeCheckpointHook',
        'default_hooks.checkpoint.max_keep_ckpts': 3,
        'default_hooks.checkpoint.save_best': best,
        'default_hooks.signals': dict(type='StopOnSignalHook'),
        'default_hooks.finite': dict(type='FiniteLossHook'),
        'randomness': dict(seed=42),
    }


def classification(arch, kind):
    widths, plain, taught, kept = VARIANTS[arch]
    distilled, fine = kind == 'dist', kind == '384'
    size, images = (384, 64) if fine else (256, 128)
    strong = arch == 'ma36' or (distilled and arch.startswith(('sa', 'ma')))
    changes = of_all('accuracy/top1') | {
        'custom_imports.imports': ['fastvit_mm.transforms'],
        'model.backbone': backbone(arch, taught if distilled else plain, out_indices=[3]),
        'model.neck': dict(type='FastViTNeck', in_channels=widths[-1]),
        'model.head.in_channels': 2 * widths[-1],
        'model.head.init_cfg': dict(type='TruncNormal', layer='Linear', std=0.02),
        'model.head.cal_acc': GONE,
        'model.head.topk': [1, 5],
        'model.init_cfg': pretrained(arch) if fine else GONE,
        'model.train_cfg.augments.0.alpha': 0.8 if strong else 0.2,
        'data_preprocessor.type': 'FastClsDataPreprocessor',
        'optim_wrapper.type': 'OptimWrapper',
        'optim_wrapper.optimizer.lr': 5e-5 if fine else 1e-3,
        'optim_wrapper.optimizer.weight_decay': 1e-8 if fine else 0.05,
        'optim_wrapper.optimizer.betas': GONE,  # torch's own
        'optim_wrapper.optimizer.eps': GONE,
        'optim_wrapper.clip_grad': GONE,
        'optim_wrapper.paramwise_cfg': dict(norm_decay_mult=0.0, bias_decay_mult=0.0),
        'param_scheduler.0': dict(
            type='LinearLR',
            start_factor=0.02 if fine else 0.001,  # from 1e-6
            begin=0,
            end=5,
            convert_to_iter_based=True,
        ),
        'param_scheduler.1': dict(
            type='CosineAnnealingLR',
            T_max=25 if fine else 295,
            eta_min=1e-5,
            begin=5,
            end=30 if fine else 300,
        ),
        'train_cfg.max_epochs': 30 if fine else 310,
        'auto_scale_lr': dict(enable=False, base_batch_size=8 * images),
        'custom_hooks': [
            dict(type='EMAHook', momentum=5e-4, update_buffers=True, priority='ABOVE_NORMAL'),
            dict(type='SyncStatisticsHook'),
        ],
        'default_hooks.logger.interval': 50,
        'env_cfg.cudnn_benchmark': True,
        'randomness.diff_rank_seed': True,
        'train_dataloader.drop_last': True,
        'train_dataloader.collate_fn': dict(type='default_collate'),
        'train_dataloader.dataset.pipeline.1.scale': size,
    }
    for i, name in ((1, 'RandomResizedCrop'), (2, 'RandomFlip'), (4, 'RandomErasing')):
        changes[f'train_dataloader.dataset.pipeline.{i}.type'] = f'Fast{name}'
    changes['train_dataloader.dataset.pipeline.5.type'] = 'FastPackInputs'
    for split in ('train', 'val', 'test'):
        changes[f'{split}_dataloader.batch_size'] = images
        changes[f'{split}_dataloader.num_workers'] = 8
        changes[f'{split}_dataloader.persistent_workers'] = True
        changes[f'{split}_dataloader.pin_memory'] = True
        if split != 'train':
            changes[f'{split}_dataloader.dataset.pipeline.1.scale'] = int(size / kept)
            changes[f'{split}_dataloader.dataset.pipeline.2.crop_size'] = size
    if distilled:
        names = ['fastvit_mm.models.distillation', 'fastvit_mm.transforms']
        changes['custom_imports.imports'] = names
        changes['model.type'] = 'DistilledImageClassifier'
        changes['model.teacher'] = TEACHER
    return changes


ADAMW = dict(type='AdamW', lr=2e-4, weight_decay=1e-4)


def detection(arch, kind):
    widths, rate, *_ = VARIANTS[arch]
    return of_all('coco/bbox_mAP') | {
        'custom_imports.imports': ['fastvit_mm.data.coco'],
        'model.backbone': backbone(arch, rate, feature_norm=True, init_cfg=pretrained(arch)),
        'model.neck.in_channels': widths,
        'optim_wrapper.optimizer': ADAMW,
        'train_dataloader.num_workers': 4,
        'visualizer.name': GONE,
        'val_evaluator.format_only': GONE,
        'test_evaluator.format_only': GONE,
        'custom_hooks': [dict(type='SyncStatisticsHook')],
    }


def segmentation(arch, kind):
    widths, rate, *_ = VARIANTS[arch]
    changes = of_all('mIoU') | {
        'model.backbone': backbone(arch, rate, feature_norm=True, init_cfg=pretrained(arch)),
        'model.neck.in_channels': widths,
        'model.data_preprocessor.test_cfg': dict(size_divisor=32),
        'model.decode_head.norm_cfg': dict(type='BN'),
        'visualizer.name': GONE,
        'sync_bn': 'torch',
        'data_preprocessor': GONE,  # the model has it
        'optim_wrapper': dict(type='OptimWrapper', optimizer=ADAMW),
        'auto_scale_lr': dict(enable=False, base_batch_size=32),
        # An endless sampler needs no repetition, and padding no stretching.
        'train_dataloader.dataset.times': GONE,
        'train_dataloader.dataset': lambda repeated: repeated['dataset'],
        'val_dataloader.dataset.pipeline.2': GONE,
        'test_dataloader.dataset.pipeline.2': GONE,
        # ADE20K's class says so, and warns if it is said twice.
        'train_dataloader.dataset.pipeline.1.reduce_zero_label': GONE,
        'val_dataloader.dataset.pipeline.2.reduce_zero_label': GONE,
        'test_dataloader.dataset.pipeline.2.reduce_zero_label': GONE,
        'default_hooks.visualization': GONE,  # --show-dir draws
    }
    return changes


EXPECTED = dict(classification=classification, detection=detection, segmentation=segmentation)


def change(tree, path, value):
    *way, last = (int(k) if k.isdigit() else k for k in path.split('.'))
    for key in way:
        tree = tree[key] if isinstance(tree, list) else tree.setdefault(key, {})
    if value is GONE:
        del tree[last]
    else:
        tree[last] = value(tree[last]) if callable(value) else copy.deepcopy(value)


def plain(node):
    """Tuples as lists; without what says nothing: None and a drop path of 0."""
    if isinstance(node, dict):
        kept = {k: plain(v) for k, v in node.items() if v is not None}
        if not kept.get('drop_path_rate', 1):
            del kept['drop_path_rate']
        return kept
    return [plain(v) for v in node] if isinstance(node, list | tuple) else node


def flat(node, path=''):
    """path -> value of each leaf, for a legible difference."""
    found = {}
    for key, child in node.items() if isinstance(node, dict) else enumerate(node):
        inner = isinstance(child, dict | list) and child
        found |= flat(child, f'{path}{key}.') if inner else {f'{path}{key}': child}
    return found


def settings(file):
    """What a run reads of a config, and the names of the rest."""
    tree = plain(Config.fromfile(file, import_custom_modules=False).to_dict())
    return {k: v for k, v in tree.items() if k in READ}, set(tree) - READ


def parts(path):
    """(task, variant, dist or 384 or neither) of a config's path."""
    name = Path(path).stem.replace('mask_rcnn_', '').replace('fpn_', '').split('_')
    return Path(path).parent.name, name[1], name[2] if 'classification' in path else None


@pytest.mark.parametrize('path', CONFIGS)
def test_every_value(path):
    task, arch, kind = parts(path)
    package, name = NEAREST[task]
    folder = Path(find_spec(package).origin).parent / '.mim' / 'configs'
    expected, _ = settings(folder / name)
    for where, value in EXPECTED[task](arch, kind).items():
        change(expected, where, value)
    ours, variables = settings(ROOT / path)
    assert flat(ours) == flat(plain(expected))
    assert variables <= VARIABLES


def test_nothing_is_left_out():
    """Every leaf of a config is compared."""
    for task in NEAREST:
        path = ROOT / next(p for p in CONFIGS if task in p)
        everything = flat(plain(Config.fromfile(path, import_custom_modules=False).to_dict()))
        compared = {k for k in everything if k.split('.')[0] not in VARIABLES}
        assert compared == set(flat(settings(path)[0])) and len(compared) > 80


# Table 2 of the paper; the authors' code has the layer scales.
TABLE = dict(
    t8=((2, 2, 4, 2), 3, 'RepMixer', 1e-5),
    t12=((2, 2, 6, 2), 3, 'RepMixer', 1e-5),
    s12=((2, 2, 6, 2), 4, 'RepMixer', 1e-5),
    sa12=((2, 2, 6, 2), 4, 'attention', 1e-5),
    sa24=((4, 4, 12, 4), 4, 'attention', 1e-5),
    sa36=((6, 6, 18, 6), 4, 'attention', 1e-6),
    ma36=((6, 6, 18, 6), 4, 'attention', 1e-6),
)


@pytest.mark.parametrize('arch', TABLE)
def test_every_value_of_a_variant(arch):
    depths, ratio, mixer, scale = TABLE[arch]
    network = FastViT(arch)
    settings = network.settings
    assert tuple(settings['depths']) == depths == tuple(len(s.blocks) for s in network.stages)
    assert list(settings['widths']) == VARIANTS[arch][0]
    assert settings['ffn_ratio'] == ratio
    assert list(settings['attention']) == [0, 0, 0, mixer == 'attention']
    gammas = [p for n, p in network.named_parameters() if n.endswith('gamma')]
    assert len(gammas) == 2 * sum(depths)
    assert all((gamma == torch.tensor(scale)).all() for gamma in gammas)
