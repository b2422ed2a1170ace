"""FastViT for OpenMMLab: importing this package registers the backbone, the neck and the hook."""

from importlib.util import find_spec

from . import cli

if cli.only_explains():  # without the seconds that the rest takes
    cli.main()

if not (find_spec('mmengine') and find_spec('mmcv')):
    raise ImportError(
        "fastvit_mm needs OpenMMLab's packages: in its checkout, pip install '.[onedl]' "
        "(maintained) or pip install '.[openmmlab]' (the original ones)"
    )

from . import at_import
from .at_import import install

if at_import.wanted():
    install()  # before anything imports mmcv.ops

from .apis import inference, init_model
from .configs import list_models
from .errors import FastViTError
from .hooks import ReparameterizeHook
from .models import ARCHS, FastViT, FastViTNeck
from .reparameterize import reparameterize

__version__ = '0.1.0'
__all__ = [
    'ARCHS',
    'FastViT',
    'FastViTError',
    'FastViTNeck',
    'ReparameterizeHook',
    'inference',
    'init_model',
    'install',
    'list_models',
    'reparameterize',
]
