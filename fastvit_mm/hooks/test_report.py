"""OpenMMLab hook: after a test, what each class and each image came to."""

import shutil
from pathlib import Path

import mmcv
import numpy as np
from mmengine import fileio
from mmengine.dist import barrier, get_rank
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from fastvit_mm.reparameterize import unwrap

UNSORTED = '.unsorted'  # folder of pictures while the order of the images is not known


@HOOKS.register_module()
class TestReportHook(Hook):
    """Write a table of the classes, the images in order, the worst first, and a confusion matrix.

    The folder then holds ``classes.csv``, ``images.csv``, ``confusion.png`` and, if wanted,
    ``0001_NAME.jpg``, ``0002_NAME.jpg`` ...: pictures of truth and prediction in the same order.
    Without annotations there are only the pictures, in the order of the test.

    Args:
        out_dir: the folder; None for that of the run's log.
        draw: whether to draw pictures.
        score_thr: least score of a box that counts and is drawn.
    """

    __test__ = False  # for pytest
    priority = 'BELOW_NORMAL'

    def __init__(self, out_dir: str | None = None, draw: bool = False, score_thr: float = 0.3):
        self.out_dir = Path(out_dir) if out_dir else None
        self.draw, self.score_thr = draw, score_thr

    def before_test_epoch(self, runner: Runner) -> None:
        from fastvit_mm.evaluation.per_image import PerImage

        evaluator = runner.test_loop.evaluator
        evaluator.metrics = [m for m in evaluator.metrics if not isinstance(m, PerImage)]
        self.metric = PerImage(self.score_thr)
        self.metric.dataset_meta = runner.test_dataloader.dataset.metainfo
        evaluator.metrics.append(self.metric)
        self.folder = self.out_dir or Path(runner.log_dir)
        self.drawn = 0

    def after_test_iter(self, runner: Runner, batch_idx, data_batch=None, outputs=None) -> None:
        if not self.draw:
            return
        folder = self.folder / UNSORTED
        folder.mkdir(parents=True, exist_ok=True)
        for sample, judged in zip(outputs, self.metric.results[-len(outputs) :], strict=True):
            name = f'{get_rank()}_{self.drawn:06d}.jpg'
            self.drawn += 1
            picture = self.picture(runner, sample, judged)
            if picture is not None:
                mmcv.imwrite(picture, str(folder / name))
                if judged is not None:
                    judged.picture = name

    def picture(self, runner: Runner, sample, judged) -> np.ndarray | None:
        """Truth and prediction with a caption: the file, how good it is, and why."""
        from fastvit_mm import pictures
        from fastvit_mm.data import decode
        from fastvit_mm.evaluation.truth import prediction_of, truth_of

        path = sample.get('img_path')
        image = decode(fileio.get(path)) if path else None
        if image is None:
            return None
        caption = Path(path).name
        if judged is not None:
            caption += f'    {self.metric.task.measure} {judged.value:.3g}: {judged.says}'
        meta = self.metric.dataset_meta
        faces = getattr(getattr(unwrap(runner.model), 'head', None), 'faces', None)
        truth, found = truth_of(sample, meta, faces), prediction_of(sample, faces, self.score_thr)
        return pictures.compare(image, truth, found, meta, caption)

    def after_test_epoch(self, runner: Runner, metrics: dict | None = None) -> None:
        barrier()
        if get_rank() == 0:
            self.write(runner, metrics or {})

    def write(self, runner: Runner, metrics: dict) -> None:
        from fastvit_mm.evaluation.per_class import write_classes
        from fastvit_mm.evaluation.per_image import write_images

        judged = self.metric.worst_first()
        if judged:
            self.folder.mkdir(parents=True, exist_ok=True)
            table = write_classes(self.metric, self.folder, average_precision(runner))
            runner.logger.info(f'per class:\n{table}')
        self.sort(judged)
        if judged:
            write_images(judged, self.metric.task, self.folder / 'images.csv')
            runner.logger.info(f'tables and pictures, the worst images first: {self.folder}')

    def sort(self, judged) -> None:
        """Give the pictures names in the order of ``judged``; those of no judged image follow."""
        unsorted = self.folder / UNSORTED
        if not unsorted.is_dir():
            return
        for old in self.folder.glob('[0-9][0-9][0-9][0-9]*_*.jpg'):  # of an earlier test
            old.unlink()
