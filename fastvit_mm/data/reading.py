"""Reading images so that whatever fails names the file to blame.

OpenCV refuses what is truncated or larger than 2**30 pixels, turns photos upright as their EXIF
data say, and makes three channels of 8 bits of anything. Masks are read as they are.
"""

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import cv2
import mmcv
import numpy as np
from mmcv.transforms import LoadAnnotations, LoadImageFromFile
from mmengine.dataset import BaseDataset, Compose
from PIL import Image
from torch.utils.data import Dataset

from fastvit_mm.errors import FastViTError, one_line

from .problems import Problem
from .sets import is_local

ORIENTATION = 0x0112  # EXIF: 1 is upright
#: An image whose sides differ by more than this may lose one of them when it is resized.
NARROW = 20
#: What is in a sample once a file of it has been read, whose path is there from the beginning.
LOADED = {'img': 'img_path', 'gt_seg_map': 'seg_map_path'}


def decode(content: bytes) -> np.ndarray | None:
    """BGR uint8 (H, W, 3), upright; None if it is not an image or not a complete one."""
    try:
        return mmcv.imfrombytes(content)
    except cv2.error:  # empty, or larger than OpenCV allows
        return None


def wrong_with(path: str | Path) -> str | None:
    """Why an image cannot be read, as a clause about it; None if it can, or lies elsewhere."""
    if '://' in str(path):
        return None
    path = Path(path)
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return 'does not exist'
    except OSError as error:
        return f'cannot be opened ({error.strerror})'
    if not content:
        return 'is empty'
    return None if decode(content) is not None else why_undecodable(path)


def why_undecodable(path: Path) -> str:
    """What Pillow says of an image that OpenCV does not read."""
    try:
        with opened(path) as image:
            image.load()
    except Image.DecompressionBombError as error:
        return f'is too large: {one_line(error)}'
    except Image.UnidentifiedImageError:
        return 'is no image'
    except Exception as error:  # each format has its own errors
        return f'is truncated or damaged ({one_line(error)})'
    return 'is no image that OpenCV can read'


@contextmanager
def opened(path: str | Path) -> Iterator[Image.Image]:
    """An image of which Pillow has read the header; its warnings are for nobody."""
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        with Image.open(path) as image:
            yield image


def orientation(path: str | Path) -> int:
    """The EXIF orientation of an image, 1 (upright) to 8; from 5 on, its sides are swapped."""
    try:
        with opened(path) as image:
            return image.getexif().get(ORIENTATION, 1)
    except Exception:  # each format has its own errors
        return 1


def explain(error: Exception, results: dict, local: bool = True) -> FastViTError | None:
    """The error that names the file of a sample that could not be read or processed.

    Args:
        results: the sample as the data set gave it, and as far as transforms have changed it.
        local: whether its paths are those of files on this machine.

    Returns:
        None if the files are fine, so that something else is to blame.
    """
    image = results.get('img_path')
    if isinstance(error, FastViTError):
        named = isinstance(error.args[0], Problem) or str(image) in str(error)
        if not named:
            error.args = (Problem(str(image), f'cannot be used: {error}'),)
        return error
    for loaded, key in LOADED.items():
        path = results.get(key) if local and loaded not in results else None
        if isinstance(path, str | Path) and (wrong := wrong_with(path)):
            return bad(path, wrong)
    if isinstance(error, KeyError) and error.args == ('mask',):
        return bad(image, 'has an object without an outline, but this config learns masks')
    shape = results.get('ori_shape', (NARROW, NARROW))
    if min(shape[:2]) * NARROW < max(shape[:2]) or max(shape[:2]) == 1:
        return bad(image, f'has {size_of(shape)} pixels, too narrow for the sizes in the config')
    return None


def bad(file: str | Path, wrong: str) -> FastViTError:
    return FastViTError(Problem(str(file), wrong))


class NamedPipeline(Compose):
    """A data set's pipeline, whose errors name the sample's file.

    Raises:
        FastViTError: a file is damaged or does not fit its annotations.
        RuntimeError: anything else; says at which file.
    """

    def __init__(self, steps: list[Callable], local: bool = True):
        super().__init__(steps)
        self.local = local

    def __call__(self, data: dict) -> dict | None:
        try:
            return super().__call__(data)
        except Exception as error:
            known = explain(error, data, self.local)
            if known is error:
                raise
            what = f'{type(error).__name__}: {one_line(error)}'
            raise known or RuntimeError(f'at {data.get("img_path")}: {what}') from error


class Fit:
    """A step after loading that stops at an image or mask of another size than its annotations."""

    def __call__(self, results: dict) -> dict:
        if 'gt_seg_map' in results:
            self.check_mask(results)
        elif results.get('height') and results.get('width'):
            self.check_size(results)
        return results

    @staticmethod
    def check_size(results: dict) -> None:
        """Boxes and polygons belong to an image of the size that the annotations give."""
        path, stated = results['img_path'], (results['height'], results['width'])
        actual = tuple(results['ori_shape'][:2])
        if stated != actual:
            about = f'has {size_of(actual)} pixels{turned(path)}'
            raise bad(path, f'{about}, its annotations are for {size_of(stated)}')

    @staticmethod
    def check_mask(results: dict) -> None:
        mask, image = results['gt_seg_map'], results['img_path']
        shape = tuple(results['ori_shape'][:2])
        if mask.ndim < 2 and mask.size == shape[0] * shape[1]:  # mmcv squeezes a single row
            results['gt_seg_map'] = mask.reshape(shape)
        elif mask.ndim < 3 and mask.shape != shape:
            about = f'has {size_of((1, *mask.shape)[-2:])} pixels'
            wrong = f'{about}, its image {size_of(shape)}{turned(image)}'
            raise bad(results.get('seg_map_path', image), wrong)


class ClassIds:
    """A step after mmseg's own loading that stops at a mask of anything but the config's classes.

    Args:
        classes: their number, or None if unknown.
        ignore: the label of pixels without one.
    """

    def __init__(self, classes: int | None, ignore: int = 255):
        self.classes, self.ignore = classes, ignore

    def __call__(self, results: dict) -> dict:
        mask, path = results['gt_seg_map'], results['seg_map_path']
        check_depth(path)
        if self.classes is not None:
            outside = mask[(mask >= self.classes) & (mask != self.ignore)]
            if outside.size:
                first = 1 if results.get('reduce_zero_label') else 0
                known = f'{first} to {self.classes - 1 + first}'
                wrong = f'has the class id {int(outside[0]) + first}, the config has {known}'
                raise bad(path, wrong)
        return results


def check_depth(path: str) -> None:
    """mmseg makes 8 bits of any mask: 256 would become class 0."""
    if '://' in path:
        return
    with opened(path) as mask:
        if mask.mode in ('1', 'L', 'P'):
            return
        ids = np.asarray(mask)
    if ids.ndim > 2:
        raise bad(path, 'is a colour image, not one of class ids')
    if ids.size and not 0 <= ids.min() <= ids.max() <= 255:
        raise bad(path, f'has class ids up to {ids.max()}, but only 0 to 255 can be read')


def size_of(shape: tuple) -> str:
    return f'{shape[1]} x {shape[0]}'


def turned(path: str) -> str:
    """A hint for the case that only the image was turned upright."""
    if orientation(path) == 1:
        return ''
    return ' when turned upright by its EXIF data'


def leaves(dataset) -> Iterator[Dataset]:
    """The data sets in wrappers such as RepeatDataset and ConcatDataset."""
    inner = getattr(dataset, 'datasets', None) or getattr(dataset, 'dataset', None)
    inner = inner if isinstance(inner, list | tuple) else [inner]
    if inner and all(isinstance(one, Dataset) for one in inner):
        for one in inner:
            yield from leaves(one)
    else:
        yield dataset


def guard(dataset) -> None:
    """Make a built data set name the file at which it fails, and check masks and sizes on the way.

    Applies to all data sets of OpenMMLab's packages that have their packages' pipeline, and to no
    others; calling it twice is harmless.
    """
    for one in leaves(dataset):
        if isinstance(one, BaseDataset) and type(one.pipeline) is Compose:
            local = is_local(one)
            one.pipeline = NamedPipeline(with_checks(one.pipeline.transforms, one, local), local)


def with_checks(steps: list[Callable], dataset: BaseDataset, local: bool) -> list[Callable]:
    """The steps, and checks after each that loads an image or annotations."""
    new = []
    for step in steps:
        for inner in getattr(step, 'subroutines', ()):  # TestTimeAug's
            if isinstance(getattr(inner, 'transforms', None), list):
                inner.transforms = with_checks(inner.transforms, dataset, local)
        new.append(step)
        if isinstance(step, LoadImageFromFile | LoadAnnotations):
            new.append(Fit())
        if local and loads_class_ids(step, dataset):
            classes = dataset.metainfo.get('classes')
            new.append(ClassIds(len(classes) if classes else None, dataset.ignore_index))
    return new


def loads_class_ids(step: Callable, dataset: BaseDataset) -> bool:
    """Whether this is mmseg's way to load masks: 8 bits of an image whose values are the classes.

    Other packages' masks, and those of projects' own steps, may be of any kind.
    """
    mmseg = sys.modules.get('mmseg.datasets')  # what was never imported has built nothing
    if mmseg is None or not isinstance(dataset, mmseg.BaseSegDataset):
        return False
    return type(step) is mmseg.LoadAnnotations and step.imdecode_backend == 'pillow'
