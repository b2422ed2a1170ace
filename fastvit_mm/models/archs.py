"""The variants and their settings."""

from itertools import pairwise
from numbers import Real

from fastvit_mm.errors import FastViTError

#: Table 2 of the paper. ``attention`` marks the stages that mix tokens by self-attention.
ARCHS = {
    't8': dict(depths=(2, 2, 4, 2), widths=(48, 96, 192, 384), ffn_ratio=3),
    't12': dict(depths=(2, 2, 6, 2), widths=(64, 128, 256, 512), ffn_ratio=3),
    's12': dict(depths=(2, 2, 6, 2), widths=(64, 128, 256, 512)),
    'sa12': dict(depths=(2, 2, 6, 2), widths=(64, 128, 256, 512), attention=(0, 0, 0, 1)),
    'sa24': dict(depths=(4, 4, 12, 4), widths=(64, 128, 256, 512), attention=(0, 0, 0, 1)),
    'sa36': dict(
        depths=(6, 6, 18, 6),
        widths=(64, 128, 256, 512),
        attention=(0, 0, 0, 1),
        layer_scale=1e-6,
    ),
    'ma36': dict(
        depths=(6, 6, 18, 6),
        widths=(76, 152, 304, 608),
        attention=(0, 0, 0, 1),
        layer_scale=1e-6,
    ),
}
ARCH_DEFAULTS = dict(ffn_ratio=4, attention=(0, 0, 0, 0), layer_scale=1e-5)

#: Width of an attention head.
HEAD_WIDTH = 32


def parse_arch(arch: str | dict) -> dict:
    """Settings of ``arch``: a name in :data:`ARCHS`, or a dict with ``depths`` and ``widths`` (four
    each) and optionally ``ffn_ratio``, ``attention`` and ``layer_scale``.

    Raises:
        FastViTError: an unknown name or key, a missing key, or invalid values.
    """
    if isinstance(arch, str):
        if arch not in ARCHS:
            raise FastViTError(f'unknown arch {arch!r}: choose one of {", ".join(ARCHS)}')
        return {**ARCH_DEFAULTS, **ARCHS[arch]}
    if not isinstance(arch, dict):
        raise FastViTError(f'arch {arch!r} is neither a name ({", ".join(ARCHS)}) nor a dict')
    known = ['depths', 'widths', *ARCH_DEFAULTS]
    unknown, missing = set(arch) - set(known), {'depths', 'widths'} - set(arch)
    if unknown or missing:
        raise FastViTError(
            f'an arch dict takes {", ".join(known)}; '
            f'unknown: {sorted(unknown) or "none"}, missing: {sorted(missing) or "none"}'
        )
    settings = {**ARCH_DEFAULTS, **arch}
    for key, least in (('depths', 0), ('widths', 1), ('attention', 0)):
        values = settings[key]
        if not isinstance(values, list | tuple) or len(values) != 4:
            raise FastViTError(f'arch: {key} needs four values, got {values!r}')
        if not all(isinstance(v, int) and v >= least for v in values):
            raise FastViTError(f'arch: {key} needs whole numbers from {least} up, got {values!r}')
    for key in ('ffn_ratio', 'layer_scale'):
        value = settings[key]
        if not isinstance(value, Real) or not value > 0:
            raise FastViTError(f'arch: {key} needs a positive number, got {value!r}')
    for before, width in pairwise(settings['widths']):
        if width % before:
            raise FastViTError(
                f'arch: width {width} is not a multiple of the previous one, {before}'
            )
    for width, attends in zip(settings['widths'], settings['attention'], strict=True):
        if attends and width % HEAD_WIDTH:
            raise FastViTError(
                f'arch: width {width} is not a multiple of {HEAD_WIDTH}, as attention needs'
            )
    return settings
