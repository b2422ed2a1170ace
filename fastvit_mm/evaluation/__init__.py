"""Judging a model: robustness on images other than those of the validation set."""

from .catalogue import ROOTS, TITLES, Catalogue, published
from .corruption_error import ALEXNET, CORRUPTIONS, SEVERITIES, corruption_errors, mce
from .corruptions import CorruptImage
from .picture import plot
from .real_labels import RealAccuracy
from .report import Report
from .robustness import Plan, Result, forms, measure, plan

__all__ = [
    'ALEXNET',
    'CORRUPTIONS',
    'ROOTS',
    'SEVERITIES',
    'TITLES',
    'Catalogue',
    'CorruptImage',
    'Plan',
    'RealAccuracy',
    'Report',
    'Result',
    'corruption_errors',
    'forms',
    'mce',
    'measure',
    'plan',
    'plot',
    'published',
]
