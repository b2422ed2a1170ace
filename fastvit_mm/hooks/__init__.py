"""Hooks for mmengine's runner: one file each, usable alone from any config."""

from .reparameterize import ReparameterizeHook
from .sync_statistics import SyncStatisticsHook

__all__ = ['ReparameterizeHook', 'SyncStatisticsHook']
