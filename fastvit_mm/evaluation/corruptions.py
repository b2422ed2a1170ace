"""A transform that corrupts images as ImageNet-C does."""

import zlib
from pathlib import Path
from types import ModuleType

import cv2
import numpy as np
from mmcv.transforms import TRANSFORMS, BaseTransform

from fastvit_mm.errors import FastViTError, one_line

SEEDED = ('glass_blur', 'impulse_noise')  # take a seed; the others draw from numpy's generator


def library() -> ModuleType:
    """The package that corrupts.

    Raises:
        FastViTError: it is not installed.
    """
    try:
        import imagecorruptions
    except ImportError as error:  # its name on PyPI is another
        raise FastViTError(
            'corrupting images needs imagecorruptions-imaug: pip install imagecorruptions-imaug'
        ) from error
    return imagecorruptions


@TRANSFORMS.register_module()
class CorruptImage(BaseTransform):
    """Corrupt ``img``, which keeps its size; for pipelines of mmpretrain, mmdet and mmseg.

    An image's file name, the corruption and the severity determine what is drawn: every run and
    every worker corrupts it in the same way, and numpy's generator is left as it was.

    Takes and gives BGR uint8 (H, W, 3), at least 32 x 32.

    Args:
        corruption: one of the package imagecorruptions-imaug, such as those in ``CORRUPTIONS``.
        severity: 1 to 5.
        jpeg_quality: also compress the result like that, 0 to 100; None does not.

    Raises:
        FastViTError: an image cannot be corrupted; names it.
    """

    def __init__(self, corruption: str, severity: int, jpeg_quality: int | None = None):
        self.corruption, self.severity, self.jpeg_quality = corruption, severity, jpeg_quality

    def transform(self, results: dict) -> dict:
        try:
            image = self.corrupt(results['img'], Path(results['img_path']).name)
        except FastViTError:
            raise
        except Exception as error:
            raise FastViTError(
                f'{results["img_path"]}: {self.corruption} of severity {self.severity} cannot be '
                f'applied: {one_line(error)}'
            ) from error
        results['img'] = image
        return results

    def corrupt(self, image: np.ndarray, name: str) -> np.ndarray:
        seed = zlib.crc32(f'{name} {self.corruption} {self.severity}'.encode())
        options = dict(seed=seed) if self.corruption in SEEDED else {}
        before = np.random.get_state()
        np.random.seed(seed)
        try:
            rgb = np.ascontiguousarray(image[..., ::-1])
            rgb = library().corrupt(rgb, self.severity, self.corruption, **options)
        finally:
            np.random.set_state(before)
        image = np.ascontiguousarray(rgb[..., ::-1])
        if self.jpeg_quality is None:
            return image
        _, code = cv2.imencode('.jpg', image, [cv2.IMWRITE_JPEG_QUALITY, self.jpeg_quality])
        return cv2.imdecode(code, cv2.IMREAD_COLOR)

    def __repr__(self) -> str:
        return f'{type(self).__name__}({self.corruption!r}, {self.severity})'
