"""Runs that are killed, stopped and resumed, beside one that nothing disturbed."""

import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from mmengine.hooks import Hook
from mmengine.logging import MMLogger
from mmengine.runner import Runner
from small_device import Held
from small_runs import (
    BATCH,
    IMAGES,
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
from fastvit_mm.hooks import WholeCheckpointHook, stop_on_signal
from fastvit_mm.running import work_dir
from fastvit_mm.running.randomness import random_states, set_random_states
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


def send_to_all(number):
    """Send a signal to this process and its data workers, from outside."""
    # The trainer's own SIGTERM ends its data workers.
    command = ['kill', f'-{int(number)}', '--', f'-{os.getpgrp()}']
    subprocess.run(command, start_new_session=True, check=True)
    time.sleep(0.1)  # a data worker would die now


@pytest.mark.parametrize('by_epoch', [True, False], ids=['epochs', 'iterations'])
@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_stopped_by_a_signal(tmp_path, undisturbed, by_epoch, workers, number):
    """Within the second epoch, all processes at once, as a terminal and Slurm do it."""
    iteration, log = PER_EPOCH + 3, tmp_path / 'stderr'
    group = tmp_path / 'group'

    def note_and_send(runner):
        group.write_text(' '.join(str(p.pid) for p in multiprocessing.active_children()))
        send_to_all(number)

    def run():
        os.setpgrp()
        hooks = [At(iteration, note_and_send)]
        train(tmp_path / 'run', by_epoch=by_epoch, workers=workers, hooks=hooks)

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


def test_stopped_after_a_validation_that_was_made_up_for(tmp_path, undisturbed):
    """It starts data workers, which stay, before anything else of the resumed run."""
    kill = [At(PER_EPOCH, die, in_validation=True)]
    assert forked(train, tmp_path, workers=1, hooks=kill) == -signal.SIGKILL

    def run():
        os.setpgrp()
        hooks = [At(PER_EPOCH + 3, lambda _: send_to_all(signal.SIGTERM))]
        train(tmp_path, workers=1, hooks=hooks, resume=True)

    assert forked(run) == 143
    assert torch.load(work_dir.latest(tmp_path), weights_only=False)['meta']['iter'] == 9
    resume(tmp_path, workers=1)
    check_same(tmp_path, True, undisturbed)


def test_data_workers_are_prepared_once(tmp_path, monkeypatch):
    """However often a runner trains."""
    prepared = []

    def note(init, number):
        if init is not None:
            init(number)
        prepared.append(number)

    monkeypatch.setattr(stop_on_signal, 'outlast', note)

    def again():
        runner = make_run(tmp_path, workers=1)
        runner.train()
        runner.train()
        for loop in (runner.train_loop, runner.val_loop):
            loop.dataloader.worker_init_fn(0)
        assert prepared == [0, 0]

    assert forked(again) == 0


def test_killed_while_stopping_with_mmengines_checkpoints(tmp_path):
    """The name of the last checkpoint stays whole, whichever hook writes them."""

    def tear(path, text):
        path.write_bytes(text[:5].encode())
        die()

    def run():
        Path.write_text = tear
        hooks = dict(checkpoint=dict(type='CheckpointHook', interval=1))
        hooks.update(signals=dict(type='StopOnSignalHook'))
        stop = At(PER_EPOCH + 3, lambda _: os.kill(os.getpid(), 15))
        train(tmp_path, hooks=[stop], default_hooks=hooks)

    assert forked(run) == -signal.SIGKILL
    assert (tmp_path / 'last_checkpoint').read_text() == str(tmp_path / 'epoch_1.pth')


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


@pytest.mark.parametrize('batch', [1, 3])
def test_epochs_that_become_longer_or_shorter(tmp_path, batch):
    """As with other batches, data or GPUs: every image of every epoch is still trained."""
    length, log = IMAGES // batch, tmp_path / 'epochs'
    loader = dict(dataset=Drawn(), sampler=dict(type='DefaultSampler', shuffle=True))

    class Count(Hook):
        def before_train_epoch(self, runner):
            self.began = runner.iter

        def after_train_epoch(self, runner):
            with log.open('a') as lines:
                lines.write(f'{runner.iter - self.began} ')

        def before_val(self, runner):
            with log.open('a') as lines:
                lines.write('v ')

    def run(size, iteration, action):
        loaders = dict(train_dataloader=dict(loader, batch_size=size))
        hooks = [Count(), At(iteration, action)]
        train(tmp_path / 'run', hooks=hooks, resume=log.exists(), **loaders)

    def stop(runner):
        os.kill(os.getpid(), signal.SIGTERM)

    # in the second epoch, again there, in the third, and at the last step of that
    middle = PER_EPOCH + 3
    assert forked(run, BATCH, middle, stop) == 143
    assert forked(run, batch, middle + 2, stop) == 143
    assert forked(run, batch, middle + length + 1, stop) == 143
    assert forked(run, batch, middle + 2 * length, stop) == 143
    assert forked(run, batch, 0, None) == 0
    # the second began again, and a resumed one counts what is left of it
    assert log.read_text() == f'{PER_EPOCH} v {length - 2} v 0 v '
    end = torch.load(tmp_path / 'run' / 'epoch_3.pth', weights_only=False)['meta']
    assert end['iter'] == middle + 2 * length


@pytest.mark.parametrize('saved, done', [(None, 3), (-1, 0), (99, 0)])
def test_checkpoints_of_an_earlier_version(tmp_path, saved, done):
    """They do not say where in the epoch they are, and epochs had mostly the same length."""
    folder, wrong = tmp_path / 'run', saved is not None
    hooks = [At(PER_EPOCH + 3, lambda _: os.kill(os.getpid(), 15))]
    assert forked(train, folder, hooks=hooks) == 143
    path = work_dir.latest(folder)
    checkpoint = torch.load(path, weights_only=False)
    del checkpoint['meta']['resuming']['into_epoch']
    if wrong:
        checkpoint['meta']['iter'] = PER_EPOCH + saved
    torch.save(checkpoint, path)
    assert forked(train, folder, resume=True, load_from=str(path)) == 0
    end = torch.load(folder / 'epoch_3.pth', weights_only=False)['meta']
    assert end['iter'] == checkpoint['meta']['iter'] + 2 * PER_EPOCH - done


def test_a_folder_of_its_own(tmp_path, undisturbed):
    """`out_dir`, which does not exist yet."""
    checkpoint = dict(type='WholeCheckpointHook', interval=1, out_dir=str(tmp_path / 'a' / 'b'))
    checkpoint.update(save_best='score', rule='greater', max_keep_ckpts=2)
    assert forked(train, tmp_path / 'run', default_hooks=dict(checkpoint=checkpoint)) == 0
    names = files(tmp_path / 'a' / 'b' / 'run')
    assert sorted([*names, 'last_checkpoint']) == undisturbed(True)[1]


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / 'file').touch()
    checkpoint = dict(type='WholeCheckpointHook', out_dir=str(tmp_path / 'file'))
    hooks, log = dict(checkpoint=checkpoint), tmp_path / 'stderr'
    assert forked(train, tmp_path / 'run', default_hooks=hooks, log=log) == 2
    assert re.search(r'^error: cannot make .*file/run .*\(default_hooks', log.read_text(), re.M)


def test_many_interruptions_leave_one_checkpoint(tmp_path, undisturbed):
    for number, iteration in enumerate((8, 10, 11)):
        hooks = [At(iteration, lambda _: os.kill(os.getpid(), 15))]
        assert forked(train, tmp_path, hooks=hooks, resume=number > 0) == 143
        assert files(tmp_path)[-2:] == [f'iter_{iteration}.pth', 'last_checkpoint']
        assert len([n for n in files(tmp_path) if n.startswith('iter')]) == 1
    resume(tmp_path)
    check_same(tmp_path, True, undisturbed)


def test_a_validation_that_failed_is_forgotten(tmp_path):
    """What was drawn since is in the checkpoints of another training with the same runner."""

    def fail(runner):
        raise ZeroDivisionError

    def again():
        runner = make_run(tmp_path, hooks=[failing := At(PER_EPOCH, fail, in_validation=True)])
        with pytest.raises(ZeroDivisionError):
            runner.train()
        failing.iteration = 0
        (hook,) = (h for h in runner.hooks if isinstance(h, WholeCheckpointHook))
        seen = []
        runner.register_hook(At(PER_EPOCH + 2, lambda _: seen.append(hook.during_validation)))
        runner.train()
        assert seen == [None]

    assert forked(again) == 0


def test_mmengines_own_runner(tmp_path, undisturbed):
    """The hook alone does it, without our runner."""
    settings = dict(by_epoch=False, kind=Runner)
    assert forked(train, tmp_path, hooks=[At(10, die)], **settings) == -signal.SIGKILL
    resume(tmp_path, **settings)
    check_same(tmp_path, False, undisturbed)


@pytest.mark.parametrize('gpus', [0, 1, 3])
def test_generators_saved_on_two_gpus(monkeypatch, gpus):
    """mmengine's own runner puts all of a checkpoint on the GPU; states have to be on the CPU."""
    before, set_to = random_states(), {}

    def note(state, number):
        assert number < gpus and state.device.type == 'cpu'
        set_to[number] = state.tolist()

    monkeypatch.setattr(torch.cuda, 'device_count', lambda: gpus)
    monkeypatch.setattr(torch.cuda, 'set_rng_state', note)
    there = [Held(torch.tensor([n], dtype=torch.uint8)) for n in (5, 6)]
    drawn = torch.rand(3)
    set_random_states(dict(before, torch=Held(before['torch']), cuda=there))
    assert torch.equal(torch.rand(3), drawn)
    assert set_to == {n: [5 + n] for n in range(min(gpus, 2))}


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
def test_falls_back_to_the_newest_whole_checkpoint(copied, fault, caplog, capsys):
    MMLogger.get_instance(str(copied))  # the last runner's may be silent
    assert work_dir.latest(copied) == copied / 'epoch_3.pth'
    FAULTS[fault](copied / 'epoch_3.pth')
    assert work_dir.latest(copied) == copied / 'epoch_2.pth'
    said = capsys.readouterr()
    said = caplog.text + said.out + said.err
    assert 'epoch_3.pth' in said and 'epoch_2.pth' in said
    FAULTS[fault](copied / 'epoch_2.pth')
    if fault == 'missing':
        assert work_dir.latest(copied) is None
    else:
        with pytest.raises(FastViTError, match=r'no checkpoint in .* is whole'):
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
