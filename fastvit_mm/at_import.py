"""What importing fastvit_mm changes in OpenMMLab's packages, all of it, and why.

``FASTVIT_MM_INSTALL=0`` in the environment leaves it out. Then call :func:`fastvit_mm.install`
before anything imports mmdet.
"""

import os

from . import inheritance, mmcv_ops


def install() -> None:
    """Make OpenMMLab's packages usable, safe and strict; doing it twice changes nothing."""
    # mmcv's compiled operators don't build on a current PyTorch, and without them no model of
    # mmdet can be imported: `mmcv._ext` is answered by torchvision, unless the real one is there.
    mmcv_ops.install()
    # `_base_ = 'fastvit_mm::...'` in the configs of other projects.
    inheritance.install()
    # mmengine loads weights unsafely, and with `Pretrained` nothing at all if no name matches.
    from . import weights

    weights.install()


def wanted() -> bool:
    return os.environ.get('FASTVIT_MM_INSTALL', '1') != '0'
