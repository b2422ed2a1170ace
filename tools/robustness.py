"""Measure robustness, section 4.2 of the paper (docs/robustness.md):
python tools/robustness.py CONFIG CHECKPOINT|FILE.onnx|FILE.pt2|FILE.xml --sets c a r sketch real
  [--reparam] [--demo] [--json FILE] [--out DIR] ...
"""

from fastvit_mm import launch
from fastvit_mm.cli.robustness import main

if __name__ == '__main__':
    launch.run(main)
