"""Read every image of a config's data sets and list what is wrong:
python tools/check_data.py CONFIG [--demo] [--json FILE] [--workers N]
"""

from fastvit_mm import launch
from fastvit_mm.cli.check import main

if __name__ == '__main__':
    launch.run(main)
