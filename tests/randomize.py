"""Random weights AND random BatchNorm statistics: fresh ones hide most merging mistakes."""

import torch
import torch.nn as nn
from torch.nn.modules.batchnorm import _BatchNorm


@torch.no_grad()
def randomize(module: nn.Module, seed: int = 0) -> nn.Module:
    """Fill ``module`` so that activations keep their size through many layers."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(tensor, low, high):
        tensor.copy_(torch.empty(tensor.shape).uniform_(low, high, generator=generator))

    def normal(tensor, std):
        tensor.copy_(torch.empty(tensor.shape).normal_(0, std, generator=generator))

    for name, parameter in module.named_parameters():
        if name.endswith('gamma'):
            # Larger ones saturate the attention of deep variants, which then amplifies rounding.
            uniform(parameter, -0.2, 0.2)
        elif parameter.ndim > 1:
            normal(parameter, parameter[0].numel() ** -0.5)
        else:
            normal(parameter, 0.3)
    for part in module.modules():
        if isinstance(part, _BatchNorm):
            uniform(part.weight, 0.5, 1.5)
            normal(part.running_mean, 0.3)
            uniform(part.running_var, 0.5, 1.5)
            part.num_batches_tracked += 7
    return module


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference over the reference's (``b``'s) largest value."""
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).abs().max() / b.abs().max().clamp(min=1e-30))
