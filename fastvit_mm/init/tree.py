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
SPLIT_WORDS = dict(
    train='train training',
    val='val valid validation validate dev eval evaluation holdout minival',
    test='test testing',
)
SPLIT_OF = {word: split for split, words in SPLIT_WORDS.items() for word in words.split()}
MASK = r'segmentation_?class|segmentations?|segmaps?|segs?|masks?|annotations?|annots?|anns?'
MASK += r'|labels?|ground_?truths?|gt_?fine|gts?|label_?ids|targets?'
IMAGE = r'jpeg_?images?|images?|imgs?|photos?|pictures?|left_?img_?8bit|rgb|inputs?'
BESIDE = rf'(?:{MASK}|{IMAGE}|data|data_?sets?|sets?|splits?|samples?|files|[\W_\d])*'
SPLIT = re.compile(rf'{BESIDE}\b({"|".join(SPLIT_OF)})\b{BESIDE}', re.I)


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
        if self.asked and not self.of(*IMAGES):  # annotations/a.json beside images/
            self.root = self.root.parent
            self.files = sorted(self._walk())
        if not self.files:
            raise FastViTError(f'--data {path} is an empty folder: give the one with your images')

    def _walk(self) -> Iterable[Path]:
        seen = set()  # links may lead back
        for folder, inner, names in os.walk(self.root, followlinks=True):
            here, real = Path(folder).relative_to(self.root), os.path.realpath(folder)
            if real in seen or (here.parts and is_written(Path(folder))):
                inner.clear()
                continue
            seen.add(real)
            usual = [one for one in inner if not one.startswith(('.', '__MACOSX'))]
            inner[:] = [one for one in usual if Path(folder, one) != self.skip]
            inner.sort(key=lambda one: (Path(folder, one).is_symlink(), one))
            yield from (here / name for name in names if not name.startswith('.'))

    def of(self, *suffixes: str) -> list[Path]:
        return [one for one in self.files if one.suffix.lower() in suffixes]

    @cached_property
    def images(self) -> list[Path]:
        return self.of(*IMAGES)

    @cached_property
    def known(self) -> set[Path]:
        """The images."""
        return set(self.images)

    @cached_property
    def by_stem(self) -> dict[Path, list[Path]]:
        """Images by their paths without suffixes."""
        found: dict[Path, list[Path]] = {}
        for one in self.images:
            found.setdefault(one.with_suffix(''), []).append(one)
        return found

    def image_at(self, stem: Path) -> Path | None:
        """The image of this path without a suffix.

        Raises:
            FastViTError: there are several.
        """
        found = self.by_stem.get(stem, [])
        if len(found) > 1:
            both = f'{self.root / found[0]} and {found[1].name}'
            raise FastViTError(f'{both} have one name, so that annotations fit both: leave one')
        return found[0] if found else None

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

    @cached_property
    def jsons(self) -> dict[Path, object]:
        """The contents of JSON files, without LabelMe's images; an error where one is broken."""
        return {path: self._json(path) for path in self.of('.json')}

    def _json(self, path: Path):
        try:
            content = json.loads((self.root / path).read_bytes())
        except (OSError, ValueError, RecursionError) as error:
            return FastViTError(f'{self.root / path} is no JSON: {one_line(error)}')
        if isinstance(content, dict):
            content.pop('imageData', None)
        return content

    def text(self, path: Path) -> str:
        try:
            return (self.root / path).read_text(encoding='utf-8-sig')
        except (OSError, ValueError) as error:
            raise FastViTError(f'{self.root / path} is no UTF-8 text: {one_line(error)}') from error


def plain(path: str | Path) -> Path:
    """Absolute, without '..'; links stay."""
    return Path(os.path.abspath(Path(path).expanduser()))


def is_written(folder: Path) -> bool:
    """Whether an earlier call has written this folder."""
    try:
        with (folder / 'config.py').open(encoding='utf-8') as file:
            return 'Written by `fastvit init`' in file.readline()
    except (OSError, ValueError):
        return False


def split_of(folder: str | Path) -> str | None:
    """train, val or test if a folder's whole name says so, the deepest first: 'valid/a',
    'train_images', but not 'freight train'."""
    for part in reversed(Path(folder).parts):
        apart = re.sub(r'[_\d]+', ' ', part)  # of which \b knows nothing
        glued = re.sub(rf'^(train|val|valid|test)(?={MASK}$)', r'\1 ', apart, flags=re.I)
        if found := SPLIT.fullmatch(glued):
            return SPLIT_OF[found[1].lower()]
    return None


def almost_splits(images: Iterable[Path]) -> list[str]:
    """Names of folders that hold the word of a split and something else: 'my_train'."""
    names = {name for one in images for name in one.parent.parts if split_of(name) is None}
    return sorted(one for one in names if {*re.split(r'[\W_\d]+', one.lower())} & {*SPLIT_OF})


def size_of(path: Path) -> tuple[int, int]:
    """Width and height of an image as a run sees it: turned upright by its EXIF data.

    Raises:
        FastViTError: it is no image.
    """
    try:
        with opened(path) as image:
            width, height = image.size
            turns = image.format not in ('TIFF', 'WEBP')  # read as Pillow gives them
            turned = turns and 5 <= image.getexif().get(0x0112, 1) <= 8
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
    members: dict = {}
    for place, group in enumerate(groups or [0] * len(samples)):
        members.setdefault(group, []).append(place)
    for _, places in sorted(members.items()):
        number = min(max(1, round(fraction * len(places))), len(places) - 1)
        chosen |= set(rng.permutation(places)[:number].tolist())
    if not chosen:
        raise FastViTError(f'{len(samples)} images are too few to keep some for validation')
    parts = [s for i, s in enumerate(samples) if i not in chosen]
    return parts, [samples[i] for i in sorted(chosen)]


def name_of(sample) -> str:
    """The image of a sample of any task."""
    return str(sample['file_name'] if isinstance(sample, dict) else sample[0])


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
    rest = splits.get(None) if splits.get('train') else None
    others = (
        f'; {len(rest)} images beside them are not used: {name_of(rest[0])} ...' if rest else ''
    )
    if known.get('val'):
        return known, f'as the folders say{others}'
    wanted = groups(known['train']) if groups else None
    train, val = draw(known['train'], fraction, seed, wanted)
    return {**known, 'train': train, 'val': val}, f'{fraction:g} drawn with seed {seed}{others}'
