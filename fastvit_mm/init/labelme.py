"""LabelMe: a json file for each image, with shapes in pixels of the upright image."""

import base64
import math
from pathlib import Path

import cv2
import numpy as np
from pycocotools import mask as run_lengths

from fastvit_mm.errors import FastViTError

from .found import Found
from .objects import checked_size, claim, entry, from_corners, from_polygons, one_image, without
from .tree import Tree, divide, split_of

CORNERS = 48  # of the polygon that a circle becomes
NO_OBJECTS = ('__ignore__', '_background_')
FLAT = ('point', 'points', 'line', 'linestrip')  # enclose nothing
KINDS = (None, '', 'polygon', 'rectangle', 'circle', 'mask', *FLAT)


def lies_in(tree: Tree) -> str | None:
    found = sum(map(is_labelme, tree.jsons.values()))
    return f'{found} json file{"s" * (found > 1)}' if found else None


def is_labelme(content) -> bool:
    return isinstance(content, dict) and 'shapes' in content


def read(tree: Tree, val: float, seed: int) -> Found:
    """Raises:
    FastViTError: names the file.
    """
    contents = {path: one for path, one in tree.jsons.items() if is_labelme(one)}
    for path, one in contents.items():
        check_shapes(one['shapes'], tree.root / path)
    names = {s['label'] for one in contents.values() for s in one['shapes'] if is_object(s)}
    classes = tuple(sorted(names))
    splits, skipped, claimed = {}, 0, {}
    for path, one in contents.items():
        name = Path(str(one.get('imagePath') or path.stem).replace('\\', '/'))
        image = one_image(tree, path, name, [path.parent, normal(path.parent / name).parent])
        claim(claimed, image, path)
        stated = (one.get('imageWidth') or 0, one.get('imageHeight') or 0)
        size = checked_size(tree, image, stated, tree.root / path)
        objects, left_out = objects_of(one['shapes'], classes, size, tree.root / path)
        skipped += left_out
        split = split_of(image.parent) or split_of(path.parent)
        splits.setdefault(split, []).append(entry(tree, image, objects, size))
    parts, how = divide(splits, val, seed)
    found = Found('LabelMe files', tree.root, classes, parts, how)
    found.lines += without(tree, claimed, 'json file')
    if skipped:
        found.say(f'note: {skipped} points, lines and __ignore__ shapes are not used')
    return found


def check_shapes(shapes: list[dict], path: Path) -> None:
    for one in shapes:
        if not isinstance(one.get('label'), str) or not one['label'].strip():
            raise FastViTError(f'{path}: a shape has no label')
        if one.get('shape_type') not in KINDS and not has_area(one):
            raise FastViTError(f'{path}: shapes of the type {one["shape_type"]!r} are not known')


def has_area(shape: dict) -> bool:
    return len(shape.get('points') or ()) > 2


def is_object(shape: dict) -> bool:
    return shape['label'] not in NO_OBJECTS and shape.get('shape_type') not in FLAT


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
    found = []
    for number, one in enumerate(shapes):
        if is_object(one) and one.get('shape_type') == 'mask':
            found.append(from_mask(one, classes.index(one['label']), size, path))
            continue
        outline = outline_of(one, path) if is_object(one) else None
        if outline is None:
            skipped += 1
            continue
        group = one.get('group_id')
        key = (one['label'], group) if group is not None else number
        groups.setdefault(key, []).append((one, outline))
    for members in groups.values():
        label = classes.index(members[0][0]['label'])
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
    if kind == 'rectangle' and len(points) > 1:
        (x, y), (right, bottom) = points[0], points[-1] if len(points) == 2 else points[2]
        return [x, y, right, y, right, bottom, x, bottom]
    if kind == 'circle' and len(points) == 2:
        (x, y), edge = points
        radius = math.dist((x, y), edge)
        turns = [2 * math.pi * i / CORNERS for i in range(CORNERS)]
        return [v for t in turns for v in (x + radius * math.cos(t), y + radius * math.sin(t))]
    return [v for one in points for v in one] if len(points) > 2 else None


def from_mask(shape: dict, label: int, size: tuple[int, int], path: Path) -> dict:
    """An object that is drawn pixel by pixel: a PNG of its box, of which the first point is the
    corner. Other than an outline, it may have holes."""
    (left, top), content = np.round(shape['points'][0]).astype(int), shape.get('mask') or ''
    try:
        drawn = cv2.imdecode(np.frombuffer(base64.b64decode(content), np.uint8), 0)
    except (ValueError, cv2.error):
        drawn = None
    width, height = size
    if drawn is None or min(left, top) < 0 or top >= height or left >= width:
        raise FastViTError(f'{path}: the mask of {shape["label"]!r} cannot be read')
    whole = np.zeros((height, width), np.uint8, order='F')
    part = whole[top : top + drawn.shape[0], left : left + drawn.shape[1]]
    part[:] = drawn[: part.shape[0], : part.shape[1]] > 0
    packed = run_lengths.encode(whole)
    x, y, w, h = run_lengths.toBbox(packed).tolist()
    counts = packed['counts'].decode()
    new = from_corners(label, x, y, x + w, y + h, size)
    segmentation = dict(size=[height, width], counts=counts)
    return dict(new, area=float(whole.sum()), segmentation=segmentation)
