"""What a test says of each image: how good its prediction is, and what was taken for what."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from mmengine.evaluator import BaseMetric
from mmengine.registry import METRICS

from fastvit_mm.pictures import IGNORED, class_name

SCORE, OVERLAP = 0.3, 0.5  # of a box that counts, and with the object that it finds


@dataclass(frozen=True)
class Task:
    """How the images of a task are judged.

    Attributes:
        measure: of an image, by which images are ordered.
        higher_is_better: of the measure.
        judge: from a sample (a dict), the data set's meta (``classes``, ``ignore_index``) and a
            box's least score; None without truth.
        unit: of the confusion matrix; '' if there is none.
        has_background: whether its last class stands for nothing.
    """

    measure: str
    higher_is_better: bool
    judge: Callable[[dict, dict, float], 'Judged | None']
    unit: str = ''
    has_background: bool = False


@dataclass
class Judged:
    """One image of a test.

    Attributes:
        value: of the task's measure.
        details: in words, for people.
        pairs: (n, 3) int64: true class, predicted class, how often. In a detection, the number of
            classes stands for the background.
        errors: of the joints of a hand, (21,) mm.
        path: of the image; '' if it has none.
        picture: file of its picture, if one was drawn.
    """

    value: float
    details: str
    pairs: np.ndarray
    errors: np.ndarray | None = None
    path: str = ''
    picture: str = ''


def judge_class(sample: dict, meta: dict, score: float) -> Judged | None:
    """Cross-entropy of the predicted probabilities."""
    truth = sample.get('gt_label')
    if truth is None or truth.numel() != 1 or sample['pred_label'].numel() != 1:
        return None  # several labels have no confusion matrix
    chances, truth = sample['pred_score'].double(), int(truth)
    if truth >= len(chances):
        return None  # a class that the model does not know
    found = int(sample['pred_label'])
    loss = float(-chances[truth].clamp(min=1e-12).log())
    names = [class_name(meta, label) for label in (truth, found)]
    details = f'{names[0]}, {chances[truth]:.1%}'
    if found != truth:
        details += f', taken for {names[1]}, {chances[found]:.1%}'
    return Judged(loss, details, np.array([[truth, found, 1]]))


def judge_pixels(sample: dict, meta: dict, score: float) -> Judged | None:
    """Mean IoU of the classes that are in the image or were predicted there, 0 to 1."""
    if 'gt_sem_seg' not in sample:
        return None
    found = sample['pred_sem_seg']['data'].flatten().cpu().long()
    truth = sample['gt_sem_seg']['data'].flatten().cpu().long()
    number = max(len(meta.get('classes') or ()), int(found.max()) + 1)
    counts = (truth < number) & (truth != meta.get('ignore_index', IGNORED))
    table = torch.bincount(truth[counts] * number + found[counts], minlength=number**2)
    table = table.view(number, number).numpy()
    rates = class_rates(table)
    present = table.sum(0) + table.sum(1) > 0
    right = np.trace(table) / max(table.sum(), 1)
    value = float(rates['IoU'][present].mean()) if present.any() else 1.0
    rows, columns = table.nonzero()
    pairs = np.stack([rows, columns, table[rows, columns]], 1)
    return Judged(value, f'{right:.1%} of the pixels right', pairs)


def judge_boxes(sample: dict, meta: dict, score: float) -> Judged | None:
    """F1 of the boxes that score at least ``score``: each object has one box with an IoU of
    :data:`OVERLAP`, if possible of its own class."""
    from mmdet.structures.bbox import bbox_overlaps, get_box_tensor
    from scipy.optimize import linear_sum_assignment

    truth, pred = sample.get('gt_instances') or {}, sample['pred_instances']
    if 'bboxes' not in truth or 'labels' not in pred:
        return None
    sure = pred['scores'] >= score
    boxes, labels = pred['bboxes'][sure].cpu().float(), pred['labels'][sure].cpu().numpy()
    objects, names = get_box_tensor(truth['bboxes']).cpu().float(), truth['labels'].cpu().numpy()
    overlaps = bbox_overlaps(objects, boxes).numpy().reshape(len(objects), len(boxes))
    same = names[:, None] == labels
    worth = np.where(overlaps >= OVERLAP, overlaps + same, 0)
    rows, columns = linear_sum_assignment(worth, maximize=True)
    rows, columns = (index[worth[rows, columns] > 0] for index in (rows, columns))
    missed = np.delete(names, rows)
    loose = np.delete(np.arange(len(boxes)), columns)
    ignored = sample.get('ignored_instances') or {}
    if len(loose) and len(ignored.get('bboxes', ())):  # crowds, where boxes do not count
        inside = bbox_overlaps(boxes[loose], get_box_tensor(ignored['bboxes']).cpu().float(), 'iof')
        loose = loose[inside.numpy().max(1) < OVERLAP]
    nothing = len(meta.get('classes') or ())
    background = [np.full(len(part), nothing) for part in (missed, loose)]
    pairs = np.stack(
        [
            np.concatenate([names[rows], missed, background[1]]),
            np.concatenate([labels[columns], background[0], labels[loose]]),
        ]
    )
    pairs, times = np.unique(pairs.astype(np.int64), axis=1, return_counts=True)
    right = int(same[rows, columns].sum())
    wrong = len(rows) - right
    total = len(names) + len(rows) + len(loose)
    details = f'{right} of {len(names)} found, {wrong} of wrong class'
    details += f', {len(loose)} where nothing is'
    return Judged(2 * right / total if total else 1.0, details, np.vstack([pairs, times]).T)


def judge_hand(sample: dict, meta: dict, score: float) -> Judged | None:
    """PA-MPJPE: mean distance of the joints after alignment, mm."""
    from fastvit_mm.hand_mesh.metric import align

    if 'xyz' not in sample:
        return None
    found, truth = (sample[key].cpu().double().numpy()[None] for key in ('pred_xyz', 'xyz'))
    errors = 1000 * np.linalg.norm(align(found, truth) - truth, axis=-1)[0]
    details = f'worst joint {errors.max():.1f} mm off'
    return Judged(float(errors.mean()), details, np.zeros((0, 3), np.int64), errors)


TASKS = {
    'pred_score': Task('loss', False, judge_class, 'images'),
    'pred_sem_seg': Task('IoU', True, judge_pixels, 'pixels'),
    'pred_instances': Task('F1', True, judge_boxes, 'objects', has_background=True),
    'pred_xyz': Task('PA-MPJPE', False, judge_hand),
}


def task_of(sample) -> Task | None:
    """The task whose prediction a sample holds; None if it is none of these."""
    return next((task for key, task in TASKS.items() if key in sample), None)


def class_rates(table: np.ndarray) -> dict[str, np.ndarray]:
    """Rates of each class, 0 to 1, from a confusion matrix (true, predicted).

    Returns:
        ``recall``, ``precision``, ``F1`` and ``IoU``; nan where nothing was there to be counted.
    """
    right, true, found = np.diag(table).astype(float), table.sum(1), table.sum(0)
    with np.errstate(invalid='ignore', divide='ignore'):
        return {
            'recall': right / true,
            'precision': right / found,
            'F1': 2 * right / (true + found),
            'IoU': right / (true + found - right),
        }


@METRICS.register_module()
class PerImage(BaseMetric):
    """Collects a :class:`Judged` of every image; adds nothing to the metrics.

    Args:
        score_thr: least score of a box that counts.
        boxes_fit: whether true boxes are those of the original image, as mmdet wants them.

    Attributes:
        task: of the samples; None before there were any.
        judged: of all processes, in the main one, once evaluated.
    """

    default_prefix = ''  # says that none is missing

    def __init__(
        self, score_thr: float = SCORE, boxes_fit: bool = True, collect_device: str = 'cpu'
    ):
        super().__init__(collect_device)
        self.score_thr, self.boxes_fit = score_thr, boxes_fit
        self.task: Task | None = None
        self.judged: list[Judged] = []

    def process(self, data_batch, data_samples: Sequence[dict]) -> None:
        for sample in data_samples:
            self.task = task_of(sample)
            known = self.task and (self.boxes_fit or not self.task.has_background)
            one = self.task.judge(sample, self.dataset_meta, self.score_thr) if known else None
            if one is not None:
                one.path = str(sample.get('img_path') or '')
            self.results.append(one)

    def compute_metrics(self, results: list) -> dict:
        self.judged = [one for one in results if one is not None]
        return {}

    def worst_first(self) -> list[Judged]:
        sign = 1 if self.task and self.task.higher_is_better else -1
        return sorted(self.judged, key=lambda one: sign * one.value)
