"""Mistakes in configs and in --cfg-options: one line that says what was meant, before anything is
built or written; and none where there is no mistake."""

import inspect
import os
import re
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import LoggerHook
from mmengine.model import BaseModel
from mmengine.registry import DATASETS, HOOKS, MODELS, OPTIMIZERS, DefaultScope
from test_configs import CONFIGS as ALL_CONFIGS
from test_tools import ROOT, load_tool, refusal
from torch.optim import SGD, AdamW
from torch.utils.data import DataLoader

import fastvit_mm
from fastvit_mm import FastViTError, launch, settings
from fastvit_mm.cli.options import config_parser
from fastvit_mm.demo import apply_demo
from fastvit_mm.settings.names import Registered
from fastvit_mm.settings.signatures import accepted, definer

C = 'configs/classification/fastvit_t8_in1k.py'
D = 'configs/detection/mask_rcnn_fastvit_t8_coco.py'
S = 'configs/segmentation/fpn_fastvit_sa12_ade20k.py'
H = 'configs/hand_mesh/mano_fastvit_t8_freihand.py'
TASKS = (C, D, S, H)

# Options that are wrong with each task's config, and words of the line that says so.
EVERYWHERE = {
    # no options at all
    'lr': ('lr', 'key=value'),
    '=3': ('=3', 'key=value'),
    'model..arch=t8': ('model..arch', 'key=value'),
    'work_dir=[a,(b]': ('[a,(b]', 'cannot be read'),
    # nothing reads them
    'max_epoch=3': ('nothing reads max_epoch',),
    'batch_size=3': ('nothing reads batch_size', 'train_dataloader.batch_size'),
    'optimizer.lr=0.1': ('nothing reads optimizer', 'did you mean optim_wrapper.optimizer?'),
    'param_schedulers=None': ('param_schedulers', 'did you mean param_scheduler?'),
    'optim_wrapper.constructor=Decay': ("constructor='Decay' is not known",),
    'optim_wraper.optimizer.lr=0.1': ('optim_wraper', 'did you mean optim_wrapper?'),
    'dataset.data_root=/data': ('dataset is a variable', 'train_dataloader.dataset.data_root'),
    'optim_wrapper.optimizer.lrr=0.1': ('optim_wrapper.optimizer.lrr', 'did you mean lr?'),
    'optim_wrapper.optimiser.lr=0.1': ('optimiser', 'did you mean optimizer?'),
    'optim_wrapper.clip_grads.max_norm=1': ('clip_grads', 'did you mean clip_grad?'),
    'optim_wrapper.paramwise_cfg.norm_decay_mul=0': ('did you mean norm_decay_mult?',),
    'train_dataloader.batchsize=8': ('train_dataloader.batchsize', 'did you mean batch_size?'),
    'train_dataloader.dataset.dataroot=x': ('did you mean data_root?',),
    'train_dataloader.sampler.shufle=True': ('did you mean shuffle?',),
    'train_cfg.max_itres=3': ('train_cfg.max_itres', 'did you mean max_'),
    'default_hooks.checkpoint.max_keep_ckpt=2': ('did you mean max_keep_ckpts?',),
    'default_hooks.logger.intervall=2': ('LoggerHook takes no', 'did you mean interval?'),
    'model.backbone.drop_path=0.1': ('FastViT takes no', 'did you mean drop_path_rate?'),
    'model.bakbone.arch=t8': ('bakbone', 'did you mean backbone?'),
    'randomness.sead=1': ('randomness.sead', 'did you mean seed?'),
    'env_cfg.cudnn_benchmrk=True': ('did you mean cudnn_benchmark?',),
    'auto_scale_lr.enabled=True': ('did you mean enable?',),
    # unknown types
    'model.type=Classifier': ("model.type='Classifier'",),
    'model.backbone.type=FastVit': ('FastVit', 'did you mean FastViT?'),
    'model.backbone.act_cfg.type=Gelu': ('model.backbone.act_cfg', 'did you mean GELU?'),
    'model.backbone.norm_cfg.type=SyncBNN': ('model.backbone.norm_cfg', 'did you mean SyncBN?'),
    'model.backbone.init_cfg.type=Pretraind': ('did you mean Pretrained?',),
    'optim_wrapper.type=OptimizerWrapper': ('did you mean OptimWrapper?',),
    'optim_wrapper.optimizer.type=AdamWW': ('did you mean AdamW?',),
    'train_dataloader.sampler.type=Infinite': ('did you mean InfiniteSampler?',),
    'train_dataloader.dataset.pipeline.0.type=LoadImage': ('pipeline.0', 'LoadImage'),
    'default_hooks.timer.type=TimerHook': ('did you mean IterTimerHook?',),
    'param_scheduler.0.type=CosineLR': ('param_scheduler.0', 'CosineLR'),
    'default_scope=mmsegg': ('mmsegg', 'did you mean mmseg?'),
    # values of another kind
    'optim_wrapper.optimizer.lr=abc': ("lr='abc'", 'give a number'),
    'optim_wrapper.optimizer=AdamW': ('optim_wrapper.optimizer=AdamW', 'it is a dict'),
    'train_dataloader.batch_size=[8,8]': ('batch_size=[8, 8]', 'a whole number from 1 up'),
    'train_dataloader.batch_size=8.5': ('batch_size=8.5', 'a whole number'),
    'train_dataloader.persistent_workers=no': ('persistent_workers', 'no', 'True or False'),
    'train_dataloader.dataset=ImageNet': ('train_dataloader.dataset=ImageNet', 'it is a dict'),
    'train_dataloader.dataset.pipeline=fast': ('pipeline=fast', 'it is a list of dicts'),
    'model.backbone.with_cp=yes': ("with_cp='yes'", 'True or False'),
    'model.backbone.drop_path_rate=high': ('drop_path_rate', 'high', 'a number'),
    'model.backbone=FastViT': ('model.backbone=FastViT', 'it is a dict'),
    'model=None': ('no model',),
    'load_from=3': ('load_from=3',),
    'log_level=LOUD': ("log_level='LOUD'", 'WARNING'),
    'train_dataloader=None': ('belong together', 'without train_dataloader'),
    # values that make no sense
    'optim_wrapper.optimizer.lr=-0.1': ('lr=-0.1', 'a number from 0 up'),
    'optim_wrapper.optimizer.lr=nan': ('lr=nan', 'a number from 0 up'),
    'optim_wrapper.accumulative_counts=0': ('accumulative_counts=0', 'from 1 up'),
    'train_dataloader.batch_size=0': ('batch_size=0', 'from 1 up'),
    'train_dataloader.batch_size=-4': ('batch_size=-4', 'from 1 up'),
    'train_dataloader.num_workers=-1': ('num_workers=-1', 'from 0 up'),
    'train_dataloader.num_workers=0': ('persistent_workers=False',),
    'train_cfg.val_interval=0': ('val_interval=0', 'from 1 up'),
    'param_scheduler.0.end=-5': ('param_scheduler.0.end=-5',),
    'default_hooks.checkpoint.interval=0': ('interval=0', 'from 1 up or -1'),
    'default_hooks.logger.interval=0': ('interval=0', 'from 1 up'),
    'randomness.seed=-1': ('seed=-1', 'from 0 up'),
    'model.backbone.arch=sa48': ('model.backbone.arch', 'sa48', 't8, t12'),
    'model.backbone.arch=ma36': ('in_channels', 'ma36 gives', '608'),
    # paths that lead nowhere
    'model.backbone.arch.depth=1': ('model.backbone.arch is', 'no settings of its own'),
    'train_dataloader.dataset.pipeline.99.scale=1': ('99', '0 LoadImageFromFile'),
    'train_dataloader.dataset.pipeline.-1.scale=1': ("'-1'", '0 LoadImageFromFile'),
    'train_dataloader.dataset.pipeline.first.scale=1': ("'first'", '0 LoadImageFromFile'),
}
PER_TASK = {
    C: {
        'train_cfg.max_epochs=0': ('max_epochs=0', 'from 1 up'),
        'train_cfg.max_epochs=ten': ("max_epochs='ten'", 'give a number'),
        'model.head.num_classes=many': ("num_classes='many'", 'a number'),
        'model.head.in_channels=512': ('model.head.in_channels=768',),
        'model.train_cfg.augments.0.type=MixUpp': ('did you mean Mixup?',),
        'model.train_cfg.augments.1.alfa=1': ('CutMix takes no alfa', 'did you mean alpha?'),
        'val_evaluator.topkk=1': ('val_evaluator.topkk', 'did you mean topk?'),
        'train_dataloader.dataset.pipeline.4.erase_probability=1': ('did you mean erase_prob?',),
    },
    D: {
        'model.neck.in_channels=[64,128]': ('model.neck.in_channels=48,96,192,384',),
        'model.rpn_head.anchor_generator.type=AnchorGen': ('did you mean AnchorGenerator?',),
        'model.roi_head.bbox_head.num_class=3': ('did you mean num_classes?',),
        'model.test_cfg.rcnn.score_thrs=0.5': ('score_thrs', 'did you mean score_thr?'),
        'model.train_cfg.rpn.assigner.pos_iou_thrs=0.5': ('did you mean pos_iou_thr?',),
        'test_evaluator.metrics=bbox': ('test_evaluator.metrics', 'metric'),
    },
    S: {
        'train_cfg.max_iters=-1': ('max_iters=-1', 'from 1 up'),
        'train_cfg.max_epochs=3': ('IterBasedTrainLoop takes no max_epochs',),
        'model.decode_head.channel=3': ('did you mean channels?',),
        'model.decode_head.loss_decode.type=CrossEntropy': ('did you mean CrossEntropyLoss?',),
        'model.test_cfg.modus=slide': ('modus', 'did you mean mode?'),
        'train_dataloader.dataset.pipeline.3.crop_sise=3': ('did you mean crop_size?',),
    },
    H: {
        'model.head.hand_modell=x': ('ManoHead takes no', 'did you mean hand_model?'),
        'model.neck.in_channels=48': ('model.neck.in_channels=384',),
        'train_dataloader.dataset.pipeline.2.rotations=1': ('did you mean rotation?',),
    },
}
MISTAKES = [
    pytest.param(task, option, words, id=f'{task.split("/")[1]} {option}')
    for task in TASKS
    for option, words in (EVERYWHERE | PER_TASK[task]).items()
]


@pytest.fixture(scope='module')
def loaded():
    """Each task's config, read once."""
    return {task: Config.fromfile(ROOT / task) for task in TASKS}


@pytest.fixture
def train(loaded, monkeypatch, tmp_path, capfd):
    """Run tools/train.py in an empty folder; gives exit code and stderr."""
    monkeypatch.chdir(tmp_path)
    copies = {str(ROOT / task): cfg for task, cfg in loaded.items()}
    monkeypatch.setattr(
        launch.Config,
        'fromfile',
        lambda path, **_: Config(copies[str(path)].to_dict(), filename=str(path)),
    )

    def call(*args):
        capfd.readouterr()
        code = 0
        try:
            launch.run(load_tool('train').main, [str(a) for a in args])
        except SystemExit as end:
            code = end.code
        assert not any(tmp_path.iterdir()), 'it left something'
        return code, capfd.readouterr().err.strip()

    return call


@pytest.mark.parametrize('task, option, words', MISTAKES)
def test_mistakes(train, task, option, words):
    result = train(ROOT / task, '--cfg-options', option)
    refusal(result, *words)
    assert 'data set not found' not in result[1]


# What works today, also where it looks odd.
RIGHT = {
    'optim_wrapper.optimizer': ('lr=1', 'lr=0', 'betas=(0.9,0.99)', 'fused=True'),
    'train_dataloader': ('num_batch_per_epoch=3', 'drop_last=False', 'prefetch_factor=2'),
    'default_hooks.checkpoint': ('interval=-1', 'save_best=None', 'out_dir=x', 'save_last=False'),
    'default_hooks': ('early.type=EarlyStoppingHook early.monitor=x', 'timer=None'),
    'model.backbone': (
        'act_cfg.type=ReLU act_cfg.inplace=True',
        'norm_cfg.type=SyncBN norm_cfg.eps=0.001 norm_cfg.requires_grad=True',
        'init_cfg._delete_=True init_cfg.type=Pretrained init_cfg.checkpoint=x.pth',
        'with_cp=1',
        'frozen_stages=4',
    ),
    'optim_wrapper': (
        'type=AmpOptimWrapper loss_scale=dynamic',
        'clip_grad.max_norm=1.5 clip_grad.norm_type=2',
        'paramwise_cfg.custom_keys.backbone.lr_mult=0.1',
    ),
    'visualizer': ('vis_backends.0.type=TensorboardVisBackend', 'name=mine'),
    'custom_hooks.0': ('priority=LOW',),
    'train_dataloader.dataset': ('indices=4', 'metainfo.my_own_key=3', 'lazy_init=True'),
    'randomness': ('deterministic=True', 'seed=None'),
    'env_cfg': ('resource_limit=99', 'mp_cfg.mp_start_method=spawn', 'dist_cfg.backend=gloo'),
    '': ('resume=True', 'log_level=DEBUG', 'sync_bn=mmcv', 'compile=True', 'work_dir=x'),
}


@pytest.mark.parametrize('task', TASKS)
def test_what_is_right(loaded, task):
    for place, options in RIGHT.items():
        for option in options:
            pairs = [f'{place}.{pair}'.strip('.') for pair in option.split()]
            if 'custom_hooks' in place and task in (D, S):
                continue
            args = config_parser('').parse_args([task, '--cfg-options', *pairs])
            cfg = Config(loaded[task].to_dict())
            settings.check(cfg, settings.merge(cfg, args.cfg_options))


def keywords(target):
    return set(inspect.signature(target).parameters) - {'params', 'dataset', 'lr', 'num_workers'}


def options_for(place, names, **others):
    pairs = dict.fromkeys(names) | {n.replace('__', '.'): v for n, v in others.items()}
    return {f'{place}.{name}': value for name, value in pairs.items()}


DELETED = {'_delete_': True}
TAKEN = {
    'AdamW': options_for('optim_wrapper.optimizer', keywords(AdamW) - {'weight_decay', 'eps'}),
    'SGD': options_for(
        *('optim_wrapper.optimizer', keywords(SGD) - {'weight_decay', 'momentum'}),
        **(DELETED | dict(type='SGD', lr=0.1)),
    ),
    'DataLoader': options_for('train_dataloader', keywords(DataLoader) - {'sampler'}),
    'clip_grad': options_for('optim_wrapper.clip_grad', ['foreach', 'error_if_nonfinite']),
    'compile': options_for(
        'compile', keywords(torch.compile) - {'model', 'options'}, options__max_autotune=True
    ),
    'dist_cfg': options_for('env_cfg.dist_cfg', ['init_method', 'device_id']),
    'vis_backends': options_for(
        *('visualizer.vis_backends.0.init_kwargs', ['reinit', 'anonymous']),
    )
    | {'visualizer.vis_backends.0.type': 'WandbVisBackend'},
    'model_wrapper_cfg': options_for(
        *('model_wrapper_cfg', ['static_graph', 'bucket_cap_mb', 'mixed_precision']),
        type='MMDistributedDataParallel',
    ),
    'an activation': options_for('model.backbone.act_cfg', [], type='GELU', approximate='tanh'),
}


@pytest.mark.parametrize('name', TAKEN)
def test_what_torch_takes_may_be_an_option(loaded, name):
    cfg = Config(loaded[S].to_dict())
    settings.check(cfg, settings.merge(cfg, TAKEN[name]))


def test_adafactor_has_two_eps(loaded):
    cfg = Config(loaded[S].to_dict())
    cfg.optim_wrapper.optimizer = dict(type=AdamW, eps=(None, 1e-3))
    settings.check(cfg)


def test_sections_of_which_only_some_keys_are_read(loaded):
    """mmengine picks what it knows from them."""
    cfg = Config(loaded[S].to_dict())
    cfg.env_cfg.update(cudnn_deterministic=False, opencv_num_threads=0)
    cfg.auto_scale_lr = dict(base_batch_size=32, note='8 x 4')
    settings.check(cfg)
    cfg.env_cfg.cudnn_benchmrk = True
    with pytest.raises(FastViTError, match='did you mean cudnn_benchmark'):
        settings.check(cfg)


@pytest.mark.parametrize('path', ALL_CONFIGS)
def test_our_configs(path):
    cfg = Config.fromfile(ROOT / path)
    import fastvit_mm.transforms  # noqa: F401  (what the tools and init_model do)

    settings.check(cfg)
    settings.check_widths(cfg.model)


def test_a_demo(tmp_path, monkeypatch):
    monkeypatch.setattr('fastvit_mm.demo.config.draw', lambda root, name: 64)
    for task in TASKS:
        cfg = apply_demo(Config.fromfile(ROOT / task), tmp_path)
        settings.check(cfg)


# ------------------------------------------------------------------------ the packages' own configs

SHARE = int(os.environ.get('SHIPPED_CONFIGS', '25'))  # 1 checks all 2000


def shipped(package):
    folder = Path(find_spec(package).origin).parent / '.mim' / 'configs'
    return sorted(p for p in folder.rglob('*.py') if '_base_' not in p.parts)[::SHARE]


def really_wrong(message, cfg):
    """Whether mmengine could not build what a message refuses, either."""
    if kind := re.search(r"type='([^']+)' is not known", message):
        return not Registered(cfg.default_scope).get_anywhere(kind[1], ())
    if taken := re.search(r'(\w+) takes no (\w+)', message):
        with pytest.raises(TypeError) as refusal:
            Registered(cfg.default_scope).get_anywhere(taken[1], ())(**{taken[2]: 1})
        return f"unexpected keyword argument '{taken[2]}'" in str(refusal.value)
    # The first is refused by Runner's constructor; the second is a typo that mmseg ships: what
    # its config says of the model is ignored.
    return 'belong together' in message or 'nothing reads models: did you mean model?' in message


@pytest.mark.slow
@pytest.mark.parametrize('package', ['mmpretrain', 'mmdet', 'mmseg'])
def test_shipped_configs_are_right(package):
    """Not one is refused of the configs that mmpretrain, mmdet and mmseg ship and that could run
    here: some name types of packages that are not installed, or give a part of a stage."""
    checked = 0
    for path in shipped(package):
        try:
            cfg = Config.fromfile(path)
        except Exception:  # needs another package, or another family of packages
            continue
        if 'model' not in cfg or 'default_scope' not in cfg:
            continue
        try:
            settings.check(
                cfg, reads=settings.TRAIN if cfg.get('train_dataloader') else settings.TEST
            )
        except FastViTError as error:
            assert really_wrong(str(error), cfg), f'{path}: {error}'
        checked += 1
    assert checked > 15 or SHARE != 25


# ------------------------------------------------------------------------------- what a class takes


class Parent:
    def __init__(self, a, *, b: int = 0):
        pass


class HandsOn(Parent):
    def __init__(self, c, **kwargs):
        if 'd' in kwargs:
            kwargs.pop('d')
        self.e = kwargs.get('e')
        super().__init__(c, **kwargs)


class Grandchild(HandsOn):
    pass


class Keeps(Parent):
    def __init__(self, c, **kwargs):
        self.rest = kwargs
        super().__init__(c, **kwargs)


class Swallows(Parent):
    def __init__(self, c, **kwargs):
        super().__init__(c)


@pytest.mark.parametrize(
    'target, names, anything',
    [
        (Parent, 'ab', False),
        (HandsOn, 'abcde', False),
        (Grandchild, 'abcde', False),
        (Keeps, 'abc', True),
        (Swallows, 'c', True),
        (lambda x, y=1: 0, 'xy', False),
        (lambda x, **rest: 0, 'x', True),
    ],
    ids=['plain', 'hands on', 'inherits', 'keeps', 'swallows', 'function', 'open function'],
)
def test_what_a_class_takes(target, names, anything):
    takes = accepted(target)
    assert set(takes.names) >= set(names) and takes.anything == anything
    if not anything:
        assert set(takes.names) == set(names)


# ------------------------------------------------------------------------------------------ the API


def test_init_model(tmp_path):
    (part := tmp_path / 'part.py').write_text("default_scope = 'mmpretrain'\n")
    with pytest.raises(FastViTError, match='the config has no model'):
        fastvit_mm.init_model(part)
    for options, words in (
        ({'model.backbone.arc': 't8'}, 'FastViT takes no arc; did you mean arch'),
        ({'model.head.loss.type': 'LabelSmooth'}, 'did you mean LabelSmoothLoss'),
        ({'optim_wrapper.optimizer.lr': -1}, 'a number from 0 up'),
    ):
        with pytest.raises(FastViTError, match=words):
            fastvit_mm.init_model(ROOT / C, cfg_options=options)


def test_words_in_place_of_numbers_and_dicts(loaded):
    """Where a signature says so: loss_scale='dynamic', the name of an arch for its settings."""
    cfg = Config(loaded[S].to_dict())
    cfg.optim_wrapper.update(type='AmpOptimWrapper', loss_scale=512)
    cfg.model.backbone.arch = dict(depths=(1, 1, 1, 1), widths=(64, 128, 256, 512))
    options = {'optim_wrapper.loss_scale': 'dynamic', 'model.backbone.arch': 'sa24'}
    settings.check(cfg, settings.merge(cfg, options))
    assert cfg.optim_wrapper.loss_scale == 'dynamic' and cfg.model.backbone.arch == 'sa24'


def test_a_constructor_reads_settings_of_its_own(loaded):
    cfg = Config(loaded[C].to_dict())
    options = {
        'optim_wrapper.constructor': 'LearningRateDecayOptimWrapperConstructor',
        'optim_wrapper.paramwise_cfg.layer_decay_rate': 0.9,
    }
    settings.check(cfg, settings.merge(cfg, options))


def test_typos_in_a_file(loaded):
    """A key that is nearly one that is read; but not a variable that is used."""
    cfg = Config(loaded[S].to_dict())
    cfg.val_evaluator_new = cfg.val_evaluator = dict(type='IoUMetric', iou_metrics=['mDice'])
    cfg.my_variable = 3
    settings.check(cfg)
    cfg.custom_hook = [dict(type='EMAHook')]
    with pytest.raises(FastViTError, match='nothing reads custom_hook: did you mean custom_hooks'):
        settings.check(cfg)
    cfg.pop('custom_hook')
    cfg.optim_wraper = cfg.pop('optim_wrapper')
    with pytest.raises(FastViTError, match=r'without optim_wrapper \(instead, .* optim_wraper'):
        settings.check(cfg)


VARIABLES = """
work_dirs = 'out'
work_dir = f'{work_dirs}/x'
models = '/weights'
load_from = models + '/t8.pth'
param_schedulers = [dict(type='ConstantLR', factor=0.1, end=10)]
param_scheduler = [*param_schedulers, dict(type='ConstantLR', begin=10, end=20)]
"""


def test_variables_that_resemble_a_key(tmp_path):
    (file := tmp_path / 'mine.py').write_text(f"_base_ = '{ROOT / S}'\n{VARIABLES}")
    settings.check(Config.fromfile(file))
    (child := tmp_path / 'child.py').write_text("_base_ = 'mine.py'\n")
    settings.check(Config.fromfile(child))
    file.write_text(f"_base_ = '{ROOT / S}'\nwork_dirs = 'out'\n")
    with pytest.raises(FastViTError, match='nothing reads work_dirs: did you mean work_dir'):
        settings.check(Config.fromfile(file))


def test_variables_of_an_imported_base(tmp_path):
    (tmp_path / 'base.py').write_text(f"model = dict(type='GELU')\n{VARIABLES}")
    (file := tmp_path / 'mine.py').write_text(
        'from mmengine.config import read_base\n\nwith read_base():\n    from .base import *\n'
    )
    settings.check(Config.fromfile(file), reads=settings.PREDICT)


def test_schedules_of_several_optimizers(loaded):
    cfg = Config(loaded[S].to_dict())
    one = dict(type='LinearLR', start_factor=0.1, end=10, convert_to_iter_based=True)
    for several in (dict(generator=[one], discriminator=[one]), dict(generator=one)):
        cfg.param_scheduler = several
        settings.check(cfg)
    for wrong in (dict(start_factor=0.1, end=10), [dict(begin=0, end=3)], dict()):
        cfg.param_scheduler = wrong
        with pytest.raises(FastViTError, match='has no type'):
            settings.check(cfg)


def test_what_the_command_line_gives_may_be_none(loaded):
    cfg = Config(loaded[S].to_dict() | dict(work_dir=None, launcher=None))
    settings.check(cfg)


@pytest.fixture
def project(monkeypatch, tmp_path):
    """Write modules of a package ``shapes_project``, which is then forgotten."""
    monkeypatch.syspath_prepend(tmp_path)
    (folder := tmp_path / 'shapes_project').mkdir()
    names = Registered('mmengine').local  # all roots

    def write(name, text):
        (folder / f'{name}.py').write_text(text)

    yield write
    for name in [n for n in sys.modules if n.partition('.')[0] == 'shapes_project']:
        del sys.modules[name]
    for root in names:
        root.children.pop('shapes_project', None)
        root.module_dict.pop('ShapeNet', None)


NETWORK = """
from mmengine import registry
from mmengine.model import BaseModule

MODELS = {}

@MODELS.register_module()
class ShapeNet(BaseModule):
    def __init__(self, width=3, **kwargs):
        super().__init__(**kwargs)
"""


@pytest.mark.parametrize(
    'models, module',
    [
        ("registry.Registry('model', parent=registry.MODELS, scope='shapes_project')", 'registry'),
        ("registry.Registry('model', parent=registry.MODELS, scope='shapes_project')", 'parts'),
        ('registry.MODELS', 'parts'),
    ],
    ids=['in registry.py', 'elsewhere', 'in that of mmengine'],
)
def test_scopes_of_other_projects(loaded, project, models, module, tmp_path):
    project(module, NETWORK.format(models))
    (file := tmp_path / 'config.py').write_text(f"""
default_scope = 'shapes_project'
custom_imports = dict(imports=['shapes_project.{module}'])
model = dict(type='ShapeNet', width=4)
""")
    cfg = Config.fromfile(file)
    settings.check(cfg, reads=settings.PREDICT)
    with DefaultScope.overwrite_default_scope('shapes_project'):
        assert type(MODELS.build(cfg.model)).__name__ == 'ShapeNet'
    for wrong, words in (
        (dict(type='ShapeNt'), "'ShapeNt' is not known in shapes_project: did you mean ShapeNet"),
        (dict(type='ShapeNet', widht=3), 'ShapeNet takes no widht; did you mean width'),
    ):
        cfg.model = wrong
        with pytest.raises(FastViTError, match=words):
            settings.check(cfg, reads=settings.PREDICT)


def test_imports_given_as_options(project, tmp_path):
    project('parts', NETWORK.format('registry.MODELS'))
    project('broken', 'import no_such_module_of_mine')
    (file := tmp_path / 'config.py').write_text("model = dict(type='ShapeNet', width=4)\n")

    def load(imports):
        cfg = Config.fromfile(file)
        settings.check(cfg, settings.merge(cfg, {'custom_imports.imports': imports}), {'model'})
        return MODELS.build(cfg.model)

    for wrong, words in (
        ('shapes_project.broken', "'shapes_project.broken': .*no_such_module_of_mine"),
        (['shapes_project.nothing'], 'shapes_project.nothing'),
        ([3], r'custom_imports.imports=\[3\]'),
    ):
        with pytest.raises(FastViTError, match=words):
            load(wrong)
    with pytest.raises(FastViTError, match=r'custom_imports=mine: give .*imports=\[mine\]'):
        settings.merge(Config.fromfile(file), dict(custom_imports='mine'))
    assert type(load(['shapes_project.parts'])).__name__ == 'ShapeNet'


def test_options_may_mend_a_file(project, tmp_path):
    project('parts', NETWORK.format('registry.MODELS'))
    (file := tmp_path / 'config.py').write_text("model = dict(type='ShapeNet', widht=4)\n")
    options = ['custom_imports.imports=[shapes_project.parts]', 'model._delete_=True']
    parse = config_parser('').parse_args
    args = parse([str(file), '--cfg-options', *options, 'model.type=ShapeNet', 'model.width=3'])
    assert launch.load_config(args).model == dict(type='ShapeNet', width=3)
    with pytest.raises(FastViTError, match='ShapeNet takes no widht; did you mean width'):
        launch.load_config(parse([str(file), '--cfg-options', options[0]]))


def test_a_scope_without_registries(loaded):
    """Parts of a model of mmseg are then looked up in mmseg's."""
    cfg = Config(loaded[S].to_dict() | dict(default_scope='shapes_project'))
    cfg.model.type = 'mmseg.EncoderDecoder'
    settings.check(Config(dict(model=cfg.model, default_scope=cfg.default_scope)), reads={'model'})
    cfg.model.data_preprocessor.type = 'mmseg.SegDataPreProcessor'
    with DefaultScope.overwrite_default_scope('shapes_project'):
        MODELS.build(cfg.model)


def test_what_is_not_read_may_be_wrong(loaded):
    """A model that predicts needs no training set, evaluator or hook that anyone knows."""
    cfg = Config(loaded[C].to_dict())
    cfg.train_dataloader.dataset.type = cfg.val_evaluator.type = 'Unknown'
    cfg.custom_hooks = [dict(type='Unknown')]
    fastvit_mm.init_model(cfg)
    with pytest.raises(FastViTError, match='Unknown'):
        settings.check(cfg)


@pytest.mark.parametrize('task', TASKS)
def test_an_image_that_is_not_there(task, tmp_path):
    options = {'model.head.hand_model': 'synthetic'} if task == H else {}
    model = fastvit_mm.init_model(ROOT / task, cfg_options=options)
    for images in (str(tmp_path / 'no.jpg'), [tmp_path / 'no.jpg']):
        with pytest.raises(FastViTError, match=r'image .*no\.jpg does not exist'):
            fastvit_mm.inference(model, images)


# ----------------------------------------------------------------------- a project's own classes


@MODELS.register_module()
class OwnModel(BaseModel):
    """Does with its settings what it likes."""

    def __init__(self, backbone, pretrained=False, act_cfg='relu', loss: float = 1.0, **kwargs):
        super().__init__(**kwargs)


@MODELS.register_module()
class OwnClassifier(BaseModel):
    def __init__(self, head, **kwargs):
        super().__init__(**kwargs)


@OPTIMIZERS.register_module()
class OwnAdam(AdamW):
    def __init__(self, params, lr=None, **kwargs):
        super().__init__(params, lr or 1e-3, **kwargs)


@HOOKS.register_module()
class OwnLoggerHook(LoggerHook):
    def __init__(self, interval='epoch', **kwargs):
        super().__init__(**kwargs)


@DATASETS.register_module()
class OwnDataset:
    def __init__(self, data_root, pipeline, metas=None):
        pass


@pytest.fixture
def own(loaded):
    """A config with classes of its own."""
    cfg = Config(loaded[C].to_dict())
    cfg.model = dict(
        type='OwnModel',
        backbone=dict(type='resnet50', depth='deep', norm_cfg='bn', act_cfg=dict(fn='silu')),
        act_cfg='relu',
        pretrained=False,
        loss='focal',
        data_preprocessor=cfg.pop('data_preprocessor'),
    )
    cfg.train_dataloader.dataset = dict(
        type='OwnDataset', data_root='/data', pipeline=['resize', dict(type='ResizeEdges')]
    )
    cfg.optim_wrapper.optimizer = dict(type='OwnAdam', lr=None, eps=1e-8)
    cfg.default_hooks.logger = dict(type='OwnLoggerHook', interval='epoch')
    return cfg


def test_own_classes(own):
    settings.check(own)
    own.train_dataloader.dataset.pipeline = 'fast'
    options = {
        'model.backbone.' + 'x' * 9: 0.1,  # a word that no file has
        'model.backbone.type': 'resnet101d',
        'model.pretrained': 'weights.pth',
        'model.act_cfg': 3,
        'train_dataloader.dataset.metas.of_mine.too': 3,
    }
    settings.check(own, settings.merge(own, options))


@pytest.mark.parametrize(
    'option, words',
    [
        ({'model.bakbone': 3}, 'OwnModel takes no bakbone; did you mean backbone'),
        ({'model.data_preprocessor.type': 'FastClsDataPreprocessor' + 's'}, 'did you mean FastCls'),
        ({'train_dataloader.dataset.pipelines': []}, 'did you mean pipeline'),
        ({'optim_wrapper.optimizer.weight_decay': -1}, 'weight_decay=-1: give a number from 0 up'),
        ({'optim_wrapper.optimizer.eps': -1}, 'eps=-1: give a number from 0 up'),
    ],
)
def test_mistakes_beside_own_classes(own, option, words):
    """What their signatures, or those of parents out of this stack, say still holds."""
    with pytest.raises(FastViTError, match=words):
        settings.check(own, settings.merge(own, option))


def test_a_parameter_belongs_to_who_defines_it():
    class Mine(OwnClassifier):
        def __init__(self, neck, **kwargs):
            super().__init__(**kwargs)

    assert definer(Mine, 'data_preprocessor') == 'mmengine'
    for name in ('neck', 'head', 'unknown'):
        assert definer(Mine, name) == __name__
    assert definer(AdamW, 'lr') == 'torch' and definer(keywords, 'target') == __name__
