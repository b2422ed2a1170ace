"""The forms of FastViT's weights: training form, deploy form of the authors and timm, and ours."""

import re

from fastvit_mm.errors import FastViTError
from fastvit_mm.models import FastViT, FastViTNeck
from fastvit_mm.models.deploy import deploy_parts
from fastvit_mm.models.rep_conv import ConvBN, RepConv

from .layouts import arch_of, describe, from_mm, to_mm
from .states import State, differences, incompatible, starting_with, without


def is_merged(state: State) -> bool:
    """Whether a backbone's state dict is in our deploy form, which is merged completely."""
    return 'stages.0.blocks.0.mlp.conv.reparam_conv.weight' in state


def merge_completely(module: FastViT | FastViTNeck) -> None:
    module.switch_to_deploy()


def merge_branches(module: FastViT | FastViTNeck) -> None:
    """To the authors' and timm's deploy form, in place: the BatchNorms and scales outside the
    branches stay."""
    deploy_parts(module, lambda _, part: isinstance(part, RepConv) and not isinstance(part, ConvBN))


def norms_of(state: State) -> State:
    """The output norms in a backbone's state dict."""
    return {k: v for k, v in state.items() if re.match(r'norm\d\.', k)}


def twin_of(module: FastViT | FastViTNeck, state: State) -> FastViT | FastViTNeck:
    """A new ``module`` in the form of ``state``: any of the deploy forms, or training."""
    twin = module.training_form().eval()
    if is_merged(state):
        twin.switch_to_deploy()
    deploy_parts(twin, lambda name, _: f'{name}.reparam_conv.weight' in state)
    return twin.to(next(v for v in state.values() if v.is_floating_point()).dtype)


def merge_state(module: FastViT | FastViTNeck, state: State, merge=merge_completely) -> State:
    """Weights of ``module`` after ``merge``, from its weights in any form."""
    if is_merged(state):
        return state
    norms, twin = norms_of(state), twin_of(module, state)
    state = without(state, norms)
    if any(incompatible(twin.state_dict(), state)):
        return state | norms  # not this network: the following check reports it
    twin.load_state_dict(state, strict=False)
    merge(twin)
    return twin.state_dict() | norms


def convert(checkpoint_state: State, layout: str, deploy: bool, source='the file') -> State:
    """Weights of any layout in ``layout``: 'timm', 'apple' or 'mm'.

    Args:
        deploy: convert to the deploy form. Ours ('mm') is merged completely; those of the other
            projects keep the BatchNorms and scales outside their branches.

    Raises:
        FastViTError: the weights are not a whole FastViT, or cannot be converted to the form.
    """
    state = to_mm(checkpoint_state, source)
    parts = {p: starting_with(state, p) for p in ('backbone.', 'neck.')}
    backbone, neck = parts.values()
    if not deploy and any('reparam_conv' in k for k in backbone):
        raise FastViTError(
            f'{source} is in the deploy form, which cannot be converted to the training form: '
            'convert its training form, or add --deploy'
        )
    if layout != 'mm' and is_merged(backbone):
        raise FastViTError(
            f"{source} is merged completely, but {layout}'s deploy form has BatchNorms and scales: "
            'convert its training form'
        )
    arch = arch_of(backbone)
    if 0 in arch['depths']:
        raise FastViTError(f'{source} has {describe(backbone)}: expected a whole one')
    # Any weight of the stem's first convolution gives the number of input channels.
    stem = next(v for k, v in backbone.items() if k.startswith('stem.0.') and v.ndim == 4)
    every = tuple(range(len(arch['depths'])))
    modules = {'backbone.': FastViT(arch, stem.shape[1], every)}
    if any(k.startswith('final_conv.') for k in neck):
        width = neck['final_conv.se.fc2.bias'].numel()
        projection = neck.get('projection.weight')
        modules['neck.'] = FastViTNeck(
            arch['widths'][-1], width, None if projection is None else len(projection)
        )
    for start, module in modules.items():
        part = parts[start]
        target = twin_of(module, part).state_dict()
        wrong = incompatible(target, without(part, norms_of(part)))
        if any(wrong):
            text = differences(*wrong, part, target)
            raise FastViTError(f'{source} is not a whole {describe(backbone)}: {text}')
        if deploy:
            part = merge_state(module, part, merge_completely if layout == 'mm' else merge_branches)
            state = {k: v for k, v in state.items() if not k.startswith(start)}
            state |= {start + k: v for k, v in part.items()}
    return state if layout == 'mm' else from_mm(state, layout)
