"""Views of a hand: images and the geometry that belongs to them.

A view moves the pixels by A, a 2 x 3 matrix, and turns the points by R about the optical axis. The
camera of the new image is then A K R', so that turned points fall on the moved pixels exactly.
"""

import cv2
import numpy as np
import torch
from mmcv.transforms import BaseTransform
from mmengine.registry import TRANSFORMS
from mmengine.structures import BaseDataElement

from fastvit_mm.errors import FastViTError


class HandSample(BaseDataElement):
    """What is known of a hand in an image of (H, W) pixels, and what was predicted.

    ``xyz`` (21, 3) and ``verts`` (778, 3), metres; ``uv`` (21, 2), pixels of the image that the
    network sees; ``mano`` (61,). The prediction: ``pred_xyz`` and ``pred_verts``, relative to a
    root joint, and ``pred_uv``.
    """


def project(K: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Pixels (P, 2) of points (P, 3).

    Raises:
        FastViTError: a point behind the camera.
    """
    if (points[:, 2] <= 0).any():
        raise FastViTError('a point lies behind the camera')
    pixels = points @ K.T
    return pixels[:, :2] / pixels[:, 2:]


def about(centre: np.ndarray, angle: float, scale: float, shift: np.ndarray) -> np.ndarray:
    """3 x 3: pixels turned by ``angle`` and scaled about ``centre``, which moves by ``shift``."""
    turn = scale * turned(angle)[:2, :2]
    return np.block([[turn, (centre + shift - turn @ centre)[:, None]], [np.zeros((1, 2)), 1]])


def turned(angle: float) -> np.ndarray:
    """3 x 3: a rotation about the optical axis, radians, from x to y."""
    cos, sin = np.cos(angle), np.sin(angle)
    return np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]])


def change_view(results: dict, moved: np.ndarray, angle: float, size: int) -> None:
    """Move the image by ``moved`` (3 x 3) to ``size`` pixels square, and the labels with it."""
    if results['img'].shape[:2] != (size, size) or not np.allclose(moved, np.eye(3)):
        results['img'] = cv2.warpAffine(results['img'], moved[:2], (size, size))
    rotation = turned(angle)
    results['view'] = moved @ results.get('view', np.eye(3))
    if 'K' in results:
        results['K'] = moved @ results['K'] @ rotation.T
        for name in ('xyz', 'verts'):
            if name in results:
                results[name] = results[name] @ rotation.T


@TRANSFORMS.register_module()
class FitHand(BaseTransform):
    """The whole image, centred in a square of ``scale`` pixels."""

    def __init__(self, scale: int):
        self.scale = scale

    def transform(self, results: dict) -> dict:
        height, width = results['img'].shape[:2]
        factor = self.scale / max(height, width)
        # from pixel centre to pixel centre, as resizing goes
        old, new = np.array([width - 1, height - 1]) / 2, np.full(2, (self.scale - 1) / 2)
        change_view(results, about(old, 0, factor, new - old), 0, self.scale)
        return results


@TRANSFORMS.register_module()
class RandomHandView(BaseTransform):
    """Turn, scale and shift a square image and its hand at random.

    Args:
        rotation: standard deviation in degrees, of a normal distribution cut at twice that.
        rotation_prob: of a rotation at all.
        zoom: standard deviation of the scale around 1, cut there.
        shift: the most, in parts of the image's size.
    """

    def __init__(
        self,
        rotation: float = 90.0,
        rotation_prob: float = 0.4,
        zoom: float = 0.25,
        shift: float = 0.0,
    ):
        self.rotation, self.rotation_prob = rotation, rotation_prob
        self.zoom, self.shift = zoom, shift

    def transform(self, results: dict) -> dict:
        size = results['img'].shape[0]
        angle = 0.0
        if np.random.uniform() < self.rotation_prob:
            angle = np.radians(np.clip(np.random.normal(), -2, 2) * self.rotation)
        scale = 1 + np.clip(np.random.normal(), -1, 1) * self.zoom
        shift = np.random.uniform(-1, 1, 2) * self.shift * size
        moved = about(np.full(2, (size - 1) / 2), angle, scale, shift)
        change_view(results, moved, angle, size)
        return results


@TRANSFORMS.register_module()
class RandomChannelNoise(BaseTransform):
    """Multiply each colour channel by a factor of its own, up to ``noise`` from 1."""

    def __init__(self, noise: float = 0.4):
        self.noise = noise

    def transform(self, results: dict) -> dict:
        factors = 1 + np.random.uniform(-self.noise, self.noise, 3)
        results['img'] = (results['img'] * factors).clip(0, 255).astype(np.uint8)
        return results


@TRANSFORMS.register_module()
class PackHand(BaseTransform):
    """``inputs`` (3, H, W) uint8 and ``data_samples``, a :class:`HandSample`."""

    META = ('img_path', 'sample_idx', 'view', 'K')

    def transform(self, results: dict) -> dict:
        image = results['img']
        meta = {name: results[name] for name in self.META if name in results}
        sample = HandSample(metainfo=dict(meta, img_shape=image.shape[:2]))
        values = {n: results[n] for n in ('xyz', 'verts', 'mano') if n in results}
        if 'mano' in values:
            values['mano'] = values['mano'].reshape(61)
        if 'xyz' in values:
            values['uv'] = project(results['K'], results['xyz'])
        for name, value in values.items():
            setattr(sample, name, torch.as_tensor(value, dtype=torch.float32))
        inputs = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
        return dict(inputs=inputs, data_samples=sample)
