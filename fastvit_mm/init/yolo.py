"""YOLO labels: a txt file for each image, lines of a class and a box or outline.

Numbers are fractions of the image's width and height, the image turned upright by its EXIF data.
"""

from pathlib import Path

import yaml

from fastvit_mm.errors import FastViTError, one_line

from .found import Found
from .objects import entry, from_corners, from_polygons
from .tree import Tree, divide, size_of, split_of

LISTS = ('classes.txt', 'obj.names', 'data.names')


def lies_in(tree: Tree) -> str | None:
    named = names_file(tree)
    labels = [one for one in tree.of('.txt') if one.name not in LISTS and is_label(tree, one)]
    if named and labels:
        return f'{len(labels)} txt files and {named}'
    return None


def is_label(tree: Tree, path: Path) -> bool:
    """Whether an image of the same name lies where YOLO looks for it."""
    return any(one in image_stems(tree) for one in image_places(path))


def image_stems(tree: Tree) -> dict[Path, Path]:
    if not hasattr(tree, 'stems'):
        tree.stems = {one.with_suffix(''): one for one in tree.images}
    return tree.stems


def image_places(label: Path) -> list[Path]:
    """Where the image of a label file may lie, without its suffix."""
    stem, parts = label.with_suffix(''), label.with_suffix('').parts
    swapped = [
        Path(*parts[:i], 'images', *parts[i + 1 :])
        for i, one in enumerate(parts[:-1])
        if one == 'labels'
    ]
    return [*reversed(swapped), stem]


def names_file(tree: Tree) -> Path | None:
    """The yaml with ``names``, or a list of names."""
    if tree.asked and tree.asked.suffix in ('.yaml', '.yml'):
        return tree.asked.relative_to(tree.root)
    for path in tree.of('.yaml', '.yml'):
        if isinstance(content := load(tree, path), dict) and 'names' in content:
            return path
    return next((one for one in tree.files if one.name in LISTS), None)


def load(tree: Tree, path: Path):
    try:
        return yaml.safe_load((tree.root / path).read_text(encoding='utf-8'))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise FastViTError(f'{tree.root / path} is no YAML: {one_line(error)}') from error


def class_names(tree: Tree, path: Path) -> dict[int, str]:
    """Names by class number, in their order; numbers may have gaps."""
    if path.suffix not in ('.yaml', '.yml'):
        lines = (tree.root / path).read_text(encoding='utf-8').splitlines()
        return {i: one.strip() for i, one in enumerate(one for one in lines if one.strip())}
    names = (load(tree, path) or {}).get('names')
    names = dict(enumerate(names)) if isinstance(names, list) else names
    if not isinstance(names, dict) or not all(str(one).isdecimal() for one in names):
        raise FastViTError(f'{tree.root / path}: names must be a list, or names by class number')
    return {int(one): str(names[one]) for one in sorted(names, key=int)}


def read(tree: Tree, val: float, seed: int) -> Found:
    """Raises:
    FastViTError: names the file and the line.
    """
    source = names_file(tree)
    names = class_names(tree, source)
    places = {number: place for place, number in enumerate(names)}
    splits: dict = {}
    labels = {}
    for path in tree.of('.txt'):
        image = next(
            (image_stems(tree)[p] for p in image_places(path) if p in image_stems(tree)), 0
        )
        if image and path.name not in LISTS:
            labels[image] = path
    folders = split_folders(tree, source)
    for image in tree.images:
        split = split_by(folders, image) or split_of(image.parent)
        size = size_of(tree.root / image)
        objects = objects_of(tree, labels[image], places, size) if image in labels else []
        splits.setdefault(split, []).append(entry(tree, image, objects, size))
    parts, how = divide(splits, val, seed)
    return Found('YOLO labels', tree.root, tuple(names.values()), parts, how)


def split_folders(tree: Tree, source: Path) -> dict[str, str]:
    """Folders of images by split, as the yaml says, where they exist."""
    content = load(tree, source) if source.suffix in ('.yaml', '.yml') else {}
    found = {}
    for split in ('train', 'val', 'test'):
        given = content.get(split)
        if not isinstance(given, str) or given.endswith('.txt'):
            continue
        base = Path(str(content.get('path') or ''))
        for folder in (base / given, Path(given), Path(given.removeprefix('../'))):
            inside = Path(folder.as_posix().removeprefix(tree.root.as_posix() + '/'))
            if not inside.is_absolute() and (tree.root / source.parent / inside).is_dir():
                found[split] = (source.parent / inside).as_posix()
                break
    return {} if len(set(found.values())) < len(found) else found


def split_by(folders: dict[str, str], image: Path) -> str | None:
    return next((s for s, folder in folders.items() if image.is_relative_to(folder)), None)


def objects_of(tree: Tree, path: Path, places: dict[int, int], size: tuple) -> list[dict]:
    lines = (tree.root / path).read_text(encoding='utf-8').splitlines()
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
