"""Test a checkpoint or an exported file:
python tools/test.py CONFIG CHECKPOINT|FILE.onnx|FILE.pt2|FILE.xml [--reparam] [--demo] ...
"""

from fastvit_mm import launch
from fastvit_mm.cli.test import main

if __name__ == '__main__':
    launch.run(main)
