"""Converting a whole model to its deploy form, and checking that both forms agree."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn as nn
from mmengine.model import BaseTTAModel, is_model_wrapper
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from .errors import FastViTError
from .models import FastViT
from .models.rep_conv import bn_affine, exact


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside a (Distributed)DataParallel, or the model itself."""
    wrapped = is_model_wrapper(model) or isinstance(model, nn.DataParallel)
    return unwrap(model.module) if wrapped else model


def network(model: nn.Module) -> nn.Module:
    """Like :func:`unwrap`, also inside test-time augmentation, which has no forward pass."""
    model = unwrap(model)
    return network(model.module) if isinstance(model, BaseTTAModel) else model


def mergeable(model: nn.Module, prefix: str = '') -> dict[str, nn.Module]:
    """The outermost modules that have ``switch_to_deploy``, by name."""
    if hasattr(model, 'switch_to_deploy'):
        return {prefix: model}
    found = {}
    for name, child in model.named_children():
        found.update(mergeable(child, f'{prefix}.{name}' if prefix else name))
    return found


def reparameterize(model: nn.Module) -> nn.Module:
    """A copy of ``model`` in its deploy form, in eval mode; ``model`` itself does not change.

    Merges every module that has ``switch_to_deploy``: FastViT, its neck, and other backbones that
    follow this OpenMMLab convention (RepVGG, MobileOne). Removes a model wrapper.

    Raises:
        FastViTError: there is nothing to merge.
    """
    model = unwrap(model)
    merged = deploy_form(model)
    if set(merged.state_dict()) == set(model.state_dict()):
        raise FastViTError(
            f'{type(model).__name__} has nothing to reparameterize: no part of it has '
            'branches to merge, or it is already in the deploy form; test it without --reparam'
        )
    return merged


def deploy_form(model: nn.Module) -> nn.Module:
    """Like :func:`reparameterize`, but a model with nothing to merge is only copied."""
    model = copy.deepcopy(unwrap(model))
    model.eval()
    for module in mergeable(model).values():
        module.switch_to_deploy()
    return model


@torch.no_grad()
def absorb_output_norms(model: nn.Module) -> None:
    """Merge the backbone's output norms into the 1x1 lateral convolutions of an FPN, in place.

    Nothing else may read the backbone's outputs. The result has fewer parameters than a model
    built with ``deploy=True``: use it for export, not for checkpoints.
    """
    backbone, neck = getattr(model, 'backbone', None), getattr(model, 'neck', None)
    laterals = getattr(neck, 'lateral_convs', None)
    reads_inputs = getattr(neck, 'add_extra_convs', False) == 'on_input'
    if not isinstance(backbone, FastViT) or laterals is None or reads_inputs:
        return
    used = backbone.out_indices[neck.start_level : neck.start_level + len(laterals)]
    for index, lateral in zip(used, laterals, strict=True):
        norm, conv = getattr(backbone, f'norm{index}', None), lateral.conv
        if isinstance(norm, _BatchNorm) and conv.kernel_size == (1, 1) and conv.groups == 1:
            scale, shift = bn_affine(norm)
            weight = exact(conv.weight)[:, :, 0, 0]
            bias = weight @ shift + (0 if conv.bias is None else exact(conv.bias))
            conv.weight.copy_((weight * scale)[:, :, None, None])
            conv.bias = nn.Parameter(bias.to(conv.weight))
            setattr(backbone, f'norm{index}', nn.Identity())


@dataclass
class Agreement:
    """How far the deploy form's outputs are from the training form's, for one input.

    Attributes:
        difference: largest absolute difference relative to the largest output, over all merged
            modules.
        rounding: the same between the training form and its own float64 result.
        limit: the largest difference that rounding explains.
    """

    difference: float
    rounding: float
    limit: float

    @property
    def explained(self) -> bool:
        return self.difference <= self.limit and self.difference < torch.inf  # NaN explains nothing


def tensors(output) -> list[Tensor]:
    """All floating-point tensors in a module's output, which may nest."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    values = output.values() if isinstance(output, dict) else output
    return (
        [t for v in values for t in tensors(v)] if isinstance(output, dict | list | tuple) else []
    )


def distance(output, reference) -> float:
    """Largest absolute difference, relative to the largest absolute value of the reference;
    infinite if either contains a NaN."""
    worst = 0.0
    for a, b in zip(tensors(output), tensors(reference), strict=True):
        a, b = exact(a), exact(b)
        difference = (a - b).abs().max() / b.abs().max().clamp(min=1e-30)
        worst = max(worst, float(difference) if difference.isfinite() else torch.inf)
    return worst


@contextmanager
def full_float32() -> Iterator[None]:
    """Within it, float32 is not reduced to TF32 on a GPU or to bfloat16 on a CPU."""
    backends = torch.backends
    try:
        matmul, cudnn = torch.get_float32_matmul_precision(), backends.cudnn.allow_tf32
        switches = [
            (torch.set_float32_matmul_precision, matmul, 'highest'),
            (partial(setattr, backends.cudnn, 'allow_tf32'), cudnn, False),
        ]
    except RuntimeError:  # set through torch's newer names, which do not mix with the older ones
        products = [backends.cuda.matmul, backends.cudnn.conv]
        products += [backends.mkldnn.matmul, backends.mkldnn.conv]
        switches = [
            (partial(setattr, p, 'fp32_precision'), p.fp32_precision, 'ieee') for p in products
        ]
    switches = [(turn, before, full) for turn, before, full in switches if before != full]
    for turn, _, full in switches:
        turn(full)
    try:
        yield
    finally:
        for turn, before, _ in switches:
            turn(before)


def float64_device(device: torch.device) -> torch.device:
    """``device``, or the CPU if it lacks float64."""
    try:
        torch.empty(0, dtype=torch.float64, device=device)
    except (TypeError, RuntimeError):
        return torch.device('cpu')
    return device


def run_in_float64(module: nn.Module, args: tuple):
    """The output of ``module`` for ``args`` in eval mode, computed in float64."""
    device = float64_device(next(module.parameters()).device)
    module = copy.deepcopy(module).to(device, torch.float64)
    module.eval()  # not chained: the train() of some backbones returns nothing
    return module(*(to_double(a, device) for a in args))


def to_double(value, device: torch.device):
    if isinstance(value, Tensor):
        return value.to(device, torch.float64 if value.is_floating_point() else value.dtype)
    if isinstance(value, list | tuple):
        return type(value)(to_double(v, device) for v in value)
    return value


@torch.no_grad()
def compare(model: nn.Module, merged: nn.Module, inputs: Tensor) -> Agreement:
    """Compare the merged modules of ``merged`` with those of ``model`` on images ``inputs``.

    Both forms of a module get the input that the module gets in ``model``. How much rounding
    explains is measured by running the same module in float64.

    Args:
        inputs: (B, 3, H, W), normalized.

    Raises:
        FastViTError: ``model`` does not run any of its merged modules on images.
    """
    model, merged = network(model), network(merged)
    calls = {}

    def keep(name):
        def hook(module, args, output):
            calls.setdefault(name, (args, output))

        return hook

    modules = mergeable(model)
    handles = [m.register_forward_hook(keep(name)) for name, m in modules.items()]
    states = {m: m.training for m in model.modules()}
    model.eval()
    difference = rounding = 0.0
    with full_float32():
        try:
            model.extract_feat(inputs) if hasattr(model, 'extract_feat') else model(inputs)
        finally:
            for handle in handles:
                handle.remove()
            for module, training in states.items():
                module.training = training
        for name, (args, output) in calls.items():
            deployed = merged.get_submodule(name)(*args)
            difference = max(difference, distance(deployed, output))
            rounding = max(rounding, distance(output, run_in_float64(modules[name], args)))
    if not calls:
        raise FastViTError(
            f'{type(model).__name__} does not run any of the merged parts, so its deploy form '
            'cannot be checked: test it without --reparam'
        )
    eps = torch.finfo(next(model.parameters()).dtype).eps
    # There is nothing more exact to compare float64 with.
    limit = 10 * max(rounding, eps) if rounding else 100 * eps
    return Agreement(difference, rounding, limit)
