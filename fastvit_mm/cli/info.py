"""What a config's model consists of and costs, in the training and in the deploy form:
python tools/info.py CONFIG [--size H W] ...
"""

from . import options


def main(argv: list[str] | None = None) -> None:
    parser = options.config_parser('Layers, parameters, multiply-adds and memory of a model.')
    options.size_argument(parser)
    args = parser.parse_args(argv)

    import fastvit_mm
    from fastvit_mm import launch
    from fastvit_mm.complexity import compare
    from fastvit_mm.export.inputs import test_sizes

    cfg = launch.load_config(args)
    model = fastvit_mm.init_model(cfg)
    print(compare(model, tuple(args.size) if args.size else test_sizes(model, cfg)[0][0]))
