"""mmcv's operators without mmcv's compiled extension.

A pip-installed mmcv (``mmcv-lite``, ``onedl-mmcv``) has no ``mmcv._ext``. mmcv looks up its
operators there when ``mmcv.ops`` is imported, so neither mmdet's nor mmseg's models can be
imported, even those that never call an operator.

:func:`install` makes Python find a substitute if no compiled ``mmcv._ext`` exists: torchvision
and plain PyTorch compute the operators in :data:`COVERED`, on any device; every other operator
can be looked up, but raises ``NotImplementedError`` when called.

The functions keep the calling convention of the extension: gradients are separate functions,
results are written to tensors allocated by the caller, and scratch buffers are passed (and not
used here).
"""

import functools
import importlib.machinery
import sys
from operator import itemgetter

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ['COVERED', 'install']


def install() -> None:
    """Let ``import mmcv._ext`` succeed; has no effect if the compiled extension is found."""
    # Last in line: asked only if no other finder, and so no installed mmcv, has the module.
    if _Substitute not in sys.meta_path:
        sys.meta_path.append(_Substitute)


class _Substitute:
    """Finder and loader of the substitute ``mmcv._ext``."""

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name == 'mmcv._ext':
            return importlib.machinery.ModuleSpec(name, cls, origin=__name__)

    @staticmethod
    def create_module(spec):
        return None  # an ordinary module

    @staticmethod
    def exec_module(module):
        vars(module).update(COVERED, __getattr__=_uncovered)


def _uncovered(name: str):
    # Python and its tools ask modules for dunder names, which must be reported as absent.
    if name.startswith('__'):
        raise AttributeError(f"module 'mmcv._ext' has no attribute {name!r}")

    def operator(*args, **kwargs):
        raise NotImplementedError(_needs_build(repr(name)))

    return operator


def _needs_build(what: str) -> str:
    return (
        f"mmcv operator {what} needs mmcv's compiled extension: install an mmcv built with its "
        'operators for your torch version '
        '(https://mmcv.readthedocs.io/en/latest/get_started/installation.html)'
    )


@functools.cache
def _torchvision():
    import torchvision  # noqa: F401  (registers the operators)

    return torch.ops.torchvision


# ---------------------------------------------------------------------------------- boxes


def nms(boxes, scores, iou_threshold, offset):
    # torchvision wants one dtype for both, and none narrower than float32.
    dtype = functools.reduce(torch.promote_types, (boxes.dtype, scores.dtype, torch.float32))
    boxes = boxes.to(dtype)
    if offset:  # the far edge is the box's last pixel
        boxes = boxes + boxes.new_tensor([0, 0, offset, offset])
    # Rounded like the overlaps, so that a box exactly at the threshold is kept.
    iou_threshold = torch.tensor(iou_threshold, dtype=dtype).item()
    return _torchvision().nms(boxes, scores.to(dtype), iou_threshold)


def softnms(boxes, scores, dets, iou_threshold, sigma, min_score, method, offset):
    boxes, scores, index = boxes.clone(), scores.clone(), torch.arange(len(boxes))
    areas = (boxes[:, 2:] - boxes[:, :2] + offset).prod(1)
    kept = []
    while len(index):
        best = scores.argmax()
        box, area = boxes[best], areas[best]
        dets[len(kept), :4], dets[len(kept), 4] = box, scores[best]
        kept.append(index[best])

        sides = torch.min(box[2:], boxes[:, 2:]) - torch.max(box[:2], boxes[:, :2]) + offset
        overlap = sides.clamp(min=0).prod(1)
        iou = overlap / (area + areas - overlap)
        if method == 0:  # naive
            factor = (~(iou >= iou_threshold)).to(iou)
        elif method == 1:  # linear
            factor = torch.where(iou >= iou_threshold, 1 - iou, 1.0)
        else:  # gaussian
            factor = torch.exp(-iou.square() / sigma)
        scores = scores * factor

        left = ~(scores < min_score)
        left[best] = False
        boxes, scores, areas, index = boxes[left], scores[left], areas[left], index[left]
    return torch.stack(kept) if kept else index


# ------------------------------------------------------------------------ regions of interest

_ALIGN_BINS = itemgetter('spatial_scale', 'aligned_height', 'aligned_width')
_POOL_BINS = itemgetter('spatial_scale', 'pooled_height', 'pooled_width')
_ALIGN_SAMPLES = itemgetter('sampling_ratio', 'aligned')


def _single(x):
    """``x`` in at least float32: half precision rounds boxes to whole pixels, and on CPUs
    torchvision has no gradients in it."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def roi_align_forward(input, rois, output, argmax_y, argmax_x, *, pool_mode, **options):
    if pool_mode != 1:
        raise NotImplementedError(_needs_build("'roi_align_forward' with pool_mode='max'"))
    options = *_ALIGN_BINS(options), *_ALIGN_SAMPLES(options)
    input, rois = _single(input), _single(rois)
    output.copy_(_torchvision().roi_align(input, rois.to(input), *options))


def roi_align_backward(grad_output, rois, argmax_y, argmax_x, grad_input, **options):
    options = *_ALIGN_BINS(options), *grad_input.shape, *_ALIGN_SAMPLES(options)
    grad_output, rois = _single(grad_output), _single(rois)
    rois = rois.to(grad_output)
    grad_input.copy_(_torchvision()._roi_align_backward(grad_output, rois, *options))


def roi_pool_forward(input, rois, output, argmax, *, pooled_height, pooled_width, spatial_scale):
    # Not torchvision's, which rounds a box to whole pixels before dividing it into bins.
    output.zero_()
    argmax.fill_(-1)  # stays where a bin is empty
    height, width = input.shape[-2:]
    in_row, top, bottom = _bins(rois[:, 2], rois[:, 4], spatial_scale, pooled_height, height)
    in_col, left, right = _bins(rois[:, 1], rois[:, 3], spatial_scale, pooled_width, width)
    for n, (image, y0, y1, x0, x1) in enumerate(
        torch.stack([rois[:, 0].long(), top, bottom, left, right], 1).tolist()
    ):
        if y0 >= y1 or x0 >= x1:
            continue
        crop = input[image, :, y0:y1, None, x0:x1]
        # Maximum of each row's bin, then of the rows: among equals, the first in reading order.
        crop, col = crop.masked_fill(~in_col[n, :, x0:x1], -torch.inf).max(-1)
        crop, row = crop[:, None].masked_fill(~in_row[n, :, y0:y1, None], -torch.inf).max(2)
        found = crop > -torch.inf
        position = (row + y0) * width + col.gather(1, row) + x0
        output[n] = crop.where(found, 0)
        argmax[n] = position.where(found, -1)


def _bins(low: Tensor, high: Tensor, scale: float, bins: int, limit: int):
    """Which of ``limit`` pixels each bin of each interval covers, and the interval's ends."""
    low, high = low * scale, (high + 1) * scale
    step = ((high - low) / bins)[:, None]
    index = torch.arange(bins + 1).to(low)
    # In float32 whatever the dtype: float64's last digits would add pixels to a bin.
    first = (index[:-1] * step + low[:, None]).float().floor().clamp(0, limit)
    last = (index[1:] * step + low[:, None]).float().ceil().clamp(0, limit)
    last = torch.where(step > 0, last, first)
    pixel = torch.arange(limit, device=low.device)
    covered = (pixel >= first[..., None]) & (pixel < last[..., None])
    return covered, first[:, 0].long(), last[:, -1].long()


def roi_pool_backward(grad_output, rois, argmax, grad_input, **options):
    options = *_POOL_BINS(options), *grad_input.shape
    rois = rois.to(grad_output)
    grad_input.copy_(_torchvision()._roi_pool_backward(grad_output, rois, argmax, *options))


# ---------------------------------------------------------------------- deformable convolution

# Stride, padding, dilation and the two group counts, in torchvision's order.
_GEOMETRY_1 = itemgetter(
    'dH', 'dW', 'padH', 'padW', 'dilationH', 'dilationW', 'group', 'deformable_group'
)
_GEOMETRY_2 = itemgetter(
    *('stride_h', 'stride_w', 'pad_h', 'pad_w', 'dilation_h', 'dilation_w'),
    *('group', 'deformable_group'),
)


def _deform_args(input, weight, offset, mask, bias, geometry):
    use_mask = mask is not None
    mask = mask if use_mask else input.new_zeros(len(input), 1)
    bias = weight.new_zeros(len(weight)) if bias is None else bias
    return input, weight, offset, mask, bias, *geometry, use_mask


def _deform_backward(grad_output, input, weight, offset, mask, bias, geometry):
    """Gradients of input, weight, offset, mask and bias."""
    grads = _torchvision()._deform_conv2d_backward(
        grad_output, *_deform_args(input, weight, offset, mask, bias, geometry)
    )
    # At exactly -1 (the padding of a new layer, whose offsets are zero) the derivative differs
    # between the two sides: mmcv takes the outer one, 0, and torchvision the inner one.
    kernel, size = weight.shape[2:], offset.shape[2:]
    shape = len(offset), geometry[7], *kernel, 2, *size
    for axis in (0, 1):
        stride, padding, dilation = geometry[axis:6:2]
        out = torch.arange(size[axis], device=offset.device) * stride - padding
        tap = torch.arange(kernel[axis], device=offset.device) * dilation
        grid = tap[:, None] + out
        grid = grid[:, None, :, None] if axis == 0 else grid[:, None, :]
        position = offset.view(shape).select(4, axis) + grid
        grads[2].view(shape).select(4, axis).masked_fill_(position == -1, 0)
    return grads


def deform_conv_forward(input, weight, offset, output, columns, ones, **options):
    args = _deform_args(input, weight, offset, None, None, _GEOMETRY_1(options))
    output.copy_(_torchvision().deform_conv2d(*args))


def deform_conv_backward_input(
    input, offset, grad_output, grad_input, grad_offset, weight, columns, **options
):
    geometry = _GEOMETRY_1(options)
    grads = _deform_backward(grad_output, input, weight, offset, None, None, geometry)
    grad_input.copy_(grads[0])
    grad_offset.copy_(grads[2])


def deform_conv_backward_parameters(
    input, offset, grad_output, grad_weight, columns, ones, *, scale, **options
):
    # The weight's values do not enter its own gradient.
    weight, geometry = torch.zeros_like(grad_weight), _GEOMETRY_1(options)
    grads = _deform_backward(grad_output, input, weight, offset, None, None, geometry)
    grad_weight.add_(grads[1], alpha=scale)


def modulated_deform_conv_forward(
    input, weight, bias, ones, offset, mask, output, columns, *, with_bias, **options
):
    bias = bias if with_bias else None
    args = _deform_args(input, weight, offset, mask, bias, _GEOMETRY_2(options))
    output.copy_(_torchvision().deform_conv2d(*args))


def modulated_deform_conv_backward(
    input,
    weight,
    bias,
    ones,
    offset,
    mask,
    columns,
    grad_input,
    grad_weight,
    grad_bias,
    grad_offset,
    grad_mask,
    grad_output,
    *,
    with_bias,
    **options,
):
    bias, geometry = bias if with_bias else None, _GEOMETRY_2(options)
    grads = _deform_backward(grad_output, input, weight, offset, mask, bias, geometry)
    outputs = grad_input, grad_weight, grad_offset, grad_mask, grad_bias
    for output, grad in zip(outputs[: 4 + with_bias], grads, strict=False):
        output.copy_(grad)


# --------------------------------------------------------------------------------- focal loss


def _focal(input, target, weight, alpha):
    """Mask of the label's class; probabilities of the wrong and right answer; log; weight."""
    p = input.to(torch.promote_types(input.dtype, torch.float32)).sigmoid()
    own = target[:, None] == torch.arange(input.shape[1], device=target.device)
    wrong, right = torch.where(own, 1 - p, p), torch.where(own, p, 1 - p)
    log = right.clamp(min=torch.finfo(torch.float32).tiny).log()
    scale = torch.where(own, torch.full_like(p, alpha), 1 - alpha)
    if weight.numel():
        # A row has its label's weight, or 1 if it is background (any other label).
        known = (target >= 0) & (target < len(weight))
        scale *= torch.where(known, weight[target.where(known, 0)].to(p), 1.0)[:, None]
    return own, wrong, right, log, scale


def sigmoid_focal_loss_forward(input, target, weight, output, gamma, alpha):
    _, wrong, _, log, scale = _focal(input, target, weight, alpha)
    output.copy_(-scale * wrong**gamma * log)


def sigmoid_focal_loss_backward(input, target, weight, grad_input, gamma, alpha):
    own, wrong, right, log, scale = _focal(input, target, weight, alpha)
    slope = scale * wrong**gamma * (wrong - gamma * right * log)
    grad_input.copy_(torch.where(own, -slope, slope))


# ----------------------------------------------------------------------- deformable attention


def ms_deform_attn_forward(value, shapes, starts, locations, weights, im2col_step):
    batch, _, heads, channels = value.shape
    points = (2 * locations - 1).permute(3, 0, 2, 1, 4, 5).flatten(1, 2)  # level first
    weights = weights.permute(3, 0, 2, 1, 4).flatten(1, 2)
    output = 0
    for level, (start, (height, width)) in enumerate(
        zip(starts.tolist(), shapes.tolist(), strict=True)
    ):
        maps = value[:, start : start + height * width].permute(0, 2, 3, 1)
        maps = maps.reshape(batch * heads, channels, height, width)
        sampled = F.grid_sample(maps, points[level], align_corners=False)
        output = output + (sampled * weights[level, :, None]).sum(-1)
    output = output.reshape(batch, heads * channels, -1).transpose(1, 2)
    return output.to(value.dtype).contiguous()


def ms_deform_attn_backward(
    value, shapes, starts, locations, weights, grad_output, *grads, im2col_step
):
    leaves = [x.detach().requires_grad_() for x in (value, locations, weights)]
    with torch.enable_grad():
        output = ms_deform_attn_forward(leaves[0], shapes, starts, *leaves[1:], im2col_step)
    found = torch.autograd.grad(output, leaves, grad_output)
    for grad, value in zip(grads, found, strict=True):
        grad.copy_(value)


# -------------------------------------------------------------------------------------- table


def get_compiler_version():
    return 'n/a'


def get_compiling_cuda_version():
    return 'n/a'


#: Operators of ``mmcv._ext`` that work without it.
COVERED = {
    function.__name__: function
    for function in (
        nms,
        softnms,
        roi_align_forward,
        roi_align_backward,
        roi_pool_forward,
        roi_pool_backward,
        deform_conv_forward,
        deform_conv_backward_input,
        deform_conv_backward_parameters,
        modulated_deform_conv_forward,
        modulated_deform_conv_backward,
        sigmoid_focal_loss_forward,
        sigmoid_focal_loss_backward,
        ms_deform_attn_forward,
        ms_deform_attn_backward,
        get_compiler_version,
        get_compiling_cuda_version,
    )
}
