"""When a fast path may replace PyTorch's layers: if nothing observes or changes them.

Hooks, wrappers, pruning, quantizers, compilers, function transforms and tracers have to see an
ordinary network. Every fast path asks here and otherwise leaves the work to the layers.
"""

from functools import reduce

import torch
import torch.nn as nn
from torch import Tensor
from torch.autograd import forward_ad


def private(path: str):
    """``torch.<path>``, or None if this version of PyTorch does not have it."""
    return reduce(lambda found, name: getattr(found, name, None), path.split('.'), torch)


transforms_active = private('_C._are_functorch_transforms_active')
dispatch_modes = private('_C._len_torch_dispatch_stack')
function_modes = private('_C._len_torch_function_stack')
has_global_hook = private('nn.modules.module._has_any_global_hook')
known = None not in (transforms_active, dispatch_modes, function_modes, has_global_hook)


def transformed() -> bool:
    """Whether torch.func or forward-mode differentiation is active."""
    within = transforms_active is not None and transforms_active()
    return within or getattr(forward_ad, '_current_level', -1) >= 0


def ordinary(x: Tensor) -> bool:
    """Whether ``x`` is a plain, non-empty CPU tensor and no compiler, tracer, function transform
    or mode is active."""
    return (
        not torch.compiler.is_compiling()
        and type(x) is Tensor
        and x.is_cpu
        and known
        and not transformed()
        and not dispatch_modes()  # they count, fake or replace operators
        and not function_modes()
        and not has_global_hook()
        and not torch.jit.is_tracing()
        and x.numel() > 0
    )


class DeployWeight(nn.Parameter):
    """A parameter that notices edits through ``.data``.

    Writing through ``.data`` does not change a parameter's version counter, so an outdated copy of
    the weight would remain in use. Here all tensors returned by ``.data`` share one counter. Copies
    made with ``deepcopy`` are of this class as well; files contain plain parameters.
    """

    alias: Tensor | None = None

    @property
    def data(self) -> Tensor:
        if self.alias is None:
            self.alias = nn.Parameter.data.__get__(self)
        return self.alias.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        nn.Parameter.data.__set__(self, value)
        self.alias = nn.Parameter.data.__get__(self)

    def __reduce_ex__(self, protocol):
        return nn.Parameter(self.detach(), self.requires_grad).__reduce_ex__(protocol)


PARAMETERS = {Tensor, nn.Parameter, DeployWeight, type(None)}


def untouched(module: nn.Module, *kinds: type) -> bool:
    """Whether the type of ``module`` is exactly one of ``kinds``, and calling it runs only its own
    ``forward`` with plain parameters."""
    own = module.__dict__
    return (
        type(module) in kinds
        and not own['_forward_hooks']
        and not own['_forward_pre_hooks']
        and not own['_backward_hooks']
        and not own['_backward_pre_hooks']
        and 'forward' not in own
        and '_compiled_call_impl' not in own
        and PARAMETERS.issuperset(map(type, own['_parameters'].values()))
    )
