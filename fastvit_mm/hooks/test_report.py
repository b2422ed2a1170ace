"""OpenMMLab hook: after a test, what each class and each image came to."""

import shutil
import sys
from pathlib import Path

from mmengine import fileio
from mmengine.dist import barrier, get_rank, is_main_process
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from fastvit_mm.reparameterize import unwrap

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
    """

    __test__ = False  # for pytest

    def __init__(self, out_dir: str | None = None, draw: bool = False, score_thr: float = 0.3):
        self.out_dir = Path(out_dir) if out_dir else None
        self.draw, self.score_thr = draw, score_thr

    def before_test_epoch(self, runner: Runner) -> None:
        from fastvit_mm.evaluation.after_test import UNSORTED
        from fastvit_mm.evaluation.per_image import PerImage

        evaluator = runner.test_loop.evaluator
        evaluator.metrics = [m for m in evaluator.metrics if not isinstance(m, PerImage)]
        if 'fastvit_mm.data.coco' in sys.modules:
            sys.modules['fastvit_mm.data.coco'].InOrder.latest.clear()
        self.metric = PerImage(self.score_thr, boxes_fit=resized_before(runner))
        self.metric.dataset_meta = evaluator.dataset_meta or {}
        evaluator.metrics.append(self.metric)
        self.folder = self.out_dir or Path(runner.log_dir)
        self.unsorted, self.drawn = self.folder / UNSORTED, 0
        if self.draw and is_main_process():
            shutil.rmtree(self.unsorted, ignore_errors=True)  # of a test that was interrupted
            self.unsorted.mkdir(parents=True)
        barrier()

    def after_test_iter(self, runner: Runner, batch_idx, data_batch=None, outputs=None) -> None:
        if not self.draw:
            return
        import mmcv

        for sample, judged in zip(outputs, self.metric.results[-len(outputs) :], strict=True):
            picture = self.picture(runner, sample, judged)
            if picture is not None:
                # unique among the images of all processes, and in the order of the test
                name = f'{self.drawn:06d}-{get_rank()}_{Path(sample.img_path).stem}.jpg'
                mmcv.imwrite(picture, str(self.unsorted / name))
                if judged is not None:
                    judged.picture = name
            self.drawn += 1

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
            caption += f'    {self.metric.task.measure} {judged.value:.3g}: {judged.says}'
        meta = self.metric.dataset_meta
        faces = getattr(getattr(unwrap(runner.model), 'head', None), 'faces', None)
        truth = truth_of(sample, meta, faces)
        if 'gt_instances' in sample and judged is None:
            truth = None
        found = prediction_of(sample, faces, self.score_thr)
        return pictures.compare(image, truth, found, meta, caption)

    def after_test_epoch(self, runner: Runner, metrics: dict | None = None) -> None:
        barrier()
        if not is_main_process():
            return
        from fastvit_mm.evaluation.after_test import write

        table = write(self.metric, self.folder, self.average_precision())
        if table:
            if self.metric.task.unit != 'pixels':  # mmseg's own metric shows such a table
                runner.logger.info(f'per class{", in %" * bool(self.metric.task.unit)}:\n{table}')
            runner.logger.info(f'tables, the worst images first: {self.folder}')

    def average_precision(self) -> dict:
        """Of each class, an array by its column's name, as mmdet's metric has just computed it."""
        if self.metric.task is None or self.metric.task.measure != 'F1':
            return {}
        from fastvit_mm.data.coco import InOrder

        number = len(self.metric.dataset_meta.get('classes') or ())
        return {
            COLUMNS[k]: v for k, v in InOrder.latest.items() if k in COLUMNS and len(v) == number
        }


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
