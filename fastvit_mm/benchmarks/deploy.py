"""deploy: our deploy form of the backbone against timm's reparameterized one, in PyTorch."""

import itertools

import torch

from fastvit_mm import ARCHS, FastViTError
from fastvit_mm.models.archs import FASTVITS

from . import apart, measure, sides
from .report import Report

HELP = 'the deploy form of the backbone against timm in PyTorch; bf16 against fp32'


def add_arguments(parser) -> None:
    parser.add_argument('--archs', nargs='+', default=list(FASTVITS), choices=ARCHS)
    parser.add_argument('--sizes', nargs='+', type=int, default=[256, 512])
    parser.add_argument('--batch', nargs='+', type=int, default=[1, 2], help='paired with sizes')
    parser.add_argument('--dtypes', nargs='+', default=['fp32'], choices=sides.DTYPES)
    parser.add_argument(
        '--modes',
        nargs='+',
        default=['eager'],
        choices=sides.MODES,
        help="eager:compile: ours eager, timm's compiled (or in ONNX Runtime); graph: CUDA graphs",
    )
    parser.add_argument('--half', action='store_true', help='ours in bf16 against ours in fp32')


def run(args, report: Report) -> None:
    with apart.Side(args.threads) as first, apart.Side(args.threads) as second:
        compare(args, report, first, second)


@torch.no_grad()
def compare(args, report: Report, *processes: apart.Side) -> None:
    if 'graph' in args.modes and not args.device.startswith('cuda'):
        raise FastViTError('--modes graph uses CUDA graphs: add --device cuda')
    dtypes = ['bf16'] if args.half else args.dtypes
    title = 'time in fp32 / time in bf16' if args.half else "timm's time / our time"
    ratios, contiguous = {}, {}
    for arch in args.archs:
        models = sides.deployed(arch)
        for size, batch in sides.shapes(args.sizes, args.batch):
            inputs = sides.images(size, batch)
            work = batch * measure.flops(sides.eager(models['ours'], inputs[:1]))
            for dtype, mode in itertools.product(dtypes, args.modes):
                pair = {name: (model, dtype) for name, model in models.items()}
                if args.half:
                    pair = {own: (models['ours'], own) for own in ('bf16', 'fp32')}
                made = {
                    name: process.make(sides.calls, model, inputs, args.device, own, run)
                    for process, (name, (model, own)), run in zip(
                        processes, pair.items(), sides.MODES[mode], strict=True
                    )
                }
                outcome = sides.contest(made, args.seconds, args.device, dtype)
                case = dict(arch=arch, size=size, batch=batch, dtype=dtype, mode=mode)
                speed = report.speed(work, outcome.seconds, dtype=sides.DTYPES[dtype])
                report.add(title, {**case, **outcome.row, **speed})
                kind = f' {dtype} {mode}' if len(dtypes) * len(args.modes) > 1 else ''
                ratios[f'{arch} {size} x{batch}{kind}'] = outcome.ratio
                contiguous[f'{arch} {size} x{batch}{kind}'] = outcome.contiguous
    report.average(f'{title}, contiguous', contiguous)
    report.conclude(title, ratios)
