"""loading: images per second of the training pipeline against timm's loader, same augmentations.

Both read the same generated JPEG files and end with normalized float batches in memory.
"""

import contextlib
import io
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from mmengine.config import Config
from mmengine.runner import Runner
from PIL import Image
from timm.data import create_dataset, create_loader

import fastvit_mm  # noqa: F401
from fastvit_mm.errors import FastViTError

from . import measure
from .report import Report, bars

HELP = "images per second of the classification pipeline against timm's loader"
CONFIG = 'configs/classification/fastvit_t8_in1k.py'
#: ImageNet's mean height and width are about these; a photograph of that size has about 110 KB.
IMAGE = (375, 500)


def add_arguments(parser) -> None:
    parser.add_argument('--images', type=int, default=256, help='files to generate (256)')
    parser.add_argument('--workers', nargs='+', type=int, default=[0, 1, 2])
    parser.add_argument('--batch', type=int, default=32)
    parser.set_defaults(seconds=60)


def draw_images(folder: Path, count: int) -> float:
    """Write ``count`` JPEG files of smooth colours and some grain; gives their mean size in KB."""
    rng = np.random.default_rng(0)
    (folder / 'train' / 'n0').mkdir(parents=True)
    height, width = IMAGE
    for i in range(count):
        coarse = rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)
        smooth = Image.fromarray(coarse).resize((width, height), Image.BICUBIC)
        pixels = np.asarray(smooth) + rng.normal(0, 12, (height, width, 3))
        image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
        image.save(folder / 'train' / 'n0' / f'{i}.JPEG', quality=90)
    files = list((folder / 'train' / 'n0').iterdir())
    return sum(f.stat().st_size for f in files) / len(files) / 1e3


def our_loader(cfg: Config, folder: Path, workers: int, batch: int) -> Callable[[], Iterator]:
    """The config's own loader and preprocessor; each call gives the batches of one epoch."""
    from mmpretrain.registry import MODELS

    loader = dict(cfg.train_dataloader, num_workers=workers, batch_size=batch, pin_memory=False)
    loader['persistent_workers'] = workers > 0
    loader['dataset'] = dict(loader['dataset'], data_root=str(folder))
    built = Runner.build_dataloader(loader, seed=0)
    preprocess = MODELS.build(dict(cfg.data_preprocessor, type='ClsDataPreprocessor'))

    def epoch():
        for samples in built:
            yield preprocess(samples, training=True)['inputs']

    return epoch


def timm_loader(cfg: Config, folder: Path, workers: int, batch: int, prefetch: bool) -> Callable:
    """timm's loader with the recipe's settings (its command line's defaults where we say none)."""
    size = cfg.test_pipeline[2].crop_size
    mean, std = (cfg.data_preprocessor[key] for key in ('mean', 'std'))
    loader = create_loader(
        create_dataset('', str(folder), split='train'),
        input_size=(3, size, size),
        batch_size=batch,
        is_training=True,
        use_prefetcher=prefetch,
        re_prob=0.25,
        re_mode='pixel',
        color_jitter=0.4,
        auto_augment='rand-m9-mstd0.5-inc1',
        interpolation='bicubic',
        mean=tuple(m / 255 for m in mean),
        std=tuple(s / 255 for s in std),
        num_workers=workers,
        persistent_workers=workers > 0,
        device=torch.device('cpu'),
    )

    def epoch():
        for images, _ in loader:
            yield images

    return epoch


def consume(epoch: Callable[[], Iterator]) -> int:
    """Images in one epoch, all of them loaded."""
    return sum(len(batch) for batch in epoch())


@contextlib.contextmanager
def watched(parts: dict[str, tuple]) -> Iterator[dict[str, float]]:
    """Seconds spent in each of ``parts``: name to (object, name of its method)."""
    spent = defaultdict(float)
    originals = {}

    def wrap(name, function):
        def timed(*args, **kwargs):
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                spent[name] += time.perf_counter() - start

        return timed

    for name, (owner, method) in parts.items():
        originals[name] = getattr(owner, method)
        setattr(owner, method, wrap(name, originals[name]))
    try:
        yield spent
    finally:
        for name, (owner, method) in parts.items():
            setattr(owner, method, originals[name])
