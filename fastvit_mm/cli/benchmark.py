"""Measure fastvit_mm against timm and other networks; docs/benchmarks.md has the results.

python tools/benchmark.py COMMAND [--json F] [--plot F] [--doc F#S] ...; --help lists the commands
"""

import argparse
import shlex
import sys
from importlib import import_module

import torch

from fastvit_mm.benchmarks import measure
from fastvit_mm.benchmarks.apart import settle
from fastvit_mm.benchmarks.report import Report, find_section
from fastvit_mm.errors import FastViTError
from fastvit_mm.writing import check_target

from . import options

COMMANDS = (
    *('deploy', 'whole', 'hand', 'train', 'export'),
    *('compare', 'growth', 'loading', 'processes'),
)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = options.parser(__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest='command', required=True)
    for name in COMMANDS:
        module = import_module(f'fastvit_mm.benchmarks.{name}')
        own = commands.add_parser(name, help=module.HELP, description=module.__doc__)
        own.add_argument('--device', default='cpu', help='cpu or cuda (cpu)')
        own.add_argument(
            '--threads', type=int, default=2, help='threads of PyTorch and ONNX Runtime (2)'
        )
        own.add_argument(
            '--seconds', type=float, default=10, help='time to measure each row of the table (10)'
        )
        own.add_argument('--json', metavar='FILE', help='write the figures to FILE')
        own.add_argument('--plot', metavar='FILE', help='draw the picture to FILE')
        own.add_argument(
            '--doc', metavar='FILE#SECTION', help='insert the tables into this document'
        )
        module.add_arguments(own)
        options.debug_argument(own)
        own.set_defaults(run=module.run)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if args.device.startswith('cuda') and not torch.cuda.is_available():
        raise FastViTError('--device cuda needs a GPU, but none was found: leave it out')
    if args.json:
        check_target(args.json)
    if args.plot:
        check_target(args.plot, ('.png', '.svg', '.pdf'))
    document, _, section = (args.doc or '').partition('#')
    if document:
        find_section(document, section)
    settle(args.threads)
    command = shlex.join(['python', 'tools/benchmark.py', *(argv or sys.argv[1:])])
    report = Report(
        command,
        measure.machine(args.device, args.threads),
        measure.limits(args.device, args.threads, seconds=min(1.0, args.seconds)),
    )
    args.run(args, report)
    print(report)
    if args.json:
        report.save(args.json)
    if refusals := report.refusals():
        raise FastViTError('; '.join(refusals))
    if args.plot:
        report.plot(args.plot)
    if document:
        report.insert(document, section)
