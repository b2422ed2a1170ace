"""Measure fastvit_mm against timm and other networks:
python tools/benchmark.py COMMAND [--json F] [--plot F] [--doc F#S] ...; --help lists the commands
"""

from fastvit_mm import launch
from fastvit_mm.cli.benchmark import main

if __name__ == '__main__':
    launch.run(main)
