"""Weights from files: read without running code, recognized by their keys, loaded strictly.

There are four layouts of FastViT's weights: the authors', timm's, ours, and whole OpenMMLab models
with a FastViT backbone; the first two also within a larger model, as its image encoder. All are
converted to the names of the last (``backbone.*``, ``neck.*``, ``head.*``).
"""

from .engine import install
from .files import find, read, save, state_dict_of
from .forms import convert
from .layouts import (
    SHARED,
    arch_of,
    authors_to_timm,
    describe,
    part_of,
    recognize,
    timm_to_authors,
    to_mm,
)
from .loading import drop_pretrained, load, prepare
from .states import first
from .whole_files import convert_file

__all__ = [
    'SHARED',
    'arch_of',
    'authors_to_timm',
    'convert',
    'convert_file',
    'describe',
    'drop_pretrained',
    'find',
    'first',
    'install',
    'load',
    'part_of',
    'prepare',
    'read',
    'recognize',
    'save',
    'state_dict_of',
    'timm_to_authors',
    'to_mm',
]
