"""LabelMe: a json file for each image, with shapes in pixels of the upright image."""

import math
from pathlib import Path

from fastvit_mm.errors import FastViTError

from .found import Found
from .objects import checked_size, entry, from_corners, from_polygons, one_image
from .tree import Tree, divide, split_of

CORNERS = 48  # of the polygon that a circle becomes


def lies_in(tree: Tree) -> str | None:
    found = tree.of('.json')
    if any(is_labelme(tree.json(one)) for one in found[:3]):
        return f'{len(found)} json files'
    return None


def is_labelme(content) -> bool:
    return isinstance(content, dict) and 'shapes' in content


def read(tree: Tree, val: float, seed: int) -> Found:
    """Raises:
    FastViTError: names the file.
    """
    contents = {path: tree.json(path) for path in tree.of('.json')}
    contents = {path: one for path, one in contents.items() if is_labelme(one)}
    names = {s.get('label') for one in contents.values() for s in one['shapes']}
    classes = tuple(sorted(str(one) for one in names))
    splits, skipped = {}, 0
    for path, one in contents.items():
        name = Path(str(one.get('imagePath') or '').replace('\\', '/'))
        places = [path.parent / name, path.parent / name.name]
        places += [path.with_suffix(s) for s in ('.jpg', '.jpeg', '.png', '.JPG')]
        image = one_image(tree, map(normal, places), name.name, tree.root / path)
        stated = (one.get('imageWidth') or 0, one.get('imageHeight') or 0)
        size = checked_size(tree, image, stated, tree.root / path)
        objects, left_out = objects_of(one['shapes'], classes, size, tree.root / path)
        skipped += left_out
        split = split_of(image.parent) or split_of(path.parent)
        splits.setdefault(split, []).append(entry(tree, image, objects, size))
    parts, how = divide(splits, val, seed)
    found = Found('LabelMe files', tree.root, classes, parts, how)
    if skipped:
        found.say(f'note: {skipped} points and lines enclose nothing: they are not used')
    return found


def normal(path: Path) -> Path:
    """Without 'a/../'."""
    parts: list[str] = []
    for one in path.parts:
        parts = parts[:-1] if one == '..' and parts else [*parts, one]
    return Path(*parts)


def objects_of(shapes: list[dict], classes: tuple, size, path: Path) -> tuple[list[dict], int]:
    """Objects, and how many shapes are none. Shapes of one group and label are one object."""
    groups: dict = {}
    skipped = 0
    for number, one in enumerate(shapes):
        outline = outline_of(one, path)
        if outline is None:
            skipped += 1
            continue
        group = one.get('group_id')
        key = (one['label'], group) if group is not None else number
        groups.setdefault(key, []).append((one, outline))
    found = []
    for members in groups.values():
        label = classes.index(str(members[0][0].get('label')))
        if all(one.get('shape_type') == 'rectangle' for one, _ in members) and len(members) == 1:
            points = members[0][1]
            found.append(from_corners(label, *points[:2], *points[4:6], size))
        else:
            found.append(from_polygons(label, [outline for _, outline in members], size))
    return found, skipped


def outline_of(shape: dict, path: Path) -> list[float] | None:
    """The outline x, y, x, y, ... of a shape; None if it encloses nothing."""
    points, kind = shape.get('points') or [], shape.get('shape_type') or 'polygon'
    try:
        points = [(float(x), float(y)) for x, y in points]
    except (TypeError, ValueError) as error:
        raise FastViTError(f'{path}: a shape has points that are no pairs of numbers') from error
    if kind == 'polygon' and len(points) > 2:
        return [v for one in points for v in one]
    if kind == 'rectangle' and len(points) > 1:
        (x, y), (right, bottom) = points[0], points[-1] if len(points) == 2 else points[2]
        return [x, y, right, y, right, bottom, x, bottom]
    if kind == 'circle' and len(points) == 2:
        (x, y), edge = points
        radius = math.dist((x, y), edge)
        turns = [2 * math.pi * i / CORNERS for i in range(CORNERS)]
        return [v for t in turns for v in (x + radius * math.cos(t), y + radius * math.sin(t))]
    return None
