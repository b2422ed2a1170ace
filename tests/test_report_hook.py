"""The hook that explains a test, held against the metrics of the same test."""

import csv
import json
import logging
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from mmdet.evaluation import CocoMetric
from mmdet.structures import DetDataSample
from mmengine.evaluator import Evaluator
from mmengine.structures import InstanceData, PixelData
from mmseg.evaluation import IoUMetric
from mmseg.structures import SegDataSample

from fastvit_mm import FastViTError
from fastvit_mm.hooks import TestReportHook


def rows_of(path):
    return list(csv.DictReader(path.open(encoding='utf-8', newline='')))


class Test:
    """What the hook sees of a runner that tests ``samples``, one at a time."""

    __test__ = False

    def __init__(self, folder, samples, metrics, classes, **dataset):
        self.samples, self.evaluator = samples, Evaluator(metrics)
        self.evaluator.dataset_meta = dict(classes=classes)
        named = type('Named', (list,), dataset)
        loop = SimpleNamespace(
            evaluator=self.evaluator, dataloader=SimpleNamespace(dataset=named(samples))
        )
        self.runner = SimpleNamespace(
            test_loop=loop, model=None, cfg={}, logger=logging.getLogger('test')
        )
        self.hook = TestReportHook(str(folder), draw=True)

    def run(self, between=lambda: None):
        """The metrics; ``between`` is called before the hook learns of them."""
        self.hook.before_test_epoch(self.runner)
        for number, sample in enumerate(self.samples):
            self.evaluator.process([sample])
            self.hook.after_test_iter(self.runner, number, outputs=[sample])
        found = self.evaluator.evaluate(len(self.samples))
        between()
        self.hook.after_test_epoch(self.runner, found)
        return found


@pytest.fixture
def image(tmp_path):
    path = tmp_path / 'image.png'
    cv2.imwrite(str(path), np.full((100, 100, 3), 200, np.uint8))
    return path


# ------------------------------------------------------------------------------- ignored pixels


def segmented(path):
    """A quarter is class 0 in truth and prediction, the rest is at random."""
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randint(3, (1, 100, 100), generator=generator) for _ in range(2)]
    for part in parts:
        part[:, :50, :50] = 0
    truth, found = (PixelData(data=part) for part in parts)
    return SegDataSample(metainfo=dict(img_path=str(path)), gt_sem_seg=truth, pred_sem_seg=found)


def wanted_of(sample, ignored):
    found, truth = (sample.get(f'{key}_sem_seg').data for key in ('pred', 'gt'))
    areas = IoUMetric.intersect_and_union(found, truth, 3, ignored)
    return 100 * IoUMetric.total_area_to_metrics(*areas, ['mIoU'])['IoU']


@pytest.mark.parametrize('where', ['metric', 'data set'])
def test_pixels_that_do_not_count(where, image, tmp_path):
    """The metric says which, or the data set if no metric does: in the tables and the pictures."""
    sample = segmented(image)
    metrics = [IoUMetric(ignore_index=0)] if where == 'metric' else []
    ignored = dict(ignore_index=255 if where == 'metric' else 0)
    test = Test(tmp_path / 'shown', [sample], metrics, ('ant', 'bee', 'cat'), **ignored)
    test.run()
    rows = rows_of(tmp_path / 'shown/classes.csv')
    wanted = wanted_of(sample, 0)
    assert abs(wanted - wanted_of(sample, 255)).max() > 5
    assert [float(row['IoU']) for row in rows] == pytest.approx(wanted.tolist(), abs=0.006)
    assert rows[0]['pixels'] == '0'
    drawn = cv2.imread(str(tmp_path / 'shown/00001_image.jpg'))
    dark = (drawn.max(2) < 100) & (drawn.min(2) > 60)  # grey under black
    middle = drawn.shape[1] // 2
    assert dark[:, :middle].mean() > 0.1 and dark[:, middle:].mean() < 0.01


# ------------------------------------------------------------------------------- the folder


def test_files_of_others_stay(image, tmp_path):
    """A folder that has such files is refused before anything is tested, unless they are ours."""
    folder = tmp_path / 'shown'
    folder.mkdir()
    ours = folder / 'images.csv'

    def test():
        return Test(folder, [segmented(image)], [IoUMetric()], ('ant', 'bee', 'cat'))

    for name, text in (
        ('classes.csv', 'id,name\n'),
        ('confusion.png', ''),
        ('images.csv', 'image,label,picture\na,b,mine.jpg\n'),
        ('images.csv', 'picture\nmine.jpg\n'),
        ('images.csv', ''),
        ('images.csv', '\udcff\0'),
    ):
        (folder / 'mine.jpg').write_text('mine')
        (folder / name).write_text(text, errors='surrogateescape')
        before = {path: path.read_bytes() for path in folder.iterdir()}
        with pytest.raises(FastViTError, match=f'{name} is not of an earlier test'):
            test().run()
        assert {path: path.read_bytes() for path in folder.iterdir()} == before
        (folder / name).unlink()
    for _ in range(2):
        test().run()
        assert [row['picture'] for row in rows_of(ours)] == ['00001_image.jpg']
    assert (folder / 'mine.jpg').read_text() == 'mine'


def test_repeated_images_are_not_drawn(image, tmp_path, monkeypatch):
    """The second of two processes has the images 1, 3 and 5, of which the test has three."""
    monkeypatch.setattr('fastvit_mm.hooks.test_report.get_world_size', lambda: 2)
    monkeypatch.setattr('fastvit_mm.hooks.test_report.get_rank', lambda: 1)
    samples = [segmented(image) for _ in range(3)]
    Test(tmp_path / 'shown', samples, [IoUMetric()], ('ant', 'bee', 'cat')).run()
    assert [path.name for path in (tmp_path / 'shown').glob('*.jpg')] == ['00001_image.jpg']


# ------------------------------------------------------------------------------- boxes


def boxes(number, found, path):
    """A sample with a bee and an ant; of the first kind only the one in the ``found`` images."""
    truth = InstanceData(
        bboxes=torch.tensor([[0.0, 0, 30, 30], [50, 50, 90, 90]]), labels=torch.tensor([0, 1])
    )
    pred = InstanceData(bboxes=truth.bboxes, labels=truth.labels, scores=torch.ones(2))
    pred = pred[1:] if number not in found else pred
    about = dict(img_id=number, ori_shape=(100, 100), img_path=str(path))
    return DetDataSample(metainfo=about, gt_instances=truth, pred_instances=pred)


def test_the_ap_of_each_class_is_mmdets(image, tmp_path):
    """Of this test's metric, whatever else is evaluated; ids are neither 0, 1 nor in order."""
    ids = dict(bee=7, ant=3)
    places = dict(bee=[0, 0, 30, 30], ant=[50, 50, 40, 40])
    objects = [
        dict(image_id=i, category_id=ids[name], bbox=box, area=box[2] * box[3], iscrowd=0)
        for i in range(4)
        for name, box in places.items()
    ]
    content = dict(
        images=[dict(id=i, file_name=f'{i}.png', width=100, height=100) for i in range(4)],
        annotations=[dict(one, id=number) for number, one in enumerate(objects, 1)],
        categories=[dict(id=number, name=name) for name, number in ids.items()],
    )
    (file := tmp_path / 'objects.json').write_text(json.dumps(content))

    def test(folder, found):
        metric = CocoMetric(str(file), metric='bbox', classwise=True)
        samples = [boxes(i, found, image) for i in range(4)]
        return Test(tmp_path / folder, samples, [metric], ('bee', 'ant'))

    def other():
        test('other', (0, 1, 2, 3)).run()

    metrics = test('shown', (0,)).run(between=other)
    rows = rows_of(tmp_path / 'shown/classes.csv')
    assert [row['class'] for row in rows] == ['bee', 'ant']
    for row in rows:
        wanted = 100 * metrics[f'coco/{row["class"]}_precision']
        assert float(row['box AP']) == pytest.approx(wanted, abs=0.06)
    assert 20 < float(rows[0]['box AP']) < 30 and float(rows[1]['box AP']) > 99
    assert [row['recall'] for row in rows] == ['25.0', '100.0']
