"""Test a checkpoint or an exported file:
python tools/test.py CONFIG CHECKPOINT|FILE.onnx|FILE.pt2|FILE.xml [--reparam] [--demo] ...
"""

import json
from pathlib import Path

from . import options


def main(argv: list[str] | None = None) -> None:
    parser = options.argument_parser('Test a checkpoint or an exported file.')
    parser.add_argument('checkpoint', help='weights in any layout, or an exported file')
    parser.add_argument('--reparam', action='store_true', help='test in the deploy form')
    parser.add_argument(
        '--show-dir',
        help='folder for tables and for pictures of truth and prediction, the worst images first',
    )
    parser.add_argument('--out', help='FILE.pkl for the predictions, FILE.json for the metrics')
    parser.add_argument('--device', help='cpu, cuda, cuda:1 ... (cuda if available)')
    parser.add_argument(
        '--batch-size',
        type=options.positive,
        metavar='N',
        help="images at a time (the config's); a detector's are padded to the size of the largest, "
        'which changes its results a little, a segmentor takes only images of one size',
    )
    parser.add_argument(
        '--tta',
        action='store_true',
        help="average over what the config's tta_pipeline makes of an image, or over the image and "
        'its mirror image (classification, segmentation)',
    )
    args = parser.parse_args(argv)

    from fastvit_mm import launch, writing
    from fastvit_mm.errors import FastViTError
    from fastvit_mm.export import is_exported

    cfg = launch.load_config(args)
    if args.reparam and is_exported(args.checkpoint):
        raise FastViTError('exported files are already merged: leave out --reparam')
    if args.reparam:
        cfg.custom_hooks = [*cfg.get('custom_hooks', []), dict(type='ReparameterizeHook')]
    show = Path(args.show_dir).resolve() if args.show_dir else None
    report = dict(type='TestReportHook', out_dir=show and str(show), draw=show is not None)
    cfg.custom_hooks = [*cfg.get('custom_hooks', []), report]
    out = Path(args.out) if args.out else None
    if out and out.suffix not in ('.pkl', '.json'):
        raise FastViTError(f'--out {out}: give FILE.pkl for predictions or FILE.json for metrics')
    if out:
        writing.check_target(out)

    if args.batch_size:
        cfg.test_dataloader.batch_size = args.batch_size
    runner = launch.test_runner(cfg, args.checkpoint, args.device, args.tta)
    if out and out.suffix == '.pkl':
        from mmengine.evaluator import DumpResults

        runner.test_evaluator.metrics.append(DumpResults(out_file_path=str(out)))
    metrics = runner.test()
    if out and out.suffix == '.json' and runner.rank == 0:
        out.write_text(json.dumps(metrics, indent=2, default=float) + '\n')
