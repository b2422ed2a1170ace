"""Several processes on CPUs (gloo), as torchrun and Slurm start them."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import ranks_program
import torch
from mmengine.config import Config
from mmpretrain.registry import MODELS

from fastvit_mm import FastViTError
from fastvit_mm.running import processes, watch

ROOT = Path(__file__).parent.parent
CONFIGS = dict(
    classification='configs/classification/fastvit_t8_in1k.py',
    detection='configs/detection/mask_rcnn_fastvit_t8_coco.py',
    segmentation='configs/segmentation/fpn_fastvit_t8_ade20k.py',
    hand_mesh='configs/hand_mesh/mano_fastvit_t8_freihand.py',
)
SHALLOW = """
_base_ = '{base}'
arch = dict(_delete_=True, depths=(1, 1, 1, 1), widths=(16, 32, 64, 64), ffn_ratio=2)
model = dict(backbone=dict(arch=arch), {rest})
"""
POOLED = 'neck=dict(in_channels=64), head=dict(in_channels=128)'
PYRAMID = 'neck=dict(in_channels=[16, 32, 64, 64], out_channels=32)'
REST = dict(
    classification=POOLED,
    detection=f"""{PYRAMID}, rpn_head=dict(in_channels=32, feat_channels=32), roi_head=dict(
        bbox_roi_extractor=dict(out_channels=32),
        mask_roi_extractor=dict(out_channels=32),
        bbox_head=dict(in_channels=32, fc_out_channels=64),
        mask_head=dict(in_channels=32, conv_out_channels=32, num_convs=1),
    )""",
    segmentation=f'{PYRAMID}, decode_head=dict(in_channels=[32] * 4, channels=16)',
    hand_mesh=POOLED,
)
PATIENCE = 400  # seconds, on two busy cores
ENV = {**os.environ, 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': ''}


def shallow(task, folder):
    path = folder / f'{task}.py'
    path.write_text(SHALLOW.format(base=ROOT / CONFIGS[task], rest=REST[task]))
    return path


def torchrun(*args):
    """Two processes, at a port that is free."""
    run = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2']
    return [*run, *map(str, args)]


def descendants(pid):
    """Of a running process, itself included."""
    found = [pid]
    for tasks in Path(f'/proc/{pid}/task').glob('*/children'):
        with contextlib.suppress(OSError):
            for child in tasks.read_text().split():
                found += descendants(int(child))
    return found


class Started:
    """Programs of which nothing is left afterwards; stdout and stderr go to files."""

    def __init__(self, folder, *commands, env=ENV):
        folder.mkdir(parents=True, exist_ok=True)
        self.outputs = [folder / f'{i}.out' for i in range(len(commands))]
        self.errors = [folder / f'{i}.err' for i in range(len(commands))]
        self.processes = [
            subprocess.Popen(
                list(map(str, command)),
                cwd=folder.parent,
                env={**env, **extra},
                stdout=out.open('w'),
                stderr=err.open('w'),
            )
            for (command, extra), out, err in zip(commands, self.outputs, self.errors, strict=True)
        ]

    def __enter__(self):
        return self

    def end(self, number=0, seconds=PATIENCE):
        """Exit code and stderr of one."""
        code = self.processes[number].wait(timeout=seconds)
        return code, self.errors[number].read_text()

    def wait_for(self, text, number=0, seconds=PATIENCE):
        """Until the program has written ``text``."""
        deadline = time.monotonic() + seconds
        while text not in self.outputs[number].read_text():
            assert self.processes[number].poll() is None, self.errors[number].read_text()
            assert time.monotonic() < deadline, self.outputs[number].read_text()[-2000:]
            time.sleep(0.2)

    def __exit__(self, *_):
        for pid in [pid for p in self.processes for pid in descendants(p.pid)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for process in self.processes:
            process.wait()


@pytest.fixture(scope='module')
def home(tmp_path_factory):
    return tmp_path_factory.mktemp('processes')


@pytest.fixture(scope='module')
def results(home, once):
    """What each of one ('1') and of two processes ('2') gives, by task."""
    return once('processes', lambda: run_tasks(home))


def run_tasks(home):
    tasks = [f'{task}={shallow(task, home)}' for task in CONFIGS]
    program, found = ROOT / 'tests' / 'ranks_program.py', {}
    for number in (1, 2):
        out = home / str(number)
        start = [sys.executable] if number == 1 else torchrun()
        launcher = 'none' if number == 1 else 'pytorch'
        with Started(home / f'of {number}', ([*start, program, out, launcher, *tasks], {})) as run:
            code, error = run.end()
        assert code == 0, error[-4000:]
        found[str(number)] = json.loads((out / 'results.json').read_text())
    assert len(found['2']) == 2
    return found


@pytest.mark.slow
@pytest.mark.parametrize('task', CONFIGS)
def test_two_processes_train_as_one(results, task):
    one, (first, second) = results['1'][0][task], (rank[task] for rank in results['2'])
    assert one['norms'] == ['BatchNorm2d'] and first['norms'] == ['SyncBatchNorm']
    assert len(one['losses']) == 20 and one['losses'][0] != one['losses'][-1]
    assert first['losses'] == second['losses']
    assert first['losses'] == pytest.approx(one['losses'], abs=1e-4)
    assert first['apart'] == 0 and not first['unused']


@pytest.mark.slow
@pytest.mark.parametrize('task', CONFIGS)
def test_two_processes_test_as_one(results, task):
    """7 images: mmengine tests one of them twice."""
    one, (first, second) = results['1'][0][task], (rank[task] for rank in results['2'])
    for form in ('plain', 'reparam'):
        assert len(set(one[form]['order'])) == 7
        assert first[form] == second[form]
        assert first[form].pop('order') == one[form].pop('order')
        assert first[form] == pytest.approx(one[form], rel=1e-3, nan_ok=True)
        assert any(value > 0 for value in first[form].values())


@pytest.mark.slow
@pytest.mark.parametrize('task', CONFIGS)
def test_two_processes_show_each_image_once(results, task):
    images = []
    for run in (results['1'][0][task], results['2'][0][task]):
        listed, drawn = run['shown']['listed'], run['shown']['drawn']
        assert drawn == [picture for _, picture in listed] and len(drawn) == 7
        for number, (image, picture) in enumerate(listed, 1):
            assert picture == f'{number:05d}_{Path(image).stem}.jpg'
        images.append({Path(image).name for image, _ in listed})
    assert images[0] == images[1] and len(images[0]) == 7


class Shelf(SimpleHTTPRequestHandler):
    """Serves files and counts what is asked for."""

    asked = []

    def do_GET(self):
        self.asked.append(self.path)
        super().do_GET()

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def served(folder):
    server = ThreadingHTTPServer(('127.0.0.1', 0), partial(Shelf, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    Shelf.asked.clear()
    yield f'http://127.0.0.1:{server.server_port}'
    server.shutdown()
    server.server_close()


def free_port():
    with socket.create_server(('127.0.0.1', 0)) as server:
        return server.getsockname()[1]


def slurm_task(number, port):
    """What Slurm tells one of two tasks on a machine."""
    variables = dict(PROCID=number, NTASKS=2, LOCALID=number, JOB_ID=7, JOB_NODELIST='localhost')
    own = {f'SLURM_{name}': str(value) for name, value in variables.items()}
    return {**own, 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(port)}


@pytest.mark.slow
def test_one_is_killed(home, tmp_path, monkeypatch):
    """Under Slurm, where nothing else ends the other one; before, one of them fetches the weights
    for both."""
    monkeypatch.chdir(home)
    config = shallow('classification', home)
    cfg = ranks_program.load(config, 'none', tmp_path)
    (shelf := tmp_path / 'shelf').mkdir()
    state = MODELS.build(dict(cfg.model, data_preprocessor=cfg.data_preprocessor)).state_dict()
    torch.save(dict(state_dict=state), shelf / 'weights.pth')
    train = [sys.executable, ROOT / 'tools/train.py', config, '--demo']
    train += ['--launcher', 'slurm', '--work-dir', tmp_path / 'work', '--cfg-options']
    train += ['default_hooks.logger.interval=1', 'val_cfg=None', 'val_dataloader=None']
    train += ['val_evaluator=None', 'train_dataloader.batch_size=4']
    train += ['default_hooks.checkpoint.save_best=None', 'train_dataloader.num_workers=1']
    port, own = free_port(), {'TORCH_HOME': str(tmp_path / 'cache')}
    with served(shelf) as address:
        command = [*train, f'load_from={address}/weights.pth']
        tasks = [(command, {**slurm_task(number, port), **own}) for number in (0, 1)]
        with Started(home / 'killed', *tasks) as run:
            run.wait_for('Epoch(train)')
            run.processes[1].kill()
            code, error = run.end(seconds=30)
    assert Shelf.asked == ['/weights.pth']
    assert code == 1 and 'Traceback' not in error
    (line,) = re.findall('^error: .*', error, re.MULTILINE)
    assert line.startswith('error: rank 1 died without a word')


@pytest.fixture
def watched(monkeypatch):
    """Two ends of a connection, of which a Watch listens at one, and how its process ended."""
    ended = threading.Event()
    monkeypatch.setattr(watch.os, '_exit', lambda code: ended.set())
    monkeypatch.setattr(watch.os, 'register_at_fork', lambda **_: None)
    monkeypatch.setattr(watch.atexit, 'register', lambda *_: None)
    mine, other = socket.socketpair()
    yield partial(watch.Watch, 0, {1: mine}), other, ended
    mine.close(), other.close()


@pytest.mark.parametrize(
    'words, line',
    [
        (b'', 'rank 1 died without a word'),
        (b'..rank 1 failed: no space left', 'rank 1 failed: no space left'),
        (b'...done', None),
        (b'done.', None),  # a beat came between the word and the end of the connection
    ],
)
def test_last_words(watched, capfd, words, line):
    watch, other, ended = watched
    watch(60)
    other.sendall(words)
    other.shutdown(socket.SHUT_WR)
    assert ended.wait(0.5 if line is None else 10) == (line is not None)
    error = capfd.readouterr().err
    assert error.startswith(f'error: {line}') if line else error == ''


def test_a_silent_machine(watched, capfd):
    watch, other, ended = watched
    watch(0.8)
    for _ in range(8):  # as long as it is heard of, all is well
        other.sendall(b'.')
        time.sleep(0.2)
    assert not ended.is_set()
    assert ended.wait(10)
    assert 'rank 1 has been silent for 1 s' in capfd.readouterr().err


def test_an_error_of_its_own_is_not_blamed_on_another(watched, monkeypatch):
    """Ranks that agreed to fail say so at about the same time."""
    watch_it, other, ended = watched
    monkeypatch.setattr(watch, 'watches', [watch_it(60)])

    def fail_as_well():
        other.sendall(b'rank 1 failed: rank 0 failed: in use')
        other.shutdown(socket.SHUT_WR)

    timer = threading.Timer(0.2, fail_as_well)
    timer.start()
    with pytest.raises(FastViTError, match='in use'), watch.one_fate():
        raise FastViTError('in use')
    timer.join()
    assert not ended.is_set()
    other.settimeout(10)
    assert other.recv(100) == b'rank 0 failed: in use'


@pytest.mark.parametrize('by_another', [False, True])
def test_ctrl_c(watched, monkeypatch, by_another):
    """The other ranks end as well, unless this one was already ending because of another."""
    watch_it, other, ended = watched
    monkeypatch.setattr(watch, 'watches', [mine := watch_it(60)])
    if by_another:
        assert mine.over.acquire(blocking=False)
    with pytest.raises(KeyboardInterrupt), watch.one_fate():
        raise KeyboardInterrupt
    mine.say(watch.DONE)  # at exit
    other.settimeout(10)
    assert other.recv(100) == (b'done' if by_another else b'rank 0 was interrupted')
    assert not ended.is_set()


def test_a_launcher_that_did_not_start_this(monkeypatch):
    for name in [*processes.LAUNCHERS['pytorch'][1], *processes.LAUNCHERS['slurm'][1]]:
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(FastViTError, match=r'RANK, WORLD_SIZE.*torchrun --nproc-per-node'):
        processes.check(Config(), 'pytorch')
    monkeypatch.setenv('SLURM_PROCID', '0')
    with pytest.raises(FastViTError, match=r'slurm: SLURM_NTASKS.*srun python'):
        processes.check(Config(), 'slurm')
    processes.check(Config(), 'none')


@pytest.mark.parametrize(
    'settings, name',
    [
        (dict(runner_type='FlexibleRunner'), 'FlexibleRunner'),
        (dict(runner_type='FlexibleRunner', strategy=dict(type='FSDPStrategy')), 'FSDPStrategy'),
        (dict(strategy=dict(type='DeepSpeedStrategy')), 'DeepSpeedStrategy'),
        (dict(optim_wrapper=dict(type='DeepSpeedOptimWrapper')), 'DeepSpeedOptimWrapper'),
        (
            dict(model_wrapper_cfg=dict(type='MMFullyShardedDataParallel')),
            'MMFullyShardedDataParallel',
        ),
    ],
)
def test_sharding_is_refused(settings, name):
    with pytest.raises(FastViTError, match=f'^{name} is not supported.*DistributedDataParallel'):
        processes.check(Config(settings), 'none')


def test_what_slurm_tells(monkeypatch, tmp_path):
    own = dict(PROCID=5, NTASKS=8, LOCALID=1, JOB_ID=123456, JOB_NODELIST='node[07-08]')
    for name, value in own.items():
        monkeypatch.setenv(f'SLURM_{name}', str(value))
    for name in processes.LAUNCHERS['pytorch'][1]:
        monkeypatch.setenv(name, '')
        monkeypatch.delenv(name)
    monkeypatch.setenv('PATH', str(tmp_path))
    with pytest.raises(FastViTError, match=r'scontrol.*set MASTER_ADDR'):
        processes.describe_slurm()
    scontrol = tmp_path / 'scontrol'
    scontrol.write_text(
        '#!/bin/sh\n[ "$*" = "show hostnames node[07-08]" ] && echo node07 node08\n'
    )
    scontrol.chmod(0o755)
    processes.describe_slurm()
    found = {name: os.environ[name] for name in processes.LAUNCHERS['pytorch'][1]}
    assert found == dict(
        RANK='5', WORLD_SIZE='8', LOCAL_RANK='1', MASTER_ADDR='node07', MASTER_PORT='23456'
    )
    processes.describe_slurm(port=4000)
    assert os.environ['MASTER_PORT'] == '4000'


def test_more_processes_than_gpus(monkeypatch):
    monkeypatch.setattr(processes.torch.cuda, 'device_count', lambda: 2)
    monkeypatch.setattr(processes.torch.cuda, 'set_device', selected := [].append)
    monkeypatch.setenv('LOCAL_RANK', '2')
    with pytest.raises(FastViTError, match='process 2 of this machine has no GPU: there are 2'):
        processes.select_gpu('pytorch')
    monkeypatch.setattr(processes.torch.cuda, 'device_count', lambda: 1)
    processes.select_gpu('slurm')  # --gpus-per-task
    assert selected.__self__ == [0] and os.environ['LOCAL_RANK'] == '0'
