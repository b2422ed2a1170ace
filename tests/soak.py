"""Kill training runs with -9, again and again, and compare what they end with.

python tests/soak.py [TASK ...] [--kills 20] [--workers 0 2] [--minutes 60]

Each task's demo, shortened, is trained once undisturbed and once with kills at random moments,
every other one while a checkpoint is being written; `--resume` continues it. Weights, averaged
weights, optimizer, schedules, best score and random generators must be equal, bit for bit.
"""

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from small_runs import files, state

from fastvit_mm.running.work_dir import RESUMABLE, is_whole

ROOT = Path(__file__).parent.parent
EPOCHS = ('train_cfg.max_epochs=4', 'train_dataloader.dataset.indices=48')
ITERATIONS = (
    *('train_cfg.max_iters=30', 'train_cfg.val_interval=8'),
    *('default_hooks.checkpoint.interval=3', 'train_dataloader.batch_size=4'),
)
FEW = ('val_dataloader.dataset.indices=8', 'env_cfg.mp_cfg.opencv_num_threads=0')
TASKS = {
    'classification': ('classification/fastvit_t8_in1k.py', EPOCHS),
    'detection': ('detection/mask_rcnn_fastvit_t8_coco.py', EPOCHS),
    'segmentation': ('segmentation/fpn_fastvit_t8_ade20k.py', ITERATIONS),
    'mano': ('hand_mesh/mano_fastvit_t8_freihand.py', EPOCHS),
    'vertices': ('hand_mesh/vertices_fastvit_t8_freihand.py', ITERATIONS),
}


def start(task: str, folder: Path, workers: int, *args: str) -> subprocess.Popen:
    config, settings = TASKS[task]
    workers = [
        f'{part}_dataloader.{key}={value}'
        for part in ('train', 'val')
        for key, value in (('num_workers', workers), ('persistent_workers', workers > 0))
    ]
    command = [sys.executable, ROOT / 'tools/train.py', ROOT / 'configs' / config, '--demo']
    command += ['--work-dir', folder, *args, '--cfg-options', *settings, *FEW, *workers]
    environment = dict(os.environ, OMP_NUM_THREADS='1')
    with (folder.parent / f'{folder.name}.log').open('a') as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment)


def wait_for(process: subprocess.Popen, condition, pause: float) -> bool:
    """Whether ``condition`` came true before the process ended."""
    while process.poll() is None:
        if condition():
            return True
        time.sleep(pause)
    return False


def last(folder: Path) -> Path:
    return Path((folder / 'last_checkpoint').read_text())


def one_kill(process: subprocess.Popen, folder: Path, in_write: bool, seconds: float) -> str | None:
    """Kill a run; says when, or None if it ended before."""
    logs = len(list(folder.glob('*/vis_data/scalars.json')))
    begun = wait_for(process, lambda: len(list(folder.glob('*/*.log'))) > logs, 0.02)
    if not begun:
        return None
    if in_write:
        seen = wait_for(process, lambda: any(folder.glob('.*.pth.*.part')), 0.0005)
    else:
        end = time.monotonic() + random.uniform(0, seconds)
        seen = wait_for(process, lambda: time.monotonic() > end, 0.01)
    if not seen:
        return None
    process.kill()
    process.wait()
    parts = [p.name for p in folder.glob('.*.part')]
    assert all(is_whole(p) for p in folder.glob('*.pth')), 'a checkpoint is not whole'
    made = len([p for p in folder.iterdir() if RESUMABLE.fullmatch(p.name)])
    return f'in writing {parts[0]}' if parts else f'at a random moment ({made} checkpoints)'


def soak(task: str, workers: int, kills: int, folder: Path, deadline: float) -> int:
    """Train undisturbed, then with kills; gives their number."""
    calm, rough = folder / 'calm', folder / 'rough'
    begin = time.monotonic()
    assert start(task, calm, workers).wait() == 0, (folder / 'calm.log').read_text()[-2000:]
    seconds = time.monotonic() - begin
    done, within = 0, 0
    while done < kills and time.monotonic() < deadline:
        finished = rough.exists() and (rough / 'last_checkpoint').exists()
        finished = finished and last(rough).name == last(calm).name
        if finished:
            compare(calm, rough)
        process = start(task, rough, workers, '--overwrite' if finished else '--resume')
        # The last ones come soon, so that a run gets ahead.
        when = one_kill(process, rough, done % 2 == 1, 0.5 * seconds)
        if when is None:
            assert process.wait() == 0, (folder / 'rough.log').read_text()[-2000:]
            compare(calm, rough)
            continue
        done, within = done + 1, within + when.startswith('in writing')
        print(f'  kill {done}: {when}', flush=True)
    process = start(task, rough, workers, '--resume')
    assert process.wait() == 0, (folder / 'rough.log').read_text()[-2000:]
    compare(calm, rough)
    print(
        f'{task}, {workers} workers: {done} kills, {within} of them in a write: equal', flush=True
    )
    return done


def compare(calm: Path, rough: Path) -> None:
    assert last(calm).name == last(rough).name
    assert state(last(calm)) == state(last(rough)), f'{rough} differs from {calm}'
    assert files(calm) == files(rough), f'{files(calm)} became {files(rough)}'
    print('  a run that was killed ended equal', flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        'tasks', nargs='*', metavar='TASK', help=f'some of {", ".join(TASKS)} (all)'
    )
    parser.add_argument('--kills', type=int, default=20, help='of each run (20)')
    parser.add_argument('--workers', type=int, nargs='+', default=[0, 2], help='data workers (0 2)')
    parser.add_argument('--minutes', type=float, default=60, help='begin no kill after these (60)')
    parser.add_argument('--seed', type=int, default=0, help='of the moments (0)')
    args = parser.parse_args()
    random.seed(args.seed)
    deadline = time.monotonic() + 60 * args.minutes
    for task in args.tasks or TASKS:
        for workers in args.workers:
            with tempfile.TemporaryDirectory() as folder:
                soak(task, workers, args.kills, Path(folder), deadline)


if __name__ == '__main__':
    main()
