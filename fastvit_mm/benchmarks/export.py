"""export: ONNX Runtime on the CPU, our export against that of timm's reparameterized model."""

import tempfile
from pathlib import Path

import torch
from timm.utils import reparameterize_model
from torch import Tensor

from fastvit_mm import ARCHS
from fastvit_mm.models.archs import FASTVITS

from . import measure, sides
from .report import Report

HELP = "ONNX Runtime on the CPU: our export against timm's"


def add_arguments(parser) -> None:
    parser.add_argument('--archs', nargs='+', default=list(FASTVITS), choices=ARCHS)
    parser.add_argument('--sizes', nargs='+', type=int, default=[256, 512])
    parser.add_argument('--batch', nargs='+', type=int, default=[1, 2], help='paired with sizes')
    parser.add_argument(
        '--what',
        default='backbone',
        choices=EXPORTS,
        help='backbones, both from torch.onnx, or classifiers, ours from tools/export.py',
    )
    parser.add_argument(
        '--no-spin', action='store_true', help="let ONNX Runtime's threads sleep while they wait"
    )


def exported_backbones(arch: str, inputs: Tensor) -> dict[str, bytes]:
    return {name: sides.to_onnx(model, inputs) for name, model in sides.deployed(arch).items()}


def exported_classifiers(arch: str, inputs: Tensor) -> dict[str, bytes]:
    from fastvit_mm.export import export

    ours, theirs = sides.classifiers(arch)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, 'model.onnx')
        size, batch = tuple(inputs.shape[2:]), len(inputs)
        export(ours, path, size=size, batch=batch, output='logits')
        return dict(
            ours=path.read_bytes(),
            timm=sides.to_onnx(reparameterize_model(theirs), inputs),
        )


EXPORTS = dict(backbone=exported_backbones, classifier=exported_classifiers)


@torch.no_grad()
def run(args, report: Report) -> None:
    title = f"{args.what} in ONNX Runtime: timm's time / our time"
    ratios = {}
    for arch in args.archs:
        counted = sides.deployed(arch)['ours']
        for size, batch in sides.shapes(args.sizes, args.batch):
            inputs = sides.images(size, batch)
            work = measure.flops(sides.eager(counted, inputs))
            exported = EXPORTS[args.what](arch, inputs)
            # An arena keeps the memory of the first run, so memory is measured without one.
            calls, lean = (
                {
                    name: {'ONNX': sides.runtime_call(content, inputs, args.threads, **options)}
                    for name, content in exported.items()
                }
                for options in (dict(spin=not args.no_spin), dict(arena=False))
            )
            outcome = sides.contest(calls, args.seconds, args.device, memory=lean)
            case = dict(arch=arch, size=size, batch=batch)
            report.add(title, {**case, **outcome.row, **report.speed(work, outcome.seconds)})
            ratios[f'{arch} {size} x{batch}'] = outcome.ratio
    report.conclude(title, ratios)
