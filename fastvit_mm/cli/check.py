"""Read every image of a config's data sets and list what is wrong:
python tools/check_data.py CONFIG [--demo] [--json FILE] [--workers N] [--show FILE]

Each problem is a line: the file, what is wrong with it, and what happens if it stays. The exit code
is 0 if there are none but notes, and 2 if some would stop or spoil a run.
"""

import json
import os
import sys
from contextlib import redirect_stdout
from pathlib import Path

from . import options


def main(argv: list[str] | None = None) -> None:
    parser = options.config_parser('Read every image of a config and list what is wrong.')
    parser.add_argument('--json', metavar='FILE', help='write all problems there as well')
    parser.add_argument(
        '--workers', type=int, default=min(8, os.cpu_count() or 1), help='processes that read'
    )
    parser.add_argument(
        '--show',
        metavar='FILE',
        help='draw augmented training images with their labels there (.png, .jpg), or as '
        'train.png in this folder',
    )
    args = parser.parse_args(argv)

    from rich.console import Console
    from rich.progress import Progress

    from fastvit_mm import launch
    from fastvit_mm.data.check import STAGES, check
    from fastvit_mm.errors import FastViTError

    if args.workers < 0:
        raise FastViTError(f'--workers {args.workers} is negative: give 0 or more')

    cfg = launch.load_config(args, more=[f'{stage}_dataloader' for stage in STAGES])
    if args.show and 'train_dataloader' not in cfg:
        raise FastViTError(
            f'--show draws training images, but {args.config} has none (train_dataloader): '
            'leave it out'
        )
    # pycocotools prints to standard output, which is for the report
    with redirect_stdout(sys.stderr), Progress(console=Console(stderr=True)) as bar:

        def progress(stages: str, number: int):
            task = bar.add_task(stages, total=number)
            return lambda read: bar.advance(task, read)

        report = check(cfg, args.workers, progress)
    print(report)
    if args.json:
        try:
            Path(args.json).write_text(
                json.dumps(report.as_json(), indent=1) + '\n', encoding='utf-8'
            )
        except OSError as error:
            raise FastViTError(f'cannot write {args.json}: {error.strerror}') from error
    if args.show:
        from fastvit_mm import init_model
        from fastvit_mm.data.sheet import write_sheet

        path = write_sheet(cfg, init_model(cfg).data_preprocessor, Path(args.show))
        print(f'augmented training images: {path}')
    if not report.sound:
        sys.exit(2)
