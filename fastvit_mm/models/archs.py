"""The variants and their settings."""

from itertools import pairwise
from numbers import Real

from fastvit_mm.errors import FastViTError

#: The networks: Table 2 of FastViT's paper, MobileCLIP's image encoders MCi0 to MCi4
#: (https://arxiv.org/abs/2311.17049, 2508.20691) and FastVLM's FastViTHD (2412.13303), which is
#: MCi3 trained for larger images. See :func:`parse_arch`.
FASTVITS = {
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
SMALL = dict(ffn_ratio=3, attention=(0, 0, 0, 1), downsample_se=(0, 0, 1, 1), downsample_act=True)
LARGE = dict(attention=(0, 0, 0, 1, 1), attention_norm='LN', downsample_act=True, stem_scale=False)
MCI3 = dict(depths=(2, 12, 24, 4, 2), widths=(96, 192, 384, 768, 1536), **LARGE)
ENCODERS = {
    'mci0': dict(depths=(2, 6, 10, 2), widths=(64, 128, 256, 512), **SMALL),
    'mci1': dict(depths=(4, 12, 20, 4), widths=(64, 128, 256, 512), **SMALL),
    'mci2': dict(depths=(4, 12, 24, 4), widths=(80, 160, 320, 640), **SMALL),
    'mci3': MCI3,
    'mci4': dict(depths=(2, 12, 24, 4, 4), widths=(128, 256, 512, 1024, 2048), **LARGE),
    'hd': MCI3,
}
ARCHS = FASTVITS | ENCODERS
ARCH_DEFAULTS = dict(
    ffn_ratio=4,
    attention=(0, 0, 0, 0),
    layer_scale=1e-5,
    attention_norm='BN',
    downsample_se=(0, 0, 0, 0),
    downsample_act=False,
    stem_scale=True,
)

#: Width of an attention head.
HEAD_WIDTH = 32


def parse_arch(arch: str | dict) -> dict:
    """Settings of ``arch``: a name in :data:`ARCHS`, or a dict.

    A dict has ``depths`` and ``widths``, one value for each of four or five stages, and optionally:

    - ``ffn_ratio``: hidden width of the ConvFFN over its width.
    - ``attention``: 1 for each stage that mixes tokens by self-attention.
    - ``layer_scale``: initial value.
    - ``attention_norm``: norm before self-attention, BN or LN (over the channels).
    - ``downsample_se``: 1 for each stage before which the large-kernel convolution has
      squeeze-and-excite.
    - ``downsample_act``: whether an activation follows the large-kernel convolution.
    - ``stem_scale``: whether the stem has scale branches.

    Raises:
        FastViTError: an unknown name or key, a missing key, or invalid values.
    """
    if isinstance(arch, str):
        if arch not in ARCHS:
            raise FastViTError(f'unknown arch {arch!r}: choose one of {", ".join(ARCHS)}')
        return with_defaults(ARCHS[arch])
    if not isinstance(arch, dict):
        raise FastViTError(f'arch {arch!r} is neither a name ({", ".join(ARCHS)}) nor a dict')
    known = ['depths', 'widths', *ARCH_DEFAULTS]
    unknown, missing = set(arch) - set(known), {'depths', 'widths'} - set(arch)
    if unknown or missing:
        raise FastViTError(
            f'an arch dict takes {", ".join(known)}; '
            f'unknown: {sorted(unknown) or "none"}, missing: {sorted(missing) or "none"}'
        )
    depths = arch['depths']
    if not isinstance(depths, list | tuple) or len(depths) not in (4, 5):
        raise FastViTError(f'arch: depths needs four or five values, got {depths!r}')
    settings = with_defaults(arch)
    check_values(settings)
    return settings


def title(name: str) -> str:
    """The name of a row of :data:`ARCHS` as it is written: FastViT-SA12, MCi0, FastViTHD."""
    if name in FASTVITS:
        return f'FastViT-{name.upper()}'
    return 'FastViTHD' if name == 'hd' else name.replace('mci', 'MCi')


def with_defaults(arch: dict) -> dict:
    settings = {**ARCH_DEFAULTS, **arch}
    for key in ('attention', 'downsample_se'):
        settings[key] = arch.get(key, (0,) * len(settings['depths']))
    return settings


def check_values(settings: dict) -> None:
    count = {4: 'four', 5: 'five'}[len(settings['depths'])]
    for key, least in (('depths', 0), ('widths', 1), ('attention', 0), ('downsample_se', 0)):
        values = settings[key]
        if not isinstance(values, list | tuple) or len(values) != len(settings['depths']):
            raise FastViTError(f'arch: {key} needs {count} values, got {values!r}')
        if not all(isinstance(v, int) and v >= least for v in values):
            raise FastViTError(f'arch: {key} needs whole numbers from {least} up, got {values!r}')
    for key in ('ffn_ratio', 'layer_scale'):
        value = settings[key]
        if not isinstance(value, Real) or not value > 0:
            raise FastViTError(f'arch: {key} needs a positive number, got {value!r}')
    for key, choices in (
        ('attention_norm', ('BN', 'LN')),
        ('downsample_act', (False, True)),
        ('stem_scale', (False, True)),
    ):
        if settings[key] not in choices:
            raise FastViTError(f'arch: {key} is {choices[0]} or {choices[1]}, not {settings[key]}')
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
