"""Reading data sets, and telling what is wrong with them."""

from .listing import build_checked
from .paths import check_data, expected_paths
from .problems import NOTE, SPOILS, STOPS, Problem
from .reading import decode, explain, guard
from .sets import datasets_in

__all__ = [
    'NOTE',
    'SPOILS',
    'STOPS',
    'Problem',
    'build_checked',
    'check_data',
    'datasets_in',
    'decode',
    'expected_paths',
    'explain',
    'guard',
]
