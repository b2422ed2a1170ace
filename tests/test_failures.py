"""What a tool says when it fails, and its exit code."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mmengine.logging import MMLogger
from mmengine.registry import Registry
from torch.utils.data import DataLoader, Dataset

from fastvit_mm import FastViTError, launch

ROOT = Path(__file__).parent.parent
TOOLS = sorted(path.stem for path in (ROOT / 'tools').glob('*.py'))


@pytest.fixture
def no_run(monkeypatch):
    """No run of another test has left its log."""
    monkeypatch.setattr(MMLogger, '_instance_dict', type(MMLogger._instance_dict)())


@pytest.fixture
def outcome(no_run, capfd):
    """Exit code and stderr of a main function."""

    def call(main, *argv):
        capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            launch.run(main, list(argv))
        return end.value.code, capfd.readouterr().err

    return call


def raising(error):
    def main(argv):
        raise error

    return main


def test_an_error_for_users(outcome):
    code, err = outcome(raising(FastViTError('no such\nfile')))
    assert (code, err) == (2, 'error: no such file\n')
    code, err = outcome(raising(FastViTError('no such file')), '--debug')
    assert code == 2 and 'Traceback (most recent call last)' in err and 'in main' in err
    assert err.splitlines()[-1] == 'error: no such file'


def test_an_error_that_nobody_foresaw(outcome, tmp_path, monkeypatch):
    monkeypatch.setattr('fastvit_mm.failures.gettempdir', lambda: tmp_path)
    code, err = outcome(raising(IndexError('list index\nout of range')))
    assert code == 1 and len(err.splitlines()) == 1
    found = re.fullmatch(r'error: IndexError: list index out of range \(traceback in (.+)\)\n', err)
    text = Path(found[1]).read_text()
    assert Path(found[1]).parent == tmp_path
    assert 'Traceback' in text and 'in main' in text and 'IndexError: list index' in text

    code, err = outcome(raising(IndexError()), '--debug')
    assert code == 1 and 'Traceback' in err and err.splitlines()[-1] == 'error: IndexError'
    assert len(list(tmp_path.iterdir())) == 1


def test_the_traceback_lies_beside_the_log(outcome, tmp_path, monkeypatch):
    (log := tmp_path / 'run').mkdir()

    def main(argv):
        MMLogger.get_instance('a run', log_file=str(log / 'run.log'))
        raise IndexError('out of range')

    code, err = outcome(main)
    file = Path(re.search(r'traceback in (.+)\)', err)[1])
    assert code == 1 and file.parent == log and 'IndexError' in file.read_text()
    # a folder that is gone, and no temporary folder either
    for path in (file, log / 'run.log'):
        path.unlink()
    log.rmdir()
    (other := tmp_path / 'other').mkdir()
    monkeypatch.setattr('fastvit_mm.failures.gettempdir', lambda: other)
    assert (
        Path(re.search(r'traceback in (.+)\)', outcome(raising(IndexError('x')))[1])[1]).parent
        == other
    )
    monkeypatch.setattr('fastvit_mm.failures.gettempdir', lambda: tmp_path / 'none')
    assert 'error: IndexError: x (add --debug' in outcome(raising(IndexError('x')))[1]


class Broken(Dataset):
    def __init__(self, error):
        self.error = error

    def __len__(self):
        return 4

    def __getitem__(self, index):
        raise self.error


@pytest.mark.parametrize('workers', [0, 1])
def test_an_error_in_a_data_worker(outcome, workers):
    """torch raises it again with the worker's traceback in its text."""

    def read(error):
        return lambda _: list(DataLoader(Broken(error), num_workers=workers))

    code, err = outcome(read(FastViTError('a.jpg: cannot be read')))
    assert (code, err) == (2, 'error: a.jpg: cannot be read\n')
    for error, text in (
        (IndexError('a: b\nc'), 'IndexError: a: b c'),
        (KeyError('name'), "KeyError: 'name'"),
        (AssertionError(), 'AssertionError'),
    ):
        code, err = outcome(read(error))
        assert code == 1 and re.match(rf'error: {text}(: {text})? \(traceback', err), err
    # the error of a worker that another one caused
    code, err = outcome(lambda _: list(DataLoader(Chained(None), num_workers=workers)))
    assert (code, err) == (2, 'error: b.jpg: cannot be read\n')


class Chained(Broken):
    def __getitem__(self, index):
        try:
            raise OSError('disk')
        except OSError as error:
            raise FastViTError('b.jpg: cannot be read') from error


def test_an_error_that_is_raised_again(outcome):
    """As registries do, with their own prefix, and some libraries, as another type."""

    def again(kind, chained):
        def main(argv):
            try:
                raise FastViTError('bad arch')
            except FastViTError as error:
                if chained:
                    raise kind('something went wrong') from error
                raise kind(f'class `FastViT` in fastvit.py: {error}') from None

        return main

    def implicitly(argv):
        try:
            raise FastViTError('bad arch')
        except FastViTError as error:
            raise RuntimeError(f'class `FastViT`: {error}')  # noqa: B904

    def unrelated(argv):
        try:
            raise FastViTError('bad arch')
        except FastViTError:
            raise IndexError('while cleaning up')  # noqa: B904

    assert outcome(again(RuntimeError, True)) == (2, 'error: bad arch\n')
    assert outcome(implicitly) == (2, 'error: bad arch\n')
    assert outcome(again(FastViTError, False))[0] == 2
    assert outcome(unrelated)[0] == 1


THINGS = Registry('thing', scope='mmengine')


@THINGS.register_module()
class Picky:
    def __init__(self, size):
        if size > 3:
            raise ValueError(f'size {size} is too large')
        if size < 0:
            raise torch.OutOfMemoryError('out of memory')


def test_what_cannot_be_built_is_the_configs_fault(outcome):
    code, err = outcome(lambda _: THINGS.build(dict(type='Picky', size=4)))
    assert code == 2 and len(err.splitlines()) == 1
    assert 'Picky cannot be built as configured: ValueError: ' in err and 'too large' in err
    code, err = outcome(lambda _: THINGS.build(dict(type='Picky', sizes=4)))
    assert code == 2 and "unexpected keyword argument 'sizes'" in err
    assert outcome(lambda _: THINGS.build(dict(type='Picky', size=-1)))[0] == 1


@pytest.mark.parametrize('name', TOOLS)
def test_every_tool_has_the_option(name):
    """In its help; benchmark's is in that of its commands."""
    command = [sys.executable, ROOT / 'tools' / f'{name}.py']
    command += ['deploy'] if name == 'benchmark' else []
    run = subprocess.run([*command, '--help'], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert '--debug' in run.stdout


def test_as_a_process(tmp_path):
    """The traceback is shown, and only then."""
    command = [sys.executable, ROOT / 'tools' / 'convert_weights.py', 'no.pth', 'out.pth']
    for more in ([], ['--debug']):
        run = subprocess.run([*command, *more], cwd=tmp_path, capture_output=True, text=True)
        assert run.returncode == 2
        assert ('Traceback' in run.stderr) == bool(more)
        assert run.stderr.strip().splitlines()[-1].startswith("error: checkpoint 'no.pth' does not")


def test_an_operator_without_a_deterministic_algorithm(outcome):
    """PyTorch's own refusal, as --deterministic can cause it."""

    def main(argv):
        torch.use_deterministic_algorithms(True)
        try:
            torch.zeros(3).put_(torch.tensor([0]), torch.ones(1))
        finally:
            torch.use_deterministic_algorithms(False)

    code, err = outcome(main)
    assert code == 2 and err.startswith('error: put_') and 'leave out --deterministic' in err
