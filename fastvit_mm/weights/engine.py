"""mmengine's ways to load a checkpoint: safe for every model, strict for those with a FastViT."""

from pathlib import Path

import mmengine.runner
import torch.nn as nn
from mmengine.model.weight_init import PretrainedInit
from mmengine.runner import checkpoint as mmengine_checkpoint

from fastvit_mm.errors import FastViTError

from .files import read
from .loading import has_fastvit, load

#: mmengine's own: with strict=False, a file whose names do not match silently loads nothing.
lenient = PretrainedInit.__call__
lenient_load = mmengine_checkpoint.load_checkpoint
PLAIN = [(r'^module\.', '')]  # its default for `revise_keys`


def initialize(self: PretrainedInit, module: nn.Module) -> None:
    """What ``init_cfg=dict(type='Pretrained', checkpoint=..., prefix=...)`` does to ``module``."""
    if has_fastvit(module):
        # A runner has built its optimizer by now: the parameters must stay.
        load(module, self.checkpoint, prefix=self.prefix, switch=False)
    else:
        lenient(self, module)


def load_from_fastvit_mm(filename: str, map_location=None) -> dict:
    """A checkpoint from a file, a URL or a root of the file client."""
    return read(filename, map_location)


def load_from_openmmlab(filename: str, map_location=None) -> dict:
    """A published checkpoint, ``open-mmlab://NAME``, or one listed in $MMENGINE_HOME."""
    name = filename.partition('://')[2]
    name = mmengine_checkpoint.get_deprecated_model_names().get(name, name)
    place = mmengine_checkpoint.get_external_models().get(name)
    if place is None:
        raise FastViTError(f'{filename}: OpenMMLab publishes no weights of this name')
    if '://' not in place:
        place = Path(mmengine_checkpoint._get_mmengine_home(), place)
    return read(place, map_location)


def load_checkpoint(
    model: nn.Module,
    filename: str,
    map_location=None,
    strict: bool = False,
    logger=None,
    revise_keys=PLAIN,
) -> dict:
    """mmengine's function, as mmpretrain's ``get_model(name, pretrained=True)`` calls it.

    For a model with a FastViT, the file is read to the CPU, whatever ``map_location`` says, its
    weights are copied to where the model is, and messages go to the current logger. What has
    imported mmengine's function by name before ``fastvit_mm`` was imported keeps that one.

    Raises:
        FastViTError: a model with a FastViT and ``revise_keys`` of the caller's own; see also
            :func:`load`.
    """
    if not has_fastvit(model):
        return lenient_load(model, filename, map_location, strict, logger, revise_keys)
    if revise_keys != PLAIN:
        raise FastViTError(
            f'{filename}: revise_keys is not known here, where names of weights are recognized: '
            'leave it out'
        )
    return load(model, filename, whole=strict)


# mmengine's loaders that read files; the others (torchvision://, mmcls://) call load_from_http.
LOADERS = {
    'load_from_local': load_from_fastvit_mm,
    'load_from_http': load_from_fastvit_mm,
    'load_from_ceph': load_from_fastvit_mm,
    'load_from_pavi': load_from_fastvit_mm,
    'load_from_openmmlab': load_from_openmmlab,
}


def install() -> None:
    """Make mmengine load through this package; calling it twice has no further effect.

    - Its loaders fall back to an unsafe load, or leave safety to torch's defaults, so that a file
      can run code. :func:`read` replaces them, for every model; third-party loaders stay.
    - Its ``Pretrained`` and ``load_checkpoint`` become strict for modules that contain a FastViT.
    """
    PretrainedInit.__call__ = initialize
    mmengine.runner.load_checkpoint = mmengine_checkpoint.load_checkpoint = load_checkpoint
    loader = mmengine_checkpoint.CheckpointLoader
    for prefix, function in list(loader._schemes.items()):
        if function.__module__ == mmengine_checkpoint.__name__ and function.__name__ in LOADERS:
            loader.register_scheme(prefix, LOADERS[function.__name__], force=True)
    for name, function in LOADERS.items():
        setattr(mmengine_checkpoint, name, function)
