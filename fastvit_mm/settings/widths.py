"""Whether what follows a FastViT expects the channels that it gives."""

from fastvit_mm.errors import FastViTError
from fastvit_mm.models.archs import parse_arch


def check_widths(model: dict) -> None:
    """Compare ``in_channels`` of a FastViT's neck and of the head on its neck with its widths.

    Raises:
        FastViTError: they differ, or the arch is not valid.
    """
    backbone, neck = model.get('backbone'), model.get('neck')
    if type_of(backbone) != 'FastViT':
        return
    arch = backbone.get('arch', 'sa36')
    try:
        widths = parse_arch(arch)['widths']
    except FastViTError as error:
        raise FastViTError(f'model.backbone.arch: {error}') from error
    stages = backbone.get('out_indices', (0, 1, 2, 3))
    stages = list(stages) if isinstance(stages, list | tuple) else [stages]
    if not all(type(i) is int and i in range(len(widths)) for i in stages):
        return  # the backbone says what is wrong
    given = [widths[i] for i in stages]
    name = arch if isinstance(arch, str) else 'this arch'
    if type_of(neck) == 'FPN':
        compare('model.neck', neck, given, name)
    elif type_of(neck) in ('FastViTNeck', 'FastViTFeatures'):
        compare('model.neck', neck, given[-1], name)
        head = model.get('head')
        if type_of(head) in ('LinearClsHead', 'ManoHead'):
            wide = neck.get('out_channels') or 2 * neck['in_channels']
            wide = neck.get('projection') or wide
            compare('model.head', head, wide, 'the neck')


def type_of(node) -> str:
    kind = node.get('type') if isinstance(node, dict) else None
    return getattr(kind, '__name__', str(kind)).rpartition('.')[2]


def compare(path: str, node: dict, given: int | list[int], giver: str) -> None:
    wanted = node.get('in_channels')
    if wanted is None:
        return
    wanted = list(wanted) if isinstance(wanted, tuple) else wanted
    if wanted != given:
        option = ','.join(map(str, given)) if isinstance(given, list) else given
        raise FastViTError(
            f'{path}.in_channels={wanted}, but {giver} gives {given}: '
            f'set {path}.in_channels={option}'
        )
