"""Plot training logs: python tools/plot_log.py WORK_DIR [WORK_DIR ...] [--out FILE.png]

Plots losses, learning rate and validation metrics over the iterations to WORK_DIR/curves.png, or
with --out all runs to one picture. All time stamps of a work dir are read: a resumed run continues
from its checkpoint, and a run that started from scratch replaces the earlier one. Curves with many
points are smoothed; the logged values are shown pale behind them.
"""

import argparse
from pathlib import Path

from . import options


def main(argv: list[str] | None = None) -> None:
    description, _, details = __doc__.partition('\n\n')
    parser = options.parser(
        description,
        epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('work_dirs', metavar='WORK_DIR', nargs='+', type=Path)
    parser.add_argument('--out', type=Path, help='FILE.png for one picture of all runs')
    options.debug_argument(parser)
    args = parser.parse_args(argv)

    from fastvit_mm.curves import curves, panels, plot, run_names
    from fastvit_mm.errors import FastViTError

    if args.out and args.out.suffix != '.png':
        raise FastViTError(f'--out {args.out}: give FILE.png')
    work_dirs = list(dict.fromkeys(args.work_dirs))
    runs = {
        name: curves(folder) for name, folder in zip(run_names(work_dirs), work_dirs, strict=True)
    }
    if args.out:
        pictures = {args.out: runs}
    else:
        pictures = {
            folder / 'curves.png': {name: run}
            for folder, (name, run) in zip(work_dirs, runs.items(), strict=True)
        }
    for path, shown in pictures.items():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            plot(shown, path)
        except OSError as error:
            raise FastViTError(f'cannot write {path}: {error}') from error
        print(f'{path}: {", ".join(panels(shown))}')
