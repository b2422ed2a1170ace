"""SyncBatchNorm for CPUs, which PyTorch has only for GPUs."""

import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor
from torch.autograd.function import Function
from torch.nn.modules.batchnorm import _BatchNorm


class SumOverRanks(Function):
    """The sum of a tensor over all ranks. Every rank's loss depends on it, so the gradient is the
    sum of all ranks' gradients."""

    @staticmethod
    def forward(ctx, x):
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, gradient):
        return SumOverRanks.apply(gradient.contiguous())


class SyncBatchNorm(_BatchNorm):
    """In training, normalizes (B, C, ...) with the mean and variance of all ranks' inputs.

    Ranks may have inputs of different sizes. Half-precision inputs (bfloat16) are normalized in
    float32, as in PyTorch's BatchNorm.
    """

    def _check_input_dim(self, x: Tensor) -> None:
        """Any number of dimensions, as in PyTorch's."""

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and dist.is_initialized()):
            return super().forward(x)
        given, x = x.dtype, x.to(torch.promote_types(x.dtype, torch.float32))
        shape = [1, -1] + [1] * (x.ndim - 2)
        others = [d for d in range(x.ndim) if d != 1]
        own = x.new_tensor([x.numel() / x.shape[1]])
        *total, count = SumOverRanks.apply(torch.cat([x.sum(others), own])).split([x.shape[1], 1])
        mean = total[0] / count
        centered = x - mean.view(shape)
        var = SumOverRanks.apply(centered.square().sum(others)) / count
        self.keep(mean.detach(), var.detach(), count)
        out = centered * (var + self.eps).rsqrt().view(shape)
        if self.affine:
            out = torch.addcmul(self.bias.view(shape), out, self.weight.view(shape))
        return out.to(given)

    @torch.no_grad()
    def keep(self, mean: Tensor, var: Tensor, count: Tensor) -> None:
        """Update the running statistics with those of one batch of ``count`` positions."""
        if self.running_mean is None:
            return
        self.num_batches_tracked += 1
        share = self.momentum or 1 / float(self.num_batches_tracked)
        unbiased = var * count / (count - 1).clamp(min=1)
        for running, new in ((self.running_mean, mean), (self.running_var, unbiased)):
            running.lerp_(new.to(running.dtype), share)


def run_on_cpu(model: nn.Module) -> nn.Module:
    """Turn PyTorch's SyncBatchNorms in ``model`` into those here; they stay the same modules."""
    for module in model.modules():
        if type(module) is nn.SyncBatchNorm:
            module.__class__ = SyncBatchNorm
    return model
