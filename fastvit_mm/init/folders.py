"""Images in folders that are named as their classes."""

from pathlib import Path

from fastvit_mm.errors import FastViTError

from .found import Found
from .masks import looks_like_masks
from .tree import Tree, divide, split_of


def find(tree: Tree, val: float, seed: int) -> Found:
    """Class folders, under train/, val/ and test/ or under none.

    Raises:
        FastViTError: there are none, or only one.
    """
    root = descend(tree)
    splits, beside, classes = {}, [], set()
    named = split_folders(tree, root)
    for path in tree.images:
        inside = path.relative_to(root)
        split = named.get(inside.parts[0]) if len(inside.parts) > 1 else None
        parts = inside.parts[1:] if split else inside.parts
        if len(parts) < 2:
            beside.append(path)
            continue
        classes.add(parts[0])
        splits.setdefault(split, []).append((path, parts[0]))
    if splits.get('train') and splits.get(None):  # folders beside train/ are no classes
        beside += [path for path, _ in splits.pop(None)]
        classes = {name for samples in splits.values() for _, name in samples}
    names = sorted(classes)
    check(tree, names)
    labels = {name: label for label, name in enumerate(names)}
    labelled = {s: [(p, labels[n]) for p, n in found] for s, found in splits.items()}
    parts, how = divide(labelled, val, seed, lambda samples: [label for _, label in samples])
    found = Found('class folders', tree.root, tuple(names), parts, how)
    for split in ('train', 'val'):
        seen = {label for _, label in parts[split]}
        if lacking := [name for i, name in enumerate(names) if i not in seen]:
            found.say(f'note: no images of {", ".join(lacking[:5])} in {split}')
    if beside:
        found.say(f'note: {len(beside)} images outside class folders are not used: {beside[0]} ...')
    return found


def split_folders(tree: Tree, root: Path) -> dict[str, str]:
    """The split of each folder in the root that is named as one; nothing if these are classes of
    that name: others have images, and none of these has folders."""
    inside = [one.relative_to(root).parts for one in tree.images if one.is_relative_to(root)]
    folders = {parts[0] for parts in inside if len(parts) > 1}
    named = {one: split for one in folders if (split := split_of(one))}
    nested = {parts[0] for parts in inside if len(parts) > 2}
    return named if named.keys() & nested or named.keys() == folders else {}


def descend(tree: Tree) -> Path:
    """The folder with the classes or splits: archives often have a single folder around them."""
    folder = Path()
    while True:
        below = {one.relative_to(folder).parts for one in tree.images if one.is_relative_to(folder)}
        first = {parts[0] for parts in below}
        if len(first) != 1 or split_of(*first) or any(len(parts) < 3 for parts in below):
            return folder
        folder /= first.pop()


def check(tree: Tree, names: list[str]) -> None:
    if len(names) > 1 and not looks_like_masks(names):
        return
    if looks_like_masks(names):
        raise FastViTError(
            f'{tree}, among them masks ({", ".join(names)}): use --task segmentation'
        )
    if not tree.images:
        raise FastViTError(f'{tree}, but no images')
    raise FastViTError(
        f'{tree}, but {"a single class folder" if names else "no class folders"}: put the images '
        'of each class into a folder of its name'
    )
