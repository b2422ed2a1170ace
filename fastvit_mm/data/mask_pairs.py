"""Images and masks by a list of pairs; the masks hold any ids or colours."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
from mmseg.datasets import BaseSegDataset
from mmseg.datasets.transforms import LoadAnnotations
from mmseg.registry import DATASETS, TRANSFORMS

from fastvit_mm.errors import FastViTError

from .problems import Problem
from .reading import bad, opened

IGNORED = 255  # mmseg's label of pixels without one
GREY = 0x010101


def code(one: int | str) -> int:
    """The number of an id or of a colour such as '#80ff00'."""
    return one if isinstance(one, int) else int(one.removeprefix('#'), 16)


def read_ids(path: str | Path, colours: bool = False) -> np.ndarray:
    """The ids of a mask's pixels as they are in the file: (H, W), int64.

    Args:
        colours: gives red * 65536 + green * 256 + blue; otherwise a mask must be grey, or have a
            palette, whose indices are the ids.

    Raises:
        FastViTError: a colour where an id was expected.
    """
    with opened(path) as mask:
        palette = mask.mode == 'P' and not colours
        pixels = np.asarray(mask if palette or len(mask.getbands()) == 1 else mask.convert('RGB'))
        if mask.mode == 'P' and colours:
            pixels = np.asarray(mask.convert('RGB'))
    pixels = pixels.astype(np.int64)
    if pixels.ndim == 2:
        return pixels * GREY if colours else pixels
    packed = pixels @ (65536, 256, 1)
    if colours:
        return packed
    if (packed != pixels[..., 0] * GREY).any():
        raise bad(path, 'is a colour image, but the class ids of the config are numbers')
    return pixels[..., 0]


@cache
def lookup(ids: tuple, unlabelled: tuple) -> tuple[np.ndarray, np.ndarray]:
    """The known numbers in order, and the label of each."""
    labels = {code(one): IGNORED for one in unlabelled}
    labels |= {code(one): label for label, one in enumerate(ids)}
    known = sorted(labels)
    return np.array(known), np.array([labels[one] for one in known], np.uint8)


def name_of(number: int, colours: bool) -> str:
    return f'colour #{number:06x}' if colours else f'class id {number}'


@TRANSFORMS.register_module()
class MappedLoadAnnotations(LoadAnnotations):
    """Loads a mask of :class:`MaskPairs`: its ids become labels 0, 1, ...

    Raises:
        FastViTError: the mask has an id that is neither a class nor unlabelled.
    """

    def _load_seg_map(self, results: dict) -> None:
        ids, unlabelled = results['mask_ids']
        colours = any(isinstance(one, str) for one in ids)
        path = results['seg_map_path']
        found = read_ids(path, colours)
        known, labels = lookup(ids, unlabelled)
        places = np.searchsorted(known, found).clip(max=len(known) - 1)
        if (other := found[known[places] != found]).size:
            has = name_of(int(other[0]), colours)
            raise bad(path, f'has the {has}, which is not in the config (ids, unlabelled)')
        results['gt_seg_map'] = labels[places]
        results['seg_fields'].append('gt_seg_map')


@DATASETS.register_module()
class MaskPairs(BaseSegDataset):
    """Images and masks of any names.

    Args:
        ann_file: lines of an image and its mask, separated by a tab, relative to ``data_root``.
        ids: what each class has in the masks, in the order of ``metainfo.classes``: numbers of
            0 to 65535, or colours such as '#80ff00'.
        unlabelled: numbers or colours of pixels that are neither learned nor measured.

    Raises:
        FastViTError: not as many ids as classes, more than 255, or a line without a tab.
    """

    def __init__(self, ids: Sequence, unlabelled: Sequence = (), metainfo=None, **kwargs):
        classes = (metainfo or {}).get('classes', ())
        if len(ids) != len(classes) or not len(ids):
            raise FastViTError(f'MaskPairs has {len(ids)} ids for {len(classes)} classes')
        if len(ids) > IGNORED:
            raise FastViTError(f'MaskPairs has {len(ids)} classes, but labels are 0 to 254')
        self.ids = tuple(ids), tuple(unlabelled)
        super().__init__(metainfo=metainfo, **kwargs)

    def load_data_list(self) -> list[dict]:
        root, samples = Path(self.data_root or ''), []
        lines = Path(self.ann_file).read_text(encoding='utf-8').splitlines()
        for number, line in enumerate(lines, 1):
            image, tab, mask = line.partition('\t')
            if not tab:
                wrong = f'has {line[:60]!r} in line {number}, no image and mask separated by a tab'
                raise FastViTError(Problem(str(self.ann_file), wrong))
            samples.append(
                dict(
                    img_path=str(root / image),
                    seg_map_path=str(root / mask),
                    mask_ids=self.ids,
                    label_map=None,
                    reduce_zero_label=False,
                    seg_fields=[],
                )
            )
        return samples
