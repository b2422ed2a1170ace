"""whole: complete models at test resolution, deploy form against training form."""

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn as nn

import fastvit_mm
from fastvit_mm import FastViTError

from . import sides
from .report import Report

HELP = 'Semantic FPN and Mask R-CNN, deploy form against training form'
CONFIGS = (
    'configs/segmentation/fpn_fastvit_sa36_ade20k.py',
    'configs/detection/mask_rcnn_fastvit_sa36_coco.py',
)
#: Height and width of a 4:3 image (ADE20K) and of the largest image (COCO) after the test pipeline.
TEST_SIZE = dict(mmseg=(512, 704), mmdet=(800, 1344))


def add_arguments(parser) -> None:
    parser.add_argument('--configs', nargs='+', default=CONFIGS)
    parser.add_argument(
        '--size', nargs=2, type=int, metavar=('H', 'W'), help="image size (the config's)"
    )
    parser.add_argument('--batch', type=int, default=1)
    parser.set_defaults(seconds=90)


def build(path: str, device: str) -> tuple[nn.Module, str]:
    """A config's model with random weights, in eval mode, and its package."""
    torch.manual_seed(0)
    model = sides.unsettle(fastvit_mm.init_model(path)).to(device)
    for name, parameter in model.backbone.named_parameters():
        if name.endswith('gamma'):
            # Larger ones saturate attention over so many positions, which amplifies rounding.
            parameter.data *= 0.3
    scope = model.cfg.default_scope
    if scope not in TEST_SIZE:
        raise FastViTError(f'{path}: give configs of detectors and segmenters')
    if scope == 'mmdet':
        # One class for every box: as many boxes reach the mask head as in a crowded image.
        with torch.no_grad():
            model.roi_head.bbox_head.fc_cls.bias[0] = 5
    return model, scope


def predictor(model: nn.Module, scope: str, inputs: torch.Tensor) -> Callable:
    """A call of the whole model, from images to predictions."""
    samples = None
    if scope == 'mmdet':
        from mmdet.structures import DetDataSample

        size = tuple(inputs.shape[2:])
        keys = ('img_shape', 'ori_shape', 'pad_shape', 'batch_input_shape')
        meta = dict(dict.fromkeys(keys, size), scale_factor=(1.0, 1.0))
        samples = [DetDataSample(metainfo=meta) for _ in inputs]
    return lambda: model(inputs, samples, mode='predict')


@torch.no_grad()
def run(args, report: Report) -> None:
    title = 'whole models: time of the training form / time of the deploy form'
    ratios = {}
    for path in args.configs:
        model, scope = build(path, args.device)
        size = tuple(args.size or TEST_SIZE[scope])
        inputs = sides.images(size, args.batch).to(args.device)
        models = dict(deploy=fastvit_mm.reparameterize(model), training=model)
        outcome = sides.contest(
            {name: {'contiguous': predictor(m, scope, inputs)} for name, m in models.items()},
            args.seconds,
            args.device,
            # Rounding can swap boxes with almost equal scores, so the features are compared.
            outputs=lambda: [m.extract_feat(inputs) for m in models.values()],  # noqa: B023
        )
        case = {'config': Path(path).stem, 'size': '{} x {}'.format(*size), 'batch': args.batch}
        report.add(title, {**case, **outcome.row})
        ratios[case['config']] = outcome.ratio
    report.conclude(title, ratios)
