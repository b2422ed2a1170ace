"""Train SA36 for segmentation on generated data, test it in both forms, compare them."""

import argparse

from fastvit_mm import launch
from fastvit_mm.demo.whole_run import whole_run


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    launch.debug_argument(parser)
    parser.parse_args(argv)
    whole_run()
