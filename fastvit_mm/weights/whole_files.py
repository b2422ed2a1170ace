"""Converting a file of weights to another layout or form."""

from pathlib import Path
from typing import NamedTuple

from fastvit_mm.writing import check_target

from .encoders import only_encoder
from .files import read, save, state_dict_of
from .forms import convert
from .layouts import SHARED, part_of, say_licence_of, to_mm


class Converted(NamedTuple):
    """What was written: the file, its number of tensors, and keys that the layout cannot hold."""

    path: Path
    tensors: int
    left_out: list[str]


def convert_file(
    src: str | Path,
    dst: str | Path,
    to: str = 'mm',
    deploy: bool = False,
    prefix: str | None = None,
    force: bool = False,
) -> Converted:
    """Convert a file of weights.

    Args:
        src: file, URL or short name of the weights, in any layout.
        dst: file to write: .pth, .pth.tar or .safetensors.
        to: layout to write: timm, apple or mm.
        deploy: whether to write the deploy form.
        prefix: convert only weights that start with it, if ``src`` has several models.
        force: whether ``dst`` may be overwritten.

    Raises:
        FastViTError: ``src`` cannot be used, or ``dst`` not be written.
    """
    dst = check_target(dst, ('.pth', '.pth.tar', '.safetensors'), new=not force, create=False)
    checkpoint = read(src, select=None if prefix else only_encoder)
    state = part_of(state_dict_of(checkpoint, src), prefix, src)
    state = {name: state[name] for name in only_encoder(state, src)}
    say_licence_of(state)
    converted = convert(state, to, deploy, src)
    content = converted if to == 'timm' else dict(state_dict=converted)  # as each project does
    if to == 'mm' and (meta := checkpoint.get('meta')):
        content['meta'] = {k: v for k, v in meta.items() if k == 'dataset_meta'}
    save(content, dst)
    left_out = [] if to == 'mm' else [k for k in to_mm(state) if not SHARED.match(k)]
    return Converted(dst, len(converted), left_out)
