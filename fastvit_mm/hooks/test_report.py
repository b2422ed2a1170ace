"""OpenMMLab hook: after a test, what each class and each image came to."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mmengine import fileio
from mmengine.dist import barrier, get_rank, get_world_size, is_main_process
from mmengine.dist import utils as dist_utils
from mmengine.evaluator import Evaluator
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch.utils.data import Dataset

from fastvit_mm.reparameterize import unwrap

from .reparameterize import one_outcome

COLUMNS = dict(bbox='box AP', segm='mask AP')


@HOOKS.register_module()
class TestReportHook(Hook):
    """Write a table of the classes, the images in order, the worst first, and a confusion matrix.

    The folder then holds ``classes.csv``, ``images.csv``, ``confusion.png`` and, if wanted,
    ``00001_NAME.jpg``, ``00002_NAME.jpg`` ...: pictures of truth and prediction in the same order.
    Without annotations there are only the pictures, in the order of the test.

    Args:
        out_dir: the folder; None for that of the run's log.
        draw: whether to draw pictures.
        score_thr: least score of a box that counts and is drawn.

    Raises:
        FastViTError: the folder has other files of these names; before the test.
    """

    __test__ = False  # for pytest

    def __init__(self, out_dir: str | None = None, draw: bool = False, score_thr: float = 0.3):
        self.out_dir = Path(out_dir) if out_dir else None
        self.draw, self.score_thr = draw, score_thr

    def before_test_epoch(self, runner: Runner) -> None:
        from fastvit_mm.evaluation.after_test import UNSORTED, prepare
        from fastvit_mm.evaluation.per_image import PerImage

        evaluator = runner.test_loop.evaluator
        evaluator.metrics = [m for m in evaluator.metrics if not isinstance(m, PerImage)]
        for found in precisions(evaluator):
            found.clear()
        self.metric = PerImage(self.score_thr, boxes_fit=resized_before(runner))
        ignored = ignore_index(evaluator, runner.test_loop.dataloader.dataset)
        self.metric.dataset_meta = dict(evaluator.dataset_meta or {}, ignore_index=ignored)
        evaluator.metrics.append(self.metric)
        self.folder = self.out_dir or Path(runner.log_dir)
        self.unsorted, self.seen = self.folder / UNSORTED, 0
        with one_outcome():
            if is_main_process():
                prepare(self.folder, self.draw)

    def after_test_iter(self, runner: Runner, batch_idx, data_batch=None, outputs=None) -> None:
        if not self.draw:
            return
        import mmcv

        number = len(runner.test_loop.dataloader.dataset)
        for sample, judged in zip(outputs, self.metric.results[-len(outputs) :], strict=True):
            place = self.seen * get_world_size() + get_rank()  # in the test of all processes
            self.seen += 1
            if place >= number:
                continue  # samplers repeat images until each process has as many
            picture = self.picture(runner, sample, judged)
            if picture is not None:
                name = f'{place:09d}_{Path(sample.img_path).stem}.jpg'
                mmcv.imwrite(picture, str(self.unsorted / name))
                if judged is not None:
                    judged.picture = name

    def picture(self, runner: Runner, sample, judged):
        """Truth and prediction with a caption, BGR uint8; None for an image without a file."""
        from fastvit_mm import pictures
        from fastvit_mm.data import decode
        from fastvit_mm.truth import prediction_of, truth_of

        path = sample.get('img_path')
        image = decode(fileio.get(path)) if path else None
        if image is None:
            return None
        caption = Path(path).name
        if judged is not None:
            caption += f'    {self.metric.task.measure} {judged.value:.3g}: {judged.details}'
        meta = self.metric.dataset_meta
        faces = getattr(getattr(unwrap(runner.model), 'head', None), 'faces', None)
        truth = truth_of(sample, meta, faces)
        if 'gt_instances' in sample and judged is None:
            truth = None
        found = prediction_of(sample, faces, self.score_thr)
        with every_rank_draws():
            return pictures.compare(image, truth, found, meta, caption)

    def after_test_epoch(self, runner: Runner, metrics: dict | None = None) -> None:
        barrier()
        if not is_main_process():
            return
        from fastvit_mm.evaluation.after_test import write

        table = write(self.metric, self.folder, self.average_precision(runner))
        if table:
            if self.metric.task.unit != 'pixels':  # mmseg's own metric shows such a table
                runner.logger.info(f'per class{", in %" * bool(self.metric.task.unit)}:\n{table}')
            runner.logger.info(f'tables, the worst images first: {self.folder}')

    def average_precision(self, runner: Runner) -> dict:
        """Of each class, an array by its column's name, as mmdet's metric has just computed it."""
        number = len(self.metric.dataset_meta.get('classes') or ())
        return {
            COLUMNS[key]: values
            for found in precisions(runner.test_loop.evaluator)
            for key, values in found.items()
            if key in COLUMNS and len(values) == number
        }


@contextmanager
def every_rank_draws() -> Iterator[None]:
    """OpenMMLab's visualizers do nothing on other ranks than 0; here each has images of its own."""
    asked = dist_utils.is_main_process
    dist_utils.is_main_process = lambda *_: True
    try:
        yield
    finally:
        dist_utils.is_main_process = asked


def precisions(evaluator: Evaluator) -> Iterator[dict]:
    """What mmdet's metrics found for each class, see :mod:`fastvit_mm.data.coco`."""
    for metric in evaluator.metrics:
        yield getattr(getattr(metric, '_coco_api', None), 'precision', {})


def ignore_index(evaluator: Evaluator, dataset: Dataset) -> int:
    """The label of pixels that do not count: the metric's or else the data set's."""
    from fastvit_mm.pictures import IGNORED

    given = [getattr(one, 'ignore_index', None) for one in (*evaluator.metrics, dataset)]
    return next((one for one in given if one is not None), IGNORED)


def resized_before(runner: Runner) -> bool:
    """Whether boxes are read after the image was resized, so that they are the original image's."""
    pipeline = getattr(runner.test_loop.dataloader.dataset, 'pipeline', None)
    names = [type(step).__name__ for step in getattr(pipeline, 'transforms', ())]
    resizes = [i for i, name in enumerate(names) if 'Resize' in name]
    reads = [i for i, name in enumerate(names) if name.endswith('LoadAnnotations')]
    fits = not (resizes and reads) or min(reads) > max(resizes)
    if not fits and runner.cfg.get('default_scope') == 'mmdet':
        runner.logger.warning(
            'the test pipeline resizes its boxes, so that they are not judged one by one: put '
            'LoadAnnotations after Resize'
        )
    return fits
