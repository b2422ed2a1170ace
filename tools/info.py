"""What a config's model consists of and costs, in the training and in the deploy form:
python tools/info.py CONFIG [--size H W] ...
"""

from fastvit_mm import launch
from fastvit_mm.cli.info import main

if __name__ == '__main__':
    launch.run(main)
