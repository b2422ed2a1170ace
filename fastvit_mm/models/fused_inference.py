"""The deploy form's convolutions on a CPU: same numbers, sooner.

PyTorch hands oneDNN weights in its own order, which oneDNN has to rearrange in every call, and
writes a convolution's result to memory only to read it again for GELU or a residual. Both are most
of what a small batch costs beyond arithmetic. Here the weights are rearranged once for each size of
images and the rest happens inside the convolution, by the operators that torch.compile generates
for the CPU.
"""

import math
from dataclasses import dataclass, field
from functools import cache

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

mkldnn = torch.ops.mkldnn
PLAIN, GELU = ('none', [], ''), ('gelu', [], 'none')
ADD = 'add', 1.0, None, [], None

#: What is between two layers is cut into strips of the latter size from the former on, in bytes.
LARGE, STRIP = 32 << 20, 8 << 20
#: Sizes that a layer remembers before it starts anew.
SIZES = 256


@cache
def has_bf16() -> bool:
    """Whether the processor has what oneDNN needs for bfloat16."""
    return mkldnn._is_mkldnn_bf16_supported()


def fits(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN may compute on its own: on a CPU, nobody needs gradients or a trace."""
    return (
        torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
        and type(x) is Tensor
        and x.is_cpu
        and weight.is_cpu
        and x.dtype == weight.dtype
        and (x.dtype == torch.float32 or (x.dtype == torch.bfloat16 and has_bf16()))
        and x.numel() > 0
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled('cpu')
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and not is_in_torch_dispatch_mode()  # counts or replaces PyTorch's own operators
    )


@dataclass
class Rearranged:
    """A weight in the orders that oneDNN wants.

    They depend on the input's size: with the order of another size a network took up to twice as
    long. Most sizes want the same, and share it.

    Attributes:
        of: what tells whether the weight is still the same.
        by_size, by_order: the weight for an input's size, and by oneDNN's name of its order.
    """

    of: tuple
    by_size: dict = field(default_factory=dict)
    by_order: dict = field(default_factory=dict)


class Packed(nn.Module):
    """Keeps ``weight`` rearranged, beside it, for as long as it stays what it was.

    Only after :func:`pack`, since writing through ``weight.data`` (an averaging hook, say) leaves
    no trace: ``train()`` and ``eval()`` forget the rearranged weight, and have to follow that.
    """

    packs = False
    packed: Rearranged | None = None

    def fits(self, x: Tensor) -> bool:
        return self.packs and fits(x, self.weight)

    def packed_weight(self, rearrange, size: int | torch.Size, *args) -> Tensor:
        weight = self.weight
        version = None if weight.is_inference() else weight._version
        now = (weight.data_ptr(), version, weight.dtype)
        packed = self.packed
        if packed is None or packed.of != now:
            self.packed = packed = Rearranged(now)
        if size not in packed.by_size:
            if len(packed.by_size) >= SIZES:
                self.packed = packed = Rearranged(now)
            fresh = rearrange(weight.detach(), *args, size)
            order = mkldnn._get_mkldnn_serialized_md(fresh).numpy().tobytes()
            packed.by_size[size] = packed.by_order.setdefault(order, fresh)
        return packed.by_size[size]

    def train(self, mode: bool = True):
        self.packed = None
        return super().train(mode)

    def __getstate__(self):
        """Without the rearranged weight: it cannot be copied or saved, and is soon made again."""
        return {k: v for k, v in self.__dict__.items() if k != 'packed'}


def pack(network: nn.Module) -> None:
    """Let every convolution and linear layer of a deploy form rearrange its weight."""
    for module in network.modules():
        if isinstance(module, Packed):
            module.packs = True


# Operators are called by overload: to find one, PyTorch reads a bias as integers, value by value.


class Conv2d(Packed, nn.Conv2d):
    """A convolution that can take in what follows it: ``gelu(conv(x)) + add``.

    (B, C, H, W) to (B, C', H', W'), the shape of ``add``, to which ``inplace`` adds. The GELU is
    the exact one.
    """

    def forward(
        self, x: Tensor, gelu: bool = False, add: Tensor | None = None, inplace: bool = False
    ) -> Tensor:
        if self.fits(x):
            x = x.contiguous(memory_format=torch.channels_last)
            args = self.padding, self.stride, self.dilation, self.groups
            weight = self.packed_weight(mkldnn._reorder_convolution_weight, x.shape, *args)
            layer = weight, self.bias, *args
            if add is not None and not gelu:
                if inplace:
                    return mkldnn._convolution_pointwise_.binary(add, x, *layer, *ADD)
                add = add.contiguous(memory_format=torch.channels_last)
                return mkldnn._convolution_pointwise.binary(x, add, *layer, *ADD)
            y = mkldnn._convolution_pointwise.default(x, *layer, *(GELU if gelu else PLAIN))
        else:
            y = super().forward(x)
            y = F.gelu(y) if gelu else y
        if add is None:
            return y
        return add.add_(y) if inplace else add + y


class Linear(Packed, nn.Linear):
    """A linear layer of (B, N, C), ``linear(x) + add``."""

    def forward(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        if not self.fits(x):
            y = super().forward(x)
            return y if add is None else add + y
        weight = self.packed_weight(mkldnn._reorder_linear_weight, x[..., 0].numel())
        if add is None:
            return mkldnn._linear_pointwise.default(x, weight, self.bias, *PLAIN)
        return mkldnn._linear_pointwise.binary(x, add, weight, self.bias, 'add')


def pointwise_twice(x: Tensor, fc1: Conv2d, fc2: Conv2d, add: Tensor) -> Tensor:
    """``add + fc2(gelu(fc1(x)))`` of two pointwise convolutions, (B, C, H, W).

    Between them lies three or four times x. Where that is large, fc1 and fc2 are called for parts
    of it, which stay in the cache: 1.1 to 1.2 x as fast a backbone on 800 x 1216 pixels.
    """
    if not fc1.fits(x):
        return fc2(fc1(x, gelu=True), add=add)
    images, _, rows, columns = x.shape
    image = rows * columns * fc1.out_channels * x.element_size()
    if images * image <= LARGE:
        return fc2(fc1(x, gelu=True), add=add)
    images = max(1, STRIP // image)
    rows = math.ceil(rows / math.ceil(image / STRIP))
    out = add.clone(memory_format=torch.channels_last)
    for some, target in zip(x.split(images), out.split(images), strict=True):
        for part, goal in zip(some.split(rows, 2), target.split(rows, 2), strict=True):
            fc2(fc1(part, gelu=True), add=goal, inplace=True)
    return out
