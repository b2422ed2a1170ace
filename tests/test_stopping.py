"""What ends a training early says so in one line, and costs nothing that was saved."""

import ctypes
import multiprocessing
import os
import resource
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from mmengine.evaluator import Evaluator
from mmengine.optim import OptimWrapper
from small_runs import PER_EPOCH, At, Drawn, NamedDrawn, Net, files, forked, make_run, train
from test_tools import load_tool

from fastvit_mm import FastViT, FastViTError, weights
from fastvit_mm.finite import all_finite
from fastvit_mm.hooks import StopOnSignalHook
from fastvit_mm.running import work_dir
from fastvit_mm.writing import whole


def error_of(log):
    """The one line that a process printed last."""
    text = log.read_text()
    assert 'Traceback' not in text, text
    lines = [line for line in text.replace('\0', '').splitlines() if line.startswith('error: ')]
    assert len(lines) == 1, text
    return lines[0]


# Losses and gradients --------------------------------------------------------------------


class Diverging(Net):
    """From iteration 8 on (of 18) for ``length`` iterations, the loss is ``wrong``."""

    wrong, first, length, steps = 'nan', 8, 99, 0

    def forward(self, inputs, target=None, mode='tensor'):
        if mode != 'loss':
            return super().forward(inputs, target, mode)
        self.steps += 1
        bad = 0 <= self.steps - self.first < self.length
        if bad and self.wrong == 'input':
            inputs = [x * float('nan') for x in inputs]
        losses = super().forward(inputs, target, mode)
        if bad and self.wrong == 'gradient':  # the loss is finite
            zero = (self.head.weight - self.head.weight).sum()
            losses['loss_root'] = zero.abs().sqrt()
        elif bad:
            losses['loss_extra'] = torch.tensor(float(self.wrong.replace('input', 'nan')))
        return losses


class NamedDiverging(Diverging):
    def forward(self, inputs, target=None, data_samples=None, mode='tensor'):
        return super().forward(inputs, target, mode)


def diverge(folder, wrong, length=99, action='stop', **settings):
    model = NamedDiverging()
    model.wrong, model.length = wrong, length
    runner = make_run(folder, model=model, **settings)
    runner._train_dataloader['dataset'] = NamedDrawn()
    runner._val_dataloader['dataset'] = NamedDrawn()
    for hook in runner.hooks:
        if type(hook).__name__ == 'FiniteLossHook':
            hook.action = action
    return runner


@pytest.mark.parametrize('wrong', ['nan', 'inf', 'input', 'gradient'])
def test_not_finite_stops_before_the_update(tmp_path, wrong):
    runner = diverge(tmp_path, wrong)
    seen = []
    runner.register_hook(At(7, lambda r: seen.append(state_of(r.model))), 'LOWEST')
    with pytest.raises(FastViTError) as caught:
        runner.train()
    message = str(caught.value)
    assert 'iteration 8:' in message and 'epoch_1.pth' in message and 'image_' in message
    assert {'gradient': 'loss_root 0', 'inf': 'loss_extra inf'}.get(wrong, 'nan') in message
    parameters = dict(runner.model.named_parameters())
    assert all(torch.equal(seen[0][k], p) for k, p in parameters.items())
    assert work_dir.latest(tmp_path).name == 'epoch_1.pth'
    assert not runner.model._forward_hooks


def state_of(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


@pytest.mark.parametrize('wrong', ['nan', 'input', 'gradient'])
def test_not_finite_is_skipped(tmp_path, wrong):
    """The weights, their average and the statistics stay finite, and the run goes on."""
    runner = diverge(tmp_path, wrong, length=3, action='skip')
    seen = {}
    for number in (7, 8, 10, 11):
        note = lambda r, number=number: seen.update({number: state_of(r.model)})  # noqa: E731
        runner.register_hook(At(number, note), 'LOWEST')
    runner.train()
    same = [k for k in seen[7] if torch.equal(seen[7][k], seen[10][k])]
    assert same == list(seen[7])
    assert not torch.equal(seen[10]['head.weight'], seen[11]['head.weight'])
    assert runner.message_hub.get_info('skipped') == 3
    checkpoint = torch.load(tmp_path / 'epoch_3.pth', weights_only=False)
    for part in ('state_dict', 'ema_state_dict'):
        assert all(v.isfinite().all() for v in checkpoint[part].values())


class Scaled(OptimWrapper):
    """What a loss scaler does, on the CPU: AMP's own wrapper wants a GPU."""

    def __init__(self, **args):
        super().__init__(**args)
        self.loss_scaler = torch.amp.GradScaler('cpu', init_scale=2.0**16)

    def backward(self, loss, **args):
        self.loss_scaler.scale(loss).backward(**args)
        self._inner_count += 1

    def step(self, **args):
        self.loss_scaler.step(self.optimizer)
        self.loss_scaler.update()


@pytest.mark.parametrize('fused', [False, True])
@pytest.mark.parametrize(
    'wrong, length, stops',
    [
        ('gradient', 4, False),
        ('gradient', 99, True),
        ('nan', 1, True),
    ],
)
def test_loss_scaler_may_skip(tmp_path, monkeypatch, wrong, length, stops, fused):
    """Overflowing gradients are its business, but not for ever, and no loss is ever NaN.

    It calls a fused optimizer even then: that skips the step.
    """
    monkeypatch.setattr('fastvit_mm.hooks.finite_loss.LIMIT', 6)
    wrapper = dict(type=Scaled, optimizer=dict(type='AdamW', lr=1e-2, fused=fused))
    runner = diverge(tmp_path, wrong, length, optim_wrapper=wrapper)
    if stops:
        with pytest.raises(FastViTError, match='iteration 13: for 6' if length > 1 else 'tion 8'):
            runner.train()
    else:
        runner.train()
        assert runner.optim_wrapper.loss_scaler.get_scale() == 2.0**12
    assert all(p.isfinite().all() for p in runner.model.parameters())


def test_accumulated_gradients(tmp_path):
    wrapper = dict(optimizer=dict(type='AdamW', lr=1e-2), accumulative_counts=3)
    runner = diverge(tmp_path, 'nan', optim_wrapper=wrapper)
    with pytest.raises(FastViTError, match='iteration 8'):
        runner.train()


@pytest.mark.parametrize('action', ['stop', 'skip'])
@pytest.mark.parametrize('wrapper', ['OptimWrapper', Scaled])
@pytest.mark.parametrize('part', [0, 1])
def test_one_part_of_a_batch(tmp_path, action, wrapper, part):
    """A loss scaler keeps that to itself: it only does not call the optimizer."""
    wrapper = dict(type=wrapper, optimizer=dict(type='AdamW', lr=1e-2))
    parts = [dict(type='AccumulateHook', parts=2)]
    runner = diverge(tmp_path, 'input', 1, action, optim_wrapper=wrapper, hooks=parts)
    runner.model.first = 9 + part
    seen = []
    runner.register_hook(At(4, lambda r: seen.append(state_of(r.model))), 'LOWEST')
    runner.register_hook(At(5, lambda r: seen.append(state_of(r.model))), 'LOWEST')
    if action == 'stop':
        with pytest.raises(FastViTError, match=r'iteration 5: .*\(loss nan, loss_extra nan\)'):
            runner.train()
        return
    runner.train()
    assert runner.message_hub.get_info('skipped') == 1
    assert all(torch.equal(v, seen[1][k]) for k, v in seen[0].items())
    assert all(v.isfinite().all() for v in runner.model.state_dict().values())


@pytest.mark.parametrize('dtype', [torch.float16, torch.float32, torch.float64])
def test_all_finite(dtype):
    largest = torch.finfo(dtype).max
    good = [torch.full((3, 3), largest, dtype=dtype), torch.empty(0), torch.tensor([2**62])]
    assert all_finite(good) and all_finite([])
    for value in ('nan', 'inf', '-inf'):
        assert not all_finite([*good, torch.tensor([1, float(value)], dtype=dtype)])


# Weights ---------------------------------------------------------------------------------


@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_weights_that_are_not_finite_are_refused(tmp_path, value):
    arch = dict(depths=(1, 1, 1, 1), widths=(16, 16, 32, 32), ffn_ratio=2, attention=(0, 0, 0, 0))
    model = FastViT(arch)
    state = model.state_dict()
    state['stages.1.blocks.0.mlp.fc1.weight'].view(-1)[5] = value
    torch.save(dict(state_dict=state), file := tmp_path / 'bad.pth')
    fresh = FastViT(arch)
    before = state_of(fresh)
    init = FastViT(arch, init_cfg=dict(type='Pretrained', checkpoint=str(file)))
    convert = load_tool('convert_weights').main
    target = tmp_path / 'timm.pth'
    for load in (
        lambda: weights.load(fresh, file),
        init.init_weights,
        lambda: convert([str(file), str(target), '--to', 'timm']),
    ):
        with pytest.raises(FastViTError, match=r'NaN or infinite \(stages.1.blocks.0.mlp.fc1'):
            load()
    assert all(torch.equal(v, before[k]) for k, v in fresh.state_dict().items())
    assert not target.exists()


# Resuming from a file --------------------------------------------------------------------


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp('finished') / 'run'
    assert forked(train, folder) == 0
    return folder


def change(**parts):
    return lambda c: {k: v for k, v in {**c, **parts}.items() if v is not None}


CANNOT_RESUME = {
    'no optimizer': (change(optimizer=None), 'it has no optimizer'),
    'no meta': (change(meta=None), 'it has no epoch in meta, iter in meta'),
    'meta of another kind': (change(meta=[1]), 'it has no epoch in meta'),
    'no message hub': (change(message_hub=None), 'message_hub'),
    'only weights': (lambda c: c['state_dict'], 'it has no epoch'),
    'optimizer of another model': (
        change(optimizer=torch.optim.Adam([torch.ones(1)]).state_dict()),
        'does not fit',
    ),
    'junk in the optimizer': (change(optimizer=dict(a=1)), 'does not fit'),
    'junk in the schedules': (change(param_schedulers=5), 'does not fit'),
    'junk in the state': (lambda c: {**c, 'meta': {**c['meta'], 'resuming': dict(a=1)}}, 'resum'),
    'text': (None, 'truncated or not a checkpoint'),
}


@pytest.mark.parametrize('case', CANNOT_RESUME)
def test_files_that_cannot_be_resumed(finished, tmp_path, case):
    edit, words = CANNOT_RESUME[case]
    file = tmp_path / 'file.pth'
    if edit is None:
        file.write_text('no checkpoint')
    else:
        torch.save(edit(torch.load(finished / 'epoch_3.pth', weights_only=False)), file)
    runner = make_run(tmp_path / 'run', resume=True, load_from=str(file))
    with pytest.raises(FastViTError) as caught:
        runner.train()
    assert str(file) in str(caught.value) and words in str(caught.value)
    assert '\n' not in str(caught.value)


# Disks -----------------------------------------------------------------------------------


def test_a_disk_that_is_full(tmp_path):
    """The limit for files makes writes fail half way, like a full disk."""
    folder, log = tmp_path / 'run', tmp_path / 'stderr'

    def limit(runner):
        size = (folder / 'epoch_1.pth').stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, resource.RLIM_INFINITY))

    assert forked(train, folder, hooks=[At(PER_EPOCH + 1, limit)], log=log) == 2
    message = error_of(log)
    assert 'File too large' in message and 'epoch_1.pth is whole' in message
    assert [p.name for p in folder.glob('epoch*')] == ['epoch_1.pth']
    assert not list(folder.glob('.*.part')) and work_dir.latest(folder).name == 'epoch_1.pth'
    assert forked(train, folder, resume=True) == 0


def test_no_space_left_for_the_logs(tmp_path):
    """What mmengine writes fails as well: here all that it logs goes to a device that is full."""
    folder, log = tmp_path / 'run', tmp_path / 'stderr'

    def fill(runner):
        (path,) = folder.glob('*/vis_data/scalars.json')
        path.unlink(), path.symlink_to('/dev/full')

    logger = dict(type='LoggerHook', interval=1)
    kept = dict(logger=logger, checkpoint=dict(type='WholeCheckpointHook', interval=1))
    hooks = [At(PER_EPOCH + 1, fill)]
    assert forked(train, folder, hooks=hooks, default_hooks=kept, log=log) == 2
    assert 'No space left' in error_of(log) and '--resume' in error_of(log)
    with pytest.raises(FileNotFoundError), work_dir.says_if_not_writable(folder):
        (tmp_path / 'image').read_bytes()


def test_a_work_dir_that_vanishes(tmp_path):
    folder, log = tmp_path / 'run', tmp_path / 'stderr'
    hooks = [At(PER_EPOCH + 1, lambda _: shutil.rmtree(folder))]
    assert forked(train, folder, hooks=hooks, log=log) == 2
    assert str(folder) in error_of(log) and not folder.exists()


def mount(folder, *args):
    return subprocess.run(['mount', *args, folder], capture_output=True).returncode == 0


def fill(runner):
    with suppress(OSError), Path(runner.work_dir, 'fill').open('wb', 0) as file:
        while file.write(bytes(1024)):
            pass


def make_read_only(runner):
    for handler in runner.logger.handlers:  # nothing may be open
        handler.close()
    assert mount(runner.work_dir, '-o', 'remount,ro')


@pytest.mark.parametrize('spoil', [fill, make_read_only])
def test_a_disk_of_its_own(tmp_path, spoil):
    """One that is really full or read-only, seen by this process alone."""
    folder, log = tmp_path / 'run', tmp_path / 'stderr'
    folder.mkdir()

    def run():
        if ctypes.CDLL(None).unshare(0x00020000) or not mount(
            folder, '-t', 'tmpfs', '-o', 'size=2m', 'none'
        ):
            sys.exit(77)
        try:
            train(folder, hooks=[At(PER_EPOCH + 1, spoil)])
        finally:
            assert work_dir.latest(folder).name == 'epoch_1.pth'
            assert not list(folder.glob('.*.part')) and not list(folder.glob('epoch_2*'))

    code = forked(run, log=log)
    if code == 77:
        pytest.skip('this user may not mount')
    assert code == 2, log.read_text()
    expected = 'No space left' if spoil is fill else 'Read-only file system'
    assert expected in error_of(log) and '--resume' in error_of(log)


def test_whole_writes(tmp_path):
    """Whatever fails inside, the file stays as it was and nothing is left beside it."""
    path = tmp_path / 'file'
    with whole(path) as part:
        part.write_text('first')
    with pytest.raises(ZeroDivisionError), whole(path) as part:
        part.write_text('second')
        assert path.read_text() == 'first'
        raise ZeroDivisionError
    assert path.read_text() == 'first' and list(tmp_path.iterdir()) == [path]


# Work dirs -------------------------------------------------------------------------------


def test_a_work_dir_belongs_to_one_process(tmp_path):
    def enter():
        with work_dir.claim(tmp_path, resume=False):
            (tmp_path / 'inside').touch()

    with work_dir.claim(tmp_path, resume=False):
        assert forked(enter, log=tmp_path / 'stderr') == 2
        message = error_of(tmp_path / 'stderr')
        assert 'in use by process' in message and str(os.getpid()) in message
        assert not (tmp_path / 'inside').exists()
    assert forked(enter) == 0 and (tmp_path / 'inside').exists()


def test_a_killed_process_and_its_children_hold_no_lock(tmp_path):
    """Data workers outlive a trainer that is killed for seconds."""

    def killed():
        with work_dir.claim(tmp_path, resume=False):
            if child := os.fork():
                (tmp_path / 'child').write_text(str(child))
                os.kill(os.getpid(), 9)
            time.sleep(60)

    assert forked(killed) == -9
    with work_dir.claim(tmp_path, resume=False):
        os.kill(int((tmp_path / 'child').read_text()), 9)  # it was still there


def test_an_earlier_run_is_not_overwritten_unasked(finished, tmp_path):
    folder = Path(shutil.copytree(finished, tmp_path / 'run'))
    (folder / 'mine.pth').touch()
    before = files(folder)
    asked = pytest.raises(FastViTError, match='--resume to continue it, --overwrite to replace it')
    with asked, work_dir.claim(folder, resume=False):
        pass
    for answer in (dict(resume=True), dict(resume=False, overwrite=True)):
        with work_dir.claim(folder, **answer):
            assert files(folder) == before
    work_dir.clear(folder, keep=folder / 'epoch_2.pth')
    assert files(folder) == ['epoch_2.pth', 'mine.pth']


def test_a_work_dir_that_cannot_be_made(tmp_path):
    (tmp_path / 'file').touch()
    refused = pytest.raises(FastViTError, match=r'cannot write to the work dir .* choose another')
    with refused, work_dir.claim(tmp_path / 'file', resume=False):
        pass


# Data workers ----------------------------------------------------------------------------


@pytest.mark.parametrize('by_epoch', [True, False], ids=['epochs', 'iterations'])
@pytest.mark.parametrize('number', [9, 11])
def test_a_data_worker_that_dies_names_its_file(tmp_path, by_epoch, number):
    class Deadly(Drawn):
        def __getitem__(self, i):
            if i == 7:
                time.sleep(0.2)  # the other worker is reading something else
                os.kill(os.getpid(), number)
            return super().__getitem__(i)

    def run():
        runner = make_run(tmp_path / 'run', by_epoch=by_epoch, workers=2)
        runner._train_dataloader['dataset'] = Deadly()
        runner.train()

    assert forked(run, log=tmp_path / 'stderr') == 2
    message = error_of(tmp_path / 'stderr')
    assert 'image_7.jpg' in message and message.count('image_') == 1
    names = {9: 'Killed', 11: 'Segmentation fault'}
    assert names[number] in message or 'exited unexpectedly' in message  # as PyTorch finds it
    assert 'smaller train_dataloader.num_workers)' in message


@pytest.mark.parametrize('kind', ['training', 'val', 'test'])
def test_a_data_worker_of_a_test_that_dies(tmp_path, kind):
    """In a validation between two epochs, and in one or a test by itself."""

    class Deadly(Drawn):
        def __getitem__(self, i):
            os.kill(os.getpid(), 9)

    def run():
        runner = make_run(tmp_path / 'run', workers=2)
        runner._val_dataloader['dataset'] = Deadly()
        if kind == 'test':
            runner._test_dataloader, runner._test_evaluator = runner._val_dataloader, Evaluator([])
            runner._test_loop = {}
        (runner.train if kind == 'training' else getattr(runner, kind))()

    assert forked(run, log=tmp_path / 'stderr') == 2
    message = error_of(tmp_path / 'stderr')
    loader = 'test' if kind == 'test' else 'val'
    assert f'smaller {loader}_dataloader.num_workers)' in message
    # only a training's workers take notes
    assert ('while reading image_' in message) == (kind == 'training')
    assert 'between' not in message


def test_a_metrics_process_can_be_ended():
    """mmdet's evaluation in processes forks them during a training, terminates them, and waits."""
    hook = StopOnSignalHook()
    hook.before_train(None)
    try:
        process = multiprocessing.get_context('fork').Process(target=time.sleep, args=(60,))
        process.start()
        time.sleep(1)  # Python forgets signals that arrive while it forks
        process.terminate()
        process.join(10)
        assert process.exitcode is not None, process.kill() or 'it sleeps on'
    finally:
        hook.restore()
