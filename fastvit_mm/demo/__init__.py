"""``--demo``: a small run of any config on generated scenes, without downloads."""

from .config import apply_demo
from .scenes import make_data

__all__ = ['apply_demo', 'make_data']
