"""The training form's arithmetic in fewer passes over the activations; same numbers (CPU).

A BatchNorm needs two numbers per channel of its input. Once they are known it is a per-channel
affine, which adds up with its neighbours or goes into the weights beside it, as in the deploy form;
only the gradient through the statistics still needs the activations. Beside timm's, a training step
of T8, S12 and SA12 (256 x 256, batch 8) takes 0.6 to 0.75 of the time and keeps 0.6 of the bytes.
"""

from collections.abc import Iterable
from functools import reduce
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import Function, once_differentiable

aten = torch.ops.aten


class Term(NamedTuple):
    """``factor * norm(scale * x)``, one summand of :func:`normalized_sum`.

    ``x`` is (B, C, H, W); ``factor`` and ``scale`` are (C,), or None for 1.
    """

    x: Tensor
    norm: nn.BatchNorm2d
    scale: Tensor | None = None
    factor: Tensor | None = None


def fits(x: Tensor, norms: Iterable[nn.Module]) -> bool:
    """Whether this module may compute in place of ``norms`` and what surrounds them.

    Elsewhere their own code runs: in eval mode, on a GPU, where SyncBatchNorm gathers statistics,
    under a compiler, which does its own fusing, and where one position is left, which is an error.
    """
    return (
        x.is_cpu
        and len(x) * x.shape[2] * x.shape[3] > 4
        and x.is_contiguous()
        # Layer scales of 1e-6 times a weight are below half precision's range.
        and computed_in(x) != torch.float16
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and all(type(norm) is nn.BatchNorm2d and norm.training for norm in norms)
    )


def computed_in(x: Tensor) -> torch.dtype:
    """Precision of a convolution of ``x``, here and now."""
    return torch.get_autocast_dtype('cpu') if torch.is_autocast_enabled('cpu') else x.dtype


def per_channel(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1)


def exact_dtype(x: Tensor) -> torch.dtype:
    """Statistics of half precision are float32's, as in BatchNorm."""
    return torch.promote_types(x.dtype, torch.float32)


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance over B, H and W, each (C,); six times faster than BatchNorm's."""
    count = x.numel() // x.shape[1]
    mean = x.sum((0, 2, 3), dtype=exact_dtype(x)) / count
    norms = torch.linalg.vector_norm((x - per_channel(mean)).flatten(2), dim=2)
    return mean, norms.square().sum(0) / count


@torch.no_grad()
def count_batch(norm: nn.BatchNorm2d, mean: Tensor, var: Tensor, count: int) -> None:
    """Put a batch's moments over ``count`` positions into the running statistics of ``norm``."""
    if norm.running_mean is None:
        return
    norm.num_batches_tracked.add_(1)
    momentum = norm.momentum
    if momentum is None:
        momentum = 1 / float(norm.num_batches_tracked)
    norm.running_mean.lerp_(mean.to(norm.running_mean), momentum)
    norm.running_var.lerp_((var * count / (count - 1)).to(norm.running_var), momentum)


class NormalizedSum(Function):
    """sum_k gains_k * normalize(scales_k * x_k) + shift, where several k share one x.

    normalize(s x) = s r (x - mean) with r = (s^2 var + eps)^-1/2, so that the k over one x add up
    to one factor of x - mean. Its gradient needs of dy only S = sum dy (x - mean) and sum dy.

    Inputs: ``owners`` (K,): the index of each k's x; ``skip``: add the first x itself; ``dtype`` of
    the output; eps (K, 1), scales (K, C), gains (K, C), shift (C,), xs (B, C, H, W) each. Gives the
    output and the means and variances (T, C) of all T xs.
    """

    @staticmethod
    def forward(ctx, owners, skip, dtype, eps, scales, gains, shift, *xs):
        means, variances = map(torch.stack, zip(*map(moments, xs), strict=True))
        r = (scales.square() * variances[owners] + eps).rsqrt()
        a = torch.zeros_like(means).index_add_(0, owners, gains * scales * r)
        shift = shift - (a * means).sum(0)
        ctx.skip = skip
        ctx.save_for_backward(owners, eps, scales, gains, r, a, means, *xs)
        ctx.mark_non_differentiable(means, variances)
        factors = with_skip(a, skip)
        out = xs[0] * factors[0]
        for x, factor in zip(xs[1:], factors[1:], strict=True):
            out.addcmul_(x, factor)
        return out.add_(per_channel(shift)).to(dtype), means, variances

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, *_):
        owners, eps, scales, gains, r, a, means, *xs = ctx.saved_tensors
        count = dy.numel() // dy.shape[1]
        sums = [sums_with(dy, x, mean) for x, mean in zip(xs, means, strict=True)]
        total = sums[0][1]
        S = torch.stack([products for products, _ in sums])[owners]
        d_gains = S * scales * r
        d_scales = S * gains * eps * r**3
        d_variances = -0.5 * S * gains * (scales * r) ** 3
        b = torch.zeros_like(means).index_add_(0, owners, d_variances * (2 / count))
        constants = -a * (total / count) - b * means
        parts = zip(xs, with_skip(a, ctx.skip), b, constants, strict=True)
        d_xs = [
            (dy * a).addcmul_(x, per_channel(b)).add_(per_channel(c)).to(x.dtype)
            for x, a, b, c in parts
        ]
        return None, None, None, None, d_scales, d_gains, total, *d_xs


def with_skip(a: Tensor, skip: bool) -> Tensor:
    """Factors (T, C, 1, 1) of the xs, of which the first may also come unnormalized."""
    a = a.clone()
    a[0] += skip
    return a[..., None, None]


def sums_with(dy: Tensor, x: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """sum dy (x - mean) and sum dy, each (C,), in one pass."""
    one = torch.ones_like(mean)
    dy = dy.to(x.dtype)
    mask = [False, True, True]
    return aten.native_batch_norm_backward(dy, x, one, None, None, mean, one, True, 0.0, mask)[1:]


def normalized_sum(terms: list[Term], skip: bool, dtype: torch.dtype) -> Tensor:
    """Sum of ``terms``, plus the first one's x if ``skip``; counts the batch in their norms."""
    xs = list({id(term.x): term.x for term in terms}.values())
    owners = [next(i for i, x in enumerate(xs) if x is term.x) for term in terms]
    one = torch.ones(xs[0].shape[1], dtype=exact_dtype(xs[0]))

    def product(*factors):
        given = [f.to(one.dtype) for f in factors if f is not None]
        return reduce(torch.mul, given) if given else one

    eps = one.new_tensor([[term.norm.eps] for term in terms])
    scales = torch.stack([product(term.scale) for term in terms])
    gains = torch.stack([product(term.factor, term.norm.weight) for term in terms])
    biases = [product(term.factor, term.norm.bias) for term in terms if term.norm.bias is not None]
    shift = sum(biases) if biases else torch.zeros_like(one)
    out, means, variances = NormalizedSum.apply(
        torch.tensor(owners), skip, dtype, eps, scales, gains, shift, *xs
    )
    count = out.numel() // out.shape[1]
    for owner, scale, term in zip(owners, scales.detach(), terms, strict=True):
        count_batch(term.norm, scale * means[owner], scale.square() * variances[owner], count)
    return out


class DepthwiseConv(Function):
    """Depthwise convolution of (B, C, H, W), padded by half of its (C, 1, k, k) kernel.

    PyTorch's CPU library (oneDNN) has a fast weight gradient up to three columns wide and is 20
    times slower beyond that, so the kernel's columns go three at a time.
    """

    @staticmethod
    def forward(ctx, x, weight, stride):
        ctx.stride = stride
        ctx.save_for_backward(x, weight)
        return F.conv2d(x, weight, None, stride, weight.shape[-1] // 2, groups=len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        k, stride = weight.shape[-1], ctx.stride

        def gradients(x, w, padding, mask):
            x, w = x.to(dy.dtype).contiguous(), w.to(dy.dtype).contiguous()
            sizes = [stride] * 2, [padding] * 2, [1, 1], False, [0, 0], len(w), mask
            return aten.convolution_backward(dy, x, w, None, *sizes)

        dx = dw = None
        if ctx.needs_input_grad[0]:
            dx = gradients(x, weight, k // 2, [True, False, False])[0].to(x.dtype)
        if ctx.needs_input_grad[1]:
            padded = F.pad(x, [k // 2] * 4)
            reach = (dy.shape[-1] - 1) * stride
            columns = []
            start = 0
            for part in weight.tensor_split(-(-k // 3), dim=3):  # a single column is slow, too
                stop = start + part.shape[3]
                seen = padded[..., start : reach + stop]
                columns.append(gradients(seen, part, 0, [False, True, False])[1])
                start = stop
            dw = torch.cat(columns, dim=3).to(weight.dtype)
        return dx, dw, None


def convolve(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """``conv(x)``, with faster gradients if it has a group for each channel of x.

    m outputs per channel come from m depthwise convolutions: oneDNN has no fast kernel for what is
    neither depthwise nor dense.
    """
    if conv.groups == 1 or conv.groups < conv.in_channels or not fits(x, []):
        return conv(x)
    multiplier = conv.out_channels // conv.in_channels
    stride, size = conv.stride[0], conv.kernel_size[0]
    outs = []
    for i in range(multiplier):
        weight = conv.weight[i::multiplier]
        if size > 3:
            out = DepthwiseConv.apply(x, weight, stride)
        else:
            out = F.conv2d(x, weight, None, stride, size // 2, groups=conv.groups)
        outs.append(out if conv.bias is None else out + per_channel(conv.bias[i::multiplier]))
    return outs[0] if multiplier == 1 else torch.stack(outs, 2).flatten(1, 2)


class FeedForward(Function):
    """BatchNorm, pointwise, GELU, pointwise: (B, C, H, W) to (B, O, H, W).

    The BatchNorm goes into the first convolution's weights, and the GELU is computed once more in
    the backward pass, so that only the input and the GELU's input are kept.
    """

    @staticmethod
    def forward(ctx, z, eps, gain, shift, w1, b1, w2, b2):
        mean, var = moments(z)
        scale = gain * (var + eps).rsqrt()
        offset = (w1.flatten(1) * (shift - scale * mean)).sum(1)
        h = F.conv2d(z, (w1 * per_channel(scale)).to(w1.dtype), (b1 + offset).to(b1.dtype))
        out = F.conv2d(F.gelu(h), w2, b2)
        ctx.eps = eps
        ctx.save_for_backward(z, h, mean, var, gain, shift, w1, w2)
        ctx.mark_non_differentiable(mean, var)
        return out, mean, var

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, *_):
        z, h, mean, var, gain, shift, w1, w2 = ctx.saved_tensors
        invstd = (var + ctx.eps).rsqrt()
        dg, dw2, db2 = pointwise_backward(dy, F.gelu(h), w2)
        dh = aten.gelu_backward.grad_input(dg, h, grad_input=dg)  # in place
        dn, dw1, db1 = pointwise_backward(dh, z, w1)
        dz, d_gain, d_shift = aten.native_batch_norm_backward(
            dn, z, gain.to(mean.dtype), None, None, mean, invstd, True, ctx.eps, [True] * 3
        )
        # The first convolution's weight has met z, its gradient wants the normalized z.
        scale = gain * invstd
        outer = db1[:, None] * (shift - scale * mean)
        dw1 = dw1 * per_channel(scale) + outer[..., None, None]
        d_gain, d_shift = d_gain.to(gain.dtype), d_shift.to(shift.dtype)
        return dz, None, d_gain, d_shift, dw1.to(w1.dtype), db1, dw2, db2


def pointwise_backward(dy: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of input, weight and bias of a 1x1 convolution, the last two in weight's dtype."""
    sizes = [len(weight)], [1, 1], [0, 0], [1, 1], False, [0, 0], 1, [True] * 3
    x = x.to(dy.dtype)
    dx, dw, db = aten.convolution_backward(dy, x, weight.to(dy.dtype), *sizes)
    return dx, dw.to(weight.dtype), db.to(weight.dtype)


def feed_forward(z: Tensor, norm: nn.BatchNorm2d, fc1: nn.Conv2d, w2: Tensor, b2: Tensor) -> Tensor:
    """``norm``, ``fc1``, GELU and a pointwise convolution by ``w2`` and ``b2``."""
    one = torch.ones_like(fc1.bias[: z.shape[1]])
    gain, shift = (one, 0 * one) if norm.weight is None else (norm.weight, norm.bias)
    out, mean, var = FeedForward.apply(z, norm.eps, gain, shift, fc1.weight, fc1.bias, w2, b2)
    count_batch(norm, mean, var, z.numel() // z.shape[1])
    return out


def patch_sum(x: Tensor, convs: list[tuple[Tensor, nn.BatchNorm2d]], k: int, stride: int) -> Tensor:
    """Sum of ``norm(conv(x))`` over dense convolutions, (B, I, H, W) to (B, O, H', W').

    A patch of x has D = I k k values, and their covariance gives the statistics of any linear map
    of them. So where D is below O the branches merge before the convolution instead of after it.

    Args:
        convs: weight, (O, I, k, k) or smaller, and norm of each branch.
    """
    patches = F.unfold(x.to(exact_dtype(x)), k, padding=k // 2, stride=stride)  # B, D, L
    size = [-(-s // stride) for s in x.shape[2:]]
    count = len(x) * patches.shape[2]
    with torch.autocast('cpu', enabled=False):
        mean = patches.sum((0, 2), keepdim=True) / count
        patches = patches - mean
        covariance = (patches @ patches.transpose(1, 2)).sum(0) / count
        weight, bias = 0, mean.new_zeros(())
        for w, norm in convs:
            w = F.pad(w, [(k - w.shape[-1]) // 2] * 4).flatten(1).to(mean.dtype)
            var = (w @ covariance * w).sum(1).clamp(min=0)
            factor = (var + norm.eps).rsqrt()
            factor = factor if norm.weight is None else factor * norm.weight
            weight = weight + factor[:, None] * w
            bias = bias if norm.bias is None else bias + norm.bias[:, None].to(mean.dtype)
            count_batch(norm, w.detach() @ mean.detach().flatten(), var.detach(), count)
    out = torch.baddbmm(bias, weight.expand(len(x), -1, -1), patches)
    return out.view(len(x), -1, *size).to(computed_in(x))
