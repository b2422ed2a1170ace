"""Faster versions of mmpretrain's data loading: same names with ``Fast`` in front, same arguments.

Transforms take uint8 images (H, W, 3). This is a separate module because it needs mmpretrain:
configs list it in ``custom_imports``.
"""

import copy

import cv2
import mmcv
import numpy as np
import torch
from mmcv.transforms import RandomFlip
from mmpretrain.datasets.transforms import PackInputs, RandomErasing, RandomResizedCrop
from mmpretrain.models import ClsDataPreprocessor
from mmpretrain.registry import MODELS, TRANSFORMS


@TRANSFORMS.register_module()
class FastRandomResizedCrop(RandomResizedCrop):
    """The same pixels. The crop is contiguous, as Pillow would copy a view element by element."""

    def transform(self, results: dict) -> dict:
        img = results['img']
        top, left, height, width = self.rand_crop_params(img)
        crop = np.ascontiguousarray(img[top : top + height, left : left + width])
        size = tuple(self.scale[::-1])
        img = mmcv.imresize(crop, size, interpolation=self.interpolation, backend=self.backend)
        results.update(img=img, img_shape=img.shape)
        return results


@TRANSFORMS.register_module()
class FastRandomFlip(RandomFlip):
    """The same pixels, contiguous: a view with negative strides is slower to read."""

    AXES = dict(vertical=0, horizontal=1, diagonal=-1)

    def _flip(self, results: dict) -> None:
        img = results['img']
        super()._flip(results)
        results['img'] = cv2.flip(img, self.AXES[results['flip_direction']])


@TRANSFORMS.register_module()
class FastRandomErasing(RandomErasing):
    """The same distribution: normal noise from torch in float32 instead of numpy in float64."""

    def _fill_pixels(self, img: np.ndarray, top: int, left: int, h: int, w: int) -> np.ndarray:
        if self.mode == 'const' or self.fill_std is None:
            return super()._fill_pixels(img, top, left, h, w)
        mean, std = torch.tensor(self.fill_color), torch.tensor(self.fill_std)
        noise = torch.randn(h, w, 3).mul_(std).add_(mean).clamp_(0, 255)
        img[top : top + h, left : left + w] = noise.byte().numpy()
        return img


@TRANSFORMS.register_module()
class FastPackInputs(PackInputs):
    """The same tensor, (3, H, W): OpenCV splits channels faster than torch transposes bytes."""

    @staticmethod
    def format_input(input_):
        if isinstance(input_, np.ndarray) and input_.ndim == 3:
            return torch.from_numpy(np.stack(cv2.split(input_)))
        return PackInputs.format_input(input_)


@MODELS.register_module()
class FastClsDataPreprocessor(ClsDataPreprocessor):
    """The same floats, (N, 3, H, W). A batch stacked by the workers is normalized in place."""

    def forward(self, data: dict, training: bool = False) -> dict:
        inputs = data['inputs']
        if not (isinstance(inputs, torch.Tensor) and self._enable_normalize):
            return super().forward(data, training)
        inputs = self.cast_data(inputs)
        if self.to_rgb and inputs.size(1) == 3:
            inputs = inputs.flip(1)
        inputs = inputs.to(torch.float, copy=True)  # do not change the caller's
        rest = copy.copy(self)
        rest.to_rgb = rest._enable_normalize = False
        data = {**data, 'inputs': inputs.sub_(self.mean).div_(self.std)}
        return ClsDataPreprocessor.forward(rest, data, training)
