"""Measure robustness, section 4.2 of the paper (docs/robustness.md):
python tools/robustness.py CONFIG CHECKPOINT|FILE.onnx|FILE.pt2|FILE.xml --sets c a r sketch real
  [--reparam] [--demo] [--json FILE] [--out DIR] ...
"""

import argparse
import json

from . import options


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = options.argument_parser('Measure accuracy on corrupted and on other natural images.')
    parser.add_argument('checkpoint', help='weights in any layout, or an exported file')
    parser.add_argument(
        '--sets',
        nargs='+',
        metavar='SET',
        help='c: ImageNet-C, a: ImageNet-A, r: ImageNet-R, sketch: ImageNet-Sketch, real: ReaL '
        '(classification: all; detection and segmentation: c)',
    )
    parser.add_argument(
        '--data-root',
        nargs='+',
        metavar='SET=PATH',
        default=[],
        help="where sets are (data/imagenet-SET); real=FILE.json instead of timm's copy",
    )
    parser.add_argument(
        '--corruptions', nargs='+', metavar='NAME', help='some of the 15, such as fog (all)'
    )
    parser.add_argument(
        '--severities',
        nargs='+',
        type=int,
        metavar='N',
        help='some of 1 to 5 (all; detection and segmentation with --demo: 1 3 5)',
    )
    parser.add_argument('--reparam', action='store_true', help='measure the deploy form as well')
    parser.add_argument('--json', metavar='FILE', help='write all figures to FILE')
    parser.add_argument(
        '--out', metavar='DIR', help='draw accuracy over severity: DIR/robustness.png'
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)

    from pathlib import Path

    from mmengine.dist import is_main_process

    from fastvit_mm import evaluation, launch, writing
    from fastvit_mm.errors import FastViTError
    from fastvit_mm.export import is_exported
    from fastvit_mm.settings.widths import type_of

    cfg = launch.load_config(args)
    exported = is_exported(args.checkpoint)
    if args.reparam and exported:
        raise FastViTError('exported files are already merged: leave out --reparam')
    roots = dict((*one.split('=', 1), '')[:2] for one in args.data_root)
    if args.demo and roots:
        raise FastViTError('--data-root: --demo generates its own sets, leave one of them out')
    table = Path(args.json) if args.json else None
    picture = Path(args.out, 'robustness.png') if args.out else None
    for target in filter(None, (table, picture)):
        writing.check_target(target)

    plan = evaluation.plan(cfg, args.sets, roots, args.corruptions, args.severities, args.demo)
    plan.check_test_set(cfg)
    # that of a config merges before every single test
    hooks = cfg.get('custom_hooks', [])
    cfg.custom_hooks = [hook for hook in hooks if type_of(hook) != 'ReparameterizeHook']
    cfg.test_dataloader.dataset, cfg.test_evaluator = plan.sets[0].dataset, plan.sets[0].evaluator

    runner = launch.test_runner(cfg, args.checkpoint)
    models = evaluation.forms(runner, args.reparam or len(cfg.custom_hooks) < len(hooks), exported)
    report = evaluation.Report.of(cfg, args.checkpoint, plan)
    for result in evaluation.measure(runner, cfg.test_dataloader, models, plan.sets):
        report.add(result)
        if is_main_process():
            print(result, flush=True)
    if not is_main_process():
        return
    print(f'\n{report}')
    if table:
        table.write_text(json.dumps(report.as_json(), indent=2, default=float) + '\n')
    if picture and report.corrupted_by:
        evaluation.plot(report, picture)
