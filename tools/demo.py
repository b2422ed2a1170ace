"""Run by `make demo`: train SA36 for segmentation, test it in both forms, compare them."""

from fastvit_mm import launch
from fastvit_mm.cli.demo import main

if __name__ == '__main__':
    launch.run(main)
