"""What a test, a data check and Grad-CAM show, held against the packages' own figures."""

import csv
import sys

import cv2
import numpy as np
import pytest
import test_apis
import torch
import torch.nn.functional as F
from mmdet.structures.bbox import HorizontalBoxes
from mmengine.structures import PixelData
from mmpretrain.evaluation import ConfusionMatrix, SingleLabelMetric
from mmseg.evaluation import IoUMetric
from mmseg.structures import SegDataSample
from randomize import relative
from test_tools import (
    CLASSIFICATION,
    DETECTION,
    SEGMENTATION,
    home,  # noqa: F401
    refusal,
    tool,  # noqa: F401
)

import fastvit_mm
from fastvit_mm import FastViTError, pictures
from fastvit_mm.evaluation import attention
from fastvit_mm.evaluation.after_test import UNSORTED, numbered, write
from fastvit_mm.evaluation.classes import class_table, confusion, draw_confusion, text
from fastvit_mm.evaluation.per_image import Judged, PerImage, judge_boxes
from fastvit_mm.truth import prediction_of, truth_of

CLASSES = ('ant', 'bee', 'cat', 'dog')


def rows_of(path):
    return list(csv.DictReader(path.open(encoding='utf-8', newline='')))


def metric_of(samples, classes=CLASSES, ignore_index=255, **settings):
    """A metric that has seen these samples, and was evaluated."""
    metric = PerImage(**settings)
    metric.dataset_meta = dict(classes=classes, ignore_index=ignore_index)
    metric.process({}, samples)
    metric.evaluate(len(samples))
    return metric


def classified(number=200, seed=0):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(number, 4, generator=generator).mul(2).softmax(1)
    truth = torch.randint(4, (number,), generator=generator)
    samples = [
        dict(pred_score=s, pred_label=s.argmax().view(1), gt_label=t.view(1), img_path=f'{i}.jpg')
        for i, (s, t) in enumerate(zip(scores, truth, strict=True))
    ]
    return scores, truth, samples


def test_classes_as_mmpretrain_counts_them(tmp_path):
    scores, truth, samples = classified()
    metric = metric_of(samples)
    matrix = confusion(metric.judged, 4)
    assert (matrix == ConfusionMatrix.calculate(scores, truth, 4).numpy()).all()
    write(metric, tmp_path)
    precision, recall, f1, support = SingleLabelMetric.calculate(
        scores, truth, thrs=(None,), average=None
    )[0]
    for i, row in enumerate(rows_of(tmp_path / 'classes.csv')):
        assert (row['class'], int(row['images'])) == (CLASSES[i], support[i])
        for key, wanted in (('accuracy (recall)', recall), ('precision', precision), ('F1', f1)):
            assert float(row[key]) == pytest.approx(float(wanted[i]), abs=0.006)
    # the worst image is the one with the largest loss
    losses = F.nll_loss(scores.log(), truth, reduction='none')
    order = [row['image'] for row in rows_of(tmp_path / 'images.csv')]
    assert order == [f'{i}.jpg' for i in losses.argsort(descending=True).tolist()]
    found = [float(row['loss']) for row in rows_of(tmp_path / 'images.csv')]
    assert found == pytest.approx(losses.sort(descending=True).values.tolist(), rel=1e-4)


@pytest.mark.parametrize('ignored', [255, 1])
def test_pixels_as_mmseg_counts_them(ignored, tmp_path):
    """With pixels that are not labelled, and a class that is nowhere."""
    generator = torch.Generator().manual_seed(0)
    truth = torch.randint(3, (6, 20, 30), generator=generator)
    noise = torch.rand(truth.shape, generator=generator)
    share = torch.linspace(0.1, 0.9, 6)[:, None, None]
    found = torch.where(noise < share, truth, torch.randint(3, truth.shape, generator=generator))
    truth[:, :3] = ignored
    samples = [
        dict(pred_sem_seg=dict(data=f[None]), gt_sem_seg=dict(data=t[None]), img_path=f'{i}.png')
        for i, (f, t) in enumerate(zip(found, truth, strict=True))
    ]
    metric = metric_of(samples, ignore_index=ignored)
    write(metric, tmp_path)
    areas = [
        IoUMetric.intersect_and_union(f, t, 4, ignored) for f, t in zip(found, truth, strict=True)
    ]
    sums = [sum(column) for column in zip(*areas, strict=True)]
    wanted = IoUMetric.total_area_to_metrics(*sums, ['mIoU', 'mFscore'])
    names = {
        'IoU': 'IoU',
        'accuracy (recall)': 'Acc',
        'precision': 'Precision',
        'F1': 'Fscore',
    }
    for i, row in enumerate(rows_of(tmp_path / 'classes.csv')):
        for key, name in names.items():
            value = 100 * wanted[name][i]
            if key == 'F1' and row['precision'] == '0.0':
                value = 0  # mmseg has none for a class that is only in the predictions
            assert float(row[key]) == pytest.approx(value, abs=0.006, nan_ok=True), (i, key)
    # of an image: the mean over the classes that are in it; what was most disturbed comes first
    rows = rows_of(tmp_path / 'images.csv')
    assert [row['image'] for row in rows] == [f'{i}.png' for i in range(6)]
    of_first = IoUMetric.total_area_to_metrics(*areas[0], ['mIoU'])['IoU'][:3].mean()
    assert float(rows[0]['IoU']) == pytest.approx(of_first, abs=1e-4)


@pytest.mark.parametrize(
    ('found', 'names', 'pairs', 'iou'),
    [
        ([0, 2, 1, 1], 2, {(0, 0): 1, (0, 2): 1, (1, 1): 2}, (1 / 2 + 1 + 0) / 3),
        ([3, 3, 3, 3], 2, {(0, 3): 2, (1, 3): 2}, 0),
        ([0, 1, 1, 1], 0, {(0, 0): 1, (0, 1): 1, (1, 1): 2}, (1 / 2 + 2 / 3) / 2),
    ],
)
def test_a_model_may_have_more_outputs_than_names(found, names, pairs, iou, tmp_path):
    parts = [dict(data=torch.tensor([[labels]])) for labels in (found, [0, 0, 1, 1])]
    sample = dict(zip(('pred_sem_seg', 'gt_sem_seg'), parts, strict=True))
    metric = metric_of([sample], CLASSES[:names])
    (judged,) = metric.judged
    assert {(t, p): n for t, p, n in judged.pairs.tolist()} == pairs
    assert judged.value == pytest.approx(iou)
    write(metric, tmp_path)
    wanted = [*CLASSES[:names], *(f'class {i}' for i in range(names, max(found) + 1))]
    assert [row['class'] for row in rows_of(tmp_path / 'classes.csv')] == wanted


def test_a_class_that_the_model_does_not_know():
    sample = dict(pred_score=torch.ones(2) / 2, pred_label=torch.tensor([0]))
    assert not metric_of([dict(sample, gt_label=torch.tensor([2]))]).judged
    assert len(metric_of([dict(sample, gt_label=torch.tensor([1]))]).judged) == 1


def boxes(truth, found, ignored=()):
    """A sample: true boxes as (x, class), predicted ones as (x, class, score), 10 pixels wide."""

    def place(x):
        return [x, 0, x + 10, 10]

    return dict(
        gt_instances=dict(
            bboxes=HorizontalBoxes([place(x) for x, _ in truth] or torch.zeros(0, 4)),
            labels=torch.tensor([c for _, c in truth]).long(),
        ),
        pred_instances=dict(
            bboxes=torch.tensor([place(x) for x, *_ in found]).float().reshape(-1, 4),
            labels=torch.tensor([c for _, c, _ in found]).long(),
            scores=torch.tensor([s for *_, s in found]),
        ),
        ignored_instances=dict(bboxes=torch.tensor([place(x) for x in ignored]).float()),
    )


NOTHING = len(CLASSES)  # the background's number


@pytest.mark.parametrize(
    ('truth', 'found', 'ignored', 'pairs', 'f1'),
    [
        ([(0, 1), (50, 2)], [(0, 1, 0.9), (51, 2, 0.8)], [], {(1, 1): 1, (2, 2): 1}, 1),
        ([(0, 1)], [(0, 1, 0.29)], [], {(1, NOTHING): 1}, 0),  # not sure enough
        ([(0, 1)], [(5, 1, 0.9)], [], {(1, NOTHING): 1, (NOTHING, 1): 1}, 0),  # IoU 1/3
        ([(0, 1)], [(0, 3, 0.9)], [], {(1, 3): 1}, 0),
        # of two boxes, the one of the object's own class, even if it lies worse
        ([(0, 1)], [(0, 3, 0.9), (2, 1, 0.5)], [], {(1, 1): 1, (NOTHING, 3): 1}, 2 / 3),
        # one box finds one object, and each object is found if it can be
        ([(0, 1), (3, 1)], [(1, 1, 0.9)], [], {(1, 1): 1, (1, NOTHING): 1}, 2 / 3),
        ([(0, 1), (3, 1)], [(1, 1, 0.9), (-1, 1, 0.4)], [], {(1, 1): 2}, 1),
        ([(0, 1)], [(0, 1, 0.9), (81, 2, 0.9)], [80], {(1, 1): 1}, 1),  # in a crowd
        ([], [], [], {}, 1),
        ([], [(0, 2, 0.5)], [], {(NOTHING, 2): 1}, 0),
    ],
)
def test_what_a_box_is_taken_for(truth, found, ignored, pairs, f1):
    judged = judge_boxes(boxes(truth, found, ignored), dict(classes=CLASSES), 0.3)
    assert {(t, p): n for t, p, n in judged.pairs.tolist()} == pairs
    assert judged.value == pytest.approx(f1)


def test_boxes_without_truth_are_not_judged():
    """mmdet packs empty instances where none were loaded; others belong to the resized image."""
    one = boxes([(0, 1)], [(0, 1, 0.9)])
    assert not metric_of([dict(one, gt_instances={})]).judged
    assert not metric_of([dict(one, pred_instances=dict(scores=torch.ones(1)))]).judged
    assert not metric_of([one], boxes_fit=False).judged and len(metric_of([one]).judged) == 1


def test_the_background_has_no_row(tmp_path):
    samples = [boxes([(0, 1)], [(0, 1, 0.9)]), boxes([], [(0, 2, 0.5)]), boxes([(9, 0)], [])]
    names = ('ant', 'bee', 'cat', 'background')  # a class may be called so
    table = write(metric_of(samples, names), tmp_path, {'box AP': np.array([0, 1, np.nan, 0.5])})
    rows = rows_of(tmp_path / 'classes.csv')
    assert [row['class'] for row in rows] == list(names)
    assert [row['box AP'] for row in rows] == ['0.0', '100.0', 'nan', '50.0']
    assert [row['recall'] for row in rows] == ['0.0', '100.0', 'nan', 'nan']
    assert [row['precision'] for row in rows] == ['nan', '100.0', '0.0', 'nan']
    assert len(table.splitlines()) == 5


def test_a_long_table_shows_its_worst_classes():
    table = np.diag(np.arange(50)) + 1
    rows = class_table(table, [f'kind {i}' for i in range(50)], 'images')
    lines = text(rows).splitlines()
    assert len(lines) == 32 and lines[1].startswith('kind 0 ') and 'kind 49' not in '\n'.join(lines)
    assert lines[-1] == '(30 of 50, the lowest)'


@pytest.mark.parametrize('number', [1, 5, 60])
def test_a_confusion_matrix_of_any_size_fits(number, tmp_path):
    """Long names stay inside the picture, whose border is white."""
    table = np.random.default_rng(0).integers(0, 9, (number, number)) + 9 * np.eye(
        number, dtype=int
    )
    names = [f'{i} $ a name that is far too long for any picture' for i in range(number)]
    draw_confusion(table, names, 'images', path := tmp_path / 'confusion.png')
    picture = cv2.imread(str(path))
    border = (picture[:2], picture[-2:], picture[:, :2], picture[:, -2:])
    assert all((part == 255).all() for part in border)
    assert (picture != 255).any(2).mean() > 0.05


def test_pictures_are_in_the_order_of_the_images(tmp_path):
    _, _, samples = classified(5)
    metric = metric_of(samples)
    (tmp_path / UNSORTED).mkdir()
    for i, one in enumerate(metric.judged[:4]):
        one.picture = f'{i:09d}_name_{i}.jpg'
        (tmp_path / UNSORTED / one.picture).write_text(str(i))
    (tmp_path / UNSORTED / '000000009_unknown.jpg').write_text('')  # of an image without truth
    for name in ('00001_of_an_earlier_test.jpg', '00001_mine.jpg'):
        (tmp_path / name).write_text('')
    (tmp_path / 'images.csv').write_text(
        'image,loss,details,picture\n,,,00001_of_an_earlier_test.jpg\n'
    )
    write(metric, tmp_path)
    order = [int(one.path[0]) for one in metric.worst_first() if one.path != '4.jpg']
    wanted = [f'{rank:05d}_name_{i}.jpg' for rank, i in enumerate(order, 1)]
    found = sorted(path.name for path in tmp_path.glob('*.jpg'))
    assert found == sorted([*wanted, '00005_unknown.jpg', '00001_mine.jpg'])
    assert [(tmp_path / name).read_text() for name in wanted] == [str(i) for i in order]
    named = [row['picture'] for row in rows_of(tmp_path / 'images.csv') if row['picture']]
    assert named == [*wanted, '00005_unknown.jpg'] and not (tmp_path / UNSORTED).exists()


def test_many_pictures_are_in_order_by_name_too(tmp_path):
    names = [f'{i}_x.jpg' for i in range(100_001)]
    wanted = [f'{i:06d}_x.jpg' for i in range(1, 100_002)]
    assert numbered(names) == wanted == sorted(wanted)
    assert numbered(['8_a_b.jpg']) == ['00001_a_b.jpg']


def test_images_without_truth_are_no_error(tmp_path):
    metric = metric_of([dict(pred_score=torch.ones(4) / 4, pred_label=torch.tensor([0]))])
    assert write(metric, tmp_path) is None and not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------- Grad-CAM


@pytest.fixture(scope='module')
def cases(tmp_path_factory):
    made = {}

    def case(task):
        if task not in made:
            made[task] = test_apis.Case(task, tmp_path_factory.mktemp('case'))
        return made[task]

    return case


def plain_cam(model, x, stage, target):
    """Grad-CAM in a few lines, from the backbone's own parts, without hooks."""
    backbone = model.backbone
    feature, outs = backbone.stem(x), []
    for i, part in enumerate(backbone.stages):
        feature = part(feature)
        if i == stage:
            feature = kept = feature.detach().requires_grad_()
        if i in backbone.out_indices:
            norm = getattr(backbone, f'norm{i}') if backbone.feature_norm else torch.nn.Identity()
            outs.append(norm(feature))
    feats = model.neck(tuple(outs))
    head = model.head if hasattr(model, 'head') else model.decode_head
    (gradient,) = torch.autograd.grad(target(head(feats)[0]), kept)
    heat = (gradient.mean((2, 3), keepdim=True) * kept).sum(1).clamp(min=0)[0].detach().numpy()
    heat -= heat.min()
    heat = cv2.resize(heat / (heat.max() + 1e-7), x.shape[:1:-1])
    return (heat - heat.min()) / (1e-7 + (heat - heat.min()).max())


@pytest.mark.parametrize('task', [CLASSIFICATION, SEGMENTATION])
@pytest.mark.parametrize('reparam', [False, True])
def test_grad_cam_is_grad_cam(cases, task, reparam):
    """Over every stage, for the predicted class and for another, in both forms."""
    case = cases(task)
    model = case.model(reparam=reparam)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    wanted_scores = fastvit_mm.inference(model, case.image)
    lit = 0
    for stage in range(4):
        for label in (None, 7):
            found = attention.attend(model, case.image, stage, label)
            x = attention.prepared(model, case.image)
            scores = model(x, mode='tensor')[0]
            if task == CLASSIFICATION:
                best = int(scores.argmax())
                assert found.share == pytest.approx(float(scores.softmax(0)[found.label]), rel=1e-4)

                def target(out, label=found.label):
                    return out[label]
            else:
                best = int(scores.argmax(0).mode().values.mode().values) if label else found.label
                mask = (scores.argmax(0) == found.label).float()
                mask = mask if mask.any() else torch.ones_like(mask)

                def target(out, label=found.label, mask=mask):
                    return (out[label] * mask).sum()

            assert found.label == (best if label is None else label)
            wanted = plain_cam(model, x, stage, target)
            assert found.heat.shape == found.image.shape[:2] == tuple(x.shape[2:])
            assert np.abs(found.heat - wanted).max() < 1e-3
            lit += found.heat.max() > 0.99
    assert lit >= 4  # or nothing was compared
    # the model is as before: nothing hooked, no gradients kept
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
    again = fastvit_mm.inference(model, case.image)
    assert relative(test_apis.says(again), test_apis.says(wanted_scores)) < 1e-5


def test_both_forms_attend_to_the_same(cases):
    case = cases(CLASSIFICATION)
    both = [attention.attend(case.model(reparam=r), case.image, 2, 5).heat for r in (False, True)]
    assert np.abs(both[0] - both[1]).max() < 1e-2 and both[0].max() > 0.99


def test_cam_of_files(cases, tool, tmp_path, monkeypatch):  # noqa: F811
    """One picture for each image; what cannot be is refused in a line."""
    from mmengine.config import Config

    def command(task, *more):
        case = cases(task)
        config = Config.fromfile(case.config)
        config.merge_from_dict(case.options)
        config.dump(path := case.config.with_name('ready.py'))
        return ('infer', path, case.checkpoint, case.path, '--out', tmp_path / 'out', *more)

    code, err = tool(*command(CLASSIFICATION, '--cam', 3, '--cam-class', 'kind 7'))
    assert code == 0, err
    drawn = cv2.imread(str(tmp_path / 'out/image.jpg'))
    assert drawn.shape[1] == 2 * 512 and drawn.shape[0] > 512
    refusal(tool(*command(CLASSIFICATION, '--cam', 4)), '--cam 4', 'stages 0 to 3')
    refusal(tool(*command(CLASSIFICATION, '--cam', 3, '--cam-class', 'x')), '--cam-class x')
    refusal(tool(*command(CLASSIFICATION, '--cam', 3, '--json')), 'leave out --json')
    ignored = ('--cam', 3, '--batch-size', 1, '--score-thr', 0)
    refusal(tool(*command(CLASSIFICATION, *ignored)), 'leave out --score-thr and --batch-size')
    refusal(tool(*command(CLASSIFICATION, '--cam-class', '3')), '--cam 3')
    refusal(tool(*command(DETECTION, '--cam', 3)), 'classifiers and segmentors')
    with pytest.raises(FastViTError, match='the classes 0 to 149'):
        attention.attend(cases(SEGMENTATION).model(), cases(SEGMENTATION).image, 0, 150)
    exported = cases(CLASSIFICATION).model()
    exported.backbone = torch.nn.Identity()
    with pytest.raises(FastViTError, match='an exported file'):
        attention.attend(exported, cases(CLASSIFICATION).image, 0)
    monkeypatch.setitem(sys.modules, 'pytorch_grad_cam', None)
    with pytest.raises(FastViTError, match='pip install grad-cam'):
        attention.attend(cases(CLASSIFICATION).model(), cases(CLASSIFICATION).image, 0)


# ------------------------------------------------------------------------------- pictures


@pytest.mark.parametrize('ignored', [255, 1])
def test_truth_and_prediction_side_by_side(ignored):
    """In a segmentation, pixels without a label are black in the truth alone."""
    image = np.full((100, 100, 3), 200, np.uint8)
    labels = torch.zeros(1, 100, 100, dtype=torch.int64)
    labels[:, :50] = ignored
    meta = dict(classes=CLASSES[:2], palette=[(0, 0, 255), (255, 0, 0)], ignore_index=ignored)
    sample = segmented(torch.ones_like(labels), labels)
    truth, found = truth_of(sample, meta), prediction_of(sample, None, 0)
    drawn = pictures.compare(image, truth, found, meta, 'a caption')
    blue, red = ((drawn[..., i].astype(int) - drawn[..., 2 - i]) > 60 for i in (0, 2))
    middle = drawn.shape[1] // 2
    assert blue[:, :middle].sum() > 1e5 and not blue[:, middle:].any()
    assert red[:, middle:].sum() > 2e5 and not red[:, :middle].any()
    dark = (drawn.max(2) < 100) & (drawn.min(2) > 60)  # grey under black
    assert dark[:, :middle].sum() > 1e5 and dark[:, middle:].sum() < 1e3


def segmented(found, truth, **about):
    parts = dict(pred_sem_seg=PixelData(data=found), gt_sem_seg=PixelData(data=truth))
    return SegDataSample(metainfo=about, **parts)


def test_a_title_takes_the_lines_that_it_needs():
    image = np.zeros((200, 300, 3), np.uint8)
    one, many = (pictures.titled(image, 'w' * 8 + ' ' + 'many words ' * n, 100) for n in (0, 20))
    assert len(image) < len(one) < len(many)
    for drawn in (one, many):
        strip = drawn[: len(drawn) - 200]
        assert drawn.shape[1] == 300 and strip.min() < 100
        assert (strip[:1] == 255).all() and (strip[:, -2:] == 255).all()
    assert pictures.titled(image, None, 100) is image


def test_a_judged_image_is_sorted_by_its_measure():
    metric = metric_of([boxes([(0, 1)], [(0, 1, 0.9)]), boxes([(0, 1)], [])])
    assert [one.value for one in metric.worst_first()] == [0, 1]  # F1: the lowest first
    assert isinstance(metric.judged[0], Judged)
