"""Look at a data set of your own and write a config that learns it:
fastvit init OUT --task classification|detection|segmentation --data PATH [--arch t8] ...

Reads class folders, images with masks, COCO json, YOLO labels, Pascal VOC and LabelMe. It never
changes the data.
"""

from . import options

TASKS = ('classification', 'detection', 'segmentation')


def main(argv: list[str] | None = None) -> None:
    parser = options.parser(__doc__)
    parser.add_argument('out', metavar='OUT', help='folder to write: config.py, lists, annotations')
    parser.add_argument('--task', required=True, choices=TASKS)
    parser.add_argument(
        '--data', required=True, metavar='PATH', help="folder, COCO json or YOLO's yaml"
    )
    parser.add_argument('--arch', default='t8', help='variant: t8 (default), t12, s12, sa12 ...')
    parser.add_argument(
        '--pretrained',
        default='none',
        metavar='NAME',
        help='weights to start from: a short name such as fastvit_t8.apple_in1k, a file, or none',
    )
    parser.add_argument('--val', type=float, default=0.2, help='fraction kept for validation (0.2)')
    parser.add_argument('--seed', type=int, default=0, help='of what is drawn for validation (0)')
    parser.add_argument('--overwrite', action='store_true', help="replace an earlier call's files")
    parser.add_argument(
        '--layout',
        choices=['coco', 'yolo', 'voc', 'labelme'],
        help='detection: one of several',
    )
    parser.add_argument('--names', metavar='FILE', help="segmentation: names of the masks' ids")
    parser.add_argument(
        '--unlabelled', metavar='ID', help="segmentation: the id without a class, or 'none'"
    )
    options.debug_argument(parser)
    args = vars(parser.parse_args(argv))
    args.pop('debug')
    if args['pretrained'] == 'none':
        args['pretrained'] = None

    from fastvit_mm.init import init

    print('\n'.join(init(**args)))
