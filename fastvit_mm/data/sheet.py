"""What a network is trained on: images after all augmentation with their labels, on one sheet."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.registry import DefaultScope
from mmengine.runner import set_random_seed
from torch import Tensor, nn
from torch.utils.data import Dataset

from fastvit_mm import pictures
from fastvit_mm.errors import FastViTError
from fastvit_mm.truth import truth_of

from .listing import build_checked

NUMBER, COLUMNS = 16, 4  # images of a sheet, and of a row
SIDE = 400  # pixels: the longer side of an image
TOGETHER = 4  # images that can be mixed with each other
DPI = 100
SUFFIXES = ('.png', '.jpg', '.jpeg')
SHARE = 0.02  # of a class in a mixed image, to be named


def augmented(
    dataset: Dataset, preprocessor: nn.Module, number: int = NUMBER, seed: int = 0
) -> Iterator[tuple[np.ndarray, object]]:
    """Images drawn from a training set, as the network gets them: through the data set's pipeline
    and the model's preprocessor, which mixes and pads.

    Args:
        dataset: its samples are ``inputs`` and ``data_samples``.
        preprocessor: of the model.

    Yields:
        BGR uint8 (H, W, 3) and its data sample.
    """
    generator = np.random.default_rng(seed)
    indices = generator.choice(len(dataset), min(number, len(dataset)), replace=False).tolist()
    mixes = getattr(preprocessor, 'batch_augments', None) is not None
    size = TOGETHER if mixes else 1
    for start in range(0, len(indices), size):
        batch = pseudo_collate([dataset[i] for i in indices[start : start + size]])
        batch = preprocessor(batch, True)
        for image, sample in zip(batch['inputs'], batch['data_samples'], strict=True):
            yield visible(image, preprocessor), sample


def visible(image: Tensor, preprocessor: nn.Module) -> np.ndarray:
    """BGR uint8 (H, W, 3) of a normalized image (3, H, W)."""
    mean, std = (getattr(preprocessor, name, None) for name in ('mean', 'std'))
    if mean is not None and std is not None:
        image = image * std.view(3, 1, 1) + mean.view(3, 1, 1)
    converts = ('to_rgb', 'channel_conversion', '_channel_conversion')
    if any(getattr(preprocessor, name, False) for name in converts):
        image = image.flip(0)
    array = image.detach().cpu().round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0)
    return np.ascontiguousarray(array.numpy())


def label_of(sample, meta: dict) -> str:
    """What is known of the whole image: its class, or classes and their shares if it was mixed."""
    score = sample.get('gt_score')
    if score is None:
        return truth_of(sample, meta) if 'gt_label' in sample else ''
    shares = sorted(enumerate(score.tolist()), key=lambda one: -one[1])
    named = [(pictures.class_name(meta, i), share) for i, share in shares if share >= SHARE]
    if len(named) == 1:
        return named[0][0]
    return ', '.join(f'{name} {share:.0%}' for name, share in named)


def tile(image: np.ndarray, sample, meta: dict) -> np.ndarray:
    """An image with its label, ``SIDE`` pixels long; a segmentation beside its image."""
    if 'uv' in sample:
        from fastvit_mm.hand_mesh.drawing import draw_joints

        factor = SIDE / max(image.shape[:2])
        return draw_joints(resized(image), (sample.uv.numpy() + 0.5) * factor - 0.5)
    if 'gt_sem_seg' in sample:
        labels = sample.gt_sem_seg.data[0].cpu().numpy()
        labels, meta = pictures.with_unlabelled(labels, meta)
        small = resized(image)
        labels = cv2.resize(labels.astype(np.int32), small.shape[1::-1], interpolation=0)
        over = pictures.overlay(np.ascontiguousarray(small[..., ::-1]), labels, meta, 1)
        return np.hstack([small, over[..., ::-1]])
    if 'gt_instances' in sample:
        return resized(pictures.draw(image, truth_of(sample, meta), meta))
    return resized(image)


def resized(image: np.ndarray) -> np.ndarray:
    factor = SIDE / max(image.shape[:2])
    how = cv2.INTER_AREA if factor < 1 else cv2.INTER_CUBIC
    size = [max(1, round(n * factor)) for n in image.shape[1::-1]]
    return cv2.resize(image, size, interpolation=how)


def contact_sheet(samples: Sequence[tuple[np.ndarray, object]], meta: dict) -> np.ndarray:
    """Images and data samples of :func:`augmented` in rows, captioned: BGR uint8."""
    drawn = []
    for image, sample in samples:
        name = str(sample.get('img_path') or '').replace('\\', '/').rsplit('/', 1)[-1]
        text = ':  '.join(part for part in (name, label_of(sample, meta)) if part)
        drawn.append(pictures.titled(tile(image, sample, meta), text, DPI))
    width = max(one.shape[1] for one in drawn)
    rows = []
    columns = min(len(drawn), COLUMNS if width < 1.5 * SIDE else COLUMNS - 1)
    for start in range(0, len(drawn), columns):
        row = drawn[start : start + columns]
        height = max(map(len, row)) + 12
        cells = [padded(one, height, width + 12) for one in row]
        rows.append(np.hstack(cells + [padded(None, height, width + 12)] * (columns - len(row))))
    sheet = np.vstack(rows)
    labels = [s.gt_sem_seg.data.cpu().numpy().ravel() for _, s in samples if 'gt_sem_seg' in s]
    if not labels:
        return sheet
    every, meta = pictures.with_unlabelled(np.concatenate(labels), meta)
    limit = int(len(sheet) / DPI / pictures.LEGEND_ROW) - 1
    side = pictures.panel(pictures.legend(every, meta, limit), DPI, bars=False)[..., ::-1]
    return np.hstack([sheet, padded(side, len(sheet), side.shape[1])])


def padded(image: np.ndarray | None, height: int, width: int) -> np.ndarray:
    """White, with an image in its upper left corner."""
    cell = np.full((height, width, 3), 255, np.uint8)
    if image is not None:
        cell[: image.shape[0], : image.shape[1]] = image
    return cell


def ignore_index(model: dict) -> int:
    """The label of pixels that a config's segmentor does not learn."""
    head = model.get('decode_head') or {}
    last = head[-1] if isinstance(head, list) else head
    return last.get('ignore_index', pictures.IGNORED)


def write_sheet(cfg: Config, preprocessor: nn.Module, path: Path) -> Path:
    """Write a sheet of a config's training images, the same at every call; gives its path.

    Args:
        preprocessor: of the config's model.
        path: a picture (.png, .jpg), or a folder, for ``train.png`` there.

    Raises:
        FastViTError: it cannot be written, or there are no training images.
    """
    path = path if path.suffix.lower() in SUFFIXES else path / 'train.png'
    loader = dict(cfg.train_dataloader, num_workers=0, persistent_workers=False)
    for needs_workers in ('prefetch_factor', 'multiprocessing_context'):
        loader.pop(needs_workers, None)
    meta = dict(ignore_index=ignore_index(cfg.model))
    set_random_seed(0)
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        dataset = build_checked(loader, seed=0).dataset
        samples = list(augmented(dataset, preprocessor))
        meta |= dataset.metainfo
    if not samples:
        raise FastViTError('the training set is empty: there is nothing to show')
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _, content = cv2.imencode(path.suffix, contact_sheet(samples, meta))
        path.write_bytes(content)
    except OSError as error:
        raise FastViTError(f'cannot write {path}: {error.strerror}') from error
    return path
