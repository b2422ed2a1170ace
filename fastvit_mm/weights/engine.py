"""mmengine's ways to load a checkpoint: safe for every model, strict where a FastViT is in it."""

from pathlib import Path

import torch.nn as nn
from mmengine.model.weight_init import PretrainedInit
from mmengine.registry import WEIGHT_INITIALIZERS
from mmengine.runner import checkpoint as mmengine_checkpoint

from fastvit_mm.errors import FastViTError

from .files import read
from .loading import has_fastvit, load


class Pretrained(PretrainedInit):
    """mmengine's ``Pretrained``, but strict for models with a FastViT in them.

    mmengine loads with strict=False: a file whose names do not match loads nothing, in silence.
    """

    def __call__(self, module: nn.Module) -> None:
        if has_fastvit(module):
            load(module, self.checkpoint, prefix=self.prefix)
        else:
            super().__call__(module)


def load_from_fastvit_mm(filename: str, map_location=None) -> dict:
    """A checkpoint from a file, an address or a root of the file client."""
    return read(filename, map_location)


def load_from_openmmlab(filename: str, map_location=None) -> dict:
    """A published checkpoint, ``open-mmlab://NAME``, or one that $MMENGINE_HOME names."""
    name = filename.partition('://')[2]
    name = mmengine_checkpoint.get_deprecated_model_names().get(name, name)
    place = mmengine_checkpoint.get_external_models().get(name)
    if place is None:
        raise FastViTError(f'{filename}: OpenMMLab publishes no weights of this name')
    if '://' not in place:
        place = Path(mmengine_checkpoint._get_mmengine_home(), place)
    return read(place, map_location)


# mmengine's loaders that read files; the others (torchvision://, mmcls://) call load_from_http.
LOADERS = {
    'load_from_local': load_from_fastvit_mm,
    'load_from_http': load_from_fastvit_mm,
    'load_from_ceph': load_from_fastvit_mm,
    'load_from_pavi': load_from_fastvit_mm,
    'load_from_openmmlab': load_from_openmmlab,
}


def install() -> None:
    """Make mmengine load through this package; doing it twice changes nothing.

    - Its loaders fall back to an unsafe load, or leave safety to torch's defaults: a file then runs
      code. They are replaced by :func:`read`, for every model. Those that others registered stay.
    - Its ``Pretrained`` is replaced by ours.
    """
    WEIGHT_INITIALIZERS.register_module(name='Pretrained', force=True, module=Pretrained)
    loader = mmengine_checkpoint.CheckpointLoader
    for prefix, function in list(loader._schemes.items()):
        if function.__module__ == mmengine_checkpoint.__name__ and function.__name__ in LOADERS:
            loader.register_scheme(prefix, LOADERS[function.__name__], force=True)
    for name, function in LOADERS.items():
        setattr(mmengine_checkpoint, name, function)
