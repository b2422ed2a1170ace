"""A run's folder: one run at a time writes to it, and what is in it can be resumed."""

import errno
import logging
import os
import re
import shutil
import socket
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from mmengine.dist import master_only
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.runner import Runner

from fastvit_mm.errors import FastViTError, one_line
from fastvit_mm.hooks.reparameterize import one_outcome

RESUMABLE = re.compile(r'(epoch|iter)_\d+\.pth')
WRITTEN = re.compile(rf'{RESUMABLE.pattern}|best_.+\.pth|last_checkpoint')
LOCK = '.lock'
# the disk is full (or a quota or limit is reached), read-only, or gone
CANNOT_WRITE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.ESTALE}


@contextmanager
def claim(
    folder: str | Path, resume: bool, overwrite: bool = False, launcher: str = 'none'
) -> Iterator[None]:
    """Keep other runs from training in ``folder`` while the block runs.

    The operating system forgets the lock of a process that ends, however it ends; unlike
    ``flock``, its data workers, which may live on for a moment, do not hold it.

    Args:
        resume: the run continues the one whose checkpoints are there.
        overwrite: the run may replace them (:func:`clear`).
        launcher: none, pytorch or slurm. Without one, each process is a run of its own; with one,
            the first holds the folder for all, which have joined their process group.

    Raises:
        FastViTError: another process trains there, there are checkpoints of an earlier run and
            neither ``resume`` nor ``overwrite`` is set, or the folder cannot be written.
    """
    variable = dict(pytorch='RANK', slurm='SLURM_PROCID').get(launcher)
    with ExitStack() as held:
        with one_outcome():
            if variable is None or os.environ.get(variable) == '0':
                several = launcher == 'none' and os.environ.get('WORLD_SIZE', '1') != '1'
                mend = ' (with torchrun: add --launcher pytorch)' if several else ''
                held.enter_context(locked(Path(folder), resume or overwrite, mend))
        yield


@contextmanager
def locked(folder: Path, replaceable: bool, mend: str = '') -> Iterator[None]:
    """:func:`claim` in one process; ``mend`` is added to what is said if it is in use."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / LOCK).open('a+')
    except OSError as error:
        raise FastViTError(
            f'cannot write to the work dir {folder}: {error.strerror}: choose another '
            'with --work-dir'
        ) from error
    with lock:
        try:
            import fcntl

            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            lock.seek(0)
            owner = lock.read().strip() or 'another process'
            raise FastViTError(
                f'the work dir {folder} is in use by {owner}: wait, or choose another '
                f'with --work-dir{mend}'
            ) from error
        except (ImportError, OSError):  # Windows, some network file systems
            print_log(f'{folder}: there are no locks here, so two runs could mix', 'current')
        earlier = sorted(p.name for p in folder.iterdir() if WRITTEN.fullmatch(p.name))
        if earlier and not replaceable:
            raise FastViTError(
                f'the work dir {folder} contains checkpoints of an earlier run ({earlier[0]}): add '
                '--resume to continue it, --overwrite to replace it, or choose another '
                'with --work-dir'
            )
        lock.truncate(0)
        print(f'process {os.getpid()} on {socket.gethostname()}', file=lock, flush=True)
        yield


class OverwriteHook(Hook):
    """Removes an earlier run's checkpoints when all that the new run needs has been built, its
    data read and its weights loaded."""

    priority = 'HIGHEST'

    def before_train(self, runner: Runner) -> None:
        clear(runner.work_dir, keep=runner._load_from)


@master_only
def clear(folder: str | Path, keep: str | Path | None = None) -> None:
    """Remove the checkpoints of an earlier run, except for ``keep``."""
    for path in Path(folder).iterdir():
        kept = keep and Path(keep).is_file() and path.samefile(keep)
        if WRITTEN.fullmatch(path.name) and not kept:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def is_whole(path: Path) -> bool:
    """Whether a file is complete: the checkpoints are zip archives with check sums."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (OSError, ValueError, zipfile.BadZipFile, EOFError, NotImplementedError):
        return False


def latest(folder: str | Path) -> Path | str | None:
    """The checkpoint to resume from: the one that ``last_checkpoint`` names or, if that is missing
    or not complete, the newest one that is. None if there are none.

    An address in ``last_checkpoint`` (``s3://...``) is given as it is.

    Raises:
        FastViTError: there are some, but none is complete; or there was one, which is gone.
    """
    folder = Path(folder)
    hint = folder / 'last_checkpoint'
    text = hint.read_text(errors='replace').strip() if hint.is_file() else ''
    if '://' in text:
        return text
    named = Path(text)
    # The work dir may have been moved, or its checkpoints may have a folder of their own.
    elsewhere = [named.absolute()] if len(named.parts) > 1 else []
    for path in [folder / named.name, *elsewhere]:
        if is_whole(path):
            return path
    folders = dict.fromkeys([folder, *(path.parent for path in elsewhere)])
    found = [
        p for f in folders if os.path.isdir(f) for p in f.iterdir() if RESUMABLE.fullmatch(p.name)
    ]
    what = f'names {text[:200]!r}, which is missing or not complete' if text else ''
    for path in sorted(found, key=lambda p: p.stat().st_mtime_ns, reverse=True):
        if is_whole(path):
            what = what or 'is missing or names no checkpoint'
            print_log(
                f'{hint} {what}: resuming from {path}, the newest complete one',
                'current',
                logging.WARNING,
            )
            return path
    if found:
        raise FastViTError(
            f'no checkpoint in {folder} is complete ({found[0].name} is cut off or damaged): '
            'start again with --overwrite'
        )
    if text:
        raise FastViTError(
            f'{hint} {what}, and there is no other checkpoint: put it back, name one with '
            '--resume FILE, or start again with --overwrite'
        )
    return None


def check_resumable(checkpoint: dict, source) -> None:
    """
    Raises:
        FastViTError: ``source`` has weights, but not the state of a training.
    """
    counts = {key: checkpoint['meta'].get(key) for key in ('epoch', 'iter')}
    missing = [f'{key} in meta' for key, count in counts.items() if not isinstance(count, int)]
    parts = ('optimizer', 'message_hub')
    missing += [part for part in parts if not isinstance(checkpoint.get(part), dict)]
    if missing:
        raise FastViTError(
            f'{source} cannot be resumed, it has no {", ".join(missing)}: give a checkpoint that '
            'training wrote (epoch_*.pth, iter_*.pth), or start from its weights with '
            f'--cfg-options load_from={source}'
        )


@contextmanager
def says_if_not_writable(folder: str | Path) -> Iterator[None]:
    """Turn the failure to write into the work dir into one line.

    Raises:
        FastViTError: the disk is full or read-only, or the folder has vanished.
    """
    # Otherwise each line that cannot be logged prints a traceback.
    before, logging.raiseExceptions = logging.raiseExceptions, False
    try:
        yield
    except OSError as error:
        folder = Path(folder)
        inside = error.filename is not None and folder in Path(str(error.filename)).parents
        if not folder.is_dir():
            raise FastViTError(f'the work dir {folder} has vanished: nothing was saved') from error
        if inside or (error.filename is None and error.errno in CANNOT_WRITE):
            raise FastViTError(
                f'cannot write to the work dir {folder}: {one_line(error)}: '
                'make room or choose another disk, then continue with --resume'
            ) from error
        raise
    finally:
        logging.raiseExceptions = before
