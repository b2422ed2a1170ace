"""Hooks for mmengine's runner, one per file; any config can use each on its own."""

from .finite_loss import FiniteLossHook
from .reparameterize import ReparameterizeHook
from .stop_on_signal import StopOnSignalHook
from .sync_statistics import SyncStatisticsHook
from .whole_checkpoint import WholeCheckpointHook

__all__ = [
    'FiniteLossHook',
    'ReparameterizeHook',
    'StopOnSignalHook',
    'SyncStatisticsHook',
    'WholeCheckpointHook',
]
