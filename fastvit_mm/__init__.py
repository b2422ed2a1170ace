"""FastViT for OpenMMLab: importing this package registers the backbone, the neck and the hook."""

from importlib.util import find_spec

if not (find_spec('mmengine') and find_spec('mmcv')):
    raise ImportError(
        'fastvit_mm needs OpenMMLab: pip install fastvit_mm[onedl] (maintained) '
        'or pip install fastvit_mm[openmmlab] (the original packages)'
    )

from . import inheritance, mmcv_ops

inheritance.install()
mmcv_ops.install()  # before anything imports mmcv.ops

from . import weights  # noqa: E402

weights.install()  # mmengine then loads weights safely, and FastViT's strictly

from .apis import inference, init_model  # noqa: E402
from .errors import FastViTError  # noqa: E402
from .hooks import ReparameterizeHook  # noqa: E402
from .models import ARCHS, FastViT, FastViTNeck  # noqa: E402
from .reparameterize import reparameterize  # noqa: E402

__version__ = '0.1.0'
__all__ = [
    'ARCHS',
    'FastViT',
    'FastViTError',
    'FastViTNeck',
    'ReparameterizeHook',
    'inference',
    'init_model',
    'reparameterize',
]
