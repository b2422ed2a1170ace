"""The tools as people call them: what they do, and the one line they say when they cannot."""

import csv
import importlib.util
import json
import logging
import pickle
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import EMAHook
from randomize import randomize

import fastvit_mm
from fastvit_mm import FastViTError, launch, weights
from fastvit_mm.demo import apply_demo
from fastvit_mm.running import processes, work_dir

ROOT = Path(__file__).parent.parent
SEGMENTATION = 'configs/segmentation/fpn_fastvit_sa36_ade20k.py'
DETECTION = 'configs/detection/mask_rcnn_fastvit_t8_coco.py'
CLASSIFICATION = 'configs/classification/fastvit_t8_in1k.py'
CONFIGS = [SEGMENTATION, DETECTION, CLASSIFICATION]
# A shallow network of other widths keeps these runs short; the tasks stay whole.
SHALLOW = """
_base_ = '{base}'
arch = dict(_delete_=True, depths=(1, 1, {third}, 1), widths=(16, 32, 64, 64), ffn_ratio=2)
model = dict(backbone=dict(arch=arch), {rest})
"""
REST = {
    SEGMENTATION: 'neck=dict(in_channels=[16, 32, 64, 64])',
    DETECTION: 'neck=dict(in_channels=[16, 32, 64, 64])',
    CLASSIFICATION: 'neck=dict(in_channels=64), head=dict(in_channels=128)',
}


# A few images are enough where only the way there is tested.
FEW = """
train_dataloader = dict(dataset=dict(indices=32))
val_dataloader = test_dataloader = dict(dataset=dict(indices=8))
"""


def shallow(config, folder, third=1):
    path = folder / f'{Path(config).stem}_{third}.py'
    path.write_text(SHALLOW.format(base=ROOT / config, third=third, rest=REST[config]) + FEW)
    return path


def load_tool(name):
    spec = importlib.util.spec_from_file_location(f'tool_{name}', ROOT / 'tools' / f'{name}.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope='module')
def home(tmp_path_factory):
    """A folder to run in, where the demo data are drawn once."""
    folder = tmp_path_factory.mktemp('home')
    (folder / 'configs').symlink_to(ROOT / 'configs')
    return folder


@pytest.fixture
def tool(home, monkeypatch, capfd):
    """Run a tool in this process as its command line would; gives exit code and stderr."""
    monkeypatch.chdir(home)
    # A logger that outlives the test that made it still writes to that test's stderr.
    monkeypatch.setattr(logging, 'raiseExceptions', False)

    def call(name, *args):
        capfd.readouterr()
        code = 0
        try:
            launch.run(lambda _: load_tool(name).main([str(a) for a in args]))
        except SystemExit as end:
            code = end.code
        return code, capfd.readouterr().err.strip()

    return call


def refusal(result, *words):
    """Exit code 2 and one line that holds all ``words``."""
    code, err = result
    assert code == 2, err
    line = err.splitlines()[-1]
    assert line.startswith('error: '), err
    assert 'Traceback' not in err
    for word in words:
        assert word in line, line


@pytest.fixture
def writes_nothing(home):
    """Other tests have run here before."""
    before = set((home / 'work_dirs').rglob('*'))
    yield
    assert set((home / 'work_dirs').rglob('*')) == before


def test_as_a_process(home, writes_nothing):
    """Exit code and stderr of the real thing."""
    run = subprocess.run(
        [sys.executable, ROOT / 'tools' / 'train.py', 'configs/no.py'],
        cwd=home,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 2
    assert run.stderr.strip().splitlines()[-1].startswith('error: config configs/no.py does not')
    assert 'Traceback' not in run.stderr


def test_configs_that_cannot_be_used(tool, tmp_path):
    refusal(tool('train', 'configs/no.py'), 'configs/no.py', 'configs/<task>/')
    refusal(tool('test', 'configs/no.py', 'x.pth'), 'configs/no.py')
    (broken := tmp_path / 'broken.py').write_text('model = dict(\n')
    refusal(tool('train', broken), 'broken.py', 'cannot be read')
    if not torch.cuda.is_available():
        refusal(tool('train', CLASSIFICATION, '--demo', '--amp', 'fp16'), '--amp fp16', 'bf16')
    refusal(tool('test', CLASSIFICATION, 'x.pth', '--launcher', 'pytorch'), 'RANK', 'torchrun')


def test_a_test_has_nothing_of_training(home, tmp_path, monkeypatch):
    """However its types are given: by name or, as in new-style configs, as classes."""
    monkeypatch.chdir(home)
    cfg = apply_demo(Config.fromfile(shallow(CLASSIFICATION, tmp_path)))
    torch.save(dict(state_dict=fastvit_mm.init_model(cfg).state_dict()), tmp_path / 'model.pth')
    kinds = ('EMAHook', 'mmengine.EMAHook', EMAHook)
    cfg.custom_hooks, cfg.work_dir = [dict(type=kind) for kind in kinds], str(tmp_path)
    runner = launch.test_runner(cfg, tmp_path / 'model.pth')
    assert not any(isinstance(hook, EMAHook) for hook in runner.hooks)
    stages = {f'{stage}_{part}' for stage in ('train', 'val') for part in ('dataloader', 'cfg')}
    others = {'val_evaluator', 'optim_wrapper', 'param_scheduler', 'auto_scale_lr'}
    assert not (stages | others) & set(cfg) and 'test_dataloader' in cfg


@pytest.mark.parametrize('config', CONFIGS)
def test_data_that_are_not_there(tool, home, writes_nothing, config):
    layout = {
        SEGMENTATION: 'images/training, annotations/training',
        DETECTION: 'annotations/instances_train2017.json',
        CLASSIFICATION: 'train, val',
    }
    result = tool('train', config)
    refusal(result, 'data set not found', layout[config], str(home / 'data'), '--demo')


def test_wrong_settings(tool):
    def options(*settings):
        return ('train', CLASSIFICATION, '--demo', '--cfg-options', *settings)

    refusal(tool(*options('model.backbone.arch=sa48')), 'sa48', 't8, t12')
    refusal(tool(*options('model.backbone.out_indices=(3,4)')), 'out_indices', '(3, 4)')
    pipeline = 'train_dataloader.dataset.pipeline.1.scale=24'
    refusal(tool(*options(pipeline)), '24 x 24 pixels is too small', '32 x 32')


def test_checkpoints_that_cannot_be_used(tool, home, tmp_path, monkeypatch):
    refusal(tool('test', CLASSIFICATION, 'no.pth', '--demo'), 'no.pth', 'does not exist')
    refusal(tool('train', CLASSIFICATION, '--demo', '--resume', 'no.pth'), 'no.pth')
    both = ('--resume', '--overwrite')
    refusal(tool('train', CLASSIFICATION, '--demo', *both), *both)
    (cut := tmp_path / 'cut.pth').write_bytes(b'PK\x03\x04 cut off')
    refusal(tool('test', CLASSIFICATION, cut, '--demo'), 'cut.pth', 'truncated')

    def offline(address, path):
        raise OSError('no network')

    monkeypatch.setattr(torch.hub, 'download_url_to_file', offline)
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    refusal(
        tool('test', CLASSIFICATION, 'fastvit_t8.apple_in1k', '--demo'),
        'https://docs-assets.developer.apple.com',
        str(tmp_path),
    )


class Trap:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), 'w')


def test_hostile_checkpoints(tool, tmp_path):
    torch.save(
        dict(state_dict={}, meta=Trap(trap := tmp_path / 'trap')), file := tmp_path / 'h.pth'
    )
    for call in (
        ('test', CLASSIFICATION, file, '--demo'),
        ('train', CLASSIFICATION, '--demo', '--resume', file),
        ('train', CLASSIFICATION, '--demo', '--cfg-options', f'load_from={file}'),
        (
            *('train', CLASSIFICATION, '--demo', '--cfg-options'),
            'model.backbone.init_cfg.type=Pretrained',
            f'model.backbone.init_cfg.checkpoint={file}',
        ),
    ):
        refusal(tool(*call), 'refused', 'open')
        assert not trap.exists(), call


@pytest.mark.slow
def shown_in_order(folder):
    """Tables, and a picture for each of 8 images, the worst first."""
    with (folder / 'images.csv').open(newline='') as file:
        _, *rows = csv.reader(file)
    assert [path.name for path in sorted(folder.glob('*.jpg'))] == [row[-1] for row in rows]
    assert len(rows) == 8 and all(row[-1][6:-4] == Path(row[0]).stem for row in rows)
    values = [float(row[1]) for row in rows]
    assert sorted(values) in (values, values[::-1])
    assert {path.name for path in folder.glob('c*')} == {'classes.csv', 'confusion.png'}
    assert not list(folder.glob('.*'))


@pytest.mark.parametrize('task', CONFIGS)
def test_train_resume_and_test(tool, tmp_path, task):
    """A run's whole life: train, resume, test both forms, draw, write out, and be refused."""
    config = shallow(task, tmp_path)
    length, unit = ('max_iters', 'iter') if task == SEGMENTATION else ('max_epochs', 'epoch')
    common = ['--demo', '--work-dir', tmp_path]

    def train(n, *more):
        settings = [f'train_cfg.{length}={n}', 'train_cfg.val_interval=1000']
        settings += [
            'default_hooks.checkpoint.interval=1',
            'default_hooks.checkpoint.save_best=None',
        ]
        code, err = tool('train', config, *common, *more, '--cfg-options', *settings)
        assert code == 0, err
        return tmp_path / f'{unit}_{n}.pth'

    assert train(1).is_file()
    refusal(tool('train', config, *common), f'{unit}_1.pth', '--resume', '--overwrite')
    checkpoint = train(2, '--resume')
    assert checkpoint.is_file()
    assert weights.read(checkpoint)['meta'][unit] == 2
    log = '\n'.join(p.read_text() for p in tmp_path.rglob('*.log'))
    assert re.search(rf'resumed {unit}: 1|resumed epoch: \d, iter: 1', log), 'did not resume'

    left = config.read_text()
    results = []
    # So short a run detects nothing well: predictions are compared there, not a metric of 0.
    name, read = ('p.pkl', pickle.loads) if task == DETECTION else ('m.json', json.loads)
    for form in ([], ['--reparam']):
        out, shown = tmp_path / f'{len(form)}{name}', tmp_path / f'shown{len(form)}'
        args = [*common, *form, '--out', out, '--show-dir', shown]
        code, err = tool('test', config, checkpoint, *args)
        assert code == 0, err
        results.append(read(out.read_bytes()))
        shown_in_order(shown)
    assert config.read_text() == left, "a test replaced the run's config"
    if task == DETECTION:
        scores = [[p['pred_instances']['scores'][:20] for p in each] for each in results]
        assert sum(map(len, scores[0])) > 20
        torch.testing.assert_close(*scores, rtol=0, atol=1e-4)
    else:
        assert any(value > 0 for value in results[0].values())
        # mmseg rounds to two digits, of which a single pixel may turn the last one over.
        assert results[1] == pytest.approx(results[0], abs=0.01 if task == SEGMENTATION else 0)
    log = '\n'.join(p.read_text() for p in tmp_path.rglob('*.log'))
    assert re.search(r'reparameterized \w+: [\d,]+ -> [\d,]+ parameters', log)

    if task == CLASSIFICATION:
        out = tmp_path / 'predictions.pkl'
        code, err = tool('test', config, checkpoint, *common, '--out', out)
        assert code == 0, err
        assert len(pickle.loads(out.read_bytes())) > 5
    refusal(tool('test', config, checkpoint, *common, '--out', 'metrics.txt'), '--out')

    # of another variant, of another task, and with nothing to merge
    other = shallow(task, tmp_path, third=2)
    refusal(tool('test', other, checkpoint, *common), 'does not fit', 'stages.2.blocks.1')
    other = shallow(CLASSIFICATION if task != CLASSIFICATION else SEGMENTATION, tmp_path)
    refusal(tool('test', other, checkpoint, *common), 'another task')
    if task == CLASSIFICATION:
        deploy = ['model.backbone.deploy=True', 'model.neck.deploy=True']
        result = tool('test', config, checkpoint, *common, '--reparam', '--cfg-options', *deploy)
        refusal(result, 'nothing to reparameterize')


def test_resume_before_there_is_a_checkpoint(tool, tmp_path, monkeypatch):
    """The command that starts a run is the one that continues it: `load_from` holds until then."""
    config, run = shallow(CLASSIFICATION, tmp_path), tmp_path / 'run'
    model = randomize(fastvit_mm.init_model(apply_demo(Config.fromfile(config))))
    torch.save(dict(state_dict=model.state_dict()), base := tmp_path / 'base.pth')
    begun = []
    monkeypatch.setattr(launch.Runner, 'resume', lambda self, file: begun.append(file))

    def train(runner):
        runner.call_hook('before_run')
        runner.load_or_resume()
        runner.load_or_resume()  # nothing more to do
        begun.append(runner)

    monkeypatch.setattr(launch.Runner, 'train', train)
    command = ['train', config, '--demo', '--work-dir', run, '--resume']
    command += ['--cfg-options', f'load_from={base}']
    code, err = tool(*command)
    assert code == 0, err
    (first,) = begun
    for name, value in first.model.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name
    assert (first.cfg.get('resume'), first.cfg.load_from) == (False, str(base))
    torch.save({}, checkpoint := run / 'epoch_1.pth')
    code, err = tool(*command)
    assert code == 0, err
    assert begun[1] == checkpoint


def test_a_work_dir_with_an_earlier_run(tool, tmp_path, monkeypatch):
    """All ranks hear that it is refused; nothing is removed before the new run can begin."""
    config, run = shallow(CLASSIFICATION, tmp_path), tmp_path / 'run'
    run.mkdir()
    torch.save({}, checkpoint := run / 'epoch_1.pth')
    command = ['train', config, '--demo', '--work-dir', run]
    refusal(tool(*command), 'epoch_1.pth', '--resume', '--overwrite')
    begun = []
    monkeypatch.setattr(launch.Runner, 'train', lambda self: begun.append(self))
    code, err = tool(*command, '--overwrite')
    assert code == 0 and checkpoint.is_file(), err
    (hook,) = [h for h in begun[0].hooks if isinstance(h, work_dir.OverwriteHook)]
    hook.before_train(begun[0])
    assert not checkpoint.exists()

    def join(launcher, settings):
        assert settings == begun[0].cfg.env_cfg.dist_cfg
        raise FastViTError(f'{launcher}: joined')

    checkpoint.touch()
    monkeypatch.setattr(processes, 'join', join)
    for name in processes.LAUNCHERS['pytorch'][1]:
        monkeypatch.setenv(name, '0')
    refusal(tool(*command, '--launcher', 'pytorch'), 'pytorch: joined')


@pytest.mark.slow
def test_a_signal_ends_a_training(home, tmp_path):
    """As Slurm warns, while two data workers read: a checkpoint, and the signal's exit code."""
    config, run = shallow(SEGMENTATION, tmp_path), tmp_path / 'run'
    workers = ('train_dataloader.num_workers=2', 'default_hooks.logger.interval=1')
    command = [sys.executable, ROOT / 'tools/train.py', config, '--demo', '--work-dir', run]
    process = subprocess.Popen(
        [*command, '--cfg-options', *workers], cwd=home, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while not any('Iter(train)' in log.read_text() for log in run.rglob('*.log')):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 143, said
    (checkpoint,) = run.glob('iter_*.pth')
    assert f'{checkpoint} is written: repeat the command with --resume' in said
    assert 'Traceback' not in said


@pytest.mark.slow
def test_published_layouts_need_no_conversion(tool, tmp_path):
    """test.py and load_from take timm's and the authors' files as they are."""
    config = shallow(CLASSIFICATION, tmp_path)
    demo = Config.fromfile(config)
    model = randomize(fastvit_mm.init_model(apply_demo(demo)))
    common = ['--demo', '--work-dir', tmp_path]
    metrics = []
    for layout in ('mm', 'timm', 'apple'):
        file, out = tmp_path / f'{layout}.pth', tmp_path / f'{layout}.json'
        torch.save(dict(state_dict=weights.convert(model.state_dict(), layout, deploy=False)), file)
        code, err = tool('test', config, file, *common, '--out', out)
        assert code == 0, err
        metrics.append(json.loads(out.read_text()))
        if layout != 'mm':
            few = ['train_cfg.max_epochs=1', 'train_cfg.val_interval=9', f'load_from={file}']
            code, err = tool('train', config, *common, '--overwrite', '--cfg-options', *few)
            assert code == 0, err
            log = max(tmp_path.rglob('*.log'), key=lambda p: p.stat().st_mtime).read_text()
            assert f'Load checkpoint from {file}' in log
    assert metrics[0] == metrics[1] == metrics[2]


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="mmengine's launchers need two GPUs")
def test_two_processes(home, tmp_path):
    """DistributedDataParallel: every parameter is used, and the wrapped model is merged."""
    config = shallow(CLASSIFICATION, tmp_path)
    settings = ['train_cfg.max_epochs=1']

    def launched(name, *args):
        tool = [ROOT / 'tools' / f'{name}.py', config, *args, '--demo', '--launcher', 'pytorch']
        command = ['torch.distributed.run', '--standalone', '--nproc-per-node', '2', *tool]
        command += ['--work-dir', tmp_path, '--cfg-options', *settings]
        run = subprocess.run(
            [sys.executable, '-m', *map(str, command)], cwd=home, capture_output=True, text=True
        )
        assert run.returncode == 0, run.stderr[-3000:]
        return run.stdout + run.stderr

    launched('train')
    checkpoint = tmp_path / 'epoch_1.pth'
    metrics = []
    for form in ([], ['--reparam']):
        out = tmp_path / f'metrics{len(form)}.json'
        text = launched('test', str(checkpoint), *form, '--out', str(out))
        metrics.append(json.loads(out.read_text()))
    assert 'reparameterized ImageClassifier' in text
    assert metrics[0] == metrics[1]
