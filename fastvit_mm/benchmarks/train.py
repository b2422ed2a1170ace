"""train: forward and backward pass of the backbone on one batch, ours against timm's.

Contiguous on the CPU: with channels_last, training there corrupts PyTorch's heap.
"""

import torch
import torch.nn as nn
from torch import Tensor

from fastvit_mm import ARCHS
from fastvit_mm.complexity import saved_memory
from fastvit_mm.reparameterize import tensors

from . import measure, sides
from .report import Report

HELP = 'a training step of the backbone against timm, or with against without checkpointing'


def add_arguments(parser) -> None:
    parser.add_argument('--archs', nargs='+', default=['t8', 's12', 'sa12'], choices=ARCHS)
    parser.add_argument('--sizes', nargs='+', type=int, default=[256])
    parser.add_argument('--batch', nargs='+', type=int, default=[8], help='paired with sizes')
    parser.add_argument(
        '--checkpointing', action='store_true', help='ours with with_cp against without'
    )
    parser.set_defaults(seconds=60)


def loss(output: Tensor | tuple[Tensor]) -> Tensor:
    return sum(t.square().mean() for t in tensors(output))


def step(model: nn.Module, inputs: Tensor) -> list[Tensor]:
    """Run one forward and backward pass and return the outputs."""
    model.zero_grad(set_to_none=True)
    output = model(inputs)
    loss(output).backward()
    return [t.detach() for t in tensors(output)]


@torch.no_grad()
def forward_flops(model: nn.Module, inputs: Tensor) -> int:
    """Count branch by branch. A backward pass counts twice: counters ignore groups there."""
    model.eval()
    counted = measure.flops(lambda: model(inputs))
    model.train()
    return counted


def contestants(arch: str, checkpointing: bool) -> dict[str, nn.Module]:
    if checkpointing:
        return {
            'with_cp': sides.backbones(arch, with_cp=True)[0],
            'plain': sides.backbones(arch)[0],
        }
    return dict(zip(('ours', 'timm'), sides.backbones(arch), strict=True))


def run(args, report: Report) -> None:
    title = "training step: timm's time / our time"
    if args.checkpointing:
        title = 'training step: time without / time with checkpointing'
    ratios = {}
    for arch in args.archs:
        for size, batch in sides.shapes(args.sizes, args.batch):
            inputs = sides.images(size, batch).to(args.device)
            models = contestants(arch, args.checkpointing)
            for model in models.values():
                model.to(args.device).train()
            calls = {
                name: {'contiguous': lambda model=model: step(model, inputs)}  # noqa: B023
                for name, model in models.items()
            }
            work = 3 * forward_flops(list(models.values())[1], inputs)
            outcome = sides.contest(calls, args.seconds, args.device)
            saved = {
                f'{name}, activations MB': measure.megabytes(
                    saved_memory(lambda m=model: loss(m(inputs)), model.parameters())  # noqa: B023
                )
                for name, model in models.items()
            }
            case = dict(arch=arch, size=size, batch=batch)
            speed = report.speed(work, outcome.seconds)
            report.add(title, {**case, **outcome.row, **saved, **speed})
            ratios[f'{arch} {size} x{batch}'] = outcome.ratio
    report.conclude(title, ratios)
