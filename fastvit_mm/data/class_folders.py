"""mmpretrain's two layouts: a folder for each class, and a list of files with labels."""

import os
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from pathlib import Path

from .problems import NOTE, SPOILS, Problem
from .sets import kind_of

IGNORED = {'Thumbs.db', 'desktop.ini'}


class Layout:
    """Where a data set's config has its labels from.

    Attributes:
        folder: the images' folder.
        labels: a file of lines "name label", or None if subfolders are the classes.
        classes: the config's names, in the order of the labels, or None.
    """

    def __init__(self, dataset: dict, kind: type):
        root, split = Path(dataset.get('data_root') or ''), dataset.get('split') or ''
        prefix = dataset.get('data_prefix') or split
        self.folder = root / (prefix.get('img_path', '') if isinstance(prefix, dict) else prefix)
        given = dataset.get('ann_file')
        listed = root / (given or f'meta/{split}.txt')
        self.labels = listed if given or (split and listed.is_file()) else None
        names = (dataset.get('metainfo') or {}).get('classes') or dataset.get('classes')
        if isinstance(names, str):
            names = Path(names).read_text(encoding='utf-8').splitlines()
        names = names or getattr(kind, 'METAINFO', {}).get('classes')
        self.classes = list(names) if names else None
        usual = ('.jpg', '.jpeg', '.png', '.ppm', '.bmp', '.pgm', '.tif')
        self.suffixes = tuple(dataset.get('extensions') or usual)

    @property
    def source(self) -> Path:
        return self.labels or self.folder

    def problems(self) -> Iterator[Problem]:
        if not self.source.exists():
            yield Problem(str(self.source), 'does not exist')
            return
        yield from self.in_list() if self.labels else self.in_folders()

    def in_list(self) -> Iterator[Problem]:
        """Lines that are no "name label", or whose label is none of the classes."""
        most = len(self.classes) if self.classes else float('inf')
        for number, line in enumerate(self.labels.read_text(encoding='utf-8').splitlines(), 1):
            name, _, label = line.strip().rpartition(' ')
            if not name or not label.isdecimal():
                yield Problem(str(self.labels), f'has {line[:60]!r} in line {number}, no "name 3"')
            elif int(label) >= most:
                wrong = f'has the label {label} in line {number}, but there are {most} classes'
                yield Problem(str(self.labels), wrong)

    def subfolders(self) -> list[str]:
        """What mmpretrain takes for the classes, in the order of their labels."""
        return sorted(entry.name for entry in os.scandir(self.folder) if entry.is_dir())

    def in_folders(self) -> Iterator[Problem]:
        """Folders that are not the config's classes, and folders without images."""
        found = self.subfolders()
        empty = [name for name in found if not any(self.images(self.folder / name))]
        if len(empty) == len(found):
            yield Problem(str(self.folder), f'holds no images ({" ".join(self.suffixes)})')
            return
        yield from self.against_config(found)
        for name in empty:
            then = 'the class is never seen'
            yield Problem(str(self.folder / name), 'holds no images', then, SPOILS)

    def against_config(self, found: list[str]) -> Iterator[Problem]:
        # ImageNet's folders have numbers and its classes have words: then only the count can tell.
        if not self.classes:
            return
        if not set(found) & set(self.classes):
            if len(found) != len(self.classes):
                wrong = f'has {len(found)} class folders, the config {len(self.classes)} classes'
                yield Problem(str(self.folder), wrong)
            return
        for name in sorted(set(self.classes) - set(found)):
            yield Problem(str(self.folder / name), 'is missing, a class of the config')
        for name in sorted(set(found) - set(self.classes)):
            yield Problem(str(self.folder / name), 'is no class of the config')
        if set(found) == set(self.classes) and found != self.classes:
            label, (one, other) = first_difference(found, self.classes)
            yield Problem(
                str(self.folder / one),
                f'is class {label} in the order of the folders, which counts, but the config '
                f'calls class {label} {other!r}',
            )

    def images(self, folder: str | Path, others: bool = False) -> Iterator[Path]:
        """Files that mmpretrain takes for images, or the others; links are followed."""
        inner = []
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_dir():
                    inner.append(entry.path)
                elif self.counts(entry.name) and self.is_image(entry.name) != others:
                    yield Path(entry.path)
        for one in inner:
            yield from self.images(one, others)

    @staticmethod
    def counts(name: str) -> bool:
        return not name.startswith('.') and name not in IGNORED

    def is_image(self, name: str) -> bool:
        return name.lower().endswith(self.suffixes)

    def strays(self) -> Iterator[Problem]:
        """Files beside the images, which nothing reads."""
        if self.labels or not self.folder.exists():
            return
        for path in self.images(self.folder, others=True):
            wrong = f'is no image by its name ({" ".join(self.suffixes)})'
            yield Problem(str(path), wrong, 'it is not used', NOTE)


def first_difference(one: Sequence, other: Sequence) -> tuple[int, tuple]:
    pairs = enumerate(zip_longest(one, other))
    return next((i, pair) for i, pair in pairs if pair[0] != pair[1])


def layouts(datasets: Sequence[dict]) -> list[Layout]:
    """Those data sets that have labels in one of the two layouts, and read them as mmpretrain."""
    from mmpretrain.datasets import CustomDataset

    found = []
    for one in datasets:
        kind = kind_of(one, 'mmpretrain')
        labelled = one.get('with_label', True) and one.get('split') != 'test'
        if labelled and kind and lists_like(kind, CustomDataset):
            found.append(Layout(one, kind))
    return found


def lists_like(kind: type, base: type) -> bool:
    """Whether a class finds its samples as ``base`` does; a project's own subclass may not."""
    ways = ('load_data_list', '_find_samples', 'is_valid_file')
    return issubclass(kind, base) and all(getattr(kind, n) is getattr(base, n) for n in ways)


def label_problems(datasets: Sequence[dict]) -> Iterator[Problem]:
    """What is wrong with the labels of mmpretrain's data sets, read from names alone.

    Args:
        datasets: configs, those of all stages together: their classes must agree.
    """
    first = None
    for one in {(one.folder, one.labels): one for one in layouts(datasets)}.values():
        yield from one.problems()
        if one.labels or not one.source.exists():
            continue
        names = one.subfolders()
        if first and names != first[1]:
            _, pair = first_difference(names, first[1])
            wrong = f'has other class folders than {first[0]}: {pair[0]} where that has {pair[1]}'
            yield Problem(str(one.folder), wrong)
        first = first or (one.folder, names)
