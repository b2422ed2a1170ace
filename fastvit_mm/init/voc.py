"""Pascal VOC: an xml file for each image. Corners are numbers of pixels that count from 1."""

import re
from pathlib import Path
from xml.etree import ElementTree

from fastvit_mm.errors import FastViTError, one_line

from .found import Found
from .objects import checked_size, claim, entry, from_corners, one_image, without
from .tree import SPLITS, Tree, divide, split_of


def lies_in(tree: Tree) -> str | None:
    found = tree.of('.xml')
    return f'{len(found)} xml files' if any(is_voc(tree, one) for one in found[:3]) else None


def is_voc(tree: Tree, path: Path) -> bool:
    return bool(re.search(rb'<annotation[\s>]', (tree.root / path).read_bytes()[:1000]))


def parse(tree: Tree, path: Path) -> ElementTree.Element:
    try:
        return ElementTree.fromstring((tree.root / path).read_bytes())
    except (OSError, ElementTree.ParseError) as error:
        raise FastViTError(f'{tree.root / path} is no XML: {one_line(error)}') from error


def read(tree: Tree, val: float, seed: int) -> Found:
    """Raises:
    FastViTError: names the file.
    """
    trees = {path: parse(tree, path) for path in tree.of('.xml')}
    trees = {path: one for path, one in trees.items() if one.tag == 'annotation'}
    names = {o.findtext('name', '').strip() for t in trees.values() for o in t.iter('object')}
    classes = tuple(sorted(names))
    listed, splits, hard, claimed = split_lists(tree, 'Main', {p.stem for p in trees}), {}, 0, {}
    for path, one in trees.items():
        image, made = annotated(tree, path, one, classes)
        claim(claimed, image, path)
        hard += sum(o['iscrowd'] for o in made['annotations'])
        split = split_of(image.parent) or split_of(path.parent)
        splits.setdefault(listed.get(path.stem) if listed else split, []).append(made)
    parts, how = divide(splits, val, seed)
    found = Found('Pascal VOC files', tree.root, classes, parts, how)
    found.lines += without(tree, claimed, 'xml file')
    if hard:
        found.say(f'{hard} objects are marked difficult: neither learned nor counted')
    return found


def split_lists(tree: Tree, kind: str, names: set[str]) -> dict[str, str]:
    """The split of each name, from ImageSets/Main/train.txt and the like.

    Args:
        kind: Main or Segmentation.
        names: what may be listed.

    Raises:
        FastViTError: another name is, or one for two splits.
    """
    found: dict[str, str] = {}
    for path in tree.of('.txt'):
        if path.parts[-3:-1] != ('ImageSets', kind) or path.stem not in SPLITS:
            continue
        for row in filter(None, map(str.strip, tree.text(path).splitlines())):
            name = row if row in names else re.sub(r'\s+(-1|0|1)$', '', row)
            if name not in names:
                raise FastViTError(f'{tree.root / path} lists {name!r}, which has no annotations')
            if (other := found.setdefault(name, path.stem)) != path.stem:
                raise FastViTError(f'{tree.root / path} lists {name!r}, which {other}.txt has, too')
    return found


def annotated(tree: Tree, path: Path, one: ElementTree.Element, classes) -> tuple[Path, dict]:
    given = Path((one.findtext('filename', '').strip() or path.stem).replace('\\', '/'))
    folders = [path.parent, path.parent.parent / 'JPEGImages', path.parent.parent / 'images']
    image = one_image(tree, path, given, folders)
    stated = tuple(int(float(one.findtext(f'size/{k}') or 0)) for k in ('width', 'height'))
    size = checked_size(tree, image, stated, tree.root / path)
    objects = [from_xml(tree.root / path, o, classes, size) for o in one.iter('object')]
    return image, entry(tree, image, objects, size)


def from_xml(path: Path, one: ElementTree.Element, classes: tuple, size: tuple) -> dict:
    try:
        corners = [float(one.findtext(f'bndbox/{k}')) for k in ('xmin', 'ymin', 'xmax', 'ymax')]
    except (TypeError, ValueError) as error:
        raise FastViTError(f'{path}: an object has no box of four numbers') from error
    left, top, right, bottom = corners
    label = classes.index(one.findtext('name', '').strip())
    new = from_corners(label, left - 1, top - 1, right, bottom, size)
    return dict(new, iscrowd=int(one.findtext('difficult', '0').strip() == '1'))
