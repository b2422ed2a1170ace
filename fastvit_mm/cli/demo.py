"""Train SA36 for segmentation on generated data, test it in both forms, compare them."""

import argparse

from . import options


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    options.debug_argument(parser)
    parser.parse_args(argv)

    from fastvit_mm.demo.whole_run import whole_run

    whole_run()
