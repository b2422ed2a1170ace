"""Train SA36 for segmentation on generated data, test it in both forms, compare them."""

from . import options


def main(argv: list[str] | None = None) -> None:
    parser = options.parser(__doc__)
    options.debug_argument(parser)
    parser.parse_args(argv)

    from fastvit_mm.demo.whole_run import whole_run

    whole_run()
