"""COCO's annotations: what is wrong with a file, and labels in the config's order.

Importing it makes mmdet read annotations through :class:`SoundCOCO`: mmdet takes the labels from
the order of the file's categories, and the names from the config, so that names are swapped if the
orders differ; it drops images with the same id and objects of unknown categories in silence. Its
metrics evaluate through :class:`OrderedCOCOeval`, so that the AP of a class bears its name.
pycocotools no longer prints what it is about to do.
"""

import logging
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pycocotools.coco
import pycocotools.cocoeval
from mmdet.datasets import CocoDataset
from mmdet.datasets.api_wrappers import COCO, cocoeval_mp
from mmdet.evaluation.metrics import coco_metric, ov_coco_metric
from mmengine.logging import print_log

from fastvit_mm.errors import FastViTError, one_line
from fastvit_mm.noise import print_unknown

from .problems import NOTE, SPOILS, STOPS, Problem, settle

NEEDED = {
    'images': ('id', 'file_name', 'width', 'height'),
    'annotations': ('id', 'image_id', 'category_id', 'bbox', 'area'),
    'categories': ('id', 'name'),
}
LEFT_OUT = 'its object is left out and counts as background'
IGNORED = 'its object is ignored, in training and in the metric'


def numbers(values, count: int | None = None) -> bool:
    """Whether this is a list of finite numbers."""
    return (
        isinstance(values, list)
        and (count is None or len(values) == count)
        and all(isinstance(v, int | float) and -1e9 < v < 1e9 for v in values)
    )


def problems(content, file: str) -> Iterator[Problem]:
    """Everything that is wrong with the content of an annotation file."""
    if not isinstance(content, dict):
        yield Problem(file, f'holds a {type(content).__name__}, not an object with "images" ...')
        return
    broken = list(structure(content, file))
    yield from broken
    if not broken:
        yield from of_categories(content, file)
        yield from of_images(content, file)
        yield from of_annotations(content, file)


def unreadable(error: Exception) -> str:
    if isinstance(error, OSError):
        return f'cannot be read: {error.strerror or one_line(error)}'
    return f'is no JSON: {one_line(error)}'


def structure(content: dict, file: str) -> Iterator[Problem]:
    """Lists and keys without which nothing can be read."""
    for part, keys in NEEDED.items():
        if part not in content and part == 'annotations':  # as in the lists of test images
            then = 'nothing can be learned or measured'
            yield Problem(file, 'has no "annotations"', then, SPOILS)
            content[part] = []
        entries = content.get(part)
        if not isinstance(entries, list) or (not entries and part != 'annotations'):
            state = 'lacks' if part not in content else 'has nothing in'
            yield Problem(file, f'{state} "{part}"')
            continue
        for index, entry in enumerate(entries):
            lacking = [k for k in keys if not isinstance(entry, dict) or k not in entry]
            named = [k for k in keys if k.endswith(('id', 'name'))]
            if lacking:
                yield Problem(file, f'lacks {lacking[0]!r} in "{part}", entry {index}')
            elif odd := [k for k in named if not isinstance(entry[k], int | str)]:
                value = f'{odd[0]!r}: {entry[odd[0]]!r:.40}'
                yield Problem(file, f'has {value} in "{part}", entry {index}')


def twice(entries: list[dict], key: str) -> Iterator[tuple]:
    return ((value, n) for value, n in Counter(e[key] for e in entries).items() if n > 1)


def of_categories(content: dict, file: str) -> Iterator[Problem]:
    for key in ('id', 'name'):
        for value, n in twice(content['categories'], key):
            yield Problem(file, f'has {n} categories with the {key} {value!r}')


def of_classes(content: dict, classes: Sequence[str], file: str) -> Iterator[Problem]:
    """Names that only the config has, or only the file."""
    names = {one['name']: one['id'] for one in content['categories']}
    if missing := [name for name in classes if name not in names]:
        has = ', '.join(map(str, list(names)[:20]))
        wrong = f'lacks the category {missing[0]!r} of the config (metainfo.classes); it has {has}'
        yield Problem(file, wrong)
    number = Counter(one['category_id'] for one in content['annotations'])
    for name in [name for name in names if name not in classes]:
        wrong = f'has the category {name!r}, which the config has not'
        then = f'its {number[names[name]]} objects are left out'
        yield Problem(file, wrong, then, NOTE)


def of_images(content: dict, file: str) -> Iterator[Problem]:
    for value, n in twice(content['images'], 'id'):
        yield Problem(file, f'has {n} images with the id {value!r}, of which one would be used')
    for value, n in twice(content['images'], 'file_name'):
        yield Problem(file, f'lists {value!r} {n} times', 'it counts as often', NOTE)
    for one in content['images']:
        if not numbers([one['width'], one['height']]) or min(one['width'], one['height']) < 1:
            size = f'{one["width"]} x {one["height"]}'
            yield Problem(file, f'gives {one["file_name"]!r} a size of {size}')


def of_annotations(content: dict, file: str) -> Iterator[Problem]:
    for value, n in twice(content['annotations'], 'id'):
        yield Problem(file, f'has {n} annotations with the id {value!r}')
    images = {one['id']: one for one in content['images']}
    categories = {one['id'] for one in content['categories']}
    for one in content['annotations']:
        about = f'in annotation {one["id"]}'
        image = images.get(one['image_id'])
        if one['category_id'] not in categories:
            yield Problem(file, f'has no category {one["category_id"]!r}, used {about}')
        elif image is None:
            wrong = f'has no image {one["image_id"]!r}, used {about}'
            yield Problem(file, wrong, LEFT_OUT, SPOILS)
        elif not numbers(one['bbox'], 4) or not numbers([one['area']]):
            yield Problem(file, f'has the box {one["bbox"]} and area {one["area"]} {about}')
        else:
            yield from of_box(one, image, file, about)
            yield from of_outline(one, file, about)


def of_box(one: dict, image: dict, file: str, about: str) -> Iterator[Problem]:
    left, top, width, height = one['bbox']
    right, bottom = left + width, top + height
    beyond = max(-left, -top, right - image['width'], bottom - image['height'])
    outside = min(right, image['width']) <= max(left, 0) or (
        min(bottom, image['height']) <= max(top, 0)
    )
    if width <= 0 or height <= 0 or one['area'] <= 0 or outside:
        state = 'outside its image' if outside and min(width, height) > 0 else 'of no size'
        yield Problem(file, f'has a box {state}, {one["bbox"]}, {about}', LEFT_OUT, SPOILS)
    elif min(width, height) < 1:
        yield Problem(file, f'has a box below one pixel {about}', LEFT_OUT, NOTE)
    elif beyond > 1:
        wrong = f'has a box that leaves its image by {beyond:.0f} pixels {about}'
        yield Problem(file, wrong, 'the part outside is learned as well', NOTE)


def of_outline(one: dict, file: str, about: str) -> Iterator[Problem]:
    outline = one.get('segmentation')
    if isinstance(outline, list):
        if not all(numbers(part) for part in outline):
            yield Problem(file, f'has an outline that is no list of finite numbers {about}')
        elif outline and not usable(outline):
            wrong = f'has an outline of less than three points {about}'
            yield Problem(file, wrong, IGNORED, SPOILS)
    elif outline and not (isinstance(outline, dict) and {'size', 'counts'} <= {*outline}):
        yield Problem(file, f'has an outline that is neither polygons nor run lengths {about}')


def usable(outline: list[list]) -> list[list]:
    """The parts of an outline that enclose something."""
    return [part for part in outline if len(part) >= 6 and len(part) % 2 == 0]


def mend_outlines(content: dict) -> None:
    """Ignore objects without a usable outline, as mmdet's data set does.

    pycocotools would take an outline of two points for a box.
    """
    sizes = {one['id']: [one['height'], one['width']] for one in content['images']}
    for one in content['annotations']:
        outline = one.get('segmentation')
        if not outline or isinstance(outline, dict) or one['image_id'] not in sizes:
            continue
        one['segmentation'] = usable(outline)
        if not one['segmentation']:
            size = sizes[one['image_id']]
            one.update(segmentation=dict(size=size, counts=[size[0] * size[1]]), iscrowd=1)


class SoundCOCO(COCO):
    """mmdet's reader of annotations, which refuses broken ones.

    Raises:
        FastViTError: the file cannot be read or has a problem that would stop or falsify a run.
    """

    of_metric = False

    def __init__(self, annotation_file: str | Path | None = None):
        self.file = str(annotation_file)
        try:
            super().__init__(annotation_file)
        except FastViTError:
            raise
        except (OSError, ValueError, RecursionError) as error:
            raise FastViTError(f'{self.file} {unreadable(error)}') from error
        except AssertionError as error:
            raise FastViTError(f'{self.file} holds a list, not an object') from error

    def createIndex(self) -> None:
        found = list(problems(self.dataset, self.file))
        settle(one for one in found if one.level == STOPS or not self.of_metric)
        if self.of_metric:
            mend_outlines(self.dataset)
        super().createIndex()

    def get_cat_ids(
        self, cat_names: Sequence[str] = (), sup_names: Sequence[str] = (), cat_ids=()
    ) -> list[int]:
        """Ids in the order of the names: the label of a category is the place of its name.

        Raises:
            FastViTError: the file lacks a category of the config.
        """
        found = super().get_cat_ids(list(cat_names), list(sup_names), list(cat_ids))
        if not cat_names or sup_names or cat_ids:
            return found
        against = list(of_classes(self.dataset, cat_names, self.file))
        settle(against)
        for one in [] if self.of_metric else against:
            print_log(f'{one}: {one.then}', 'current', logging.WARNING)
        ids = {self.cats[one]['name']: one for one in found}
        return [ids[name] for name in cat_names]


class MetricCOCO(SoundCOCO):
    """The metric's, which reads a file that a data set has complained about already."""

    of_metric = True


class InOrder:
    """pycocotools sorts the classes by id; mmdet then names them by their places in the config.

    It leaves at the annotations that it was given (``cocoGt.precision``) the average precision of
    each class in the config's order, 0 to 1, nan for a class without objects, by what was compared:
    ``bbox`` or ``segm``.
    """

    def evaluate(self) -> None:
        self.asked = list(self.params.catIds)
        super().evaluate()

    def accumulate(self, p=None) -> None:
        super().accumulate(p)
        if self.params.useCats:
            places = [self.params.catIds.index(one) for one in self.asked]
            for key in ('precision', 'scores', 'recall'):  # (..., class, area, detections)
                self.eval[key] = self.eval[key][..., places, :, :]
            precision = self.eval['precision'][..., 0, -1]  # of all areas; (IoU, recall, class)
            known = np.where(precision > -1, precision, np.nan).reshape(-1, len(places))
            with warnings.catch_warnings():
                warnings.simplefilter('ignore', RuntimeWarning)  # a mean of nothing
                means = np.nanmean(known, axis=0)
            vars(self.cocoGt).setdefault('precision', {})[self.params.iouType] = means


class OrderedCOCOeval(InOrder, coco_metric.COCOeval):
    """Results by class are in the order in which the classes were asked for."""


class OrderedCOCOevalMP(InOrder, coco_metric.COCOevalMP):
    """The same in several processes."""


CocoDataset.COCOAPI = SoundCOCO
coco_metric.COCO = MetricCOCO
for module in (coco_metric, ov_coco_metric):
    module.COCOeval, module.COCOevalMP = OrderedCOCOeval, OrderedCOCOevalMP
for module in (pycocotools.coco, pycocotools.cocoeval, cocoeval_mp):
    module.print = print_unknown
