"""Convolutions and linear layers of the deploy form on a CPU: same results, faster.

PyTorch passes weights to oneDNN in its own order, which oneDNN has to rearrange in every call, and
writes a convolution's result to memory only to read it again for GELU or a residual. For small
batches this is most of the cost beyond arithmetic. Here the weights are rearranged once per image
size, and GELU and residual are computed inside the convolution, with the operators that
torch.compile generates for the CPU.
"""

import ctypes
import os
from contextlib import suppress
from functools import cache
from weakref import WeakSet

import torch
import torch.nn as nn
from torch import Tensor

from .ordinary import DeployWeight, ordinary, private, untouched

# By overload: to choose one, PyTorch would try to read a bias as integers, value by value.
convolve = private('ops.mkldnn._convolution_pointwise.default')
multiply = private('ops.mkldnn._linear_pointwise.default')
multiply_add = private('ops.mkldnn._linear_pointwise.binary')
reorder_convolution = private('ops.mkldnn._reorder_convolution_weight')
reorder_linear = private('ops.mkldnn._reorder_linear_weight')
order_of = private('ops.mkldnn._get_mkldnn_serialized_md')
PLAIN, GELU = ('none', [], ''), ('gelu', [], 'none')

#: Orders and input sizes that a layer remembers before it starts over. An order takes the memory
#: of the layer's weight; a network rarely needs more than two.
ORDERS, SIZES = 4, 256

#: Bytes of the largest block that glibc can recycle, and of free memory that it is told to keep.
RECYCLED, KEPT = 31 << 20, 128 << 20
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h


@cache
def recycle_memory() -> None:
    """Let glibc keep freed blocks of up to ``RECYCLED`` bytes, ``KEPT`` in all.

    By itself it returns large ones to the system, which clears each page (4 KB) when they are
    needed again: an eighth of a network's time at 512 x 704 pixels. Does nothing with another C
    library, or if the environment has settings for glibc.
    """
    if any(name.startswith(('MALLOC_', 'GLIBC_TUNABLES')) for name in os.environ):
        return
    with suppress(AttributeError, OSError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_THRESHOLD, RECYCLED + (1 << 20))
        mallopt(M_TRIM_THRESHOLD, KEPT)


@cache
def has_onednn() -> bool:
    operators = convolve, multiply, multiply_add, reorder_convolution, reorder_linear
    return None not in operators and torch.backends.mkldnn.is_available()


@cache
def has_bf16() -> bool:
    """Whether oneDNN supports bfloat16 on this processor."""
    check = private('ops.mkldnn._is_mkldnn_bf16_supported')
    return check is not None and check()


def takes(x: Tensor, *layers: nn.Conv2d | nn.Linear) -> bool:
    """Whether the functions below may compute ``layers``, the first of which gets ``x``."""
    return (
        ordinary(x)  # first, as a compiler looks no further
        and x.ndim == 4
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
        and not weight.is_inference()  # has no version counter: edits would go unnoticed
        and layer.__dict__.get('padding_mode', 'zeros') == 'zeros'
        and not isinstance(layer.__dict__.get('padding'), str)  # 'same', 'valid'
    )


class Rearranged:
    """A layer's weight in the orders that oneDNN wants, for as long as the weight does not change.

    The order depends on the input size: with the order for another size, a network took up to
    twice as long. Sizes that want the same order, as most do, share it. Edits are noticed,
    including those through ``.data``, but not those that bypass PyTorch's counters (numpy,
    torch.distributed's collectives, shared memory): call :meth:`forget` after these. Copies and
    pickles are empty.
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
        """The weight of ``layer`` for inputs of ``size``, made by ``rearrange(weight, *args,
        size)``."""
        weight = layer._parameters['weight']
        if type(weight) is not DeployWeight:
            weight.__class__ = DeployWeight
        alias = weight.alias
        state = weight.data_ptr(), weight._version, 0 if alias is None else alias._version
        if weight is not self.weight or alias is not self.alias or state != self.state:
            self.forget()
            self.weight, self.alias, self.state = weight, alias, state
        found = self.by_size.get(size)
        return self.add(weight, size, rearrange, args) if found is None else found

    def add(self, weight, size, rearrange, args) -> Tensor:
        if len(self.by_size) >= SIZES or len(self.by_order) >= ORDERS:
            self.by_size, self.by_order = {}, {}
        recycle_memory()
        fresh = rearrange(weight.detach(), *args, size)
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
        weight: the layer's rearranged weight.
        gelu: apply the exact GELU.
        add: a tensor to add to the result.
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
    """``layer(x)`` over the last dimension, (..., C) to (..., C'); see :func:`convolution`."""
    given = weight.of(layer, x[..., 0].numel(), rearranged_matrix), layer.bias
    if add is not None:
        return multiply_add(x, add, *given, 'add')
    return multiply(x, *given, *(GELU if gelu else PLAIN))


def rearranged_matrix(weight: Tensor, rows: int) -> Tensor:
    return reorder_linear(weight.flatten(1), rows)
