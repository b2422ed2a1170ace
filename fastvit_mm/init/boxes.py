"""Objects with boxes or outlines: COCO's files as they are, and others in COCO's form.

Outlines are taken over point by point. (Libraries such as supervision draw each as a mask and trace
that: of objects of 25 pixels, 0.95 then overlap with the outline, and some become run lengths.)

An image is a dict with ``file_name`` (relative to the root), ``width``, ``height`` and its
``annotations``, whose ``category_id`` is the place of the class, from 0.
"""

from collections import Counter

import numpy as np

from fastvit_mm.errors import FastViTError

from . import coco, labelme, voc, yolo
from .found import Found
from .tree import Tree

#: Each has ``lies_in(tree)``, which says what it recognizes, and ``read(tree)``.
LAYOUTS = dict(coco=coco, yolo=yolo, voc=voc, labelme=labelme)
#: What a file that the user names is.
NAMED = {'.json': 'coco', '.yaml': 'yolo', '.yml': 'yolo'}


def find(tree: Tree, val: float, seed: int, layout: str | None = None) -> Found:
    """Objects in any layout.

    ``details`` has ``outlines``: whether every object has one; and, where COCO's own files are used
    as they are, ``files`` and ``folders`` of images by split.

    Raises:
        FastViTError: none or several layouts, or annotations of no use; says which.
    """
    if tree.asked:
        if isinstance(error := tree.jsons.get(tree.asked.relative_to(tree.root)), FastViTError):
            raise error
        layout = layout or NAMED.get(tree.asked.suffix.lower())
    there = {name: what for name, one in LAYOUTS.items() if (what := one.lies_in(tree))}
    if layout and layout not in there:
        found = ', '.join(f'{name} ({what})' for name, what in there.items()) or 'none'
        raise FastViTError(f'--layout {layout}: {tree}; layouts found: {found}')
    if not there:
        raise FastViTError(
            f'{tree}, but no boxes: known are a COCO json, YOLO txt files with their yaml, Pascal '
            'VOC xml files and LabelMe json files'
        )
    if not layout and len(there) > 1:
        both = ' and '.join(f'{name} ({what})' for name, what in there.items())
        raise FastViTError(f'{tree.root} has {both}: say which with --layout {"|".join(there)}')
    layout = layout or next(iter(there))
    broken = [one for one in tree.jsons.values() if isinstance(one, FastViTError)]
    if broken and layout in ('coco', 'labelme') and not tree.asked:
        raise broken[0]
    try:
        found = LAYOUTS[layout].read(tree, val, seed)
    except KeyError as error:
        raise FastViTError(f'{tree.root}: an annotation lacks {error}') from error
    describe(found)
    return found


def describe(found: Found) -> None:
    """Say what the objects are, and whether their outlines can be learned."""
    objects = [one for images in found.splits.values() for i in images for one in i['annotations']]
    if not objects:
        raise FastViTError(f'{found.root}: the {found.layout} have no objects')
    outlined = sum(bool(one.get('segmentation')) for one in objects)
    found.details['outlines'] = outlined == len(objects)
    number = Counter(one['category_id'] for one in objects)
    shown = ', '.join(f'{name} {number[i]}' for i, name in enumerate(found.classes[:20]))
    found.say(f'{len(objects)} objects: {shown}{" ..." if len(found.classes) > 20 else ""}')
    if 0 < outlined < len(objects):
        images = (i for part in found.splits.values() for i in part)
        lacks = next(i for i in images if not all(o.get('segmentation') for o in i['annotations']))
        one = f'{lacks["file_name"]} has one without'
        found.say(f'note: {outlined} of {len(objects)} have outlines, {one}: boxes only')
    else:
        found.say('outlines: boxes and masks are learned' if outlined else 'boxes only')
    if never := [name for i, name in enumerate(found.classes) if not number[i]]:
        found.say(f'note: no objects of {", ".join(never[:5])}')
    train = found.splits['train']
    if empty := sum(not one['annotations'] for one in train):
        found.say(f'note: {empty} of {len(train)} training images have no objects: not used')
    if empty == len(train):
        raise FastViTError(f'{found.root}: no training image has an object')


def anchor(found: Found, size: int) -> int:
    """The scale of Mask R-CNN's anchors at which the finest level fits the smaller objects.

    Args:
        size: the short side to which images are resized.
    """
    sides = [
        (one['bbox'][2] * one['bbox'][3]) ** 0.5 * size / min(image['width'], image['height'])
        for image in found.splits['train']
        for one in image['annotations']
    ]
    return 8 if np.quantile(sides, 0.1) > 32 else 4  # times the strides 4, 8, 16, 32, 64


def as_coco(images: list[dict], classes: tuple[str, ...]) -> dict:
    """The content of a COCO file; ids begin with 1."""
    content: dict = dict(images=[], annotations=[])
    content['categories'] = [dict(id=i + 1, name=name) for i, name in enumerate(classes)]
    for number, image in enumerate(images, 1):
        plain = {k: v for k, v in image.items() if k != 'annotations'}
        content['images'].append(dict(plain, id=number))
        for one in image['annotations']:
            new = dict(one, id=len(content['annotations']) + 1, image_id=number)
            new['category_id'] += 1
            content['annotations'].append(new)
    return content
