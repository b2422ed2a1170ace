"""Test a checkpoint or an exported file:
python tools/test.py CONFIG CHECKPOINT|FILE.onnx|FILE.pt2|FILE.xml [--reparam] [--demo] ...
"""

import json
from pathlib import Path

from . import options

# Settings of each package's visualization hook, to draw predictions.
DRAW = {
    'mmpretrain': lambda folder: dict(
        type='VisualizationHook', enable=True, interval=1, out_dir=folder
    ),
    'mmdet': lambda folder: dict(type='DetVisualizationHook', draw=True, test_out_dir=folder),
    'mmseg': lambda folder: dict(type='SegVisualizationHook', draw=True, interval=1),
    'mmengine': lambda folder: dict(type='HandVisualizationHook', out_dir=folder),
}


def main(argv: list[str] | None = None) -> None:
    parser = options.argument_parser('Test a checkpoint or an exported file.')
    parser.add_argument('checkpoint', help='weights in any layout, or an exported file')
    parser.add_argument('--reparam', action='store_true', help='test in the deploy form')
    parser.add_argument('--show-dir', help='folder for pictures of the predictions')
    parser.add_argument('--out', help='FILE.pkl for the predictions, FILE.json for the metrics')
    parser.add_argument('--device', help='cpu, cuda, cuda:1 ... (cuda if available)')
    parser.add_argument(
        '--batch-size', type=options.positive, metavar='N', help="images at a time (the config's)"
    )
    parser.add_argument(
        '--tta',
        action='store_true',
        help="average over what the config's tta_pipeline makes of an image, or over the image and "
        'its mirror image (classification, segmentation)',
    )
    args = parser.parse_args(argv)

    from fastvit_mm import launch
    from fastvit_mm.errors import FastViTError
    from fastvit_mm.export import is_exported

    cfg = launch.load_config(args)
    if args.reparam and is_exported(args.checkpoint):
        raise FastViTError('exported files are already merged: leave out --reparam')
    if args.reparam:
        cfg.custom_hooks = [*cfg.get('custom_hooks', []), dict(type='ReparameterizeHook')]
    if args.show_dir:
        cfg.default_hooks.visualization = DRAW[cfg.default_scope](
            str(Path(args.show_dir).resolve())
        )
        cfg.visualizer.save_dir = args.show_dir
    out = Path(args.out) if args.out else None
    if out and out.suffix not in ('.pkl', '.json'):
        raise FastViTError(f'--out {out}: give FILE.pkl for predictions or FILE.json for metrics')

    if args.batch_size:
        cfg.test_dataloader.batch_size = args.batch_size
    runner = launch.test_runner(cfg, args.checkpoint, args.device, args.tta)
    if out and out.suffix == '.pkl':
        from mmengine.evaluator import DumpResults

        runner.test_evaluator.metrics.append(DumpResults(out_file_path=str(out)))
    metrics = runner.test()
    if out and out.suffix == '.json' and runner.rank == 0:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(metrics, indent=2, default=float) + '\n')
