"""tools/plot_log.py on logs of every kind, and train.py --tensorboard, which logs the same."""

import json
import math
import sys

import numpy as np
import pytest
import test_tools
from matplotlib.figure import Figure
from mmengine.config import Config
from PIL import Image
from test_tools import CLASSIFICATION, DETECTION, refusal, shallow

from fastvit_mm import FastViTError, curves
from fastvit_mm.demo import scenes
from fastvit_mm.running import train_options

home, tool = test_tools.home, test_tools.tool


def train(first, last, every=10, epoch=None, loss=lambda step: 1 / step):
    """Lines as mmengine's; ``epoch``: iterations of one, where they are counted."""
    for step in range(first, last + 1, every):
        line = dict(lr=1e-3, data_time=0.01, loss=loss(step), time=0.5, iter=step, step=step)
        yield line | (dict(epoch=math.ceil(step / epoch)) if epoch else {})


def log(work_dir, stamp, *lines, end='\n'):
    path = work_dir / stamp / 'vis_data' / 'scalars.json'
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text('\n'.join(map(json.dumps, lines)) + end)
    return path


def steps(points):
    return [step for step, _ in points]


def test_counted_in_iterations(tmp_path):
    val = dict(mIoU=40.0, aAcc=80.0, data_time=0.1, time=0.2, step=30)
    log(tmp_path, '1', *train(10, 30), val, *train(40, 60), val | dict(step=60, mIoU=50.0))
    found = curves.curves(tmp_path)
    assert found.keys() == {'loss', 'lr', 'mIoU', 'aAcc'}
    assert found['loss'] == [(step, 1 / step) for step in range(10, 61, 10)]
    assert found['mIoU'] == [(30, 40.0), (60, 50.0)]


def test_counted_in_epochs(tmp_path):
    """Validations say the epoch; one of 46 iterations here, whose last few are not logged."""
    lines = []
    for epoch in (1, 2, 3):
        begin = 46 * (epoch - 1)
        lines += train(begin + 10, begin + 40, epoch=46)
        lines.append({'coco/bbox_mAP': epoch / 10, 'coco/bbox_mAP_s': -1.0, 'step': epoch})
    log(tmp_path, '1', *lines)
    found = curves.curves(tmp_path)
    assert [value for _, value in found['coco/bbox_mAP']] == [0.1, 0.2, 0.3]
    assert steps(found['coco/bbox_mAP']) == pytest.approx([46, 92, 138], abs=6)
    assert 'coco/bbox_mAP_s' not in found, '-1 is no measurement'


def test_resumed_and_started_afresh(tmp_path):
    val = dict(mIoU=40.0, step=50)
    log(tmp_path, '20260101_000000', *train(10, 50), val, *train(60, 70))
    log(tmp_path, '20260101_010000', *train(60, 100, loss=lambda step: 7.0))
    log(tmp_path, '20260101_020000', end='')  # a test leaves an empty one, or none
    found = curves.curves(tmp_path)
    assert steps(found['loss']) == list(range(10, 101, 10)), 'each iteration once'
    assert [value for _, value in found['loss'][5:]] == [7.0] * 5
    assert steps(found['mIoU']) == [50]
    log(tmp_path, '20260101_030000', *train(10, 20, loss=lambda step: 9.0))
    assert curves.curves(tmp_path)['loss'] == [(10, 9.0), (20, 9.0)]


def test_damaged_lines(tmp_path, capsys):
    """A killed run leaves half a line, a full disk worse."""
    path = log(tmp_path, '1', *train(10, 30), end='\n{"lr": 0.001, "lo')
    assert steps(curves.curves(tmp_path)['loss']) == [10, 20, 30]
    assert 'scalars.json: 1 unreadable line skipped' in capsys.readouterr().err
    path.write_bytes(b'\xff\xfe\x00\n[1]\n3\n\n' + path.read_bytes())
    assert steps(curves.curves(tmp_path)['loss']) == [10, 20, 30]
    log(tmp_path, '1', *train(10, 20), dict(iter=30, step=30, loss=math.nan), *train(40, 50))
    loss = curves.curves(tmp_path)['loss']
    assert steps(loss) == [10, 20, 30, 40, 50] and math.isnan(loss[2][1])


def test_what_is_drawn():
    figure = Figure()
    axis, other = figure.subplots(1, 2)
    noisy = [(step, 5 + (-1) ** (step // 10)) for step in range(10, 1011, 10)]
    runs = dict(a=dict(loss=noisy, mIoU=[(500, 30.0), (1000, 40.0)]), b=dict(loss=noisy[:9]))
    curves.draw(axis, 'loss', runs)
    raw, smoothed, short = (line.get_xydata() for line in axis.lines)
    assert raw.tolist() == [list(map(float, point)) for point in noisy]
    assert smoothed[:, 0].tolist() == raw[:, 0].tolist()
    assert np.abs(smoothed[:, 1] - raw[:, 1].mean()).max() < 0.4
    assert short.tolist() == raw[:9].tolist()
    colours = [line.get_color() for line in axis.lines]
    assert colours[0] == colours[1] != colours[2]
    curves.draw(other, 'mIoU', runs)
    assert other.get_title(loc='left') == 'mIoU (%)'
    assert [line.get_xydata().tolist() for line in other.lines] == [[[500, 30], [1000, 40]]]
    constant = np.full(100, 3.0)
    np.testing.assert_allclose(curves.smooth(constant), constant)


def test_panels():
    def names(*keys):
        return curves.panels(dict(run={key: [] for key in keys}))

    assert names('lr', 'loss', 'loss_a', 'loss_b', 'mAP') == [
        'loss',
        'loss_a',
        'loss_b',
        'lr',
        'mAP',
    ]
    assert names('lr', 'loss', 'decode.loss_ce', 'mIoU') == ['loss', 'lr', 'mIoU']
    assert names('mIoU') == ['mIoU']


def test_pictures(tool, tmp_path):
    one, two, out = tmp_path / 'one', tmp_path / 'two', tmp_path / 'new' / 'both.png'
    log(one, '1', *train(10, 1000), dict(mIoU=40.0, step=1000))
    log(two, '1', *train(10, 500), dict(mIoU=50.0, step=500))
    assert tool('plot_log', one, two) == (0, '')
    assert tool('plot_log', one, two, '--out', out) == (0, '')
    for path in (one / 'curves.png', two / 'curves.png', out):
        picture = np.asarray(Image.open(path).convert('RGB')).astype(int)
        assert picture.shape[1] > 800
        orange = (np.abs(picture - (255, 127, 14)).max(-1) < 40).sum()
        assert (orange > 200) == (path == out), 'the second run has its own colour'
    # the folder of one time stamp
    assert tool('plot_log', one / '1') == (0, '')
    assert (one / '1' / 'curves.png').is_file()


def test_refusals(tool, tmp_path):
    refusal(tool('plot_log', tmp_path / 'no'), 'no training log', 'no', 'scalars.json')
    log(tmp_path / 'run', '1', end='')
    refusal(tool('plot_log', tmp_path / 'run'), 'nothing yet')
    log(tmp_path / 'run', '1', *train(10, 20))
    refusal(tool('plot_log', tmp_path / 'run', '--out', 'curves.xyz'), '--out', '.png')
    (tmp_path / 'file').write_text('')
    refusal(tool('plot_log', tmp_path / 'run', '--out', tmp_path / 'file/a.png'), 'cannot write')
    with pytest.raises(FastViTError, match='no training log'):
        curves.curves(tmp_path)


def test_tensorboard_holds_the_scalars(tool, tmp_path, monkeypatch):
    """A run's event file, its own log, and the curves drawn of it say the same."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setitem(
        scenes.LAYOUTS, 'imagenet', scenes.LAYOUTS['imagenet'] | dict(images=(70, 10))
    )
    config, settings = shallow(CLASSIFICATION, tmp_path), ['train_cfg.max_epochs=2']
    settings += ['default_hooks.logger.interval=1', 'train_cfg.val_interval=1']
    settings += ['train_dataloader.batch_size=16']
    args = ('train', config, '--demo', '--tensorboard', '--work-dir', tmp_path / 'run')
    code, err = tool(*args, '--cfg-options', *settings)
    assert code == 0, err
    (folder,) = tmp_path.glob('run/*/vis_data')
    events = EventAccumulator(str(folder))
    events.Reload()
    lines = [json.loads(line) for line in (folder / 'scalars.json').read_text().splitlines()]
    found = curves.curves(tmp_path / 'run')
    assert {'loss', 'lr', 'accuracy/top1'} <= found.keys() & set(events.Tags()['scalars'])
    assert steps(found['loss']) == [1, 2, 3, 4] and steps(found['accuracy/top1']) == [2, 4]
    for name, points in found.items():
        written = [(line['step'], line[name]) for line in lines if name in line]
        held = [(event.step, event.value) for event in events.Scalars(name)]
        assert held == [(step, pytest.approx(value, rel=1e-5)) for step, value in written]
        assert [value for _, value in points] == [value for _, value in written]
    assert Config.fromfile(folder / 'config.py').visualizer.vis_backends == [
        dict(type='LocalVisBackend'),
        dict(type='TensorboardVisBackend'),
    ]


def test_tensorboard_is_not_there(tool, home, monkeypatch):
    """Said before anything is drawn or written."""
    monkeypatch.setitem(sys.modules, 'tensorboard', None)
    result = tool('train', DETECTION, '--demo', '--tensorboard')
    refusal(result, '--tensorboard', 'pip install tensorboard')
    assert not (home / 'work_dirs').exists() and not (home / 'data/demo/coco').exists()


def test_tensorboard_once_and_in_any_config():
    for visualizer in (None, dict(type='V'), dict(type='V', vis_backends=None)):
        cfg = Config(dict(visualizer=visualizer) if visualizer else {})
        for _ in range(2):
            train_options.log_to(cfg, 'TensorboardVisBackend')
        kinds = [one['type'] for one in cfg.visualizer.vis_backends]
        assert kinds == ['LocalVisBackend', 'TensorboardVisBackend']
