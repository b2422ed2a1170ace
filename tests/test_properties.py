"""Properties that hold for any network, weights and sizes: deploy form and layouts.

HYPOTHESIS_PROFILE=long pytest tests/test_properties*.py runs many more examples, other ones each
time.
"""

import copy

import torch
import torch.nn as nn
import torch.nn.functional as F
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch.nn.modules.batchnorm import _BatchNorm

from fastvit_mm import FastViT, FastViTNeck, weights
from fastvit_mm.models.fastvit import LargeKernelConv, PositionalEncoding, RepMixer
from fastvit_mm.models.rep_conv import ConvBN, MobileOneBlock
from fastvit_mm.weights.layouts import from_mm, recognize, to_mm

BN = dict(type='BN')


def share(part):
    """So many times the examples of the profile: what is quick gets more."""
    return settings(max_examples=round(part * settings().max_examples))


DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@st.composite
def archs(draw):
    """Settings of any small network, attention anywhere."""
    attention = draw(st.lists(st.integers(0, 1), min_size=4, max_size=4))
    width, widths = 32 if any(attention) else draw(st.sampled_from([8, 12, 16])), []
    for _ in range(4):
        width *= draw(st.sampled_from([1, 1, 2])) if width < 64 else 1
        widths.append(width)
    return dict(
        depths=draw(st.lists(st.integers(1, 2), min_size=4, max_size=4)),
        widths=widths,
        ffn_ratio=draw(st.sampled_from([1, 2, 3, 4])),
        attention=attention,
        layer_scale=draw(st.sampled_from([1e-6, 1e-2, 1.0])),
    )


class Statistics:
    """How a network is filled: weights, and BatchNorms as bad as they get.

    Args:
        variance: exponents (of 10) between which running variances lie.
        mean: largest running mean in units of the running deviation.
        zeros, negative: shares of BatchNorm's gammas.
    """

    def __init__(self, seed, variance, mean, zeros, negative):
        self.seed, self.variance, self.mean = seed, variance, mean
        self.zeros, self.negative = zeros, negative

    def __repr__(self):
        return f'Statistics{(self.seed, self.variance, self.mean, self.zeros, self.negative)}'

    @torch.no_grad()
    def fill(self, module: nn.Module) -> nn.Module:
        generator = torch.Generator().manual_seed(self.seed)

        def uniform(like, low, high):
            return torch.empty(like.shape, dtype=torch.float64).uniform_(
                low, high, generator=generator
            )

        for name, weight in module.named_parameters():
            fan = weight[0].numel() if weight.ndim > 1 and 'gamma' not in name else 1
            weight.copy_(uniform(weight, -1, 1) / fan**0.5)
        for norm in module.modules():
            if isinstance(norm, _BatchNorm):
                norm.running_var.copy_(10 ** uniform(norm.running_var, *self.variance))
                deviation = (norm.running_var + norm.eps).sqrt()
                norm.running_mean.copy_(
                    uniform(norm.running_mean, -self.mean, self.mean) * deviation
                )
                gamma = uniform(norm.weight, 0.1, 1)
                gamma[uniform(gamma, 0, 1) < self.negative] *= -1
                gamma[uniform(gamma, 0, 1) < self.zeros] = 0
                norm.weight.copy_(gamma)
        return module.eval()


statistics = st.builds(
    Statistics,
    st.integers(0, 2**31),
    st.tuples(st.integers(-12, 0), st.integers(0, 6)),
    st.sampled_from([0.0, 1.0, 100.0]),
    st.sampled_from([0.0, 0.3, 1.0]),
    st.sampled_from([0.0, 0.5, 1.0]),
)


def bound(weight, bias, x, geometry, eps):
    """How far rounding can take a convolution from its exact result: each of its sums has n
    products, computed and added in some order, of weights that were rounded themselves
    (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1)."""
    terms = weight[0].numel() + 3
    magnitude = F.conv2d(x.abs(), weight.abs(), bias.abs(), **geometry)
    # Halved by rounding to nearest; doubled for a result that is rounded to the type once more.
    return terms * eps * magnitude + torch.finfo(torch.float32).tiny


BLOCKS = {
    'mobileone': lambda w, k: MobileOneBlock(w, w, k, groups=w, norm_cfg=BN),
    'dense': lambda w, k: MobileOneBlock(w, 2 * w, k, stride=2, norm_cfg=BN),
    'norm alone': lambda w, k: MobileOneBlock(w, w, k, with_conv=False, groups=w, norm_cfg=BN),
    'mixer': lambda w, k: RepMixer(w, 1.0, norm_cfg=BN),
    'large kernel': lambda w, k: LargeKernelConv(w, 2 * w, norm_cfg=BN),
    'position': lambda w, k: PositionalEncoding(w),
    'conv and norm': lambda w, k: ConvBN(w, w, k, groups=w, norm_cfg=BN),
}


@share(8)
@given(
    st.sampled_from(list(BLOCKS)),
    st.sampled_from([1, 4, 12]),
    st.sampled_from([1, 3, 7]),
    statistics,
    st.tuples(st.integers(1, 3), st.integers(1, 12), st.integers(1, 12)),
    st.floats(-3, 3),
)
@example('mixer', 4, 3, Statistics(0, (-12, -12), 100.0, 0.3, 0.5), (2, 8, 8), 0.0)
def test_a_merged_block_is_exact(kind, width, kernel, filled, size, magnitude):
    """The deploy form of any block, in float32, is as near to the training form's exact result as a
    single convolution can be: merging itself adds no error, however bad the statistics are."""
    block = filled.fill(BLOCKS[kind](width, kernel).double()).float()
    batch, height, width_ = size
    generator = torch.Generator().manual_seed(filled.seed)
    x = torch.randn(batch, width, height, width_, generator=generator) * 10**magnitude
    with torch.no_grad():
        merged = copy.deepcopy(block).deployed()
        exact = copy.deepcopy(block).double()(x.double())
        conv = merged.reparam_conv
        geometry = dict(stride=conv.stride, padding=conv.padding, groups=conv.groups)
        weight, bias = block.merged()
        limit = bound(weight, bias, x.double(), geometry, torch.finfo(torch.float32).eps)
        # The exact result itself is computed in float64, with its own, larger sums.
        scale = sum_of_magnitudes(block, x.double())
        limit = limit + 1e3 * torch.finfo(torch.float64).eps * scale
        assert exact.isfinite().all()
        assert ((merged(x).double() - exact).abs() <= limit).all()


def sum_of_magnitudes(block, x):
    """The largest value that any branch of a block computes on its way."""
    largest = x.abs().max()
    for factor, leaf in [(1.0, block)] if isinstance(block, ConvBN) else block.leaves():
        if isinstance(leaf, ConvBN):
            y = leaf.conv(leaf.strided(x).to(leaf.conv.weight).abs()).double().abs().max()
            norm = leaf.bn
        elif isinstance(leaf, _BatchNorm):
            y, norm = x.abs().max(), leaf
        else:
            largest = (
                largest
                + (leaf.weight.double().abs().sum() if leaf is not None else 1) * x.abs().max()
            )
            continue
        gain = (norm.weight / (norm.running_var + norm.eps).sqrt()).double().abs().max()
        part = gain * (y + norm.running_mean.double().abs().max()) + norm.bias.double().abs().max()
        largest = largest + part * torch.as_tensor(factor).detach().double().abs().max()
    return largest


def forms(settings_, filled, dtype):
    """A network of all parts in its training form and merged, in ``dtype``."""
    network = nn.Module()
    network.backbone = FastViT(settings_, feature_norm=True)
    network.neck = FastViTNeck(settings_['widths'][-1])
    filled.fill(network.double())
    network.to(dtype)
    merged = copy.deepcopy(network)
    for part in (merged.backbone, merged.neck):
        part.switch_to_deploy()
    return network.eval(), merged.eval()


def outputs(network, x):
    with torch.no_grad():
        features = network.backbone(x)
        return [f.double() for f in (*features, *network.neck(features))]


def far(ones, others):
    """Largest difference of each output, relative to its largest value."""
    return [
        float((a - b).abs().max() / b.abs().max().clamp(min=1e-300))
        for a, b in zip(ones, others, strict=True)
    ]


mild = st.builds(
    Statistics,
    st.integers(0, 2**31),
    st.tuples(st.integers(-3, 0), st.integers(0, 2)),
    st.sampled_from([0.0, 1.0]),
    st.sampled_from([0.0, 0.2]),
    st.sampled_from([0.0, 0.5, 1.0]),
)


@share(0.6)
@given(archs(), mild, st.sampled_from(DTYPES), st.integers(32, 70), st.integers(32, 70))
def test_a_merged_network_computes_the_same(settings_, filled, dtype, height, width):
    """Any architecture at any size, in any type: both forms are equally far from the exact result.

    How far rounding takes a network is its condition, times the precision of the type. It is
    measured: by rounding the weights and the input of the training form to float32, once, and
    computing with both in float64.
    """
    generator = torch.Generator().manual_seed(filled.seed)
    x = torch.randn(2, 3, height, width, generator=generator, dtype=torch.float64)
    exact, merged = forms(settings_, filled, torch.float64)
    reference = outputs(exact, x)
    assume(all(r.isfinite().all() and r.abs().max() > 1e-100 for r in reference))
    rounded = copy.deepcopy(exact).float().double()
    condition = [
        d / EPS[torch.float32] for d in far(outputs(rounded, x.float().double()), reference)
    ]
    assume(max(condition) < 1e6)

    for distance, amount in zip(far(outputs(merged, x), reference), condition, strict=True):
        assert distance <= 100 * max(amount, 1) * EPS[torch.float64]
    if dtype is torch.float64:
        return
    _, deployed = forms(settings_, filled, dtype)
    if max(condition) * EPS[dtype] > 0.01 or max(float(r.abs().max()) for r in reference) > 1e4:
        return  # the type cannot compute this network in either form
    ours = outputs(deployed, x.to(dtype))
    for distance, amount in zip(far(ours, reference), condition, strict=True):
        assert distance <= 100 * max(amount, 1) * EPS[dtype]


EPS = {dtype: torch.finfo(dtype).eps for dtype in DTYPES}


# ---------------------------------------------------------------------------------------- layouts


def model_state(settings_, seed, classes):
    """A classifier's weights in OpenMMLab's names, every value another one."""
    torch.manual_seed(seed)
    parts = {'backbone.': FastViT(settings_), 'neck.': FastViTNeck(settings_['widths'][-1])}
    state = {
        p + k: torch.rand_like(v.float()) + 0.5
        for p, m in parts.items()
        for k, v in m.state_dict().items()
    }
    state['head.fc.weight'] = torch.rand(classes, 2 * settings_['widths'][-1])
    state['head.fc.bias'] = torch.rand(classes)
    return state


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


@share(0.3)
@given(archs(), st.integers(0, 2**31), st.integers(1, 5))
def test_layouts_and_back(settings_, seed, classes):
    """Names and values survive every way between the layouts, in the training form."""
    state = model_state(settings_, seed, classes)
    assert recognize(state) == 'mm' and equal(to_mm(state), state)
    for first_, second in (('timm', 'apple'), ('apple', 'timm')):
        converted = weights.convert(state, first_, deploy=False)
        assert recognize(converted) == first_ and len(converted) == len(state)
        assert equal(to_mm(converted), state)
        twice = weights.convert(converted, second, deploy=False)
        assert recognize(twice) == second
        assert equal(weights.convert(twice, 'mm', deploy=False), state)
    bare = {k[9:]: v for k, v in state.items() if k.startswith('backbone.')}
    assert recognize(bare) == 'timm'
    assert equal(to_mm(bare), {f'backbone.{k}': v for k, v in bare.items()})


@share(0.3)
@given(archs(), st.integers(0, 2**31), st.sampled_from(['timm', 'apple']))
def test_deploy_forms_of_layouts(settings_, seed, layout):
    """The other projects' deploy form and ours are one function: merging theirs gives ours."""
    state = model_state(settings_, seed, 3)
    theirs = weights.convert(state, layout, deploy=True)
    assert recognize(theirs) == layout and len(theirs) < len(state)
    assert equal(from_mm(to_mm(theirs), layout), theirs)
    ours = weights.convert(state, 'mm', deploy=True)
    merged = weights.convert(theirs, 'mm', deploy=True)
    assert merged.keys() == ours.keys()
    for key, value in ours.items():
        error = (merged[key] - value).abs().max() / value.abs().max().clamp(min=1e-30)
        assert error < 1e-5, key
