"""Mistakes in a config and in ``--cfg-options``, found before anything is built.

:func:`check` looks at a config, :func:`merge` changes settings of one; both say in one line what
is wrong, with its place and the nearest known name. What they cannot know for certain they leave
to the run: no config that runs is refused.
"""

from .check import PREDICT, TEST, TRAIN, check
from .options import OptionsAction, merge
from .widths import check_widths

__all__ = ['PREDICT', 'TEST', 'TRAIN', 'OptionsAction', 'check', 'check_widths', 'merge']
