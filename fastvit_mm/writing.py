"""Files that are written completely or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mmengine.fileio import LocalBackend, register_backend

from .errors import FastViTError

PART = '.*.part'  # what a killed process leaves behind


@contextmanager
def whole(path: str | Path) -> Iterator[Path]:
    """A temporary path beside ``path``: what the block writes there becomes ``path`` when it is
    complete and on the disk. If the block fails, or the process is killed, ``path`` stays as it
    was.

    Raises:
        OSError: it cannot be written.
    """
    path = Path(path)
    part = path.with_name(f'.{path.name}.{os.getpid()}.part')
    try:
        yield part
        flush(part)
        part.replace(path)
        with suppress(OSError):  # not every file system flushes folders
            flush(path.parent)
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


def check_target(
    path: str | Path, suffixes: tuple[str, ...] = (), new: bool = False, create: bool = True
) -> Path:
    """Fail before the work, not after it, if a file cannot be written.

    Args:
        suffixes: of names that it may have; any, if there are none.
        new: whether it must not exist yet.
        create: create its folder.

    Returns:
        ``path``, with the user's folder in place of ~.

    Raises:
        FastViTError: it cannot.
    """
    path = Path(path).expanduser()
    if suffixes and not path.name.endswith(suffixes):
        *others, last = suffixes
        raise FastViTError(f'{path}: give a name that ends in {", ".join(others)} or {last}')
    if new and path.exists():
        raise FastViTError(f'{path} exists: give another name, or --force to overwrite it')
    if not create:
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FastViTError(
            f'cannot write {path}: {path.parent} cannot be created: {error.strerror}'
        ) from error
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise FastViTError(f'cannot write {path}: it is a folder or protected')
    return path


def flush(path: Path) -> None:
    """Make the disk hold what was written to a file, or the names in a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@register_backend('whole')
class WholeBackend(LocalBackend):
    """mmengine's backend for local files, which writes them by :func:`whole`."""

    def put(self, obj: bytes, filepath: str | Path) -> None:
        with whole(filepath) as part:
            part.write_bytes(obj)
