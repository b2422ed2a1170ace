"""A model from a config, and hands in any image."""

from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from mmcv.transforms import Compose
from mmengine import fileio
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.registry import MODELS, DefaultScope

from fastvit_mm.data.reading import bad, decode, wrong_with
from fastvit_mm.settings.widths import type_of

from .transforms import HandSample


def init_hand_mesh(config: Config, device: str = 'cpu') -> nn.Module:
    """The model of a config, as initialized; see :func:`fastvit_mm.init_model`."""
    with DefaultScope.overwrite_default_scope('mmengine'):
        return MODELS.build(config.model).to(device)


def infer_hand(model: nn.Module, image: str | Path | np.ndarray) -> HandSample:
    """A hand in an image: ``pred_verts`` (778, 3) and ``pred_xyz`` (21, 3), metres, relative to the
    head's root joint; ``pred_uv`` (21, 2), pixels of the image given; ``faces`` (1538, 3).

    Args:
        image: a path or BGR uint8 (H, W, 3), best a square around the hand as in FreiHAND.

    Raises:
        FastViTError: a path of no image.
    """
    return compute(model, [prepare(model, image)])[0]


def prepare(model: nn.Module, image: str | Path | np.ndarray) -> dict:
    """An image as the config's pipeline gives it."""
    if not isinstance(image, np.ndarray):
        image = read(image)
    steps = model.cfg.test_dataloader.dataset.pipeline
    with DefaultScope.overwrite_default_scope('mmengine'):
        pipeline = Compose([step for step in steps if type_of(step) != 'LoadImageFromFile'])
    return pipeline(dict(img=image))


@torch.no_grad()
def compute(model: nn.Module, samples: list[dict]) -> list[HandSample]:
    """The hands in prepared images of one size."""
    found = model.test_step(pseudo_collate(samples))
    return [in_original(one, model.head.faces) for one in found]


def read(path: str | Path) -> np.ndarray:
    """BGR uint8 (H, W, 3)."""
    wrong = wrong_with(path)
    image = None if wrong else decode(fileio.get(path))
    if image is None:
        raise bad(path, wrong or 'is no image')
    return image


def in_original(sample: HandSample, faces: torch.Tensor) -> HandSample:
    """A prediction with ``faces``, its ``pred_uv`` in pixels of the image as it was loaded."""
    sample = sample.cpu()
    back = torch.from_numpy(np.linalg.inv(sample.view)).to(sample.pred_uv)
    sample.pred_uv = sample.pred_uv @ back[:2, :2].T + back[:2, 2]
    sample.faces = faces.cpu()
    return sample
