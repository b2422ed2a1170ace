"""ReaL: all labels that fit the images of ImageNet's validation set (Beyer et al., 2020)."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from mmengine.evaluator import BaseMetric
from mmengine.registry import METRICS

from fastvit_mm.errors import FastViTError, one_line

NAME = re.compile(r'ILSVRC2012_val_(\d{8})$')


def read_real_labels(path: str | Path, images: int = 50_000, classes: int = 1000) -> list:
    """The labels of each image, in the order of ImageNet's own numbers; some have none.

    Args:
        path: ``real.json`` as published: a list of ``images`` lists of labels.

    Raises:
        FastViTError: the file cannot be read or is another.
    """
    try:
        labels = json.loads(Path(path).read_text(encoding='utf-8'))
    except (OSError, ValueError) as error:
        raise FastViTError(f'ReaL labels {path} cannot be read: {one_line(error)}') from error
    if not isinstance(labels, list) or len(labels) != images:
        found = f'{len(labels):,} entries' if isinstance(labels, list) else 'no list'
        raise FastViTError(
            f'ReaL labels {path}: {found}, expected a list of {images:,} lists of labels, '
            'as in the published real.json'
        )
    for number, one in enumerate(labels, 1):
        good = isinstance(one, list) and all(type(x) is int and 0 <= x < classes for x in one)
        if not good:
            raise FastViTError(
                f'ReaL labels {path}: entry {number} is no list of labels from 0 to {classes - 1}'
            )
    return labels


@METRICS.register_module()
class RealAccuracy(BaseMetric):
    """Share of images, in percent, whose prediction is one of their ReaL labels.

    Images are recognized by ImageNet's file names. Those without a label do not count.

    Args:
        labels, images, classes: as for :func:`read_real_labels`.

    Raises:
        FastViTError: an image has another name or no entry.
    """

    default_prefix = 'real'

    def __init__(self, labels: str, images: int = 50_000, classes: int = 1000, **kwargs):
        super().__init__(**kwargs)
        self.labels = read_real_labels(labels, images, classes)

    def process(self, data_batch, data_samples: Sequence[dict]) -> None:
        for sample in data_samples:
            right = self.labels_of(sample['img_path'])
            # one result for each image, since those of several processes are interleaved
            self.results.append(int(sample['pred_label']) in right if right else None)

    def labels_of(self, path: str) -> list[int]:
        found = NAME.match(Path(path).stem)
        number = int(found.group(1)) if found else 0
        if not 1 <= number <= len(self.labels):
            raise FastViTError(
                f'{path}: ReaL labels are for images named ILSVRC2012_val_00000001 to '
                f'ILSVRC2012_val_{len(self.labels):08d}'
            )
        return self.labels[number - 1]

    def compute_metrics(self, results: list) -> dict[str, float]:
        counted = [right for right in results if right is not None]
        if not counted:
            raise FastViTError('none of the images has a ReaL label')
        return dict(top1=100 * float(np.mean(counted)), images=len(counted))
