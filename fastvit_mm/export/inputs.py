"""What an exported file takes: its size, and the images on which it is verified."""

import os
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import mmcv
import numpy as np
from mmengine.config import Config
from torchvision.datasets.folder import IMG_EXTENSIONS, has_file_allowed_extension

from fastvit_mm import data
from fastvit_mm.demo.scenes import make_scenes

# For configs that do not give a test size: the paper's.
SIZES = dict(mmpretrain=(256, 256), mmseg=(512, 512), mmdet=(800, 1344))


def description(info: dict) -> str:
    batch, size = info['batch'] or 'B', info['size'] or ('H', 'W')
    if info['preprocess']:
        return f'uint8 RGB ({batch}, {size[0]}, {size[1]}, 3)'
    return f'float32 RGB, normalized, ({batch}, 3, {size[0]}, {size[1]})'


def size_of(cfg: Config) -> tuple[int, int]:
    """Height and width that the config's test pipeline produces, if it gives them."""
    dataset = (cfg.get('test_dataloader') or {}).get('dataset', {})
    size = None
    for step in dataset.get('pipeline', []):
        size = step.get('crop_size') or step.get('scale') or size
    if size is None:
        return SIZES[cfg.default_scope]
    if isinstance(size, int):
        return size, size
    short, long = min(size), max(size)
    if cfg.default_scope == 'mmdet':  # (long, short); most images are wide
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
