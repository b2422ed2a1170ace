"""Files that hold a FastViT as the image encoder of a larger model: MobileCLIP's, OpenCLIP's and
FastVLM's. What stands beside it is left out, by name."""

from collections.abc import Collection
from functools import cache

from mmengine.logging import print_log

from fastvit_mm.errors import FastViTError

from .states import State, first, starting_with

#: Where the encoder's names start, and those of what else is in such a file.
ENCODERS = {
    'image_encoder.model.': ('text_encoder.', 'logit_scale'),  # MobileCLIP
    'visual.trunk.': (  # OpenCLIP, with its own text tower or the older one without a prefix
        'text.',
        'transformer.',
        'token_embedding.',
        'positional_embedding',
        'ln_final.',
        'attn_mask',
        'text_projection',
        'logit_scale',
        'logit_bias',
    ),
    'model.vision_tower.vision_tower.model.': ('model.', 'lm_head.'),  # FastVLM
}
LICENCE = (
    "the weights of MobileCLIP's and FastVLM's encoders are for research only (Apple Machine "
    'Learning Research Model licence, AMLR), and so is what is trained from them'
)


@cache
def say_licence() -> None:
    """Once per process."""
    print_log(LICENCE, 'current')


def encoder_in(names: Collection[str]) -> str | None:
    """The start of the encoder's names, or None if this is not such a file."""
    for prefix in ENCODERS:
        for start in (prefix, f'module.{prefix}'):
            firsts = f'{start}patch_embed.0.', f'{start}stem.0.'
            if any(name.startswith(firsts) for name in names):
                return start
    return None


def split(names: Collection[str], source) -> tuple[list[str], list[str]]:
    """The encoder's names, and what stands beside it: all and nothing if this is not such a file.

    Raises:
        FastViTError: what stands beside the encoder is not known.
    """
    start = encoder_in(names)
    if start is None:
        return list(names), []
    module = 'module.' if start.startswith('module.') else ''
    beside = tuple(module + name for name in ENCODERS[start.removeprefix(module)])
    others = [name for name in names if not name.startswith(start)]
    if unknown := [name for name in others if not name.startswith(beside)]:
        raise FastViTError(
            f'{source} has more than an image encoder and what usually stands beside it: '
            f'{first(unknown)}; choose the encoder with prefix={start[:-1]!r} (of init_cfg) or '
            f'--prefix {start[:-1]} (of convert_weights.py)'
        )
    return [name for name in names if name.startswith(start)], others


def only_encoder(names: Collection[str], source) -> list[str]:
    """The encoder's names (see :func:`split`); says what is left out, and the licence."""
    kept, others = split(names, source)
    if others:
        parts = sorted({name.removeprefix('module.').split('.')[0] for name in others})
        print_log(
            f'{source}: the image encoder only; left out: {", ".join(parts)} '
            f'({len(others)} tensors)',
            'current',
        )
    if encoder_in(kept):
        say_licence()
    return kept


def encoder_of(state: State, source) -> State:
    """The encoder in ``state`` under its own names, or ``state`` if this is not such a file."""
    start = encoder_in(state)
    if start is None:
        return state
    return starting_with({name: state[name] for name in split(state, source)[0]}, start)
