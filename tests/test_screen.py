"""What a run shows: a bar in a terminal, lines elsewhere, no noise, and nothing unknown hidden."""

import json
import logging
import os
import pty
import re
import signal
import subprocess
import sys
import threading
import time
import warnings
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
from mmengine.hooks import CheckpointHook
from mmengine.runner import Runner
from rich.console import Console
from small_runs import ITERATIONS, At, Drawn, make_run

from fastvit_mm import launch, noise
from fastvit_mm.hooks import ScreenHook, screen


def run(folder, by_epoch=True, **more):
    """A run of 18 iterations, with a validation after each epoch of 6 or after 3 iterations."""
    more = dict(log_level='INFO', log_processor=dict(by_epoch=by_epoch)) | more
    return make_run(folder, by_epoch, **more)


def log_of(folder):
    return next(Path(folder).glob('*/*.log')).read_text()


@pytest.fixture(autouse=True)
def as_it_was(monkeypatch):
    monkeypatch.setattr(noise, 'everything', False)
    yield
    screen.close()


# Without a terminal ------------------------------------------------------------------------


def test_lines_in_a_pipe(tmp_path, capsys):
    runner = run(tmp_path, by_epoch=False)
    runner.train()
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert any(re.fullmatch(r'configuration and environment: .*\.log', line) for line in lines)
    training = [line for line in lines if line.startswith('Iter(train) ')]
    # the first iteration, and then as mmengine's hook logs them
    shown = [int(re.match(r'Iter\(train\) \[ *(\d+)/18\]', line)[1]) for line in training]
    logged = re.findall(r'Iter\(train\) \[ *(\d+)/18\]', log_of(tmp_path))
    assert shown == [1, *map(int, logged)] and ITERATIONS == 18
    for line in training:
        assert re.search(r'loss: \d+\.\d{4} .* [\d.]+ images/s  memory: [\d.]+ GB$', line)
        assert 'eta: 0:' in line
    tests = [line for line in lines if line.startswith('Iter(val) ')]
    assert len(tests) == ITERATIONS // 3 and all('score: ' in line for line in tests)
    assert 'Hooks will be executed' not in out and 'Exp name' not in out and '\x1b' not in out
    assert len(lines) < 40


def test_the_log_file_keeps_everything(tmp_path, capsys, monkeypatch):
    """With the hook and without it, log file and scalars are the same."""
    run(tmp_path / 'with', by_epoch=False).train()
    monkeypatch.setattr(screen, 'take_over', lambda *args, **more: None)
    capsys.readouterr()
    run(tmp_path / 'without', by_epoch=False).train()
    assert 'Hooks will be executed' in capsys.readouterr().out

    def said(folder):
        text = log_of(tmp_path / folder)
        text = re.sub(r'\((HIGHEST|LOW[A-Z]*|VERY.*) *\) ScreenHook *\n', '', text)
        text = re.sub(r'\d{4}/\d\d/\d\d [\d:]+', '', text.replace(f'/{folder}', ''))
        text = re.sub(r'(time|eta): [\d.:]+|(Exp name: ).*', r'\2', text)
        # a metric is made before the logger; the other is said once in a process
        once = 'prefix is not set', 'HardDiskBackend'
        return [line for line in text.splitlines() if not any(one in line for one in once)]

    def scalars(folder):
        (path,) = (tmp_path / folder).glob('*/vis_data/scalars.json')
        rows = map(json.loads, path.read_text().splitlines())
        return [{k: v for k, v in row.items() if 'time' not in k} for row in rows]

    assert any('Exp name' in line or 'Hooks will' in line for line in said('with'))
    assert said('with') == said('without')
    assert scalars('with') == scalars('without') and scalars('with')


def test_a_long_pause_is_broken(tmp_path, capsys, monkeypatch):
    """Where iterations take minutes, more lines appear than mmengine's."""
    monkeypatch.setattr(screen, 'PATIENCE', 0)
    run(tmp_path, by_epoch=False).train()
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if line.startswith('Iter(train)')]) >= ITERATIONS


def test_quiet_where_it_was_asked_for(tmp_path, capsys):
    """As on the ranks that are not the first: their level is ERROR."""
    runner = run(tmp_path, log_level='ERROR')
    runner.train()
    assert capsys.readouterr().out == ''
    assert runner.hooks and any(isinstance(h, ScreenHook) for h in runner.hooks)


def test_debug_shows_everything(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(noise, 'everything', True)
    run(tmp_path, by_epoch=False).train()
    out = capsys.readouterr().out
    assert 'Hooks will be executed' in out and '- mmengine - ' in out


def test_in_mmengines_own_runner(tmp_path, capsys):
    """From any config, without our runner or our tools."""
    runner = run(tmp_path, kind=Runner, by_epoch=False, hooks=[dict(type='ScreenHook')])
    runner.train()
    lines = capsys.readouterr().out.splitlines()
    assert any(re.match(r'Iter\(train\) \[ 1/18\].*images/s', line) for line in lines)
    assert not any(' - mmengine - INFO - Iter' in line for line in lines)


def test_warnings_stay(tmp_path, capsys):
    runner = run(tmp_path, by_epoch=False)
    capsys.readouterr()
    runner.logger.info('a message of a library')
    runner.logger.warning('nobody has seen this before')
    runner.logger.warning('"FileClient" will be deprecated in future. Please use io functions')
    runner.logger.error('[red]an error')
    assert capsys.readouterr().out.splitlines() == [
        'warning: nobody has seen this before',
        'error: [red]an error',
    ]
    log = log_of(tmp_path)
    assert all(words in log for words in ('of a library', 'seen this', 'FileClient', 'an error'))


def test_an_exception_that_is_logged(tmp_path, capsys):
    runner = run(tmp_path)
    capsys.readouterr()
    try:
        raise KeyError('lost')
    except KeyError:
        runner.logger.exception('a hook failed')
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ['error: a hook failed', 'Traceback (most recent call last):']
    assert lines[-1] == "KeyError: 'lost'"


def test_with_mlflow(tmp_path, monkeypatch):
    """Its backend asks each handler of the logger for its stream."""
    monkeypatch.setitem(sys.modules, 'mlflow', mlflow := MagicMock())
    logged = dict(type='Visualizer', vis_backends=[dict(type='MLflowVisBackend')])
    run(tmp_path, visualizer=logged).visualizer.add_scalar('loss', 0.5, 7)
    mlflow.log_metric.assert_called_once_with('loss', 0.5, 7)


@pytest.mark.parametrize('best', [None, 'score'])
def test_metrics_that_are_no_numbers(best):
    """They end no training; the bar shows one that is."""
    saver = CheckpointHook(save_best=best, rule='greater' if best else None)
    hook, runner = ScreenHook(), SimpleNamespace(hooks=[saver])
    strange = dict(a=None, b='high', c=torch.ones(2), d=[1])
    hook.after_val_epoch(runner, strange | dict(score='none'))
    assert hook.metric == ''
    hook.after_val_epoch(runner, strange | dict(score=0.25))
    assert hook.metric == 'score 0.25'


# Noise -------------------------------------------------------------------------------------


@pytest.mark.filterwarnings('default')
def test_known_noise_by_its_own_words(capsys):
    noise.install()
    with warnings.catch_warnings(record=True) as seen:
        for text in (*noise.KNOWN, 'Default values are', 'x' + noise.KNOWN[0]):
            warnings.warn(text + ' ...', stacklevel=1)
    assert [str(one.message) for one in seen] == [
        'Default values are ...',
        f'x{noise.KNOWN[0]} ...',
    ]
    from mmengine.logging import print_log as patched

    patched('for debugging', level=logging.DEBUG)
    patched('worth knowing')
    patched('an alarm', level=logging.WARNING)
    noise.print_unknown('index created!')
    noise.print_unknown('DONE (t=0.01s).')
    noise.print_unknown('Average Precision', 1, sep=': ')
    assert capsys.readouterr().out.splitlines() == [
        'worth knowing',
        'an alarm',
        'Average Precision: 1',
    ]


@pytest.mark.filterwarnings('default')
def test_one_warning_less():
    """Whatever a library does to the filters."""
    with warnings.catch_warnings(record=True) as seen, noise.without('known'):
        warnings.simplefilter('once')
        warnings.warn('known, and untrue', stacklevel=1)
        warnings.warn('unknown', DeprecationWarning, stacklevel=1)
    assert [(str(one.message), one.category) for one in seen] == [('unknown', DeprecationWarning)]


IMPORTS = """
import fastvit_mm, mmdet.datasets, mmdet.evaluation, mmseg.datasets, mmpretrain.datasets
import fastvit_mm.data.coco
"""


@pytest.mark.slow
def test_importing_says_nothing():
    """Every package's data sets and metrics, some of which look for what is not installed."""
    done = subprocess.run(
        [sys.executable, '-c', IMPORTS], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == '' and 'faster_coco_eval' not in done.stderr


# In a terminal -----------------------------------------------------------------------------


class Terminal:
    """A terminal of 100 columns; ``shown`` is all that was written to it."""

    def __init__(self):
        self.master, self.slave = pty.openpty()
        self.shown = ''
        self.reader = threading.Thread(target=self.read, daemon=True)
        self.reader.start()

    def read(self):
        while True:
            try:
                data = os.read(self.master, 1 << 16)
            except OSError:
                return
            if not data:
                return
            self.shown += data.decode(errors='replace')

    def close(self):
        os.close(self.slave)
        self.reader.join(20)
        os.close(self.master)

    def lines(self):
        """What a reader sees in the end: of a line that is drawn again, the last version."""
        text = re.sub(r'\x1b\[\?25[lh]|\x1b\[[\d;]*m', '', self.shown).replace('\r\n', '\n')
        return [re.split(r'\r|\x1b\[2K', line)[-1].rstrip() for line in text.split('\n')]


def in_terminal(function):
    """Call ``function`` in a process of its own, whose input and output are a terminal; what it
    showed, and its exit code."""
    terminal = Terminal()
    child = os.fork()
    if child == 0:
        os.setsid()
        for descriptor in (0, 1, 2):
            os.dup2(terminal.slave, descriptor)
        sys.stdout, sys.stderr = (open(fd, 'w', closefd=False) for fd in (1, 2))  # noqa: SIM115
        os.environ.update(COLUMNS='100', LINES='40', TERM='xterm-256color')
        torch.set_num_threads(1)
        code = 1
        try:
            launch.run(lambda _: function(), argv=[])
            code = 0
        except SystemExit as end:
            code = end.code
        finally:
            screen.close()
            sys.stdout.flush()
            os._exit(code)
    deadline = time.monotonic() + 120
    while not (ended := os.waitpid(child, os.WNOHANG))[0]:
        assert time.monotonic() < deadline, os.kill(child, signal.SIGKILL) or terminal.shown
        time.sleep(0.02)
    terminal.close()
    return terminal, os.waitstatus_to_exitcode(ended[1])


def test_a_bar_in_a_terminal(tmp_path):
    class Talking(Drawn):
        def __getitem__(self, i):
            if i == 5:
                print('a library talks')
            return super().__getitem__(i)

    def train():
        runner = run(tmp_path)
        runner._train_dataloader['dataset'] = Talking()
        runner.train()

    terminal, code = in_terminal(train)
    assert code == 0, terminal.shown
    lines = terminal.lines()
    plain = re.sub(r'\x1b\[[\d;]*m', '', terminal.shown)
    bars = re.findall(r'epoch \d/3 \S+ +(\d+)/18 +loss [\d.]+[^\r\n]*img/s', plain)
    assert bars and bars[-1] == '18'
    assert 'score 0.' in terminal.shown, 'the metric, beside the losses of the next epoch'
    assert 'a library talks' in lines
    # LoggerHook's lines about iterations: one for each epoch, before the bar shows a validation
    assert len([line for line in lines if line.startswith('Epoch(train)')]) == 3
    assert len([line for line in lines if line.startswith('Epoch(val)')]) == 3
    assert terminal.shown.rindex('\x1b[?25h') > terminal.shown.rfind('\x1b[?25l')


def test_errors_in_a_file_stay_there(capsys):
    """With a bar in the terminal and `2> errors.txt`."""
    screen.drawn.append(screen.new_bar(Console(file=StringIO(), force_terminal=True)))
    print('a warning', file=sys.stderr)
    assert capsys.readouterr().err == 'a warning\n'


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_signal_leaves_the_terminal_in_order(tmp_path, number):
    hook = At(8, lambda runner: os.kill(os.getpid(), number))
    terminal, code = in_terminal(lambda: run(tmp_path, hooks=[hook]).train())
    assert code == (-9 if number == signal.SIGKILL else 128 + number), terminal.shown
    assert terminal.shown.rindex('\x1b[?25h') > terminal.shown.rfind('\x1b[?25l')
    if number != signal.SIGKILL:
        lines = [line for line in terminal.lines() if line]
        assert any('stopping after this step' in line for line in lines)
        assert 'after iteration 8' in lines[-1] and '--resume' in lines[-1]


def test_an_error_stands_below_the_bar(tmp_path):
    def fail(runner):
        raise RuntimeError('the end')

    terminal, code = in_terminal(lambda: run(tmp_path, hooks=[At(8, fail)]).train())
    lines = [line for line in terminal.lines() if line]
    assert code == 1 and lines[-1].startswith('error: ') and 'the end' in lines[-1]
