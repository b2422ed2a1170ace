"""Images and masks: which belong together, which ids occur, and what they are called."""

import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from fastvit_mm.data.reading import opened, why_undecodable
from fastvit_mm.errors import FastViTError

from .found import Found
from .names import read_names
from .tree import IMAGE, MASK, Tree, divide, size_of, split_of
from .voc import split_lists

UNLABELLED = {'unlabelled', 'unlabeled', 'void', 'ignore', 'ignored', 'undefined', 'unknown'}
UNLABELLED |= {'nolabel', 'notlabelled', 'notlabeled'}
MOST_READ = 2000  # masks; more are read in steps
MOST_IDS = 256


def word(pattern: str, text: str) -> bool:
    return re.search(rf'(?:^|[\W_])(?:{pattern})(?:$|[\W_\d])', text, re.I) is not None


def is_mask_folder(name: str) -> bool:
    """'masks', 'train_labels', 'trainannot', 'SegmentationClass'."""
    glued = re.fullmatch(rf'(?:train|val|valid|test)(?:{MASK})', name, re.I)
    return bool(glued) or word(MASK, name)


def in_masks(path: Path) -> bool:
    """Whether the deepest of its folders that says anything is one of masks."""
    for name in reversed(path.parent.parts):
        if is_mask_folder(name) or word(IMAGE, name):
            return is_mask_folder(name)
    return False


def looks_like_masks(folders: Iterable[str]) -> bool:
    """Whether these are folders of images and of masks rather than classes."""
    folders = list(folders)
    masks = [one for one in folders if is_mask_folder(one)]
    return bool(masks) and any(word(IMAGE, one) for one in folders)


def key(path: Path) -> tuple:
    """What an image and its mask have in common: folders and name without the words above."""
    both = f'{MASK}|{IMAGE}'

    def bare(text: str) -> str:
        text = re.sub(rf'^(train|val|valid|test)(?:{MASK})$', r'\1', text, flags=re.I)
        while (less := re.sub(rf'(^|[\W_])(?:{both})($|[\W_])', r'\1', text, flags=re.I)) != text:
            text = less
        return text.strip('_-. ').lower()

    return (*filter(None, map(bare, path.parent.parts)), bare(path.stem))


def pair(tree: Tree) -> tuple[list[tuple[Path, Path]], list[Path]]:
    """Images with their masks, and images without.

    Raises:
        FastViTError: no masks, or several for one image, or several images for one.
    """
    marked = {one for one in tree.images if in_masks(one)}
    marked = marked or {one for one in tree.images if word(MASK, one.stem)} or beside(tree)
    plain = [one for one in tree.images if one not in marked]
    masks: dict[tuple, Path] = {}
    for one in sorted(marked):
        if (other := masks.setdefault(key(one), one)) is not one:
            raise FastViTError(
                f'{other} and {one} are both masks of one image: leave one kind of masks in --data'
            )
    images: dict[tuple, Path] = {}
    for one in plain:
        if key(one) in masks and (other := images.setdefault(key(one), one)) is not one:
            raise FastViTError(f'{other} and {one} are both images of {masks[key(one)]}: leave one')
    pairs = [(image, masks[same]) for same, image in images.items() if same in masks]
    if not pairs:
        raise FastViTError(
            f'{tree}, but {len(marked)} masks for {len(plain)} images, none of the same name: put '
            'images into images/ and masks into masks/ with the same names, such as a.jpg and a.png'
        )
    return pairs, [one for one in plain if key(one) not in masks]


def beside(tree: Tree) -> set[Path]:
    """PNGs that lie beside a JPEG of the same name."""
    jpegs = {p.with_suffix('') for p in tree.of('.jpg', '.jpeg')}
    return {p for p in tree.of('.png') if p.with_suffix('') in jpegs}


def check_sizes(tree: Tree, pairs: list[tuple[Path, Path]]) -> None:
    """Raises:
    FastViTError: a mask has another size than its image, or is none.
    """
    for image, mask in pairs:
        size = size_of(tree.root / image)
        try:
            with opened(tree.root / mask) as content:
                other = content.size
        except Exception as error:  # each format has its own errors
            path = tree.root / mask
            raise FastViTError(f'{path} {why_undecodable(path)}') from error
        if size != other:
            has = f'{size[0]} x {size[1]} pixels, its mask {mask} {other[0]} x {other[1]}'
            raise FastViTError(f'{tree.root / image} has {has}')


def count_ids(paths: list[Path]) -> tuple[Counter, bool]:
    """In how many masks each id occurs, and whether the ids are colours.

    Raises:
        FastViTError: more ids than any data set has classes: no masks of classes.
    """
    some = paths[:: -(-len(paths) // MOST_READ)]
    palette: dict[int, tuple] = {}
    found: Counter = Counter()
    for path in some:
        if (ids := ids_in(path, palette)) is None:
            break
        found.update(ids)
        check_number(found, path)
    else:
        return found, False
    found = Counter()
    for path in some:
        found.update(distinct(path, colours=True))
        check_number(found, path)
    return found, True


def ids_in(path: Path, palette: dict[int, tuple]) -> list[int] | None:
    """The ids of a mask; None if it has colours, or a palette with another colour for an id.

    Args:
        palette: colours by id of other masks; those of this one are added.
    """
    try:
        ids = distinct(path)
    except NotIds:
        return None
    with opened(path) as mask:
        entries = mask.getpalette() if mask.mode == 'P' else None
    for one in ids if entries else ():
        colour = tuple(entries[3 * one : 3 * one + 3])
        if palette.setdefault(one, colour) != colour:
            return None
    return ids


def distinct(path: Path, colours: bool = False) -> list[int]:
    """The numbers that occur in a mask, in order.

    Raises:
        FastViTError: it cannot be read; :class:`NotIds` where it has colours.
    """
    from fastvit_mm.data.mask_pairs import read_ids

    try:
        pixels = read_ids(path, colours)
    except FastViTError as error:
        raise NotIds(str(error)) from error
    except Exception as error:  # each format has its own errors
        raise FastViTError(f'{path} {why_undecodable(path)}') from error
    if pixels.min() >= 0 and pixels.max() < 65536:  # sorting takes a second for a photo
        return np.flatnonzero(np.bincount(pixels.ravel())).tolist()
    return np.unique(pixels).tolist()


class NotIds(FastViTError):
    """A mask has colours."""


def check_number(found: Counter, path: Path) -> None:
    if len(found) <= MOST_IDS:
        return
    lossy = path.suffix.lower() in ('.jpg', '.jpeg')
    why = 'JPEG blurs them: export PNG' if lossy else 'these are no masks of classes'
    raise FastViTError(f'{path}: the masks have more than {MOST_IDS} ids; {why}')


def as_written(number: int, colours: bool) -> int | str:
    return f'#{number:06x}' if colours else number


def choose_unlabelled(ids: list, names: dict, given: str | None) -> tuple[list, str]:
    """Ids that are no class, and why."""
    if given == 'none':
        return [], ''
    if given is not None:
        wanted = given.lower() if given.startswith('#') else given
        if wanted not in (texts := {str(one): one for one in ids}):
            known = ', '.join(list(texts)[:20])
            raise FastViTError(f'--unlabelled {given} is no id of the masks; they have {known}')
        return [texts[wanted]], 'as --unlabelled says'
    named = [i for i in ids if re.sub(r'[\W_]', '', names.get(i, '')).lower() in UNLABELLED]
    if named:
        return named, 'by its name'
    if names and 0 in ids and 0 not in names and set(ids) - {0, 255} <= set(names):
        return [i for i in (0, 255) if i in ids and i not in names], 'as the names begin with 1'
    if 255 in ids and 255 not in names and len(ids) > 2:
        return [255], 'the usual id for that'
    return [], ''


def default_name(one: int | str, ids: list) -> str:
    if one in (0, '#000000'):
        return 'background'
    beside_background = len(ids) == 2 and ids[0] in (0, '#000000')
    return 'object' if beside_background else f'class_{str(one).removeprefix("#")}'


def find(
    tree: Tree, val: float, seed: int, names: str | None = None, unlabelled: str | None = None
) -> Found:
    """Images and masks in folders of any names.

    ``details`` has ``ids`` and ``unlabelled`` as they are written in the config.

    Raises:
        FastViTError: no masks, or masks of no use; says why.
    """
    pairs, without = pair(tree)
    check_sizes(tree, pairs[:: -(-len(pairs) // MOST_READ)])
    counts, colours = count_ids([tree.root / mask for _, mask in pairs])
    ids = [as_written(one, colours) for one in sorted(counts)]
    known, source, notes = read_names(tree, ids, names)
    ignored, why = choose_unlabelled(ids, known, unlabelled)
    # A class that no mask shows keeps its place: an export of a larger set has the same labels.
    kept = [one for one in known if one not in ignored] if known else []
    kept += [one for one in ids if one not in ignored and one not in known]
    if len(kept) < 2:
        raise FastViTError(
            f'the masks of {tree.root} have {len(kept)} class ({ids}): two are needed; '
            '--unlabelled none makes a class of every id'
        )
    splits: dict = {}
    listed = split_lists(tree, 'Segmentation', {image.stem for image, _ in pairs})
    for image, mask in pairs:
        split = split_of(image.parent) or split_of(mask.parent)
        splits.setdefault(listed.get(image.stem) if listed else split, []).append((image, mask))
    parts, how = divide(splits, val, seed)
    classes = tuple(known.get(one) or default_name(one, kept) for one in kept)
    details = dict(ids=tuple(kept), unlabelled=tuple(ignored))
    found = Found('images and masks', tree.root, classes, parts, how, details=details)
    shown = [f'{one} = {name}' for one, name in zip(kept, classes, strict=True)][:30]
    more = ' ...' if len(kept) > 30 else ''
    found.say(f'ids: {", ".join(shown)}{more}; names from {source or "nowhere: edit classes"}')
    found.lines += notes
    if ignored:
        found.say(f'unlabelled: {", ".join(map(str, ignored))} ({why})')
    else:
        found.say('unlabelled: none of the ids; --unlabelled ID says which is')
    if without:
        found.say(f'note: {len(without)} images without a mask are not used: {without[0]} ...')
    return found
