"""Convolutions and linear layers of the deploy form on a CPU: the same results, faster.

PyTorch hands oneDNN weights in its own order, which oneDNN has to rearrange in every call, and
writes a convolution's result to memory only to read it again for GELU or a residual. Both are most
of what a small batch costs beyond arithmetic. Here the weights are rearranged once for each size of
images and the rest happens inside the convolution, by the operators that torch.compile generates
for the CPU.
"""

from functools import cache
from weakref import WeakSet

import torch
import torch.nn as nn
from torch import Tensor

from .ordinary import DeployWeight, ordinary, private, untouched

# By overload: to find one by itself, PyTorch reads a bias as integers, value by value.
convolve = private('ops.mkldnn._convolution_pointwise.default')
multiply = private('ops.mkldnn._linear_pointwise.default')
multiply_add = private('ops.mkldnn._linear_pointwise.binary')
reorder_convolution = private('ops.mkldnn._reorder_convolution_weight')
reorder_linear = private('ops.mkldnn._reorder_linear_weight')
order_of = private('ops.mkldnn._get_mkldnn_serialized_md')
PLAIN, GELU = ('none', [], ''), ('gelu', [], 'none')

#: Orders and sizes of input that a layer remembers before it starts anew. An order costs the
#: memory of the layer's weight; a network rarely meets more than two.
ORDERS, SIZES = 4, 256


#: Bytes up to which glibc can recycle a freed block; larger ones always go back to the system.
RECYCLED = 31 << 20


@cache
def recycle_memory() -> None:
    """Let glibc keep freed blocks of up to ``RECYCLED`` bytes.

    It gives those above a threshold back to the system, which clears each page (4 KB) of them anew:
    an eighth of a network's time at 512 x 704 pixels. Freeing a block raises the threshold to its
    size. This one is never written to.
    """
    torch.empty(RECYCLED, dtype=torch.uint8)


@cache
def has_onednn() -> bool:
    operators = convolve, multiply, multiply_add, reorder_convolution, reorder_linear
    found = None not in operators
    return found and torch.backends.mkldnn.is_available()


@cache
def has_bf16() -> bool:
    """Whether the processor has what oneDNN needs for bfloat16."""
    check = private('ops.mkldnn._is_mkldnn_bf16_supported')
    return check is not None and check()


def takes(x: Tensor, *layers: nn.Conv2d | nn.Linear) -> bool:
    """Whether the functions below may compute ``layers``, of which the first gets ``x``."""
    return (
        ordinary(x)  # first, as a compiler looks no further
        and not torch.is_grad_enabled()
        and has_onednn()
        and torch._C._get_mkldnn_enabled()
        and (x.dtype == torch.float32 or (x.dtype == torch.bfloat16 and has_bf16()))
        and not torch.is_autocast_enabled('cpu')
        and all(computable(layer, x.dtype) for layer in layers)
    )


def computable(layer: nn.Conv2d | nn.Linear, dtype: torch.dtype) -> bool:
    if not untouched(layer, nn.Conv2d, nn.Linear):
        return False
    weight = layer._parameters.get('weight')
    return (
        isinstance(weight, nn.Parameter)
        and weight.dtype == dtype
        and weight.is_cpu
        and not weight.is_inference()  # has no version: edits cannot be noticed
        and layer.__dict__.get('padding_mode', 'zeros') == 'zeros'
    )


class Rearranged:
    """A layer's weight in the orders that oneDNN wants, for as long as the weight stays as it is.

    The order depends on the input's size: with that of another size a network took up to twice as
    long. Most sizes want the same order, and share it. Edits are noticed, those through ``.data``
    too, but not those that bypass PyTorch (a numpy view of the weight): :meth:`forget` follows
    these. Copies and pickles are empty.
    """

    everywhere = WeakSet()

    def __init__(self):
        self.everywhere.add(self)
        self.forget()

    def forget(self) -> None:
        self.weight = self.alias = self.state = None
        self.by_size, self.by_order = {}, {}

    def __deepcopy__(self, memo):
        return type(self)()

    def __reduce__(self):
        return type(self), ()

    @property
    def nbytes(self) -> int:
        """Memory that the rearranged weights take."""
        return len(self.by_order) * (self.weight.nbytes if self.by_order else 0)

    def of(self, layer: nn.Conv2d | nn.Linear, size, rearrange, *args) -> Tensor:
        """The weight of ``layer`` for inputs of ``size``; ``rearrange(weight, *args, size)``
        makes it."""
        weight = layer._parameters['weight']
        if type(weight) is not DeployWeight:
            weight.__class__ = DeployWeight
        alias = weight.alias
        state = weight.data_ptr(), weight._version, 0 if alias is None else alias._version
        if weight is not self.weight or alias is not self.alias or state != self.state:
            self.forget()
            self.weight, self.alias, self.state = weight, alias, state
        found = self.by_size.get(size)
        return self.add(size, rearrange, args) if found is None else found

    def add(self, size, rearrange, args) -> Tensor:
        if len(self.by_size) >= SIZES or len(self.by_order) >= ORDERS:
            self.by_size, self.by_order = {}, {}
        recycle_memory()
        fresh = rearrange(self.weight.detach(), *args, size)
        order = order_of(fresh).numpy().tobytes() if order_of else size
        self.by_size[size] = fresh = self.by_order.setdefault(order, fresh)
        return fresh


def convolution(
    x: Tensor,
    layer: nn.Conv2d,
    weight: Rearranged,
    gelu: bool = False,
    add: Tensor | None = None,
) -> Tensor:
    """``layer(x)``, (B, C, H, W) to (B, C', H', W'), channels_last.

    A pointwise convolution runs as a linear layer, which takes 0.9 of the time.

    Args:
        weight: of this layer, rearranged.
        gelu: give the exact GELU of it.
        add: give the sum with this.
    """
    x = x.contiguous(memory_format=torch.channels_last)
    if is_pointwise(layer):
        if add is not None:
            add = add.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1)
        return linear(x.permute(0, 2, 3, 1), layer, weight, gelu, add).permute(0, 3, 1, 2)
    args = layer.padding, layer.stride, layer.dilation, layer.groups
    rearranged = weight.of(layer, x.shape, reorder_convolution, *args)
    y = convolve(x, rearranged, layer.bias, *args, *(GELU if gelu else PLAIN))
    return y if add is None else add + y


def is_pointwise(layer: nn.Conv2d) -> bool:
    return (
        layer.kernel_size == (1, 1)
        and layer.stride == (1, 1)
        and layer.padding == (0, 0)
        and layer.groups == 1
    )


def linear(
    x: Tensor,
    layer: nn.Linear | nn.Conv2d,
    weight: Rearranged,
    gelu: bool = False,
    add: Tensor | None = None,
) -> Tensor:
    """``layer(x)`` over the last dimension, (..., C) to (..., C'); else as :func:`convolution`."""
    given = weight.of(layer, x[..., 0].numel(), rearranged_matrix), layer.bias
    if add is not None:
        return multiply_add(x, add, *given, 'add')
    return multiply(x, *given, *(GELU if gelu else PLAIN))


def rearranged_matrix(weight: Tensor, rows: int) -> Tensor:
    return reorder_linear(weight.flatten(1), rows)
