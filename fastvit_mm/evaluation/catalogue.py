"""The data sets of section 4.2 of the paper: where they are and what must be in them."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from mmengine.dist import is_main_process

from fastvit_mm.errors import FastViTError, require

TITLES = dict(c='ImageNet-C', a='ImageNet-A', r='ImageNet-R', sketch='ImageNet-Sketch', real='ReaL')
ROOTS = dict(
    c='data/imagenet-c', a='data/imagenet-a', r='data/imagenet-r', sketch='data/imagenet-sketch'
)
#: ImageNet-C: the short side resized to the first, then a square of the second from the middle.
CROP = (256, 224)


@dataclass(frozen=True)
class Catalogue:
    """Places and classes of the sets.

    Attributes:
        roots: folders by set; ``real``: the file of labels.
        classes: folder names of all classes, in the order of the model's labels.
        own: folder names of the classes of the sets that have not all of them.
        real_images: number of images that ``real`` has labels for.
        real_folder: images for ``real``; None: those of the config.
        crop: as ``CROP``.
    """

    roots: dict[str, Path]
    classes: Sequence[str]
    own: dict[str, Sequence[str]]
    real_images: int = 50_000
    real_folder: Path | None = None
    crop: tuple[int, int] = CROP

    def classes_of(self, name: str) -> Sequence[str]:
        return self.own.get(name, self.classes)

    def labels_of(self, name: str) -> list[int] | None:
        """Which of the model's labels are a set's classes, in its order; None: all."""
        if name not in self.own:
            return None
        return [self.classes.index(one) for one in self.own[name]]


def published(roots: dict[str, str]) -> Catalogue:
    """The sets as published; ``roots`` replaces their usual places.

    Raises:
        FastViTError: timm, which has the lists of classes, is not installed.
    """
    require("the list of a set's classes", 'timm')
    info = resources.files('timm.data') / '_info'

    def read(name: str) -> list[str]:
        return (info / f'imagenet_{name}.txt').read_text(encoding='utf-8').split()

    places = {**ROOTS, 'real': str(info / 'imagenet_real_labels.json'), **roots}
    return Catalogue(
        roots={name: Path(place) for name, place in places.items()},
        classes=read('synsets'),
        own={name: read(f'{name}_synsets') for name in ('a', 'r')},
    )


def subfolders(path: Path) -> set[str]:
    with os.scandir(path) as entries:
        return {entry.name for entry in entries if entry.is_dir()}


def few(names: Sequence[str]) -> str:
    names = sorted(names)
    return ', '.join(names[:3]) + (', ...' if len(names) > 3 else '')


def check_folders(path: Path, classes: Sequence[str], title: str, option: str) -> int:
    """The number of images in a folder that has one subfolder for each class.

    Raises:
        FastViTError: it does not exist, has other subfolders, or some are empty.
    """
    if not path.is_dir():
        raise FastViTError(
            f'{title} not found: {path} is no folder; name its place with --data-root {option}=DIR '
            'or see docs/robustness.md'
        )
    found = subfolders(path)
    missing, more = set(classes) - found, found - set(classes)
    if missing or more:
        parts = [f'{len(missing)} of its {len(classes)} class folders missing ({few(missing)})']
        parts += [f'{len(more)} others present ({few(more)})'] if more else []
        raise FastViTError(
            f'{path} is not {title}: {" and ".join(parts if missing else parts[1:])}'
        )
    counts = {name: sum(1 for _ in os.scandir(path / name)) for name in classes}
    if empty := [name for name, count in counts.items() if not count]:
        raise FastViTError(f'{path}: {len(empty)} class folders are empty ({few(empty)})')
    return sum(counts.values())


def check_released_corruptions(
    root: Path, classes: Sequence[str], corruptions: Sequence[str], severities: Sequence[int]
) -> None:
    """Whether everything of ImageNet-C that is asked for is in ``root``.

    Only the first process of a job counts the images: they are millions, in 75,000 folders.

    Raises:
        FastViTError: a corruption or severity is missing, or has not as many images as the others.
    """
    if not root.is_dir():
        raise FastViTError(f'ImageNet-C not found: {root} is no folder')
    wanted = [f'{name}/{severity}' for name in corruptions for severity in severities]
    if missing := [part for part in wanted if not (root / part).is_dir()]:
        raise FastViTError(
            f'ImageNet-C in {root} is incomplete: {few(missing)} missing, {len(missing)} of '
            f'{len(wanted)} folders <corruption>/<severity>; choose with --corruptions and '
            '--severities, or name another place with --data-root c=DIR'
        )
    if not is_main_process():
        return
    counts = {part: check_folders(root / part, classes, 'ImageNet-C', 'c') for part in wanted}
    most = max(counts.values())
    if less := [part for part, count in counts.items() if count < most]:
        raise FastViTError(
            f'ImageNet-C in {root} is incomplete: {few(less)} with fewer than {most:,} images'
        )
