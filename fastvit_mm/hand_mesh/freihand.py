"""FreiHAND v2, read from its own files."""

import warnings
from pathlib import Path

import numpy as np
from mmengine.dataset import BaseDataset
from mmengine.registry import DATASETS

from fastvit_mm.errors import FastViTError, one_line

#: The training images come in versions, one block of numbers after the other.
VERSIONS = {'training': ('gs', 'hom', 'sample', 'auto'), 'evaluation': ('gs',)}
SHAPES = dict(K=(3, 3), xyz=(21, 3), verts=(778, 3), mano=(1, 61))
SYNTAX = b'[] \t\r\n'


def read_list(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """A JSON list of arrays of one shape, (N, *shape) float32.

    Without a JSON parser, which needs gigabytes for the 76 million numbers of the vertices.

    Raises:
        FastViTError: a file that is missing, damaged, or holds anything else.
    """
    if not path.is_file():
        raise FastViTError(f'{path} is missing: it is part of FreiHAND v2')
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('error')  # it would stop at what is no number
            numbers = np.fromstring(path.read_bytes().translate(None, SYNTAX), np.float32, sep=',')
    except (ValueError, DeprecationWarning) as error:
        raise FastViTError(f'{path} cannot be read: {one_line(error)}') from error
    each = int(np.prod(shape))
    if not numbers.size or numbers.size % each or not np.isfinite(numbers).all():
        wanted = ' x '.join(map(str, shape))
        raise FastViTError(f'{path} does not hold {wanted} finite numbers per sample')
    return numbers.reshape(-1, *shape)


@DATASETS.register_module()
class FreiHAND(BaseDataset):
    """``<split>/rgb/<number>.jpg`` and ``<split>_{K,xyz,verts,mano}.json`` of FreiHAND v2.

    Each sample has ``img_path``, ``K`` (3, 3), ``xyz`` (21, 3) and ``verts`` (778, 3) in metres in
    the camera's space, and in training ``mano`` (61,).

    Args:
        split: ``training`` (four versions of every image) or ``evaluation``.

    Raises:
        FastViTError: missing lists or images, lists of different lengths, points behind the camera.
    """

    def __init__(self, split: str, **settings):
        if split not in VERSIONS:
            raise FastViTError(f'split {split!r} is not one of {", ".join(VERSIONS)}')
        self.split = split
        super().__init__(**settings)

    def load_data_list(self) -> list[dict]:
        root = Path(self.data_root)
        names = ('K', 'xyz', 'verts', *(('mano',) if self.split == 'training' else ()))
        self.labels = {
            name: read_list(root / f'{self.split}_{name}.json', SHAPES[name]) for name in names
        }
        lengths = {name: len(values) for name, values in self.labels.items()}
        if len(set(lengths.values())) > 1:
            raise FastViTError(
                f'the lists {self.split}_*.json in {root} differ in length: {lengths}'
            )
        for name in ('xyz', 'verts'):
            behind = (self.labels[name][..., 2] <= 0).any(1)
            if behind.any():
                raise FastViTError(
                    f'{root}/{self.split}_{name}.json: sample {behind.argmax()} has points behind '
                    'the camera'
                )
        return self.find_images(root / self.split / 'rgb', lengths['K'])

    def find_images(self, folder: Path, number: int) -> list[dict]:
        found = {path.name for path in folder.glob('*.jpg')}
        wanted = []
        for block, version in enumerate(VERSIONS[self.split]):
            names = [f'{i + block * number:08d}.jpg' for i in range(number)]
            if missing := [name for name in names if name not in found]:
                raise FastViTError(
                    f'{folder} lacks {len(missing)} of {number} images of version {version}, such '
                    f'as {missing[0]}: {self.split}_K.json lists {number}'
                )
            wanted += [dict(img_path=str(folder / n), index=i) for i, n in enumerate(names)]
        if len(found) > len(wanted):
            raise FastViTError(
                f'{folder} has {len(found)} images, the lists {len(wanted)}: {self.split}_K.json '
                f'lists {number}'
            )
        return wanted

    def get_data_info(self, idx: int) -> dict:
        info = super().get_data_info(idx)
        index = info['index']
        return {**info, **{name: values[index].copy() for name, values in self.labels.items()}}
