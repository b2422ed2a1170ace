"""Hooks for mmengine's runner, one per file; any config can use each on its own."""

from .accumulate import AccumulateHook
from .after_failure import AfterFailureHook
from .reparameterize import ReparameterizeHook
from .sync_statistics import SyncStatisticsHook

__all__ = ['AccumulateHook', 'AfterFailureHook', 'ReparameterizeHook', 'SyncStatisticsHook']
