"""What an exported file takes: its size, and the images on which it is verified."""

import os
import sys
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import mmcv
import numpy as np
import torch.nn as nn
from mmengine.config import Config
from mmengine.dataset import Compose, pseudo_collate
from mmengine.registry import DefaultScope
from torchvision.datasets.folder import IMG_EXTENSIONS, has_file_allowed_extension

from fastvit_mm import data
from fastvit_mm.data.reading import wrong_with
from fastvit_mm.demo.scenes import make_scenes
from fastvit_mm.settings.widths import type_of

# For configs that do not give a test size: the paper's.
SIZES = dict(mmpretrain=(256, 256), mmseg=(512, 512), mmdet=(800, 1344))
LOOKED_AT = 16  # images of a test set, to learn its sizes


def description(info: dict) -> str:
    batch, size = info['batch'] or 'B', info['size'] or ('H', 'W')
    if info['preprocess']:
        return f'uint8 RGB ({batch}, {size[0]}, {size[1]}, 3)'
    return f'float32 RGB, normalized, ({batch}, 3, {size[0]}, {size[1]})'


def test_sizes(model: nn.Module, cfg: Config) -> tuple[list[tuple[int, int]], str]:
    """Heights and widths that the network sees in the config's own test, the most frequent first,
    and in words what the first one is.

    They are those of the first images of the test set; without one, what the pipeline names.
    """
    if cfg.default_scope == 'mmseg' and model.test_cfg.get('mode', 'whole') == 'slide':
        return [tuple(model.test_cfg.crop_size)], 'the sliding window of the test'
    paths = (path for path in real_files(cfg) if wrong_with(path) is None)
    found = Counter(size_in_test(model, cfg, path) for path in islice(paths, LOOKED_AT))
    if found:
        first = f'of the first {found.total()} test images'
        what = 'most frequent size' if len(found) > 1 else 'size'
        return [size for size, _ in found.most_common()], f'the {what} {first}'
    if size := named_size(cfg):
        return [size], 'the size in the test pipeline, as there is no test set'
    return [SIZES[cfg.default_scope]], "the paper's size, as the config names none"


def size_in_test(model: nn.Module, cfg: Config, path: Path) -> tuple[int, int]:
    """Height and width of an image when the network sees it."""
    dataset = next(data.datasets_in(cfg.test_dataloader))
    steps = [step for step in dataset.pipeline if not type_of(step).endswith('LoadAnnotations')]
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        packed = Compose(steps)(dict(img_path=str(path), img_id=0))
    if cfg.default_scope == 'mmdet':  # its graph pads by itself
        return tuple(packed['inputs'].shape[-2:])
    return tuple(model.data_preprocessor(pseudo_collate([packed]), False)['inputs'].shape[-2:])


def named_size(cfg: Config) -> tuple[int, int] | None:
    """Height and width that the steps of the config's test pipeline name, if they do."""
    dataset = (cfg.get('test_dataloader') or {}).get('dataset', {})
    size, keeps_ratio = None, False
    for step in dataset.get('pipeline', []):
        size = step.get('crop_size') or step.get('scale') or size
        keeps_ratio = step.get('keep_ratio', keeps_ratio)
    if size is None:
        return None
    if isinstance(size, int):
        return size, size
    if not keeps_ratio:
        return size[1], size[0]
    short, long = min(size), max(size)
    if cfg.default_scope == 'mmdet':  # most images are wide
        return short, -(-long // 32) * 32
    return short, short


def images(cfg: Config, size: tuple[int, int], dynamic: bool) -> list[np.ndarray]:
    """Noise and two real images, uint8 RGB; of different sizes if the file takes any size."""
    real = []
    for path in real_files(cfg):
        image = mmcv.imread(str(path), channel_order='rgb')
        if image is not None:
            real.append(image)
        if len(real) == 2:
            break
    if len(real) < 2:
        print('no test set found: verifying with generated scenes', file=sys.stderr)
        real = [scene.image for _, scene in islice(make_scenes('imagenet', 'val'), 2)]
    sizes = [size] * 3
    if dynamic:
        sizes[2] = tuple(max(64, round(n * 0.75 / 32) * 32) for n in size)
    noise = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    return [noise] + [mmcv.imresize(i, s[::-1]) for i, s in zip(real, sizes[1:], strict=True)]


def real_files(cfg: Config) -> Iterator[Path]:
    """Files of the config's test set, in a fixed order."""
    for dataset in data.datasets_in(cfg.get('test_dataloader')):
        for part in data.expected_paths(dataset):
            for folder, folders, files in os.walk(Path(dataset.get('data_root') or '', part)):
                folders.sort()
                yield from (
                    Path(folder, f)
                    for f in sorted(files)
                    if has_file_allowed_extension(f, IMG_EXTENSIONS)
                )
        return
