"""Convert weights between the names of timm, the authors and OpenMMLab:
python tools/convert_weights.py SRC DST [--to timm|apple|mm] [--deploy] [--prefix PART] [--force]
"""

import argparse

from fastvit_mm import launch, weights


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description='Convert weights between the layouts of timm, the authors and OpenMMLab.'
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
    launch.debug_argument(parser)
    args = parser.parse_args(argv)

    dst = weights.check_target(args.dst, args.force)
    checkpoint = weights.read(args.src, select=None if args.prefix else weights.only_encoder)
    state = weights.state_dict_of(checkpoint, args.src)
    state = weights.part_of(state, args.prefix, args.src)
    converted = weights.convert(state, args.to, args.deploy, args.src)
    content = converted if args.to == 'timm' else dict(state_dict=converted)  # as each project does
    if args.to == 'mm' and (meta := checkpoint.get('meta')):
        content['meta'] = {k: v for k, v in meta.items() if k == 'dataset_meta'}
    weights.save(content, dst)

    form = 'deploy' if args.deploy else 'training'
    print(f'{dst}: {len(converted)} tensors, layout {args.to}, {form} form')
    if args.to != 'mm':
        others = [k for k in weights.to_mm(state) if not weights.SHARED.match(k)]
        if others:
            print(f'left out, unknown to {args.to}: {weights.first(others)}')


if __name__ == '__main__':
    launch.run(main)
