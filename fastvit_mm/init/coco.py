"""COCO's json files: used as they are where there is one for each split."""

import re
from itertools import combinations
from pathlib import Path

from fastvit_mm.errors import FastViTError

from .found import Found
from .objects import checked_size
from .tree import SPLIT_OF, Tree, divide, split_of

NEEDED = ('images', 'annotations', 'categories')
OTHERS = ('captions_', 'person_keypoints_', 'image_info_')  # of COCO itself, beside instances_
MOST_OPENED = 200


def lies_in(tree: Tree) -> str | None:
    found = files(tree)
    return f'{len(found)} json file{"s" * (len(found) != 1)}' if found else None


def files(tree: Tree) -> dict[Path, dict]:
    """COCO files and their contents; of those that COCO itself comes with, the instances."""
    if not hasattr(tree, 'coco'):
        contents = tree.jsons
        if tree.asked and tree.asked.suffix == '.json':
            asked = tree.asked.relative_to(tree.root)
            contents = {asked: contents[asked]}
        tree.coco = {
            p: c for p, c in contents.items() if isinstance(c, dict) and set(NEEDED) <= {*c}
        }
        if any(one.name.startswith('instances_') for one in tree.coco):
            tree.coco = {p: c for p, c in tree.coco.items() if not p.name.startswith(OTHERS)}
    return tree.coco


def split_of_file(path: Path) -> str | None:
    """train, val or test if a word of its name or else a folder says so: 'my_val2017.json'."""
    words = re.split(r'[\W_\d]+', path.stem.lower())
    found = {SPLIT_OF[one] for one in words if one in SPLIT_OF}
    return found.pop() if len(found) == 1 else split_of(path.parent)


def read(tree: Tree, val: float, seed: int) -> Found:
    """Raises:
    FastViTError: several files of one split, other categories in one, or images that are missing.
    """
    by_split: dict = {}
    for path in files(tree):
        split = split_of_file(path) if not tree.asked else None
        if other := by_split.get(split):
            names = f'{tree.root / other} and {tree.root / path}'
            raise FastViTError(f'{names} are both for {split or "all"}: give one with --data FILE')
        by_split[split] = path
    unused = by_split.pop(None) if 'train' in by_split and None in by_split else None
    complete = [add_areas(files(tree)[one]) for one in by_split.values()]
    for path in by_split.values():
        check_content(files(tree)[path], tree.root / path)
    categories = used_categories([files(tree)[one] for one in by_split.values()])
    ids = [one['id'] for one in categories]
    for path in by_split.values():
        check_same(categories, files(tree)[path], tree.root / path)
    folders = {s: image_folder(tree, p) for s, p in by_split.items()}
    whole = 'train' in by_split and 'val' in by_split and all(complete)
    splits = {s: images_of(tree, p, ids, folders[s]) for s, p in by_split.items()}
    parts, how = divide(splits, val, seed)
    classes = tuple(str(one['name']) for one in categories)
    found = Found('COCO file' + 's' * (len(by_split) > 1), tree.root, classes, parts, how)
    if whole:
        found.details.update(files={s: str(p) for s, p in by_split.items()}, folders=folders)
    if unused:
        found.say(f'note: {unused} is for no split: not used')
    found.lines += shared(splits)
    return found


def add_areas(content: dict) -> bool:
    """Give objects without an area that of their box; whether none lacked one."""
    lacking = [
        o for o in content['annotations'] if 'area' not in o and len(o.get('bbox') or ()) == 4
    ]
    for one in lacking:
        one['area'] = one['bbox'][2] * one['bbox'][3]
    return not lacking


def check_content(content: dict, path: Path) -> None:
    """Raises:
    FastViTError: a run would refuse the file.
    """
    from fastvit_mm.data.coco import problems
    from fastvit_mm.data.problems import STOPS

    if bad := next((one for one in problems(content, str(path)) if one.level == STOPS), None):
        raise FastViTError(bad)


def shared(splits: dict[str, list[dict]]) -> list[str]:
    """Lines about images that are in two splits."""
    names = {split: {one['file_name'] for one in images} for split, images in splits.items()}
    pairs = [(a, b, names[a] & names[b]) for a, b in combinations(names, 2)]
    return [f'note: {len(both)} images are both in {a} and {b}' for a, b, both in pairs if both]


def used_categories(contents: list[dict]) -> list[dict]:
    """Those of the first file in the order of their ids, without a mere heading of the others."""
    categories = sorted(contents[0]['categories'], key=lambda one: one['id'])
    used = {one['category_id'] for c in contents for one in c['annotations']}
    above = {one.get('supercategory') for one in categories}
    kept = [one for one in categories if one['id'] in used or one['name'] not in above]
    return kept or categories


def check_same(categories: list[dict], content: dict, path: Path) -> None:
    there = {one['id']: one['name'] for one in content['categories']}
    known = {one['id'] for one in categories}
    for one in content['annotations']:
        if (number := one.get('category_id')) not in known and number in there:
            name = f'{number} {there[number]!r}'
            raise FastViTError(f'{path} has objects of the category {name}, another file lacks it')
    for one in categories:
        if there.get(one['id']) != one['name']:
            other = there.get(one['id'], 'nothing')
            raise FastViTError(
                f'{path} calls the category {one["id"]} {other!r}, another file {one["name"]!r}: '
                'they must have the same categories'
            )


def inside(tree: Tree, folder: Path, name) -> Path:
    """The image of this name relative to the root."""
    path = folder / str(name)
    return path.relative_to(tree.root) if path.is_relative_to(tree.root) else path


def image_folder(tree: Tree, path: Path) -> str:
    """The folder to which a file's names are relative: it has all of them.

    Raises:
        FastViTError: there is none, or several.
    """
    names = [one['file_name'] for one in files(tree)[path]['images']]
    if not names:
        raise FastViTError(f'{tree.root / path} lists no images')
    if all(inside(tree, Path(), one) in tree.known for one in names):
        return '.'
    folders = {up for one in tree.images for up in one.parents}
    folders = {one for one in folders if inside(tree, one, names[0]) in tree.known}
    if not folders:
        raise FastViTError(f'{tree.root / path}: its image {names[0]} is missing under {tree.root}')
    there = {one: sum(inside(tree, one, n) in tree.known for n in names) for one in folders}
    best = max(sorted(there), key=there.get)
    if there[best] < len(names):
        missing = next(n for n in names if inside(tree, best, n) not in tree.known)
        state = f'{missing} is missing under {tree.root}, {there[best]} are in {best}'
        raise FastViTError(f'{tree.root / path}: of its {len(names)} images, {state}')
    whole = [one for one in sorted(folders) if there[one] == len(names)]
    split = split_of_file(path)
    own = [one for one in whole if split and split_of(one) == split]
    own = [one for one in own or whole if one == path.parent] or own or whole
    if len(own) > 1:
        both = f'both {own[0]} and {own[1]}'
        raise FastViTError(f'{tree.root / path}: {both} have its images: leave one of them')
    return own[0].as_posix()


def images_of(tree: Tree, path: Path, ids: list, folder: str) -> list[dict]:
    """Images with their annotations, whose categories become places among ``ids``.

    Raises:
        FastViTError: an image has another size than the file says; the first few are opened.
    """
    content, objects = files(tree)[path], {}
    for one in content['annotations']:
        new = {k: v for k, v in one.items() if k not in ('id', 'image_id')}
        objects.setdefault(one['image_id'], []).append(
            dict(new, category_id=ids.index(one['category_id']))
        )
    found = [
        dict(
            file_name=inside(tree, Path(folder), one['file_name']).as_posix(),
            width=one['width'],
            height=one['height'],
            annotations=objects.get(one['id'], []),
        )
        for one in content['images']
    ]
    for one in found[:: -(-len(found) // MOST_OPENED)]:
        stated = one['width'], one['height']
        checked_size(tree, Path(one['file_name']), stated, tree.root / path)
    return found
