"""Record what mmcv's compiled operators answer, in ``mmcv_ops.npz``.

Run it where ``import mmcv._ext`` finds the compiled extension (a source build of mmcv with
``MMCV_WITH_OPS=1``; a CPU build will do). The recorded file was made with onedl-mmcv 2.3.6 and
torch 2.10.0. Operators without a CPU kernel (roi_pool, sigmoid_focal_loss, ms_deform_attn) are
not in it.

The inputs are float32 numbers, the answers of the differentiable operators float64.

``CASES`` and ``evaluate`` are used by ``tests/test_mmcv_ops.py`` too.
"""

from pathlib import Path

import numpy as np
import torch
from torch.func import functional_call

FILE = Path(__file__).with_name('mmcv_ops.npz')


def boxes(generator, count, low=0.0, high=30.0):
    """Boxes with sides of 2 to 12, and distinct scores."""
    corner = low + (high - low) * torch.rand(count, 2, generator=generator)
    sides = 2 + 10 * torch.rand(count, 2, generator=generator)
    scores = (torch.randperm(count, generator=generator) + 0.5) / count
    return torch.cat([corner, corner + sides], 1), scores


def nms_inputs(generator):
    dets, scores = boxes(generator, 60)
    classes = torch.randint(3, (60,), generator=generator)
    return {'boxes': dets, 'scores': scores, 'classes': classes}


def touching_inputs(generator):
    """Two boxes that overlap by 0.6, which float32 rounds up."""
    dets = torch.tensor([[0.0, 0, 4, 1], [1, 0, 5, 1]])
    return {'boxes': dets, 'scores': torch.tensor([0.9, 0.8]), 'classes': torch.zeros(2)}


def align_inputs(generator):
    dets, _ = boxes(generator, 6, low=-6.0, high=60.0)
    dets[0] = torch.tensor([8.0, 8.0, 8.5, 8.25])  # less than a pixel of the map
    image = torch.randint(2, (6, 1), generator=generator).float()
    features = torch.randn(2, 3, 12, 15, generator=generator)
    return {'features!': features, 'rois': torch.cat([image, dets], 1)}


def conv_inputs(
    kernel, out, groups=1, deform_groups=1, mask=False, bias=False, spread=2.0, channels=4
):
    """Inputs of a deformable convolution of a 9 x 7 map with output size ``out``."""

    def inputs(generator):
        def randn(*shape):
            return torch.randn(shape, generator=generator)

        taps = deform_groups * kernel[0] * kernel[1]
        tensors = {
            'input!': randn(2, channels, 9, 7),
            'offset!': spread * randn(2, 2 * taps, *out),
            'weight!': randn(6, channels // groups, *kernel),
        }
        if mask:
            tensors['mask!'] = randn(2, taps, *out).sigmoid()
        if bias:
            tensors['bias!'] = randn(6)
        return tensors

    return inputs


def pack_inputs(offset_channels, offset_scale, bias):
    """Inputs and weights of a layer that predicts its own offsets; fresh with scale 0."""

    def inputs(generator):
        def randn(*shape):
            return torch.randn(shape, generator=generator)

        tensors = {
            'input!': randn(2, 4, 9, 7),
            'weight!': randn(6, 4, 3, 3),
            'conv_offset.weight!': offset_scale * randn(offset_channels, 4, 3, 3),
            'conv_offset.bias!': offset_scale * randn(offset_channels),
        }
        if bias:
            tensors['bias!'] = randn(6)
        return tensors

    return inputs


def nms(**options):
    def call(boxes, scores, classes):
        from mmcv.ops import nms

        return nms(boxes, scores, **options)

    return call


def soft_nms(**options):
    def call(boxes, scores, classes):
        from mmcv.ops import soft_nms

        return soft_nms(boxes, scores, **options)

    return call


def batched_nms(**options):
    def call(boxes, scores, classes):
        from mmcv.ops import batched_nms

        return batched_nms(boxes, scores, classes, options)

    return call


def roi_align(*args, **options):
    def call(features, rois):
        from mmcv.ops import RoIAlign

        return RoIAlign(*args, **options)(features, rois)

    return call


def deform_conv(*args):
    def call(input, offset, weight):
        from mmcv.ops import deform_conv2d

        return deform_conv2d(input, offset, weight, *args)

    return call


def modulated_deform_conv(*args):
    def call(input, offset, weight, mask, bias=None):
        from mmcv.ops import modulated_deform_conv2d

        return modulated_deform_conv2d(input, offset, mask, weight, bias, *args)

    return call


def pack(name, **options):
    def call(input, **weights):
        import mmcv.ops

        layer = getattr(mmcv.ops, name)(4, 6, 3, padding=1, **options).to(input)
        return functional_call(layer, weights, input)

    return call


# name: (function of the inputs, maker of the inputs). Inputs named with a '!' have gradients.
CASES = {
    'nms': (nms(iou_threshold=0.3), nms_inputs),
    'nms_pixels': (nms(iou_threshold=0.3, offset=1), nms_inputs),
    'nms_limits': (nms(iou_threshold=0.6, score_threshold=0.2, max_num=20), nms_inputs),
    'nms_threshold': (nms(iou_threshold=0.6), touching_inputs),
    'batched_nms': (batched_nms(type='nms', iou_threshold=0.3), nms_inputs),
    'batched_nms_split': (batched_nms(type='nms', iou_threshold=0.3, split_thr=10), nms_inputs),
    'batched_soft_nms': (batched_nms(type='soft_nms', iou_threshold=0.3), nms_inputs),
    'soft_nms': (soft_nms(), nms_inputs),
    'soft_nms_naive': (soft_nms(method='naive', iou_threshold=0.2), nms_inputs),
    'soft_nms_all': (soft_nms(iou_threshold=0.1, min_score=0.0), nms_inputs),
    'soft_nms_gaussian': (soft_nms(method='gaussian', sigma=0.4, min_score=0.1), nms_inputs),
    'soft_nms_pixels': (soft_nms(offset=1, min_score=0.3), nms_inputs),
    'roi_align': (roi_align((3, 4), 0.25), align_inputs),
    'roi_align_samples': (roi_align(2, 0.25, sampling_ratio=2), align_inputs),
    'roi_align_legacy': (roi_align((2, 3), 0.25, aligned=False), align_inputs),
    'deform_conv': (deform_conv(), conv_inputs((3, 3), (7, 5))),
    'deform_conv_options': (
        deform_conv((2, 1), (1, 2), (2, 1), 2, 2),
        conv_inputs((2, 3), (5, 9), groups=2, deform_groups=2),
    ),
    'deform_conv_still': (deform_conv(1, 1), conv_inputs((3, 3), (9, 7), spread=0.0)),
    'modulated_deform_conv': (
        modulated_deform_conv(),
        conv_inputs((3, 3), (7, 5), mask=True),
    ),
    'modulated_deform_conv_options': (
        modulated_deform_conv((1, 2), (2, 0), (1, 2), 2, 4),
        conv_inputs((3, 2), (11, 3), groups=2, deform_groups=4, mask=True, bias=True),
    ),
    'DeformConv2dPack': (pack('DeformConv2dPack'), pack_inputs(18, 0.3, False)),
    'DeformConv2dPack_fresh': (pack('DeformConv2dPack'), pack_inputs(18, 0.0, False)),
    'ModulatedDeformConv2dPack': (
        pack('ModulatedDeformConv2dPack'),
        pack_inputs(27, 0.3, True),
    ),
    'ModulatedDeformConv2dPack_fresh': (
        pack('ModulatedDeformConv2dPack', bias=False),
        pack_inputs(27, 0.0, False),
    ),
}


def evaluate(call, inputs, dtype=torch.float32, device='cpu'):
    """Outputs (0, 1, ...) and gradients (by input) of ``call``, as a dict of CPU tensors."""
    leaves = {}
    for name, value in inputs.items():
        value = value.detach().to(device, dtype if value.is_floating_point() else None)
        leaves[name.rstrip('!')] = value.requires_grad_() if name.endswith('!') else value
    outputs = call(**leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    found = dict(enumerate(outputs))
    if outputs[0].requires_grad:
        slope = torch.arange(outputs[0].numel(), dtype=torch.float64).cos()
        (outputs[0] * slope.view(outputs[0].shape).to(outputs[0])).sum().backward()
        found |= {name: value.grad for name, value in leaves.items() if value.requires_grad}
    return {str(name): value.detach().cpu() for name, value in found.items()}


def main():
    import mmcv._ext

    assert mmcv._ext.__file__, 'not the compiled extension'
    arrays = {}
    for seed, (case, (call, make)) in enumerate(CASES.items()):
        inputs = make(torch.Generator().manual_seed(seed))
        arrays |= {f'{case}/input/{name}': value.numpy() for name, value in inputs.items()}
        # Non-maximum suppression is compiled for float32 alone.
        dtype = torch.float32 if 'nms' in case else torch.float64
        for name, value in evaluate(call, inputs, dtype).items():
            arrays[f'{case}/output/{name}'] = value.numpy()
    np.savez_compressed(FILE, **arrays)


if __name__ == '__main__':
    main()
