"""Convert weights between the names of timm, the authors and OpenMMLab:
python tools/convert_weights.py SRC DST [--to timm|apple|mm] [--deploy] [--prefix PART] [--force]
"""

from fastvit_mm import launch
from fastvit_mm.cli.convert import main

if __name__ == '__main__':
    launch.run(main)
