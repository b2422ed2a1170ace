"""loading: images per second of the training pipeline against timm's loader, same augmentations.

Both read the same generated JPEG files and produce normalized float batches in memory.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import cv2
import numpy as np
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import Runner
from PIL import Image, ImageOps
from timm.data import auto_augment, create_dataset, create_loader

from fastvit_mm import FastViTError

from . import measure
from .report import Report

HELP = "images per second of the classification pipeline against timm's loader"
CONFIG = 'configs/classification/fastvit_t8_in1k.py'
#: About the mean height and width in ImageNet; a photograph of this size takes about 110 KB.
IMAGE = (375, 500)


def add_arguments(parser) -> None:
    parser.add_argument('--images', type=int, default=256, help='files to generate (256)')
    parser.add_argument('--workers', nargs='+', type=int, default=[0, 1, 2])
    parser.add_argument('--batch', type=int, default=32)
    parser.set_defaults(seconds=60)


def draw_images(folder: Path, count: int) -> float:
    """Write ``count`` JPEG files of smooth colours and some noise; return their mean size in KB."""
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


@dataclass
class Side:
    """A loader of normalized batches, (batch, 3, H, W); calling it loads one epoch.

    Attributes:
        transforms: the data set's transforms, in order.
    """

    epoch: Callable[[], Iterator]
    transforms: list[Callable]

    def __call__(self) -> int:
        """Load one epoch and return the number of images."""
        return sum(len(batch) for batch in self.epoch())


def ours(cfg: Config, folder: Path, workers: int, batch: int) -> Side:
    """The config's own loader and preprocessor."""
    loader = dict(cfg.train_dataloader, num_workers=workers, batch_size=batch, pin_memory=False)
    loader['persistent_workers'] = workers > 0
    # The class ImageNet expects a thousand folders.
    dataset = dict(type='CustomDataset', data_root=str(folder), data_prefix='train')
    loader['dataset'] = dict(dataset, pipeline=cfg.train_pipeline)
    built = Runner.build_dataloader(loader, seed=0)
    preprocess = MODELS.build(cfg.data_preprocessor)

    def epoch():
        for samples in built:
            yield preprocess(samples, training=True)['inputs']

    return Side(epoch, built.dataset.pipeline.transforms)


def posterize(image: Image.Image, bits: int, **_) -> Image.Image:
    """timm's, which sometimes asks for 0 bits: black, until Pillow 13 made that an error."""
    bits = min(bits, 8)
    return ImageOps.posterize(image, bits) if bits > 0 else image.point(lambda _: 0)


def timms(cfg: Config, folder: Path, workers: int, batch: int, prefetcher: bool) -> Side:
    """timm's loader with the recipe's settings."""
    auto_augment.NAME_TO_OP['PosterizeIncreasing'] = posterize
    size = cfg.train_pipeline[1].scale
    mean, std = (tuple(v / 255 for v in cfg.data_preprocessor[key]) for key in ('mean', 'std'))
    loader = create_loader(
        create_dataset('', str(folder), split='train'),
        input_size=(3, size, size),
        batch_size=batch,
        is_training=True,
        use_prefetcher=prefetcher,
        re_prob=0.25,
        re_mode='pixel',
        color_jitter=0.4,
        auto_augment='rand-m9-mstd0.5-inc1',
        interpolation='bicubic',
        mean=mean,
        std=std,
        num_workers=workers,
        persistent_workers=workers > 0,
        device=torch.device('cpu'),
    )

    def epoch():
        for images, _ in loader:
            yield images

    return Side(epoch, loader.dataset.transform.transforms)


class Clocked:
    """Adds the seconds that ``transform`` takes to ``spent``."""

    def __init__(self, transform: Callable, spent: dict[str, float]):
        self.transform, self.spent = transform, spent

    def __call__(self, item):
        start = time.perf_counter()
        item = self.transform(item)
        self.spent[type(self.transform).__name__] += time.perf_counter() - start
        return item


def profile(side: Side) -> dict[str, float]:
    """Milliseconds per image of each transform and of the rest: batching, and for timm reading.

    The transforms must run in this process: use a loader without workers.
    """
    before = list(side.transforms)
    spent = defaultdict(float)
    side.transforms[:] = [Clocked(t, spent) for t in before]
    try:
        start = time.perf_counter()
        count = side()
        total = time.perf_counter() - start
    finally:
        side.transforms[:] = before
    spent['all the rest'] = total - sum(spent.values())
    return {name: 1e3 * seconds / count for name, seconds in spent.items()}


def run(args, report: Report) -> None:
    if args.images < args.batch:
        raise FastViTError(
            f'--images {args.images} is less than one batch: give at least {args.batch}'
        )
    cfg = Config.fromfile(CONFIG)
    init_default_scope(cfg.default_scope)
    cv2.setNumThreads(cfg.env_cfg.mp_cfg.opencv_num_threads)
    title = "images per second: ours / timm's"
    ratios = {}
    with TemporaryDirectory() as name:
        folder = Path(name)
        size = draw_images(folder, args.images)
        report.summary['Files'] = f'{args.images} of {IMAGE[1]} x {IMAGE[0]}, {size:.0f} KB each'
        for workers in args.workers:
            torch.set_num_threads(args.threads if workers else 1)  # workers have one each
            made = {
                'ours': ours(cfg, folder, workers, args.batch),
                'timm': timms(cfg, folder, workers, args.batch, prefetcher=False),
                'timm, prefetcher': timms(cfg, folder, workers, args.batch, prefetcher=True),
            }
            shapes = {name: tuple(next(side.epoch()).shape) for name, side in made.items()}
            if len(set(shapes.values())) > 1:
                raise FastViTError(f'no ratio: the batches differ in shape: {shapes}')
            times = measure.interleave(made, args.seconds, warmup=1)
            best = measure.fastest(times, 'timm', 'timm, prefetcher')
            count = args.images // args.batch * args.batch  # both drop the rest
            row = {'workers': workers}
            for name, own in times.items():
                row[f'{name}, images/s'] = measure.Spread.of(count / np.asarray(own))
            ratio = measure.ratio(times[best], times['ours'])
            report.add(title, {**row, 'ratio': ratio, 'turns': len(times['ours'])})
            ratios[f'{workers} workers'] = ratio
            if workers == 0:
                for name in ('ours', 'timm'):
                    for part, cost in profile(made[name]).items():
                        row = {'pipeline': name, 'part': part, 'ms per image': cost}
                        report.add('Where the time goes, one process', row)
    report.conclude(title, ratios)
