import itertools
import time

import pytest
from mmengine.registry import DefaultScope

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
def no_scope_of_another_test():
    """A runner leaves its default scope behind, in which the next test would look up names."""
    yield
    DefaultScope._instance_dict.clear()
