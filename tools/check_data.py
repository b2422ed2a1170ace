"""Read every image of a config's data sets and list what is wrong:
python tools/check_data.py CONFIG [--demo] [--json FILE] [--workers N]

Each problem is a line: the file, what is wrong with it, and what happens if it stays. The exit code
is 0 if there are none but notes, and 2 if some would stop or spoil a run.
"""

import json
import os
import sys
from collections import defaultdict
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

import fastvit_mm  # noqa: F401
from fastvit_mm import launch
from fastvit_mm.data.check import STAGES, Report, check
from fastvit_mm.data.problems import LEVELS
from fastvit_mm.errors import FastViTError

SHOWN = 20  # of each kind; --json has all


def show(report: Report) -> None:
    kinds = defaultdict(list)
    for one in report.problems:
        kinds[LEVELS.index(one.level), one.then].append(one)
    for (level, then), problems in sorted(kinds.items(), key=lambda kind: kind[0][0]):
        for one in problems[:SHOWN]:
            print(f'{LEVELS[level]}: {one}: {then}')
        if len(problems) > SHOWN:
            print(f'{LEVELS[level]}: {len(problems) - SHOWN} more of this kind: {then}')
    read = '; '.join(f'{number} images of {stages}' for stages, number in report.images.items())
    numbers = [sum(one.level == level for one in report.problems) for level in LEVELS]
    words = (('that stops', 'that stop'), ('that spoils', 'that spoil'), ('note', 'notes'))
    counted = ', '.join(f'{n} {w[n != 1]}' for n, w in zip(numbers, words, strict=True))
    print(f'read {read or "no images"}: {counted if report.problems else "nothing is wrong"}')


def main(argv: list[str] | None = None) -> None:
    parser = launch.config_parser('Read every image of a config and list what is wrong.')
    parser.add_argument('--json', metavar='FILE', help='write all problems there as well')
    parser.add_argument(
        '--workers', type=int, default=min(8, os.cpu_count() or 1), help='processes that read'
    )
    args = parser.parse_args(argv)
    if args.workers < 0:
        raise FastViTError(f'--workers {args.workers} is negative: give 0 or more')

    cfg = launch.load_config(args, more=[f'{stage}_dataloader' for stage in STAGES])
    # pycocotools prints to standard output, which is for the report
    with redirect_stdout(sys.stderr), Progress(console=Console(stderr=True)) as bar:

        def progress(stages: str, number: int):
            task = bar.add_task(stages, total=number)
            return lambda read: bar.advance(task, read)

        report = check(cfg, args.workers, progress)
    show(report)
    if args.json:
        content = dict(images=report.images, problems=[asdict(one) for one in report.problems])
        try:
            Path(args.json).write_text(json.dumps(content, indent=1) + '\n', encoding='utf-8')
        except OSError as error:
            raise FastViTError(f'cannot write {args.json}: {error.strerror}') from error
    if not report.sound:
        sys.exit(2)


if __name__ == '__main__':
    launch.run(main)
