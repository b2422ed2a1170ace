"""A device without float64, as Apple's GPUs are, played by the CPU under the name 'meta'."""

import torch
import torch.nn as nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only


class Held(torch.Tensor):
    """A tensor on that device.

    Raises:
        TypeError: of float64, as on Apple's.
    """

    @staticmethod
    def __new__(cls, inner):
        if inner.dtype == torch.float64:
            raise TypeError('this device has no float64')
        layout = dict(strides=inner.stride(), dtype=inner.dtype, device='meta')
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, **layout)

    def __init__(self, inner):
        self.inner = inner

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        device = kwargs.get('device')
        if device is None:
            there = any(isinstance(t, cls) for t in tree_leaves((args, kwargs)))
        else:
            there, kwargs['device'] = torch.device(device).type == 'meta', 'cpu'
        inner_args, inner_kwargs = tree_map_only(cls, lambda t: t.inner, (args, kwargs))
        out = func(*inner_args, **inner_kwargs)
        if func._schema.name.endswith('_'):
            return args[0]
        return tree_map_only(torch.Tensor, cls, out) if there else out


class SmallDevice(TorchDispatchMode):
    """Within it, what is made on or sent to 'meta' is computed with, in anything but float64."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return Held.__torch_dispatch__(func, types, args, kwargs)


@torch.no_grad()
def send(module: nn.Module) -> nn.Module:
    for part in module.modules():
        for name, tensor in part._parameters.items():
            if tensor is not None:
                part._parameters[name] = nn.Parameter(Held(tensor.detach()), requires_grad=False)
        for name, tensor in part._buffers.items():
            if tensor is not None:
                part._buffers[name] = Held(tensor)
    return module
