"""The training form on a CPU, computed in fewer passes over the activations.

The results equal those of the plain forward pass up to rounding. A BatchNorm needs two numbers per
channel of its input. Once they are known, it is a per-channel affine map, which can be added to its
neighbours or merged into adjacent weights, as in the deploy form; only the gradient through the
statistics still needs the activations. Compared with timm, a training step of T8, S12 and SA12
(256 x 256, batch 8) takes 0.6 to 0.75 of the time and keeps 0.6 of the bytes.

:func:`accelerated` puts one of the functions here in place of a block's plain forward pass and
decides, once per block and step, which of the two runs.
"""

from collections.abc import Callable, Iterable
from functools import reduce, wraps
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import Function

from .ordinary import ordinary, untouched

aten = torch.ops.aten
LAYERS = nn.Conv2d, nn.BatchNorm2d, nn.GELU, nn.Identity, nn.ModuleList


def accelerated(fast: Callable, over: Callable = nn.Module.children) -> Callable:
    """Decorates a method ``forward(block, x)``: if allowed, ``fast(block, x)`` runs in its place.

    Args:
        over: returns the modules that ``fast`` computes without calling them.
    """

    def decorate(plain):
        @wraps(plain)
        def forward(block, x):
            return fast(block, x) if may_replace(block, x, over) else plain(block, x)

        return forward

    return decorate


def may_replace(block: nn.Module, x: Tensor, over: Callable) -> bool:
    """Whether a function here may compute the modules ``over(block)``.

    Otherwise their own code runs: under a compiler, which does its own fusing; on a GPU; in eval
    mode; if a layer is observed or was changed; with SyncBatchNorm, which gathers statistics; and
    with a single position per channel, for which BatchNorm raises an error.
    """
    return (
        ordinary(x)  # first, as a compiler looks no further
        and block.training
        and block.fused
        and x.ndim == 4
        and len(x) * x.shape[2] * x.shape[3] > 4
        and x.is_contiguous()
        # Layer scales of 1e-6 times a weight are below half precision's range.
        and computed_in(x) != torch.float16
        and all(replaceable(m) for part in over(block) for m in part.modules())
    )


def replaceable(module: nn.Module) -> bool:
    """Whether ``module`` computes what the functions here take it for. Blocks list the types of
    their parts in ``expected``."""
    kind = type(module)
    if kind is nn.Conv2d:
        centered = module.padding == tuple(k // 2 for k in module.kernel_size)
        fits = centered and module.padding_mode == 'zeros' and module.dilation == (1, 1)
    elif kind is nn.BatchNorm2d:
        fits = module.training
    elif kind is nn.GELU:
        fits = module.approximate == 'none'
    else:
        expected = getattr(module, 'expected', {})
        fits = all(type(getattr(module, name)) is part for name, part in expected.items())
    ours = [kind] if kind.__module__.startswith(__package__) else []
    return fits and untouched(module, *LAYERS, *ours)


def set_fused(network: nn.Module, fused: bool) -> None:
    """Let this module compute the blocks of ``network``, or only their plain forward passes."""
    for module in network.modules():
        if hasattr(module, 'fused'):
            module.fused = fused


class Term(NamedTuple):
    """``factor * norm(scale * x)``, a term of :func:`normalized_sum`.

    ``x`` is (B, C, H, W); ``factor`` and ``scale`` are (C,), or None for 1.
    """

    x: Tensor
    norm: nn.BatchNorm2d
    scale: Tensor | None = None
    factor: Tensor | None = None


def computed_in(x: Tensor) -> torch.dtype:
    """The dtype in which a convolution of ``x`` is currently computed."""
    return torch.get_autocast_dtype('cpu') if torch.is_autocast_enabled('cpu') else x.dtype


def per_channel(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1)


def exact_dtype(x: Tensor) -> torch.dtype:
    """Statistics of half-precision tensors are computed in float32, as in BatchNorm."""
    return torch.promote_types(x.dtype, torch.float32)


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance over B, H and W, each (C,); six times faster than BatchNorm's."""
    count = x.numel() // x.shape[1]
    mean = x.sum((0, 2, 3), dtype=exact_dtype(x)) / count
    norms = torch.linalg.vector_norm((x - per_channel(mean)).flatten(2), dim=2)
    return mean, norms.square().sum(0) / count


@torch.no_grad()
def count_batch(norm: nn.BatchNorm2d, mean: Tensor, var: Tensor, count: int) -> None:
    """Update the running statistics of ``norm`` with a batch's moments over ``count`` positions."""
    if norm.running_mean is None:
        return
    norm.num_batches_tracked.add_(1)
    momentum = norm.momentum
    if momentum is None:
        momentum = 1 / float(norm.num_batches_tracked)
    norm.running_mean.lerp_(mean.to(norm.running_mean), momentum)
    norm.running_var.lerp_((var * count / (count - 1)).to(norm.running_var), momentum)


class HandWritten(Function):
    """A function with a hand-written gradient; second derivatives go through ``plain``, the same
    function of the same arguments in PyTorch's own operators."""

    @staticmethod
    def gradients(ctx, plain: Callable, inputs: Iterable, dy: Tensor) -> list[Tensor | None]:
        """Differentiable gradients of ``plain(*inputs)``, None for those not needed."""
        # Views, because one input may have been computed from another.
        inputs = [x.view_as(x) if isinstance(x, Tensor) else x for x in inputs]
        wanted = [x for x, needed in zip(inputs, ctx.needs_input_grad, strict=True) if needed]
        found = iter(torch.autograd.grad(plain(*inputs), wanted, dy, create_graph=True))
        return [next(found) if needed else None for needed in ctx.needs_input_grad]


class NormalizedSum(HandWritten):
    """sum_k g_k * normalize_k(s_k x_k) + shift, where several k may share one x.

    With the mean m and the variance v of x over B, H and W, and r = (s^2 v + eps)^(-1/2),

        normalize(s x) = s r (x - m)

    so all k that share an x add up to one factor of x - m, a = sum_k g s r. Let L be the loss and
    dy = dL/dy. With n = B H W and S = sum dy (x - m):

        dL/dg     = s r S
        dL/ds     = g S (r + s dr/ds)   = g S eps r^3           as dr/ds = -s v r^3
        dL/dv     = g s S dr/dv         = -1/2 g S (s r)^3      as dr/dv = -1/2 s^2 r^3
        dL/dx     = a (dy - sum dy / n) + 2/n (x - m) sum_k dL/dv
        dL/dshift = sum dy

    Inputs: ``owners`` (K,): the index of each k's x; ``skip``: add the first x itself; ``dtype`` of
    the output; eps (K, 1), scales s (K, C), gains g (K, C), shift (C,), xs (B, C, H, W) each.
    Returns the output and the means and variances (T, C) of all T xs.
    """

    @staticmethod
    def plain(owners, skip, dtype, eps, scales, gains, shift, *xs):
        out = per_channel(shift) + (xs[0] if skip else 0)
        for k, owner in enumerate(owners.tolist()):
            x = xs[owner].to(shift.dtype) * per_channel(scales[k])
            normalized = F.batch_norm(x, None, None, training=True, eps=float(eps[k]))
            out = out + per_channel(gains[k]) * normalized
        return out.to(dtype)

    @staticmethod
    def forward(ctx, owners, skip, dtype, eps, scales, gains, shift, *xs):
        means, variances = map(torch.stack, zip(*map(moments, xs), strict=True))
        r = (scales.square() * variances[owners] + eps).rsqrt()
        a = torch.zeros_like(means).index_add_(0, owners, gains * scales * r)
        ctx.skip, ctx.dtype = skip, dtype
        ctx.save_for_backward(owners, eps, scales, gains, shift, r, a, means, *xs)
        ctx.mark_non_differentiable(means, variances)
        factors = with_skip(a, skip)
        out = xs[0] * factors[0]
        for x, factor in zip(xs[1:], factors[1:], strict=True):
            out.addcmul_(x, factor)
        shift = shift - (a * means).sum(0)
        return out.add_(per_channel(shift)).to(dtype), means, variances

    @staticmethod
    def backward(ctx, dy, *_):
        owners, eps, scales, gains, shift, r, a, means, *xs = ctx.saved_tensors
        if torch.is_grad_enabled():
            inputs = owners, ctx.skip, ctx.dtype, eps, scales, gains, shift, *xs
            return (*NormalizedSum.gradients(ctx, NormalizedSum.plain, inputs, dy),)
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
    """Factors (T, C, 1, 1) of the xs; ``skip`` also adds the first one unnormalized."""
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
    """Sum of ``terms``, plus the first one's x if ``skip``; updates their norms' statistics."""
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


class DepthwiseConv(HandWritten):
    """Depthwise convolution of (B, C, H, W), padded by half the size of its (C, 1, k, k) kernel.

    PyTorch's CPU library (oneDNN) computes weight gradients fast for kernels of up to three columns
    and 20 times slower beyond that, so the kernel's columns are processed three at a time.
    """

    @staticmethod
    def plain(x, weight, stride):
        return F.conv2d(x, weight, None, stride, weight.shape[-1] // 2, groups=len(weight))

    @staticmethod
    def forward(ctx, x, weight, stride):
        ctx.stride = stride
        ctx.save_for_backward(x, weight)
        return DepthwiseConv.plain(x, weight, stride)

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        k, stride = weight.shape[-1], ctx.stride
        if torch.is_grad_enabled():
            inputs = x, weight, stride
            return tuple(DepthwiseConv.gradients(ctx, DepthwiseConv.plain, inputs, dy))

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
            for part in weight.tensor_split(-(-k // 3), dim=3):  # a single column is slow as well
                stop = start + part.shape[3]
                seen = padded[..., start : reach + stop]
                columns.append(gradients(seen, part, 0, [False, True, False])[1])
                start = stop
            dw = torch.cat(columns, dim=3).to(weight.dtype)
        return dx, dw, None


def convolve(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """``conv(x)``, with faster gradients if it has one group per channel of x.

    m outputs per channel are computed by m depthwise convolutions: oneDNN has no fast kernel for a
    convolution that is neither depthwise nor dense.
    """
    if conv.groups == 1 or conv.groups < conv.in_channels:
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


class FeedForward(HandWritten):
    """BatchNorm, pointwise, GELU, pointwise: (B, C, H, W) to (B, O, H, W).

    With the mean m and the variance v of z over B, H and W, r = (v + eps)^(-1/2), and the
    BatchNorm's gain g and shift t, the normalized z is n = s z + o with s = g r and o = t - s m,
    so the BatchNorm can be merged into the first convolution:

        h = W1 n + b1 = (W1 diag(s)) z + (W1 o + b1),    y = W2 gelu(h) + b2

    The GELU is recomputed in the backward pass, so that only z and h are kept. With
    dh = gelu'(h) * W2' dy, BatchNorm's own backward pass computes the gradients of z, g and t from
    dn = W1' dh, and

        dL/dW1 = sum dh n' = (sum dh z') diag(s) + (sum dh) o'
    """

    @staticmethod
    def plain(z, eps, gain, shift, w1, b1, w2, b2):
        n = F.batch_norm(z, None, None, gain, shift, training=True, eps=eps)
        return F.conv2d(F.gelu(F.conv2d(n, w1, b1)), w2, b2)

    @staticmethod
    def forward(ctx, z, eps, gain, shift, w1, b1, w2, b2):
        mean, var = moments(z)
        scale = gain * (var + eps).rsqrt()
        offset = (w1.flatten(1) * (shift - scale * mean)).sum(1)
        h = F.conv2d(z, (w1 * per_channel(scale)).to(w1.dtype), (b1 + offset).to(b1.dtype))
        out = F.conv2d(F.gelu(h), w2, b2)
        ctx.eps = eps
        ctx.save_for_backward(z, h, mean, var, gain, shift, w1, b1, w2, b2)
        ctx.mark_non_differentiable(mean, var)
        return out, mean, var

    @staticmethod
    def backward(ctx, dy, *_):
        z, h, mean, var, gain, shift, w1, b1, w2, b2 = ctx.saved_tensors
        if torch.is_grad_enabled():
            inputs = z, ctx.eps, gain, shift, w1, b1, w2, b2
            return tuple(FeedForward.gradients(ctx, FeedForward.plain, inputs, dy))
        invstd = (var + ctx.eps).rsqrt()
        dg, dw2, db2 = pointwise_backward(dy, F.gelu(h), w2)
        dh = aten.gelu_backward.grad_input(dg, h, grad_input=dg)  # in place
        dn, dw1, db1 = pointwise_backward(dh, z, w1)
        dz, d_gain, d_shift = aten.native_batch_norm_backward(
            dn, z, gain.to(mean.dtype), None, None, mean, invstd, True, ctx.eps, [True] * 3
        )
        scale = gain * invstd
        outer = db1[:, None] * (shift - scale * mean)
        dw1 = dw1 * per_channel(scale) + outer[..., None, None]
        d_gain, d_shift = d_gain.to(gain.dtype), d_shift.to(shift.dtype)
        return dz, None, d_gain, d_shift, dw1.to(w1.dtype), db1, dw2, db2


def pointwise_backward(dy: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of input, weight and bias of a 1x1 convolution, the last two in its dtype."""
    sizes = [len(weight)], [1, 1], [0, 0], [1, 1], False, [0, 0], 1, [True] * 3
    x = x.to(dy.dtype)
    dx, dw, db = aten.convolution_backward(dy, x, weight.to(dy.dtype), *sizes)
    return dx, dw.to(weight.dtype), db.to(weight.dtype)


def feed_forward(z: Tensor, norm: nn.BatchNorm2d, fc1: nn.Conv2d, w2: Tensor, b2: Tensor) -> Tensor:
    """``norm``, ``fc1``, GELU and a pointwise convolution with ``w2`` and ``b2``."""
    one = fc1.bias.new_ones(z.shape[1])
    gain, shift = (one, 0 * one) if norm.weight is None else (norm.weight, norm.bias)
    out, mean, var = FeedForward.apply(z, norm.eps, gain, shift, fc1.weight, fc1.bias, w2, b2)
    count_batch(norm, mean, var, z.numel() // z.shape[1])
    return out


def patch_sum(x: Tensor, convs: list[tuple[Tensor, nn.BatchNorm2d]], k: int, stride: int) -> Tensor:
    """Sum of ``norm(conv(x))`` over dense convolutions, (B, I, H, W) to (B, O, H', W').

    A patch of x has D = I k k values, and their covariance determines the statistics of any linear
    map of them. So if D is below O, the branches are merged before the convolution, not after it.

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
        weight, biases = 0, []
        for w, norm in convs:
            w = F.pad(w, [(k - w.shape[-1]) // 2] * 4).flatten(1).to(mean.dtype)
            var = (w @ covariance * w).sum(1).clamp(min=0)
            factor = (var + norm.eps).rsqrt()
            factor = factor if norm.weight is None else factor * norm.weight
            weight = weight + factor[:, None] * w
            if norm.bias is not None:
                biases.append(norm.bias)
            count_batch(norm, w.detach() @ mean.detach().flatten(), var.detach(), count)
        # Added up before any view of them, or their gradients would be views of the same memory.
        bias = sum(biases).to(mean.dtype)[:, None] if biases else mean.new_zeros(())
    out = torch.baddbmm(bias, weight.expand(len(x), -1, -1), patches)
    return out.view(len(x), -1, *size).to(computed_in(x))


# --- what blocks run ------------------------------------------------------------------------------


def sum_of_branches(block: nn.Module, x: Tensor) -> Tensor:
    """The sum of a :class:`RepConv`'s branches; those with the same input share its statistics."""
    leaves, geometry = list(block.leaves()), block.geometry
    size, stride = geometry['kernel_size'], geometry['stride']
    patch = size**2 * geometry['in_channels']
    if geometry['groups'] == 1 < size and patch <= geometry['out_channels']:
        return patch_sum(x, [(leaf.conv.weight, leaf.bn) for _, leaf in leaves], size, stride)

    terms, skip, dtype = [], False, computed_in(x)
    for factor, leaf in leaves:
        if isinstance(factor, Tensor):
            factor, dtype = factor.flatten(), torch.promote_types(dtype, factor.dtype)
        else:
            factor = None
        if leaf is None:
            skip = True
        elif isinstance(leaf, nn.BatchNorm2d):
            dtype = torch.promote_types(dtype, x.dtype)
            terms.append(Term(x, leaf, factor=factor))
        elif leaf.is_scale:
            terms.append(Term(centers(x, geometry), leaf.bn, leaf.conv.weight.flatten(), factor))
        else:
            terms.append(Term(convolve(leaf.conv, leaf.strided(x)), leaf.bn, factor=factor))
    return normalized_sum(terms, skip, dtype)


def centers(x: Tensor, geometry: dict) -> Tensor:
    """The input at the kernel's center for each output of a depthwise convolution."""
    stride = geometry['stride']
    multiplier = geometry['out_channels'] // geometry['in_channels']
    x = x if stride == 1 else x[:, :, ::stride, ::stride].contiguous()
    return x if multiplier == 1 else x.repeat_interleave(multiplier, dim=1)


def convolution_and_norm(block: nn.Module, x: Tensor) -> Tensor:
    """A :class:`ConvBN`; its norm is called."""
    return block.bn(convolve(block.conv, block.strided(x)))


def positional_encoding(block: nn.Module, x: Tensor) -> Tensor:
    return x + convolve(block.pos_enc, x)


def ffn_residual(block: nn.Module, x: Tensor) -> Tensor:
    """The second half of a block, with its layer scale in the second convolution's weights.

    Only the drop path is called.
    """
    mlp, gamma = block.mlp, block.ffn_scale.gamma
    weight, bias = mlp.fc2.weight * gamma[..., None], mlp.fc2.bias * gamma.flatten()
    z = convolve(mlp.conv.conv, x)
    return x + block.drop_path(feed_forward(z, mlp.conv.bn, mlp.fc1, weight, bias))
