"""Loading weights into models, strictly: nothing is silently skipped."""

import re
from pathlib import Path

import torch
import torch.nn as nn
from mmengine.logging import print_log

from fastvit_mm.errors import FastViTError
from fastvit_mm.models import FastViT, FastViTNeck
from fastvit_mm.models.archs import parse_arch, title
from fastvit_mm.reparameterize import unwrap

from .encoders import only_encoder
from .files import read, state_dict_of
from .forms import merge_state
from .layouts import (
    candidates,
    describe,
    holds,
    is_published,
    part_of,
    say_licence_of,
    to_mm,
)
from .states import State, differences, first, incompatible, starting_with, without

BRANCHLESS = (
    'FastViTHD is published without its branches, so the model is in the deploy form; it can be '
    'trained further, without branches'
)


def place(state: State, backbone: str) -> State:
    """Move OpenMMLab's names to those around ``backbone`` (a prefix; '' for a bare backbone)."""
    if not backbone:
        return starting_with(state, 'backbone.')
    parent = backbone[: backbone.rfind('.', 0, -1) + 1]
    return {
        backbone + k[9:] if k.startswith('backbone.') else parent + k: v for k, v in state.items()
    }


def place_all(state: State, backbones: list[str], source) -> State:
    """Convert any layout to the names of a model with ``backbones``; one file fills them all."""
    if backbones != [''] and holds(state, backbones):
        return state
    state = to_mm(state, source)
    return {k: v for b in backbones for k, v in place(state, b).items()}


def fit(model: nn.Module, state: State, source, whole: bool, switch: bool) -> State:
    """``state``, of any layout, in the names and form of ``model``, with its keys only."""
    published = is_published(state)
    own = {n: m for n, m in model.named_modules() if isinstance(m, FastViT | FastViTNeck)}
    own = {f'{n}.' if n else '': m for n, m in own.items()}
    backbones = [n for n, m in own.items() if isinstance(m, FastViT)]
    state = place_all(state, backbones, source)
    found, wanted, parts = [], [], {}
    for prefix in backbones:
        built, count = len(own[prefix].stages), len(own[prefix].settings['depths'])
        parts[prefix] = starting_with(state, prefix)
        unbuilt = tuple(f'{prefix}stages.{i}.' for i in range(built, count))
        wanted.append(describe(own[prefix].state_dict()))
        known = built == count and holds(state, [prefix])
        found.append(describe(starting_with(state, prefix)) if known else wanted[-1])
        state = {k: v for k, v in state.items() if not unbuilt or not k.startswith(unbuilt)}

    if not whole:
        state = without_projection(state, own, source)
    state = in_form(state, own, source, switch)
    target = model.state_dict()
    missing, unexpected = incompatible(target, state)
    if not whole:
        # A backbone's file, or another task's, has nothing for a classifier's neck.
        starts = tuple(
            s for s in own if s in backbones or any(k.startswith(s) and k in target for k in state)
        )
        norm = re.compile(rf'(?:{"|".join(map(re.escape, backbones))})norm\d\.')
        required = {k for k in target if k.startswith(starts) and not norm.match(k)}
        fresh = missing - required
        foreign = {k for k in unexpected if not k.startswith(starts) or norm.match(k) or k in fresh}
        missing, unexpected = missing & required, unexpected - foreign
        state = without(state, foreign)
        if fresh:
            print_log(f'{source}: not in the file, so newly initialized: {first(fresh)}', 'current')
    if missing or unexpected:
        raise FastViTError(mismatch(source, found, wanted, missing, unexpected, state, target))
    for prefix, part in parts.items():
        check_activation(own[prefix], part, published, source)
    return state


def without_projection(state: State, own: dict[str, nn.Module], source) -> State:
    """``state`` for necks that give no embeddings."""
    necks = {s: m for s, m in own.items() if isinstance(m, FastViTNeck)}
    starts = tuple(f'{s}projection.' for s, m in necks.items() if not m.network['projection'])
    idle = {k for k in state if k.startswith(starts)}
    if idle:
        print_log(f'{source}: only for embeddings, so left out: {first(idle)}', 'current')
    return without(state, idle)


def check_activation(module: FastViT, state: State, published: bool, source) -> None:
    """Refuse weights of a network that differs from ``module`` in what no weight shows: whether
    an activation follows the large-kernel convolution.

    Raises:
        FastViTError: the known networks with these weights all differ from the model.
    """
    has = module.settings['downsample_act']
    # A user's own arch may have the stages of a known one; in his own files it is no mistake.
    sure = published or isinstance(module.network['arch'], str)
    names = candidates(state) if sure else []
    if names and all(parse_arch(name)['downsample_act'] != has for name in names):
        words = {False: 'no activation', True: 'an activation'}
        raise FastViTError(
            f'{source} does not fit: this is {" or ".join(map(title, names))}, where '
            f'{words[not has]} follows the large-kernel convolution; in the model, {words[has]} '
            'does: it would compute another function with these weights'
        )


def in_form(state: State, own: dict[str, nn.Module], source, switch: bool) -> State:
    """``state``, merged for the modules that are in the deploy form.

    Args:
        switch: bring FastViTHD, which is published in the deploy form only, into that form.
    """
    branchless = any(getattr(m, 'network', {}).get('arch') == 'hd' for m in own.values())
    for start, module in own.items():
        have = starting_with(state, start)
        merged = any(k.endswith('reparam_conv.weight') for k in have)
        if merged and branchless and switch and has_branches(module):
            module.switch_to_deploy()
            print_log(f'{source}: {BRANCHLESS}', 'current')
        if not has_branches(module):
            if have:
                state = {k: v for k, v in state.items() if not k.startswith(start)}
                have = merge_state(module, in_dtype_of(module, have))
                state |= {start + k: v for k, v in have.items()}
        elif merged:
            raise FastViTError(
                f'{source} is in the deploy form, the model in the training form: '
                + ('' if branchless else 'load the training form of these weights, or ')
                + 'build the model with deploy=True (--cfg-options'
                ' model.backbone.deploy=True, and for a classifier also model.neck.deploy=True)'
                + (f'; {BRANCHLESS}' if branchless else '')
            )
    return state


def has_branches(module: FastViT | FastViTNeck) -> bool:
    return not any('reparam_conv' in k for k in module.state_dict())


def in_dtype_of(module: nn.Module, state: State) -> State:
    """``state`` in the dtype of ``module`` if that is wider, to merge without rounding."""
    dtype = next(module.parameters()).dtype
    return {
        k: v.to(torch.promote_types(v.dtype, dtype)) if v.is_floating_point() else v
        for k, v in state.items()
    }


def mismatch(source, found, wanted, missing, unexpected, state, target) -> str:
    """One line that says why a file does not fit."""
    texts = [', '.join(dict.fromkeys(names)) for names in (found, wanted)]
    text = f'{source} does not fit: this is {texts[0]}; the model is {texts[1]}'
    if found == wanted:
        text = f'{source} does not fit: {texts[0]} like the model, but for another task or data set'
    return f'{text}; {differences(missing, unexpected, state, target)}'


def has_fastvit(model: nn.Module) -> bool:
    return any(isinstance(m, FastViT) for m in model.modules())


def prepare(
    model: nn.Module,
    source: str | Path,
    whole: bool = False,
    prefix: str | None = None,
    switch: bool = False,
) -> dict:
    """Read a checkpoint and convert its ``state_dict`` for ``model``. See :func:`load`."""
    model = unwrap(model)
    checkpoint = read(source, select=only_encoder if has_fastvit(model) and not prefix else None)
    state = part_of(state_dict_of(checkpoint, source), prefix, source)
    if has_fastvit(model):
        state = {name: state[name] for name in only_encoder(state, source)}
        say_licence_of(state)
        state = fit(model, state, source, whole, switch)
    elif whole and any(wrong := incompatible(model.state_dict(), state)):
        names = (['another model'], [type(model).__name__])
        raise FastViTError(mismatch(source, *names, *wrong, state, model.state_dict()))
    meta = checkpoint.get('meta')
    return {**checkpoint, 'state_dict': state, 'meta': meta if isinstance(meta, dict) else {}}


def load(
    model: nn.Module,
    source: str | Path,
    whole: bool = False,
    prefix: str | None = None,
    switch: bool = True,
) -> dict:
    """Load weights of any layout (see :mod:`fastvit_mm.weights`) into ``model``, strictly.

    Args:
        model: a :class:`FastViT` or a model that contains one or more, at any depth, in either
            form. The deploy form accepts weights in every form and merges them while loading. A
            file with the model's own names fills each FastViT from the same place; any other file
            fills all of them with the one it has.
        source: a file, a URL or a short name (:func:`find`).
        whole: for tests: nothing may be missing. Otherwise, for fine-tuning, parts outside FastViT
            (another task's head) and ``feature_norm`` may be missing; they are logged.
        prefix: load only entries that start with it, without it: ``student.`` if a file has
            several models.
        switch: bring FastViTHD, which is published without its branches, into the deploy form.
            This replaces its parameters: not after an optimizer has been built for them.

    Returns:
        The checkpoint: ``state_dict`` as loaded, ``meta``, and everything else in the file.

    Raises:
        FastViTError: anything else is missing, unexpected or of another shape; the file is in the
            deploy form and the model in the training form; see also :func:`read`.
    """
    checkpoint = prepare(model, source, whole, prefix, switch)
    unwrap(model).load_state_dict(checkpoint['state_dict'], strict=False)
    return checkpoint


def is_pretrained(init_cfg) -> bool:
    kind = init_cfg.get('type') if isinstance(init_cfg, dict) else None
    name = getattr(kind, '__name__', str(kind))  # configs in plain Python name the class
    return name.rpartition('.')[2] in ('Pretrained', 'PretrainedInit')


def drop_pretrained(node) -> None:
    """Remove every ``Pretrained`` from a model's config: a checkpoint will overwrite them."""
    if isinstance(node, dict):
        init_cfg = node.get('init_cfg')
        if is_pretrained(init_cfg):
            node['init_cfg'] = None
        elif isinstance(init_cfg, list | tuple):
            node['init_cfg'] = [c for c in init_cfg if not is_pretrained(c)]
        if node.get('pretrained'):
            node['pretrained'] = None
    for child in node.values() if isinstance(node, dict) else node:
        if isinstance(child, dict | list | tuple):
            drop_pretrained(child)
