"""Runs that are killed, stopped and resumed, beside one that nothing disturbed."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from mmengine.runner import Runner
from small_runs import (
    BATCH,
    ITERATIONS,
    PER_EPOCH,
    At,
    Drawn,
    Wander,
    die,
    files,
    forked,
    make_run,
    state,
    train,
)

from fastvit_mm import FastViTError
from fastvit_mm.running import work_dir
from fastvit_mm.writing import WholeBackend, whole

LAST = {True: 'epoch_3.pth', False: f'iter_{ITERATIONS}.pth'}


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory):
    """The final state and files of runs that nothing disturbed, and their folders."""
    runs = {}

    def run(by_epoch, workers=0):
        if (by_epoch, workers) not in runs:
            folder = tmp_path_factory.mktemp('undisturbed') / 'run'
            assert forked(train, folder, by_epoch=by_epoch, workers=workers) == 0
            runs[by_epoch, workers] = state(folder / LAST[by_epoch]), files(folder)
        return runs[by_epoch, workers]

    return run


def check_same(folder, by_epoch, undisturbed, workers=0):
    expected, names = undisturbed(by_epoch, workers)
    assert state(folder / LAST[by_epoch]) == expected
    assert files(folder) == names


def resume(folder, **settings):
    assert forked(train, folder, resume=True, **settings) == 0


def half_written(number):
    """A hook that makes the process die in the middle of writing its checkpoint ``number``."""
    written = []

    def put(self, content, path):
        written.append(path)
        with whole(path) as part:
            if len(written) == number:
                part.write_bytes(content[: len(content) // 2])
                die()
            part.write_bytes(content)

    def patch(runner):
        WholeBackend.put = put

    return At(1, patch)


@pytest.mark.parametrize('by_epoch', [True, False], ids=['epochs', 'iterations'])
@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.parametrize('iteration', [3, PER_EPOCH + 3], ids=['first', 'later'])
def test_killed_within_an_epoch(tmp_path, undisturbed, by_epoch, workers, iteration):
    """Before the first checkpoint, and after one."""
    hooks = [At(iteration, die)]
    run = dict(by_epoch=by_epoch, workers=workers)
    assert forked(train, tmp_path, hooks=hooks, **run) == -signal.SIGKILL
    made = [n for n in files(tmp_path) if work_dir.RESUMABLE.fullmatch(n)]
    assert bool(made) == (iteration > 3) and LAST[by_epoch] not in made
    resume(tmp_path, **run)
    check_same(tmp_path, by_epoch, undisturbed, workers)


@pytest.mark.parametrize('by_epoch', [True, False], ids=['epochs', 'iterations'])
def test_killed_within_a_write(tmp_path, undisturbed, by_epoch):
    """Two times in one run; what is left of the writes is removed."""
    for number in (3, 2):
        again = (tmp_path / 'last_checkpoint').exists()
        settings = dict(by_epoch=by_epoch, hooks=[half_written(number)], resume=again)
        if again:  # the resumed run does not have an iteration 1
            settings['hooks'][0].iteration = 2 * PER_EPOCH - 2
        assert forked(train, tmp_path, **settings) == -signal.SIGKILL
        (part,) = tmp_path.glob('.*.part')
        final = tmp_path / part.name[1:].rpartition('.pth')[0]
        assert not work_dir.is_whole(part)
        assert not final.with_suffix('.pth').exists() or 'best' not in part.name
        assert all(work_dir.is_whole(p) for p in tmp_path.glob('*.pth'))
    resume(tmp_path, by_epoch=by_epoch)
    assert not list(tmp_path.glob('.*.part'))
    check_same(tmp_path, by_epoch, undisturbed)


@pytest.mark.parametrize('by_epoch', [True, False], ids=['epochs', 'iterations'])
def test_killed_within_a_validation(tmp_path, undisturbed, by_epoch):
    """It is made up for: otherwise the best score could be another, or a step of a schedule."""
    iteration = PER_EPOCH if by_epoch else 12
    hooks = [At(iteration, die, in_validation=True)]
    assert forked(train, tmp_path, by_epoch=by_epoch, hooks=hooks) == -signal.SIGKILL
    checkpoint = torch.load(work_dir.latest(tmp_path), weights_only=False)
    assert checkpoint['meta']['iter'] == iteration
    assert checkpoint['message_hub']['runtime_info'].get('last_validation', 0) < iteration
    resume(tmp_path, by_epoch=by_epoch)
    check_same(tmp_path, by_epoch, undisturbed)


@pytest.mark.parametrize('by_epoch', [True, False], ids=['epochs', 'iterations'])
@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_stopped_by_a_signal(tmp_path, undisturbed, by_epoch, workers, number):
    """Within the second epoch, all processes at once, as a terminal and Slurm do it."""
    iteration, log = PER_EPOCH + 3, tmp_path / 'stderr'
    group = tmp_path / 'group'

    def to_all(runner):
        group.write_text(' '.join(str(p.pid) for p in multiprocessing.active_children()))
        # not by the trainer, whose SIGTERM ends its data workers
        command = ['kill', f'-{int(number)}', '--', f'-{os.getpgrp()}']
        subprocess.run(command, start_new_session=True, check=True)
        time.sleep(0.1)  # a data worker would die now

    def run():
        os.setpgrp()
        train(tmp_path / 'run', by_epoch=by_epoch, workers=workers, hooks=[At(iteration, to_all)])

    assert forked(run, log=log) == 128 + number
    (line,) = [one for one in log.read_text().splitlines() if 'stopped by' in one]
    path = tmp_path / 'run' / f'iter_{iteration}.pth'
    assert str(path) in line and '--resume' in line and number.name in line
    assert torch.load(path, weights_only=False)['meta']['iter'] == iteration
    left = group.read_text().split()
    assert len(left) >= workers and not any(Path('/proc', pid).exists() for pid in left)
    assert not [name for name in os.listdir('/dev/shm') if any(pid in name for pid in left)]
    resume(tmp_path / 'run', by_epoch=by_epoch, workers=workers)
    check_same(tmp_path / 'run', by_epoch, undisturbed, workers)


@pytest.mark.parametrize('by_epoch', [True, False], ids=['epochs', 'iterations'])
def test_stopped_within_a_validation(tmp_path, undisturbed, by_epoch):
    """The validation uses averaged weights: the checkpoint must not."""
    iteration = PER_EPOCH if by_epoch else 6  # 4 and 8 are saved anyway
    hooks = [At(iteration, lambda _: os.kill(os.getpid(), 15), True)]
    assert forked(train, tmp_path, by_epoch=by_epoch, hooks=hooks) == 143
    assert torch.load(work_dir.latest(tmp_path), weights_only=False)['meta']['iter'] == iteration
    resume(tmp_path, by_epoch=by_epoch)
    check_same(tmp_path, by_epoch, undisturbed)


def test_a_second_signal_stops_at_once(tmp_path):
    def twice(runner):
        os.kill(os.getpid(), 15)
        os.kill(os.getpid(), 15)
        (tmp_path / 'later').touch()

    assert forked(train, tmp_path / 'run', hooks=[At(3, twice)]) == 143
    assert not (tmp_path / 'later').exists() and not list(tmp_path.glob('run/*.pth'))


def test_number_of_data_workers_does_not_matter(undisturbed):
    for by_epoch in (True, False):
        assert undisturbed(by_epoch, 0) == undisturbed(by_epoch, 2)


def test_nothing_of_ours_is_logged_as_a_metric(tmp_path):
    """mmengine takes what begins with `val` in its message hub for one."""
    assert forked(train, tmp_path) == 0
    (log,) = tmp_path.glob('*/vis_data/scalars.json')
    names = {name for line in log.read_text().splitlines() for name in json.loads(line)}
    ours = {'loss', 'lr', 'grad_norm', 'score'}
    assert names - {'time', 'data_time', 'step', 'iter', 'epoch', 'memory', 'base_lr'} == ours


def test_mmengines_own_runner(tmp_path, undisturbed):
    """The hook alone does it, without our runner."""
    settings = dict(by_epoch=False, kind=Runner)
    assert forked(train, tmp_path, hooks=[At(10, die)], **settings) == -signal.SIGKILL
    resume(tmp_path, **settings)
    check_same(tmp_path, False, undisturbed)


@pytest.mark.parametrize('by_epoch', [True, False], ids=['epochs', 'iterations'])
def test_a_resumed_run_loads_nothing_twice(tmp_path, by_epoch):
    log = tmp_path / 'read'

    class Logged(Drawn):
        def __getitem__(self, i):
            with log.open('a') as lines:
                lines.write(f'{i}\n')
            return super().__getitem__(i)

    def run(**settings):
        runner = make_run(tmp_path / 'run', by_epoch=by_epoch, **settings)
        runner._train_dataloader['dataset'] = Logged()
        runner.train()

    hooks = [At(PER_EPOCH + 3, lambda _: os.kill(os.getpid(), 15))]
    assert forked(run, hooks=hooks) == 143
    assert len(log.read_text().split()) == (PER_EPOCH + 3) * BATCH
    assert forked(run, resume=True) == 0
    assert len(log.read_text().split()) == ITERATIONS * BATCH


# What `last_checkpoint` may point to -----------------------------------------------------


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp('finished') / 'run'
    assert forked(train, folder) == 0
    return folder


@pytest.fixture
def copied(finished, tmp_path):
    folder = Path(shutil.copytree(finished, tmp_path / 'run'))
    (folder / 'last_checkpoint').write_text(str(folder / 'epoch_3.pth'))
    return folder


def damage(path):
    """Change one bit of a weight: PyTorch reads it without complaint."""
    weight = torch.load(path, weights_only=False)['state_dict']['head.weight']
    content = bytearray(path.read_bytes())
    content[content.index(weight.numpy().tobytes())] ^= 1
    path.write_bytes(content)
    assert torch.load(path, weights_only=False)['state_dict']['head.weight'].ne(weight).any()


FAULTS = {
    'missing': lambda path: path.unlink(),
    'empty': lambda path: path.write_bytes(b''),
    'cut off': lambda path: os.truncate(path, path.stat().st_size // 2),
    'a byte changed': damage,
}


@pytest.mark.parametrize('fault', FAULTS)
def test_falls_back_to_the_newest_whole_checkpoint(copied, fault, monkeypatch):
    monkeypatch.setattr(work_dir, 'print_log', lambda text, *_: lines.append(text))
    lines = []
    assert work_dir.latest(copied) == copied / 'epoch_3.pth'
    FAULTS[fault](copied / 'epoch_3.pth')
    assert work_dir.latest(copied) == copied / 'epoch_2.pth'
    (said,) = lines
    assert 'epoch_3.pth' in said and 'epoch_2.pth' in said
    FAULTS[fault](copied / 'epoch_2.pth')
    words = 'there is no other' if fault == 'missing' else r'no checkpoint in .* is complete'
    with pytest.raises(FastViTError, match=words):
        work_dir.latest(copied)


@pytest.mark.parametrize('hint', [None, '', 'nonsense', '\x00', '/gone/epoch_3.pth'])
def test_any_hint(copied, hint):
    path = copied / 'last_checkpoint'
    path.unlink() if hint is None else path.write_text(hint)
    assert work_dir.latest(copied) == copied / 'epoch_3.pth'


def test_the_old_one_goes_after_the_new_one_stands(tmp_path):
    """With one to keep, the one before is there at each write; at the end, one of each is."""
    log = tmp_path / 'writes'
    put = WholeBackend.put

    def watched(self, content, path):
        there = sorted(p.stem for p in (tmp_path / 'run').glob('*.pth') if work_dir.is_whole(p))
        with log.open('a') as lines:
            lines.write(f'{Path(path).stem}: {" ".join(there)}\n')
        put(self, content, path)

    def run():
        WholeBackend.put = watched
        checkpoint = dict(
            type='WholeCheckpointHook', interval=1, max_keep_ckpts=1, save_best='score', rule='less'
        )

        class Known(Wander):
            def compute_metrics(self, results):
                return dict(score=next(scores))

        scores = iter([2, 3, 1])
        train(tmp_path / 'run', default_hooks=dict(checkpoint=checkpoint), val_evaluator=[Known()])

    assert forked(run) == 0
    assert log.read_text().splitlines() == [
        'epoch_1: ',
        'best_score_epoch_1: epoch_1',
        'epoch_1: best_score_epoch_1 epoch_1',
        'epoch_2: best_score_epoch_1 epoch_1',
        'epoch_3: best_score_epoch_1 epoch_2',
        'best_score_epoch_3: best_score_epoch_1 epoch_3',
        'epoch_3: best_score_epoch_1 best_score_epoch_3 epoch_3',
    ]
    assert files(tmp_path / 'run') == ['best_score_epoch_3.pth', 'epoch_3.pth', 'last_checkpoint']
