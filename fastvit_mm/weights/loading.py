"""Weights into models, strictly: nothing is left out in silence."""

import re
from pathlib import Path

import torch.nn as nn
from mmengine.logging import print_log
from mmengine.model.weight_init import PretrainedInit
from mmengine.registry import WEIGHT_INITIALIZERS

from fastvit_mm.errors import FastViTError
from fastvit_mm.models import FastViT, FastViTNeck
from fastvit_mm.reparameterize import unwrap

from .files import read, state_dict_of
from .forms import merge_state
from .layouts import describe, to_mm
from .states import State, differences, first, incompatible, starting_with, without


def place(state: State, backbone: str) -> State:
    """Move OpenMMLab's names to where ``backbone`` (a module's name, '' for itself) has them."""
    if not backbone:
        return starting_with(state, 'backbone.')
    parent = backbone[: backbone.rfind('.') + 1]
    return {
        f'{backbone}.{k[9:]}' if k.startswith('backbone.') else parent + k: v
        for k, v in state.items()
    }


def fit(model: nn.Module, state: State, source, whole: bool) -> State:
    """``state``, in OpenMMLab's names, in ``model``'s form and cut to its keys (:func:`load`)."""
    own = {n: m for n, m in model.named_modules() if isinstance(m, FastViT | FastViTNeck)}
    backbone = next(n for n, m in own.items() if isinstance(m, FastViT))
    own = {f'{n}.' if n else '': m for n, m in own.items()}
    prefix = f'{backbone}.' if backbone else ''
    built = len(own[prefix].stages)
    state = place(state, backbone)
    found = describe(starting_with(state, prefix))
    wanted = describe(own[prefix].state_dict())
    unbuilt = tuple(f'{prefix}stages.{i}.' for i in range(built, 4))
    if built < 4:
        state = {k: v for k, v in state.items() if not k.startswith(unbuilt)}
        found = wanted

    target = model.state_dict()
    for start, module in own.items():
        have = starting_with(state, start)
        if any('reparam_conv' in k for k in starting_with(target, start)):
            if have:
                state = {k: v for k, v in state.items() if not k.startswith(start)}
                state |= {start + k: v for k, v in merge_state(module, have).items()}
        elif any(k.endswith('reparam_conv.weight') for k in have):
            raise FastViTError(
                f'{source} is in the deploy form, the model in the training form: load the '
                'training form of these weights, or build the model with deploy=True (--cfg-options'
                ' model.backbone.deploy=True, and for a classifier model.neck.deploy=True)'
            )

    missing, unexpected = incompatible(target, state)
    if not whole:
        # A backbone's file, or another task's, has nothing for a classifier's neck.
        starts = tuple(
            s for s in own if s == prefix or any(k.startswith(s) and k in target for k in state)
        )
        norm = re.compile(re.escape(prefix) + r'norm\d\.')
        required = {k for k in target if k.startswith(starts) and not norm.match(k)}
        fresh = missing - required
        foreign = {k for k in unexpected if not k.startswith(starts) or norm.match(k) or k in fresh}
        missing, unexpected = missing & required, unexpected - foreign
        state = without(state, foreign)
        if fresh:
            print_log(
                f'{source}: not in the file, so freshly initialized: {first(fresh)}', 'current'
            )
    if missing or unexpected:
        raise FastViTError(mismatch(source, found, wanted, missing, unexpected, state, target))
    return state


def mismatch(source, found, wanted, missing, unexpected, state, target) -> str:
    """One line that says why a file does not fit."""
    text = f'{source} does not fit: this is {found}; the model is {wanted}'
    if found == wanted:
        text = f'{source} does not fit: {found} as the model is, but of another task or data set'
    return f'{text}; {differences(missing, unexpected, state, target)}'


def has_fastvit(model: nn.Module) -> bool:
    return any(isinstance(m, FastViT) for m in model.modules())


def prepare(model: nn.Module, source: str | Path, whole: bool = False) -> dict:
    """Read a checkpoint; its ``state_dict`` is then what ``model`` takes. See :func:`load`."""
    model = unwrap(model)
    checkpoint = read(source)
    state = state_dict_of(checkpoint, source)
    if has_fastvit(model):
        state = fit(model, to_mm(state, source), source, whole)
    elif whole and any(wrong := incompatible(model.state_dict(), state)):
        raise FastViTError(
            mismatch(
                source, 'another model', type(model).__name__, *wrong, state, model.state_dict()
            )
        )
    # mmengine would run a config that it finds here as Python code.
    meta = {k: v for k, v in (checkpoint.get('meta') or {}).items() if k != 'config'}
    return {**checkpoint, 'state_dict': state, 'meta': meta}


def load(model: nn.Module, source: str | Path, whole: bool = False) -> dict:
    """Load weights of any layout (see :mod:`fastvit_mm.weights`) into ``model``, strictly.

    Args:
        model: a :class:`FastViT` or a model that has one as its backbone, in either form. A model
            in the deploy form takes weights of every form; they are merged as they load.
        source: a file, an address or a short name (:func:`find`).
        whole: as for a test: nothing may be missing. Otherwise, as for fine-tuning, what is not
            FastViT's own (another task's head) and ``feature_norm`` may be missing; it is logged.

    Returns:
        The checkpoint: ``state_dict`` as loaded, ``meta``, and what else the file holds.

    Raises:
        FastViTError: anything else missing, unexpected or of another shape; a file in the deploy
            form for a model in the training form; see also :func:`read`.
    """
    checkpoint = prepare(model, source, whole)
    unwrap(model).load_state_dict(checkpoint['state_dict'], strict=False)
    return checkpoint


def drop_pretrained(node) -> None:
    """Take every ``Pretrained`` out of a model's config: a checkpoint will overwrite them."""
    if isinstance(node, dict):
        init_cfg = node.get('init_cfg')
        if isinstance(init_cfg, dict) and init_cfg.get('type') == 'Pretrained':
            node['init_cfg'] = None
        if node.get('pretrained'):
            node['pretrained'] = None
    for child in node.values() if isinstance(node, dict) else node:
        if isinstance(child, dict | list | tuple):
            drop_pretrained(child)


@WEIGHT_INITIALIZERS.register_module(name='Pretrained', force=True)
class Pretrained(PretrainedInit):
    """mmengine's ``Pretrained``, but strict for models with a FastViT in them.

    mmengine loads with strict=False: a file whose names do not match loads nothing, in silence.
    """

    def __call__(self, module: nn.Module) -> None:
        if has_fastvit(module):
            load(module, self.checkpoint)
        else:
            super().__call__(module)
