"""tools/check_data.py, and bad data in whole runs of the tools."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import test_tools
import torch
from bad_data import CONFIGS, ROOT, Data, draw
from test_tools import refusal

import fastvit_mm
from fastvit_mm import FastViTError

home, tool = test_tools.home, test_tools.tool


@pytest.fixture
def data(tmp_path):
    """A task's data and a shallow model for them."""

    def make(task):
        with pytest.MonkeyPatch.context() as patch:
            one = Data(task, draw(tmp_path, patch))
        model, widths = one.cfg.model, [16, 32, 64, 64]
        model.backbone.arch = dict(depths=(1, 1, 1, 1), widths=widths, ffn_ratio=2)
        if task in ('detection', 'segmentation'):
            model.neck.in_channels = widths
        else:
            model.neck.in_channels, model.head.in_channels = 64, 128
        one.cfg.train_dataloader.num_workers = one.cfg.test_dataloader.num_workers = 2
        one.cfg.test_dataloader.batch_size = 1  # mmseg's tests take images of one size
        return one

    return make


@pytest.mark.slow
@pytest.mark.parametrize('task', CONFIGS)
def test_a_bad_image_in_a_worker_of_a_run(data, tool, task):
    """One line that names the file, from train.py, test.py and check_data.py, and nothing else."""
    one = data(task)
    one.write()
    model = fastvit_mm.init_model(one.cfg)
    torch.save(dict(state_dict=model.state_dict()), checkpoint := one.folder / 'weights.pth')
    bad = [one.images(split)[-1] for split in (0, 1)]
    for path in bad:
        path.write_bytes(path.read_bytes()[:300])
    common = ('--work-dir', one.folder / 'work')
    refusal(tool('train', one.file, *common), f'error: {bad[0]} is truncated or damaged')
    refusal(tool('test', one.file, checkpoint, *common), f'error: {bad[1]} is truncated or damaged')
    code, _ = tool(
        'check_data', one.file, '--workers', 2, '--json', report := one.folder / 'r.json'
    )
    assert code == 2
    assert {problem['file'] for problem in json.loads(report.read_text())['problems']} == {
        str(path) for path in bad
    }
    with pytest.raises(FastViTError, match=f'{bad[0]} is truncated or damaged'):
        fastvit_mm.inference(model, bad[0])


@pytest.mark.slow
def test_as_a_process(data):
    """What it prints and where, and its exit code."""
    one = data('classification')
    one.write()
    command = [sys.executable, ROOT / 'tools/check_data.py', one.file, '--workers', '2']

    def run():
        return subprocess.run(command, cwd=one.folder, capture_output=True, text=True)

    sound = run()
    assert sound.returncode == 0, sound.stderr
    assert sound.stdout.splitlines()[-1] == (
        'read 6 images of train; 5 images of val, test: nothing is wrong'
    )
    (path := one.images(0)[0]).write_bytes(b'')
    (stray := path.with_name('a.txt')).write_text('')
    damaged = run()
    assert damaged.returncode == 2
    lines = damaged.stdout.splitlines()
    assert f'stops: {path} is empty: a run stops there' in lines
    assert any(line.startswith(f'note: {stray} is no image') for line in lines)
    assert lines[-1].endswith('of val, test: 1 that stops, 0 that spoil, 1 note')
    assert 'Traceback' not in damaged.stderr and '6/6' not in damaged.stdout


def test_mistakes_in_its_arguments(data, tool):
    one = data('classification')
    one.write()
    refusal(tool('check_data', one.file, '--workers', -1), '--workers -1')
    refusal(tool('check_data', 'configs/no.py'), 'configs/no.py')
    missing = one.folder / 'none' / 'report.json'
    refusal(tool('check_data', one.file, '--workers', 0, '--json', missing), str(missing))


def test_a_mistake_in_a_data_set(data, tool):
    """Of any stage, and in the pipeline: it is named, as in a run."""
    one = data('classification')
    pipeline = one.cfg.train_dataloader.dataset.pipeline
    pipeline[0].type = 'LoadImagesFromFile'
    one.write()
    place = 'train_dataloader.dataset.pipeline.0'
    refusal(tool('check_data', one.file, '--workers', 0), place, 'LoadImageFromFile')


def test_a_data_set_that_cannot_be_built(data, tool):
    """One without a data_root, so that nothing but its list tells where it is."""
    one = data('detection')
    for stage in ('train', 'val', 'test'):
        dataset = one.cfg[f'{stage}_dataloader'].dataset
        root = Path(dataset.pop('data_root'))
        dataset.ann_file = str(root / dataset.ann_file)
        dataset.data_prefix.img = str(root / dataset.data_prefix.img)
    one.write()
    assert tool('check_data', one.file, '--workers', 0)[0] == 0
    one.lists(0).write_text('{')
    assert tool('check_data', one.file, '--workers', 0)[0] == 2
    one.cfg.train_dataloader.dataset.ann_file = str(one.folder / 'none.json')
    one.write()
    assert tool('check_data', one.file, '--workers', 0)[0] == 2
