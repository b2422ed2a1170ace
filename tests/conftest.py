import itertools
import json
import os
import signal
import time

import hypothesis
import pytest
import torch
from filelock import FileLock
from mmengine.registry import DefaultScope

# The same few examples in every run; `HYPOTHESIS_PROFILE=long` runs many, others each time, and
# prints what reproduces a failure.
hypothesis.settings.register_profile(
    'suite', deadline=None, max_examples=25, derandomize=True, database=None
)
hypothesis.settings.register_profile('long', deadline=None, max_examples=2000, print_blob=True)
hypothesis.settings.load_profile(os.environ.get('HYPOTHESIS_PROFILE', 'suite'))

# PyTorch starts its threads for gradients in the first backward pass. If that were one on a fake
# device (torch.compile), no forked process could train.
torch.zeros(1, requires_grad=True).sum().backward()

runs = itertools.count()


@pytest.fixture(autouse=True)
def runs_of_their_own(monkeypatch):
    """mmengine names a run by its second, and gives two runs of one name in one process the same
    logger and visualizer. Here tools run in one process: every run gets a number as well."""
    strftime = time.strftime

    def numbered(form, *args):
        text = strftime(form, *args)
        return f'{text}_{next(runs)}' if form == '%Y%m%d_%H%M%S' else text

    monkeypatch.setattr(time, 'strftime', numbered)


@pytest.fixture(autouse=True)
def no_handlers_of_another_test():
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def no_scope_of_another_test():
    """A runner leaves its default scope behind, in which the next test would look up names."""
    yield
    DefaultScope._instance_dict.clear()


@pytest.fixture(autouse=True)
def same_weights_in_any_order():
    """Random weights must not depend on which tests ran before."""
    torch.manual_seed(0)


@pytest.fixture(scope='session')
def once(tmp_path_factory):
    """once(name, compute) returns what compute() does (JSON); one of all test processes runs it."""
    folder = tmp_path_factory.getbasetemp()
    if 'PYTEST_XDIST_WORKER' in os.environ:
        folder = folder.parent

    def result(name, compute):
        file = folder / f'{name}.json'
        with FileLock(folder / f'{name}.lock'):
            if not file.exists():
                file.write_text(json.dumps(compute()))
        return json.loads(file.read_text())

    return result
