"""What importing the package changes elsewhere is listed in one place, and can be left out."""

import os
import subprocess
import sys

import pytest

LOOK = """
from mmengine.config import Config
from mmengine.model.weight_init import PretrainedInit
from mmengine.runner import CheckpointLoader
import sys

def ours():
    finder = any(f.__module__.startswith('fastvit_mm') for f in sys.meta_path)
    return [
        finder,
        'fastvit_mm' in Config._get_cfg_path.__module__,
        'fastvit_mm' in PretrainedInit.__call__.__module__,
        'fastvit_mm' in CheckpointLoader._schemes[''].__module__,
    ]

print(ours())
import fastvit_mm
print(ours())
fastvit_mm.install()
print(ours())
state = len(sys.meta_path), Config._get_cfg_path, dict(CheckpointLoader._schemes)
fastvit_mm.install()
print(state == (len(sys.meta_path), Config._get_cfg_path, dict(CheckpointLoader._schemes)))
import mmdet.models
"""


@pytest.mark.parametrize('setting', [None, '0', '1'])
def test_all_or_nothing(setting):
    env = {k: v for k, v in os.environ.items() if k != 'FASTVIT_MM_INSTALL'}
    env |= {} if setting is None else {'FASTVIT_MM_INSTALL': setting}
    run = subprocess.run([sys.executable, '-c', LOOK], env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-800:]
    nothing, everything = str([False] * 4), str([True] * 4)
    after_import = nothing if setting == '0' else everything
    assert run.stdout.splitlines() == [nothing, after_import, everything, 'True']
