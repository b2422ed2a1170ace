"""``--demo``: any config as a small run on generated scenes, with nothing downloaded."""

from .config import apply_demo
from .scenes import make_data

__all__ = ['apply_demo', 'make_data']
