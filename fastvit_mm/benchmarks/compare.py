"""compare: FastViT against the networks that the paper compares it with, as in its figure 1."""

import statistics

import torch

from . import measure, sides
from .networks import CLAIMANT, CLAIMS, NETWORKS
from .report import Report, scatter

HELP = 'published accuracy over measured latency, against other networks'
LABELS = [n.label for n in NETWORKS]


def add_arguments(parser) -> None:
    parser.add_argument('--archs', nargs='+', default=LABELS, choices=LABELS, metavar='NAME')
    parser.add_argument('--batch', type=int, default=1)
    parser.add_argument('--dtypes', default='fp32', choices=sides.DTYPES, dest='dtype')
    parser.add_argument('--runtime', default='torch', choices=['torch', 'onnxruntime'])
    parser.set_defaults(seconds=240)


def quickest(network, args):
    """A call of one network, its faster layout (None in ONNX Runtime) and its work in FLOP."""
    model = network.build()
    inputs = sides.images(network.size, args.batch)
    work = args.batch * measure.flops(sides.eager(model, inputs[:1]))
    if args.runtime == 'onnxruntime':
        return sides.runtime_call(sides.to_onnx(model, inputs), inputs, args.threads), None, work
    calls = sides.calls(model, inputs, args.device, args.dtype)
    layout = measure.fastest(measure.interleave(calls, min(args.seconds, 0.5), warmup=2), *calls)
    return calls[layout], layout, work


@torch.no_grad()
def run(args, report: Report) -> None:
    chosen = [n for n in NETWORKS if n.label in args.archs]
    calls, layouts, works = {}, {}, {}
    for network in chosen:
        label = network.label
        calls[label], layouts[label], works[label] = quickest(network, args)
    times = measure.interleave(calls, args.seconds)

    points = {}
    title = f'{args.runtime}, {args.dtype}, batch {args.batch}'
    for network in chosen:
        label = network.label
        spread = measure.milliseconds(times[label])
        row = {'network': label, 'from': network.library, 'size': network.size}
        row |= {'top-1, published': f'{network.top1:.1f}', 'latency, ms': spread}
        if layouts[label]:
            row['faster layout'] = layouts[label]
        row['turns'] = len(times[label])
        row['G multiply-adds'] = works[label] / 2e9
        seconds = statistics.median(times[label])
        row |= report.speed(works[label], seconds, sides.DTYPES[args.dtype])
        if args.runtime == 'torch':  # a session's arena keeps the memory of its first run
            row['peak MB'] = measure.megabytes(measure.peak_memory(calls[label], args.device))
        report.add(title, row)
        short = label.removeprefix(f'{network.family}-')
        points.setdefault(network.family, []).append((short, spread.median, network.top1))
    for label, published in CLAIMS.items():
        if {label, CLAIMANT} <= set(times):
            row = {f'{CLAIMANT} against': label, 'published, iPhone 12 Pro': published}
            row['measured ratio'] = measure.ratio(times[label], times[CLAIMANT])
            report.add('How many times faster', row)
    report.panels = [scatter(points, f'latency, ms ({title}, {report.machine["CPU"]})')]
