"""Reading and drawing beside the network: in order, bounded, and with errors that name the file."""

import json
import os
import signal
import subprocess
import sys
import time
import traceback

import cv2
import numpy as np
import pytest

import fastvit_mm
from fastvit_mm import FastViTError, launch, pictures
from fastvit_mm.prediction import look, loop, open_input
from fastvit_mm.prediction.beside import Beside, ahead

linux = pytest.mark.skipif(sys.platform != 'linux', reason='processes are forked on Linux alone')


def test_reading_ahead():
    read, asked = [], 0

    def numbers():
        for i in range(20):
            read.append(i)
            yield i

    for i in ahead(numbers(), 3):
        assert i == asked
        asked += 1
        time.sleep(0.01)
        assert len(read) <= asked + 3
    assert asked == 20

    def broken():
        yield 0
        raise ValueError('the disk')

    coming = ahead(broken(), 3)
    assert next(coming) == 0
    with pytest.raises(ValueError, match='the disk'):
        next(coming)


def fail(kind):
    if kind is None:
        os.kill(os.getpid(), signal.SIGKILL)
    raise kind('no room')


class Odd(Exception):
    """Cannot be made from its arguments, as many errors of libraries."""

    def __init__(self, one):
        super().__init__(one, 'two', 'three')


@pytest.mark.parametrize('processes', [0, pytest.param(2, marks=linux)])
def test_errors_beside(processes):
    with Beside(fail, processes) as beside:
        for kind in (FastViTError, OSError):
            with pytest.raises(kind, match=r'^no room$'):
                beside.result('a.png', beside.submit('a.png', kind))
        for kind in (ValueError, Odd):
            text = rf'^a\.png: cannot be drawn: {kind.__name__}'
            with pytest.raises(RuntimeError, match=text) as raised:
                beside.result('a.png', beside.submit('a.png', kind))
            shown = ''.join(traceback.format_exception(raised.value))  # on every Python
            assert ', in fail\n' in shown
    if processes:
        killed = pytest.raises(RuntimeError, match=r'^a\.png: .* killed')
        with Beside(fail, processes) as beside, killed:
            beside.result('a.png', beside.submit('a.png', None))


KILLED_WHILE_IT_DRAWS = """
import os, signal, time
from fastvit_mm.prediction.beside import Beside

def nap(seconds):
    time.sleep(seconds)
    return os.getpid()

with Beside(nap, 2) as beside:
    for one in [beside.submit('a.png', 0.2) for _ in range(4)]:
        print(one.result(), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@linux
def test_after_opencv_used_its_threads():
    """A forked process that changes their number waits forever for threads it doesn't have."""
    program = """
import time
import cv2, numpy as np
from fastvit_mm.prediction.beside import Beside

cv2.setNumThreads(4)
cv2.GaussianBlur(np.ones((3000, 3000, 3), np.uint8), (31, 31), 3)
time.sleep(0.5)  # until they wait for more
with Beside(lambda: cv2.getNumThreads(), 2) as beside:
    print(beside.submit('a.png').result(), cv2.getNumThreads())
"""
    call = [sys.executable, '-c', program]
    run = subprocess.run(call, capture_output=True, text=True, timeout=120)
    assert (run.returncode, run.stdout) == (0, '1 4\n'), run.stderr


@linux
def test_no_process_outlives_its_parent(tmp_path):
    said = tmp_path / 'pids'  # not a pipe, which the children would keep open
    with said.open('w') as out:
        call = [sys.executable, '-c', KILLED_WHILE_IT_DRAWS]
        assert subprocess.run(call, stdout=out, timeout=300).returncode == -signal.SIGKILL
    children = {int(pid) for pid in said.read_text().split()}
    assert len(children) == 2
    deadline = time.monotonic() + 30
    while any(alive(one) for one in children):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def alive(pid):
    try:
        with open(f'/proc/{pid}/stat') as file:
            return file.read().rsplit(')', 1)[1].split()[0] != 'Z'
    except OSError:
        return False


# With images --------------------------------------------------------------------------------


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """Grey images, each of its own brightness, which a model and its drawing pass on."""
    folder = tmp_path / 'in'
    folder.mkdir()
    for i in range(8):
        cv2.imwrite(str(folder / f'{i}.png'), np.full((8, 8, 3), 20 * i, np.uint8))
    scores = lambda image: dict(pred_scores=np.eye(8)[image[0, 0, 0] // 20])  # noqa: E731
    monkeypatch.setattr(
        fastvit_mm,
        'inference',
        lambda model, images, *_: (
            list(map(scores, images)) if isinstance(images, list) else scores(images)
        ),
    )
    monkeypatch.setattr(pictures, 'draw', lambda image, *_: image)
    return folder


def seen(folder, out, **more):
    skipped = look(object(), open_input(str(folder), out), out, 0.3, coco=True, **more)
    return skipped, *records(out)


def records(out):
    found = json.loads((out / 'in.predictions.json').read_text())
    known = json.loads((out / 'in.images.json').read_text())['images']
    return [one['category_ids'][0] - 1 for one in found], [one['file_name'] for one in known]


@pytest.mark.parametrize('batch_size', [1, 3])
def test_in_order(photos, tmp_path, batch_size, capfd):
    out = tmp_path / 'out'
    out.mkdir()
    (photos / '3.png').write_bytes(b'no image')
    skipped, found, names = seen(photos, out, batch_size=batch_size)
    assert skipped == 1 and found == [0, 1, 2, 4, 5, 6, 7]
    assert names == [f'{i}.png' for i in found]
    for i in found:
        assert abs(int(cv2.imread(str(out / f'{i}.jpg'))[0, 0, 0]) - 20 * i) < 5
    assert capfd.readouterr().err.count('3.png: cannot be read, skipped') == 1


@pytest.mark.parametrize('batch_size', [1, 3])
def test_one_bad_image(photos, tmp_path, batch_size, monkeypatch, capfd):
    """It is skipped, alone or among others."""
    infer = fastvit_mm.inference

    def refuse(model, images, *more):
        many = images if isinstance(images, list) else [images]
        if any(image[0, 0, 0] == 80 for image in many):
            raise FastViTError('smaller than 32 x 32')
        return infer(model, images, *more)

    monkeypatch.setattr(fastvit_mm, 'inference', refuse)
    (tmp_path / 'out').mkdir()
    skipped, found, _ = seen(photos, tmp_path / 'out', batch_size=batch_size)
    assert skipped == 1 and found == [0, 1, 2, 3, 5, 6, 7]
    assert '4.png: smaller than 32 x 32, skipped' in capfd.readouterr().err


@linux
def test_the_network_does_not_wait_for_drawing(photos, tmp_path, monkeypatch):
    """It computes an image while one before it is drawn."""
    infer, log = fastvit_mm.inference, tmp_path / 'log'

    def note(event, image):
        with log.open('a') as file:
            file.write(f'{event} {image[0, 0, 0] // 20} {time.monotonic()}\n')

    def slow(image, *_):
        time.sleep(0.3)
        note('drawn', image)
        return image

    def computes(model, image):
        note('begun', image)
        return infer(model, image)

    monkeypatch.setattr(fastvit_mm, 'inference', computes)
    monkeypatch.setattr(pictures, 'draw', slow)
    (tmp_path / 'out').mkdir()
    seen(photos, tmp_path / 'out')
    when = {}
    for line in log.read_text().splitlines():
        event, number, seconds = line.split()
        when[event, int(number)] = float(seconds)
    assert sum(when['begun', i + 1] < when['drawn', i] for i in range(7)) > 2


def test_an_error_of_drawing(photos, tmp_path, monkeypatch, capfd):
    """One line with the file's name; what was done before is kept."""
    out = tmp_path / 'out'
    out.mkdir()

    def draw(image, *_):
        if image[0, 0, 0] == 100:
            raise IndexError('no such colour')
        return image

    monkeypatch.setattr(pictures, 'draw', draw)
    with pytest.raises(SystemExit) as end:
        launch.run(lambda _: seen(photos, out), argv=[])
    assert end.value.code == 1
    last = capfd.readouterr().err.splitlines()[-1]
    assert last.startswith('error: ') and '5.png: cannot be drawn: IndexError: no such' in last
    found, names = records(out)
    assert found[:5] == [0, 1, 2, 3, 4] and len(found) == len(names)


@pytest.mark.parametrize('processes', [0, pytest.param(2, marks=linux)])
def test_the_first_of_two_errors(photos, tmp_path, monkeypatch, processes):
    """Those after it are drawn all the same, and what fails among them does not take its place."""
    out = tmp_path / 'out'
    out.mkdir()

    def draw(image, *_):
        if image[0, 0, 0] in (80, 120):
            raise IndexError
        return image

    monkeypatch.setattr(loop, 'number_of_processes', lambda: processes)
    monkeypatch.setattr(pictures, 'draw', draw)
    with pytest.raises(RuntimeError, match=r'^4\.png: cannot'):
        seen(photos, out, batch_size=8)
    assert records(out)[0] == [0, 1, 2, 3, 5, 7]


def test_ctrl_c(photos, tmp_path, monkeypatch):
    """Pictures and records that are written belong together."""
    out = tmp_path / 'out'
    out.mkdir()
    infer = fastvit_mm.inference

    def stop(model, image):
        if image[0, 0, 0] == 100:
            os.kill(os.getpid(), signal.SIGINT)
        return infer(model, image)

    monkeypatch.setattr(fastvit_mm, 'inference', stop)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # jobs of a shell ignore it
    try:
        with pytest.raises(KeyboardInterrupt):
            seen(photos, out)
    finally:
        signal.signal(signal.SIGINT, before)
    found, names = records(out)
    assert found == [0, 1, 2, 3, 4] and names == [f'{i}.png' for i in found]
    assert sorted(path.name for path in out.glob('*.jpg')) == [f'{i}.jpg' for i in found]
