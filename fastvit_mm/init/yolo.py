"""YOLO labels: a txt file for each image, lines of a class and a box or outline.

Numbers are fractions of the image's width and height, the image turned upright by its EXIF data.
"""

from collections.abc import Iterator
from pathlib import Path

import yaml

from fastvit_mm.errors import FastViTError, one_line

from .found import Found
from .objects import claim, entry, from_corners, from_polygons
from .tree import SPLITS, Tree, divide, size_of, split_of

LISTS = ('classes.txt', 'obj.names', 'data.names')


def lies_in(tree: Tree) -> str | None:
    named = (names_files(tree) or [None])[0]
    labels = [one for one in tree.of('.txt') if one.name not in LISTS and is_label(tree, one)]
    if named and labels:
        return f'{len(labels)} txt files and {named}'
    return None


def is_label(tree: Tree, path: Path) -> bool:
    """Whether an image of the same name lies where YOLO looks for it."""
    return any(one in tree.by_stem for one in image_places(path))


def image_places(label: Path) -> list[Path]:
    """Where the image of a label file may lie, without its suffix."""
    stem, parts = label.with_suffix(''), label.with_suffix('').parts
    swapped = [
        Path(*parts[:i], 'images', *parts[i + 1 :])
        for i, one in enumerate(parts[:-1])
        if one == 'labels'
    ]
    return [*reversed(swapped), stem]


def names_files(tree: Tree) -> list[Path]:
    """Each yaml with ``names``, or else the lists of names."""
    if tree.asked and tree.asked.suffix in ('.yaml', '.yml'):
        return [tree.asked.relative_to(tree.root)]
    yamls = [one for one in tree.of('.yaml', '.yml') if has_names(tree, one)]
    return yamls or [one for one in tree.files if one.name in LISTS]


def has_names(tree: Tree, path: Path) -> bool:
    try:
        content = load(tree, path)
    except FastViTError:  # of another program
        return False
    return isinstance(content, dict) and 'names' in content


def load(tree: Tree, path: Path):
    """The content, all of it as text: `no` is a name."""
    try:
        return yaml.load(tree.text(path), yaml.BaseLoader)
    except yaml.YAMLError as error:
        raise FastViTError(f'{tree.root / path} is no YAML: {one_line(error)}') from error


def class_names(tree: Tree, path: Path) -> dict[int, str]:
    """Names by class number, in their order; numbers may have gaps."""
    if path.suffix not in ('.yaml', '.yml'):
        lines = tree.text(path).splitlines()
        return {i: one.strip() for i, one in enumerate(lines) if one.strip()}
    content = load(tree, path)
    content = content if isinstance(content, dict) else {}
    if 'kpt_shape' in content:
        raise FastViTError(f'{tree.root / path} is for key points (kpt_shape): give boxes')
    names = content.get('names')
    names = dict(enumerate(names)) if isinstance(names, list) else names
    if not isinstance(names, dict) or not all(str(one).isdecimal() for one in names):
        raise FastViTError(f'{tree.root / path}: names must be a list, or names by class number')
    return {int(one): str(names[one]) for one in sorted(names, key=int)}


def read(tree: Tree, val: float, seed: int) -> Found:
    """Raises:
    FastViTError: names the file and the line.
    """
    source, *others = names_files(tree)
    names = class_names(tree, source)
    for other in others:
        if class_names(tree, other) != names:
            raise FastViTError(f'{tree.root}: {source} and {other} name the classes differently')
    places = {number: place for place, number in enumerate(names)}
    splits: dict = {}
    labels = labels_of(tree)
    listed = split_places(tree, source)
    for image in tree.images:
        among = next((listed[one] for one in (image, *image.parents) if one in listed), None)
        split = among if listed else split_of(image.parent)
        size = size_of(tree.root / image)
        objects = objects_of(tree, labels[image], places, size) if image in labels else []
        splits.setdefault(split, []).append(entry(tree, image, objects, size))
    parts, how = divide(splits, val, seed)
    return Found('YOLO labels', tree.root, tuple(names.values()), parts, how)


def labels_of(tree: Tree) -> dict[Path, Path]:
    """The label file of each image that has one."""
    found: dict[Path, Path] = {}
    for path in tree.of('.txt'):
        image = next(filter(None, map(tree.image_at, image_places(path))), None)
        if image and path.name not in LISTS:
            claim(found, image, path)
    return found


def split_places(tree: Tree, source: Path) -> dict[Path, str]:
    """The split of each folder or image that the yaml names, in folders or in lists of images;
    nothing if it names the same for all.

    Raises:
        FastViTError: what it names for train or val does not exist.
    """
    content = load(tree, source) if source.suffix in ('.yaml', '.yml') else {}
    by_split = {one: named(tree, source, content, one) for one in SPLITS}
    by_split = {split: places for split, places in by_split.items() if places}
    if by_split.get('train') == by_split.get('val'):
        return {}
    found: dict[Path, str] = {}
    for split, places in by_split.items():
        for one in places:
            if split in SPLITS[:2] and found.get(one, split) != split:
                raise FastViTError(f'{tree.root / source}: {one} is both in train and in val')
            found.setdefault(one, split)
    return found


def named(tree: Tree, source: Path, content: dict, split: str) -> set[Path]:
    """Folders and images of a split."""
    given, base = content.get(split) or [], content.get('path') or ''
    folders = {up for one in tree.images for up in one.parents}
    found: set[Path] = set()
    for one in [given] if isinstance(given, str) else given:
        is_list = one.endswith('.txt')
        known = set(tree.of('.txt')) if is_list else folders
        path = place(tree, source.parent, Path(base, one), known)
        if path is None and split in SPLITS[:2]:
            raise FastViTError(f'{tree.root / source} names {one} for {split}, which is missing')
        if path is None:
            continue
        found |= set(images_in(tree, path)) if is_list else {path}
    return found


def images_in(tree: Tree, path: Path) -> Iterator[Path]:
    """The images that a file lists."""
    for row in filter(None, map(str.strip, tree.text(path).splitlines())):
        image = place(tree, path.parent, Path(row), tree.known)
        if image is None:
            raise FastViTError(f'{tree.root / path} lists {row}, which is missing')
        yield image


def place(tree: Tree, near: Path, path: Path, known: set[Path]) -> Path | None:
    """The longest end of a path that exists; beginnings are often those of another machine."""
    parts = [one for one in path.parts if one not in ('..', path.anchor)]
    ends = (Path(*parts[i:]) for i in range(max(len(parts), 1)))
    both = (folder / end for end in ends for folder in (near, Path()))
    return next((one for one in both if one in known), None)


def objects_of(tree: Tree, path: Path, places: dict[int, int], size: tuple) -> list[dict]:
    lines = tree.text(path).splitlines()
    found = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                found.append(one_object(line.split(), places, size))
            except (ValueError, KeyError) as error:
                why = f'class {error} is not in the yaml' if isinstance(error, KeyError) else error
                raise FastViTError(f'{tree.root / path}, line {number}: {why}') from error
    return found


def one_object(values: list[str], places: dict[int, int], size: tuple[int, int]) -> dict:
    """A line of five numbers is a box (class, centre, width and height), of six one with a score,
    of a class and three or more points an outline."""
    label = places[int(float(values[0]))]
    numbers = [float(one) for one in values[1:]]
    if not all(-1 <= one <= 2 for one in numbers):
        raise ValueError(f'{line_of(values)} has numbers that are no fractions of the image')
    width, height = size
    if len(numbers) in (4, 5):
        x, y, w, h = numbers[:4]
        corners = (x - w / 2) * width, (y - h / 2) * height
        opposite = (x + w / 2) * width, (y + h / 2) * height
        return from_corners(label, *corners, *opposite, size)
    if len(numbers) < 6 or len(numbers) % 2:
        raise ValueError(f'{line_of(values)} is neither a box nor an outline')
    points = [one * (height if i % 2 else width) for i, one in enumerate(numbers)]
    return from_polygons(label, [points], size)


def line_of(values: list[str]) -> str:
    return repr(' '.join(values)[:60])
