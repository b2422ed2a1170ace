"""Where a prediction comes from: Grad-CAM over a stage, by the library ``grad-cam``."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from mmengine.dataset import Compose, pseudo_collate
from mmengine.registry import DefaultScope
from torch import Tensor, nn

from fastvit_mm import data, pictures
from fastvit_mm.data.sheet import visible
from fastvit_mm.errors import FastViTError
from fastvit_mm.export.graphs import embeds
from fastvit_mm.settings.widths import type_of


class Scores(nn.Module):
    """A classifier's logits (B, classes), or a segmentor's (B, classes, h, w)."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x, mode='tensor')


@dataclass
class Attention:
    """What Grad-CAM says of an image.

    Attributes:
        image: as the network sees it, BGR uint8 (H, W, 3).
        heat: (H, W), 0 to 1: what speaks for the class.
        label: the class.
        share: its probability, or its share of the pixels.
    """

    image: np.ndarray
    heat: np.ndarray
    label: int
    share: float


def stage_of(model: nn.Module, stage: int) -> nn.Module:
    """A stage of a model's backbone, numbered from 0 as in ``out_indices``.

    Raises:
        FastViTError: the model is of another task, an exported file, or has no such stage.
    """
    if not (model.cfg.default_scope == 'mmpretrain' or hasattr(model, 'decode_head')):
        raise FastViTError(f'--cam is for classifiers and segmentors, not {type(model).__name__}')
    if embeds(model):
        raise FastViTError(
            '--cam is for a class, and embeddings have none: give texts, as in --cfg-options '
            'model.head.texts=FILE'
        )
    stages = getattr(model.backbone, 'stages', None)
    if stages is None:
        kind = type(model.backbone).__name__
        known = 'an exported file' if kind == 'Identity' else f'a {kind}'
        raise FastViTError(f'--cam needs the stages of a FastViT, which {known} does not have')
    if stage not in range(len(stages)):
        raise FastViTError(f'--cam {stage}: the backbone has the stages 0 to {len(stages) - 1}')
    return stages[stage]


def prepared(model: nn.Module, image: np.ndarray) -> Tensor:
    """An image (H, W, 3), BGR uint8, as the network takes it: (1, 3, h, w)."""
    dataset = next(data.datasets_in(model.cfg.test_dataloader))
    steps = [step for step in dataset.pipeline if not is_reading(type_of(step))]
    shape = image.shape[:2]
    sample = dict(img=image, img_shape=shape, ori_shape=shape, img_path='', img_id=0)
    with DefaultScope.overwrite_default_scope(model.cfg.default_scope):
        batch = pseudo_collate([Compose(steps)(sample)])
    inputs = model.data_preprocessor(batch, False)['inputs']
    return torch.stack(inputs) if isinstance(inputs, list) else inputs


def is_reading(name: str) -> bool:
    return name.endswith(('LoadAnnotations', 'LoadImageFromFile', 'LoadImageFromNDArray'))


def attend(model: nn.Module, image: np.ndarray, stage: int, label: int | None = None) -> Attention:
    """Grad-CAM of an image.

    Args:
        model: from :func:`fastvit_mm.init_model`, a classifier or a segmentor in either form.
        image: BGR uint8 (H, W, 3).
        stage: of the backbone, from 0.
        label: a class; None for the predicted one. In a segmentation, where pixels have several,
            the one with the most pixels, and what speaks for it in its own pixels.

    Raises:
        FastViTError: see :func:`stage_of`; grad-cam is not installed; an unknown class.
    """
    layer = stage_of(model, stage)
    try:
        from pytorch_grad_cam import GradCAM
        from pytorch_grad_cam.utils.model_targets import (
            ClassifierOutputTarget,
            SemanticSegmentationTarget,
        )
    except ImportError as error:
        raise FastViTError('--cam needs grad-cam: pip install grad-cam') from error
    x = prepared(model, image)
    with torch.no_grad():
        scores = model(x, mode='tensor')[0].float().cpu()
    if label is not None and not 0 <= label < len(scores):
        raise FastViTError(f'--cam-class {label}: the model has the classes 0 to {len(scores) - 1}')
    if scores.ndim == 1:
        label = int(scores.argmax()) if label is None else label
        share, target = float(scores.softmax(0)[label]), ClassifierOutputTarget(label)
    else:
        found = scores.argmax(0)
        label = int(found.flatten().mode().values) if label is None else label
        mask = (found == label).numpy()
        share = float(mask.mean())
        # a class that was predicted nowhere is looked for everywhere
        mask = mask.astype(np.float32) if mask.any() else np.ones_like(mask, np.float32)
        target = SemanticSegmentationTarget(label, mask)
    method = GradCAM(Scores(model), [layer])
    try:
        with torch.enable_grad():  # also where all weights are frozen
            (heat,) = method(x.detach().requires_grad_(), [target])
    finally:
        method.activations_and_grads.release()
        model.zero_grad()
    return Attention(visible(x[0], model.data_preprocessor), heat, label, share)


def draw(found: Attention, meta: dict, stage: int, same_size: bool = False) -> np.ndarray:
    """The image and the heat over it: BGR uint8.

    Args:
        same_size: without a title, so that all pictures of a video have one size.
    """
    factor = max(1, round(pictures.SMALL / max(found.image.shape[:2])))
    image = pictures.enlarged(found.image, factor, cv2.INTER_CUBIC)
    heat = pictures.enlarged(found.heat, factor, cv2.INTER_LINEAR).clip(0, 1)
    colours = cv2.applyColorMap(np.round(255 * heat).astype(np.uint8), cv2.COLORMAP_TURBO)
    both = np.hstack([image, cv2.addWeighted(image, 0.5, colours, 0.5, 0)])
    if same_size:
        return both
    title = f'{pictures.class_name(meta, found.label)} {found.share:.1%}:  Grad-CAM, stage {stage}'
    if not found.heat.any():
        title += ', where nothing speaks for it'
    return pictures.titled(both, title, pictures.resolution(min(image.shape[:2])), bold=True)


def class_number(wanted: str | None, classes: Sequence[str]) -> int | None:
    """A class's number from its name or number.

    Raises:
        FastViTError: there is no such class.
    """
    if wanted is None or wanted in classes:
        return None if wanted is None else list(classes).index(wanted)
    if wanted.isdecimal():
        return int(wanted)
    known = ', '.join(map(str, list(classes)[:20]))
    raise FastViTError(f'--cam-class {wanted} is not a class of the model; it has {known}')


def look(model: nn.Module, source, out: Path, stage: int, wanted: str | None = None) -> int:
    """Write a picture for every image of ``source`` (of :mod:`fastvit_mm.prediction`).

    Returns:
        The number of images that could not be used.
    """
    meta = getattr(model, 'dataset_meta', None) or {}
    label = class_number(wanted, meta.get('classes') or ())
    stage_of(model, stage)
    drawn = skipped = 0
    try:
        for known, image in source:
            try:
                if image is None:
                    raise FastViTError('cannot be read')
                found = attend(model, image, stage, label)
                source.write(known, draw(found, meta, stage, source.same_size))
                drawn += 1
            except FastViTError as error:
                print(f'{known["file_name"]}: {error}, skipped', file=sys.stderr)
                skipped += 1
    finally:
        source.close()
    print(f'{drawn} drawn in {out}, {skipped} skipped')
    return skipped
