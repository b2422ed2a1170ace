"""Visualize predictions:
python tools/infer.py CONFIG CHECKPOINT_OR_EXPORTED IMAGE|FOLDER|VIDEO|- --out D [--json] ...
"""

from fastvit_mm import launch
from fastvit_mm.cli.infer import main

if __name__ == '__main__':
    launch.run(main)
