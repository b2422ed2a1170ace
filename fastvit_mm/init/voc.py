"""Pascal VOC: an xml file for each image. Corners are numbers of pixels that count from 1."""

from pathlib import Path
from xml.etree import ElementTree

from fastvit_mm.errors import FastViTError, one_line

from .found import Found
from .objects import checked_size, entry, from_corners, one_image
from .tree import Tree, divide, split_of


def lies_in(tree: Tree) -> str | None:
    found = tree.of('.xml')
    if found and any(parse(tree, one).tag == 'annotation' for one in found[:3]):
        return f'{len(found)} xml files'
    return None


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
    listed, splits, hard = split_lists(tree), {}, 0
    for path, one in trees.items():
        image, made = annotated(tree, path, one, classes)
        hard += sum(o['iscrowd'] for o in made['annotations'])
        split = listed.get(path.stem) or split_of(image.parent) or split_of(path.parent)
        splits.setdefault(split, []).append(made)
    if listed:  # VOC lists what it uses
        splits.pop(None, None)
    parts, how = divide(splits, val, seed)
    found = Found('Pascal VOC files', tree.root, classes, parts, how)
    if hard:
        found.say(f'{hard} objects are marked difficult: neither learned nor counted')
    return found


def split_lists(tree: Tree) -> dict[str, str]:
    """The split of each name, from ImageSets/Main/train.txt and the like."""
    found = {}
    for split in ('train', 'val', 'test'):
        for path in tree.of('.txt'):
            if path.parts[-3:-1] == ('ImageSets', 'Main') and path.stem == split:
                rows = (tree.root / path).read_text(encoding='utf-8').splitlines()
                found |= {row.split()[0]: split for row in rows if row.strip()}
    return found


def annotated(tree: Tree, path: Path, one: ElementTree.Element, classes) -> tuple[Path, dict]:
    given = one.findtext('filename', '').strip() or path.stem
    name = Path(given.replace('\\', '/')).name
    folders = [path.parent, path.parent.parent / 'JPEGImages', path.parent.parent / 'images']
    names = [name, *(path.stem + s for s in ('.jpg', '.jpeg', '.png', '.JPG')), name + '.jpg']
    image = one_image(tree, (f / n for f in folders for n in names), name, tree.root / path)
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
