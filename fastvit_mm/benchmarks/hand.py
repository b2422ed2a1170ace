"""hand: hand mesh models, from image to mesh, deploy form against training form."""

import torch
from mmengine.config import Config

import fastvit_mm
from fastvit_mm.hand_mesh import HandMesh, HandSample

from . import sides
from .report import Report

HELP = 'hand meshes with both heads, deploy form against training form'
ARCHS = ('t8', 'sa12', 'ma36')
HEADS = ('mano', 'vertices')


def add_arguments(parser) -> None:
    parser.add_argument('--archs', nargs='+', choices=ARCHS, default=('t8', 'ma36'))
    parser.add_argument('--heads', nargs='+', choices=HEADS, default=HEADS)
    parser.add_argument('--size', type=int, default=224, help='side of the square images (224)')
    parser.add_argument('--batch', type=int, default=1)


def build(arch: str, head: str, device: str) -> HandMesh:
    """A config's model with random weights, in eval mode; its hand model is the synthetic one."""
    cfg = Config.fromfile(f'configs/hand_mesh/{head}_fastvit_{arch}_freihand.py')
    cfg.model.head.hand_model = 'synthetic'
    torch.manual_seed(0)
    model = sides.unsettle(fastvit_mm.init_model(cfg))
    model.head.read_hand_model()
    return model.to(device)


@torch.no_grad()
def run(args, report: Report) -> None:
    title = 'hand meshes: time of the training form / time of the deploy form'
    inputs = sides.images(args.size, args.batch).to(args.device)
    sample = HandSample(metainfo=dict(img_shape=(args.size, args.size)))
    samples = [sample.clone() for _ in inputs]
    ratios = {}
    for arch in args.archs:
        for head in args.heads:
            training = build(arch, head, args.device)
            models = dict(deploy=fastvit_mm.reparameterize(training), training=training)
            outcome = sides.contest(
                {
                    name: {'contiguous': lambda m=model: m(inputs, samples, mode='predict')}
                    for name, model in models.items()
                },
                args.seconds,
                args.device,
                outputs=lambda: [model(inputs) for model in models.values()],  # noqa: B023
            )
            case = {'config': f'{head}, {arch}', 'size': args.size, 'batch': args.batch}
            report.add(title, {**case, **outcome.row})
            ratios[case['config']] = outcome.ratio
    report.conclude(title, ratios)
