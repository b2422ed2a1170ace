"""Weights files: found, downloaded, read without running code, and written atomically."""

import argparse
import hashlib
import io
import json
import pickle
import re
from collections.abc import Callable, Collection
from http.client import HTTPException
from pathlib import Path
from urllib.parse import urlparse

import numpy as np
import torch
from filelock import FileLock
from mmengine.fileio import BaseStorageBackend, get_file_backend
from mmengine.fileio.backends import prefix_to_backends
from mmengine.logging import HistoryBuffer
from torch import Tensor

from fastvit_mm.errors import FastViTError, one_line
from fastvit_mm.finite import all_finite
from fastvit_mm.models.archs import ENCODERS, FASTVITS
from fastvit_mm.writing import whole

from .encoders import say_licence
from .states import State, first
from .unfolding import refuse_unfolding

APPLE = 'https://docs-assets.developer.apple.com/ml-research/'
FASTVIT = f'{APPLE}models/fastvit/image_classification_'
HUB = 'https://huggingface.co/timm/fastvit_{}.apple_mclip2_dfndr2b/resolve/main/model.safetensors'
#: Addresses by short name: fastvit_<arch>.<kind>
PUBLISHED = {
    'apple_in1k': {a: f'{FASTVIT}models/fastvit_{a}.pth.tar' for a in FASTVITS},
    'apple_dist_in1k': {a: f'{FASTVIT}distilled_models/fastvit_{a}.pth.tar' for a in FASTVITS},
    'apple_mclip': {f'mci{i}': f'{APPLE}datasets/mobileclip/mobileclip_s{i}.pt' for i in range(3)},
    'apple_mclip2_dfndr2b': {f'mci{i}': HUB.format(f'mci{i}') for i in (0, 2, 3, 4)},
}
INDEX = '.safetensors.index.json'
Select = Callable[[Collection[str], Path | str], list[str]]


def find(source: str | Path) -> Path | str:
    """Where :func:`read` finds ``source``: a local path, to which URLs and short names are
    downloaded, or an address of mmengine's file client such as ``s3://...``, unchanged.

    Args:
        source: a file, a URL, or a short name such as ``fastvit_sa36.apple_in1k`` or
            ``fastvit_sa36.apple_dist_in1k``.

    Downloads are kept in ``torch.hub.get_dir()``/checkpoints, which TORCH_HOME sets.

    Raises:
        FastViTError: the file does not exist, the URL cannot be reached, or no backend reads
            such an address.
    """
    source = str(source)
    short = re.fullmatch(r'fastvit_(\w+)\.(\w+)', source)
    if short and (address := PUBLISHED.get(short[2], {}).get(short[1])):
        if short[1] in ENCODERS:
            say_licence()
        # The distilled files have the same names as the plain ones: keep them apart.
        suffix = re.search(r'(\.pth\.tar|\.\w+)$', address)[1]
        return fetch(address, f'{source}{suffix}')
    if source.startswith(('http://', 'https://')):
        return fetch(source, cached_name(source))
    if '://' in source:
        backend_of(source)
        return source
    path = Path(source).expanduser()
    if path.is_dir() and (inside := weights_in(path)):
        return inside
    if not path.is_file():
        names = ', '.join(f'fastvit_<{"|".join(archs)}>.{k}' for k, archs in PUBLISHED.items())
        raise FastViTError(
            f'checkpoint {source!r} does not exist: give a file, a URL or a name {names}'
        )
    return path


def weights_in(folder: Path) -> Path | None:
    """The index of a folder with .safetensors in parts, or its only .safetensors."""
    found = sorted(folder.glob(f'*{INDEX}')) or sorted(folder.glob('*.safetensors'))
    return found[0] if len(found) == 1 else None


def cached_name(address: str) -> str:
    """A name in the cache that is unique to the address."""
    name = Path(urlparse(address).path).name
    if re.search(r'-[0-9a-f]{8,}\.', name):
        return name  # it contains its own hash: named as in torch.hub and mmengine
    return f'{hashlib.sha256(address.encode()).hexdigest()[:8]}/{name}'


def fetch(address: str, name: str) -> Path:
    """The file at ``address``, kept as ``name``; of several processes, one downloads it."""
    cached = Path(torch.hub.get_dir(), 'checkpoints', name)
    if cached.is_file():
        return cached
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        # Ranks get here before there is a process group; a lock also works for other jobs.
        with FileLock(f'{cached}.lock'):
            if not cached.is_file():
                torch.hub.download_url_to_file(address, str(cached))
    except (OSError, HTTPException) as error:
        raise FastViTError(
            f'cannot fetch {address} ({one_line(error)}): '
            f'download it on another machine and save it as {cached}'
        ) from error
    return cached


def backend_of(address: str) -> BaseStorageBackend:
    """The backend of mmengine's file client that reads ``address``."""
    try:
        return get_file_backend(address)
    except ImportError as error:
        raise FastViTError(f'cannot read {address}: {one_line(error)}') from error
    except (KeyError, ValueError) as error:
        roots = ', '.join(f'{p}://' for p in sorted(prefix_to_backends) if p)
        raise FastViTError(
            f'cannot read {address}: expected a file or an address with one of {roots}; '
            'mmengine.fileio.register_backend adds others'
        ) from error


def harmless_types() -> list:
    """What real checkpoints contain besides tensors; none of it runs code when unpickled."""
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
    """Replaces getattr, which HistoryBuffer's pickles use to refer to its own statistics."""
    if owner is not HistoryBuffer or name.startswith('_'):
        raise pickle.UnpicklingError('Unsupported global: GLOBAL getattr')
    return getattr(owner, name)


def read(source: str | Path, map_location='cpu', select: Select | None = None) -> dict:
    """The contents of a checkpoint file; no code in it runs, neither now nor later in mmengine.

    Args:
        source: see :func:`find`; PyTorch's format, ``.safetensors``, or the index of one in parts.
        map_location: as for ``torch.load``; ``.safetensors`` are read to the CPU.
        select: ``select(names, source)`` gives the names of the tensors to read from
            ``.safetensors``; None for all.

    Raises:
        FastViTError: the file is damaged, contains types that are not plain data, or unfolds to
            more than its size.
    """
    place = find(source)
    file = place if isinstance(place, Path) else content_of(place)
    if str(place).endswith(INDEX):
        return read_parts(place, select)
    if str(place).endswith('.safetensors'):
        return read_safetensors(file, place, select)
    refuse_unfolding(file, place)
    try:
        with torch.serialization.safe_globals(harmless_types()):
            checkpoint = torch.load(file, map_location=map_location, weights_only=True)
    except Exception as error:
        if refused := re.search(r'GLOBAL ([\w.]+)', str(error)):
            raise FastViTError(
                f'{place} contains a {refused[1]}, which is not plain data and could run code: '
                'refused; save only its state_dict with torch.save'
            ) from error
        raise FastViTError(
            f'{place} is truncated or not a checkpoint ({one_line(error)}): '
            'delete it, then download or save it again'
        ) from error
    if not isinstance(checkpoint, dict):
        raise FastViTError(f'{place} contains no weights, only a {type(checkpoint).__name__}')
    if isinstance(meta := checkpoint.get('meta'), dict):
        meta.pop('config', None)  # a resuming runner of mmengine would run it as Python
    elif not isinstance(meta, Tensor):
        checkpoint.pop('meta', None)  # nor any other form of it
    return checkpoint


def content_of(address: str) -> io.BytesIO:
    backend = backend_of(address)
    try:
        content = backend.get(address)
    except Exception as error:  # each client has its own
        raise FastViTError(f'cannot read {address}: {one_line(error)}') from error
    if not content:
        raise FastViTError(f'cannot read {address}: it is empty')
    return io.BytesIO(content)


def read_safetensors(
    file: Path | io.BytesIO, place: Path | str, select: Select | None = None
) -> State:
    """The tensors that ``select`` wants; only they take memory, if ``file`` is a path."""
    try:
        from safetensors import SafetensorError, safe_open
        from safetensors.torch import load
    except ImportError as error:
        raise FastViTError(f'{place} needs safetensors: pip install safetensors') from error
    try:
        if not isinstance(file, Path):
            return load(file.getvalue())
        with safe_open(file, 'pt') as tensors:
            names = tensors.keys()
            return {n: tensors.get_tensor(n) for n in (select(names, place) if select else names)}
    except (SafetensorError, OSError) as error:
        raise FastViTError(f'{place} is truncated or not a safetensors file: {error}') from error


def read_parts(index: Path | str, select: Select | None = None) -> State:
    """The tensors of a ``.safetensors`` in parts, one part after the other.

    Raises:
        FastViTError: the index is damaged or not a local file, or a part is missing.
    """
    if not isinstance(index, Path):
        raise FastViTError(f'{index} lists files in parts: download its whole folder first')
    try:
        parts = json.loads(index.read_text())['weight_map']
        names = select(parts.keys(), index) if select else list(parts)
        wanted = {file: [n for n in names if parts[n] == file] for file in map(parts.get, names)}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FastViTError(f'{index} is not an index of .safetensors files: {error}') from error
    state = {}
    for name, inside in wanted.items():
        part = index.with_name(Path(str(name)).name)
        if not part.is_file():
            raise FastViTError(f'{index} lists {name}, which is not in its folder: download it')
        state |= read_safetensors(part, part, lambda _, __, inside=inside: inside)
    return state


def state_dict_of(checkpoint: dict, source) -> State:
    """The tensors of a checkpoint, without the wrappers that training scripts add.

    Raises:
        FastViTError: there are none, or some of their numbers are not finite.
    """
    for key in ('state_dict', 'model', 'state_dict_ema'):
        if isinstance(checkpoint, dict) and isinstance(checkpoint.get(key), dict):
            checkpoint = checkpoint[key]
            break
    if (
        not isinstance(checkpoint, dict)
        or not checkpoint
        or not all(isinstance(v, Tensor) for v in checkpoint.values())
    ):
        raise FastViTError(f'{source} contains no weights: expected a state_dict of tensors')
    prefix = 'module.'
    if all(k.startswith(prefix) for k in checkpoint):
        checkpoint = {k[len(prefix) :]: v for k, v in checkpoint.items()}
    if not all_finite(checkpoint.values()):
        wrong = [k for k, v in checkpoint.items() if not all_finite([v])]
        raise FastViTError(
            f'{source} has weights that are NaN or infinite ({first(wrong)}): its training '
            'diverged; take an earlier checkpoint'
        )
    return checkpoint


def save(checkpoint: dict, path: str | Path) -> None:
    """Write a checkpoint, or only its state dict for ``.safetensors``, completely or not at all.

    Raises:
        FastViTError: it cannot be written.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole(path) as part:
            if path.suffix == '.safetensors':
                write_safetensors(state_dict_of(checkpoint, path), part)
            else:
                torch.save(checkpoint, part)
    except (OSError, RuntimeError) as error:  # PyTorch's writer raises the latter
        raise FastViTError(f'cannot write {path}: {one_line(error)}') from error


def write_safetensors(state: State, path: Path) -> None:
    try:
        from safetensors.torch import save_file
    except ImportError as error:
        raise FastViTError(f'{path} needs safetensors: pip install safetensors') from error
    save_file({k: v.contiguous() for k, v in state.items()}, path, metadata={'format': 'pt'})
