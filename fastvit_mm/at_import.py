"""Everything that importing fastvit_mm changes in OpenMMLab's packages, and why.

To prevent it, set ``FASTVIT_MM_INSTALL=0`` in the environment and call
:func:`fastvit_mm.install` yourself, before anything imports mmdet.
"""

import os

from . import inheritance, mmcv_ops, model_hub, noise


def install() -> None:
    """Make OpenMMLab's packages usable, safe and strict; calling it twice has no further effect."""
    # mmcv's compiled operators don't build on a current PyTorch, and without them no model of
    # mmdet can be imported: torchvision stands in for `mmcv._ext` unless the real one exists.
    mmcv_ops.install()
    # Messages that say nothing, or nothing true; before the modules that print on import.
    noise.install()
    # `_base_ = 'fastvit_mm::...'` in the configs of other projects.
    inheritance.install()
    # `mmpretrain.list_models` and `get_model` know its own models only.
    model_hub.install()
    # mmengine loads weights unsafely, and loads nothing if no name matches.
    from . import weights

    weights.install()


def wanted() -> bool:
    return os.environ.get('FASTVIT_MM_INSTALL', '1') != '0'
