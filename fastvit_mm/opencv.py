"""OpenCV's threads, and processes that are forked."""

from collections.abc import Iterator
from contextlib import contextmanager

import cv2


@contextmanager
def without_threads() -> Iterator[None]:
    """OpenCV computes in the calling thread alone, also in processes that are forked meanwhile.

    They could not ask for it themselves: changing the number of threads after a fork waits forever
    for threads that only the parent has.
    """
    number = cv2.getNumThreads()
    cv2.setNumThreads(0)
    try:
        yield
    finally:
        cv2.setNumThreads(number)
