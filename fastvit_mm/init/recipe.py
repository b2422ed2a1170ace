"""Sizes, batch and schedule that fit a data set and a machine."""

import math
import os
from dataclasses import dataclass

import torch

#: By task, measured on generated scenes (docs/guides/from_scratch.md). Pairs are for a machine with
#: a GPU and without: the largest short side, and the most images in a batch. ``seen``: images of a
#: run from scratch, and ``epochs``: how few and how many that may be. ``lr``: from scratch and from
#: weights, for the second batch.
NUMBERS = dict(
    classification=dict(
        side=(256, 128), batch=(64, 32), seen=4800, epochs=(30, 100), lr=(2e-3, 5e-4)
    ),
    segmentation=dict(side=(512, 128), batch=(16, 8), seen=3200, epochs=(20, 100), lr=(2e-3, 5e-4)),
    detection=dict(side=(800, 256), batch=(8, 4), seen=1200, epochs=(12, 60), lr=(4e-4, 2e-4)),
)
FROM_WEIGHTS = 0.4  # of the epochs from scratch
SMALLEST = 64  # pixels: four stages leave 2 x 2 of them
REGIONS = 64  # for each image without a GPU; Mask R-CNN has 512


@dataclass(frozen=True)
class Machine:
    """Where a run is meant to happen."""

    gpu: bool
    cores: int

    @classmethod
    def here(cls) -> 'Machine':
        affinity = getattr(os, 'sched_getaffinity', None)  # which macOS lacks
        cores = len(affinity(0)) if affinity else os.cpu_count() or 1
        return cls(torch.cuda.is_available(), cores)

    def __str__(self) -> str:
        return 'a GPU' if self.gpu else f'{self.cores} CPU core{"s" * (self.cores != 1)}, no GPU'


@dataclass(frozen=True)
class Recipe:
    """The numbers of a run, and why each is what it is."""

    size: int
    batch: int
    epochs: int
    warmup: int
    every: int
    lr: float
    workers: int
    reasons: dict[str, str]


def recipe(
    task: str, images: int, median: tuple[int, int], weights: bool, machine: Machine
) -> Recipe:
    """Numbers for ``images`` training images whose median width and height is ``median``."""
    known = NUMBERS[task]
    where = 0 if machine.gpu else 1
    side, limit = min(median), known['side'][where]
    size = min(limit, max(SMALLEST, 32 * math.ceil(side / 32)))
    batch = batch_of(images, known['batch'][where])
    least, most = known['epochs']
    epochs = min(max(round(known['seen'] / images), least), most)
    if weights:
        epochs = math.ceil(epochs * FROM_WEIGHTS)
    per_epoch = max(1, images // batch)
    lr = known['lr'][int(weights)] * math.sqrt(batch / known['batch'][1])
    few = f'the images have {median[0]} x {median[1]} pixels (median)'
    slow = f'; {machine}: more takes longer and is more accurate' if size == limit else ''
    reasons = dict(
        size=few + slow,
        batch=f'{per_epoch} iteration{"s" * (per_epoch != 1)} an epoch with {images} images',
        epochs=f'{epochs * per_epoch} iterations; more if the metric still rises at the end',
        workers=f'for {machine}',
        lr=f'{"from weights" if weights else "from scratch"}, for this batch',
    )
    return Recipe(
        size=size,
        batch=batch,
        epochs=epochs,
        warmup=max(1, epochs // 20),
        every=max(1, epochs // 10),
        lr=float(f'{lr:.1g}'),
        workers=workers(machine),
        reasons=reasons,
    )


def batch_of(images: int, most: int) -> int:
    """A power of two with eight batches or more in an epoch, if there are that many images."""
    wanted = 2 ** math.floor(math.log2(max(2, images // 8)))
    return min(most, wanted, images)


def workers(machine: Machine) -> int:
    """Processes that read images: none where they would take the cores from the training."""
    return min(8, machine.cores) if machine.gpu else min(4, machine.cores - 2) * (machine.cores > 2)
