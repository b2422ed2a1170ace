"""Weights from files: read without running code, recognized by their keys, loaded strictly.

Four layouts hold FastViT's weights: the authors', timm's, ours, and whole OpenMMLab models with a
FastViT backbone. All become the last one's names (``backbone.*``, ``neck.*``, ``head.*``) here.
"""

import argparse
import bisect
import os
import pickle
import re
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import urlparse

import numpy as np
import torch
import torch.nn as nn
from mmengine.logging import HistoryBuffer, print_log
from mmengine.model.weight_init import PretrainedInit
from mmengine.registry import WEIGHT_INITIALIZERS
from torch import Tensor

from .errors import FastViTError
from .models import ARCHS, FastViT, FastViTNeck
from .models.fastvit import parse_arch
from .models.rep_conv import ConvBN, RepConv
from .reparameterize import unwrap

State = dict[str, Tensor]

PUBLISHED = (
    'https://docs-assets.developer.apple.com/ml-research/models/fastvit/'
    'image_classification_{kind}/fastvit_{arch}.pth.tar'
)
KINDS = {'apple_in1k': 'models', 'apple_dist_in1k': 'distilled_models'}


# ------------------------------------------------------------------------------------ reading


def find(source: str | Path) -> Path:
    """Local path of ``source``: a file, an address, or a short name such as
    ``fastvit_sa36.apple_in1k`` or ``fastvit_sa36.apple_dist_in1k``.

    Downloads are kept in ``torch.hub.get_dir()``/checkpoints, which TORCH_HOME sets.

    Raises:
        FastViTError: no such file, or the address cannot be reached.
    """
    source = str(source)
    short = re.fullmatch(r'fastvit_(\w+)\.(\w+)', source)
    if short and short[1] in ARCHS and short[2] in KINDS:
        address = PUBLISHED.format(arch=short[1], kind=KINDS[short[2]])
        # The distilled files have the plain ones' names: keep them apart.
        cached = Path(torch.hub.get_dir(), 'checkpoints', f'{source}.pth.tar')
    elif source.startswith(('http://', 'https://')):
        address = source
        cached = Path(torch.hub.get_dir(), 'checkpoints', Path(urlparse(source).path).name)
    else:
        path = Path(source).expanduser()
        if not path.is_file():
            names = f'fastvit_<{"|".join(ARCHS)}>.<{"|".join(KINDS)}>'
            raise FastViTError(
                f'checkpoint {source!r} does not exist: give a file, an address or a name {names}'
            )
        return path
    if not cached.is_file():
        cached.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(address, str(cached))
        except OSError as error:
            raise FastViTError(
                f'cannot fetch {address} ({error}): download it elsewhere and save it as {cached}'
            ) from error
    return cached


def harmless_types() -> list:
    """What real checkpoints hold beside tensors; none of it runs code when unpickled."""
    core = np._core if hasattr(np, '_core') else np.core
    scalar, rebuild = core.multiarray.scalar, core.multiarray._reconstruct
    kinds = [np.float16, np.float32, np.float64, np.int32, np.int64, np.uint8, np.bool_]
    dtypes = {type(np.dtype(k)) for k in kinds}
    return [
        argparse.Namespace,
        HistoryBuffer,
        (statistic_of, 'builtins.getattr'),
        (statistic_of, '__builtin__.getattr'),
        np.ndarray,
        np.dtype,
        *dtypes,
        # Both spellings: numpy 2 renamed numpy.core.
        *[
            (f, f'numpy.{c}.multiarray.{f.__name__}')
            for f in (scalar, rebuild)
            for c in ('core', '_core')
        ],
    ]


def statistic_of(owner: type, name: str):
    """Stands in for getattr, with which HistoryBuffer's pickles name its own statistics."""
    if owner is not HistoryBuffer or name.startswith('_'):
        raise pickle.UnpicklingError('Unsupported global: GLOBAL getattr')
    return getattr(owner, name)


def read(source: str | Path) -> dict:
    """What a checkpoint file holds, on the CPU; no code in it is run.

    Args:
        source: see :func:`find`; PyTorch's format or ``.safetensors``.

    Raises:
        FastViTError: the file is damaged, or holds types that are not plain data.
    """
    path = find(source)
    if path.suffix == '.safetensors':
        return read_safetensors(path)
    try:
        with torch.serialization.safe_globals(harmless_types()):
            return torch.load(path, map_location='cpu', weights_only=True)
    except Exception as error:
        if refused := re.search(r'GLOBAL ([\w.]+)', str(error)):
            raise FastViTError(
                f'{path} holds a {refused[1]}, which is not plain data and could run code: '
                'refused; save its state_dict alone with torch.save'
            ) from error
        raise FastViTError(
            f'{path} is truncated or not a checkpoint ({one_line(error)}): fetch or save it again'
        ) from error


def read_safetensors(path: Path) -> State:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise FastViTError(f'{path} needs safetensors: pip install safetensors') from error
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise FastViTError(f'{path} is truncated or not a safetensors file: {error}') from error


def one_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:200]


def state_dict_of(checkpoint: dict, source) -> State:
    """The tensors of a checkpoint, without the wrappers that training scripts add."""
    for key in ('state_dict', 'model', 'state_dict_ema'):
        if isinstance(checkpoint, dict) and isinstance(checkpoint.get(key), dict):
            checkpoint = checkpoint[key]
            break
    if (
        not isinstance(checkpoint, dict)
        or not checkpoint
        or not all(isinstance(v, Tensor) for v in checkpoint.values())
    ):
        raise FastViTError(f'{source} holds no weights: a state_dict of tensors was expected')
    prefix = 'module.'
    if all(k.startswith(prefix) for k in checkpoint):
        checkpoint = {k[len(prefix) :]: v for k, v in checkpoint.items()}
    return checkpoint


def check_target(path: str | Path, force: bool = False) -> Path:
    """``path`` as a place to save weights.

    Raises:
        FastViTError: an unknown suffix, or it exists and ``force`` is not set.
    """
    path = Path(path).expanduser()
    if not path.name.endswith(('.pth', '.pth.tar', '.safetensors')):
        raise FastViTError(f'{path}: give a name that ends in .pth, .pth.tar or .safetensors')
    if path.exists() and not force:
        raise FastViTError(f'{path} exists already: give another name, or --force to overwrite it')
    return path


def save(checkpoint: dict, path: str | Path) -> None:
    """Write a checkpoint, or a state dict alone for ``.safetensors``, wholly or not at all.

    Raises:
        FastViTError: it cannot be written.
    """
    path = Path(path)
    part = path.with_name(f'.{os.getpid()}.{path.name}')
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == '.safetensors':
            write_safetensors(state_dict_of(checkpoint, path), part)
        else:
            torch.save(checkpoint, part)
        part.replace(path)
    except (OSError, RuntimeError) as error:  # PyTorch's writer raises the latter
        raise FastViTError(f'cannot write {path}: {one_line(error)}') from error
    finally:
        if part.exists():
            part.unlink()


def write_safetensors(state: State, path: Path) -> None:
    try:
        from safetensors.torch import save_file
    except ImportError as error:
        raise FastViTError(f'{path} needs safetensors: pip install safetensors') from error
    save_file({k: v.contiguous() for k, v in state.items()}, path, metadata={'format': 'pt'})


# ------------------------------------------------------------------------- names of the layouts

# The authors' words and timm's: whole parts of a dotted name.
AUTHORS_TO_TIMM = {
    'patch_embed': 'stem',
    'rbr_conv': 'conv_kxk',
    'rbr_scale': 'conv_scale',
    'rbr_skip': 'identity',
    'lkb_origin': 'large_conv',
    'proj.0.lkb_reparam': 'proj.0.reparam_conv',
    'pe': 'pos_enc',
    'convffn': 'mlp',
    'se.reduce': 'se.fc1',
    'se.expand': 'se.fc2',
    'layer_scale': 'layer_scale.gamma',
    'layer_scale_1': 'layer_scale_1.gamma',
    'layer_scale_2': 'layer_scale_2.gamma',
    'conv_exp': 'final_conv',
    'head.weight': 'head.fc.weight',
    'head.bias': 'head.fc.bias',
}
# What a stage of timm's holds, in this order; each is one entry of the authors' flat network.{i}.
PARTS = ('downsample', 'pos_emb', 'blocks')


def translate(key: str, words: dict[str, str]) -> str:
    pattern = '|'.join(re.escape(w) for w in words)
    return re.sub(rf'(?<![^.])(?:{pattern})(?![^.])', lambda m: words[m[0]], key)


def authors_to_timm(state: State) -> State:
    """The authors' keys renamed to timm's."""
    # A stage begins where a downsampling (proj) stands.
    cuts = sorted({int(m[1]) for k in state if (m := re.match(r'network\.(\d+)\.proj\.', k))})

    def rename(key: str) -> str:
        if found := re.match(r'network\.(\d+)\.(?:(proj)|(pe|reparam_conv)|\d+)\.', key):
            part = PARTS[0 if found[2] else 1 if found[3] else 2]
            stage = bisect.bisect_right(cuts, int(found[1]))
            key = f'stages.{stage}.{part}.{key.split(".", 2)[2]}'
        return translate(key, AUTHORS_TO_TIMM)

    return {rename(k): v for k, v in state.items()}


def timm_to_authors(state: State) -> State:
    """The inverse of :func:`authors_to_timm`."""
    part_of = re.compile(rf'stages\.(\d+)\.({"|".join(PARTS)})\.')
    parts = {(m[1], m[2]) for k in state if (m := part_of.match(k))}
    flat = sorted(parts, key=lambda p: (int(p[0]), PARTS.index(p[1])))
    words = {theirs: own for own, theirs in AUTHORS_TO_TIMM.items()}

    def rename(key: str) -> str:
        if found := part_of.match(key):
            key = f'network.{flat.index(found.groups())}.{key[found.end() :]}'
        return translate(key, words)

    return {rename(k): v for k, v in state.items()}


def recognize(state: State) -> str | None:
    """'apple', 'timm' (also our bare backbone), 'mm' (a whole model), or None."""
    if any(k.startswith('patch_embed.0.') for k in state):
        return 'apple'
    if any(k.startswith('stem.0.') for k in state):
        return 'timm'
    if any(k.startswith('backbone.stem.0.') for k in state):
        return 'mm'
    return None


def to_mm(state: State, source='the file') -> State:
    """Any of the layouts to OpenMMLab's names; names already in place stay.

    Raises:
        FastViTError: no FastViT in it.
    """
    layout = recognize(state)
    if layout is None:
        raise FastViTError(
            f'{source} is not a FastViT: its first names are {", ".join(list(state)[:3])}'
        )
    if layout == 'mm':
        return state
    if layout == 'apple':
        state = authors_to_timm(state)

    def place(key: str) -> str:
        if key.startswith('final_conv.'):
            return f'neck.{key}'
        return key if key.startswith('head.') else f'backbone.{key}'

    return {place(k): v for k, v in state.items()}


# OpenMMLab's names of what the classifiers of timm and the authors have as well.
SHARED = re.compile(r'backbone\.(?=stem\.|stages\.)|neck\.(?=final_conv\.)|(?=head\.fc\.)')


def from_mm(state: State, layout: str) -> State:
    """OpenMMLab's names to ``layout``, 'timm' or 'apple'; only what is :data:`SHARED`."""
    state = {k[m.end() :]: v for k, v in state.items() if (m := SHARED.match(k))}
    return timm_to_authors(state) if layout == 'apple' else state


def arch_of(state: State) -> dict:
    """Settings (:func:`parse_arch`) of the FastViT in a backbone's state dict, in either form.

    Stages that it does not hold have depth 0; the layer scale's initial value cannot be known.
    """
    depths, widths, attention = [0] * 4, [0] * 4, [0] * 4
    ffn_ratio = 0
    for key, value in state.items():
        if not (found := re.match(r'stages\.([0-3])\.blocks\.(\d+)\.(.*)', key)):
            continue
        stage, block, rest = int(found[1]), int(found[2]), found[3]
        depths[stage] = max(depths[stage], block + 1)
        attention[stage] |= rest.startswith('token_mixer.qkv')
        if rest == 'mlp.fc2.weight':
            widths[stage], ffn_ratio = value.shape[0], value.shape[1] / value.shape[0]
    return dict(
        depths=tuple(depths),
        widths=tuple(widths),
        attention=tuple(attention),
        ffn_ratio=ffn_ratio,
    )


def describe(state: State) -> str:
    """Which FastViT a backbone's state dict holds, for messages: 'FastViT-SA12'."""
    arch = arch_of(state)
    for name in ARCHS:
        if parse_arch(name) == {**parse_arch(name), **arch}:
            return f'FastViT-{name.upper()}'
    return f'a FastViT with depths {list(arch["depths"])} and widths {list(arch["widths"])}'


# ------------------------------------------------------------------------------------- deploying


def is_merged(state: State) -> bool:
    """Whether a backbone's state dict is in our deploy form, merged completely."""
    return 'stages.0.blocks.0.mlp.conv.reparam_conv.weight' in state


def merge_completely(module: FastViT | FastViTNeck) -> None:
    module.switch_to_deploy()


def merge_branches(module: FastViT | FastViTNeck) -> None:
    """To the authors' and timm's deploy form, in place: the BatchNorms and scales outside the
    branches stay."""
    for part in module.modules():
        if isinstance(part, RepConv) and not isinstance(part, ConvBN):
            part.switch_to_deploy()


def norms_of(state: State) -> State:
    """The output norms in a backbone's state dict."""
    return {k: v for k, v in state.items() if re.match(r'norm\d\.', k)}


def twin_of(module: FastViT | FastViTNeck, state: State) -> FastViT | FastViTNeck:
    """A fresh ``module`` in the very form of ``state``: any of the deploy forms, or training."""
    twin = module.training_form().eval()
    if is_merged(state):
        twin.switch_to_deploy()
    for name, part in twin.named_modules():
        if isinstance(part, RepConv) and f'{name}.reparam_conv.weight' in state:
            part.switch_to_deploy()
    return twin.to(next(v for v in state.values() if v.is_floating_point()).dtype)


def merge_state(module: FastViT | FastViTNeck, state: State, merge=merge_completely) -> State:
    """Weights for ``module``, to which ``merge`` was done, from its weights in any form."""
    if is_merged(state):
        return state
    norms, twin = norms_of(state), twin_of(module, state)
    state = without(state, norms)
    if any(incompatible(twin.state_dict(), state)):
        return state | norms  # not this network: the check that follows says so
    twin.load_state_dict(state, strict=False)
    merge(twin)
    return twin.state_dict() | norms


def convert(checkpoint_state: State, layout: str, deploy: bool, source='the file') -> State:
    """Weights of any layout in ``layout``: 'timm', 'apple' or 'mm'.

    Args:
        deploy: give the deploy form. Ours ('mm') is merged completely; the others', as these
            projects define it, keeps the BatchNorms and scales outside their branches.

    Raises:
        FastViTError: no whole FastViT, or a form from which there is no way to the one wanted.
    """
    state = to_mm(checkpoint_state, source)
    parts = {p: starting_with(state, p) for p in ('backbone.', 'neck.')}
    backbone, neck = parts.values()
    if not deploy and any('reparam_conv' in k for k in backbone):
        raise FastViTError(
            f'{source} is in the deploy form, from which nothing leads back to the training form: '
            'convert its training form, or add --deploy'
        )
    if layout != 'mm' and is_merged(backbone):
        raise FastViTError(
            f'{source} is merged completely, without the BatchNorms and scales of the deploy form '
            f'of {layout}: convert its training form'
        )
    arch = arch_of(backbone)
    if 0 in arch['depths']:
        raise FastViTError(f'{source} has {describe(backbone)}: a whole one is needed')
    # Any weight of the stem's first convolution knows the number of input channels.
    stem = next(v for k, v in backbone.items() if k.startswith('stem.0.') and v.ndim == 4)
    modules = {'backbone.': FastViT(arch, in_channels=stem.shape[1])}
    if any(k.startswith('final_conv.') for k in neck):
        width = neck['final_conv.se.fc2.bias'].numel()
        modules['neck.'] = FastViTNeck(arch['widths'][3], width)
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


# --------------------------------------------------------------------------------------- loading


def starting_with(state: State, prefix: str) -> State:
    return {k[len(prefix) :]: v for k, v in state.items() if k.startswith(prefix)}


def without(state: State, keys: Iterable[str]) -> State:
    keys = set(keys)
    return {k: v for k, v in state.items() if k not in keys}


def first(keys: Iterable[str]) -> str:
    keys = sorted(keys)
    return ', '.join(keys[:3]) + (f' and {len(keys) - 3} more' if len(keys) > 3 else '')


def incompatible(target: State, state: State) -> tuple[set[str], set[str]]:
    """Keys missing from ``state`` and keys it has too many; another shape is both."""
    shapes = {k for k in target if k in state and target[k].shape != state[k].shape}
    # Files from before PyTorch 0.4.1 have no counters; they matter only without momentum.
    missing = {k for k in set(target) - set(state) if not k.endswith('num_batches_tracked')}
    return missing | shapes, set(state) - set(target) | shapes


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


def differences(missing, unexpected, state, target) -> str:
    shapes = missing & unexpected
    details = []
    if missing - shapes:
        details.append(f'missing in the file: {first(missing - shapes)}')
    if unexpected - shapes:
        details.append(f'unknown to the model: {first(unexpected - shapes)}')
    if shapes:
        sizes = (f'{k} {tuple(state[k].shape)} for {tuple(target[k].shape)}' for k in shapes)
        details.append(f'of another shape: {first(sizes)}')
    return '; '.join(details)


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
    """Load weights of any layout (see the module's docstring) into ``model``, strictly.

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
