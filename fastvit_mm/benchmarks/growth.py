"""growth: latency and memory of the deploy form against resolution, and how they grow.

The exponent b of time ~ pixels**b is fitted by least squares to the logarithms; 1 is linear.
"""

from collections.abc import Callable
from statistics import median

import numpy as np
import torch
import torch.nn as nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastvit_mm import ARCHS, FastViTError
from fastvit_mm.models.archs import HEAD_WIDTH

from . import measure, sides
from .report import Report, curves

HELP = 'latency and memory against resolution, and the exponents'
DETECTION_SIZE = (800, 1333)


def add_arguments(parser) -> None:
    parser.add_argument('--archs', nargs='+', default=['t8', 'sa12', 'sa36'], choices=ARCHS)
    parser.add_argument('--sizes', nargs='+', type=int, default=[256, 384, 512, 768, 1024, 1536])
    parser.add_argument('--batch', type=int, default=1)
    parser.set_defaults(seconds=8)


def exponent(pixels: list[float], values: list[float]) -> float:
    """b of values ~ pixels**b."""
    return float(np.polyfit(np.log(pixels), np.log(values), 1)[0])


def stage_calls(model: nn.Module, inputs: torch.Tensor) -> dict[str, Callable]:
    """Calls of the RepMixer stages and of the attention stages, each with its own input."""
    attends = model.settings['attention']
    first = attends.index(1) if 1 in attends else len(model.stages)
    before, after = model.stages[:first], model.stages[first:]
    calls = {}
    x = model.stem(inputs)
    for name, stages in (('RepMixer stages', before), ('attention stage', after)):
        if stages:
            part = nn.Sequential(*stages)
            calls[name] = sides.eager(part, x)
            x = part(x)
    return calls


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor that an operator inside returns."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(output):
            if isinstance(leaf, torch.Tensor):
                self.size = max(self.size, leaf.numel())
        return output


def attention_memory(model: nn.Module, size: tuple[int, int], device: str) -> dict:
    """Memory of one attention for an image of ``size``, and of an N x N matrix for all heads."""
    attention = model.stages[-1].blocks[0].token_mixer
    height, width = (-(-s // 32) for s in size)
    x = torch.randn(1, attention.proj.in_features, height, width, device=device)
    with LargestTensor() as largest:
        attention(x)
    tokens, heads = height * width, attention.proj.in_features // HEAD_WIDTH
    peak = measure.peak_memory(sides.eager(attention, x), device)
    return {
        'image': '{1} x {0}'.format(*size),
        'N': tokens,
        'heads': heads,
        'N x N of all heads, MB': measure.megabytes(4 * heads * tokens**2),
        'largest tensor, MB': measure.megabytes(4 * largest.size),
        'peak MB': measure.megabytes(peak),
    }


@torch.no_grad()
def run(args, report: Report) -> None:
    if len(args.sizes) < 2:
        raise FastViTError('--sizes: growth needs at least two sizes')
    times_of, memory_of = {}, {}
    for arch in args.archs:
        model = sides.deployed(arch)['ours'].to(args.device)
        latency, memory, pixels = {}, [], []
        for size in args.sizes:
            inputs = sides.images(size, args.batch).to(args.device)
            calls = {'backbone': sides.eager(model, inputs), **stage_calls(model, inputs)}
            times = measure.interleave(calls, args.seconds, warmup=2)
            peak = measure.peak_memory(calls['backbone'], args.device)
            row = {'arch': arch, 'size': size, 'batch': args.batch}
            row |= {f'{name}, ms': measure.milliseconds(own) for name, own in times.items()}
            row |= {'peak MB': measure.megabytes(peak), 'turns': len(times['backbone'])}
            work = measure.flops(calls['backbone'])
            row |= report.speed(work, median(times['backbone']))
            report.add('Latency and memory', row)
            pixels.append(size**2)
            memory.append(measure.megabytes(peak))
            for name, own in times.items():
                latency.setdefault(name, []).append(1e3 * median(own))
        row = {'arch': arch}
        row |= {f'time of {name}': exponent(pixels, own) for name, own in latency.items()}
        if all(memory):
            row['peak memory'] = exponent(pixels, memory)
        report.add('Exponents over pixels (1 is linear)', row)
        if 1 in model.settings['attention']:
            row = attention_memory(model, DETECTION_SIZE, args.device)
            report.add('Attention on the largest image of detection', {'arch': arch, **row})
        times_of |= {f'{arch}, {name}': (pixels, own) for name, own in latency.items()}
        if all(memory):
            memory_of[arch] = pixels, memory
    report.panels = [curves(times_of, 'latency, ms')]
    if memory_of:
        report.panels.append(curves(memory_of, 'peak memory without the weights, MB'))
