"""Mistakes in a config and in ``--cfg-options``, found before anything is built.

:func:`check` looks at a config, :func:`merge` changes settings of one; both say in one line what
is wrong, with its place and the nearest known name. Where they cannot tell, as with what a
project's own classes take, they leave it to the run. They judge by signatures, by the source of
OpenMMLab's packages and by how near a name is to a known one: a config that runs should pass, and
one that is refused although it does is a bug of theirs.
"""

from .check import PREDICT, TEST, TRAIN, check
from .options import OptionsAction, merge
from .widths import check_widths

__all__ = ['PREDICT', 'TEST', 'TRAIN', 'OptionsAction', 'check', 'check_widths', 'merge']
