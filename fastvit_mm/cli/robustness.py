"""Measure robustness, section 4.2 of the paper (docs/robustness.md):
python tools/robustness.py CONFIG CHECKPOINT|FILE.onnx|FILE.pt2|FILE.xml --sets c a r sketch real
  [--reparam] [--demo] [--json FILE] [--out DIR] ...
"""

import argparse
import json
import os
from pathlib import Path

from mmengine.dist import is_main_process

from fastvit_mm import evaluation, launch
from fastvit_mm.errors import FastViTError
from fastvit_mm.evaluation import CORRUPTIONS, ROOTS, SEVERITIES, TITLES, Result
from fastvit_mm.export import is_exported
from fastvit_mm.settings.widths import type_of

PICTURE, MERGES = 'robustness.png', 'ReparameterizeHook'


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = launch.argument_parser('Measure accuracy on corrupted and on other natural images.')
    parser.add_argument('checkpoint', help='weights in any layout, or an exported file')
    parser.add_argument(
        '--sets',
        nargs='+',
        choices=TITLES,
        metavar='SET',
        help=f'{", ".join(f"{k}: {v}" for k, v in TITLES.items())} (classification: all; '
        'detection and segmentation: c)',
    )
    parser.add_argument(
        '--data-root',
        nargs='+',
        metavar='SET=PATH',
        default=[],
        help='where sets are: ' + ', '.join(f'{k}={v}' for k, v in ROOTS.items()) + '; '
        "real=FILE.json instead of timm's copy",
    )
    parser.add_argument(
        '--corruptions',
        nargs='+',
        choices=CORRUPTIONS,
        default=CORRUPTIONS,
        metavar='NAME',
        help=f'some of {", ".join(CORRUPTIONS)} (all)',
    )
    parser.add_argument(
        '--severities',
        nargs='+',
        type=int,
        choices=SEVERITIES,
        metavar='N',
        help='some of 1 to 5 (all; detection and segmentation with --demo: 1 3 5)',
    )
    parser.add_argument('--reparam', action='store_true', help='measure the deploy form as well')
    parser.add_argument('--json', metavar='FILE', help='write all figures to FILE')
    parser.add_argument('--out', metavar='DIR', help=f'draw accuracy over severity: DIR/{PICTURE}')
    return parser.parse_args(argv)


def places(given: list[str]) -> dict[str, str]:
    """Roots by set, from SET=PATH ..."""
    found = dict(one.split('=', 1) if '=' in one else (one, '') for one in given)
    if wrong := [name for name, path in found.items() if name not in TITLES or not path]:
        raise FastViTError(f'--data-root {wrong[0]}: give SET=PATH, SET one of {", ".join(TITLES)}')
    return found


def check_target(path: Path) -> None:
    """Fail before measuring, not after it, if a file cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FastViTError(f'{path.parent} cannot be created: {error.strerror}') from error
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise FastViTError(f'{path} cannot be written')


def progress(result: Result) -> str:
    figures = [
        ', '.join(f'{name} {value:.2f}' for name, value in result.headline(form).items())
        + f' ({form})'
        for form in result.metrics
    ]
    return f'{result.name}: {"; ".join(figures)}'


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    cfg = launch.load_config(args)
    exported = is_exported(args.checkpoint)
    if args.reparam and exported:
        raise FastViTError('exported files are already merged: leave out --reparam')
    roots = places(args.data_root)
    if args.demo and roots:
        raise FastViTError('--data-root: --demo generates its own sets, leave one of them out')
    table = Path(args.json) if args.json else None
    picture = Path(args.out, PICTURE) if args.out else None
    for target in filter(None, (table, picture)):
        check_target(target)

    plan = evaluation.plan(cfg, args.sets, roots, args.corruptions, args.severities, args.demo)
    plan.check_test_set(cfg)
    # that of a config merges before every single test
    hooks = cfg.get('custom_hooks', [])
    cfg.custom_hooks = [hook for hook in hooks if type_of(hook) != MERGES]
    cfg.test_dataloader.dataset, cfg.test_evaluator = plan.sets[0].dataset, plan.sets[0].evaluator

    runner = launch.test_runner(cfg, args.checkpoint)
    models = evaluation.forms(runner, args.reparam or len(cfg.custom_hooks) < len(hooks), exported)
    report = evaluation.Report.of(cfg, args.checkpoint, plan)
    for result in evaluation.measure(runner, cfg.test_dataloader, models, plan.sets):
        report.add(result)
        if is_main_process():
            print(progress(result), flush=True)
    if not is_main_process():
        return
    print(f'\n{report}')
    if table:
        table.write_text(json.dumps(report.as_json(), indent=2, default=float) + '\n')
    if picture and report.corrupted_by:
        evaluation.plot(report, picture)
