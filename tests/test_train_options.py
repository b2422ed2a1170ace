"""The options of training alone: --accumulate, --amp, --auto-scale-lr and --compile with every
task, --seed, --log, --early-stop ..."""

import argparse
import copy
import sys
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import ranks_program
import torch
import torch.nn as nn
from mmengine.config import Config
from mmengine.hooks import EMAHook, Hook
from mmengine.registry import HOOKS, VISBACKENDS
from mmengine.runner import Runner as BaseRunner
from mmengine.visualization import Visualizer
from small_runs import At, Drawn, Net, make_run
from test_processes import CONFIGS, shallow
from torch._dynamo import register_backend
from torch.nn.modules.batchnorm import _BatchNorm

from fastvit_mm import FastViTError, FastViTNeck, launch
from fastvit_mm.cli import train
from fastvit_mm.hooks import WholeCheckpointHook
from fastvit_mm.hooks.accumulate import split
from fastvit_mm.running import train_options

ROOT = Path(__file__).parent.parent
SEGMENTATION = CONFIGS['segmentation']
STEPS = 5
graphs = []  # that the compiler below was given


@register_backend
def noting(graph, inputs):
    graphs.append(graph)
    return graph.forward


class Frozen(Hook):
    """Batches normalized alike, however they are divided."""

    def before_train_iter(self, runner, *args, **kwargs):
        for module in runner.model.modules():
            if isinstance(module, _BatchNorm):
                module.eval()


class Track(ranks_program.Record):
    def after_train(self, runner):
        ema = next(h for h in runner.hooks if isinstance(h, EMAHook))
        self.averaged = ema.ema_model.module.state_dict()


@pytest.fixture(scope='module')
def home(tmp_path_factory):
    return tmp_path_factory.mktemp('options')


def options(*given):
    parser = argparse.ArgumentParser()
    train.add_arguments(parser)
    return parser.parse_args(given)


def run(task, home, name, *given, batch=4, hooks=()):
    """Train for five steps with an EMA; gives the runner and what Track has seen."""
    cfg = ranks_program.load(shallow(task, home), 'none', home / task / name)
    ranks_program.prepare(cfg, batch, STEPS)
    cfg.randomness = dict(seed=42)
    average = dict(type='EMAHook', momentum=0.3, update_buffers=True)
    cfg.custom_hooks = [dict(type='SyncStatisticsHook'), average]
    train_options.apply(cfg, options(*given))
    runner = launch.Runner.from_cfg(cfg)
    for hook in (track := Track(), *hooks):
        runner.register_hook(hook)
    runner.train()
    return runner, track


@pytest.mark.slow
@pytest.mark.parametrize('task', CONFIGS)
def test_options(task, home, monkeypatch):
    monkeypatch.chdir(home)
    _, whole = run(task, home, 'whole', hooks=[Frozen()])
    _, parts = run(task, home, 'parts', '--accumulate', '2', batch=2, hooks=[Frozen()])
    assert len(whole.losses) == STEPS and whole.losses[0] != whole.losses[-1]
    assert parts.losses == pytest.approx(whole.losses, abs=1e-4)
    for name, value in whole.averaged.items():
        assert torch.allclose(parts.averaged[name].double(), value.double(), atol=1e-3), name

    graphs.clear()
    torch._dynamo.reset()  # or it has another task's
    together = ['--amp', '--accumulate', '2', '--compile', 'noting', '--auto-scale-lr']
    runner, track = run(task, home, 'together', *together, batch=2)
    assert graphs
    rate = 4 / runner.auto_scale_lr['base_batch_size']
    assert runner.optim_wrapper.optimizer.param_groups[0]['initial_lr'] == pytest.approx(
        rate * runner.cfg.optim_wrapper.optimizer.lr
    )
    assert type(runner.optim_wrapper).__name__ == 'BFloat16OptimWrapper'
    _, plain = run(task, home, 'alone', batch=4)
    assert track.losses[0] == pytest.approx(plain.losses[0], rel=0.1)
    assert track.losses[0] != plain.losses[0]
    assert all(0 < loss < 2 * plain.losses[0] for loss in track.losses)
    (file,) = (home / task / 'together').glob('*.pth')
    names = torch.load(file, weights_only=False)['state_dict']
    assert set(names) == set(runner.model.state_dict())
    assert not any('_orig_mod' in name for name in names)


@pytest.mark.slow
def test_inductor():
    """PyTorch's own compiler, in training only; copies are not compiled."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = nn.ModuleDict(dict(neck=FastViTNeck(8)))
    names, plain = list(model.state_dict()), copy.deepcopy(model.neck)
    train_options.compile_network(model, True)
    assert list(model.state_dict()) == names
    results = []
    for neck in (model.neck, plain):
        (out,) = neck.train()((torch.linspace(-1, 1, 2 * 8 * 4 * 4).view(2, 8, 4, 4).sin(),))
        out.square().sum().backward()
        results.append([out, *(p.grad for p in neck.parameters())])
    for compiled, eager in zip(*results, strict=True):
        assert torch.allclose(compiled, eager, rtol=1e-3, atol=1e-4)
    copied = copy.deepcopy(model.neck)
    frames = torch._dynamo.utils.counters['frames']['ok']
    assert frames > 0
    for neck in (copied.train(), model.neck.eval()):
        neck((torch.ones(3, 8, 5, 5),))
    assert torch._dynamo.utils.counters['frames']['ok'] == frames


@pytest.mark.parametrize(
    'count, parts, sizes', [(8, 2, [4, 4]), (9, 2, [3] * 3), (5, 2, [1] * 5), (1, 4, [1])]
)
def test_parts_are_equal(count, parts, sizes):
    """A mean of means is the mean of all only then."""
    data = dict(inputs=torch.arange(count), data_samples=[f'{i}' for i in range(count)])
    found = split(data, parts)
    assert [len(part['inputs']) for part in found] == sizes
    assert torch.cat([part['inputs'] for part in found]).tolist() == list(range(count))
    for part in found:
        assert part['data_samples'] == [f'{i}' for i in part['inputs']]


class Compiled:
    """Stands for the training step that mmengine has compiled, an attribute of the model."""

    def __init__(self, model):
        self.model = model

    def __call__(self, data, optim_wrapper):
        return type(self.model).train_step(self.model, data, optim_wrapper)


@pytest.mark.parametrize('compiled', [False, True])
@pytest.mark.parametrize('kind', [launch.Runner, BaseRunner])
def test_parts_after_a_failed_training(tmp_path, kind, compiled):
    """Not parts of parts, with mmengine's own runner neither; and the model is as it was."""
    sizes = []

    class Count(Net):
        def forward(self, inputs, target=None, mode='tensor'):
            if mode == 'loss':
                sizes.append(len(inputs))
            return super().forward(inputs, target, mode)

    def fail(runner):
        runner.model = Net()  # as a validation in the deploy form
        raise ZeroDivisionError

    loader = dict(dataset=Drawn(), batch_size=4, sampler=dict(type='DefaultSampler', shuffle=True))
    model, failing = Count(), At(2, fail)
    if compiled:
        model.train_step = Compiled(model)
    before = vars(model).get('train_step')
    hooks = [dict(type='AccumulateHook', parts=2), failing]
    runner = make_run(tmp_path, model=model, hooks=hooks, train_dataloader=loader, kind=kind)
    with pytest.raises(ZeroDivisionError):
        runner.train()
    runner.model, failing.iteration = model, 0
    for _ in range(2):
        runner.train()
        assert vars(model).get('train_step') is before
    assert set(sizes) == {2}


@pytest.mark.parametrize(
    'given, words',
    [
        (['--amp', 'fp16'], '--amp fp16 needs a GPU.*--amp bf16'),
        (['--auto-scale-lr'], 'auto_scale_lr.base_batch_size'),
        (['--compile', 'inductr'], '--compile inductr: one of .*inductor'),
    ],
)
def test_what_cannot_be_done(given, words, monkeypatch):
    monkeypatch.setattr(train_options, 'get_device', lambda: 'cpu')
    cfg = Config(dict(optim_wrapper=dict(type='OptimWrapper')))
    with pytest.raises(FastViTError, match=words):
        train_options.apply(cfg, options(*given))


def accumulating(**more):
    loader, wrapper = dict(batch_size=8), dict(type='OptimWrapper')
    return Config(dict(dict(train_dataloader=loader, optim_wrapper=wrapper), **more))


def test_accumulation_is_asked_for_once():
    """A config that a run with --accumulate has saved has the larger batch and the hook."""
    cfg = accumulating(custom_hooks=None)
    train_options.apply(cfg, options('--accumulate', '2'))
    before = copy.deepcopy(cfg)
    assert cfg.train_dataloader.batch_size == 16 and len(cfg.custom_hooks) == 1
    with pytest.raises(FastViTError, match=r'--accumulate 2.*AccumulateHook already'):
        train_options.apply(cfg, options('--accumulate', '2'))
    train_options.apply(cfg, options())
    assert cfg.to_dict() == before.to_dict()
    counts = dict(type='OptimWrapper', accumulative_counts=4)
    cfg = accumulating(optim_wrapper=counts)
    with pytest.raises(FastViTError, match=r'optim_wrapper.accumulative_counts=4.*one of them'):
        train_options.apply(cfg, options('--accumulate', '2'))
    assert cfg.train_dataloader.batch_size == 8


def test_no_base_batch_size():
    with pytest.raises(FastViTError, match=r'set auto_scale_lr.base_batch_size'):
        train_options.apply(accumulating(auto_scale_lr=None), options('--auto-scale-lr'))


def test_fp16_replaces_another_type(monkeypatch):
    monkeypatch.setattr(train_options, 'get_device', lambda: 'cuda')
    wrapper = dict(type='AmpOptimWrapper', dtype='bfloat16', loss_scale=512.0)
    cfg = accumulating(optim_wrapper=wrapper)
    train_options.apply(cfg, options('--amp', 'fp16'))
    assert cfg.optim_wrapper.to_dict() == dict(wrapper, dtype='float16')


def test_numbers_of_parts(capsys):
    for number in ('0', '-1', 'two'):
        with pytest.raises(SystemExit):
            options('--accumulate', number)
        assert 'not a positive integer' in capsys.readouterr().err


@pytest.mark.parametrize(
    'kind, wrapper',
    [('auto', 'AmpOptimWrapper'), ('fp16', 'AmpOptimWrapper'), ('bf16', 'BFloat16OptimWrapper')],
)
def test_half_precision_on_a_gpu(kind, wrapper, monkeypatch):
    monkeypatch.setattr(train_options, 'get_device', lambda: 'cuda')
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda: True)
    cfg = Config(dict(optim_wrapper=dict(type='OptimWrapper')))
    train_options.apply(cfg, options('--amp', kind))
    assert cfg.optim_wrapper.type == wrapper
    assert ('loss_scale' in cfg.optim_wrapper) == (kind != 'bf16')


# --------------------------------------------------------------- validations, seeds, loggers


def settings_of(*given, **changes):
    cfg = Config.fromfile(ROOT / SEGMENTATION)
    cfg.merge_from_dict(changes)
    train_options.apply(cfg, options(*given))
    return cfg


def test_options_that_set_a_setting(monkeypatch):
    monkeypatch.delenv('CUBLAS_WORKSPACE_CONFIG', raising=False)
    cfg = settings_of()
    assert cfg.randomness == dict(seed=42) and cfg.val_cfg is not None
    cfg = settings_of('--seed', '0', '--deterministic', '--no-validate')
    assert cfg.randomness == dict(seed=0, deterministic=True)
    assert not cfg.env_cfg.cudnn_benchmark
    assert cfg.val_cfg is cfg.val_dataloader is cfg.val_evaluator is None
    assert 'save_best' not in cfg.default_hooks.checkpoint
    with pytest.raises(FastViTError, match='leave out --no-validate'):
        settings_of('--no-validate', '--early-stop', '2')
    auto = {'default_hooks.checkpoint.save_best': 'auto'}
    with pytest.raises(FastViTError, match='save_best=METRIC'):
        settings_of('--early-stop', '2', **auto)
    several = {'default_hooks.checkpoint.save_best': ['mIoU', 'aAcc']}
    with pytest.raises(FastViTError, match=r'2 metrics, mIoU, aAcc: set .* to one of them'):
        settings_of('--early-stop', '2', **several)


def test_seeds(capsys):
    assert options('--seed', str(2**32 - 1)).seed == 2**32 - 1
    for wrong in ('-1', str(2**32), 'x'):
        with pytest.raises(SystemExit):
            options('--seed', wrong)
        assert 'integer from 0 to 4294967295' in capsys.readouterr().err


def test_where_a_run_logs(monkeypatch, tmp_path):
    cfg = settings_of('--log', 'wandb', 'mlflow', 'tensorboard')
    kinds = [one['type'] for one in cfg.visualizer.vis_backends]
    known = ['WandbVisBackend', 'MLflowVisBackend', 'TensorboardVisBackend']
    assert kinds == ['LocalVisBackend', *known]
    for name in ('wandb', 'mlflow', 'torch.utils.tensorboard'):
        monkeypatch.setitem(sys.modules, name, MagicMock())
    backends = [VISBACKENDS.build(dict(type=kind, save_dir=str(tmp_path))) for kind in known]
    shown = Visualizer(vis_backends=backends)
    shown.add_scalar('loss', 0.5, 7)
    wandb, mlflow, tensorboard = map(
        sys.modules.get, ('wandb', 'mlflow', 'torch.utils.tensorboard')
    )
    wandb.init.assert_called_once_with(dir=str(tmp_path))
    wandb.log.assert_called_once_with({'loss': 0.5}, commit=True)
    assert str(tmp_path) in mlflow.set_tracking_uri.call_args.args[0]
    mlflow.log_metric.assert_called_once_with('loss', 0.5, 7)
    tensorboard.SummaryWriter.assert_called_once_with(str(tmp_path))
    tensorboard.SummaryWriter().add_scalar.assert_called_once_with('loss', 0.5, 7)
    for name in ('wandb', 'mlflow'):
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(FastViTError, match=f'--log {name} needs {name}: pip install {name}'):
            train_options.check_loggers(options('--log', 'tensorboard', name))


@pytest.mark.parametrize(
    'rule, scores, validations',
    [
        ('greater', (40.0, 50.0, 50.0, 50.0, 60.0, 70.0), 4),  # equal is not better
        ('greater', (40.0, 30.0, 50.0, 45.0, 60.0, 70.0), 6),  # never two in a row
        ('less', (9.0, 8.0, 9.0, 9.0, 1.0, 1.0), 4),
    ],
)
def test_early_stop(rule, scores, validations, tmp_path):
    """Two validations in a row that are not better end the run."""
    cfg = Config(dict(default_hooks=dict(checkpoint=dict(save_best='score', rule=rule))))
    train_options.stop_early(cfg, 2)
    runner = make_run(tmp_path, by_epoch=False, hooks=cfg.custom_hooks)
    left = iter(scores)
    runner.val_loop.evaluator.evaluate = lambda _: dict(score=next(left))
    runner.train()
    assert runner.iter == 3 * validations


def scored(folder, patience, scores, **more):
    """A run of six validations with these scores, three iterations from one to the next."""
    cfg = Config(dict(default_hooks=dict(checkpoint=dict(save_best='score', rule='greater'))))
    train_options.stop_early(cfg, patience)
    runner = make_run(folder, False, hooks=[*cfg.custom_hooks, *more.pop('hooks', ())], **more)
    left = iter(scores)
    runner.val_loop.evaluator.evaluate = lambda _: dict(score=next(left))
    return runner


def test_early_stop_after_an_interruption(tmp_path):
    """What was best before, and how often nothing was better, counts after a resume, and a run
    that has stopped stays so; with more patience it goes on."""

    def die(runner):
        raise ZeroDivisionError

    scores = (50.0, 40.0, 45.0, 46.0, 47.0, 48.0)
    with pytest.raises(ZeroDivisionError):  # the checkpoint is that of iteration 8
        scored(tmp_path, 3, scores, hooks=[At(11, die)]).train()
    runner = scored(tmp_path, 3, scores[2:], resume=True)
    runner.train()
    assert runner.iter == 12
    again = scored(tmp_path, 3, scores[3:], resume=True)  # its last validation is made up for
    again.train()
    assert again.iter == 12
    saver = next(h for h in again.hooks if isinstance(h, WholeCheckpointHook))
    saver.save_now(again, 0, 12)
    again = scored(tmp_path, 3, (), resume=True)
    again.train()
    assert again.iter == 12
    longer = scored(tmp_path, 5, scores[4:], resume=True)
    longer.train()
    assert longer.iter == 18


def test_what_early_stop_watches():
    """What chooses the best checkpoint, in all tasks; a config whose metric has another name fails
    instead of going on for ever."""
    for task, name in dict(
        classification='accuracy/top1', detection='coco/bbox_mAP', hand_mesh='PA-MPVPE'
    ).items():
        cfg = Config.fromfile(ROOT / CONFIGS[task])
        train_options.stop_early(cfg, 3)
        hook = HOOKS.build(cfg.custom_hooks[-1])
        assert (hook.monitor, hook.patience, hook.strict) == (name, 3, True)
        assert hook.rule == ('less' if task == 'hand_mesh' else 'greater')
