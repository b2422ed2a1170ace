"""Recognizes the names in a state dict (the authors', timm's or OpenMMLab's) and its FastViT.

OpenMMLab's names are those of a whole model: ``backbone.*``, ``neck.*`` and ``head.*``.
"""

import bisect
import re
from collections.abc import Iterable

from fastvit_mm.errors import FastViTError
from fastvit_mm.models import ARCHS
from fastvit_mm.models.archs import ENCODERS, parse_arch, title

from .encoders import encoder_of, say_licence
from .states import State, first, starting_with

# The authors' words and timm's, each one or more whole parts of a dotted name, longer ones first.
AUTHORS_TO_TIMM = {
    'patch_embed': 'stem',
    'rbr_conv': 'conv_kxk',
    'rbr_scale': 'conv_scale',
    'rbr_skip': 'identity',
    'lkb_origin': 'large_conv',
    'proj.0.lkb_reparam': 'proj.0.reparam_conv',
    'pe': 'pos_enc',
    'convffn': 'mlp',
    'layer_scale': 'layer_scale.gamma',
    'layer_scale_1': 'layer_scale_1.gamma',
    'layer_scale_2': 'layer_scale_2.gamma',
    'conv_exp.se.reduce': 'final_conv.se.fc1',
    'conv_exp.se.expand': 'final_conv.se.fc2',
    'conv_exp': 'final_conv',
    'head.weight': 'head.fc.weight',
    'head.bias': 'head.fc.bias',
}
#: Widths of MobileCLIP's embeddings.
EMBEDDINGS = (512, 768)
# The parts of timm's stages, in order; each is one entry of the authors' flat network.{i}.
PARTS = ('downsample', 'pos_emb', 'blocks')


def translate(key: str, words: dict[str, str]) -> str:
    pattern = '|'.join(re.escape(w) for w in words)
    return re.sub(rf'(?<![^.])(?:{pattern})(?![^.])', lambda m: words[m[0]], key)


def authors_to_timm(state: State) -> State:
    """The authors' keys renamed to timm's."""
    # A downsampling (proj) starts a new stage.
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


def holds(state: State, prefixes: Iterable[str]) -> bool:
    """Whether there is a FastViT at one of ``prefixes``."""
    starts = tuple(f'{p}stem.0.' for p in prefixes)
    return any(k.startswith(starts) for k in state)


def recognize(state: State) -> str | None:
    """'apple', 'timm' (also our bare backbone), 'mm' (a whole model), or None."""
    if any(k.startswith('patch_embed.0.') for k in state):
        return 'apple'
    if holds(state, ['']):
        return 'timm'
    return 'mm' if holds(state, ['backbone.']) else None


def part_of(state: State, prefix: str | None, source) -> State:
    """The entries that start with ``prefix``, without the prefix.

    Raises:
        FastViTError: there are none.
    """
    part = starting_with(state, f'{prefix.rstrip(".")}.') if prefix else state
    if not part:
        raise FastViTError(
            f'{source} has nothing that starts with {prefix}: its names are {first(state)}'
        )
    return part


def only_model(state: State, source) -> State:
    """Extract a whole model from one that contains it (``student.backbone.*``).

    Raises:
        FastViTError: there is none, or more than one.
    """
    parts = sorted({m[1] for k in state if (m := re.match(r'(.+\.)backbone\.stem\.0\.', k))})
    if not parts:
        raise FastViTError(
            f'{source} is not a FastViT: its first names are {", ".join(list(state)[:3])}'
        )
    if len(parts) > 1:
        raise FastViTError(
            f'{source} contains several FastViTs, in {", ".join(parts)}: choose one, as in '
            f'prefix={parts[0]!r} (of init_cfg) or --prefix {parts[0]} (of convert_weights.py)'
        )
    return starting_with(state, parts[0])


def to_mm(state: State, source='the file') -> State:
    """Convert any layout to OpenMMLab's names; names that are already OpenMMLab's do not change.

    Raises:
        FastViTError: there is no FastViT in it, or more than one.
    """
    encoder = encoder_of(state, source)
    inside, state = encoder is not state, encoder
    layout = recognize(state)
    if layout is None:
        return only_model(state, source)
    if layout == 'mm':
        return state
    if layout == 'apple':
        state = authors_to_timm(state)
    state = with_projection(state, inside)

    def place(key: str) -> str:
        if key.startswith(('final_conv.', 'projection.')):
            return f'neck.{key}'
        return key if key.startswith('head.') else f'backbone.{key}'

    return {place(k): v for k, v in state.items()}


def with_projection(state: State, inside: bool) -> State:
    """The head of a CLIP encoder under the name it has in :class:`FastViTNeck`, ``projection``.

    MobileCLIP has it transposed and without bias; in timm, and so in MobileCLIP2, it is a
    classifier like others, known by its place in a larger model or by its width.

    Args:
        inside: whether the weights are from a file with a text tower.
    """
    state = dict(state)
    if 'head.proj' in state:
        state['head.fc.weight'] = state.pop('head.proj').T.contiguous()
    elif 'head.fc.weight' not in state or not (
        inside or (len(state['head.fc.weight']) in EMBEDDINGS and is_encoder(state))
    ):
        return state
    weight = state['projection.weight'] = state.pop('head.fc.weight')
    bias = state.pop('head.fc.bias', None)
    state['projection.bias'] = weight.new_zeros(len(weight)) if bias is None else bias
    return state


def without_projection(state: State, layout: str) -> State:
    """The inverse of :func:`with_projection`.

    Raises:
        FastViTError: the layout has no place for the bias.
    """
    if 'projection.weight' not in state:
        return state
    state = dict(state)
    weight, bias = state.pop('projection.weight'), state.pop('projection.bias')
    if layout == 'timm':
        return state | {'head.fc.weight': weight, 'head.fc.bias': bias}
    if bias.any():
        raise FastViTError(
            "the authors' MobileCLIP has no bias in its projection, this one has: convert it to "
            'timm'
        )
    return state | {'head.proj': weight.T.contiguous()}


# OpenMMLab's names of parts that the classifiers of timm and the authors also have.
SHARED = re.compile(
    r'backbone\.(?=stem\.|stages\.)|neck\.(?=final_conv\.|projection\.)|(?=head\.fc\.)'
)


def from_mm(state: State, layout: str) -> State:
    """Convert OpenMMLab's names to ``layout``, 'timm' or 'apple'; only :data:`SHARED` parts."""
    state = {k[m.end() :]: v for k, v in state.items() if (m := SHARED.match(k))}
    state = without_projection(state, layout)
    return timm_to_authors(state) if layout == 'apple' else state


def arch_of(state: State) -> dict:
    """Settings (:func:`parse_arch`) of the FastViT in a backbone's state dict, in any form.

    Missing stages have depth 0. The initial value of the layer scale and the activation after the
    large-kernel convolution are unknown; what a deploy form no longer shows is left out.
    """
    found = [m for k in state if (m := re.match(r'stages\.([0-4])\.(.*)', k))]
    count = max([4, *(int(m[1]) + 1 for m in found)])
    depths, widths, attention, se = ([0] * count for _ in range(4))
    norms, ffn_ratio = set(), 0
    for key, stage, rest in ((m[0], int(m[1]), m[2]) for m in found):
        se[stage] |= rest.startswith('downsample.proj.0.se.')
        if not (block := re.match(r'blocks\.(\d+)\.(.*)', rest)):
            continue
        depths[stage] = max(depths[stage], int(block[1]) + 1)
        attention[stage] |= block[2].startswith('token_mixer.qkv')
        if block[2] == 'norm.weight':
            norms.add('BN' if key.replace('weight', 'running_mean') in state else 'LN')
        if block[2] == 'mlp.fc2.weight':
            value = state[key]
            widths[stage], ffn_ratio = value.shape[0], value.shape[1] / value.shape[0]
    arch = dict(
        depths=tuple(depths),
        widths=tuple(widths),
        attention=tuple(attention),
        ffn_ratio=ffn_ratio,
        downsample_se=tuple(map(int, se)),
    )
    if len(norms) == 1:
        arch['attention_norm'] = norms.pop()
    if 'stem.0.conv_kxk.0.conv.weight' in state:
        arch['stem_scale'] = 'stem.0.conv_scale.conv.weight' in state
    return arch


def candidates(state: State) -> list[str]:
    """The rows of :data:`ARCHS` whose stages are those in a backbone's state dict."""
    arch = arch_of(state)
    present = [i for i, depth in enumerate(arch['depths']) if depth]

    def fits(row: dict) -> bool:
        if max(present, default=-1) >= len(row['depths']):
            return False
        return all(
            all(row[k][i] == v[i] for i in present) if isinstance(v, tuple) else row[k] == v
            for k, v in arch.items()
        )

    return [name for name in ARCHS if fits(parse_arch(name))]


def is_encoder(state: State) -> bool:
    """Whether the network in a backbone's state dict can only be MobileCLIP's or FastVLM's."""
    names = candidates(state)
    return bool(names) and set(names) <= set(ENCODERS)


def is_published(state: State) -> bool:
    """Whether the names are those of the authors, or of a whole classifier or encoder of timm."""
    layout = recognize(encoder_of(state, 'the file'))
    return layout == 'apple' or (layout == 'timm' and any('final_conv.' in k for k in state))


def say_licence_of(state: State) -> None:
    """Say the licence of the encoders if this is one, published or converted to our names; in
    those, a model with the head of a task may be trained from nothing."""
    bare = all(k.startswith(('backbone.', 'neck.')) for k in state)
    known = is_published(state) or (bare and recognize(state) == 'mm')
    if known and is_encoder(starting_with(to_mm(state), 'backbone.')):
        say_licence()


def describe(state: State) -> str:
    """The FastViT in a backbone's state dict, for messages: 'FastViT-SA12'."""
    arch = arch_of(state)
    names = [
        n for n in candidates(state) if len(ARCHS[n]['depths']) == sum(map(bool, arch['depths']))
    ]
    if names:
        return ' or '.join(map(title, names))
    return f'a FastViT with depths {list(arch["depths"])} and widths {list(arch["widths"])}'
