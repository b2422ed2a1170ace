"""What happens beside the network: reading the next images, drawing the last ones."""

import multiprocessing
import os
import pickle
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import torch

from fastvit_mm.errors import FastViTError, one_line
from fastvit_mm.opencv import without_threads

READ = 4  # images that are read before they are needed
PROCESSES = 4  # at most


def ahead(items: Iterable, number: int = READ) -> Iterator:
    """``items`` in their order, ``number`` of them read before they are asked for."""
    source, end = iter(items), object()
    pool = ThreadPoolExecutor(1)
    try:
        coming = deque(pool.submit(next, source, end) for _ in range(number))
        while (item := coming.popleft().result()) is not end:
            coming.append(pool.submit(next, source, end))
            yield item
    finally:
        pool.shutdown(cancel_futures=True)


class Beside:
    """Calls a function in processes of its own, or, with 0 of them, at once in this one.

    Threads would not do: matplotlib keeps Python's lock, for which the network would then wait at
    each of its layers. The processes are forked, so that the function may be anything; they end
    with this one.
    """

    def __init__(self, function: Callable, processes: int):
        self.function, self.pool = function, None
        if processes:
            self.pool = ProcessPoolExecutor(
                processes, multiprocessing.get_context('fork'), begin, (function,)
            )
            with without_threads():
                self.pool.submit(int).result()  # forks now, while no other thread is at work

    def __enter__(self) -> 'Beside':
        return self

    def __exit__(self, *error) -> None:
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)

    def submit(self, name: str, *args) -> Future:
        """Call the function with ``args``.

        Returns:
            what gives its result, or raises its error: a FastViTError or OSError as it is,
            another one with ``name`` in front.
        """
        if self.pool is None:
            future = Future()
            try:
                future.set_result(attempt(self.function, name, args))
            except Exception as error:
                future.set_exception(error)
            return future
        # Pickled here: PyTorch would put every tensor of a queue into shared memory.
        try:
            return self.pool.submit(call, name, pickle.dumps(args))
        except BrokenProcessPool as error:
            raise died(name) from error

    @staticmethod
    def result(name: str, future: Future):
        try:
            return future.result()
        except BrokenProcessPool as error:
            raise died(name) from error


def died(name: str) -> RuntimeError:
    return RuntimeError(f'{name}: the process that drew it was killed: is there enough memory?')


def number_of_processes() -> int:
    if sys.platform != 'linux':  # where a fork is not safe, or does not exist
        return 0
    return min(PROCESSES, len(os.sched_getaffinity(0)))


function: Callable | None = None  # of a process that was forked to call it


def begin(wanted: Callable) -> None:
    """What such a process does first."""
    global function
    function = wanted
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that forked it
    torch.set_num_threads(1)
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def call(name: str, args: bytes):
    return attempt(function, name, pickle.loads(args))


def attempt(function: Callable, name: str, args: Iterable):
    try:
        return function(*args)
    except (FastViTError, OSError):
        raise
    except Exception as error:
        # An error of another library may not survive the way to the other process.
        text = f'{name}: cannot be drawn: {type(error).__name__}: {one_line(error)}'
        raise RuntimeError(text) from error  # whose traceback the pool passes on as text
