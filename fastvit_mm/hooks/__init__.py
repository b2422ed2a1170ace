"""Hooks for mmengine's runner, one per file; any config can use each on its own."""

from .accumulate import AccumulateHook
from .after_failure import AfterFailureHook
from .early_stop import EarlyStopHook
from .finite_loss import FiniteLossHook
from .reparameterize import ReparameterizeHook
from .screen import ScreenHook
from .stop_on_signal import StopOnSignalHook
from .sync_statistics import SyncStatisticsHook
from .test_report import TestReportHook
from .whole_checkpoint import WholeCheckpointHook

__all__ = [
    'AccumulateHook',
    'AfterFailureHook',
    'EarlyStopHook',
    'FiniteLossHook',
    'ReparameterizeHook',
    'ScreenHook',
    'StopOnSignalHook',
    'SyncStatisticsHook',
    'TestReportHook',
    'WholeCheckpointHook',
]
