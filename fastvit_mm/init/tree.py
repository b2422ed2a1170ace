"""What lies in a folder, by names: images, and which part of a data set each belongs to."""

import json
import os
import re
from collections import Counter
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

import numpy as np

from fastvit_mm.data.reading import opened, why_undecodable
from fastvit_mm.errors import FastViTError, one_line

IMAGES = ('.jpg', '.jpeg', '.png', '.bmp', '.tif', '.tiff', '.webp', '.ppm', '.pgm')
SPLITS = ('train', 'val', 'test')
SPLIT_WORDS = dict(train='train', training='train', val='val', valid='val', validation='val')
SPLIT_WORDS |= dict(test='test', testing='test')


class Tree:
    """The files under a folder, hidden ones left out; links are followed.

    Args:
        path: a folder or a file in it.
        skip: a folder under it that does not count.

    Attributes:
        root: the folder.
        files: their paths relative to it, in order.
        asked: the one file that the user named, or None if a folder.
    """

    def __init__(self, path: str | Path, skip: Path | None = None):
        given = plain(path)
        if not given.exists():
            raise FastViTError(f'--data {path} does not exist')
        self.asked = given if given.is_file() else None
        self.root = given.parent if self.asked else given
        self.skip = skip
        self.files = sorted(self._walk())
        if not self.files:
            raise FastViTError(f'--data {path} is an empty folder: give the one with your images')

    def _walk(self) -> Iterable[Path]:
        for folder, inner, names in os.walk(self.root, followlinks=True):
            usual = [one for one in inner if not one.startswith(('.', '__MACOSX'))]
            inner[:] = [one for one in usual if Path(folder, one) != self.skip]
            here = Path(folder).relative_to(self.root)
            yield from (here / name for name in names if not name.startswith('.'))

    def of(self, *suffixes: str) -> list[Path]:
        return [one for one in self.files if one.suffix.lower() in suffixes]

    @cached_property
    def images(self) -> list[Path]:
        return self.of(*IMAGES)

    @cached_property
    def by_name(self) -> dict[str, list[Path]]:
        """Images by their names without folders."""
        found: dict[str, list[Path]] = {}
        for one in self.images:
            found.setdefault(one.name, []).append(one)
        return found

    def __str__(self) -> str:
        """What was found, in words: '12 .jpg, 12 .txt in 3 folders'."""
        kinds = Counter(one.suffix.lower() or 'without a suffix' for one in self.files)
        folders = len({one.parent for one in self.files})
        listed = ', '.join(f'{n} {kind}' for kind, n in kinds.most_common(5))
        return f'{self.root} holds {listed} in {folders} folder{"s" * (folders != 1)}'

    def json(self, path: Path):
        try:
            return json.loads((self.root / path).read_bytes())
        except (OSError, ValueError, RecursionError) as error:
            raise FastViTError(f'{self.root / path} is no JSON: {one_line(error)}') from error


def plain(path: str | Path) -> Path:
    """Absolute, without '..'; links stay."""
    return Path(os.path.abspath(Path(path).expanduser()))


def split_of(path: str | Path) -> str | None:
    """train, val or test if a word of the path says so: 'valid/a.jpg', 'instances_val2017.json'."""
    words = re.split(r'[\W_\d]+', str(path).lower())
    return next((SPLIT_WORDS[one] for one in words if one in SPLIT_WORDS), None)


def size_of(path: Path) -> tuple[int, int]:
    """Width and height of an image as a run sees it: turned upright by its EXIF data.

    Raises:
        FastViTError: it is no image.
    """
    try:
        with opened(path) as image:
            width, height = image.size
            turned = image.getexif().get(0x0112, 1) >= 5
    except Exception as error:  # each format has its own errors
        raise FastViTError(f'{path} {why_undecodable(path)}') from error
    return (height, width) if turned else (width, height)


def median_size(paths: list[Path], most: int = 200) -> tuple[int, int]:
    """The median width and height of images, of at most so many of them."""
    some = paths[:: -(-len(paths) // most)]
    width, height = np.median([size_of(one) for one in some], axis=0)
    return round(float(width)), round(float(height))


def draw(samples: list, fraction: float, seed: int, groups: list | None = None) -> tuple:
    """Samples for training and for validation, drawn with a seed; both keep their order.

    Args:
        groups: what each sample belongs to; the fraction is drawn from each group, and at least
            one sample of every group that has two.

    Raises:
        FastViTError: nothing would be left of one part.
    """
    rng, chosen = np.random.default_rng(seed), set()
    groups = groups or [0] * len(samples)
    for group in sorted(set(groups)):
        places = [i for i, one in enumerate(groups) if one == group]
        number = min(max(1, round(fraction * len(places))), len(places) - 1)
        chosen |= set(rng.permutation(places)[:number].tolist())
    if not chosen:
        raise FastViTError(f'{len(samples)} images are too few to keep some for validation')
    parts = [s for i, s in enumerate(samples) if i not in chosen]
    return parts, [samples[i] for i in sorted(chosen)]


def divide(splits: dict, fraction: float, seed: int, groups=None) -> tuple[dict, str]:
    """Give a data set what it lacks of train and val, and say how in a word.

    Args:
        splits: samples by split, or by None where nothing says which.
        groups: see :func:`draw`; called with the samples.
    """
    known = {one: splits[one] for one in SPLITS if splits.get(one)}
    if 'train' not in known:
        if not splits.get(None):
            parts = ' and '.join(known) or 'nothing'
            raise FastViTError(f'found images for {parts}, but none to train with')
        known['train'] = splits[None]
    rest = len(splits.get(None, [])) if splits.get('train') else 0
    others = f'; {rest} images beside them are not used' if rest else ''
    if known.get('val'):
        return known, f'as the folders say{others}'
    wanted = groups(known['train']) if groups else None
    train, val = draw(known['train'], fraction, seed, wanted)
    return {**known, 'train': train, 'val': val}, f'{fraction:g} drawn with seed {seed}{others}'
