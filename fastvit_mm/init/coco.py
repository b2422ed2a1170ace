"""COCO's json files: used as they are where there is one for each split."""

from pathlib import Path

from fastvit_mm.errors import FastViTError

from .found import Found
from .tree import Tree, divide, split_of

NEEDED = ('images', 'annotations', 'categories')


def lies_in(tree: Tree) -> str | None:
    found = files(tree)
    return f'{len(found)} json file{"s" * (len(found) != 1)}' if found else None


def files(tree: Tree) -> dict[Path, dict]:
    """COCO files and their contents; of those that COCO itself comes with, the instances."""
    if not hasattr(tree, 'coco'):
        paths = tree.of('.json')
        if tree.asked and tree.asked.suffix == '.json':
            paths = [tree.asked.relative_to(tree.root)]
        some = [one for one in paths if one.name.startswith('instances_')] or paths
        contents = {one: tree.json(one) for one in some}
        tree.coco = {
            p: c for p, c in contents.items() if isinstance(c, dict) and set(NEEDED) <= {*c}
        }
    return tree.coco


def read(tree: Tree, val: float, seed: int) -> Found:
    """Raises:
    FastViTError: several files of one split, other categories in one, or images that are missing.
    """
    by_split: dict = {}
    for path in files(tree):
        split = split_of(path) if not tree.asked else None
        if other := by_split.get(split):
            names = f'{tree.root / other} and {tree.root / path}'
            raise FastViTError(f'{names} are both for {split or "all"}: give one with --data FILE')
        by_split[split] = path
    if len(by_split) > 1:
        by_split.pop(None, None)
    categories = used_categories([files(tree)[one] for one in by_split.values()])
    ids = [one['id'] for one in categories]
    for path in by_split.values():
        check_same(categories, files(tree)[path], tree.root / path)
    folders = {s: image_folder(tree, p) for s, p in by_split.items()}
    whole = 'train' in by_split and 'val' in by_split
    splits = {
        s: images_of(files(tree)[p], ids, folders[s], tree.root / p) for s, p in by_split.items()
    }
    parts, how = divide(splits, val, seed)
    classes = tuple(str(one['name']) for one in categories)
    found = Found('COCO file' + 's' * (len(by_split) > 1), tree.root, classes, parts, how)
    if whole:
        found.details.update(files={s: str(p) for s, p in by_split.items()}, folders=folders)
    return found


def used_categories(contents: list[dict]) -> list[dict]:
    """Those of the first file in the order of their ids, without a mere heading of the others."""
    categories = sorted(contents[0]['categories'], key=lambda one: one['id'])
    used = {one['category_id'] for c in contents for one in c['annotations']}
    above = {one.get('supercategory') for one in categories}
    kept = [one for one in categories if one['id'] in used or one['name'] not in above]
    return kept or categories


def check_same(categories: list[dict], content: dict, path: Path) -> None:
    there = {one['id']: one['name'] for one in content['categories']}
    for one in categories:
        if there.get(one['id']) != one['name']:
            other = there.get(one['id'], 'nothing')
            raise FastViTError(
                f'{path} calls the category {one["id"]} {other!r}, another file {one["name"]!r}: '
                'they must have the same categories'
            )


def image_folder(tree: Tree, path: Path) -> str:
    """The folder to which a file's names are relative.

    Raises:
        FastViTError: no folder has its first image.
    """
    images = files(tree)[path]['images']
    if not images:
        raise FastViTError(f'{tree.root / path} lists no images')
    name, known = Path(str(images[0]['file_name'])), set(tree.images)
    folders = sorted({one.parent for one in tree.images} | {path.parent, Path()})
    split = split_of(path)
    folders.sort(key=lambda one: (split is not None and split_of(one) != split, one != path.parent))
    found = next((one for one in folders if one / name in known), None)
    if found is None:
        raise FastViTError(f'{tree.root / path}: its image {name} is missing under {tree.root}')
    return found.as_posix()


def images_of(content: dict, ids: list, folder: str, path: Path) -> list[dict]:
    """Images with their annotations, whose categories become places among ``ids``."""
    objects: dict = {}
    for one in content['annotations']:
        if one['category_id'] not in ids:
            raise FastViTError(
                f'{path} has no category {one["category_id"]!r}, used in annotations'
            )
        new = {k: v for k, v in one.items() if k not in ('id', 'image_id')}
        objects.setdefault(one['image_id'], []).append(
            dict(new, category_id=ids.index(one['category_id']))
        )
    return [
        dict(
            file_name=(Path(folder) / str(one['file_name'])).as_posix(),
            width=one['width'],
            height=one['height'],
            annotations=objects.get(one['id'], []),
        )
        for one in content['images']
    ]
