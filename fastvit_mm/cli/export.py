"""Export a model to a file that runs elsewhere, and check that it computes the same:
python tools/export.py CONFIG CHECKPOINT --format onnx|torch|openvino|coreml --out FILE ...
"""

import sys
from pathlib import Path

from . import options


def main(argv: list[str] | None = None) -> None:
    parser = options.config_parser('Export a model with merged branches, and verify the file.')
    parser.add_argument('checkpoint', help='file, URL or short name of the weights')
    parser.add_argument('--format', default='onnx', help='onnx, torch, openvino or coreml (onnx)')
    parser.add_argument(
        '--out', required=True, help='file to write: .onnx, .pt2, .xml or .mlpackage'
    )
    options.size_argument(parser)
    parser.add_argument(
        '--dynamic',
        action='store_true',
        help='accept any number of images of any size (detectors always accept any size)',
    )
    parser.add_argument('--batch', type=options.positive, default=1, help='images per batch (1)')
    parser.add_argument('--half', action='store_true', help='compute in float16 (torch: bfloat16)')
    parser.add_argument(
        '--with-preprocess',
        action='store_true',
        help='take uint8 RGB, (B, H, W, 3), and normalize inside',
    )
    parser.add_argument(
        '--output',
        choices=['logits', 'probabilities', 'labels'],
        help='output of a classifier (logits, probabilities) or a segmentor (logits, labels)',
    )
    parser.add_argument(
        '--with-hand-model',
        action='store_true',
        help="put MANO's arrays into the file, which its licence does not let you pass on",
    )
    args = parser.parse_args(argv)

    import fastvit_mm
    from fastvit_mm import launch
    from fastvit_mm.errors import FastViTError
    from fastvit_mm.export import FORMATS, export, verify
    from fastvit_mm.export.inputs import description, images, test_sizes
    from fastvit_mm.export.verify import move_aside

    if args.format not in FORMATS:
        raise FastViTError(f'--format {args.format}: give one of {", ".join(FORMATS)}')
    chosen, path = FORMATS[args.format], Path(args.out)
    if path.suffix != chosen.suffix:
        raise FastViTError(
            f'--out {path}: with --format {args.format}, give a file that ends in {chosen.suffix}'
        )
    cfg = launch.load_config(args)
    model = fastvit_mm.init_model(cfg, args.checkpoint)
    (size, *others), origin = ([tuple(args.size)], '') if args.size else test_sizes(model, cfg)
    info = export(
        model,
        path,
        args.format,
        size=size,
        batch=args.batch,
        dynamic=args.dynamic,
        preprocess=args.with_preprocess,
        half=args.half,
        output='vertices' if args.with_hand_model else args.output,
    )
    try:
        verdict = verify(model, path, images(cfg, size, info['size'] is None))
    except BaseException:
        move_aside(path)  # it was not verified
        raise
    if not verdict.explained:
        aside = move_aside(path)
        print(f'{path} does NOT compute what the model does: {verdict.text}; it is now {aside}')
        sys.exit(1)
    if others and info['size']:
        print(
            f"note: the test's images have other sizes too, such as {others[0][0]} x "
            f'{others[0][1]}: --dynamic takes all',
            file=sys.stderr,
        )
    print(f'{path}: {verdict.text}')
    print(f'takes  {description(info)}' + (f', {origin}' if origin and info['size'] else ''))
    print(f'gives  {", ".join(info["outputs"])}; {len(info["classes"])} class names inside')
