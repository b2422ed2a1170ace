"""What is measured: data sets as configs, each with its pipeline and metrics."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mmengine.config import Config

from fastvit_mm.demo.config import dicts
from fastvit_mm.errors import FastViTError
from fastvit_mm.settings.widths import type_of

from .catalogue import TITLES, Catalogue, check_folders, check_released_corruptions
from .corruptions import library
from .real_labels import read_real_labels

ACCURACY = dict(type='Accuracy', topk=(1,))
JPEG_QUALITY = 85  # of ImageNet-C's own images


@dataclass
class ImageSet:
    """A data set to measure on.

    Attributes:
        name: ``clean``, ``a``, ``r``, ``sketch``, ``real``, or such as ``fog/3``.
        dataset, evaluator: configs.
        labels: the model's labels that the set's own stand for, in its order; None: the same.
    """

    name: str
    dataset: dict
    evaluator: dict | list
    labels: list[int] | None = None


def datasets(dataset: dict) -> list[dict]:
    """The data sets with a pipeline in a data set's config, which may be a wrapper."""
    return [node for node in dicts(dataset) if 'pipeline' in node]


def loading(pipeline: Sequence[dict]) -> int:
    """The number of transforms up to the one that loads the image.

    Raises:
        FastViTError: none does.
    """
    for index, step in enumerate(pipeline):
        if 'LoadImage' in type_of(step):
            return index + 1
    raise FastViTError(
        "the test set's pipeline loads no image (LoadImageFromFile), so that images cannot be "
        'corrupted after it'
    )


def input_size(pipeline: Sequence[dict]) -> int:
    """The side of the square that a classifier's pipeline ends with, in pixels.

    Raises:
        FastViTError: no transform sets it.
    """
    for step in reversed(pipeline):
        for key in ('crop_size', 'scale'):
            if key in step:
                size = step[key]
                return size if isinstance(size, int) else min(size)
    raise FastViTError(
        "the test set's pipeline has no transform with crop_size or scale, so the size of the "
        "model's input is not known"
    )


def corrupted(dataset: dict, corruption: str, severity: int) -> dict:
    """A data set whose images are corrupted at their own size, before any other transform."""
    dataset = copy.deepcopy(dataset)
    for one in datasets(dataset):
        at = loading(one['pipeline'])
        step = dict(type='CorruptImage', corruption=corruption, severity=severity)
        one['pipeline'] = [*one['pipeline'][:at], step, *one['pipeline'][at:]]
    return dataset


def cropped(dataset: dict, crop: tuple[int, int] | None, *steps: dict) -> dict:
    """A classifier's data set with ImageNet-C's preprocessing instead of its own.

    Args:
        crop: see :class:`Catalogue`; None: the images are cropped already.
        steps: transforms of the crop, which is then resized to the model's input.
    """
    dataset = copy.deepcopy(dataset)
    for one in datasets(dataset):
        pipeline = one['pipeline']
        side = input_size(pipeline)
        cut = []
        if crop is not None:
            resize = dict(backend='pillow', interpolation='bilinear')
            cut.append(dict(type='ResizeEdge', scale=crop[0], edge='short', **resize))
            cut.append(dict(type='CenterCrop', crop_size=crop[1]))
        fit = dict(type='Resize', scale=(side, side), backend='pillow', interpolation='bicubic')
        one['pipeline'] = [*pipeline[: loading(pipeline)], *cut, *steps, fit, pipeline[-1]]
    return dataset


def folder_set(root: Path, classes: Sequence[str], pipeline: Sequence[dict]) -> dict:
    """A folder with one subfolder for each class."""
    return dict(
        type='CustomDataset',
        data_root=str(root),
        metainfo=dict(classes=tuple(classes)),
        pipeline=copy.deepcopy(pipeline),
    )


def first_pipeline(cfg: Config) -> list[dict]:
    found = datasets(cfg.test_dataloader.dataset)
    if not found:
        raise FastViTError("the config's test_dataloader has no data set with a pipeline")
    return found[0]['pipeline']


def natural_set(cfg: Config, name: str, catalogue: Catalogue) -> ImageSet:
    """ImageNet-A, -R, or -Sketch, with the config's own preprocessing.

    Raises:
        FastViTError: its folder is missing or holds other classes.
    """
    root, classes = catalogue.roots[name], catalogue.classes_of(name)
    check_folders(root, classes, TITLES[name], name)
    dataset = folder_set(root, classes, first_pipeline(cfg))
    return ImageSet(name, dataset, ACCURACY, catalogue.labels_of(name))


def real_set(cfg: Config, catalogue: Catalogue) -> ImageSet:
    """The validation images with their ReaL labels.

    Raises:
        FastViTError: the file of labels is missing or another.
    """
    images, classes = catalogue.real_images, len(catalogue.classes)
    read_real_labels(catalogue.roots['real'], images, classes)
    dataset = copy.deepcopy(cfg.test_dataloader.dataset)
    if catalogue.real_folder is not None:
        folder = catalogue.real_folder
        dataset = folder_set(folder, catalogue.classes, first_pipeline(cfg))
    labels = str(catalogue.roots['real'])
    evaluator = dict(type='RealAccuracy', labels=labels, images=images, classes=classes)
    return ImageSet('real', dataset, evaluator)


def released_sets(
    cfg: Config, catalogue: Catalogue, corruptions: Sequence[str], severities: Sequence[int]
) -> list[ImageSet]:
    """ImageNet-C as published.

    Raises:
        FastViTError: a part of it is missing.
    """
    root = catalogue.roots['c']
    check_released_corruptions(root, catalogue.classes, corruptions, severities)
    pipeline = first_pipeline(cfg)
    return [
        ImageSet(
            f'{name}/{severity}',
            cropped(folder_set(root / name / str(severity), catalogue.classes, pipeline), None),
            ACCURACY,
        )
        for name in corruptions
        for severity in severities
    ]


def regenerated_sets(
    cfg: Config,
    corruptions: Sequence[str],
    severities: Sequence[int],
    crop: tuple[int, int] | None = None,
) -> list[ImageSet]:
    """Corrupted images of the config's own test set.

    Args:
        crop: of a classifier, as ImageNet-C has it; None: images keep their size.

    Raises:
        FastViTError: what corrupts is not installed.
    """
    library()
    dataset = cfg.test_dataloader.dataset
    sets = []
    for name in corruptions:
        for severity in severities:
            if crop is None:
                images, evaluator = corrupted(dataset, name, severity), cfg.test_evaluator
            else:
                step = dict(type='CorruptImage', corruption=name, severity=severity)
                images = cropped(dataset, crop, step | dict(jpeg_quality=JPEG_QUALITY))
                evaluator = ACCURACY
            sets.append(ImageSet(f'{name}/{severity}', images, evaluator))
    return sets
