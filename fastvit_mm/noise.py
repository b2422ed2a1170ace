"""Known messages of the libraries that say nothing, or nothing true, to whoever runs a model.

Each is left out by its own words, so that a message nobody has seen before stays visible. The log
file of a run keeps them, and ``--debug`` shows them.
"""

import functools
import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from mmengine import logging as mmlogging
from mmengine.logging import logger as mmlogger

# How a message begins, and why it is of no use.
KNOWN = (
    # mmdet looks for an alternative that our configs don't use
    'faster_coco_eval is not installed, metrics will not be computed',
    # the loss as it is meant
    'Default ``avg_non_ignore`` is False',
    # mmseg's heads build their own losses
    '``build_loss`` would be deprecated soon',
    # mmseg's names of metrics have no prefix
    'The prefix is not set in metric class',
    # how mmengine's own checkpoint hook opens a file
    '"FileClient" will be deprecated in future',
    '"HardDiskBackend" is the alias of "LocalBackend"',
)
# What pycocotools prints while it works.
PROGRESS = (
    'loading annotations into memory...',
    'creating index...',
    'index created!',
    'Loading and preparing results...',
    'Running per image evaluation...',
    'Evaluate annotation type *',
    'Accumulating evaluation results...',
    'Done (t=',
    'DONE (t=',
)
everything = False


def known(text: str) -> bool:
    """Whether a log message is left out on the screen."""
    return not everything and text.startswith(KNOWN)


def install() -> None:
    """Leave them out from now on; calling it twice has no further effect."""
    for text in KNOWN:
        warnings.filterwarnings('ignore', re.escape(text))
    if not hasattr(mmlogger.print_log, '__wrapped__'):
        mmlogger.print_log = mmlogging.print_log = with_level(mmlogger.print_log)


def show_everything() -> None:
    """Undo :func:`install`."""
    global everything
    everything = True
    for text in KNOWN:
        warnings.filterwarnings('default', re.escape(text))


@contextmanager
def without(text: str) -> Iterator[None]:
    """Leave out a warning that begins so, even if a library resets the filters before it."""
    with warnings.catch_warnings(record=not everything) as caught:
        yield
    for one in caught or ():
        if not str(one.message).startswith(text):
            warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)


def print_unknown(*texts, **how) -> None:
    """The ``print`` of pycocotools' modules."""
    if everything or not str(texts[:1] and texts[0]).startswith(PROGRESS):
        print(*texts, **how)


def with_level(print_log):
    """mmengine's ``print_log`` prints messages for debugging ("Could not import OneDL") as well if
    it gets no logger."""

    @functools.wraps(print_log)
    def wrapper(msg, logger=None, level=logging.INFO):
        if logger is not None or level >= logging.INFO or everything:
            print_log(msg, logger, level)

    return wrapper
