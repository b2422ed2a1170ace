"""Plot training logs: python tools/plot_log.py WORK_DIR [WORK_DIR ...] [--out FILE.png]"""

from fastvit_mm import launch
from fastvit_mm.cli.plot import main

if __name__ == '__main__':
    launch.run(main)
