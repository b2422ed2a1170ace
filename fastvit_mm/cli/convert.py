"""Convert weights between the names of timm, the authors and OpenMMLab:
python tools/convert_weights.py SRC DST [--to timm|apple|mm] [--deploy] [--prefix PART] [--force]
"""

from . import options


def main(argv: list[str] | None = None) -> None:
    parser = options.parser(
        'Convert weights between the layouts of timm, the authors and OpenMMLab.'
    )
    parser.add_argument('src', help='file, URL or short name of the weights, in any layout')
    parser.add_argument('dst', help='file to write: .pth, .pth.tar or .safetensors')
    parser.add_argument(
        '--to', choices=['timm', 'apple', 'mm'], default='mm', help='layout to write (mm)'
    )
    parser.add_argument(
        '--deploy',
        action='store_true',
        help="write the deploy form: merged completely for mm, otherwise timm's and the authors'",
    )
    parser.add_argument(
        '--prefix', help='convert only weights that start with PREFIX, if SRC has several models'
    )
    parser.add_argument('--force', action='store_true', help='overwrite DST')
    options.debug_argument(parser)
    args = parser.parse_args(argv)

    from fastvit_mm import weights

    converted = weights.convert_file(
        args.src, args.dst, args.to, args.deploy, args.prefix, args.force
    )
    form = 'deploy' if args.deploy else 'training'
    print(f'{args.dst}: {converted.tensors} tensors, layout {args.to}, {form} form')
    if converted.left_out:
        print(f'left out, unknown to {args.to}: {weights.first(converted.left_out)}')
