"""Objects in COCO's form, from corners or outlines in pixels."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from fastvit_mm.errors import FastViTError

from .tree import Tree, size_of


def from_corners(label: int, left: float, top: float, right: float, bottom: float, size) -> dict:
    """An object with a box, cut at the borders of the image; corners in any order."""
    (left, right), (top, bottom) = sorted((left, right)), sorted((top, bottom))
    width, height = size
    left, right = max(left, 0), min(right, width)
    top, bottom = max(top, 0), min(bottom, height)
    box = [left, top, right - left, bottom - top]
    return dict(category_id=label, bbox=box, area=box[2] * box[3], iscrowd=0)


def from_polygons(label: int, polygons: Sequence[Sequence[float]], size) -> dict:
    """An object of one or more outlines x, y, x, y, ...; its parts must not overlap."""
    width, height = size
    inside = [
        [min(max(v, 0), height if i % 2 else width) for i, v in enumerate(one)] for one in polygons
    ]
    xs = [v for one in inside for v in one[::2]]
    ys = [v for one in inside for v in one[1::2]]
    new = from_corners(label, min(xs), min(ys), max(xs), max(ys), size)
    return dict(new, area=sum(map(area, inside)), segmentation=inside)


def area(polygon: Sequence[float]) -> float:
    """In square pixels; by the shoelace formula."""
    xs, ys = polygon[::2], polygon[1::2]
    return abs(sum(xs[i - 1] * ys[i] - xs[i] * ys[i - 1] for i in range(len(xs)))) / 2


def entry(tree: Tree, path: Path, objects: Iterable[dict], size: tuple[int, int]) -> dict:
    """An image of a data set; objects without any extent are left out."""
    kept = [one for one in objects if one['bbox'][2] > 0 and one['bbox'][3] > 0]
    width, height = size
    return dict(file_name=path.as_posix(), width=width, height=height, annotations=kept)


def checked_size(tree: Tree, path: Path, stated: tuple, source: Path) -> tuple[int, int]:
    """The size of an image, which must be the one that its annotations state, if they do.

    Raises:
        FastViTError: it is another one.
    """
    actual = size_of(tree.root / path)
    if all(stated) and tuple(stated) != actual:
        turned = ' when turned upright by its EXIF data' if stated == actual[::-1] else ''
        raise FastViTError(
            f'{tree.root / path} has {actual[0]} x {actual[1]} pixels{turned}, but {source} is for '
            f'{stated[0]} x {stated[1]}'
        )
    return actual


def one_image(tree: Tree, path: Path, given: Path, folders: Iterable[Path]) -> Path:
    """The image that an annotation file belongs to: of its own name, or else the one it names.

    Args:
        path: the annotation file.
        given: the image that it names; files that were renamed or copied name another one.
        folders: where the image may lie.

    Raises:
        FastViTError: there is none, or several.
    """
    folders = list(folders)
    exact = next((one / given.name for one in folders if one / given.name in tree.known), None)
    if exact and exact.stem == path.stem:
        return exact
    own = [tree.image_at(one / path.stem) for one in folders]
    if found := next(filter(None, [*own, exact]), None):
        return found
    same = tree.by_name.get(given.name, [])
    if len(same) == 1:
        return same[0]
    state = 'is missing' if not same else f'exists {len(same)} times'
    source = tree.root / path
    raise FastViTError(f'{source}: its image {given.name} {state} under {tree.root}')


def claim(claimed: dict[Path, Path], image: Path, path: Path) -> None:
    """Note the annotation file of an image.

    Raises:
        FastViTError: it has another one already.
    """
    if (other := claimed.setdefault(image, path)) != path:
        raise FastViTError(f'{other} and {path} are both for {image}: mend the names or leave one')


def without(tree: Tree, claimed: dict[Path, Path], what: str) -> list[str]:
    """A line about the images that have no annotation file."""
    rest = [one for one in tree.images if one not in claimed]
    return [f'note: {len(rest)} images have no {what}: not used: {rest[0]} ...'] if rest else []
