"""A run's folder: whose it is, and what in it is resumed."""

import importlib.util
import multiprocessing
import os
import sys
from datetime import timedelta

import pytest
import torch
from small_runs import Drawn, Net, files, forked, make_run

from fastvit_mm import FastViTError
from fastvit_mm.running import work_dir


def checkpoint(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({}, path)
    return path


def hint(folder, text):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / 'last_checkpoint').write_text(str(text))
    return folder


@pytest.mark.parametrize(
    'text', ['s3://bucket/run/epoch_3.pth', 'out/run/epoch_3.pth', 'model_3.pth', '{}/a/b.pth']
)
def test_a_hint_names_any_place(tmp_path, monkeypatch, text):
    """An address, a folder of its own (``out_dir``) relative to where the run began, any name."""
    monkeypatch.chdir(tmp_path)
    run, text = tmp_path / 'run', text.format(tmp_path)
    place = run / text if '/' not in text else tmp_path / text
    if '://' not in text:
        checkpoint(place)
    checkpoint(run / 'epoch_1.pth')
    found = work_dir.latest(hint(run, text))
    assert found == (text if '://' in text else place)


@pytest.mark.parametrize('text', ['epoch_3.pth', '/gone/epoch_3.pth', 'out/run/epoch_3.pth', 'x'])
def test_a_checkpoint_that_is_gone_is_no_new_run(tmp_path, monkeypatch, text):
    """Another run's, where the tool happens to be called, does not stand in for it."""
    monkeypatch.chdir(tmp_path)
    checkpoint(tmp_path / 'epoch_9.pth')
    run = hint(tmp_path / 'run', text)
    with pytest.raises(FastViTError, match=rf"'{text}', which is missing .*--resume FILE"):
        work_dir.latest(run)
    checkpoint(run / 'iter_1.pth')
    assert work_dir.latest(run) == run / 'iter_1.pth'


@pytest.mark.parametrize('text', [None, '', ' \n'])
def test_an_empty_work_dir_is_a_new_run(tmp_path, text):
    if text is not None:
        hint(tmp_path, text)
    assert work_dir.latest(tmp_path) is None
    assert work_dir.latest(tmp_path / 'none') is None


@pytest.mark.parametrize('text', ['\0', 'a\0/b.pth', 'x/' * 3000, 'long' * 3000, '.', '..', '/'])
def test_a_hint_of_garbage(tmp_path, text):
    checkpoint(tmp_path / 'epoch_1.pth')
    assert work_dir.latest(hint(tmp_path, text)) == tmp_path / 'epoch_1.pth'


def test_a_missing_hint_is_said_to_be_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(work_dir, 'print_log', lambda text, *_: said.append(text))
    said = []
    checkpoint(tmp_path / 'epoch_1.pth')
    assert work_dir.latest(tmp_path) == tmp_path / 'epoch_1.pth'
    assert 'last_checkpoint is missing or names no checkpoint' in said[0]


def claims(folder, launcher='none', **environment):
    """What another process is told that claims ``folder`` like a tool would."""

    def enter():
        os.environ.update(environment)
        with work_dir.claim(folder, resume=False, launcher=launcher):
            pass

    log = folder.parent / ' '.join(['stderr', launcher, *environment])
    return forked(enter, log=log), log.read_text()


def test_without_a_launcher_each_process_is_a_run(tmp_path):
    """torchrun without --launcher starts several; what Slurm packs into a job has other folders."""
    run = tmp_path / 'run'
    with work_dir.claim(run, resume=False):
        code, error = claims(run, RANK='1', WORLD_SIZE='2')
        assert code == 2 and f'in use by process {os.getpid()}' in error
        assert '--launcher pytorch' in error
        for launcher, environment in (
            ('none', dict(SLURM_PROCID='1')),
            ('pytorch', dict(RANK='0', WORLD_SIZE='2')),
        ):
            code, error = claims(run, launcher, **environment)
            assert code == 2 and 'in use' in error and '--launcher' not in error
        assert claims(run, 'pytorch', RANK='1', WORLD_SIZE='2')[0] == 0  # the first has it
        assert claims(tmp_path / 'other', SLURM_PROCID='1')[0] == 0
    assert (tmp_path / 'other' / '.lock').is_file()


def test_clear_keeps_what_is_elsewhere(tmp_path):
    for keep in ('s3://bucket/x.pth', tmp_path / 'gone.pth', None):
        mine = checkpoint(tmp_path / 'epoch_1.pth')
        work_dir.clear(tmp_path, keep=keep)
        assert not mine.exists()


class Unreadable(Drawn):
    def __len__(self):
        raise FastViTError('the annotations are broken')


@pytest.mark.parametrize('broken', ['data', 'weights', None])
def test_overwrite_waits_until_the_new_run_can_begin(tmp_path, broken):
    run = tmp_path / 'run'
    old = checkpoint(run / 'epoch_9.pth')
    best = checkpoint(run / 'best_score_epoch_9.pth')
    torch.save(dict(state_dict=Net().state_dict()), best)
    runner = make_run(run, load_from=str(run / 'gone.pth' if broken == 'weights' else best))
    runner.register_hook(work_dir.OverwriteHook())
    if broken == 'data':
        runner._val_dataloader['dataset'] = Unreadable()
    if broken:
        with pytest.raises(FastViTError):
            runner.train()
    else:
        runner.train()
        assert 'epoch_3.pth' in files(run)
    assert old.is_file() == bool(broken) and best.is_file()


@pytest.mark.parametrize(
    'error, ours',
    [
        (OSError(28, 'No space left on device', '/dev/shm/torch_1'), False),
        (OSError(28, 'No space left on device', '{}/vis_data/scalars.json'), True),
        (OSError(28, 'No space left on device'), True),
        (PermissionError(13, 'Permission denied', '{}/20260101.log'), True),
    ],
)
def test_whose_disk_is_full(tmp_path, error, ours):
    if error.filename:
        error.filename = error.filename.format(tmp_path)
    expected = pytest.raises(FastViTError if ours else OSError, match='work dir' if ours else 'shm')
    with expected, work_dir.says_if_not_writable(tmp_path):
        raise error


def test_without_locks(tmp_path, monkeypatch):
    """Windows has no fcntl."""
    monkeypatch.setitem(sys.modules, 'fcntl', None)
    spec = importlib.util.spec_from_file_location('on_windows', work_dir.__file__)
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    said = []
    monkeypatch.setattr(module, 'print_log', lambda text, *_: said.append(text))
    with module.claim(tmp_path, resume=False):
        assert 'no locks' in said[0]


def test_a_claim_that_fails_ends_all_ranks(tmp_path):
    """Under Slurm nobody else tells the others, which would wait for the first."""
    checkpoint((run := tmp_path / 'run') / 'epoch_1.pth')
    (place := tmp_path / 'place').mkdir()

    def rank(number):
        os.environ['SLURM_PROCID'] = str(number)
        store = f'file://{place}/rendezvous'
        torch.distributed.init_process_group(
            'gloo',
            init_method=store,
            rank=number,
            world_size=2,
            timeout=timedelta(seconds=20),
        )
        with work_dir.claim(run, resume=False, launcher='slurm'):
            (tmp_path / 'inside').touch()

    context = multiprocessing.get_context('fork')
    second = context.Process(target=forked, args=(rank, 1), kwargs=dict(log=tmp_path / 'stderr'))
    second.start()
    assert forked(rank, 0) == 2
    second.join(30)
    said = (tmp_path / 'stderr').read_text()
    second.kill()
    assert 'rank 0 failed' in said and 'contains checkpoints of an earlier run' in said
    assert not (tmp_path / 'inside').exists()
