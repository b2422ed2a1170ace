"""One process per side: memory settings (``mallopt``) hold for a whole process, so that in a shared
one the second side would get those that the first one made."""

import gc
from collections.abc import Callable
from functools import wraps
from multiprocessing.connection import Connection

import torch
import torch.multiprocessing


def settle(threads: int) -> None:
    """The settings of PyTorch under which everything is measured."""
    torch.set_num_threads(threads)
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = False  # fp32 means fp32


class Side:
    """A process that makes calls and measures them.

    Use it as a context manager; the process ends with the block.
    """

    def __init__(self, threads: int):
        context = torch.multiprocessing.get_context('spawn')
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=serve, args=(other, threads), daemon=True)
        self.process.start()
        other.close()

    def make(self, function: Callable[..., dict[str, Callable]], *args) -> dict[str, 'Call']:
        """Keep the calls that ``function(*args)`` returns there, instead of earlier ones."""
        return {name: Call(self, name) for name in self.ask(None, function, *args)}

    def ask(self, *request):
        self.pipe.send(request)
        answer = self.pipe.recv()
        if isinstance(answer, Exception):
            raise answer
        return answer

    def __enter__(self) -> 'Side':
        return self

    def __exit__(self, *_) -> None:
        self.pipe.close()
        self.process.join(10)
        self.process.kill()


@torch.no_grad()
def serve(pipe: Connection, threads: int) -> None:
    settle(threads)
    gc.disable()  # a collection would slow down one side at random
    calls = {}
    while True:
        try:
            name, function, *args = pipe.recv()
        except EOFError:
            return
        try:
            if name is None:
                calls = {}
                torch._dynamo.reset()
                gc.collect()
                calls = function(*args)
                pipe.send(list(calls))
            else:
                calls[name]()  # caches and cores still belong to the other side
                pipe.send(function(calls[name], *args))
        except Exception as error:
            pipe.send(error)


class Call:
    """A call in another process; returns its outputs."""

    def __init__(self, side: Side, name: str):
        self.side, self.name = side, name

    def __call__(self):
        return self.apply(outputs)

    def apply(self, function: Callable, *args):
        """``function(call, *args)``, computed in the other process."""
        return self.side.ask(self.name, function, *args)


def outputs(call: Callable):
    return call()


def where_it_runs(function: Callable) -> Callable:
    """Make a measurement of a call take place in the call's process."""

    @wraps(function)
    def measured(call, *args):
        apart = isinstance(call, Call)
        return call.apply(measured, *args) if apart else function(call, *args)

    return measured
