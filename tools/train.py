"""Train a config:
python tools/train.py CONFIG [--demo] [--resume [auto|FILE]] [--overwrite] [--amp [fp16|bf16]] ...
"""

from fastvit_mm import launch
from fastvit_mm.cli.train import main

if __name__ == '__main__':
    launch.run(main)
